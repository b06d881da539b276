"""The evaluation that fits the answers of a dataset: ``eval.task`` and ``eval.extract``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

Task = Literal["choice", "exact", "rouge"]

SHORT = 5
"""Words of an answer that can be expected to equal its target."""

MOSTLY = 0.8
"""Share of the answers that are short where ``exact`` fits."""

MARKS = ("#### *(.+)", "The answer is: (.+)")
"""Patterns of final answers after a solution, as in GSM8K and MetaMath."""

STATED = "The answer is: "
"""What precedes the answer after a rationale."""


class Answered(NamedTuple):
    """The target of a row, the text of its last turn, and the letters of its options."""

    target: str
    answer: str
    choices: str


def fitting(rows: Sequence[Answered]) -> tuple[Task, str | None]:
    """Return the task, and the template of the compared part if that is not the whole answer."""
    if rows and all(row.choices for row in rows):
        return "choice", None
    if marks := [mark for mark in MARKS if rows and all(re.search(mark, row.target) for row in rows)]:
        return "exact", "{{ text | search('" + marks[0] + "') or text }}"
    stated = sum(row.answer != row.target and row.answer.endswith(STATED + row.target) for row in rows)
    extract = "{{ text | search('(?s)" + STATED + "(.+)') or text }}" if stated > len(rows) / 2 else None
    short = sum(len(row.target.split()) <= SHORT for row in rows)
    return ("exact" if rows and short >= MOSTLY * len(rows) else "rouge"), extract
