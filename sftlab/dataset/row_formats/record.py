"""What recognition finds, and the conversation that a row is converted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NotRequired, Required, TypedDict

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ToolFunction(TypedDict):
    """The function that a tool call names."""

    name: str
    arguments: NotRequired[dict[str, object] | str]


class ToolCall(TypedDict, total=False):
    """A call of a tool in an assistant turn."""

    id: str
    type: str
    function: Required[ToolFunction]


class Message(TypedDict, total=False):
    """A turn of a conversation, in the field names of Hugging Face's chat templates.

    ``content`` is text, and null or missing where an assistant turn only calls tools.
    """

    role: Required[Role]
    content: str | None
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str
    reasoning_content: str


Tool = dict[str, object]
"""The JSON schema of a function that the model may call."""

FormatName = Literal["chat", "sharegpt", "alpaca", "prompt_completion", "question_answer", "multiple_choice"]
Task = Literal["choice", "exact", "rouge"]

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
