"""Rows as files hold them, and as templates see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sftlab.dataset.conversations import (
    INSTRUCTIONS,
    columns_of_turns,
    has_numbered_turns,
    is_history,
    speakers_of_objects,
    speakers_of_texts,
)
from sftlab.dataset.values import ABSENT, NULL, Cell, Conversation, Dict, List, Texts, Turn, is_null
from sftlab.dataset.wording import column_path, item_path
from sftlab.errors import Problem

Row = Mapping[str, object]
"""A row as it was read: column → value."""

Rows = Sequence[Row | None]
"""Rows in the order of their source; None stands for a row that cannot be read."""


class Table(NamedTuple):
    """The rows of a file, and a problem for each row that cannot be read."""

    rows: Rows
    problems: list[Problem]


@dataclass
class TemplateRow:
    """A row prepared for templates: the value of each column, and the conversations among them.

    ``raw`` is the row as it was read. ``names`` caches everything that a template of this row may name.
    """

    values: dict[str, object]
    conversations: list[Conversation]
    raw: Row
    names: dict[str, object] | None = None

    def unread(self) -> None:
        """Mark all turns of all conversations as not read."""
        for conversation in self.conversations:
            conversation.read[:] = [False] * len(conversation.read)

    def dropped(self) -> list[tuple[Conversation, list[int], list[int]]]:
        """Return each conversation of which only some turns were read, with the read and the unread turn numbers.

        Unread instructions do not count. A history counts even if none of its turns was read.
        """
        partly = []
        for conversation in self.conversations:
            read = [number for number, done in enumerate(conversation.read) if done]
            unread = [number for number, done in enumerate(conversation.read) if not done]
            unread = [number for number in unread if conversation.speakers[number] not in INSTRUCTIONS]
            if unread and (read or conversation.history):
                partly.append((conversation, read, unread))
        return partly


def wrap(row: Row) -> TemplateRow:
    """Prepare a row for templates."""
    conversations: list[Conversation] = []
    values = {column: _wrap(value, column_path(str(column)), conversations) for column, value in row.items()}
    return TemplateRow(values, conversations, row)


def _wrap(value: Any, path: str, conversations: list[Conversation]) -> Any:
    kind = type(value)
    if kind is str or kind is int or value is ABSENT:
        return value
    if is_null(value):
        return NULL
    if kind is Cell:
        wrapped = _wrap(value.value, path, conversations)
        wrapped._sftlab_text = str(value)
        return wrapped
    if kind is dict:
        return _object(value, path, conversations)
    if kind is list or kind is tuple:
        return _list(value, path, conversations)
    return value


def _list(
    value: Sequence[Any], path: str, conversations: list[Conversation], speakers: list[Any] | None = None
) -> List:
    """Wrap a list. ``speakers`` are given if it holds the texts of a conversation."""
    objects = bool(value) and all(type(item) is dict for item in value)
    if speakers is None:
        speakers = speakers_of_objects(value, path) if objects else speakers_of_texts(value, path)
    if speakers is None:
        return List((_wrap(item, item_path(path, n), conversations) for n, item in enumerate(value)), path)
    # A list of texts named "history" may be the history of a patient.
    history = is_history(path) and not any(isinstance(item, str) for item in value)
    conversation = Conversation.of(path, speakers, history=history)
    conversations.append(conversation)
    marks = [(conversation, number) for number in range(len(value))]
    if objects:
        return List(
            (
                _object(item, item_path(path, mark[1]), conversations, mark)
                for item, mark in zip(value, marks, strict=True)
            ),
            path,
        )
    return Texts((_wrap(item, item_path(path, n), conversations) for n, item in enumerate(value)), path, marks)


def _object(
    value: Mapping[str, Any],
    path: str,
    conversations: list[Conversation],
    mark: tuple[Conversation, int] | None = None,
) -> Dict:
    """Wrap an object. ``mark`` is its conversation and turn number, if it is a turn."""
    numbered = mark is None and has_numbered_turns(value)
    if numbered and (speakers := speakers_of_objects([*value.values()], path)) is not None:
        conversation = Conversation.of(path, speakers)
        conversations.append(conversation)
        turns = {
            key: _object(item, item_path(path, key), conversations, (conversation, number))
            for number, (key, item) in enumerate(value.items())
        }
        return Dict(turns, path, value)
    columns = columns_of_turns(value) if mark is None else None
    items = {
        key: item
        if type(item) is str
        else _list(item, item_path(path, key), conversations, columns[1])
        if columns and key == columns[0]
        else _wrap(item, item_path(path, key), conversations)
        for key, item in value.items()
        if not is_null(item)
    }
    return Dict(items, path, value) if mark is None else Turn(items, path, value, mark)
