"""Trace a training step in a child process: its memory and floating-point operations, without the weights.

The model runs forward and backward on fake tensors, which need no memory and no GPU.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sftlab.config import NoPeft, PeftConfig, Qlora, TrainConfig
from sftlab.instance.machine import Machine
from sftlab.instance.precision_worker import one_layer
from sftlab.model.adapters import keep_inputs, lora_config
from sftlab.model.base import beside_text, cache_bytes, decoder_layers, needs_padding_mask
from sftlab.runtime.processes import leave_out, serve
from sftlab.runtime.store import write_json
from sftlab.train.counting import Batch, count

TRACES = "traces.json"

# Bytes of optimizer state per trained weight, by a part of the optimizer's name, specific parts first.
STATE_BYTES = (("4bit", 1.1), ("8bit", 2.1), ("adafactor", 0.1), ("lion", 4.0), ("sgd", 0.0), ("rmsprop", 4.0))
ADAM_BYTES = 8.0

# 4 bits per weight, and a scale for each block of 64: in float32, or with double quantisation in 8 bits.
BYTES_4BIT = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}

# Bytes of a CUDA context with its libraries.
CONTEXT_BYTES = 0.6 * 2**30
# Tokens of the batch that times a layer: attention over a packed sequence of many thousand would fill the memory.
TIMED_TOKENS = 2048


@dataclass(frozen=True)
class Shape:
    """A training to trace: its settings, its longest batch, and the longest batch of its validation."""

    peft: PeftConfig
    train: TrainConfig
    longest: Batch
    evaluated: Batch


class TraceTask(BaseModel):
    """Trainings of one model to trace."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    model: Path
    """Folder of the model; only its config is read."""
    trust_remote_code: bool = False
    """Whether to run Python code of the model."""
    machine: Machine
    """Where it would be trained."""
    shapes: list[Shape]
    """The trainings."""


@dataclass(frozen=True)
class Trace:
    """Memory of a device in bytes, and floating-point operations of a step on the longest batch.

    ``libraries`` is what a process holds before it loads the model. ``activations`` are retained until the backward
    pass. ``logits`` is what the peak has in addition: output head, loss, and the working memory of a layer. In the
    backward pass gradients replace activations, so ``peak`` is less than the sum of the parts. ``flops_per_second`` is
    the speed of this machine's CPU in a layer of the model, None for a GPU. ``kv_bytes_per_token`` and ``merged_bytes``
    are for generation: the cache, and the merged model.
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


def run(folder: Path, task: TraceTask) -> None:
    """Trace every training, and write ``traces.json``."""
    leave_out("bitsandbytes", "wandb")
    libraries = _libraries(task.machine)
    write_json(folder / TRACES, [asdict(trace(task, shape, libraries)) for shape in task.shapes])


def _libraries(machine: Machine) -> float:
    """Bytes that a training process holds before it loads the model; on a CPU those of this process."""
    if machine.device == "cuda":
        return CONTEXT_BYTES
    import sftlab.train.callbacks  # noqa: F401  # what a training process imports

    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def trace(task: TraceTask, shape: Shape, libraries: float = 0.0) -> Trace:
    """Run a training step and a validation batch on fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    peft, train, machine = shape.peft, shape.train, task.machine
    fp32 = isinstance(peft, NoPeft) or not train.bf16
    model = _model(task, shape, torch.float32 if fp32 else torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    options = {"cpu": machine.device == "cpu", "bf16": bool(train.bf16)}
    with FakeTensorMode():
        _make_fake(model)
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        weights = sum(_bytes(parameter) for parameter in model.parameters())
        gradients = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
        masked = needs_padding_mask(model.get_base_model() if hasattr(model, "get_base_model") else model)
        joined = train.packing or bool(train.extra.get("padding_free"))  # rows of one sequence are masked apart
        model.train()
        step = count(model, shape.longest, **options, backward=True, masked=masked or joined)
        model.eval()
        validation = count(model, shape.evaluated, **options, backward=False, masked=masked)
    extra = 0.0
    if isinstance(peft, Qlora):
        quantised, largest = _quantised_weights(model)
        weights -= quantised * (4 if fp32 else 2) - quantised * BYTES_4BIT[peft.bnb_4bit_use_double_quant]
        extra = largest * 2.0  # the layer that is being computed, dequantised to bfloat16
    state = next((size for name, size in STATE_BYTES if name in train.optim), ADAM_BYTES) * trainable
    if machine.strategy == "fsdp":
        weights, gradients, state = (size / machine.world_size for size in (weights, gradients, state))
        # One layer at a time is gathered.
        extra += max(sum(map(_bytes, layer.parameters())) for layer in decoder_layers(model) or [model])
    elif machine.world_size > 1:
        extra += gradients  # the buckets of DDP
    return Trace(
        parameters=parameters,
        trainable=trainable,
        libraries=libraries,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=step.retained,
        logits=max(0.0, max(step.peak, validation.peak) - step.retained - gradients) + extra,
        peak=libraries + weights + state + extra + max(step.peak, validation.peak, gradients),
        train_flops=step.flops,
        eval_flops=validation.flops,
        flops_per_second=_speed(task, shape, model.config) if machine.device == "cpu" else None,
        kv_bytes_per_token=float(cache_bytes(model.config)),
        merged_bytes=2.0 * (parameters - (0 if isinstance(peft, NoPeft) else trainable)),
    )


def _attention(machine: Machine) -> str:
    """``eager`` or ``sdpa``. FlashAttention retains as much as sdpa, and may not be installed on this machine."""
    return "eager" if machine.attn_implementation == "eager" else "sdpa"


def _model(task: TraceTask, shape: Shape, dtype: Any) -> Any:
    """The model with its adapters on the meta device."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    code = task.trust_remote_code
    config = AutoConfig.from_pretrained(task.model, trust_remote_code=code, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_attention(task.machine), trust_remote_code=code
        )
        model.config.use_cache = False
        for name in beside_text(model):
            model.base_model.get_submodule(name).requires_grad_(False)
        if (lora := lora_config(shape.peft, model)) is not None:
            model = get_peft_model(model, lora)
            if shape.train.bf16:
                keep_inputs(model)
            if not isinstance(shape.peft, NoPeft) and shape.peft.fused:
                from sftlab.model.fused_lora import fuse

                fuse(model)
            # TRL trains the adapters of a quantised model in bfloat16, and others in float32.
            trained = torch.bfloat16 if isinstance(shape.peft, Qlora) and shape.train.bf16 else torch.float32
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(trained)
    return model


def _make_fake(model: Any) -> None:
    """Replace the tensors of a model on the meta device by fake ones on the CPU, a device that autocast knows."""
    import torch

    replaced: dict[int, tuple[Any, Any]] = {}  # tied weights stay tied
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                new = torch.nn.Parameter(
                    torch.empty(old.shape, dtype=old.dtype, device="cpu"), requires_grad=old.requires_grad
                )
                module._parameters[name] = replaced.setdefault(id(old), (new, old))[0]
        for name, old in list(module._buffers.items()):
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device="cpu")


def _speed(task: TraceTask, shape: Shape, config: Any) -> float:
    """FLOP/s of this CPU in a training step of one layer of the model, with real tensors.

    Its speed in large matrix products is a poor estimate of that.
    """
    full = isinstance(shape.peft, NoPeft)
    dtype = "float32" if full or not shape.train.bf16 else "bfloat16"
    layer = one_layer(config, dtype, attention=_attention(task.machine), code=task.trust_remote_code)
    if not full:
        layer.requires_grad_(requires_grad=False)
        layer.enable_input_require_grads()
    length = min(shape.longest.length, TIMED_TOKENS)
    small = Batch(max(1, min(shape.longest.rows, TIMED_TOKENS // length)), length, 1, 1)
    flops, best = 0.0, math.inf
    for _ in range(4):
        begin = time.perf_counter()
        flops = count(layer, small, cpu=True, bf16=bool(shape.train.bf16), backward=True, masked=False).flops
        best = min(best, time.perf_counter() - begin)
    return flops / best


def _bytes(parameter: Any) -> float:
    return float(parameter.numel() * parameter.element_size())


def _quantised_weights(model: Any) -> tuple[int, int]:
    """Weights of the layers that bitsandbytes quantises (all linear ones but the output head): all, and the largest."""
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
