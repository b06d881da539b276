"""Prepare turns with tool calls for a chat template, and find out whether the template writes calls and tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from sftlab.errors import ConfigError, Problem
from sftlab.records import Message, Tool, ToolCall, text_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_KEYS = ("model.chat_template", "dataset")

# What stands in a probe in place of a call and of a tool. Some templates require an id of nine letters and digits.
NAME, VALUE = "probe_name", "probevalue"
PROBE_CALL: ToolCall = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": NAME, "arguments": {"key": VALUE}},
}
PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": VALUE,
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "A key."}},
            "required": ["key"],
        },
    },
}


class CallForm(NamedTuple):
    """The form in which a template takes calls: without text as "" or null, arguments as an object or as JSON text."""

    empty: str | None
    as_text: bool


FORMS = [CallForm(empty, as_text) for as_text in (False, True) for empty in ("", None)]


@cache
def call_form(tokenizer: PreTrainedTokenizerBase) -> CallForm | None:
    """Return the form in which the chat template writes the calls of an assistant turn; None if it writes none."""
    question: Message = {"role": "user", "content": "q"}
    for form in FORMS:
        turns = [question, formed({"role": "assistant", "tool_calls": [PROBE_CALL]}, form)]
        if all(part in _written(tokenizer, turns, None) for part in (NAME, VALUE)):
            return form
    return None


@cache
def writes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template writes the tools that it is given."""
    question: list[Message] = [{"role": "user", "content": "q"}]
    instruction: list[Message] = [{"role": "system", "content": "s"}]
    return any(NAME in _written(tokenizer, turns, [PROBE_TOOL]) for turns in (question, instruction + question))


def _written(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: list[Tool] | None) -> str:
    """Render a probe; "" if the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False))
    except Exception:  # a template is code of the model's author, and may raise anything
        return ""


def formed(turn: Message, form: CallForm) -> Message:
    """Return an assistant turn with its calls in a form. The arguments of the calls are objects."""
    calls: list[ToolCall] = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        if form.as_text
        else call
        for call in turn["tool_calls"]
    ]
    return {**turn, "content": text_of_turn(turn) or form.empty, "tool_calls": calls}


def prepared(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Tool] | None, row: str
) -> list[Message]:
    """Return turns as the chat template takes them: no empty fields, and calls with their arguments as objects.

    Raises:
        ConfigError: arguments are not a JSON object, or the template writes no calls or no tools.
    """
    turns = [_without_empty_fields(turn) for turn in messages]
    if tools and not writes_tools(tokenizer):
        raise _unwritten(tokenizer, row, "the tools of the conversation")
    if not any("tool_calls" in turn for turn in turns):
        return turns
    form = call_form(tokenizer)
    if form is None:
        raise _unwritten(tokenizer, row, "the tool calls of an assistant turn")
    return [
        formed({**turn, "tool_calls": [_with_object(call, row) for call in turn["tool_calls"]]}, form)
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]


def _without_empty_fields(turn: Message) -> Message:
    """Remove fields that are null or empty, which some templates take for present; ``content`` is always there."""
    if turn.keys() == {"role", "content"} and turn["content"] is not None:
        return turn
    message: Message = {**turn, "content": text_of_turn(turn)}
    if not turn.get("tool_calls"):
        message.pop("tool_calls", None)
    if not turn.get("reasoning_content"):
        message.pop("reasoning_content", None)
    if turn.get("name") is None:
        message.pop("name", None)
    if turn.get("tool_call_id") is None:
        message.pop("tool_call_id", None)
    return message


def _with_object(call: ToolCall, row: str) -> ToolCall:
    """Return a call with its arguments as an object."""
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ConfigError(
            Problem(
                row,
                None,
                f"the arguments of the tool call {function['name']!r} are not a JSON object: {str(arguments)[:60]!r}",
                "fix the row, or leave it out by dataset.keep",
                ("dataset",),
            )
        )
    given: ToolCall = {"function": {**function, "arguments": arguments}}
    if call.get("id") is not None:
        given["id"] = call["id"]
    if call.get("type") is not None:
        given["type"] = call["type"]
    return given


def unwritten_names(turn: Message, text: str) -> list[str]:
    """Return the names of a turn's calls that a rendered text does not contain."""
    return [name for call in turn.get("tool_calls", []) if (name := call["function"]["name"]) not in text]


def _unwritten(tokenizer: PreTrainedTokenizerBase, row: str, what: str) -> ConfigError:
    return ConfigError(
        Problem(
            row,
            None,
            f"the chat template of {tokenizer.name_or_path} does not write {what}",
            "set model.chat_template to a Jinja file that does",
            TEMPLATE_KEYS,
        )
    )
