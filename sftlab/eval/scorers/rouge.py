"""``eval.task=rouge``: how much of a reference text an answer has, by ROUGE."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from sftlab.errors import Problem
from sftlab.eval.metrics.load import library_metric
from sftlab.eval.scorers.base import listed
from sftlab.eval.scorers.scores import Scores
from sftlab.eval.scorers.view import View
from sftlab.records import Example, Prediction

KINDS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


class Rouge(Scores):
    """The mean F-measure of eval.rouge. Gaffke's test compares two models."""

    view = View(
        metrics=KINDS,
        hub_metric="rouge",
        graded=False,
        rows="texts",
        no_answer="empty",
        gained="higher",
        lost="lower",
        about="Means over all texts, between 0 and 1; a point is 0.01. Empty: nothing to compare, which scores 0.",
    )

    @property
    def metric(self) -> str:
        """The kind of ROUGE that is judged (eval.rouge)."""
        return self.cfg.rouge

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

    def means(self, rows: Sequence[Prediction]) -> dict[str, float]:
        """The means of all kinds of ROUGE."""
        return {kind: sum(scores) / len(scores) for kind, scores in self._rouge(rows, list(KINDS)).items()}

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
