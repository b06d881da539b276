"""Recognise conversations in the lists and objects of a row, by the names of their keys and columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.dataset.values import SPEAKERS, is_null

TEXTS = {"content", "text", "value", "message", "msg", "parts", "utterance", "body"}
"""Keys that hold the text of a chat turn."""

PEOPLE = {"user", "human", "prompter", "system", "assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"}
"""Speakers that occur in conversations only."""

ASKS = {"user", "human", "input", "prompt", "question", "instruction", "query"}
ANSWERS = {"assistant", "gpt", "bot", "output", "response", "answer", "completion", "reply"}
"""Keys of a turn that holds a question together with its answer."""

TITLES = re.compile(r"(.*_)?(conversations?|messages|data|turns|dialog(ue)?s?|history|chats?)", re.IGNORECASE)
"""Columns and keys under which a list of texts, or of pairs of texts, is a conversation."""

INSTRUCTIONS = {"system", "developer"}
"""Speakers whose turns a template may leave out, since a dataset may set its own system text or none."""


def speakers_of_objects(items: Sequence[Mapping[str, Any]], path: str) -> list[Any] | None:
    """Return the speaker of each turn; None if the list is not a conversation or has a single turn."""
    turns = [{str(key).lower(): value for key, value in item.items()} for item in items]
    if len(turns) < 2 and not is_history(path):
        return None
    for key in SPEAKERS:
        speakers = [turn.get(key) for turn in turns]
        named = [speaker for speaker in speakers if isinstance(speaker, str | int) and not isinstance(speaker, bool)]
        if not named or not all(is_null(speaker) or speaker in named for speaker in speakers):
            continue
        if not any(not TEXTS.isdisjoint(turn) for turn in turns):
            continue
        if key not in ("name", "type") or TITLES.fullmatch(_last_name(path)) or not PEOPLE.isdisjoint(map(str, named)):
            return speakers
    paired = all(not ASKS.isdisjoint(turn) and not ANSWERS.isdisjoint(turn) for turn in turns)
    return [None] * len(turns) if paired else None


def speakers_of_texts(items: Sequence[Any], path: str) -> list[Any] | None:
    """Return an unnamed speaker for each text, or pair of texts, of a conversation; None for any other list."""
    if not items or not TITLES.fullmatch(_last_name(path)):
        return None
    texts = len(items) > 1 and all(isinstance(item, str) for item in items)
    pairs = all(isinstance(item, list | tuple) and len(item) == 2 for item in items) and all(
        isinstance(text, str) or is_null(text) for pair in items for text in pair
    )
    paired = pairs and (len(items) > 1 or is_history(path))
    return [None] * len(items) if texts or paired else None


def columns_of_turns(value: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """Return the key of the texts, and the speakers, if an object stores all turns as two parallel lists."""
    lists = {str(key).lower(): key for key, item in value.items() if type(item) is list and len(item) > 1}
    for speaker in SPEAKERS[:5]:
        for text in TEXTS & lists.keys() if speaker in lists else ():
            speakers, texts = value[lists[speaker]], value[lists[text]]
            if len(speakers) == len(texts) and all(isinstance(item, str) or is_null(item) for item in texts):
                return lists[text], speakers
    return None


def has_numbered_turns(value: Mapping[str, Any]) -> bool:
    """Return whether an object holds objects under numbered keys, as in ``{"turn1": …, "turn2": …}``."""
    keys = {re.sub(r"[0-9]+$", "", str(key)) for key in value if str(key)[-1:].isdecimal()}
    return len(value) > 1 and len(keys) == 1 and all(type(item) is dict for item in value.values())


def is_history(path: str) -> bool:
    """Return whether a path ends in a name such as ``history`` or ``chat_history``."""
    return _last_name(path).lower().endswith("history")


def _last_name(path: str) -> str:
    return re.split(r"\W+", path.rstrip("'\"]"))[-1]
