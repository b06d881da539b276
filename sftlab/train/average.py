"""The average of tied checkpoints as one more candidate (select.average=ties), with a validation loss of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sftlab.dataset.token_rows import read_rows
from sftlab.dataset.tokenize import COUNTS
from sftlab.instance.machine import Machine
from sftlab.model.averages import average
from sftlab.model.base import Base
from sftlab.model.variants import content, equals_base
from sftlab.records import Candidate
from sftlab.results import TokenCounts
from sftlab.runtime.job import Job
from sftlab.runtime.processes import child, serve
from sftlab.runtime.store import Store, versions
from sftlab.train.checkpoints import Checkpoint
from sftlab.train.worker import TrainTask, load_base

log = logging.getLogger(__name__)


class AverageTask(TrainTask):
    """Checkpoints to average, and the training that they are from."""

    members: list[Path]
    """Folders of the checkpoints."""
    step: int
    """Step of the last one."""
    epoch: float
    """Its epoch."""
    seconds: float
    """Training seconds until then."""


def make(store: Store, ties: Sequence[Candidate], job: Job, base: Base, machine: Machine) -> Candidate | None:
    """Average the tied checkpoints of a job, and validate the average; None if fewer than two of them differ.

    The untrained model is left out: an average with it is a shorter way in the same direction.
    """
    members: dict[str, Candidate] = {}
    for row in sorted(ties, key=lambda row: row.step):
        checkpoint = Path(row.checkpoint)
        if row.job == job.number and row.step and not equals_base(checkpoint, base.path):
            members.setdefault(content(checkpoint), row)
    if len(members) < 2:
        log.info("select: select.average=ties has no effect: fewer than two different checkpoints are tied")
        return None
    cfg, last = job.settings(), list(members.values())[-1]
    key = {
        "version": 1,
        "members": list(members),
        "tokens": Path(job.stages["tokens"]).name,
        "base": base.identity,
        "machine": replace(machine, num_processes=1).numerics(),
        "bf16": cfg.train.bf16,
        "libraries": versions("torch", "transformers", "trl", "peft"),
    }
    name = f"average-{last.step}"

    def build(folder: Path) -> None:
        task = AverageTask(
            checkpoints=folder / name,
            tokens=Path(job.stages["tokens"]).resolve(),
            counts=TokenCounts.model_validate_json((Path(job.stages["tokens"]) / COUNTS).read_bytes()),
            base=replace(base, path=base.path.resolve()),
            peft=cfg.peft,
            train=cfg.train,
            machine=replace(machine, num_processes=1, strategy="ddp", nnodes=1),
            seed=cfg.seed,
            members=[Path(row.checkpoint).resolve() for row in members.values()],
            step=last.step,
            epoch=last.epoch,
            seconds=last.seconds,
        )
        child("sftlab.train.average", folder, task, environment=machine.environment())

    stage = store.stage("average", key, build)
    log.info("select: the average of steps %s is a candidate", ", ".join(str(row.step) for row in members.values()))
    candidate = Checkpoint.read(stage.path / name).candidate(job.number, job.overrides)
    names = tuple(row.checkpoint for row in members.values())
    return None if candidate is None else replace(candidate, average_of=names)


def run(folder: Path, task: AverageTask) -> None:
    """Average the checkpoints, and compute the validation loss as training does, in one process."""
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig

    from sftlab.model.adapters import keep_inputs
    from sftlab.train.arguments import sft_arguments
    from sftlab.train.trainer import Trainer

    average(task.members, task.checkpoints)
    is_adapter = task.peft.method != "none"
    model = load_base(
        task if is_adapter else task.model_copy(update={"base": replace(task.base, path=task.checkpoints)})
    )
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(task.checkpoints))
    rows = read_rows(task.tokens, "validation")
    trainer = Trainer(
        model=model,
        settings=task.train,
        args=SFTConfig(**sft_arguments(folder / "unused", task.train, task.machine, task.seed)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=task.base.tokenizer(),
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    if task.train.bf16:
        keep_inputs(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    Checkpoint(task.checkpoints, task.step, task.epoch, loss, None, task.seconds).write(trainer.row_losses)


if __name__ == "__main__":
    serve(AverageTask, run)
