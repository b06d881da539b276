"""What every experiment tracker has in common: the place of a tracking run, and the results that are logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from sftlab.results import Scalar

End = Literal["finished", "killed", "failed"]


@dataclass(frozen=True)
class Result:
    """What is logged when a run is decided.

    ``summary`` has the final metrics by name, ``header`` and ``rows`` the table of results (empty without an
    evaluation). ``figure`` is an image that may not exist. ``history`` is the log of a training that finished in an
    earlier run, for a tracking run without any.
    """

    summary: Mapping[str, float]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: Path
    history: Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Place:
    """A tracking run of a job: the same ``id`` continues it. ``outputs`` is the folder of all runs."""

    backend: str
    folder: Path
    outputs: Path
    project: str
    name: str
    id: str


class Tracker(Protocol):
    """A tracking run that was started, or continued."""

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Log the configuration."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at an optimizer step."""

    def result(self, result: Result) -> None:
        """Log table, figure and summary."""

    def close(self, end: End) -> None:
        """Write what is not written yet, and end. A training that was pruned or interrupted was killed."""


def named(values: Mapping[str, object]) -> dict[str, float]:
    """Rename the values that a trainer logs as trackers group them: ``eval_loss`` is ``eval/loss``."""
    return {
        f"{'eval' if name.startswith('eval_') else 'train'}/{name.removeprefix('eval_')}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name != "step"
    }


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
