"""The first pass over the rows of a source: their columns and number, and the floats that are whole numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sftlab.dataset.formats import Chunk
from sftlab.dataset.parallel import in_order
from sftlab.dataset.rows import Row
from sftlab.dataset.values import Cell, is_null
from sftlab.errors import Problem

Place = tuple[str, ...]
"""A column and the keys within it. An item of a list has the place of the list, followed by "[]"."""


@dataclass
class Survey:
    """What is known about the rows of a split before they are rendered.

    ``chunks`` has the number of rows of each chunk; ``problems`` has one for each row that cannot be read. The sets
    have the places of values that are null, a float without a fraction, and any other float.
    """

    rows: int = 0
    chunks: list[int] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    nulls: set[Place] = field(default_factory=set)
    whole: set[Place] = field(default_factory=set)
    fractions: set[Place] = field(default_factory=set)

    def add(self, other: Survey) -> None:
        """Add the rows that follow."""
        self.rows += other.rows
        self.chunks += other.chunks
        self.columns |= other.columns
        self.problems += other.problems
        self.nulls |= other.nulls
        self.whole |= other.whole
        self.fractions |= other.fractions


def survey(chunks: Iterable[Chunk]) -> Survey:
    """Read all rows of a split once.

    Raises:
        ConfigError: a file cannot be read.
    """
    total = Survey()
    for part in in_order(_survey, chunks):
        total.add(part)
    return total


def _survey(chunk: Chunk) -> Survey:
    table = chunk.table()
    rows = [row for row in table.rows if row is not None]
    part = Survey(len(table.rows), [len(table.rows)], problems=table.problems)
    for row in rows:
        part.columns.update(dict.fromkeys(row))
        for place, value in _values(row):
            if is_null(value):
                part.nulls.add(place)
            elif type(value) is float:
                exact = value.is_integer() and abs(value) < 2**53
                (part.whole if exact else part.fractions).add(place)
    return part


def whole_numbers(surveys: Iterable[Survey]) -> frozenset[Place]:
    """Return the places with nulls and whole numbers, and no other floats: pandas stores such integers as floats."""
    total = Survey()
    for one in surveys:
        total.add(one)
    return frozenset((total.whole & total.nulls) - total.fractions)


def restore_whole_numbers(row: Row, places: frozenset[Place]) -> None:
    """Replace 3.0 by 3, in place, in the columns, keys of objects and items of lists that are ``places``."""
    if places:
        _convert(row, (), places)


def _values(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    value = value.value if type(value) is Cell else value
    if type(value) is dict:
        for key, item in value.items():
            if type(item) is not str:  # most values are texts
                yield from _values(item, (*place, key))
    elif type(value) is list:
        for item in value:
            if type(item) is not str:
                yield from _values(item, (*place, "[]"))
    elif value is None or type(value) is not str:
        yield place, value


def _convert(value: Any, place: Place, places: frozenset[Place]) -> None:
    value = value.value if type(value) is Cell else value
    items = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
    for key, item in list(items):
        at = (*place, key if type(value) is dict else "[]")
        if type(item) is float and at in places and not is_null(item):
            value[key] = int(item)
        else:
            _convert(item, at, places)
