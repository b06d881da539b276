"""``eval.task=function``: a function of the user scores each answer (eval.scorer)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sftlab.errors import ConfigError, Problem, StageError, shown
from sftlab.eval.own_code import Function as Code
from sftlab.eval.own_code import hash_of, load, split
from sftlab.eval.scorers.scores import Scores
from sftlab.eval.scorers.view import View
from sftlab.records import Example, Generation, Prediction
from sftlab.results import ScorerSource

TRIED = 3
"""Targets that are scored before training."""


class Function(Scores):
    """The mean of what the function of eval.scorer returns for an answer and its row."""

    needs_context = True
    context_is_optional = True
    view = View(
        metrics={},
        hub_metric="score",
        graded=False,
        rows="rows",
        no_answer="empty",
        gained="higher",
        lost="lower",
        about="Means over all rows, between 0 and 1, of a function of the user (eval.scorer); a point is 0.01. Empty: "
        "nothing to compare, which scores 0.",
    )

    @property
    def metric(self) -> str:
        """The name of the function."""
        return split(self.cfg.scorer)[1]

    @property
    def source(self) -> ScorerSource:
        """The file of the function, with its hash."""
        path, _ = split(self.cfg.scorer)
        return ScorerSource(name=str(self.cfg.scorer), sha256=hash_of(path))

    def score(self, answer: str, row: Prediction) -> float:
        """Call the function.

        Raises:
            StageError: it fails, or returns no number between 0 and 1.
        """
        value, problem = self._called(load(self.cfg.scorer), answer, row)
        if problem is not None:
            raise StageError(
                f"eval.scorer={shown(self.cfg.scorer)}: {problem}, for row {row.id!r} with the answer "
                f"{answer[:200]!r}. Correct the function and run the same command again; answers are reused"
            )
        return value

    def _called(self, function: Code, answer: str, row: Prediction) -> tuple[float, str | None]:
        """The score, and what is wrong with it."""
        try:
            value = function(answer, row)
            number = float(value)  # type: ignore[arg-type]
        except Exception as error:  # the code is the user's, and may raise anything
            return 0.0, f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not (math.isfinite(number) and 0 <= number <= 1):
            return 0.0, f"returns {number:g}, which is not between 0 and 1"
        return number, None

    def check(self, examples: Sequence[Example], split: str = "test") -> None:
        """Score the targets of the first rows as if they were answers.

        Raises:
            ConfigError: a target is empty, or the function cannot be called.
        """
        super().check(examples, split)
        function, rows = load(self.cfg.scorer), examples[:TRIED]
        made = [Generation(row.id, "", row.target, "stop", 0) for row in rows]
        for row in self.predictions(made, rows):
            _, problem = self._called(function, row.answer or "", row)
            if problem is not None:
                message = f"{problem}, for the target of {split} row {row.id!r} as the answer"
                raise ConfigError(Problem("eval.scorer", shown(self.cfg.scorer), message, "correct the function"))
