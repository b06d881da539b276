"""Savings in the memory of a training step change no loss, and checkpointing is on if it is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import composed, write_model
from test_receipt import tiny, with_adapters

from sftlab.errors import StageError
from sftlab.instance import machine as instance
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.runtime.store import Store
from sftlab.train import memory
from sftlab.train import stage as train
from sftlab.train.receipt import checkpointed
from sftlab.train.trace import Shape, Trace
from sftlab.train.workload import Row

GIB = 2**30
IGNORED = -100
ARCHITECTURES = ["llama", "gemma3", "gemma3_vision", "qwen3"]


# ------------------------------------------------------------------- whether checkpointing is on


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return Base("base", write_model(tmp_path / "model"), "identity", False, None)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[Shape]]:
    """Let a step on rows of 80 tokens take this many GiB; the result lists what is traced."""
    splits = {"train": [Row(80, 20)] * 9, "validation": [Row(80, 20)] * 3}
    monkeypatch.setattr(memory, "rows_by_split", lambda _: splits)

    def peak(gib: float) -> list[Shape]:
        shapes: list[Shape] = []

        def traced(_: Base, __: Machine, asked: list[Shape]) -> list[Trace]:
            shapes.extend(asked)
            names = dict.fromkeys(Trace.__dataclass_fields__, 0.0)
            return [Trace(**{**names, "peak": gib * GIB})] * len(asked)  # type: ignore[arg-type]

        monkeypatch.setattr(memory, "traced", traced)
        return shapes

    return peak


AUTO = ["model=tiny_random", "train.gradient_checkpointing=auto", "train.per_device_train_batch_size=4"]
TOKENS: Any = SimpleNamespace(stage=SimpleNamespace(path=Path("tokens"), key="tokens"))


def decided(store: Path, base: Base, *overrides: str) -> tuple[bool, Any]:
    cfg = composed(*AUTO, *overrides)
    machine = instance.find(cfg.instance, elsewhere=True)
    resolved, stage = memory.with_checkpointing(cfg, base, TOKENS, machine, Store(store))
    assert resolved == cfg.model_copy(update={"train": resolved.train})  # nothing else changes
    return resolved.train.gradient_checkpointing, stage


@pytest.mark.parametrize(
    ("gib", "overrides", "on"),
    [
        (10, ["instance=small"], False),
        (23, ["instance=small"], True),  # within the error of the estimate
        (25, ["instance=small"], True),
        (25, ["instance=small", "instance.memory_gib=80"], False),
        (10, ["instance=small", "instance.memory_gib=8"], True),
        (1, ["instance=cpu", "instance.memory_gib=4"], False),
        (5, ["instance=cpu", "instance.memory_gib=4"], True),
        (10, ["instance=large", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"], False),
        (25, ["instance=large", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"], True),
    ],
)
def test_it_is_on_if_the_longest_batch_does_not_fit(
    tmp_path: Path, base: Base, traces: Callable[[float], list[Shape]], gib: float, overrides: list[str], on: bool
) -> None:
    shapes = traces(gib)
    assert decided(tmp_path / "store", base, *overrides)[0] is on
    (shape,) = shapes
    assert shape.train.gradient_checkpointing is False
    assert (shape.longest.rows, shape.longest.length) == (4, 80)


@pytest.mark.parametrize(
    "overrides",
    [
        ["instance=small", "instance.memory_gib=null"],  # a GPU of another machine
        # Each machine would measure its own memory.
        ["instance=cpu", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"],
    ],
)
def test_it_is_on_if_the_memory_is_unknown(
    tmp_path: Path,
    base: Base,
    traces: Callable[[float], list[Shape]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(memory, "nvidia_smi", lambda _: [])
    shapes = traces(0.1)
    assert decided(tmp_path / "store", base, *overrides) == (True, None)
    assert shapes == []
    assert "the memory of the device is unknown" in caplog.text


@pytest.mark.parametrize("error", [StageError("no layer"), KeyError("vocab_size")])
def test_it_is_on_if_the_estimate_fails(
    tmp_path: Path,
    base: Base,
    traces: Callable[[float], list[Shape]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    caplog.set_level(logging.INFO)
    traces(0.1)

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(memory, "traced", fails)
    assert decided(tmp_path / "store", base, "instance=small") == (True, None)
    assert str(error) in caplog.text
    # A failed estimate is repeated.
    assert len(traces(0.1)) == 0
    assert decided(tmp_path / "store", base, "instance=small")[0] is False


@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_not_changed(
    tmp_path: Path, base: Base, traces: Callable[[float], list[Shape]], value: bool
) -> None:
    shapes = traces(100)
    setting = f"train.gradient_checkpointing={str(value).lower()}"
    assert decided(tmp_path / "store", base, "instance=small", setting) == (value, None)
    assert shapes == []


def test_jobs_with_the_same_batches_share_the_estimate(
    tmp_path: Path, base: Base, traces: Callable[[float], list[Shape]]
) -> None:
    shapes, store = traces(10), tmp_path / "store"
    first = decided(store, base, "instance=small")
    for same in ("train.learning_rate=1e-5", "train.num_train_epochs=9", "seed=9", "instance.memory_gib=80"):
        again = decided(store, base, "instance=small", same)
        assert (again[0], again[1].path) == (first[0], first[1].path)
    assert len(shapes) == 1
    others = ("peft.r=64", "train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=1", "peft=none",
              "train.optim=sgd", "instance.attn_implementation=eager", "train.bf16=false")  # fmt: skip
    for count, other in enumerate(others, 2):
        assert decided(store, base, "instance=small", other)[1].path != first[1].path
        assert len(shapes) == count


def test_the_stage_key_does_not_depend_on_checkpointing(base: Base) -> None:
    inputs = []
    for value in ("true", "false"):
        cfg = composed("model=tiny_random", "instance=small", f"train.gradient_checkpointing={value}")
        machine = instance.find(cfg.instance, elsewhere=True)
        inputs.append(train.inputs("tokens", base, cfg.peft, cfg.train, machine, 1))
    assert inputs[0] == inputs[1]


@pytest.mark.parametrize(("name", "value"), [("demo", False), ("default", "auto")])
def test_the_defaults(name: str, value: Any) -> None:
    assert composed("model=tiny_random", "instance=cpu", f"train={name}").train.gradient_checkpointing == value


# ------------------------------------------------------------------- what a step retains


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(architecture: str, *, attention: str = "sdpa", half: bool = False, **adapters: Any) -> Any:
    """A tiny model with adapters. Gemma's rows are longer than the window of its first layer."""
    import torch

    torch.manual_seed(0)
    model = tiny(architecture, attention)
    text = model.config.get_text_config()
    if architecture.startswith("gemma"):
        assert (text.sliding_window, text.layer_types) == (8, ["sliding_attention", "full_attention"])
    return with_adapters(model.bfloat16() if half else model, **adapters)


def padded() -> dict[str, Any]:
    """Rows of 40, 25 and 12 tokens, whose second half has targets."""
    import torch

    draw = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.full((3, 40), 2),
        "attention_mask": torch.zeros(3, 40, dtype=torch.long),
        "labels": torch.full((3, 40), IGNORED),
    }
    for row, length in enumerate((40, 25, 12)):
        ids = torch.randint(3, 300, (length,), generator=draw)
        batch["input_ids"][row, :length] = ids
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, length // 2 : length] = ids[length // 2 :]
    return batch


def stepped(model: Any, *, autocast: bool) -> tuple[Any, Any, int]:
    """A batch's losses per token, the gradients of all adapters, and the bytes retained for the backward pass."""
    import torch

    from sftlab.train.trainer import token_losses

    model.train()
    torch.manual_seed(5)
    kept = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses, _ = token_losses(model, padded())
        loss = losses.sum()
    loss.backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
    return losses.detach(), torch.cat(gradients), sum(kept.values())


@pytest.mark.smoke  # torch
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_checkpointing_changes_no_bit(one_thread: None, architecture: str, dropout: float, autocast: bool) -> None:
    import torch

    plain = seeded(architecture, half=autocast, dropout=dropout)
    other = seeded(architecture, half=autocast, dropout=dropout)
    assert not checkpointed(plain)
    other.gradient_checkpointing_enable({"use_reentrant": False})
    other.enable_input_require_grads()
    assert checkpointed(other)
    (loss, gradients, kept), (again, same, less) = stepped(plain, autocast=autocast), stepped(other, autocast=autocast)
    assert torch.equal(loss, again)
    assert torch.equal(gradients, same)
    assert less < kept / 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_retain_their_inputs_in_bfloat16(one_thread: None, architecture: str) -> None:
    import torch

    from sftlab.model.adapters import keep_inputs

    plain, other = seeded(architecture, half=True), seeded(architecture, half=True)
    keep_inputs(other)
    (loss, gradients, kept), (again, same, less) = stepped(plain, autocast=True), stepped(other, autocast=True)
    assert torch.equal(loss, again)
    assert torch.equal(gradients, same)
    assert less < 0.93 * kept


def test_with_dropout_the_inputs_of_adapters_differ_by_rounding(one_thread: None) -> None:
    import torch

    from sftlab.model.adapters import keep_inputs

    plain, other, seed = (seeded("llama", half=True, dropout=dropout) for dropout in (0.1, 0.1, 0.2))
    keep_inputs(other)
    (_, gradients, kept), (_, close, less), (_, far, _) = (
        stepped(model, autocast=True) for model in (plain, other, seed)
    )
    assert less < 0.9 * kept
    assert torch.cosine_similarity(gradients, close, dim=0) > 0.999
    assert torch.cosine_similarity(gradients, far, dim=0) < 0.999


def test_dora_still_computes_in_float32(one_thread: None) -> None:
    import torch

    from sftlab.model.adapters import keep_inputs

    plain, other = seeded("llama", half=True, dora=True), seeded("llama", half=True, dora=True)
    keep_inputs(other)
    (loss, gradients, _), (again, same, _) = stepped(plain, autocast=True), stepped(other, autocast=True)
    assert torch.equal(loss, again)
    assert torch.equal(gradients, same)


# ------------------------------------------------------------------- padding


def trainer(model: Any, base: Base, tmp_path: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig

    from sftlab.train.trainer import Trainer

    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 6]], "labels": [[IGNORED, 6, 7], [IGNORED, 6]]})
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=base.tokenizer(),
        settings=composed().train,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mask_for_padding_at_the_end_changes_no_loss(
    one_thread: None, tmp_path: Path, base: Base, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    masked, masks = stepped(seeded(architecture), autocast=False)[:2], []
    model = seeded(architecture)
    prepared = trainer(model, base, tmp_path)
    assert prepared.padding_mask is False
    text = model.get_base_model().get_decoder()
    text.register_forward_pre_hook(lambda *call: masks.append(call[2].get("attention_mask")), with_kwargs=True)
    loss, gradients, _ = stepped(prepared.model, autocast=False)
    (mask,) = masks
    assert not isinstance(mask, torch.Tensor)  # with an image tower, Gemma has a mask for each kind of layer
    assert torch.allclose(loss, masked[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradients, masked[1], rtol=1e-4, atol=1e-6)


def test_models_that_see_or_count_padding_have_a_mask(tmp_path: Path, base: Base) -> None:
    from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from sftlab.model.base import needs_padding_mask

    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300,
    }  # fmt: skip
    experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, moe_intermediate_size=16, num_experts=4))
    assert experts.config._attn_implementation == "sdpa"
    assert needs_padding_mask(experts)
    assert needs_padding_mask(tiny("llama", "eager"))

    class OwnCode(LlamaForCausalLM):  # type: ignore[misc]
        pass

    assert not needs_padding_mask(tiny("llama", "sdpa"))
    assert needs_padding_mask(OwnCode(tiny("llama", "sdpa").config))
    config = tiny("gemma3", "sdpa").config
    config.use_bidirectional_attention = True
    assert needs_padding_mask(type(tiny("gemma3", "sdpa"))(config))
    assert trainer(tiny("llama", "eager"), base, tmp_path).padding_mask is True


def test_padding_at_the_front_matters(one_thread: None) -> None:
    """The comparison above can fail."""
    import torch

    model = seeded("llama")
    ids = torch.tensor([[2, 2, 2, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        with_mask, without = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits
    assert not torch.allclose(with_mask[0, -1], without[0, -1], atol=1e-3)


# ------------------------------------------------------------------- the allocator


@pytest.mark.parametrize(
    ("device", "user", "expected"),
    [
        ("cuda", {}, "expandable_segments:True"),
        ("cuda", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ("cpu", {}, None),
    ],
)
def test_segments_of_gpu_memory_can_grow(
    monkeypatch: pytest.MonkeyPatch, device: str, user: dict[str, str], expected: str | None
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    machine = Machine("small", device, 1, "sdpa")
    assert machine.training_environment().get("PYTORCH_ALLOC_CONF") == expected
    assert "PYTORCH_CUDA_ALLOC_CONF" not in machine.training_environment()
    assert all("PYTORCH_ALLOC_CONF" not in engine for engine in machine.engines(1))


def test_wsl2_does_not_support_growing_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    kernel = SimpleNamespace(release="6.6.87.2-microsoft-standard-WSL2")
    monkeypatch.setattr(instance.os, "uname", lambda: kernel)
    assert "PYTORCH_ALLOC_CONF" not in Machine("small", "cuda", 1, "sdpa").training_environment()
