"""Right and wrong answers of many runs in a few bytes each, so that a page can compare any two of them offline.

Two runs are paired if their stored predictions have the same ids, right answers and groups. Their answers are then bits
in the order of the ids. Scores (ROUGE) are not right or wrong, and have no bits.

Reading the predictions of many runs takes longer than everything else, so the bits are cached in the folder of the
page.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sftlab.records import read_jsonl
from sftlab.report.runs import Row
from sftlab.runtime.store import key_of, write_json

log = logging.getLogger(__name__)

CACHE, VERSION = ".answers.json", 1
PREDICTIONS = Path("predictions", "finetuned.jsonl")


@dataclass(frozen=True)
class Questions:
    """The rows of a test set: how many, and of how many groups; equal numbers if all rows are independent."""

    n: int
    groups: int


@dataclass(frozen=True)
class Answers:
    """The answers of a run: the key of its questions, and a bit per question, base64."""

    questions: str
    bits: str


Cached = dict[str, tuple[tuple[int, int], Answers | None]]
"""By the place of a run: time and size of its file, and what was read from it."""


@dataclass(frozen=True)
class Pairs:
    """The answers of runs by their folder, and the questions by their key."""

    questions: dict[str, Questions]
    answers: dict[Path, Answers]
    left_out: set[Path]
    """Runs whose answers do not fit into the page."""


def read(rows: Sequence[Row], outputs: Path, characters: int) -> Pairs:
    """Read the answers of runs, the first rows first, until they take this many characters."""
    questions, earlier = _recall(outputs / CACHE)
    cache: Cached = {}
    answers, left_out, total = dict[Path, Answers](), set[Path](), 0
    for row in rows:
        file = row.run.folder / PREDICTIONS
        try:
            state = os.stat(file)
        except OSError:
            continue
        if total >= characters:
            left_out.add(row.run.folder)
            continue
        stamp = state.st_mtime_ns, state.st_size
        known = earlier.get(row.place)
        own = known[1] if known is not None and known[0] == stamp else _read(file, questions)
        cache[row.place] = stamp, own
        if own is not None:
            answers[row.run.folder] = own
            total += len(own.bits)
    used = {key: questions[key] for key in {own.questions for own in answers.values()}}
    if cache != earlier:
        _remember(outputs / CACHE, used, cache)
    return Pairs(used, answers, left_out)


def _read(file: Path, questions: dict[str, Questions]) -> Answers | None:
    """The answers in a file of predictions; None if it is damaged, or its answers are not right or wrong."""
    try:
        rows = list(read_jsonl(file))
        if not rows or any(row.get("score") is not None for row in rows):
            return None
        rows.sort(key=lambda row: str(row["id"]))
        asked = [[str(row["id"]), sorted(row.get("targets") or [row["target"]]), row["group"]] for row in rows]
        right = [bool(row["correct"]) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        log.warning("%s: cannot be read (%s: %s); its run cannot be paired", file, type(error).__name__, error)
        return None
    key = key_of({"rows": asked})
    if key not in questions:
        groups = {number if row[2] is None else row[2] for number, row in enumerate(asked)}
        questions[key] = Questions(len(rows), len(groups))
    bits = sum(1 << number for number, answer in enumerate(right) if answer)  # the lowest bit is the first question
    return Answers(key, base64.b64encode(bits.to_bytes((len(right) + 7) // 8, "little")).decode())


def _recall(cache: Path) -> tuple[dict[str, Questions], Cached]:
    """What the last page was made from; nothing if it cannot be read."""
    try:
        values = json.loads(cache.read_text("utf-8"))
        if values["version"] != VERSION:
            return {}, {}
        questions = {key: Questions(int(n), int(groups)) for key, (n, groups) in values["questions"].items()}
        answers = {
            place: ((mtime, size), Answers(key, bits) if key in questions else None)
            for place, (mtime, size, key, bits) in values["answers"].items()
        }
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}, {}
    return questions, answers


def _remember(cache: Path, questions: dict[str, Questions], answers: Cached) -> None:
    entries = {
        place: [*stamp, *(("", "") if own is None else (own.questions, own.bits))]
        for place, (stamp, own) in answers.items()
    }
    sets = {key: [of.n, of.groups] for key, of in questions.items()}
    with suppress(OSError):  # without it the next page takes longer
        write_json(cache, {"version": VERSION, "questions": sets, "answers": entries})
