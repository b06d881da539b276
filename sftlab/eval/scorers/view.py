"""How the results of a task are named and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """How the results of a task are named and written: the same in terminal, page, model card and tracking.

    ``graded`` tasks have right and wrong answers, and their metrics are percentages. Answers of other tasks have a
    score between 0 and 1. ``metrics`` maps the metrics' keys to their names, ``hub_metric`` is the metric's type on
    the hub. The other fields name the test rows, rows without an answer, and rows that the second model answers
    better or worse; ``about`` explains the numbers, and ``items`` names what
    results are also counted by, if anything.
    """

    metrics: Mapping[str, str]
    hub_metric: str
    graded: bool
    rows: str
    no_answer: str
    gained: str
    lost: str
    about: str
    items: str = ""

    def name(self, metric: str) -> str:
        """The name of a metric; its key if it has none."""
        return self.metrics.get(metric, metric)

    def number(self, value: float) -> str:
        """Write a value of the metric."""
        return f"{100 * value:.1f}%" if self.graded else f"{value:.3f}"

    def interval(self, ends: tuple[float, float] | None) -> str:
        """Write an interval of the metric; a dash if there is none."""
        return "–" if ends is None else " to ".join(map(self.number, ends))
