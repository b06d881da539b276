"""Train in a child process, which may be one of several ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sftlab.config import NoPeft, PeftConfig, Qlora, TrainConfig
from sftlab.dataset.token_rows import read_rows
from sftlab.errors import ConfigError, Problem, StageError
from sftlab.instance.machine import Machine
from sftlab.model.adapters import keep_inputs, lora_config
from sftlab.model.base import Base, beside_text, load
from sftlab.results import Scalar, TokenCounts
from sftlab.runtime.processes import leave_out, serve
from sftlab.runtime.store import key_of, sync, write_json
from sftlab.tracking import wandb
from sftlab.train.arguments import distribute, sft_arguments
from sftlab.train.checkpoints import METRICS, RECEIPT, earlier_machines, last_resumable
from sftlab.train.pruning import Peers
from sftlab.train.receipt import TrainingResult, compiled_graphs, receipt
from sftlab.train.stopping import Patience


class TrainTask(BaseModel):
    """A training on one machine."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    inputs: Mapping[str, Any] = {}
    """Inputs of the stage; empty for a probe. They identify a killed run that another machine may continue."""
    checkpoints: Path
    """Folder with the checkpoints to resume from, on every machine."""
    tokens: Path
    """Folder with the tokenised splits."""
    counts: TokenCounts
    """Their rows and tokens."""
    base: Base
    """The model."""
    peft: PeftConfig
    """What is trained."""
    train: TrainConfig
    """Settings of the training, with ``bf16`` and ``gradient_checkpointing`` resolved."""
    machine: Machine
    """Devices and ranks."""
    seed: int
    """Of adapter weights, the order of rows and dropout."""
    tracker: str | None = None
    """The backend that tracks the training; None without tracking."""
    peers: Peers | None = None
    """The other jobs of the sweep, because of which the training may be stopped; None: it is not."""


def run(folder: Path, task: TrainTask) -> None:
    """Train, and write checkpoints, ``metrics.jsonl`` and ``receipt.json`` into ``folder``."""
    leave_out(*_unused_libraries(task))
    from transformers import PrinterCallback, ProgressCallback, set_seed
    from trl import SFTConfig

    from sftlab.train.callbacks import CheckpointCallback, Curves, DivergedError, Metrics, Progress, StepTimes, Tracking

    train, machine = task.train, task.machine
    is_first = os.environ.get("RANK", "0") == "0"
    if task.tracker == "wandb" and is_first:
        wandb.begin(os.environ["SFTLAB_WANDB_MODE"])
    set_seed(task.seed)
    try:
        arguments = SFTConfig(**sft_arguments(folder, train, machine, task.seed))
    except (TypeError, ValueError) as error:
        raise ConfigError(Problem("train", None, f"SFTConfig rejects these settings: {error}")) from error
    resumed = last_resumable(task.checkpoints)
    first_step = resumed.step if resumed else 0
    if train.use_liger_kernel:
        _require_liger_kernels(task.base)
    if machine.nnodes > 1:
        require_agreement(task, first_step)
    model = load_base(task)
    distribute(arguments, model, train, own_code=task.base.trust_remote_code)
    checkpoints = CheckpointCallback(
        resumed.seconds if resumed else 0.0,
        train.save_total_limit,
        _patience(train.early_stopping_patience, resumed.path if resumed else None),
        task.peers,
    )
    times = StepTimes()
    trainer = _trainer(task, model, arguments, [checkpoints, times, Metrics(folder / METRICS)])
    checkpoints.trainer = trainer
    signal.signal(signal.SIGTERM, checkpoints.terminate)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(Progress())
    seconds, tracking = 0.0, ExitStack()
    if task.tracker == "wandb":
        trainer.add_callback(Curves())
    elif task.tracker is not None and is_first:
        trainer.add_callback(tracking.enter_context(Tracking(task.tracker, _settings(task))))
    with tracking, suppress(DivergedError):  # recorded as diverged_at_step
        output = trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
        seconds = output.metrics["train_runtime"]
    steps = trainer.state.global_step - first_step
    if train.torch_compile and steps and not compiled_graphs():
        raise StageError("train.torch_compile=true had no effect: no part of the model was compiled; set it to false")
    diverged = checkpoints.diverged_at_step
    checksums = _checksums(trainer) if diverged is None else []
    if len(set(checksums)) > 1:
        raise StageError(
            f"train: the weights differ between ranks after training (checksums {checksums}): gradients were not "
            "averaged, and no checkpoint of this run can be used; please report it with the versions in run.json"
        )
    if trainer.is_world_process_zero():
        result = TrainingResult(
            seconds=seconds,
            epochs=steps / trainer.timeline.steps_per_epoch,
            step_seconds=times.median,
            rank_checksums=checksums,
            earlier_machines=earlier_machines(folder),
            diverged_at_step=diverged,
            early_stop=checkpoints.early_stop(),
        )
        sync(folder)  # a receipt on the disk means that everything before it is there too
        write_json(folder / RECEIPT, receipt(trainer, train, machine, task.counts, result).model_dump())
    # Without this a rank that exits with open connections is sometimes ended by SIGABRT.
    trainer.accelerator.end_training()


def _settings(task: TrainTask) -> dict[str, Scalar]:
    """The configuration for a tracker, by dotted key."""
    sections = {"train": task.train.model_dump(), "peft": task.peft.model_dump()}
    values = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    scalars = {key: value if isinstance(value, Scalar) else str(value) for key, value in values.items()}
    return {"model": task.base.name, "seed": task.seed, **scalars}


def _patience(limit: int | None, resumed: Path | None) -> Patience | None:
    """The state of early stopping, that of the checkpoint that training resumes from; None without early stopping."""
    if limit is None:
        return None
    return Patience(limit) if resumed is None else Patience.read(resumed)


def _unused_libraries(task: TrainTask) -> list[str]:
    """Libraries that this training does not use, and that others would import if they are installed."""
    names = ("bit", "bnb", "paged", "ademamix")  # in the names of optimizers from bitsandbytes
    quantised = isinstance(task.peft, Qlora) or any(name in task.train.optim for name in names)
    return [*([] if quantised else ["bitsandbytes"]), *([] if task.tracker == "wandb" else ["wandb"])]


def _require_liger_kernels(base: Base) -> None:
    """Raise a ConfigError if Liger has no kernels for a model; transformers would silently train without them."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(base.path, trust_remote_code=base.trust_remote_code).model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(
            Problem(
                "train.use_liger_kernel",
                "true",
                f"Liger has no kernels for {kind} models",
                "set train.use_liger_kernel=false",
            )
        )


def require_agreement(task: TrainTask, first_step: int) -> None:
    """Check that all machines train the same rows with the same settings, from the same step.

    Raises:
        ConfigError: they do not.
    """
    from accelerate.utils import gather_object

    own = key_of(task.model_dump(mode="json", include={"peft", "train", "seed", "counts"}))
    answers = gather_object([(own, first_step)])
    if len({key for key, _ in answers}) > 1:
        raise ConfigError(
            Problem(
                "instance.nnodes",
                None,
                "the machines have different rows or settings",
                "run the same command on each, with the same data, and only instance.node_rank different",
            )
        )
    if len({step for _, step in answers}) > 1:
        raise ConfigError(
            Problem(
                "instance.nnodes",
                None,
                f"not every machine sees the checkpoints to resume from ({task.checkpoints})",
                "set store= to a folder that all machines share, or delete this folder to start from the beginning",
            )
        )


def load_base(task: TrainTask) -> Any:
    """The base model, quantised for QLoRA, on the CPU or the device that transformers chooses."""
    import torch

    peft, train, machine, base = task.peft, task.train, task.machine, task.base
    options: dict[str, object] = {"attn_implementation": machine.attn_implementation}
    if isinstance(peft, Qlora):
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=peft.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=peft.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16 if train.bf16 else torch.float32,
        )
    # Rounding to bfloat16 would lose the small updates of trained weights; frozen weights may be rounded.
    frozen = not isinstance(peft, NoPeft)
    try:
        model = load(
            base.path,
            dtype="bfloat16" if frozen and train.bf16 else "float32",
            trust_remote_code=base.trust_remote_code,
            **options,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(
            Problem(
                "model",
                None,
                f"cannot be loaded with instance.attn_implementation={machine.attn_implementation} and "
                f"peft.method={peft.method}: {error}",
                "change one of them",
            )
        ) from error
    model.config.use_cache = False
    for name in beside_text(model):
        model.base_model.get_submodule(name).requires_grad_(False)
    return model


def _trainer(task: TrainTask, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
    from sftlab.train.trainer import Trainer

    trainer = Trainer(
        model=model,
        settings=task.train,
        args=arguments,
        train_dataset=read_rows(task.tokens, "train"),
        eval_dataset=read_rows(task.tokens, "validation"),
        processing_class=task.base.tokenizer(),
        peft_config=lora_config(task.peft, model),
        callbacks=callbacks,
    )
    if task.train.bf16:
        keep_inputs(trainer.model)
    if not isinstance(task.peft, NoPeft) and task.peft.fused:
        from sftlab.model.fused_lora import fuse

        fuse(trainer.model)
    return trainer


def _checksums(trainer: Any) -> list[float]:
    """A sum over the trained weights of each rank; equal bit for bit if the weights are."""
    import torch

    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    total = torch.stack([weight.detach().double().abs().sum() for weight in weights]).sum()
    if isinstance(total, torch.distributed.tensor.DTensor):  # FSDP shards the weights
        total = total.full_tensor()
    checksums: list[float] = trainer.accelerator.gather(total.reshape(1)).tolist()
    return checksums


if __name__ == "__main__":
    serve(TrainTask, run)
