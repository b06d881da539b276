"""A row's values as templates see them: null writes nothing, and a chat turn notes that it was read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TURNS = {
    "role": {"content", "text", "value", "message", "parts"},
    "from": {"value", "content"},
    "speaker": {"text", "content", "value", "utterance"},
}
"""Keys that name the speaker of a chat turn, and the keys of its text."""

ASKS, ANSWERS = {"user", "human"}, {"assistant", "gpt", "bot"}
"""Keys of a turn that holds a question and its answer."""

INSTRUCTIONS = {"system", "developer"}
"""Speakers whose turns may be left out: the dataset may have a system text of its own, or none."""


class Null(str):
    """A null or NaN: an empty text, falsy, and equal to none only."""

    __slots__ = ()

    def __new__(cls) -> Null:
        """An empty text."""
        return super().__new__(cls, "")

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(None)

    def __repr__(self) -> str:
        return "null"


class Absent(Null):
    """The null that Arrow has where a key is missing that other rows' objects have."""

    __slots__ = ()


NULL, ABSENT = Null(), Absent()


class NotTextError(TypeError):
    """A value that would be written into a text and is not one."""

    def __init__(self, value: Any) -> None:
        super().__init__("is not text")
        self.value = value


class List(list[Any]):
    """A list that is not written as Python writes it."""

    # The names of attributes must not be keys of a row.
    __slots__ = ("_sftlab_path",)

    def __init__(self, items: Iterable[Any], path: str) -> None:
        super().__init__(items)
        self._sftlab_path = path

    def __str__(self) -> str:
        raise NotTextError(self)

    def __format__(self, spec: str) -> str:
        raise NotTextError(self)


class Dict(dict[str, Any]):
    """An object that is not written as Python writes it.

    Loops leave out keys whose value is null; looking such a key up gives null.
    """

    __slots__ = ("_sftlab_path", "_sftlab_raw")

    def __init__(self, items: Mapping[str, Any], path: str, raw: Mapping[str, Any]) -> None:
        super().__init__(items)
        self._sftlab_path = path
        self._sftlab_raw = raw

    def __missing__(self, key: str) -> Null:
        if key not in self._sftlab_raw:
            raise KeyError(key)
        return ABSENT if self._sftlab_raw[key] is ABSENT else NULL

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key. Null, and no key, give the default, which is null where there is none."""
        value = self[key] if key in self or key in self._sftlab_raw else ABSENT
        return (NULL if default is None else default) if value is ABSENT else value

    def __str__(self) -> str:
        raise NotTextError(self)

    def __format__(self, spec: str) -> str:
        raise NotTextError(self)


class Turn(Dict):
    """A turn of a conversation. Reading anything but its speaker sets ``_sftlab_read``."""

    __slots__ = ("_sftlab_read",)

    def __init__(self, items: Mapping[str, Any], path: str, raw: Mapping[str, Any]) -> None:
        super().__init__(items, path, raw)
        self._sftlab_read = False

    def __getitem__(self, key: str) -> Any:
        if key not in TURNS:
            self._sftlab_read = True
        return super().__getitem__(key)

    def items(self) -> Any:
        """All keys with their values."""
        self._sftlab_read = True
        return super().items()

    def values(self) -> Any:
        """All values."""
        self._sftlab_read = True
        return super().values()


@dataclass
class Row:
    """A row for templates: the value of each column, and the conversations among them.

    ``names`` has all that a template may name, once one was rendered.
    """

    values: dict[str, Any]
    conversations: list[List]
    names: dict[str, Any] | None = None

    def unread(self) -> None:
        """Forget which turns were read."""
        for turns in self.conversations:
            for turn in turns:
                turn._sftlab_read = False

    def dropped(self) -> list[tuple[List, list[int], list[int]]]:
        """Conversations of which only some turns were read: their turns, which were read and which were not.

        Instructions that were not read do not count.
        """
        found = []
        for turns in self.conversations:
            read = [number for number, turn in enumerate(turns) if turn._sftlab_read]
            unread = [number for number, turn in enumerate(turns) if not turn._sftlab_read]
            unread = [number for number in unread if _speaker(turns[number]) not in INSTRUCTIONS]
            if read and unread:
                found.append((turns, read, unread))
        return found


def wrap(row: Mapping[str, Any]) -> Row:
    """A row as templates see it."""
    conversations: list[List] = []
    return Row({column: _wrap(value, str(column), conversations) for column, value in row.items()}, conversations)


def plain(value: Any) -> Any:
    """A value as JSON has it, without this module's types. Null and NaN become None."""
    if is_null(value):
        return None
    if isinstance(value, Turn):
        value._sftlab_read = True
    if isinstance(value, Dict):
        raw = {key: item for key, item in value._sftlab_raw.items() if item is not ABSENT}
        return {key: plain(dict.get(value, key)) for key in raw}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not ABSENT}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def is_null(value: Any) -> bool:
    """Whether a value is null or NaN."""
    return value is None or isinstance(value, Null) or (isinstance(value, float) and math.isnan(value))


def path(container: str, key: Any) -> str:
    """The path of an item in a list or an object, as a template writes it."""
    if isinstance(key, str) and key.isidentifier():
        return f"{container}.{key}"
    return f"{container}[{key!r}]"


def listing(names: Iterable[Any], most: int = 10) -> str:
    """The first names of many, and how many more there are."""
    shown = [short(str(name), 40) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most:,} more" if len(shown) > most else "")


def short(text: str, most: int = 60) -> str:
    """A text in one line, without what is beyond so many characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else line[:most] + "…"


def _wrap(value: Any, where: str, conversations: list[List]) -> Any:
    kind = type(value)
    if kind is str or kind is int or value is ABSENT:
        return value
    if is_null(value):
        return NULL
    if kind is dict:
        return _object(value, where, conversations, Dict)
    if kind is list or kind is tuple:
        turn = Turn if _is_conversation(value) else Dict
        items = (
            _object(item, f"{where}[{number}]", conversations, turn)
            if type(item) is dict
            else _wrap(item, f"{where}[{number}]", conversations)
            for number, item in enumerate(value)
        )
        made = List(items, where)
        if turn is Turn:
            conversations.append(made)
        return made
    return value


def _object(value: dict[str, Any], where: str, conversations: list[List], kind: type[Dict]) -> Dict:
    items = {
        key: item if type(item) is str else _wrap(item, path(where, key), conversations)
        for key, item in value.items()
        if not is_null(item)
    }
    return kind(items, where, value)


def _is_conversation(items: Iterable[Any]) -> bool:
    """Whether a list holds the turns of a chat."""
    turns = list(items)
    if len(turns) < 2 or not all(type(turn) is dict for turn in turns):
        return False
    for speaker, texts in TURNS.items():
        if all(isinstance(turn.get(speaker), str) for turn in turns):
            return any(not texts.isdisjoint(turn) for turn in turns)
    return all(not ASKS.isdisjoint(turn) and not ANSWERS.isdisjoint(turn) for turn in turns)


def _speaker(turn: Turn) -> Any:
    return next((value for name in TURNS if isinstance(value := dict.get(turn, name), str)), None)
