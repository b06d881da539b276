"""``eval.task=match``: the answer matches the target, a regular expression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import regex

from sftlab.errors import Problem
from sftlab.eval.scorers.accuracy import Accuracy
from sftlab.eval.scorers.base import listed

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftlab.records import Example, Prediction


class Match(Accuracy):
    """Right if a target, as a regular expression, is found in the answer. Case counts unless it starts with (?i)."""

    SECONDS = 1.0
    """Time limit of one search; an expression that takes longer does not match."""

    def references(self, row: Example | Prediction) -> list[str]:
        """The regular expressions of a row, unchanged."""
        return row.accepted

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether one of the expressions is found in the answer."""
        return any(self._found(pattern, answer) for pattern in self.references(row))

    def _found(self, pattern: str, answer: str) -> bool:
        try:
            return regex.search(pattern, answer, timeout=self.SECONDS) is not None
        except TimeoutError:
            return False

    def unmatched(self, examples: Sequence[Example], name: Callable[[Example], str]) -> Iterator[Problem]:
        """Yield the problem of targets that are not regular expressions, or that match an empty answer."""
        lost = []
        for row in examples:
            for pattern in row.accepted:
                try:
                    useless = regex.search(pattern, "", timeout=self.SECONDS) is not None
                except (regex.error, TimeoutError):
                    useless = True
                if useless:
                    lost.append((row, pattern))
        if lost:
            message = f"a target is not a regular expression, or matches an empty answer: {listed(lost, name)}"
            yield Problem("eval.task", "match", message, "fix the row, or set eval.task=exact to compare texts")
