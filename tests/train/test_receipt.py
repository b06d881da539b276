"""What took effect is read from the model: libraries replace methods of modules, not the modules."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from test_cli import whole

from sftlab.runtime.run import Run

pytestmark = pytest.mark.smoke  # torch


def of_liger(name: str) -> Callable[..., Any]:
    """A function defined in a module of Liger."""
    scope: dict[str, Any] = {"__name__": f"liger_kernel.transformers.{name}"}
    exec("def forward(self, x):\n    return x\n", scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


@pytest.fixture
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))


def trainer(model: Any, *, smoothing: bool = False) -> Any:
    return SimpleNamespace(model=model, own_head=False, label_smoother=object() if smoothing else None)


def test_modules_that_liger_patched_are_counted(llama: Any) -> None:
    from sftlab.train.receipt import liger_modules

    assert liger_modules(llama) == 0
    # As its monkey_patch does: bound to the instance, whose class is that of transformers.
    llama.model.norm.__dict__["forward"] = MethodType(of_liger("rms_norm"), llama.model.norm)
    llama.model.layers[0].mlp.__dict__["forward"] = MethodType(of_liger("swiglu"), llama.model.layers[0].mlp)
    assert liger_modules(llama) == 2


PATCH = """
import sys
from test_receipt import tiny, with_adapters
from transformers.integrations.liger import apply_liger_kernel
from sftlab.train.receipt import liger_modules
model = with_adapters(tiny(sys.argv[1]))
before = liger_modules(model)
apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
print(before, liger_modules(model))
"""


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma3_vision", "qwen3"])
def test_modules_that_the_real_liger_patches_are_counted(architecture: str) -> None:
    """Below adapters, as in training. Patching needs no GPU, and changes classes for the whole process."""
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", PATCH, architecture], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split()[-2:])
    assert before == 0
    assert after >= 7  # MLP and two norms in each of two layers, and the last norm


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_the_head_is_the_one_that_the_model_has_now(llama: Any, adapters: bool, bf16: bool) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    from sftlab.train.receipt import output_head

    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"])) if adapters else llama
    assert output_head(trainer(model)) == "whole logits"
    llama.forward = MethodType(of_liger("model.llama"), llama)
    assert output_head(trainer(model)) == "Liger's kernel"
    del llama.forward
    add_fused_lm_head(llama)  # as SFTTrainer does, with or without Liger's layers
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no").prepare(model)  # wraps forward once more
    assert output_head(trainer(model)) == "chunked"
    assert output_head(trainer(model, smoothing=True)) == "whole logits"
    assert output_head(SimpleNamespace(own_head=True)) == "head on target positions"


# ------------------------------------------------------------------- floating-point operations


def tiny(architecture: str, attention: str = "eager") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from sftlab.model.base import beside_text
    from sftlab.model.random import random_config

    tokens = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config = random_config(architecture, 300, tokens)  # type: ignore[arg-type]
    text = config.get_text_config()
    if architecture.startswith("gemma"):
        text.sliding_window, text.layer_types = 8, ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for name in beside_text(model):
        model.base_model.get_submodule(name).requires_grad_(False)
    return model


def with_adapters(
    model: Any, r: int = 4, top_layers: float = 1.0, dropout: float = 0.0, dora: bool = False, fused: bool = False
) -> Any:
    from peft import get_peft_model

    from sftlab.config import Lora
    from sftlab.model.adapters import lora_config

    lora = Lora(
        method="lora", r=r, lora_alpha=8.0, lora_dropout=dropout, target_modules="all-linear", use_rslora=False,
        use_dora=dora, top_layers=top_layers, fused=fused,
    )  # fmt: skip
    return get_peft_model(model, lora_config(lora, model))


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma3_vision", "qwen3"])
def test_flops_are_those_that_torch_counts(architecture: str, adapters: bool) -> None:
    """Except attention scores (bmm)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sftlab.train.flops import flops_per_token

    model = tiny(architecture)
    if adapters:
        model = with_adapters(model)
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # as the trainer does with checkpointing
        model.eval()  # without recomputation
    ids = torch.randint(3, 300, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=torch.arange(40, 64), use_cache=False).logits.sum().backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts.pop("aten.bmm") > 0
    assert flops_per_token(model, 24 / 64) * ids.numel() == sum(counts.values())


def test_layers_below_the_lowest_adapter_have_no_backward_pass() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sftlab.train.flops import flops_per_token

    model = with_adapters(tiny("llama"), top_layers=0.5)
    layers = model.get_base_model().model.layers
    assert [any(weight.requires_grad for weight in layer.parameters()) for layer in layers] == [False, True]
    ids = torch.randint(3, 300, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    counts.pop("aten.bmm")
    # The formula counts the gradient of that layer's input, which is not needed either.
    attention = layers[1].self_attn
    first = sum(part.base_layer.weight.numel() for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    adapters = sum(
        part.lora_A["default"].weight.numel() for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    expected = sum(counts.values()) / ids.numel() + 2 * (first + adapters)
    assert flops_per_token(model, 1.0) == expected


def test_flops_of_gemma_by_hand() -> None:
    """The shape of Gemma 3 4B: 3.2 billion weights in its layers, 0.7 in the head, 0.4 in the vision tower."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from sftlab.train.flops import flops_per_token

    text = {
        "vocab_size": 262_208, "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    attention, mlp = 2560 * (2048 + 2 * 1024) + 2048 * 2560, 3 * 2560 * 10_240
    layers, head = 34 * (attention + mlp), 262_208 * 2560
    assert sum(weight.numel() for weight in model.parameters()) > layers + head + 4e8
    assert flops_per_token(model, 1.0) == 6 * (layers + head)
    for weight in model.parameters():
        weight.requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert flops_per_token(model, 1.0) == 4 * (layers + head) == pytest.approx(15.5e9, rel=0.005)
    assert flops_per_token(model, 0.25) == 4 * (layers + 0.25 * head)
    with torch.device("meta"):
        adapted = with_adapters(model, r=16)
    sides = (2560 + 2048) + 2 * (2560 + 1024) + (2048 + 2560) + 3 * (2560 + 10_240)
    assert flops_per_token(adapted, 1.0) == 4 * (layers + head) + 6 * 16 * 34 * sides


def test_only_the_experts_of_a_token_are_counted() -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from sftlab.train.flops import flops_per_token

    shape = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "num_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    attention = 32 * (32 + 2 * 16) + 32 * 32
    router, experts = 8 * 32, 2 * 3 * 32 * 16
    assert flops_per_token(model, 1.0) == 6 * (2 * (attention + router + experts) + 100 * 32)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_compiled_model_and_a_fused_optimizer_are_recorded(tmp_path: Path, optim: str) -> None:
    """With the backend that compiles to eager code: generating C++ would take a minute."""
    settings = [
        *("model=tiny_random", "instance=cpu", "tracking=none", "mode=train", "instance.bf16=false"),
        *("dataset.split={train: 4, validation: 2, test: 2}", "train.num_train_epochs=1", f"train.optim={optim}"),
    ]
    if compiled := optim == "adamw_torch":
        settings += ["train.torch_compile=true", "+train.extra.torch_compile_backend=eager"]
    done = whole(tmp_path, *settings, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    receipt = Run.read(tmp_path / "run").record.receipt
    assert receipt is not None
    assert (receipt.compiled_graphs > 0) == compiled
    assert receipt.optimizer == ("AdamW" if compiled else "AdamW, fused")
