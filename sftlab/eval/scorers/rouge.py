"""``eval.task=rouge``: how much of a reference text an answer has, by ROUGE."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isfinite

from sftlab.errors import Problem
from sftlab.eval.scorers.base import (
    Runs,
    Scorer,
    View,
    counts,
    detectable,
    groups_of,
    library_metric,
    listed,
    shared_groups,
)
from sftlab.eval.statistics import (
    averages,
    compare_scores,
    detectable_mean_difference,
    differences,
    mean_interval,
)
from sftlab.records import Example, Prediction
from sftlab.results import Comparison, ModelResult, SubgroupSide

KINDS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


class Rouge(Scorer):
    """The mean F-measure of eval.rouge. Gaffke's test compares two models."""

    view = View(
        metrics=KINDS,
        hub_metric="rouge",
        graded=False,
        rows="texts",
        no_answer="empty",
        gained="higher",
        lost="lower",
    )

    @property
    def metric(self) -> str:
        """The kind of ROUGE that is judged (eval.rouge)."""
        return self.cfg.rouge

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether the answer equals a reference; it is judged by its score, not by this."""
        return answer in self.references(row)

    def scored(self, rows: list[Prediction]) -> list[Prediction]:
        """Return the predictions with their scores; a missing answer scores 0."""
        scores = self._rouge(rows, [self.metric])[self.metric]
        return [replace(row, score=score) for row, score in zip(rows, scores, strict=True)]

    def _rouge(self, rows: Sequence[Prediction], kinds: Sequence[str]) -> dict[str, list[float]]:
        """Score every row by each kind of ROUGE; of several references the most similar one counts."""
        pairs = [(place, target) for place, row in enumerate(rows) for target in self.references(row)]
        computed = library_metric("rouge").compute(
            predictions=[rows[place].answer or "" for place, _ in pairs],
            references=[target for _, target in pairs],
            rouge_types=list(kinds),
            use_aggregator=False,
        )
        best = {kind: [0.0] * len(rows) for kind in kinds}
        for kind, scores in best.items():
            for (place, _), score in zip(pairs, computed[kind], strict=True):
                scores[place] = max(scores[place], score)
        return best

    def unmatched(self, examples: Sequence[Example], name: Callable[[Example], str]) -> Iterator[Problem]:
        """Yield the problem of targets with nothing to compare, or without any word that ROUGE counts."""
        problems = list(super().unmatched(examples, name))
        yield from problems
        targets = [(row, target) for row in examples for target in row.accepted]
        if not problems and targets and not any(re.search(r"[a-zA-Z0-9]", target) for _, target in targets):
            yield Problem(
                "eval.task",
                "rouge",
                "cannot be judged by this score: no target has a word of ASCII letters or digits, and "
                f"ROUGE counts no other words: {listed(targets, name)}",
                "set eval.task=exact",
            )

    def power(self, groups: Sequence[str | None]) -> list[tuple[int, str]]:
        """Report the minimum detectable effect for an assumed spread of the scores."""
        n = len({group or number for number, group in enumerate(groups)})
        assumed = [0.6, 0.4] * (n // 2) + [0.5] * (n % 2)
        visible = detectable_mean_difference(differences([0.5] * n, assumed, None), alpha=self.cfg.alpha)
        points = f"{100 * visible:.1f} points of {KINDS[self.metric]} or more" if isfinite(visible) else "nothing"
        text = (
            f"test set: {n} texts can show {points} if the models' scores "
            "differ from text to text by a standard deviation of 10 points (80 % power; the report has the value for "
            "the measured spread, and eval.hoped_difference applies to accuracies only)"
        )
        return [(logging.INFO, text)]

    def result(self, runs: Runs) -> ModelResult:
        """The mean score with its interval, and the means of all kinds, over all repeats."""
        rows = [row for run in runs for row in run]
        means = {kind: sum(scores) / len(scores) for kind, scores in self._rouge(rows, list(KINDS)).items()}
        return ModelResult(
            metric=self.metric,
            value=means[self.metric],
            interval=self._interval(runs),
            level=1 - self.cfg.alpha,
            groups=shared_groups(runs),
            scores=means,
            **counts(runs),
        )

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
            name=f"mean {KINDS[self.metric]}",
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
