"""What passes between the stages: small frozen records, each one line of a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, Required, Self, TypedDict

IGNORED = -100  # label of a token without a loss


Role = Literal["system", "developer", "user", "assistant", "tool"]


class ToolFunction(TypedDict):
    """The function that a tool call names. ``arguments`` is an object, or its JSON text."""

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


def text_of_turn(message: Message) -> str:
    """Return the text of a turn; "" if it has none."""
    return message.get("content") or ""


def single_turn(system: str, user: str, assistant: str) -> list[Message]:
    """Return a conversation of one question and its answer. An empty system text gives no system turn."""
    instruction: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*instruction, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


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
    """One row of a dataset: a conversation whose last turn, the assistant's, is what a model should answer.

    The text of that turn is empty in a test set without answers. ``tools`` are those that the model may call.
    ``choices`` has the option letters that ``target`` may be ("ABCD"), and is empty for a task that is not multiple
    choice; ``options`` maps each letter to the option's text if the dataset has it. ``group`` names the source that
    rows share, or is None. ``subgroup`` is a test row's value in the column eval.group_by, or None. ``targets`` lists
    every right answer if there are several, ``target`` among them, else it is None. ``source`` is the name of the
    row's source in dataset.sources, or None. ``context`` is what only the scorer sees (dataset.context), or None.
    """

    id: str
    messages: list[Message]
    target: str
    choices: str = ""
    group: str | None = None
    options: dict[str, str] | None = None
    subgroup: str | None = None
    targets: list[str] | None = None
    tools: list[Tool] | None = None
    source: str | None = None
    context: str | None = None

    @property
    def accepted(self) -> list[str]:
        """Every right answer, ``target`` first."""
        return self.targets or [self.target]

    @property
    def prompt(self) -> list[Message]:
        """The turns before the last one: what a model is asked."""
        return self.messages[:-1]

    @property
    def assistant(self) -> str:
        """The text of the last turn."""
        return text_of_turn(self.messages[-1])

    @property
    def question(self) -> str:
        """The text by which questions are compared: all user turns, or the whole prompt if it has none.

        Instructions and earlier answers are left out, so that a question is found under another system prompt.
        """
        asked = [turn for turn in self.prompt if turn["role"] == "user"]
        return "\n\n".join(map(text_of_turn, asked or self.prompt))


@dataclass(frozen=True)
class Generation(Record):
    """An engine's completion of one prompt. ``finish_reason`` is "stop", "length" (truncated) or "unknown".

    ``forced`` is the letter of the forced choice if no answer was extracted; None if there was an answer, or no
    choice was forced. ``forced_logprobs`` has the log-probability of each letter in that choice, and ``logprobs`` those
    directly after the question (eval.logprobs), in nats. ``prompt_tokens`` is the length of the prompt as an endpoint
    counts it.
    """

    id: str
    prompt: str
    completion: str
    finish_reason: str
    tokens: int
    forced: str | None = None
    forced_logprobs: dict[str, float] | None = None
    logprobs: dict[str, float] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Prediction(Record):
    """A generation with its extracted answer; ``answer`` is None if no answer was extracted.

    ``readings`` has the answer by each way of reading (strict, last, lenient, forced); ``answer`` is that of
    eval.reading. An answer contains no reasoning, which is in ``completion`` only. ``score`` is between 0 and 1, and
    None if answers are right or wrong. ``subgroup``, ``targets`` and ``choices`` are those of the example.
    ``forced_logprobs`` and ``logprobs`` are those of the generation. ``context`` is that of the example, and ``note``
    what the task found out about the answer, such as the error of its execution.
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
    choices: str = ""
    forced_logprobs: dict[str, float] | None = None
    logprobs: dict[str, float] | None = None
    context: str | None = None
    note: str | None = None

    @property
    def accepted(self) -> list[str]:
        """Every right answer, ``target`` first."""
        return self.targets or [self.target]

    @classmethod
    def write(cls, path: Path, records: Iterable[Self]) -> None:
        """Write predictions to a JSONL file, replacing it. Optional fields without a value are left out."""
        rows = [asdict(record) for record in records]
        for row in rows:
            for name in ("score", "subgroup", "targets", "choices", "forced_logprobs", "logprobs", "context", "note"):
                if not row[name] and row[name] != 0:
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
    score: float | None = None
    """Its mean score on the validation rows, if checkpoints are ranked by it."""
    average_of: tuple[str, ...] = ()
    """Folders of the checkpoints that it is the average of (select.average); empty for a checkpoint of a training."""


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
