"""Stop jobs of a sweep that are worse than their peers (sweep.prune).

Each training writes its validations into a folder that all jobs share, so that any launcher will do. A job is stopped
if its validation loss is worse than that of the peer in the middle, at the same epoch, by more than the noise of the
validation rows. Its checkpoints stay, so that the same sweep again stops it without training.

With ``halving`` the jobs are launched in rounds: in each round all jobs train until the same share of their steps, and
wait. So each job is compared with all others, whatever their order, and the decisions are the same again. A search, and
a sweep over the length of jobs that share steps, have no rounds: a job is compared with those that are ahead.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sftlab.config import Config, Qlora
from sftlab.errors import PausedError, PrunedError
from sftlab.results import Pruned, TokenCounts
from sftlab.runtime.store import key_of, write_json
from sftlab.train.checkpoints import ROWS, complete
from sftlab.train.schedule import depends_on_length
from sftlab.train.stopping import gains

FORGOTTEN = 30 * 24 * 3600  # seconds
SAME = 1e-6  # epochs that differ by rounding
ROUND = "round"


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

    @cached_property
    def loss(self) -> float:
        """Nats per supervised token."""
        return sum(nats for nats, _ in self.rows) / sum(tokens for _, tokens in self.rows)

    @property
    def share(self) -> float:
        """Share of the job's steps that are trained."""
        return self.step / self.planned_steps


class Rule(BaseModel):
    """Whether a job is stopped, from its validations and those of its peers."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    rule: Literal["median", "halving"]
    """sweep.prune."""
    after: float
    """sweep.prune_after."""
    round: int | None = None
    """Number of the round, from 0, at whose rung the jobs wait for each other; None: they do not wait."""

    @property
    def rungs(self) -> list[float]:
        """The shares of a job's steps at which halving decides: ``after``, and twice the one before, below 1."""
        rungs = [self.after]
        while 2 * rungs[-1] < 1 - SAME:
            rungs.append(2 * rungs[-1])
        return rungs

    def judge(self, own: Sequence[Validation], peers: Iterable[Sequence[Validation]]) -> Pruned | None:
        """Why a job is stopped at its last validation, or at that of the round before; None if it continues."""
        own = self._compared(own)
        if not own:
            return None
        now, best = own[-1], _best(own)
        others = sorted((_best(one) for each in peers if (one := self._reached(each, now))), key=lambda one: one.loss)
        if not others:
            return None
        middle = others[(len(others) - 1) // 2]  # of two the better one
        if not gains(best.rows, middle.rows):
            return None
        return Pruned(
            rule=self.rule,
            step=now.step,
            planned_steps=now.planned_steps,
            epoch=now.epoch,
            eval_loss=best.loss,
            peers=len(others),
            peer=middle.job,
            peer_eval_loss=middle.loss,
        )

    def waits(self, own: Sequence[Validation]) -> bool:
        """Whether a job waits for its peers at its last validation: it is at the rung of the round, or after it."""
        if self.round is None or self.round >= len(self.rungs) or not own:
            return False
        return self.rungs[self.round] - SAME <= own[-1].share < 1

    def _compared(self, own: Sequence[Validation]) -> Sequence[Validation]:
        """The validations of the job that decide whether it is stopped; none if the rule does not decide now."""
        if self.round is not None:  # at the rung of the round before, unless its validation is that of the next rung
            own = _until(own, self.rungs[self.round - 1]) if self.round else []
            following = self.rungs[self.round] if self.round < len(self.rungs) else 1
            return own if own and own[-1].share < following - SAME else []
        if not own or own[-1].share < self.after - SAME or own[-1].share >= 1:
            return []
        before = own[-2].share if len(own) > 1 else 0.0
        passed = max(rung for rung in self.rungs if rung <= own[-1].share + SAME)
        return own if self.rule == "median" or before < passed - SAME else []

    def _reached(self, other: Sequence[Validation], now: Validation) -> Sequence[Validation]:
        """The validations of a peer until the same point; none if it has not come so far."""
        if self.round is not None:
            return _until(other, self.rungs[self.round - 1])
        if not other or other[-1].epoch < now.epoch - SAME:
            return []
        return [one for one in other if one.epoch <= now.epoch + SAME]


def _best(validations: Sequence[Validation]) -> Validation:
    return min(validations, key=lambda one: one.loss)


def _until(validations: Sequence[Validation], rung: float) -> Sequence[Validation]:
    """The validations until the first one at or after a rung; empty if the job has not reached it."""
    for place, one in enumerate(validations):
        if one.share >= rung - SAME:
            return validations[: place + 1]
    return []


class Peers(Rule):
    """A job, and the folder in which it finds the validations of the other jobs of its sweep."""

    folder: Path
    """Folder of the sweep's validations."""
    job: int
    """Number of this job."""
    comparable: str
    """Equal in jobs whose losses can be compared at the same epoch."""

    def publish(self, step: int, epoch: float, planned_steps: int, rows: Sequence[Sequence[float]]) -> None:
        """Write a validation of this job for the others."""
        self._own.mkdir(parents=True, exist_ok=True)
        pairs = [(nats, tokens) for nats, tokens in rows]
        values = Validation(job=self.job, step=step, epoch=epoch, planned_steps=planned_steps, rows=pairs)
        write_json(self._own / f"{step}.json", values.model_dump())

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
    ) -> PrunedError | PausedError | None:
        """Publish a validation, and return why the job is stopped; the first rank decides for all."""
        stops: list[PrunedError | PausedError | None] = [None]
        if is_first:
            self.publish(step, epoch, planned_steps, rows)
            stops = [self.check() if self.round is None else self.pause()]
        if ranks > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(stops)
        return stops[0]

    def check(self) -> PrunedError | PausedError | None:
        """Why the job is stopped, or waits at its last validation; None if it continues."""
        pruned = self.decide()
        return self.pause() if pruned is None else PrunedError(str(pruned))

    def pause(self) -> PausedError | None:
        """That the job waits at its last validation for its peers; None if it continues."""
        own = self._validations(self._own)
        if not self.waits(own):
            return None
        return PausedError(f"waits for its peers at step {own[-1].step:,} of {own[-1].planned_steps:,}")

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
    def _own(self) -> Path:
        return self.folder / self.comparable / str(self.job)

    @property
    def _decision(self) -> Path:
        return self._own / "pruned.json"

    def verdict(self) -> Pruned | None:
        """Why this job is stopped now; None if it continues."""
        folders = sorted((self.folder / self.comparable).glob("*"))
        return self.judge(self._validations(self._own), (self._validations(one) for one in folders if one != self._own))

    def _validations(self, folder: Path) -> list[Validation]:
        """The validations of a job, by step."""
        found = [Validation.model_validate_json(file.read_bytes()) for file in folder.glob("[0-9]*.json")]
        return sorted(found, key=lambda one: one.step)


def begin_round(store: Path, run: str, number: int) -> None:
    """Let the jobs of a sweep that start from now on train until the rung of a round; in the last one to their end."""
    folder = folder_of(store, run)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ROUND, number)


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
    round_of = json.loads((folder / ROUND).read_text("utf-8")) if (folder / ROUND).is_file() else None
    after = cfg.sweep.prune_after
    return Peers(folder=folder, job=job, comparable=key_of(same), rule=rule, after=after, round=round_of)
