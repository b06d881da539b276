"""What generation engines read and write: questions and answers, as JSON lines in a stage's folder.

Each engine works in a folder of its own, ``engine-0``, ``engine-1`` and so on. Completed answers survive an engine
that dies and a run that is killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftlab.records import Record
from sftlab.runtime.store import sync

ENGINE = "engine-"
QUESTIONS = "prompts.jsonl"  # written by the parent
# A line for each completion, for each forced choice, and for the letters directly after each question.
FINISHED, FORCED, LETTERS = "finished.jsonl", "forced.jsonl", "letters.jsonl"
ALIVE = "alive"  # an empty file that an engine touches while it works
SPEED = "speed.json"


@dataclass(frozen=True)
class Question(Record):
    """A prompt that needs a completion; or one that has a ``completion`` and needs letters.

    ``has_forced`` and ``has_letters`` are whether it has its forced choice and the letters directly after the question.
    ``repeat`` counts generations of the test set from 0, and ``row`` is the place in the test set. ``choices`` has the
    letters to choose from.
    """

    repeat: int
    row: int
    prompt: str
    token_ids: list[int]
    choices: str
    completion: str | None = None
    finish_reason: str | None = None
    has_forced: bool = False
    has_letters: bool = False


@dataclass(frozen=True)
class Answer(Record):
    """A completion of a question; ``tokens`` is its length.

    ``forced`` has the log-probabilities of the letters in the forced choice, and ``letters`` those directly after the
    question; None without them. ``prompt_tokens`` is the length of the prompt as an endpoint counts it.
    """

    repeat: int
    row: int
    completion: str
    finish_reason: str
    tokens: int
    forced: dict[str, float] | None = None
    letters: dict[str, float] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Letters(Record):
    """The log-probability of each letter that a question may be answered with."""

    repeat: int
    row: int
    logprobs: dict[str, float]


@dataclass(frozen=True)
class Speed:
    """Seconds that an engine took to start and to generate, and the tokens that it generated.

    ``seconds`` is the time of all work on these questions, forced choices included.
    """

    start_seconds: float
    generate_seconds: float
    tokens: int
    seconds: float = 0.0


Answers = dict[tuple[int, int], Answer]
"""Answers by repeat and row."""


def completed(folder: Path) -> Answers:
    """Read the answers that engines have completed in a stage's folder, in this run or in one that was killed."""
    answers: Answers = {}
    folders = [folder, *sorted(folder.glob(f"{ENGINE}*"))]
    for answer in (Answer(**row) for part in folders for row in _lines(part / FINISHED)):
        answers[answer.repeat, answer.row] = answer
    for name in (FORCED, LETTERS):
        for letters in (Letters(**row) for part in folders for row in _lines(part / name)):
            place = letters.repeat, letters.row
            if place in answers and name == FORCED:
                answers[place] = replace(answers[place], forced=letters.logprobs)
            elif place in answers:
                answers[place] = replace(answers[place], letters=letters.logprobs)
    return answers


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Parse the complete lines of a JSONL file, if it exists. The last line may be truncated by a kill."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:  # a disk lost a part of it; the answer is generated again
            continue


def retain(folder: Path, answers: Iterable[Answer]) -> None:
    """Move answers into one file, so that any number of engines can be started on what is left."""
    copy = folder / f".{FINISHED}"
    Answer.write(copy, answers)
    sync(copy)  # the disk must hold the copy before the originals are deleted
    copy.replace(folder / FINISHED)
    clear(folder)


def clear(folder: Path) -> None:
    """Delete the folders of engines."""
    for engine in folder.glob(f"{ENGINE}*"):
        shutil.rmtree(engine)
