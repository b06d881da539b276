"""A model and the longest batch → the memory and the arithmetic of a training step, without its weights.

The model itself is run, forward and backward, on tensors that have a shape and no content (torch's fake
tensors), in a child process: what is counted is what autograd keeps, whatever the architecture.
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import RootModel, TypeAdapter

from sftlab.config import NoPeft, PeftConfig, Qlora, TrainConfig
from sftlab.instance.machine import BRIEF_SPIN, Machine
from sftlab.instance.precision_worker import one_layer
from sftlab.model.adapters import keep_inputs, lora_config
from sftlab.model.base import Base, beside_text, cache_bytes, decoder_layers, needs_padding_mask
from sftlab.runtime.processes import child, leave_out, serve
from sftlab.runtime.store import write_json

# Bytes that an optimizer keeps for a trained weight, by a part of its name, the more special first.
STATE_BYTES = (("4bit", 1.1), ("8bit", 2.1), ("adafactor", 0.1), ("lion", 4.0), ("sgd", 0.0), ("rmsprop", 4.0))
ADAM_BYTES = 8.0

# 4 bits a weight and a float32 scale for each block of 64; by double quantisation 8 bits for it.
BYTES_4BIT = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}

# What TRL's loss holds of the logits on a GPU: a tile of 4,096 tokens, in bfloat16 and as float32, of this many words.
TILE_TOKENS, TILE_WORDS, TILE_BYTES = 4096, 8192, 6


@dataclass(frozen=True)
class Batch:
    """A batch as one process sees it.

    Rows, tokens of the longest row, positions at which a row has a target, and targets in all.
    """

    rows: int
    length: int
    positions: int
    targets: int


@dataclass(frozen=True)
class Traced:
    """Bytes on a device by what they are for, the bytes at the peak of a step, and floating-point operations.

    The latter are of the longest batches; ``flops_per_second`` is what this machine's CPU does in a layer of
    the model.

    ``activations`` are what the model keeps until it goes backward; ``logits`` is what the peak has on top: the
    output head, the loss, and what one layer needs while it is worked on. In ``peak`` gradients take the place
    of activations that are done with, and so it is less than the sum.
    """

    parameters: int
    trainable: int
    libraries: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    peak: float
    train_flops: float
    eval_flops: float
    flops_per_second: float | None
    kv_bytes_per_token: float
    merged_bytes: float


@dataclass(frozen=True)
class Shape:
    """A training of which a step is traced, with its longest batch, and the longest of its validation."""

    peft: PeftConfig
    train: TrainConfig
    longest: Batch
    evaluated: Batch


class TraceTask(RootModel[dict[str, Any]]):
    """The task of the process that traces."""


def traced(base: Base, machine: Machine, shapes: Sequence[Shape]) -> list[Traced]:
    """Trace a step of each in a child process. It needs no GPU, and of memory a layer of the model at most."""
    with TemporaryDirectory(prefix="sftlab-") as folder:
        given = {
            "base": str(base.path.resolve()),
            "trust_remote_code": base.trust_remote_code,
            "machine": asdict(machine),
            "shapes": [
                {
                    "peft": shape.peft.model_dump(),
                    "train": shape.train.model_dump(),
                    "longest": asdict(shape.longest),
                    "evaluated": asdict(shape.evaluated),
                }
                for shape in shapes
            ],
        }
        child("sftlab.train.trace", Path(folder), TraceTask(given),
              environment={"CUDA_VISIBLE_DEVICES": "", **BRIEF_SPIN})  # fmt: skip
        return [Traced(**found) for found in json.loads((Path(folder) / "traced.json").read_text("utf-8"))]


# ------------------------------------------------------------------- in the child process


def run(folder: Path, task: TraceTask) -> None:
    """Trace, and write ``traced.json``."""
    given = task.root
    leave_out("bitsandbytes", "wandb")

    machine = Machine(**given["machine"])
    libraries = _libraries(machine)
    found = []
    for shape in given["shapes"]:
        train = TrainConfig.model_validate(shape["train"])
        peft: PeftConfig = TypeAdapter(PeftConfig).validate_python(shape["peft"])
        longest, evaluated = Batch(**shape["longest"]), Batch(**shape["evaluated"])
        code = given["trust_remote_code"]
        found.append(asdict(trace(Path(given["base"]), peft, train, machine, longest, evaluated, libraries, code=code)))
    write_json(folder / "traced.json", found)


def _libraries(machine: Machine) -> float:
    """What a training process holds before its model: on the CPU measured in this one, on a GPU its context."""
    if machine.device == "cuda":
        return 0.6 * 2**30
    import sftlab.train.trainer  # noqa: F401  # for what it takes

    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def trace(
    path: Path,
    peft: PeftConfig,
    train: TrainConfig,
    machine: Machine,
    longest: Batch,
    evaluated: Batch,
    libraries: float = 0.0,
    *,
    code: bool = False,
) -> Traced:
    """Run a training step and a validation batch of a model's folder on tensors without content.

    ``libraries`` are the bytes that a process has before it has a model. ``code`` allows Python code of the model.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    fp32 = isinstance(peft, NoPeft) or not train.bf16
    model = _model(path, peft, train, machine, torch.float32 if fp32 else torch.bfloat16, code=code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with FakeTensorMode():
        _without_content(model)
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        weights = sum(_bytes(parameter) for parameter in model.parameters())
        gradients = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
        masked = needs_padding_mask(model.get_base_model() if hasattr(model, "get_base_model") else model)
        one_sequence = train.packing or bool(train.extra.get("padding_free"))  # of rows that must not see each other
        model.train()
        step = _run(model, longest, train, machine, backward=True, masked=masked or one_sequence)
        model.eval()
        validation = _run(model, evaluated, train, machine, backward=False, masked=masked)
    extra = 0.0
    if isinstance(peft, Qlora):
        quantised, largest = _linear(model)
        weights -= quantised * (4 if fp32 else 2) - quantised * BYTES_4BIT[peft.bnb_4bit_use_double_quant]
        extra = largest * 2.0  # the one that is being worked with, in bfloat16
    state = next((size for name, size in STATE_BYTES if name in train.optim), ADAM_BYTES) * trainable
    if machine.strategy == "fsdp":
        weights, gradients, state = (size / machine.world_size for size in (weights, gradients, state))
        extra += max(sum(map(_bytes, layer.parameters())) for layer in decoder_layers(model) or [model])  # one by one
    elif machine.world_size > 1:
        extra += gradients  # the buckets in which DDP sends them
    return Traced(
        parameters=parameters,
        trainable=trainable,
        libraries=libraries,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=step.kept,
        logits=max(0.0, max(step.peak, validation.peak) - step.kept - gradients) + extra,
        peak=libraries + weights + state + extra + max(step.peak, validation.peak, gradients),
        train_flops=step.flops,
        eval_flops=validation.flops,
        flops_per_second=_speed(model.config, longest, peft, train, machine, code=code)
        if machine.device == "cpu"
        else None,
        kv_bytes_per_token=float(cache_bytes(model.config)),
        merged_bytes=2.0 * (parameters - (0 if isinstance(peft, NoPeft) else trainable)),
    )


def _model(path: Path, peft: PeftConfig, train: TrainConfig, machine: Machine, dtype: Any, *, code: bool) -> Any:
    """The model with its adapters, of shapes alone."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=code, local_files_only=True)
    # FlashAttention keeps as much as sdpa, and this may be a machine without it.
    attention = "eager" if machine.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=code
        )
        model.config.use_cache = False
        for name in beside_text(model):
            model.base_model.get_submodule(name).requires_grad_(False)
        if (lora := lora_config(peft, model)) is not None:
            model = get_peft_model(model, lora)
            if train.bf16:
                keep_inputs(model)
            # As TRL does it: adapters of a quantised model are trained in bfloat16, others in float32.
            trained = torch.bfloat16 if isinstance(peft, Qlora) and train.bf16 else torch.float32
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(trained)
    return model


def _without_content(model: Any) -> None:
    """Give the model, which is on the meta device, fake tensors as if on the CPU: autocast knows that device."""
    import torch

    made: dict[int, tuple[Any, Any]] = {}  # tied weights stay tied
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                new = torch.nn.Parameter(
                    torch.empty(old.shape, dtype=old.dtype, device="cpu"), requires_grad=old.requires_grad
                )
                module._parameters[name] = made.setdefault(id(old), (new, old))[0]
        for name, old in list(module._buffers.items()):
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device="cpu")


@dataclass
class Counted:
    """Bytes beside the weights: at the peak and at the output head; floating-point operations."""

    peak: float = 0.0
    kept: float = 0.0
    flops: float = 0.0


def _run(model: Any, batch: Batch, train: TrainConfig, machine: Machine, *, backward: bool, masked: bool) -> Counted:
    """One batch through the model, with the loss as ``sftlab.train.trainer`` computes it.

    ``masked`` is whether attention has a mask of its own for each row.
    """
    import torch
    from torch.nn import functional

    counted = Counted()
    cpu = machine.device == "cpu"
    with (
        _rows_are_whole(),
        _counting(model, counted),
        torch.autocast("cpu", torch.bfloat16, enabled=train.bf16),
        torch.set_grad_enabled(backward),
    ):
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        # Elsewhere TRL's loss makes logits in tiles, which are added below.
        kept = torch.arange(batch.positions if cpu else 1)
        mask = torch.ones_like(ids) if masked else None
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits.flatten(0, 1)
        logits = logits[torch.arange(min(batch.targets, len(logits)))].float()
        loss = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
        del logits
        if backward:
            loss.backward()
    if not cpu:
        text = model.config.get_text_config()
        counted.peak += min(batch.targets, TILE_TOKENS) * min(text.vocab_size, TILE_WORDS) * TILE_BYTES
        counted.peak += batch.targets * text.hidden_size * 4  # the gradient, summed up in float32
        # Forward, and backward again forward and the gradient of the hidden states.
        counted.flops += 2.0 * batch.targets * text.hidden_size * text.vocab_size * (3 if backward else 1)
    return counted


@contextmanager
def _rows_are_whole() -> Iterator[None]:
    """Let transformers take each row for one sequence: tensors without content do not show it, and it makes a mask."""
    from transformers import masking_utils

    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


@contextmanager
def _counting(model: Any, counted: Counted) -> Iterator[None]:
    """Count what is allocated and computed inside, beside what the model has."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter
    from torch.utils.flop_counter import flop_registry

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, size = query.shape
        return int(2 * batch * heads * length * key.shape[2] * (size + value.shape[3]))

    def attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        batch, heads, length, size = query.shape  # the scores once more, and two gradients of each product
        return int(2 * batch * heads * length * key.shape[2] * (3 * size + 2 * value.shape[3]))

    # The registry has attention on GPUs only, and in torch 2.11 none with fewer heads of keys than of queries.
    aten = torch.ops.aten
    arithmetic = {
        **flop_registry,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }

    class Count(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.now = 0
            self.known = {id(parameter.untyped_storage()) for parameter in model.parameters()}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if (count := arithmetic.get(func._overloadpacket)) is not None:
                counted.flops += count(*args, **(kwargs or {}), out_val=out)
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor.untyped_storage())
            return out

        def add(self, storage: Any) -> None:
            number = id(storage)
            if number not in self.known:
                self.known.add(number)
                self.now += storage.nbytes()
                counted.peak = max(counted.peak, self.now)
                weakref.finalize(storage, self.free, number, storage.nbytes())

        def free(self, number: int, size: int) -> None:
            self.known.discard(number)
            self.now -= size

    count = Count()

    def at_head(*_: Any) -> None:
        counted.kept = float(count.now)

    held = [parameter.untyped_storage() for parameter in model.parameters()]  # so that their ids stay theirs
    hook = model.get_output_embeddings().register_forward_pre_hook(at_head)
    try:
        with count:
            yield
    finally:
        hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
        del held


def _speed(config: Any, batch: Batch, peft: PeftConfig, train: TrainConfig, machine: Machine, *, code: bool) -> float:
    """FLOP/s of this CPU in training: those of one of the model's own layers, forward and backward, with real tensors.

    How fast it multiplies large matrices tells little of that.
    """
    whole = isinstance(peft, NoPeft)
    dtype = "float32" if whole or not train.bf16 else "bfloat16"
    attention = "eager" if machine.attn_implementation == "eager" else "sdpa"
    layer = one_layer(config, dtype, attention=attention, code=code)
    if not whole:
        layer.requires_grad_(requires_grad=False)
        layer.enable_input_require_grads()
    # Real tensors: packed rows make one sequence of many thousand tokens, whose attention would take all memory.
    length = min(batch.length, 2048)
    small = Batch(max(1, min(batch.rows, 2048 // length)), length, 1, 1)
    counted, best = Counted(), math.inf
    for _ in range(4):
        begin = time.perf_counter()
        counted = _run(layer, small, train, machine, backward=True, masked=False)
        best = min(best, time.perf_counter() - begin)
    return counted.flops / best


def _bytes(parameter: Any) -> float:
    return float(parameter.numel() * parameter.element_size())


def _linear(model: Any) -> tuple[int, int]:
    """Weights of the layers that bitsandbytes quantises, all and of the largest: every linear one but the head's."""
    from torch import nn

    head = model.get_output_embeddings()
    sizes = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]
    return sum(sizes), max(sizes, default=0)


if __name__ == "__main__":
    serve(TraceTask, run)
