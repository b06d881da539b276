"""What passes between the stages: small frozen records, each one line of a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Record:
    """A record that is one JSON object a line."""

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """Every record of a JSONL file, in its order."""
        return [cls(**row) for row in read_jsonl(path)]

    @classmethod
    def write(cls, path: Path, records: Iterable[Self]) -> None:
        """Write records to a JSONL file, replacing it."""
        write_jsonl(path, map(vars, records))  # asdict would copy every value


@dataclass(frozen=True)
class Example(Record):
    """One row of a dataset after its templates were rendered.

    ``choices`` holds the option letters that ``target`` may be ("ABCD"), and is empty for a task
    that is not multiple choice. ``group`` names the source that rows share, or is None.
    ``options`` maps each letter to the option's text where the dataset tells it. ``subgroup`` is a test
    row's value in the column eval.group_by, by which results are told apart; None where there is none.
    ``targets`` lists every correct answer where there are several, ``target`` among them; None where
    ``target`` is the only one.
    """

    id: str
    system: str
    user: str
    assistant: str
    target: str
    choices: str = ""
    group: str | None = None
    options: dict[str, str] | None = None
    subgroup: str | None = None
    targets: list[str] | None = None

    @property
    def accepted(self) -> list[str]:
        """Every correct answer, ``target`` first."""
        return self.targets or [self.target]


@dataclass(frozen=True)
class Generation(Record):
    """What an engine made of one prompt. ``finish_reason`` is "stop", "length" (truncated) or "unknown".

    ``forced`` is the letter that the model chose when its answer had none and it was made to
    choose; None where it had one, or was not asked.
    """

    id: str
    prompt: str
    completion: str
    finish_reason: str
    tokens: int
    forced: str | None = None


@dataclass(frozen=True)
class Prediction(Record):
    """A generation with what was read out of it; ``answer`` is None where nothing could be read.

    ``readings`` has the answer by each way of reading (strict, last, lenient, forced); ``answer`` is that of
    eval.reading. Reasoning is in ``completion`` and in no answer. ``score`` is between 0 and 1, and None where the
    task has none but right and wrong. ``subgroup`` and ``targets`` are the example's.
    """

    id: str
    prompt: str
    completion: str
    finish_reason: str
    answer: str | None
    target: str
    correct: bool
    group: str | None
    readings: dict[str, str | None]
    score: float | None = None
    subgroup: str | None = None
    targets: list[str] | None = None

    @property
    def accepted(self) -> list[str]:
        """Every correct answer, ``target`` first."""
        return self.targets or [self.target]

    @classmethod
    def write(cls, path: Path, records: Iterable[Self]) -> None:
        """Write predictions to a JSONL file, replacing it. Optional fields that are None are left out."""
        rows = [asdict(record) for record in records]
        for row in rows:
            for name in ("score", "subgroup", "targets"):
                if row[name] is None:
                    del row[name]
        write_jsonl(path, rows)


@dataclass(frozen=True)
class Candidate(Record):
    """A checkpoint that may be kept. ``eval_loss`` is nats per target token over the validation rows.

    ``checkpoint`` is its folder, ``job`` the number of the job in its sweep (0 for a single run) and
    ``overrides`` what makes that job different. ``train_loss`` is the mean over the steps of its epoch,
    ``seconds`` training time from the job's start.
    ``exact_match`` is the share of right answers on validation, where checkpoints are ranked by it.
    """

    eval_loss: float
    epoch: float
    step: int
    checkpoint: str
    job: int
    overrides: list[str]
    train_loss: float | None
    seconds: float
    exact_match: float | None = None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that this project wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write objects to a JSONL file, replacing it."""
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
