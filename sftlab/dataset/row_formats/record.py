"""What recognition finds, and the conversation that a row is converted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sftlab.config import Task
from sftlab.records import Message, Tool

FormatName = Literal["chat", "sharegpt", "alpaca", "prompt_completion", "question_answer", "multiple_choice"]

Layout = Literal["turns", "parallel", "pairs", "texts"]
"""How a column stores a conversation: objects with a speaker, an object of parallel lists, pairs of question and
answer, or texts that alternate between user and assistant."""

AnswerKind = Literal["label", "text", "index0", "index1", "correct", "stated"]
"""What names the right option: its label, text or index from 0 or 1, a column that has the right option only, or the
last turn of a conversation, which states its letter."""


@dataclass(frozen=True)
class Converted:
    """A row as a conversation that ends with the assistant's turn; ``targets`` are the right answers.

    ``choices`` has the letters of the options, and is empty if the row is not multiple choice; ``options`` maps each
    letter to its text.
    """

    messages: list[Message]
    tools: list[Tool] | None
    targets: list[str]
    choices: str = ""
    options: dict[str, str] | None = None


def with_system(row: Converted, system: str | None) -> Converted:
    """Replace the system text of a conversation: None leaves it, and an empty text removes it."""
    if system is None:
        return row
    rest = row.messages[1:] if row.messages[0]["role"] in ("system", "developer") else row.messages
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return replace(row, messages=[*first, *rest])


@dataclass(frozen=True)
class Settings:
    """What the configuration says about the format.

    Attributes:
        section: the section of the keys, "dataset" or "eval.dataset".
        format: the format, or ``auto``.
        columns: the column of a role whose column is not found by its name; null for none.
        answer_kind: what names the right option, or ``auto``.
    """

    section: str = "dataset"
    format: FormatName | Literal["auto"] = "auto"
    columns: Mapping[str, str | None] | None = None
    answer_kind: Literal["auto", "label", "text", "index0", "index1"] = "auto"


@dataclass(frozen=True)
class Recognised:
    """The format of the rows of a source.

    Attributes:
        format: its name.
        columns: the column of each role.
        layout: how the column of the conversations stores them.
        option_columns: the columns of the options, if each has its own.
        answer: what names the right option.
        words: the options of all rows, if answers are words such as yes and no.
        task: the ``eval.task`` that fits.
        extract: the ``eval.extract`` that fits, if the compared text is a part of the answer.
        facts: sentences for the log.
    """

    format: FormatName
    columns: Mapping[str, str]
    layout: Layout | None = None
    option_columns: tuple[str, ...] = ()
    answer: AnswerKind | None = None
    words: tuple[str, ...] = ()
    task: Task = "rouge"
    extract: str | None = None
    facts: tuple[str, ...] = ()
