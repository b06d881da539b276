"""``eval.task=number``: the number in an answer equals a target within eval.tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from sftlab.errors import Problem
from sftlab.eval.numbers import last_number, written
from sftlab.eval.scorers.accuracy import Accuracy
from sftlab.eval.scorers.base import listed
from sftlab.model.reasoning import answered
from sftlab.records import Example, Prediction


class Number(Accuracy):
    """Right if the last number of the answer is within the tolerance of a target."""

    def compared(self, text: str) -> str:
        """Return the last number of the text from which eval.extract has taken the answer; "" if there is none."""
        number = last_number(super().compared(text))
        return "" if number is None else written(number)

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether the number differs by no more than the larger tolerance from a reference."""
        number = Fraction(answer)
        return any(
            abs(number - reference) <= self._allowed(reference) for reference in map(Fraction, self.references(row))
        )

    def _allowed(self, reference: Fraction) -> Fraction:
        # As they are written: 0.1 as a binary fraction is not a tenth.
        absolute, relative = (
            Fraction(repr(value)) for value in (self.cfg.tolerance.absolute, self.cfg.tolerance.relative)
        )
        return max(absolute, relative * abs(reference))

    def unmatched(self, examples: Sequence[Example], name: Callable[[Example], str]) -> Iterator[Problem]:
        """Yield the problem of targets without a number."""
        targets = [(row, target) for row in examples for target in row.accepted]
        if lost := [(row, target) for row, target in targets if not self.compared(answered(target))]:
            by = "" if self.cfg.extract is None else f" after eval.extract={self.cfg.extract!r}"
            yield Problem(
                "eval.task",
                "number",
                f"no number is in the target{by}: {listed(lost, name)}",
                f"fix the row{', or change eval.extract' if by else ''}, or set eval.task=exact to compare texts",
            )
