"""``eval.task=metric``: a metric of the ``evaluate`` library scores each answer (eval.metric)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sftlab.errors import ConfigError, Problem, StageError, shown
from sftlab.eval.metrics.load import load_metric
from sftlab.eval.own_code import hash_of
from sftlab.eval.scorers.scores import Scores
from sftlab.eval.scorers.view import View
from sftlab.model.reasoning import answered
from sftlab.records import Example, Prediction
from sftlab.results import ScorerSource


class Metric(Scores):
    """The mean over rows of a metric that is computed for each row alone."""

    view = View(
        metrics={},
        hub_metric="score",
        graded=False,
        rows="texts",
        no_answer="empty",
        gained="higher",
        lost="lower",
        about="Means over all texts of eval.metric, computed for each text alone; eval.metric_range is mapped to 0 "
        "(worst) and 1 (best), and a point is 0.01. Empty: nothing to compare, which scores 0.",
    )

    @property
    def metric(self) -> str:
        """The name of the metric, and of its value if it has several."""
        value = self.cfg.metric_value
        return Path(str(self.cfg.metric)).stem + (f" {value}" if value else "")

    @property
    def source(self) -> ScorerSource:
        """The file of the metric, with its hash."""
        return ScorerSource(name=str(self.cfg.metric), sha256=hash_of(Path(inspect.getfile(type(self._loaded)))))

    @cached_property
    def _loaded(self) -> Any:
        return load_metric(str(self.cfg.metric))

    def score(self, answer: str, row: Prediction) -> float:
        """Compute the metric; of several references the most similar one counts.

        Raises:
            StageError: the metric fails, or its value is beyond the best end of eval.metric_range.
        """
        try:
            return max(self._value(answer, target) for target in self.references(row))
        except ConfigError as error:
            raise StageError(f"row {row.id!r} with the answer {answer[:200]!r}: {error}") from error

    def _value(self, answer: str, target: str) -> float:
        try:
            result = self._loaded.compute(predictions=[answer], references=[target])
        except Exception as error:  # the code of a metric may raise anything
            message = f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise self._error(message, "set another metric, or wrap it in a function (eval.scorer)") from error
        numbers = {name: number for name, value in result.items() if (number := _number(value)) is not None}
        name = self.cfg.metric_value or (next(iter(numbers)) if len(numbers) == 1 else None)
        if name not in numbers:
            there = ", ".join(numbers) or "no number"
            message = f"returns {there}" + (f" and no {name}" if self.cfg.metric_value else "")
            raise self._error(message, "set eval.metric_value to the one that is judged")
        worst, best = self.cfg.metric_range
        share = (numbers[name] - worst) / (best - worst)
        if share > 1 + 1e-9:
            message = f"has the value {numbers[name]:g} ({name}), which is beyond the best end of eval.metric_range"
            raise self._error(message, "set eval.metric_range to the metric's worst and best value, as in [0,100]")
        return min(1.0, max(0.0, share))

    def _error(self, message: str, remedy: str) -> ConfigError:
        keys = ("eval.metric_value", "eval.metric_range", "eval.task")
        return ConfigError(Problem("eval.metric", shown(self.cfg.metric), message, remedy, keys))

    def check(self, examples: Sequence[Example], split: str = "test") -> None:
        """Load the metric, and compute it for the target of the first row.

        Raises:
            ConfigError: a target is empty, or the metric cannot be loaded or computed.
        """
        super().check(examples, split)
        for row in examples[:1]:
            target = self.compared(answered(row.target))
            self._value(target, target)


def _number(value: object) -> float | None:
    """A number, also of a list with one item for the row, or of NumPy; None for anything else."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str | bytes | bool | Mapping) or value is None:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
