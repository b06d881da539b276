"""The receipt of a training as labelled facts for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sftlab.report.text import count, percent, seconds
from sftlab.results import Receipt, Scalar

LABELS = {
    "parameters": "Parameters",
    "trainable_parameters": "Trained parameters",
    "quantized_layers": "Quantised layers",
    "attn_implementation": "Attention",
    "padding_mask": "Padding masked",
    "gradient_checkpointing": "Gradient checkpointing",
    "liger_modules": "Liger kernel modules",
    "fused_lora_layers": "Fused adapters",
    "compiled_graphs": "Compiled graphs",
    "optimizer": "Optimizer",
    "loss": "Loss",
    "optimizer_state": "Optimizer state",
    "base_dtype": "Number format of the base model",
    "autocast": "Autocast to",
    "effective_batch": "Effective batch (rows)",
    "optimizer_steps": "Optimizer steps",
    "planned_steps": "Optimizer steps of the schedule",
    "steps_per_epoch": "Optimizer steps per epoch",
    "supervised_tokens": "Supervised tokens per epoch",
    "supervised_share": "Share of supervised tokens",
    "truncated_rows": "Rows truncated to train.max_length",
    "left_out_rows": "Rows left out, since their prompt fills train.max_length",
    "prompt_bos": "Beginning-of-sequence tokens in a prompt",
    "device": "Device",
    "num_processes": "Processes",
    "strategy": "Strategy",
    "find_unused_parameters": "Search for unused parameters (DDP)",
    "train_seconds": "Training time",
    "tokens_per_second": "Training tokens per second",
    "tokens_per_second_per_device": "Training tokens per second and device",
    "flops_per_token": "FLOPs per training token",
    "mfu": "Model FLOPs utilisation",
    "peak_memory_gib": "Peak memory (GiB)",
    "step_seconds": "Time per optimizer step",
    "rank_checksums": "Checksums of the ranks' weights",
    "earlier_machines": "Machines of earlier steps",
    "diverged_at_step": "Diverged at step",
}
DATA = ("truncated_rows", "left_out_rows", "supervised_tokens", "supervised_share", "prompt_bos")

Fact = tuple[str, str]
Value = Scalar | Sequence[str | float | Mapping[str, Scalar]] | Mapping[str, Scalar]


def data_facts(receipt: Receipt) -> list[Fact]:
    """What tokenisation did to the data."""
    return _facts(receipt, [name for name in LABELS if name in DATA])


def training_facts(receipt: Receipt) -> list[Fact]:
    """What took effect in training."""
    return _facts(receipt, [name for name in LABELS if name not in DATA])


def _facts(receipt: Receipt, names: list[str]) -> list[Fact]:
    values = dict(receipt)
    # No autocast is a result; other values are null or empty if they do not apply to this training.
    return [
        (LABELS[name], _text(name, values[name]))
        for name in names
        if name == "autocast" or values[name] not in (None, [])
    ]


def _text(name: str, value: Value) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value.replace("torch.", "") if name.endswith("dtype") else value
    if isinstance(value, int | float):
        form = seconds if name.endswith("seconds") else percent if name in ("supervised_share", "mfu") else count
        return form(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(key, part)}" for key, part in value.items())
    return "; ".join(_text(name, part) for part in value)
