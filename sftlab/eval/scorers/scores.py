"""The base class of tasks whose answers have a score between 0 and 1, judged by the mean."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from sftlab.eval.scorers.base import Runs, Scorer, counts, detectable, groups_of, shared_groups
from sftlab.eval.statistics import averages, compare_scores, detectable_mean_difference, differences, mean_interval
from sftlab.records import Example, Prediction
from sftlab.results import Comparison, ModelResult, SubgroupSide


class Scores(Scorer):
    """The mean of a score per row. Gaffke's test compares two models.

    A task that scores each answer by itself overrides ``score``; one that scores all answers together, ``scored``.
    """

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether the answer equals a reference."""
        return answer in self.references(row)

    def score(self, answer: str, row: Prediction) -> float:
        """Score an answer between 0 and 1; unless a task overrides it, by whether it equals a reference."""
        return float(self.right(answer, row))

    def scored(self, rows: list[Prediction]) -> list[Prediction]:
        """Return the predictions with their scores; a missing answer scores 0."""
        return [replace(row, score=0.0 if row.answer is None else self.score(row.answer, row)) for row in rows]

    def means(self, rows: Sequence[Prediction]) -> dict[str, float]:
        """The means of all scores of the task, by their keys; the judged one only, if there are no others."""
        return {}

    @property
    def named(self) -> str:
        """The name of the judged metric."""
        return self.view.name(self.metric)

    def power(self, groups: Sequence[str | None]) -> list[tuple[int, str]]:
        """Report the minimum detectable effect for an assumed spread of the scores."""
        n = len({group or number for number, group in enumerate(groups)})
        assumed = [0.6, 0.4] * (n // 2) + [0.5] * (n % 2)
        visible = detectable_mean_difference(differences([0.5] * n, assumed, None), alpha=self.cfg.alpha)
        points = f"{100 * visible:.1f} points of {self.named} or more" if isfinite(visible) else "nothing"
        row = self.view.rows.removesuffix("s")
        text = (
            f"test set: {n} {self.view.rows} can show {points} if the models' scores "
            f"differ from {row} to {row} by a standard deviation of 10 points (80 % power; the report has the value "
            "for the measured spread, and eval.hoped_difference applies to accuracies only)"
        )
        return [(logging.INFO, text)]

    def result(self, runs: Runs) -> ModelResult:
        """The mean score with its interval, and the means of all scores, over all repeats."""
        scores = _scores(runs)
        result = ModelResult(
            metric=self.metric,
            value=sum(scores) / len(scores),
            interval=self._interval(runs),
            level=1 - self.cfg.alpha,
            groups=shared_groups(runs),
            scores=self.means([row for run in runs for row in run]),
            **counts(runs),
        )
        return self.with_others(result, runs)

    def side(self, runs: Runs, *, enough: bool) -> SubgroupSide:
        """The mean score on a subgroup; a few rows have no interval."""
        scores = _scores(runs)
        return SubgroupSide(value=sum(scores) / len(scores), interval=self._interval(runs) if enough else None)

    def _interval(self, runs: Runs) -> tuple[float, float]:
        return mean_interval(_scores(runs), groups_of(runs), alpha=self.cfg.alpha)

    def difference(self, a: Runs, b: Runs) -> Comparison:
        """Compare mean scores: ``gained`` and ``lost`` count answers that score higher and lower."""
        return compare_scores(
            _scores(a),
            _scores(b),
            groups=groups_of(a),
            alpha=self.cfg.alpha,
            metric=self.metric,
            name=f"mean {self.named}",
            limits=self.limits,
        )

    def comparison(self, a: Runs, b: Runs) -> Comparison:
        """Compare two models, with the smallest difference that shows at the spread of their scores."""
        compared = super().comparison(a, b)
        if not compared.n:
            return compared
        mean = differences(_scores(a), _scores(b), groups_of(a))
        visible = detectable_mean_difference(mean, self.cfg.alpha)
        spread = f"scores of both models differ from row to row as they do here (standard error {100 * mean.error:.2f})"
        return compared.model_copy(update=detectable(visible, spread, compared))


def _scores(runs: Runs) -> list[float]:
    """The score of each row, averaged over repeats."""
    return averages([[row.score for row in rows if row.score is not None] for rows in runs])
