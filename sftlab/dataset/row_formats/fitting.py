"""The evaluation that fits the answers of a dataset: ``eval.task`` and ``eval.extract``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from sftlab.config import Task

SHORT = 5
"""Words of an answer that can be expected to equal its target."""

MOSTLY = 0.8
"""Share of the answers that are short where ``exact`` fits."""

NUMBER = re.compile(r"[-−+]?[$€£]?\d[\d,.'’]*\s?%?")
"""A target that is nothing but a number."""

STATEMENT = re.compile(r"\s*(?:```\w*\s*)?(?:select|with|insert|update|delete|create|alter|drop)\b", re.IGNORECASE)
"""The beginning of a SQL statement."""

TABLE = re.compile(r"\bcreate\s+table\b", re.IGNORECASE)
"""What a context has on whose tables statements can be executed."""

FEWEST, MOST = 20, 20
"""Rows that show that all targets are numbers or labels, and labels of a classification, which recur five times."""

MARKS = ("#### *(.+)", "The answer is: (.+)")
"""Patterns of final answers after a solution, as in GSM8K and MetaMath."""

STATED = "The answer is: "
"""What precedes the answer after a rationale."""

LETTER = "(?i)the answer is [(]([A-Z])[)]"
"""Pattern of the letter in an answer to a multiple-choice row, where other rows are not multiple choice."""


class Answered(NamedTuple):
    """The target of a row, the text of its last turn, the letters of its options, and its context (dataset.context)."""

    target: str
    answer: str
    choices: str
    context: str | None = None


def fitting(rows: Sequence[Answered]) -> tuple[Task, str | None]:
    """Return the task, and the template of the compared part if that is not the whole answer."""
    if rows and all(row.choices for row in rows):
        return "choice", None
    if rows and all(STATEMENT.match(row.target) and TABLE.search(row.context or "") for row in rows):
        return "sql", None
    if marks := [mark for mark in MARKS if rows and all(re.search(mark, row.target) for row in rows)]:
        ends = [match[1].strip() for row in rows if (match := re.search(marks[0], row.target))]
        return "number" if _numbers(ends) else "exact", "{{ text | search('" + marks[0] + "') or text }}"
    lettered = "{{ text | search('" + LETTER + "') or text }}" if any(row.choices for row in rows) else None
    stated = sum(row.answer != row.target and row.answer.endswith(STATED + row.target) for row in rows)
    extract = "{{ text | search('(?s)" + STATED + "(.+)') or text }}" if stated > len(rows) / 2 else lettered
    return _of([row.target for row in rows]), extract


def _of(targets: Sequence[str]) -> Task:
    """The task that fits targets without option letters. Numbers that recur may be labels, so neither is chosen."""
    short = sum(len(target.split()) <= SHORT for target in targets)
    if targets and all(map(_is_json, targets)):
        return "json"
    if not targets or short < MOSTLY * len(targets):
        return "rouge"
    if _numbers(targets):
        return "number"
    recurring = len(targets) >= FEWEST and 2 <= len(set(targets)) <= min(MOST, len(targets) // 5)
    words = short == len(targets) and not any(map(NUMBER.fullmatch, targets))
    return "labels" if recurring and words else "exact"


def _numbers(targets: Sequence[str]) -> bool:
    """Whether all targets are numbers, most of them different."""
    numbers = all(NUMBER.fullmatch(target.strip()) for target in targets)
    return numbers and len(targets) >= FEWEST and 2 * len(set(targets)) > len(targets)


def _is_json(target: str) -> bool:
    """Whether a text is a JSON object, or a list."""
    if not target.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(target)
    except (ValueError, RecursionError):
        return False
    return True
