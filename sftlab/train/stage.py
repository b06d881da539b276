"""Train on the tokenised rows: checkpoints with a validation loss.

This is the parent's part. The training itself runs in child processes (``sftlab.train.worker``).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sftlab.config import NoPeft, PeftConfig, Qlora, TrainConfig
from sftlab.dataset.tokenize import Tokenized
from sftlab.errors import StageError
from sftlab.instance import meeting
from sftlab.instance.machine import Machine, optimizer_package
from sftlab.model.base import Base
from sftlab.records import Candidate
from sftlab.results import Receipt
from sftlab.runtime.processes import child
from sftlab.runtime.store import Stage, Store, key_of, versions
from sftlab.tracking import tracker
from sftlab.train.checkpoints import RECEIPT, complete, incomplete, last_resumable, read_receipt
from sftlab.train.pruning import Peers
from sftlab.train.schedule import timeline
from sftlab.train.sharing import adopt_killed_run, copy_common_steps, fork_steps
from sftlab.train.worker import TrainTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The finished stage: ``checkpoint-*`` folders, ``metrics.jsonl`` and ``receipt.json``."""

    stage: Stage

    @property
    def receipt(self) -> Receipt:
        """What took effect in training."""
        return read_receipt(self.stage.path)

    def candidates(self, job: int, overrides: list[str]) -> list[Candidate]:
        """The evaluated checkpoints, by step."""
        candidates = (checkpoint.candidate(job, overrides) for checkpoint in complete(self.stage.path))
        return [candidate for candidate in candidates if candidate is not None]


def inputs(
    tokens_key: str, base: Base, peft: PeftConfig, train: TrainConfig, machine: Machine, seed: int
) -> Mapping[str, Any]:
    """What the weights depend on: rows, base model, settings, precision, ranks, seed and library versions.

    They do not depend on gradient checkpointing, which computes the same numbers twice.
    """
    assert train.bf16 != "auto"  # the key holds what was chosen
    return {
        "version": 4,
        "tokens": tokens_key,
        "base": base.identity,
        "peft": peft.model_dump(),
        "train": train.model_dump(exclude={"allow_truncated_completion", "gradient_checkpointing", "data_share"}),
        "machine": machine.numerics(),
        "seed": seed,
        "libraries": versions("torch", "transformers", "trl", "accelerate", *_optional_packages(peft, train, machine)),
    }


def _optional_packages(peft: PeftConfig, train: TrainConfig, machine: Machine) -> list[str]:
    """Packages on which the weights depend only with some settings."""
    needed = {
        "peft": not isinstance(peft, NoPeft),
        "bitsandbytes": isinstance(peft, Qlora),
        "liger-kernel": train.use_liger_kernel,
        "flash-attn": machine.attn_implementation == "flash_attention_2",
        "datasets": train.packing,  # TRL packs with it
    }
    package = optimizer_package(train.optim)
    return sorted({name for name, is_needed in needed.items() if is_needed} | ({package} if package else set()))


def make(
    store: Store,
    tokens: Tokenized,
    base: Base,
    peft: PeftConfig,
    train: TrainConfig,
    machine: Machine,
    seed: int,
    environment: Mapping[str, str],
    peers: Peers | None = None,
) -> Trained | None:
    """Train, or reuse a finished training. A killed training resumes from its last complete checkpoint.

    ``environment`` has variables for the training processes. The result is None on all machines but the first of
    several, which has the checkpoints. With ``peers``, training stops if they are better.

    Raises:
        PrunedError: the training was stopped because of its peers. The same command stops it again without training.
        PausedError: the training waits for its peers.
        StageError: training failed, or diverged before its first checkpoint.
    """
    key = inputs(tokens.stage.key, base, peft, train, machine, seed)
    final = store.path("train", key)
    task = TrainTask(
        inputs=key,
        checkpoints=final.with_name(final.name + ".partial"),  # where the stage is built
        tokens=tokens.stage.path.resolve(),
        counts=tokens.counts,
        base=replace(base, path=base.path.resolve()),
        peft=peft,
        train=train,
        machine=machine,
        seed=seed,
        tracker=tracker.backend(environment),
        peers=peers,
    )
    if machine.node_rank > 0:
        _join(task, environment)
        return None
    stage = store.stage("train", key, lambda folder: _build(folder, store, task, environment), resumable=True)
    if stage.cached:
        _announce(task, to_train=False)
    if peers is not None:  # also of checkpoints that were taken from the store
        peers.publish_checkpoints(stage.path, read_receipt(stage.path).planned_steps)
    return Trained(stage)


def run_ranks(folder: Path, task: TrainTask, environment: Mapping[str, str]) -> None:
    """Train in one child process per rank of this machine; the files go to ``folder``."""
    child(
        "sftlab.train.worker",
        folder,
        task,
        launcher=task.machine.launcher(),
        environment={**task.machine.training_environment(), **environment},
        grace_seconds=task.machine.grace_seconds,
    )


def _join(task: TrainTask, environment: Mapping[str, str]) -> None:
    """Train with machine 0, if there is anything to train; checkpoints are written there."""
    if meeting.ask(task.machine, key_of(task.inputs)):
        with TemporaryDirectory(prefix="sftlab-") as name:
            run_ranks(Path(name), task, environment)
    else:
        log.info("train: there is nothing to train; machine 0 has it already")


def _announce(task: TrainTask, *, to_train: bool) -> None:
    """Tell the other machines whether there is anything to train."""
    if task.machine.nnodes > 1:
        meeting.tell(task.machine, key_of(task.inputs), train=to_train)


def _build(folder: Path, store: Store, task: TrainTask, environment: Mapping[str, str]) -> None:
    for path in incomplete(folder):  # interrupted while it was written, so training has not ended
        shutil.rmtree(path)
        (folder / RECEIPT).unlink(missing_ok=True)
    if (folder / RECEIPT).is_file():  # is written last: only the steps below were interrupted
        _announce(task, to_train=False)
    elif copy_common_steps(store, task.inputs, folder, task.train):
        _announce(task, to_train=False)
        return
    else:
        if not complete(folder):
            adopt_killed_run(store, task.inputs, folder, task.train, task.machine)
        _stop_if_worse(folder, task)
        if resumed := last_resumable(folder):
            log.info("train: resumes from %s", resumed.path.name)
        _announce(task, to_train=True)
        run_ranks(folder, task, environment)
    _check_result(folder, task.train)
    _delete_what_no_job_resumes_from(folder, task.train)


def _stop_if_worse(folder: Path, task: TrainTask) -> None:
    """Compare the checkpoints that a killed or pruned training has left with the peers, before training resumes.

    Raises:
        PrunedError: the peers are better.
        PausedError: the training has reached the end of the round.
    """
    if task.peers is None:
        return
    planned = timeline(task.counts, task.train, task.machine)
    task.peers.publish_checkpoints(folder, None if planned is None else planned.total)
    if stop := task.peers.check():
        raise stop


def _check_result(folder: Path, train: TrainConfig) -> None:
    """Warn about a training that diverged.

    Raises:
        StageError: there is no checkpoint with a validation loss. The same command trains again.
    """
    diverged_at = read_receipt(folder).diverged_at_step
    selectable = any(checkpoint.evaluated for checkpoint in complete(folder))
    if not selectable:
        (folder / RECEIPT).unlink()
    if diverged_at is not None:
        message = (
            f"train: diverged: the validation loss after step {diverged_at} is not a finite number; set a lower "
            f"train.learning_rate (it is {train.learning_rate:g}) or more train.warmup_steps"
        )
        if not selectable:
            raise StageError(message)
        log.warning("%s. Training stopped there; earlier checkpoints can still be selected", message)
    if not selectable:
        raise StageError("train: ended without a checkpoint; see its output above")


def _delete_what_no_job_resumes_from(folder: Path, train: TrainConfig) -> None:
    """Delete optimizer states, and what was saved at SIGTERM, except where a longer or shorter job may resume."""
    forks = fork_steps(folder, train)
    for checkpoint in complete(folder):
        if checkpoint.step in forks:
            continue
        if checkpoint.evaluated:
            checkpoint.forget_optimizer()
        else:
            shutil.rmtree(checkpoint.path)
