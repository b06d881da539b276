"""Multiple choice as conversations: a question that lists its options, and an answer that states a letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sftlab.dataset.row_formats.cells import refused
from sftlab.dataset.row_formats.record import Converted
from sftlab.dataset.wording import listing

LETTER = re.compile(r"(?i)the answer is\s*\(([A-Z])\)")
"""What the default ``eval.pattern`` reads."""

_MARKS = (re.compile(r"\(([A-Z])\)\s"), re.compile(r"(?m)^[ \t]*([A-Z])[).:]\s"))


def letters_of(text: str) -> list[str]:
    """Return the letters that an answer states, without repetitions."""
    return list(dict.fromkeys(letter.upper() for letter in LETTER.findall(text)))


def options_of(question: str) -> dict[str, str]:
    """Return letter → text of the options that a question lists at its end; {} if it lists none."""
    for pattern in _MARKS:
        marks = list(pattern.finditer(question))
        runs = [_run(marks[number:]) for number, mark in enumerate(marks) if mark[1] == "A"]
        run = max(reversed(runs), key=len, default=[])
        if len(run) > 1:
            ends = [*(mark.start() for mark in run[1:]), len(question)]
            return {mark[1]: question[mark.end() : end].strip() for mark, end in zip(run, ends, strict=True)}
    return {}


def _run(marks: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """Return the marks of successive letters. An option may name others, as in "both (A) and (C)"."""
    run: list[re.Match[str]] = []
    for mark in marks:
        if mark[1] == chr(ord("A") + len(run)):
            run.append(mark)
    return run


def states_option(row: Converted) -> bool:
    """Return whether the last turn states one of the options of the question before it."""
    question, answer = _last(row)
    letters = letters_of(answer)
    return len(letters) == 1 and letters[0] in options_of(question)


def with_options(row: Converted, section: str) -> Converted:
    """Return a conversation with the letter that its answer states as target.

    Raises:
        ConfigError: the question lists no options, or the answer does not state a single one of them.
    """
    question, answer = _last(row)
    options, letters = options_of(question), letters_of(answer)
    keys = (f"{section}.keep", f"{section}.target")
    if not options:
        raise refused('the last question lists no options as in "(A) …"', "fix or delete the row", *keys)
    if len(letters) != 1 or letters[0] not in options:
        states = f"states {listing(letters)}" if letters else "states no letter"
        message = (
            f'the last answer {states}, and the other rows end with "the answer is (X)" for one of {listing(options)}'
        )
        raise refused(message, f"fix or delete the row, or set {section}.target", *keys)
    return replace(row, targets=letters, choices="".join(options), options=options)


def _last(row: Converted) -> tuple[str, str]:
    questions = [message.get("content") or "" for message in row.messages if message["role"] == "user"]
    return questions[-1] if questions else "", row.messages[-1].get("content") or ""
