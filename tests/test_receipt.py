"""What took effect is read off the model: libraries replace methods of modules, not the modules."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.smoke  # torch


def of_liger(name: str) -> Callable[..., Any]:
    """A function that was defined in a module of Liger."""
    scope: dict[str, Any] = {"__name__": f"liger_kernel.transformers.{name}"}
    exec("def forward(self, x):\n    return x\n", scope)
    made: Callable[..., Any] = scope["forward"]
    return made


@pytest.fixture
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))


def trainer(model: Any, *, smoothing: bool = False) -> Any:
    return SimpleNamespace(model=model, own_head=False, label_smoother=object() if smoothing else None)


def test_modules_that_liger_patched_are_counted(llama: Any) -> None:
    from sftlab.stages.train import liger_modules

    assert liger_modules(llama) == 0
    # As its monkey_patch does it: bound to the instance, whose class stays transformers'.
    llama.model.norm.__dict__["forward"] = MethodType(of_liger("rms_norm"), llama.model.norm)
    llama.model.layers[0].mlp.__dict__["forward"] = MethodType(of_liger("swiglu"), llama.model.layers[0].mlp)
    assert liger_modules(llama) == 2


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_the_head_is_the_one_that_the_model_has_now(llama: Any, adapters: bool, bf16: bool) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    from sftlab.stages.train import output_head

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
