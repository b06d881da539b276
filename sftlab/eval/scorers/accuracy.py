"""The base class of tasks with right and wrong answers, judged by accuracy."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import inf, isfinite

from sftlab.errors import ConfigError, Problem, shown
from sftlab.eval.metrics.load import library_metric
from sftlab.eval.scorers.base import Runs, Scorer, counts, detectable, groups_of, shared_groups
from sftlab.eval.scorers.view import View
from sftlab.eval.statistics import (
    accuracy,
    answers_per_question,
    averages,
    compare,
    minimal_detectable_difference,
)
from sftlab.model.reasoning import answered
from sftlab.records import Example, Prediction
from sftlab.results import Comparison, ModelResult, SubgroupSide

LOOKED_AT = 1000  # completions that are read before training; laying out SQL takes milliseconds each


class Accuracy(Scorer):
    """Right or wrong: an answer is right if it equals one of the row's targets. McNemar's test compares two models."""

    view = View(
        metrics={"accuracy": "accuracy"},
        hub_metric="accuracy",
        graded=True,
        rows="questions",
        no_answer="no answer",
        gained="gained",
        lost="lost",
        about="No answer: nothing was extracted from the completion, which counts as wrong.",
    )

    @property
    def metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether the answer equals a reference."""
        return answer in self.references(row)

    # ------------------------------------------------------------------- checks of completions

    def completions(self, examples: Sequence[Example], split: str) -> Iterator[Example]:
        """Yield the rows whose completion can be checked against its target.

        Training rows have nothing in common with a mounted test set, so they are not checked.
        """
        return (row for row in examples if row.assistant and (split == "test" or self.cfg.dataset is None))

    def stated(self, row: Example) -> str | None:
        """The answer that a row's own completion states."""
        return self.compared(answered(row.assistant)) or None

    @property
    def reading(self) -> tuple[str, str]:
        """The key that decides how an answer is extracted, and its value as messages write it."""
        return "eval.extract", shown(self.cfg.extract)

    def remedies(self) -> tuple[str, Iterator[tuple[str, str]]]:
        """What to change if no completion is read as its target: in words, and settings (key, value) to try."""
        extract = "{{ text | search('(?i)answer(?: is)?:?[ (*]*([^().,;*]+)') or text }}"
        return "set eval.extract to take the target out of them", iter([("extract", extract)])

    def check_completions(self, examples: Sequence[Example], split: str = "train") -> str | None:
        """Check that the completions of a split are read as their targets: training teaches the model to write them.

        The first ``LOOKED_AT`` are read. Completions of a mounted test set are only warned about: no model was
        trained on their form.

        Returns:
            A warning if some of them are not read as their target.

        Raises:
            ConfigError: None of them is, with a setting that reads them if one is known.
        """
        rows = [*islice(self.completions(examples, split), LOOKED_AT)]
        wrong = self._misread(rows)
        if not wrong:
            return None
        (first, answer), mounted = wrong[0], split == "test" and self.cfg.dataset is not None
        place = (
            f"{split} row {first.id!r} has target {' or '.join(first.accepted)[:60]!r}, its completion ends in "
            f"{first.assistant.strip()[-80:]!r} and is read as {repr(answer[:60]) if answer else 'nothing'}"
        )
        named = "training" if split == "train" else split
        key, value = self.reading
        if len(wrong) < len(rows) or mounted:
            return (
                f"{key}={value}: {len(wrong)} of {len(rows)} {named} completions are not read as their target; {place}"
            )
        words, settings = self.remedies()
        remedy = f"change dataset.assistant, or {words}"
        for name, setting in settings:
            if not type(self)(self.cfg.model_copy(update={name: setting}))._misread(rows):
                remedy = f"set {override(f'eval.{name}', setting)}"
                break
        message = f"none of {len(rows)} {named} completions is read as its target: {place}"
        raise ConfigError(Problem(key, value, message, remedy, ("eval.task", "dataset")))

    def _misread(self, rows: Sequence[Example]) -> list[tuple[Example, str | None]]:
        answers = [(row, self.stated(row)) for row in rows]
        return [(row, answer) for row, answer in answers if answer is None or not self.right(answer, row)]

    def power(self, groups: Sequence[str | None]) -> list[tuple[int, str]]:
        """Report the minimum detectable effect, and whether it is larger than eval.hoped_difference."""
        n = len({group or number for number, group in enumerate(groups)})
        freedom = inf if n == len(groups) else n - 1
        visible = minimal_detectable_difference(n, alpha=self.cfg.alpha, freedom=freedom)
        points = f"{100 * visible:.1f} points or more" if isfinite(visible) else "nothing, whatever the difference"
        rows = "questions" if n == len(groups) else "groups of questions, each counted once,"
        messages = [
            (
                logging.INFO,
                f"test set: {n} {rows} can show {points} (80 % power, if a fifth of the answers change, or more if "
                "the difference requires it)",
            )
        ]
        if visible > self.cfg.hoped_difference:
            hoped = 100 * self.cfg.hoped_difference
            text = (
                f"eval.hoped_difference={self.cfg.hoped_difference:g}: this test set is too small to show {hoped:.1f}"
            )
            messages.append((logging.WARNING, f"{text} points; use a larger one, or expect an inconclusive verdict"))
        return messages

    # ------------------------------------------------------------------- results

    def result(self, runs: Runs) -> ModelResult:
        """Accuracy with its Wilson interval, over all repeats.

        The value is ``exact_match`` of the ``evaluate`` library over answers and targets, in which a missing answer
        is an empty string that no target equals.
        """
        rows = [row for run in runs for row in run]
        answers = [row.answer or "" for row in rows]
        # The library compares pairs, so a right answer is paired with itself, of whichever target it is.
        targets = [row.answer or "" if row.correct else self.references(row)[0] for row in rows]
        result = ModelResult(
            metric=self.metric,
            value=exact_match(answers, targets),
            interval=self._interval(runs),
            level=1 - self.cfg.alpha,
            groups=shared_groups(runs),
            correct=sum(row.correct for row in rows),
            letters=dict(sorted(Counter(row.answer or "none" for row in rows).items())),
            **counts(runs),
        )
        return self.with_others(result, runs)

    def side(self, runs: Runs, *, enough: bool) -> SubgroupSide:
        """Accuracy on a subgroup with its Wilson interval."""
        correct = [row.correct for run in runs for row in run]
        return SubgroupSide(value=sum(correct) / len(correct), interval=self._interval(runs), correct=sum(correct))

    def _interval(self, runs: Runs) -> tuple[float, float]:
        right = averages([[row.correct for row in rows] for rows in runs])
        return accuracy(right, groups_of(runs), self.cfg.alpha, len(runs))

    def difference(self, a: Runs, b: Runs) -> Comparison:
        """Compare right and wrong answers."""
        return self.judged(a, b, lambda row: row.correct)

    def judged(self, a: Runs, b: Runs, right: Callable[[Prediction], bool]) -> Comparison:
        """Compare two models by a function that decides which answers are right."""
        rates = [averages([[right(row) for row in rows] for rows in runs]) for runs in (a, b)]
        answers = answers_per_question(len(a), len(b))
        return compare(
            rates[0], rates[1], groups=groups_of(a), alpha=self.cfg.alpha, answers=answers, limits=self.limits
        )

    def comparison(self, a: Runs, b: Runs) -> Comparison:
        """Compare two models, with the smallest difference that the test set shows."""
        compared = super().comparison(a, b)
        seen = compared.changes
        if seen is None:
            return compared
        visible = minimal_detectable_difference(
            seen.rows, seen.share, self.cfg.alpha, freedom=inf if seen.freedom is None else seen.freedom
        )
        change = f"{100 * seen.share:.1f} % of the answers change, as observed (or more if the difference requires it),"
        return compared.model_copy(update=detectable(visible, change, compared))


def exact_match(answers: list[str], targets: list[str]) -> float:
    """``exact_match`` of the ``evaluate`` library, a fraction."""
    return float(library_metric("exact_match").compute(predictions=answers, references=targets)["exact_match"])


def override(key: str, value: str) -> str:
    """A setting as it is written on the command line."""
    quoted = value.replace('"', r"\"")
    return shlex.quote(f'{key}="{quoted}"')
