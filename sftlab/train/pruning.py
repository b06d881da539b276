"""Stop jobs of a sweep that are worse than their peers (sweep.prune).

Each training writes its validations into a folder that all jobs share, so that any launcher will do. A job is stopped
if its validation loss is worse than that of the peer in the middle, at the same epoch, by more than the noise of the
validation rows. Its checkpoints stay, so that the same sweep again stops it without training.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sftlab.config import Config, Qlora
from sftlab.results import Pruned, TokenCounts
from sftlab.runtime.store import key_of, write_json
from sftlab.train.checkpoints import ROWS, complete
from sftlab.train.schedule import depends_on_length
from sftlab.train.stopping import gains

FORGOTTEN = 30 * 24 * 3600  # seconds
SAME = 1e-6  # epochs that differ by rounding


class Validation(BaseModel):
    """A validation of a job."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    job: int
    """Number of the job."""
    step: int
    """Optimizer step."""
    epoch: float
    """Epoch, with a fraction within an epoch."""
    planned_steps: int
    """Optimizer steps of the whole job."""
    rows: list[tuple[float, float]]
    """Nats and supervised tokens of each validation row."""

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return sum(nats for nats, _ in self.rows) / sum(tokens for _, tokens in self.rows)

    @property
    def share(self) -> float:
        """Share of the job's steps that are trained."""
        return self.step / self.planned_steps


class Peers(BaseModel):
    """A job, and the folder in which it finds the validations of the other jobs of its sweep."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    folder: Path
    """Folder of the sweep's validations."""
    job: int
    """Number of this job."""
    comparable: str
    """Equal in jobs whose losses can be compared at the same epoch."""
    rule: Literal["median", "halving"]
    """sweep.prune."""
    after: float
    """sweep.prune_after."""

    def publish(self, step: int, epoch: float, planned_steps: int, rows: Sequence[Sequence[float]]) -> None:
        """Write a validation of this job for the others."""
        own = self.folder / self.comparable / str(self.job)
        own.mkdir(parents=True, exist_ok=True)
        pairs = [(nats, tokens) for nats, tokens in rows]
        values = Validation(job=self.job, step=step, epoch=epoch, planned_steps=planned_steps, rows=pairs)
        write_json(own / f"{step}.json", values.model_dump())

    def publish_checkpoints(self, training: Path, planned_steps: int | None) -> None:
        """Write the validations of the checkpoints in a training's folder, of this run or an earlier one."""
        for checkpoint in complete(training) if planned_steps is not None else []:
            if checkpoint.evaluated:
                rows = json.loads((checkpoint.path / ROWS).read_text("utf-8"))
                self.publish(checkpoint.step, checkpoint.epoch, planned_steps or 0, rows)

    def observe(
        self,
        step: int,
        epoch: float,
        planned_steps: int,
        rows: Sequence[Sequence[float]],
        ranks: int,
        *,
        is_first: bool,
    ) -> str | None:
        """Publish a validation, and return why the job is stopped; the first rank decides for all."""
        reasons: list[str | None] = [None]
        if is_first:
            self.publish(step, epoch, planned_steps, rows)
            pruned = self.decide()
            reasons = [None if pruned is None else str(pruned)]
        if ranks > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(reasons)
        return reasons[0]

    def decide(self) -> Pruned | None:
        """The verdict, which is written for the process that records the job: peers may publish more meanwhile."""
        pruned = self.verdict()
        if pruned is not None:
            write_json(self._decision, pruned.model_dump())
        return pruned

    def decision(self) -> Pruned:
        """Why this job was stopped, as its training has decided."""
        return Pruned.model_validate_json(self._decision.read_bytes())

    @property
    def _decision(self) -> Path:
        return self.folder / self.comparable / str(self.job) / "pruned.json"

    def verdict(self) -> Pruned | None:
        """Why this job is stopped at its last validation; None if it continues."""
        own = self._validations(self.folder / self.comparable / str(self.job))
        if not own or not self._decides(own):
            return None
        now, best = own[-1], min(own, key=lambda one: one.loss)
        peers = []
        for folder in sorted((self.folder / self.comparable).iterdir()):
            others = self._validations(folder)
            if folder.name != str(self.job) and others and others[-1].epoch >= now.epoch - SAME:
                reached = [one for one in others if one.epoch <= now.epoch + SAME]
                peers += [min(reached, key=lambda one: one.loss)] if reached else []
        if not peers:
            return None
        middle = sorted(peers, key=lambda one: one.loss)[(len(peers) - 1) // 2]  # of two the better one
        if not gains(best.rows, middle.rows):
            return None
        return Pruned(
            rule=self.rule,
            step=now.step,
            planned_steps=now.planned_steps,
            epoch=now.epoch,
            eval_loss=best.loss,
            peers=len(peers),
            peer=middle.job,
            peer_eval_loss=middle.loss,
        )

    def _decides(self, own: Sequence[Validation]) -> bool:
        """Whether the rule may stop the job at its last validation: with halving, the first one of a rung."""
        now, before = own[-1], own[-2].share if len(own) > 1 else 0.0
        if now.share < self.after - SAME or now.share >= 1:
            return False
        if self.rule == "median":
            return True
        rung = self.after
        while 2 * rung <= now.share + SAME:
            rung *= 2
        return before < rung - SAME

    def _validations(self, folder: Path) -> list[Validation]:
        """The validations of a job, by step."""
        found = [Validation.model_validate_json(file.read_bytes()) for file in folder.glob("[0-9]*.json")]
        return sorted(found, key=lambda one: one.step)


def folder_of(store: Path, run: str) -> Path:
    """The folder of a sweep's validations."""
    return store / ".peers" / run


def forget(store: Path, run: str) -> None:
    """Delete the validations of a sweep whose jobs have ended, and those that killed sweeps left a month ago."""
    own = folder_of(store, run)
    for folder in own.parent.glob("*"):
        if folder == own or time.time() - folder.stat().st_mtime > FORGOTTEN:
            shutil.rmtree(folder, ignore_errors=True)


def peers(cfg: Config, store: Path, run: str | None, job: int, counts: TokenCounts) -> Peers | None:
    """The peers of a job; None without sweep.prune. ``counts`` has the hash of its validation tokens.

    Losses are compared at the same epoch. If the learning rate depends on the length of a job, only jobs of the same
    length are peers.
    """
    rule, train = cfg.sweep.prune, cfg.train
    if rule is None or run is None:
        return None
    length = [train.num_train_epochs, train.max_steps] if depends_on_length(train) else None
    same = {
        "validation": counts.validation.content,
        "length": length,
        "bf16": train.bf16,
        "quantised": isinstance(cfg.peft, Qlora),
    }
    folder = folder_of(store, run).resolve()
    return Peers(folder=folder, job=job, comparable=key_of(same), rule=rule, after=cfg.sweep.prune_after)
