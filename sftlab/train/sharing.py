"""Share optimizer steps between jobs that differ only in their length, and between machines.

With a constant schedule, or up to the decay of a stable one, a short and a long job have the same weights after the
same step (``schedule.decay_steps``). Such jobs have the same ``family``. A job copies these checkpoints from a finished
job and trains the rest. Until the sweep has selected a checkpoint, trainings retain the state from which other jobs may
resume; then ``release`` deletes it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sftlab.config import TrainConfig
from sftlab.instance.machine import Machine
from sftlab.records import read_jsonl, write_jsonl
from sftlab.runtime.processes import INPUTS
from sftlab.runtime.store import Store, key_of, use, write_json
from sftlab.train.checkpoints import (
    MACHINES,
    METRICS,
    RECEIPT,
    Checkpoint,
    complete,
    earlier_machines,
    last_resumable,
    read_receipt,
)
from sftlab.train.schedule import Timeline, decay_steps
from sftlab.train.worker import TrainTask

log = logging.getLogger(__name__)

# Settings of a training that may differ between machines with the same effective batch.
OF_THE_MACHINE = {
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "use_liger_kernel",
}


def family(inputs: Mapping[str, Any], train: TrainConfig) -> str | None:
    """A key that is equal for all jobs that share steps; None for a job that shares none."""
    return None if decay_steps(train) is None else key_of(_without_length(inputs))


def _without_length(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**inputs, "train": {**inputs["train"], "num_train_epochs": None, "max_steps": None}}


def _without_machine(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    train = {name: value for name, value in inputs["train"].items() if name not in OF_THE_MACHINE}
    return {**inputs, "train": train, "machine": None}


@dataclass(frozen=True)
class Offer:
    """Checkpoints of a finished training that the training at hand would have too.

    ``timeline`` is that of the training at hand, and ``steps`` are those of the finished one. ``whole`` is whether no
    other checkpoint is needed; otherwise training resumes from the last of them.
    """

    source: Path
    steps: int
    timeline: Timeline
    checkpoints: list[Checkpoint]
    whole: bool

    @property
    def last(self) -> Checkpoint:
        """The last of the checkpoints."""
        return self.checkpoints[-1]

    @property
    def usable(self) -> bool:
        """Whether the last checkpoint still exists, with the state that resuming needs."""
        return self.last.path.is_dir() and (self.whole or self.last.resumable)


def copy_common_steps(store: Store, inputs: Mapping[str, Any], folder: Path, train: TrainConfig) -> bool:
    """Copy checkpoints from a finished job that differs only in its length.

    True if nothing is left to train. Otherwise training resumes from the last checkpoint in ``folder``, if any.
    """
    decay = decay_steps(train)
    if decay is None:
        return False
    offers = [
        offer
        for path, manifest in store.finished("train")
        if _without_length(manifest["inputs"]) == _without_length(inputs) and (offer := _offer(path, train, decay))
    ]
    if not offers:
        return False
    best = max(offers, key=lambda offer: (offer.whole, offer.last.step, -offer.steps))
    if not best.whole and (own := complete(folder)) and own[-1].step >= best.last.step:
        return False  # this training was interrupted after that step
    use(store.root, best.source.name)
    with store.lock("train", best.source.name):
        if not best.usable:  # another sweep has deleted or released it
            return False
        shutil.rmtree(folder)
        folder.mkdir()
        for checkpoint in best.checkpoints:
            selectable = best.timeline.evaluates(checkpoint.step)
            checkpoint.copy_into(folder, resumable=not best.whole, selectable=selectable)
    log.info("train: reuses the first %d of the %d steps of a finished job", best.last.step, best.steps)
    if best.whole:
        end = best.timeline.total
        rows = (row for row in read_jsonl(best.source / METRICS) if row["step"] <= end)
        write_jsonl(
            folder / METRICS, (row for row in rows if "eval_loss" not in row or best.timeline.evaluates(row["step"]))
        )
        new = {"optimizer_steps": end, "planned_steps": end, "train_seconds": 0.0, "diverged_at_step": None}
        write_json(folder / RECEIPT, read_receipt(best.source).model_copy(update=new).model_dump())
    return best.whole


def _offer(source: Path, train: TrainConfig, decay: int) -> Offer | None:
    """The checkpoints of a finished training that can be reused; None if there are none."""
    receipt = read_receipt(source)
    assert receipt.planned_steps is not None  # only stages of earlier versions, which have other keys, lack them
    assert receipt.steps_per_epoch is not None
    timeline = Timeline(train, receipt.steps_per_epoch)
    shared = min(receipt.planned_steps, timeline.total) - decay
    common = [checkpoint for checkpoint in complete(source) if checkpoint.step <= shared]
    wanted = [checkpoint for checkpoint in common if checkpoint.evaluated and timeline.evaluates(checkpoint.step)]
    if wanted and wanted[-1].step == timeline.total:
        return Offer(source, receipt.planned_steps, timeline, wanted, whole=True)
    last = next((checkpoint for checkpoint in reversed(common) if checkpoint.resumable), None)
    if last is None:
        return None
    before = [checkpoint for checkpoint in wanted if checkpoint.step < last.step]
    return Offer(source, receipt.planned_steps, timeline, [*before, last], whole=False)


def fork_steps(folder: Path, train: TrainConfig) -> frozenset[int]:
    """Steps of a finished training from which jobs of another length may resume."""
    steps_per_epoch = read_receipt(folder).steps_per_epoch
    return frozenset() if steps_per_epoch is None else Timeline(train, steps_per_epoch).forks


def release(store: Store, path: Path) -> None:
    """Delete what a finished training retains for others to resume from.

    These are its optimizer states and the checkpoints without a validation loss.
    """
    with store.lock("train", path.name):
        for checkpoint in complete(path):
            if checkpoint.evaluated:
                checkpoint.forget_optimizer()
            else:
                shutil.rmtree(checkpoint.path)


def adopt_killed_run(
    store: Store, inputs: Mapping[str, Any], folder: Path, train: TrainConfig, machine: Machine
) -> None:
    """Move the checkpoints of a killed run of the same training on another machine into ``folder``.

    The run must have the same effective batch, and so the same steps. ``machines.json`` records which steps were
    trained elsewhere.
    """
    for path in store.abandoned("train"):
        task, last = _killed_task(path), last_resumable(path)
        if task is None or last is None or _without_machine(task.inputs) != _without_machine(inputs):
            continue
        same_steps = task.machine.effective_batch(task.train) == machine.effective_batch(train)
        if not same_steps or task.machine.strategy != machine.strategy:
            continue
        log.info("train: continues a run that was killed on another machine (%s)", task.machine.name)
        trained_there = {"until_step": last.step, **task.machine.numerics()}
        write_json(folder / MACHINES, [*earlier_machines(path), trained_there])
        for checkpoint in complete(path):
            checkpoint.path.rename(folder / checkpoint.path.name)
        shutil.rmtree(path)
        return


def _killed_task(folder: Path) -> TrainTask | None:
    """The task of a killed training; None if it did not start, or was started by another version of sftlab."""
    try:
        return TrainTask.model_validate_json((folder / INPUTS).read_text("utf-8"))
    except (FileNotFoundError, ValidationError):
        return None
