"""Early stopping: when validations have stopped to gain more than the noise of the validation rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Self

from sftlab.eval.statistics.ties import ROUNDING
from sftlab.results import EarlyStop
from sftlab.runtime.store import write_json
from sftlab.train.schedule import Timeline, depends_on_length

STOPPING = "stopping.json"
# Of a normal distribution: without a true difference, 2.5 % of validations count as a gain.
STANDARD_ERRORS = 1.96

RowLosses = Sequence[Sequence[float]]
"""Nats and supervised tokens of each validation row."""


def gains(before: RowLosses, after: RowLosses) -> bool:
    """Whether the validation loss is lower by more than its noise: 1.96 standard errors of the paired difference.

    The loss is a mean per token, so the standard error is that of a ratio: of the rows' differences in nats, each minus
    its expected share by tokens. Rows are treated as independent. A millionth of the loss or less is rounding, no gain.
    """
    rows = [(old[0] - new[0], old[1]) for old, new in zip(before, after, strict=True) if old[1]]
    if len(rows) < 2 or not all(isfinite(nats) for nats, _ in rows):
        return False
    tokens = sum(count for _, count in rows)
    gain = sum(nats for nats, _ in rows) / tokens
    squares = sum((nats - gain * count) ** 2 for nats, count in rows)
    loss = sum(nats for nats, _ in before) / tokens
    error = sqrt(squares * len(rows) / (len(rows) - 1)) / tokens
    return gain > max(STANDARD_ERRORS * error, ROUNDING * loss)


@dataclass
class Patience:
    """The state of early stopping: the last validation with a gain, and how many have followed it.

    Each validation is compared with the last one that had a gain, so that small gains add up until they are larger than
    the noise. The state is saved with each checkpoint that training may resume from.
    """

    limit: int
    step: int | None = None
    waited: int = 0
    rows: RowLosses = field(default_factory=list)

    @property
    def exhausted(self) -> bool:
        """Whether training should stop."""
        return self.waited >= self.limit

    def observe(self, step: int, rows: RowLosses) -> None:
        """Take a validation into account."""
        if self.step is None or gains(self.rows, rows):
            self.step, self.rows, self.waited = step, rows, 0
        else:
            self.waited += 1

    def record(self, timeline: Timeline, step: int, learning_rate: float, seconds: float) -> EarlyStop | None:
        """What it did to a training that has ended after ``seconds``; None if all steps were trained."""
        if not self.exhausted or step == timeline.total or self.step is None:
            return None
        return EarlyStop(
            step=step,
            planned_steps=timeline.total,
            best_step=self.step,
            validations=self.waited,
            schedule=timeline.train.lr_scheduler_type,
            depends_on_length=depends_on_length(timeline.train),
            learning_rate=learning_rate,
            peak_learning_rate=timeline.train.learning_rate,
            saved_seconds=round(seconds / step * (timeline.total - step), 1),
        )

    def write(self, checkpoint: Path) -> None:
        """Save the state in the folder of a checkpoint."""
        write_json(checkpoint / STOPPING, asdict(self))

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read the state from the folder of a checkpoint."""
        return cls(**json.loads((checkpoint / STOPPING).read_text("utf-8")))
