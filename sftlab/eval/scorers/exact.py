"""``eval.task=exact``: the whole answer equals a target after normalisation."""

from __future__ import annotations

from sftlab.eval.extract import normalise_answer
from sftlab.eval.scorers.accuracy import Accuracy


class Exact(Accuracy):
    """Exact match, without case, surplus white space, and punctuation around the text."""

    def compared(self, text: str) -> str:
        """Return the text from which eval.extract has taken the answer, normalised."""
        return normalise_answer(super().compared(text))
