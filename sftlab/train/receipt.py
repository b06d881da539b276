"""Record what took effect in a training, read from the model and the trainer instead of the settings."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

from sftlab.config import TrainConfig
from sftlab.instance.machine import Machine
from sftlab.results import EarlyStop, Receipt, Scalar, TokenCounts
from sftlab.train.flops import flops_per_token, parameter_size, utilization


@dataclass(frozen=True)
class TrainingResult:
    """How a training process ended: what neither the model nor the trainer shows.

    ``seconds`` is the training time of this process, and ``epochs`` what it trained. The other fields are those of
    ``results.Receipt``.
    """

    seconds: float
    epochs: float
    step_seconds: float | None
    rank_checksums: list[float]
    earlier_machines: list[str | dict[str, Scalar]]
    diverged_at_step: int | None
    early_stop: EarlyStop | None


def receipt(trainer: Any, train: TrainConfig, machine: Machine, counts: TokenCounts, result: TrainingResult) -> Receipt:
    """What took effect in a training that has ended."""
    model, args = trainer.model, trainer.args
    parameters, modules = list(model.parameters()), list(model.modules())
    head = output_head(trainer)
    supervised = counts.train.supervised / counts.train.tokens
    flops = flops_per_token(model, 1.0 if head == "whole logits" else supervised)
    tokens = counts.train.tokens * result.epochs
    speed = tokens / result.seconds if result.seconds and tokens else None
    return Receipt(
        parameters=sum(map(parameter_size, parameters)),
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        # Counted by package: peft's wrapper of such a layer has the same class name.
        quantized_layers=sum(type(module).__module__.startswith("bitsandbytes") for module in modules),
        attn_implementation=model.config.get_text_config()._attn_implementation,
        padding_mask=trainer.padding_mask,
        gradient_checkpointing=checkpointed(model),
        liger_modules=liger_modules(model),
        fused_lora_layers=fused_lora_layers(model),
        compiled_graphs=compiled_graphs(),
        optimizer=_optimizer(trainer.optimizer),
        loss=f"{args.loss_type} of completion tokens, {head}",
        optimizer_state=_state_types(trainer.optimizer),
        # Of a frozen weight if there is one: adapters are float32, whatever the base is.
        base_dtype=str(min(parameters, key=lambda parameter: parameter.requires_grad).dtype),
        autocast="bfloat16" if train.bf16 else None,
        effective_batch=trainer.rows_per_step,
        optimizer_steps=trainer.state.global_step,
        planned_steps=trainer.timeline.total,
        steps_per_epoch=trainer.timeline.steps_per_epoch,
        supervised_tokens=counts.train.supervised,
        supervised_share=round(supervised, 4),
        truncated_rows={"train": counts.train.truncated, "validation": counts.validation.truncated},
        left_out_rows={"train": counts.train.left_out, "validation": counts.validation.left_out},
        prompt_bos=counts.prompt_bos,
        device=machine.device,
        num_processes=args.world_size,
        strategy="fsdp" if trainer.is_fsdp_enabled else "ddp",
        find_unused_parameters=getattr(trainer.model_wrapped, "find_unused_parameters", None),
        train_seconds=round(result.seconds, 1),
        tokens_per_second=None if speed is None else round(speed, 1),
        tokens_per_second_per_device=None if speed is None else round(speed / args.world_size, 1),
        flops_per_token=round(flops),
        mfu=utilization(flops, speed, args.world_size, machine),
        peak_memory_gib=round(_peak_memory(machine), 2),
        step_seconds=result.step_seconds,
        rank_checksums=result.rank_checksums,
        earlier_machines=result.earlier_machines,
        diverged_at_step=result.diverged_at_step,
        early_stop=result.early_stop,
    )


def _state_types(optimizer: Any) -> list[str]:
    """Number formats of the state that an optimizer has for each weight, such as ``uint8`` for an 8-bit optimizer."""
    states = (state for states in optimizer.state.values() for state in states.values())
    return sorted({str(state.dtype).removeprefix("torch.") for state in states if getattr(state, "ndim", 0)})


def checkpointed(model: Any) -> bool:
    """Whether layers retain only their inputs and are recomputed in the backward pass."""
    return any(
        getattr(module, "gradient_checkpointing", False) or type(module).__name__ == "CheckpointWrapper"
        for module in model.modules()
    )


def liger_modules(model: Any) -> int:
    """Number of modules that run Liger's code."""
    return sum(_runs_code_of("liger_kernel", module.forward) for module in model.modules())


def fused_lora_layers(model: Any) -> int:
    """Number of adapters whose forward pass is ``model.fused_lora``."""
    variants = (variant for module in model.modules() for variant in getattr(module, "lora_variant", {}).values())
    return sum(type(variant).__module__ == "sftlab.model.fused_lora" for variant in variants)


def compiled_graphs() -> int:
    """Number of graphs that torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # takes seconds to import, and is there if anything was compiled
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def _optimizer(optimizer: Any) -> str:
    """Class of the optimizer, and whether one kernel updates all weights (``fused``)."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return f"{type(optimizer).__name__}, fused" if fused else type(optimizer).__name__


def output_head(trainer: Any) -> str:
    """How log-probabilities are computed from the last hidden states, by the functions that the model has now."""
    if trainer.own_head:
        return "head on target positions"
    if trainer.label_smoother is not None:
        return "whole logits"
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    if _runs_code_of("trl", model.forward):
        return "chunked"
    return "Liger's kernel" if _runs_code_of("liger_kernel", model.forward) else "whole logits"


def _runs_code_of(package: str, function: Any) -> bool:
    """Whether a method, or a function that it wraps, is defined in a package.

    Liger and TRL replace methods of modules, not the modules. ``__module__`` does not show that: a wrapper copies it
    from the function that it wraps.
    """
    while function is not None:
        function = getattr(function, "__func__", function)
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] == package:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _peak_memory(machine: Machine) -> float:
    """Peak in GiB: of the allocator on a GPU, of the process on a CPU."""
    if machine.device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated()) / 2**30
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
