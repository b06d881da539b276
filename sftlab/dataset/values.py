"""Values of a row as templates see them: null renders as nothing, and chat turns record whether they were read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPEAKERS = ("role", "from", "speaker", "author", "sender", "turn", "name", "type")
"""Keys that hold the speaker of a chat turn. The last two are also used for other things."""


class Null(str):
    """Null or NaN: renders as an empty text, is false, and equals only ``none``."""

    __slots__ = ()

    def __new__(cls) -> Null:
        """Create an empty text."""
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
    """The null that Arrow stores where an object lacks a key that objects of other rows have."""

    __slots__ = ()


NULL, ABSENT = Null(), Absent()


class NotTextError(TypeError):
    """A template writes a value that is neither text nor a number."""

    def __init__(self, value: Any) -> None:
        super().__init__("is not text")
        self.value = value


class Cell(str):
    """A table cell with JSON: the text of the cell, and the list or object that it encodes."""

    __slots__ = ("value",)

    value: list[Any] | dict[str, object]

    def __new__(cls, text: str, value: list[Any] | dict[str, object]) -> Cell:
        """Create a text with its value."""
        cell = super().__new__(cls, text)
        cell.value = value
        return cell


class List(list[Any]):
    """A list that refuses to be written as Python would write it. One from a table cell keeps the cell's text."""

    # Attributes have a prefix, since Jinja looks up the keys of a row by attribute too.
    __slots__ = ("_sftlab_path", "_sftlab_text")

    def __init__(self, items: Iterable[Any], path: str) -> None:
        super().__init__(items)
        self._sftlab_path = path
        self._sftlab_text: str | None = None

    def __str__(self) -> str:
        raise NotTextError(self)

    def __format__(self, spec: str) -> str:
        raise NotTextError(self)


class Dict(dict[str, object]):
    """An object that refuses to be written as Python would write it. One from a table cell keeps the cell's text.

    Loops skip keys whose value is null; looking up such a key returns null.
    """

    __slots__ = ("_sftlab_path", "_sftlab_raw", "_sftlab_text")

    def __init__(self, items: Mapping[str, object], path: str, raw: Mapping[str, object]) -> None:
        super().__init__(items)
        self._sftlab_path = path
        self._sftlab_raw = raw
        self._sftlab_text: str | None = None

    def __missing__(self, key: str) -> Null:
        if key not in self._sftlab_raw:
            raise KeyError(key)
        return ABSENT if self._sftlab_raw[key] is ABSENT else NULL

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key. A null or missing value gives the default, which is itself null if not set."""
        value = self[key] if key in self or key in self._sftlab_raw else ABSENT
        return (NULL if default is None else default) if value is ABSENT else value

    def __str__(self) -> str:
        raise NotTextError(self)

    def __format__(self, spec: str) -> str:
        raise NotTextError(self)


@dataclass(eq=False)
class Conversation:
    """A list of chat turns: its path, the speaker of each turn, and which turns were read.

    ``history`` marks a conversation that precedes the rest of the row.
    """

    path: str
    speakers: list[Any]
    read: list[bool]
    history: bool

    @classmethod
    def of(cls, path: str, speakers: Sequence[Any], *, history: bool = False) -> Conversation:
        """Create a conversation with no turn read."""
        return cls(path, [*speakers], [False] * len(speakers), history)


class Turn(Dict):
    """A turn of a conversation. Reading any key except its speaker marks it as read."""

    __slots__ = ("_sftlab_conversation", "_sftlab_number")

    def __init__(
        self,
        items: Mapping[str, object],
        path: str,
        raw: Mapping[str, object],
        mark: tuple[Conversation, int] | None = None,
    ) -> None:
        super().__init__(items, path, raw)
        self._sftlab_conversation, self._sftlab_number = mark or (Conversation.of(path, [None]), 0)

    def _sftlab_mark(self, *, read: bool = True) -> None:
        self._sftlab_conversation.read[self._sftlab_number] = read

    def __getitem__(self, key: str) -> Any:
        if str(key).lower() not in SPEAKERS:
            self._sftlab_mark()
        return super().__getitem__(key)

    def items(self) -> Any:
        """Return all keys with their values."""
        self._sftlab_mark()
        return super().items()

    def values(self) -> Any:
        """Return all values."""
        self._sftlab_mark()
        return super().values()


class Texts(List):
    """A list whose items belong to turns of a conversation. Reading an item marks its turn as read."""

    __slots__ = ("_sftlab_marks",)

    def __init__(self, items: Iterable[Any], path: str, marks: Sequence[tuple[Conversation, int] | None]) -> None:
        super().__init__(items, path)
        self._sftlab_marks = marks

    def _sftlab_read(self, number: int) -> Any:
        if mark := self._sftlab_marks[number]:
            mark[0].read[mark[1]] = True
        return super().__getitem__(number)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return Texts(super().__getitem__(key), self._sftlab_path, self._sftlab_marks[key])
        return self._sftlab_read(key)

    def __iter__(self) -> Iterator[Any]:
        return map(self._sftlab_read, range(len(self)))

    def __reversed__(self) -> Iterator[Any]:
        return map(self._sftlab_read, reversed(range(len(self))))

    def __add__(self, other: Any) -> Any:
        return [*self, *other]


def plain(value: Any) -> Any:
    """Convert a value to plain JSON types. Null and NaN become None; a turn is marked as read."""
    if is_null(value):
        return None
    if isinstance(value, Turn):
        value._sftlab_mark()
    if isinstance(value, Dict):
        raw = {key: item for key, item in value._sftlab_raw.items() if item is not ABSENT}
        return {key: plain(dict.get(value, key)) for key in raw}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not ABSENT}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def is_null(value: object) -> bool:
    """Return whether a value is null or NaN."""
    return value is None or isinstance(value, Null) or (isinstance(value, float) and math.isnan(value))


def strings_in(value: object) -> Iterator[str]:
    """Yield the texts within a value of lists and objects, but not the names of keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)
