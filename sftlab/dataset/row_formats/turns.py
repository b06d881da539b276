"""Read the turns of a conversation: find how a value stores them, and convert each to a message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from sftlab.dataset.conversations import ANSWERS, ASKS, TITLES
from sftlab.dataset.row_formats.cells import leave_out, opened, refused, written
from sftlab.dataset.row_formats.record import Layout
from sftlab.dataset.row_formats.tools import calls_in
from sftlab.dataset.values import Cell
from sftlab.dataset.wording import item_path, listing, short
from sftlab.records import Message, Role

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_response", "function-response", "tool_response", "ipython"),
        "tool",
    ),
}
"""Names of speakers, in lower case."""

CALLS = {"function_call", "function-call", "tool_call"}
"""Speakers whose text is a tool call of the assistant."""

SPEAKERS = ("role", "from", "speaker", "author", "sender")
CONTENTS = ("content", "value", "text", "message", "parts")
CARRIERS = {*CONTENTS, "tool_calls", "function_call"}
"""Keys of which a turn has at least one."""

TEXT_PARTS = {"text", "input_text", "output_text", "refusal"}
REASONING = ("reasoning_content", "reasoning", "thinking")


def layout_of(value: object, column: str) -> Layout | None:
    """Return how an opened value stores a conversation; None if it is not one."""
    if isinstance(value, dict):
        lists = [value[key] for key in (*SPEAKERS, *CONTENTS) if isinstance(value.get(key), list)]
        return "parallel" if len(lists) == 2 and len(lists[0]) == len(lists[1]) > 0 else None
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, dict) for item in value):
        if all(_speaker_key(item) for item in value):
            return "turns" if any(_speaker(item) in {*ROLES, *CALLS} for item in value) else None
        return "pairs" if all(_paired(item) for item in value) else None
    if not TITLES.fullmatch(column):
        return None
    if all(isinstance(item, str) for item in value):
        return "texts" if len(value) > 1 else None
    return "pairs" if all(isinstance(item, list) and len(item) == 2 for item in value) else None


def is_sharegpt(value: object) -> bool:
    """Return whether the speakers of a conversation are named by ``from``."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first and "role" not in first


def messages_in(value: object, layout: Layout, path: str, section: str) -> list[Message]:
    """Convert the conversation in a cell to messages.

    Raises:
        ConfigError: the value has another layout, or a turn that cannot be trained on.
    """
    value = opened(value)
    if value is None or value == []:
        raise refused(f"{path} is {'null' if value is None else 'empty'}", leave_out(section, path), f"{section}.keep")
    if layout_of(value, path) != layout and not (layout == "texts" and isinstance(value, list)):
        raise refused(
            f"{path} is not a conversation as in the other rows: {short(repr(value))}", leave_out(section, path)
        )
    messages = [_message(turn, at, section) for at, turn in _turns(value, layout, path)]
    return [message for message in messages if message["role"] != "system" or (message.get("content") or "").strip()]


def check(messages: Sequence[Message], path: str, section: str, remedy: str = "fix the row") -> None:
    """Check that a conversation can be trained on: it has a question, and ends with an answer.

    Raises:
        ConfigError: it has no user turn, or another last turn.
    """
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        after = f"ends with a {roles[-1]} turn" if roles else "has no turns"
        raise refused(f"{path} {after}, so it has no answer to train on", remedy, f"{section}.keep")
    if "user" not in roles:
        raise refused(f"{path} has no user turn, only {listing(roles)}", "fix the row", f"{section}.keep")


def ends_with_answer(value: object, layout: Layout) -> bool:
    """Return whether the last turn of a conversation is the assistant's."""
    speakers = [_speaker(turn) for _, turn in _turns(value, layout, "")]
    return bool(speakers) and (ROLES.get(speakers[-1]) == "assistant" or speakers[-1] in CALLS)


def remedy(value: object, path: str, section: str) -> str:
    """Return how to leave out conversations that do not end with an answer."""
    if isinstance(value, Cell):
        value = value.value
    if not isinstance(value, list) or not all(isinstance(item, dict) and _speaker_key(item) for item in value):
        return "fix the row"
    key = next((key for turn in value if (key := _speaker_key(turn))), "role")
    names = [str(turn[key]) for turn in value if ROLES.get(_speaker(turn)) == "assistant"] or ["assistant"]
    return leave_out(section, f'{path}[-1]["{key}"] == "{names[-1]}"')


def _turns(value: object, layout: Layout, path: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the path and the object of each turn."""
    if layout == "parallel" and isinstance(value, dict):
        speaker = next(key for key in SPEAKERS if isinstance(value.get(key), list))
        content = next(key for key in CONTENTS if isinstance(value.get(key), list))
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        for number in range(len(lists[speaker])):
            turn = {key: item[number] for key, item in lists.items() if number < len(item)}
            yield f"{path}.{content}[{number}]", turn
    elif isinstance(value, list):
        for number, item in enumerate(value):
            at = item_path(path, number)
            if layout == "texts":
                yield at, {"role": ("user", "assistant")[number % 2], "content": item}
            elif layout == "pairs":
                yield from _pair(item, at)
            else:
                yield at, item


def _pair(item: object, path: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    if isinstance(item, dict):
        keys = {str(key).lower(): key for key in item}
        parts = [next(keys[name] for name in keys if name in names) for names in (ASKS, ANSWERS)]
    else:
        parts = [0, 1]
    values = [cast("dict[object, object]", item)[part] for part in parts]
    for role, part, content in zip(("user", "assistant"), parts, values, strict=True):
        yield item_path(path, part), {"role": role, "content": content}


def _message(turn: Mapping[str, object], path: str, section: str) -> Message:
    name = _speaker(turn)
    if name not in ROLES and name not in CALLS:
        known = "system, developer, user (human), assistant (gpt), tool, function_call and observation"
        remedy = f"rename it to one of {known}, or write templates ({section}.format=template)"
        raise refused(f"{path} has the speaker {short(name)!r}", remedy, f"{section}.format")
    role: Role = ROLES.get(name, "assistant")
    key = next((key for key in CONTENTS if key in turn), "content")
    place = item_path(path, key) if key in turn else path
    if name in CALLS:
        return {"role": "assistant", "content": None, "tool_calls": calls_in(turn.get(key), place)}
    text, thoughts = _content(turn.get(key), place, role)
    if text is None and isinstance(refusal := turn.get("refusal"), str):
        text = refusal
    message: Message = {"role": role, "content": text}
    calls = [
        call
        for key in ("tool_calls", "function_call")
        if turn.get(key) is not None
        for call in calls_in(turn[key], item_path(path, key))
    ]
    if calls:
        message["tool_calls"] = calls
    if role == "assistant":
        reasoning = next((str(turn[key]) for key in REASONING if isinstance(turn.get(key), str)), thoughts)
        if reasoning and reasoning.strip():
            message["reasoning_content"] = reasoning
    if role == "tool":
        message["content"] = text or ""
        for name in ("tool_call_id", "name"):
            if isinstance(item := turn.get(name), str):
                message[name] = item  # type: ignore[literal-required]
    elif not (text or "").strip() and not calls and role != "system":
        state = "null" if text is None else "empty"
        raise refused(f"{place} is {state}", f"fix the row, or leave it out by {section}.keep", f"{section}.keep")
    if turn.get("weight") == 0 and role == "assistant":
        remedy = "delete the key if the turn is to be trained on; dataset.train_on=last trains on the last turn only"
        raise refused(f"{path} has the weight 0, and single turns cannot be excluded from training", remedy)
    return message


def _content(value: object, path: str, role: Role) -> tuple[str | None, str | None]:
    """Return the text of a turn, and its reasoning if it is a part of the content."""
    if value is None or isinstance(value, str):
        return value, None
    if isinstance(value, list) and all(isinstance(part, str | dict) for part in value):
        texts: list[str] = []
        thoughts: list[str] = []
        for number, part in enumerate(value):
            if isinstance(part, str):
                texts.append(part)
                continue
            kind = str(part.get("type") or "text")
            at = item_path(path, number)
            content = part.get("thinking" if kind == "thinking" else "refusal" if kind == "refusal" else "text")
            if kind not in TEXT_PARTS | {"thinking"}:
                if role == "tool":
                    return json.dumps(value, ensure_ascii=False), None
                raise refused(
                    f"{at} is a part of type {kind!r}; only text can be trained on", "remove such parts or rows"
                )
            if not isinstance(content, str):
                raise refused(f"{at} has no text: {short(repr(part))}", "fix the row")
            (thoughts if kind == "thinking" else texts).append(content)
        return "".join(texts), "".join(thoughts) or None
    if role == "tool":  # the result of a tool as an object
        return json.dumps(value, ensure_ascii=False), None
    text = written(value)
    if text is None:
        raise refused(f"{path} is {short(repr(value))}, not text", "write it as text")
    return text, None


def _speaker_key(turn: Mapping[str, object]) -> str | None:
    """Return the key of a turn's speaker; None if the object has no speaker, or neither text nor tool calls."""
    for key in SPEAKERS:
        if isinstance(turn.get(key), str):
            return None if CARRIERS.isdisjoint(turn) else key
    return None


def _speaker(turn: Mapping[str, object]) -> str:
    for key in SPEAKERS:
        if isinstance(name := turn.get(key), str):
            return name.strip().lower()
    return ""


def _paired(item: Mapping[str, object]) -> bool:
    keys = {str(key).lower() for key in item}
    return not ASKS.isdisjoint(keys) and not ANSWERS.isdisjoint(keys)
