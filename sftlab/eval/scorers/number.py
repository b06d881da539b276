"""``eval.task=number``: the number in an answer equals a target within eval.tolerance."""

from __future__ import annotations

from fractions import Fraction

from sftlab.eval.numbers import last_number, written
from sftlab.eval.scorers.accuracy import Accuracy
from sftlab.records import Example, Prediction


class Number(Accuracy):
    """Right if the last number of the answer is within the tolerance of a target."""

    unreadable = "no number is in the target"
    otherwise = ", or set eval.task=exact to compare texts"

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
