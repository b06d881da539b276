"""Short questions on basic skills, for a guard that needs no download: what a fine-tuned model should not forget.

There are five kinds, in equal numbers: arithmetic, instruction format, reading comprehension, common facts, and
declining to invent. An answer is right if it matches a regular expression (``eval.task=match``) that accepts the forms
in which small models answer. One answer to all questions is right in a tenth of a kind or less, except "unknown", which
is the right answer of the last kind. Questions are written in English, and those about texts are about invented people.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from sftlab.dataset.basics.facts import fact
from sftlab.dataset.basics.instructions import instruction
from sftlab.dataset.basics.reading import missing, reading
from sftlab.dataset.basics.sums import arithmetic

__all__ = ["KINDS", "rows"]

Draw = Callable[[random.Random], Iterator[tuple[str, str, str]]]
"""Draws questions, each with a regular expression and a right answer; an iterator that ends has no others."""

KINDS: dict[str, Draw] = {
    "arithmetic": arithmetic,
    "instruction format": instruction,
    "reading comprehension": reading,
    "common facts": fact,
    "declining to invent": missing,
}


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """The first ``count`` questions of the series that ``seed`` names; each kind comes once before any comes again.

    Returns:
        Rows with id, kind, question, target and answer. No two questions are the same. There are fewer than ``count``
        if the questions of a kind are used up.
    """
    rngs = {kind: random.Random(f"basics {kind} {seed}") for kind in KINDS}
    draws = {kind: draw(rngs[kind]) for kind, draw in KINDS.items()}
    made: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(made) < count:
        for kind, draw in draws.items():
            item = next((one for one in draw if one[0] not in seen), None)
            if item is None or len(made) == count:
                return made
            question, target, answer = item
            seen.add(question)
            made.append(
                {"id": f"basics-{len(made):04}", "kind": kind, "question": question, "target": target, "answer": answer}
            )
    return made
