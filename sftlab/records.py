"""What passes between the stages: small frozen records, each one line of a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

IGNORED = -100  # label of a token without a loss


@dataclass(frozen=True)
class Record:
    """A record that is one JSON object per line."""

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """Read every record of a JSONL file, in order."""
        return [cls(**row) for row in read_jsonl(path)]

    @classmethod
    def write(cls, path: Path, records: Iterable[Self]) -> None:
        """Write records to a JSONL file, replacing it."""
        write_jsonl(path, map(vars, records))  # asdict would copy every value


@dataclass(frozen=True)
class Example(Record):
    """One row of a dataset after its templates were rendered.

    ``choices`` has the option letters that ``target`` may be ("ABCD"), and is empty for a task that is not multiple
    choice; ``options`` maps each letter to the option's text if the dataset has it. ``group`` names the source that
    rows share, or is None. ``subgroup`` is a test row's value in the column eval.group_by, or None. ``targets`` lists
    every right answer if there are several, ``target`` among them, else it is None.
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
        """Every right answer, ``target`` first."""
        return self.targets or [self.target]


@dataclass(frozen=True)
class Generation(Record):
    """An engine's completion of one prompt. ``finish_reason`` is "stop", "length" (truncated) or "unknown".

    ``forced`` is the letter of the forced choice if no answer was extracted; None if there was an answer, or no
    choice was forced.
    """

    id: str
    prompt: str
    completion: str
    finish_reason: str
    tokens: int
    forced: str | None = None


@dataclass(frozen=True)
class Prediction(Record):
    """A generation with its extracted answer; ``answer`` is None if no answer was extracted.

    ``readings`` has the answer by each way of reading (strict, last, lenient, forced); ``answer`` is that of
    eval.reading. An answer contains no reasoning, which is in ``completion`` only. ``score`` is between 0 and 1, and
    None if answers are right or wrong. ``subgroup`` and ``targets`` are those of the example.
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
        """Every right answer, ``target`` first."""
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
    """A checkpoint that may be selected."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"use_attribute_docstrings": True}

    eval_loss: float
    """Its validation loss, nats per supervised token."""
    epoch: float
    """Its epoch, with a fraction within an epoch."""
    step: int
    """Its optimizer step; 0 is the untrained model."""
    checkpoint: str
    """Its folder."""
    job: int
    """Number of its job in the sweep; 0 for a single run."""
    overrides: list[str]
    """Overrides of its job."""
    train_loss: float | None
    """Mean training loss over the steps since the validation before; null at step 0."""
    seconds: float
    """Training seconds from the job's start to the checkpoint."""
    exact_match: float | None = None
    """Its share of right validation answers, if checkpoints are ranked by it."""


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file that sftlab wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write objects to a JSONL file, replacing it."""
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
