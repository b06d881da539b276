"""Arguments of TRL's SFTConfig, and settings of DDP and FSDP that depend on the loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftlab.config import TrainConfig
from sftlab.instance.machine import Machine
from sftlab.model.base import decoder_layers

# Settings that a class of the trainer carries out, since transformers has them with another meaning or not at all.
NOT_ARGUMENTS = {
    "extra",
    "allow_truncated_completion",
    "global_batch_size",
    "data_share",
    "save_total_limit",
    "max_steps",
    "eval_steps",
    "eval_on_start",
    "early_stopping_patience",
}
NEVER = 2**31 - 1  # steps


def sft_arguments(folder: Path, train: TrainConfig, machine: Machine, seed: int) -> dict[str, Any]:
    """Keyword arguments of SFTConfig; those in ``train.extra`` take precedence."""
    own = train.model_dump(exclude=NOT_ARGUMENTS)
    warmup = own.pop("warmup_steps")
    return {
        **own,
        "warmup_steps": warmup if warmup < 1 else int(warmup),
        "gradient_accumulation_steps": machine.accumulation(train),
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": machine.device == "cpu",
        "max_steps": train.max_steps or -1,
        # CheckpointCallback decides at each step.
        "eval_strategy": "steps",
        "eval_steps": NEVER,
        "save_strategy": "steps",
        "save_steps": NEVER,
        # For schedules that follow the validation loss. CheckpointCallback applies save_total_limit.
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": [],
        "completion_only_loss": None,
        # The rows are tokenised and have labels; TRL only packs them.
        "dataset_kwargs": None if train.packing else {"skip_prepare_dataset": True},
        "eval_packing": False,
        "dataloader_pin_memory": machine.device != "cpu",
        # TRL does not enforce it on rows that are joined without packing; the tokens stage has truncated them.
        **({"max_length": None} if train.extra.get("padding_free") and not train.packing else {}),
        **(_fsdp(train) if machine.strategy == "fsdp" else {}),
        **train.extra,
    }


def _fsdp(train: TrainConfig) -> dict[str, Any]:
    """FSDP2 with full checkpoints, which selection and merging read like those of DDP."""
    config = {
        "version": 2,
        "state_dict_type": "FULL_STATE_DICT",
        "activation_checkpointing": bool(train.gradient_checkpointing),
    }
    return {"fsdp": True, "fsdp_config": config, "gradient_checkpointing": False}


def distribute(arguments: Any, model: Any, train: TrainConfig, *, own_code: bool) -> None:
    """Set what DDP and FSDP need to know about the loaded model, unless ``train.extra`` sets it.

    FSDP shards the layers of the text decoder one by one; its default names classes that a model may not have (Gemma
    3's vision tower). Outputs stay as they are: in bfloat16, log-probabilities would be rounded. Gradients are reduced
    in float32, as in DDP.

    DDP searches for parameters without a gradient only in mixtures of experts, where a step may use some experts for no
    token, and in models with their own code (``own_code``).
    """
    if arguments.fsdp:
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = arguments.fsdp_plugin_args
        layers = {type(layer).__name__ for layer in decoder_layers(model)}
        plugin.setdefault("transformer_cls_names_to_wrap", ",".join(sorted(layers)))
        if train.bf16 and plugin["fsdp_version"] == 2:
            plugin["mixed_precision_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
    if arguments.ddp_find_unused_parameters is None:
        experts = any(".experts." in name for name, _ in model.named_parameters())
        arguments.ddp_find_unused_parameters = experts or own_code
