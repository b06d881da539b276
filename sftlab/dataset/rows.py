"""A row's values as templates see them: null writes nothing, and a chat turn notes that it was read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPEAKERS = ("role", "from", "speaker", "author", "sender", "turn", "name", "type")
"""Keys that name the speaker of a chat turn. The last two name other things too."""

TEXTS = {"content", "text", "value", "message", "msg", "parts", "utterance", "body"}
"""Keys of a chat turn's text."""

PEOPLE = {"user", "human", "prompter", "system", "assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"}
"""Speakers that only a chat has."""

ASKS = {"user", "human", "input", "prompt", "question", "instruction", "query"}
ANSWERS = {"assistant", "gpt", "bot", "output", "response", "answer", "completion", "reply"}
"""Keys of a turn that holds a question and its answer."""

TALKS = re.compile(r"(.*_)?(conversations?|messages|data|turns|dialog(ue)?s?|history|chats?)", re.IGNORECASE)
"""Columns and keys of which a list of texts, or of pairs of texts, is a conversation."""

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


class Cell(str):
    """The JSON text of a list or an object in a table's cell, and its value."""

    __slots__ = ("value",)

    value: list[Any] | dict[str, Any]

    def __new__(cls, text: str, value: list[Any] | dict[str, Any]) -> Cell:
        """A text with its value."""
        cell = super().__new__(cls, text)
        cell.value = value
        return cell


class List(list[Any]):
    """A list that is not written as Python writes it. One from a table's cell has the text of the cell."""

    # The names of attributes must not be keys of a row.
    __slots__ = ("_sftlab_path", "_sftlab_text")

    def __init__(self, items: Iterable[Any], path: str) -> None:
        super().__init__(items)
        self._sftlab_path = path
        self._sftlab_text: str | None = None

    def __str__(self) -> str:
        raise NotTextError(self)

    def __format__(self, spec: str) -> str:
        raise NotTextError(self)


class Dict(dict[str, Any]):
    """An object that is not written as Python writes it. One from a table's cell has the text of the cell.

    Loops leave out keys whose value is null; looking such a key up gives null.
    """

    __slots__ = ("_sftlab_path", "_sftlab_raw", "_sftlab_text")

    def __init__(self, items: Mapping[str, Any], path: str, raw: Mapping[str, Any]) -> None:
        super().__init__(items)
        self._sftlab_path = path
        self._sftlab_raw = raw
        self._sftlab_text: str | None = None

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


@dataclass(eq=False)
class Talk:
    """A conversation: the path of its list, who speaks in each turn, and which turns were read.

    ``history`` is one that comes before the rest of the row.
    """

    path: str
    speakers: list[Any]
    read: list[bool]
    history: bool

    @classmethod
    def of(cls, path: str, speakers: Sequence[Any], *, history: bool = False) -> Talk:
        """A conversation of which nothing was read."""
        return cls(path, [*speakers], [False] * len(speakers), history)


class Turn(Dict):
    """A turn of a conversation. Reading anything but its speaker marks it as read."""

    __slots__ = ("_sftlab_number", "_sftlab_talk")

    def __init__(
        self, items: Mapping[str, Any], path: str, raw: Mapping[str, Any], mark: tuple[Talk, int] | None = None
    ) -> None:
        super().__init__(items, path, raw)
        self._sftlab_talk, self._sftlab_number = mark or (Talk.of(path, [None]), 0)

    def _sftlab_mark(self, *, read: bool = True) -> None:
        self._sftlab_talk.read[self._sftlab_number] = read

    def __getitem__(self, key: str) -> Any:
        if str(key).lower() not in SPEAKERS:
            self._sftlab_mark()
        return super().__getitem__(key)

    def items(self) -> Any:
        """All keys with their values."""
        self._sftlab_mark()
        return super().items()

    def values(self) -> Any:
        """All values."""
        self._sftlab_mark()
        return super().values()


class Texts(List):
    """A list of which each item belongs to a turn of a conversation. Reading an item marks the turn as read."""

    __slots__ = ("_sftlab_marks",)

    def __init__(self, items: Iterable[Any], path: str, marks: Sequence[tuple[Talk, int] | None]) -> None:
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


@dataclass
class Row:
    """A row for templates: the value of each column, and the conversations among them.

    ``names`` has all that a template may name, once one was rendered.
    """

    values: dict[str, Any]
    conversations: list[Talk]
    names: dict[str, Any] | None = None

    def unread(self) -> None:
        """Forget which turns were read."""
        for talk in self.conversations:
            talk.read[:] = [False] * len(talk.read)

    def dropped(self) -> list[tuple[Talk, list[int], list[int]]]:
        """Conversations of which only some turns were read: which were, and which were not.

        Instructions that were not read do not count. Of a history, all turns may be unread.
        """
        found = []
        for talk in self.conversations:
            read = [number for number, done in enumerate(talk.read) if done]
            unread = [number for number, done in enumerate(talk.read) if not done]
            unread = [number for number in unread if talk.speakers[number] not in INSTRUCTIONS]
            if unread and (read or talk.history):
                found.append((talk, read, unread))
        return found


def wrap(row: Mapping[str, Any]) -> Row:
    """A row as templates see it."""
    conversations: list[Talk] = []
    values = {column: _wrap(value, column_path(str(column)), conversations) for column, value in row.items()}
    return Row(values, conversations)


def plain(value: Any) -> Any:
    """A value as JSON has it, without this module's types. Null and NaN become None."""
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


def is_null(value: Any) -> bool:
    """Whether a value is null or NaN."""
    return value is None or isinstance(value, Null) or (isinstance(value, float) and math.isnan(value))


def path(container: str, key: Any) -> str:
    """The path of an item in a list or an object, as a template writes it."""
    if isinstance(key, str) and key.isidentifier():
        return f"{container}.{key}"
    return f"{container}[{key!r}]"


def column_path(column: str) -> str:
    """A column as a template writes it."""
    return column if column.isidentifier() else path("row", column)


def listing(names: Iterable[Any], most: int = 10) -> str:
    """The first names of many, and how many more there are."""
    shown = [short(str(name), 40) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most:,} more" if len(shown) > most else "")


def short(text: str, most: int = 60) -> str:
    """A text in one line, without what is beyond so many characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else line[:most] + "…"


def _wrap(value: Any, where: str, conversations: list[Talk]) -> Any:
    kind = type(value)
    if kind is str or kind is int or value is ABSENT:
        return value
    if is_null(value):
        return NULL
    if kind is Cell:
        found = _wrap(value.value, where, conversations)
        found._sftlab_text = str(value)
        return found
    if kind is dict:
        return _object(value, where, conversations)
    if kind is list or kind is tuple:
        return _list(value, where, conversations)
    return value


def _list(value: Sequence[Any], where: str, conversations: list[Talk], speakers: list[Any] | None = None) -> List:
    """A list; with ``speakers`` it has the texts of a conversation."""
    objects = bool(value) and all(type(item) is dict for item in value)
    if speakers is None:
        speakers = _speakers(value, where) if objects else _nobody(value, where)
    if speakers is None:
        return List((_wrap(item, path(where, n), conversations) for n, item in enumerate(value)), where)
    # A list of texts may be a patient's history.
    talk = Talk.of(where, speakers, history=_is_history(where) and not any(isinstance(item, str) for item in value))
    conversations.append(talk)
    marks = [(talk, number) for number in range(len(value))]
    if objects:
        return List(
            (_object(item, path(where, mark[1]), conversations, mark) for item, mark in zip(value, marks, strict=True)),
            where,
        )
    return Texts((_wrap(item, path(where, n), conversations) for n, item in enumerate(value)), where, marks)


def _object(value: dict[str, Any], where: str, conversations: list[Talk], mark: tuple[Talk, int] | None = None) -> Dict:
    if mark is None and _is_numbered(value) and (speakers := _speakers([*value.values()], where)) is not None:
        talk = Talk.of(where, speakers)
        conversations.append(talk)
        turns = {
            key: _object(item, path(where, key), conversations, (talk, number))
            for number, (key, item) in enumerate(value.items())
        }
        return Dict(turns, where, value)
    names = _columns(value) if mark is None else None
    items = {
        key: item
        if type(item) is str
        else _list(item, path(where, key), conversations, names[1])
        if names and key == names[0]
        else _wrap(item, path(where, key), conversations)
        for key, item in value.items()
        if not is_null(item)
    }
    return Dict(items, where, value) if mark is None else Turn(items, where, value, mark)


def _is_numbered(value: dict[str, Any]) -> bool:
    """Whether an object has objects under numbered keys, as in {"turn1": …, "turn2": …}."""
    keys = {re.sub(r"[0-9]+$", "", str(key)) for key in value if str(key)[-1:].isdecimal()}
    return len(value) > 1 and len(keys) == 1 and all(type(item) is dict for item in value.values())


def _speakers(items: Sequence[dict[str, Any]], where: str) -> list[Any] | None:
    """Return the speaker of each turn; None for a list that is not a conversation or has a single turn."""
    turns = [{str(key).lower(): value for key, value in item.items()} for item in items]
    if len(turns) < 2 and not _is_history(where):
        return None
    for key in SPEAKERS:
        speakers = [turn.get(key) for turn in turns]
        named = [speaker for speaker in speakers if isinstance(speaker, str | int) and not isinstance(speaker, bool)]
        if not named or not all(is_null(speaker) or speaker in named for speaker in speakers):
            continue
        if not any(not TEXTS.isdisjoint(turn) for turn in turns):
            continue
        if key not in ("name", "type") or TALKS.fullmatch(_name(where)) or not PEOPLE.isdisjoint(map(str, named)):
            return speakers
    paired = all(not ASKS.isdisjoint(turn) and not ANSWERS.isdisjoint(turn) for turn in turns)
    return [None] * len(turns) if paired else None


def _nobody(items: Sequence[Any], where: str) -> list[Any] | None:
    """A speaker without a name for each text, or pair of texts, of a conversation; None for any other list."""
    if not items or not TALKS.fullmatch(_name(where)):
        return None
    texts = len(items) > 1 and all(isinstance(item, str) for item in items)
    pairs = all(isinstance(item, list | tuple) and len(item) == 2 for item in items) and all(
        isinstance(text, str) or is_null(text) for pair in items for text in pair
    )
    paired = pairs and (len(items) > 1 or _is_history(where))
    return [None] * len(items) if texts or paired else None


def _columns(value: dict[str, Any]) -> tuple[str, list[Any]] | None:
    """The key of the texts and the speakers, where an object has a list of each for all turns."""
    lists = {str(key).lower(): key for key, item in value.items() if type(item) is list and len(item) > 1}
    for speaker in SPEAKERS[:5]:
        for text in TEXTS & lists.keys() if speaker in lists else ():
            speakers, texts = value[lists[speaker]], value[lists[text]]
            if len(speakers) == len(texts) and all(isinstance(item, str) or is_null(item) for item in texts):
                return lists[text], speakers
    return None


def _is_history(where: str) -> bool:
    return _name(where).lower().endswith("history")


def _name(where: str) -> str:
    """The last name of a path."""
    return re.split(r"\W+", where.rstrip("'\"]"))[-1]
