"""Read rows from JSON lines, a JSON array, or an object around rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sftlab.dataset.rows import Row, Table
from sftlab.dataset.wording import listing, short
from sftlab.errors import ConfigError, Problem

Object = dict[str, Any]
"""A JSON object."""

Duplicates = list[tuple[Object, str]]
"""Objects in which a key occurs twice, each with that key. JSON readers keep the last value."""

WRAPPERS = {"data", "rows", "examples", "instances", "records", "items", "samples", "entries", "questions", "train"}
"""Keys under which an object stores the rows of a file."""


def read_lines(file: Path, text: str) -> Table:
    """Read a JSON lines file. Files with one JSON value over several lines are read too.

    Raises:
        ConfigError: the file holds JSON of another structure.
    """
    line = next((line for line in text.split("\n") if line and not line.isspace()), "")
    try:
        value, duplicates = _parse(line)
    except (ValueError, RecursionError):
        table = _over_several_lines(file, text, line) if line else None
        return table or table_of_lines(file, text, 1)
    alone = isinstance(value, list | dict) and text.strip() == line.strip()
    if alone and not (isinstance(value, dict) and _is_row(value)):
        return _table(file, value, duplicates)  # the only line holds all rows
    return table_of_lines(file, text, 1)


def table_of_lines(file: Path, text: str, first: int) -> Table:
    """Read rows that are one JSON object per line. ``first`` is the number of the first line in the file."""
    rows: list[Row | None] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=first):
        if not line or line.isspace():
            continue
        place, row = f"{file}:{number}", None
        try:
            value, duplicates = _parse(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(place, None, f"is not JSON: {error}", "fix or delete the line"))
        else:
            if duplicates:
                message = f"has the key {duplicates[0][1]!r} twice in an object"
                problems.append(Problem(place, None, message, "fix the line"))
            elif not isinstance(value, dict):
                message = "is JSON, but not an object of column → value"
                problems.append(Problem(place, None, message, "fix or delete the line"))
            else:
                row = value
        rows.append(row)
    return Table(rows, problems)


def begins_with_row(line: str) -> bool:
    """Return whether the first line of a file of several lines is a row by itself, so that every other line is one."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_json(file: Path, text: str) -> Table:
    """Read a JSON file: an array of objects, an object around one, or JSON lines.

    Raises:
        ConfigError: the file is not JSON, or its structure is ambiguous.
    """
    try:
        value, duplicates = _parse(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return read_lines(file, text)
        raise ConfigError(Problem(str(file), None, f"is not JSON: {error}", "fix the file")) from error
    return _table(file, value, duplicates)


def _over_several_lines(file: Path, text: str, first: str) -> Table | None:
    """Read rows of JSON that spans several lines; None if the first line is complete JSON."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError) as error:
        if first.strip() != "{" and (not first.lstrip().startswith("[") or first.rstrip().endswith("]")):
            return None
        raise ConfigError(
            Problem(str(file), None, f"is JSON over several lines that breaks off: {error}", "fix the file")
        ) from error
    if "\n" not in text.lstrip()[:end]:
        return None
    if text.lstrip()[end:].strip():
        raise ConfigError(
            Problem(
                str(file),
                None,
                "has JSON objects that span several lines",
                f"write one object per line: `jq -c . {file.name} > lines.jsonl`",
            )
        )
    return _table(file, *_parse(text))


def _parse(text: str) -> tuple[Any, Duplicates]:
    """Parse JSON; return the value, and its objects in which a key occurs twice."""
    duplicates: Duplicates = []

    def pairs(items: list[tuple[str, Any]]) -> Object:
        value = dict(items)
        if len(value) < len(items):
            names = [name for name, _ in items]
            duplicates.append((value, next(name for name in names if names.count(name) > 1)))
        return value

    return json.loads(text, object_pairs_hook=pairs), duplicates


def _table(file: Path, value: Any, duplicates: Duplicates) -> Table:
    """Return the rows of a JSON array of objects, of an object around one, or of an object of id → row."""
    if duplicates:
        part, key = duplicates[0]
        rows = value if isinstance(value, list) else list(value.values())
        row = next((f", row {number}" for number, row in enumerate(rows, start=1) if _contains(row, part)), "")
        raise ConfigError(Problem(f"{file}{row}", None, f"has the key {key!r} twice in an object", "fix the file"))
    if isinstance(value, dict):
        value = _unwrapped(file, value)
    if not isinstance(value, list) or (value and not any(isinstance(row, dict) for row in value)):
        raise ConfigError(
            Problem(
                str(file),
                None,
                "is not a list of objects",
                "write a JSON array of rows, or one object per line (.jsonl)",
            )
        )
    problems = [_not_an_object(file, number, row) for number, row in enumerate(value, 1) if not isinstance(row, dict)]
    return Table([row if isinstance(row, dict) else None for row in value], problems)


def rows_of_array(file: Path, text: str, first: int) -> Table:
    """Read rows that are a part of an array, given as an array. ``first`` is the number of the first row."""
    values, duplicates = _parse(text)
    rows: list[Row | None] = []
    problems: list[Problem] = []
    for number, row in enumerate(values, first):
        twice = next((key for part, key in duplicates if _contains(row, part)), None)
        if twice is not None:
            message = f"has the key {twice!r} twice in an object"
            problems.append(Problem(f"{file}, row {number}", None, message, "fix the file"))
        elif not isinstance(row, dict):
            problems.append(_not_an_object(file, number, row))
        rows.append(row if isinstance(row, dict) and twice is None else None)
    return Table(rows, problems)


def _not_an_object(file: Path, number: int, row: Any) -> Problem:
    message = f"is {short(json.dumps(row), 40)}, not an object of column → value"
    return Problem(f"{file}, row {number}", None, message, "fix or delete it")


def _contains(value: Any, part: Object) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is part or any(_contains(item, part) for item in items)


def _is_row(value: Object) -> bool:
    """Return whether the only object of a JSON lines file is a row, and not an object around rows or of id → row."""
    objects = [item for item in value.values() if isinstance(item, dict)]
    if len(objects) == len(value) > 1 and (_common_keys(objects) or all(map(_is_column, objects))):
        return False
    lists = {
        name for name, item in value.items() if isinstance(item, list) and all(isinstance(row, dict) for row in item)
    }
    wrapped = {name for name in value if name.lower() in WRAPPERS and isinstance(value[name], dict | list)}
    return not (lists | {name for name in wrapped if isinstance(value[name], dict)}) & wrapped


def _unwrapped(file: Path, value: Object) -> list[Any]:
    """Return the rows that an object holds.

    Raises:
        ConfigError: the object has several lists of rows, or columns in place of rows.
    """
    lists = {name: item for name, item in value.items() if isinstance(item, list)}
    tables = [name for name, item in lists.items() if item and all(isinstance(row, dict) for row in item)]
    objects = [item for item in value.values() if isinstance(item, dict)]
    if len(lists) == 1 and (tables or lists == value or [] in lists.values()):
        return next(iter(lists.values()))
    if len(tables) > 1:
        raise ConfigError(
            Problem(
                str(file),
                None,
                f"is an object with several lists of rows ({listing(tables, 5)})",
                "write each list to its own file",
            )
        )
    if len(lists) == len(value) > 1 or (len(objects) == len(value) > 1 and all(map(_is_column, objects))):
        raise ConfigError(
            Problem(
                str(file),
                None,
                f"is an object of columns ({listing(value, 5)}), as pandas writes by default",
                "write rows: to_json(…, orient='records', lines=True)",
            )
        )
    if len(objects) == len(value) > 1 and _common_keys(objects):
        named = any("id" in row for row in objects)
        return [row if named else {"id": name, **row} for name, row in value.items()]
    if not lists and len(objects) == 1 and len(inner := objects[0]) > 1:
        rows = [row for row in inner.values() if isinstance(row, dict)]
        if len(rows) == len(inner) and _common_keys(rows):
            return _unwrapped(file, inner)
    return [value]


def _common_keys(objects: Iterable[Mapping[str, Any]]) -> set[str]:
    return set.intersection(*map(set, objects))


def _is_column(values: Mapping[str, Any]) -> bool:
    """Return whether an object holds the values of a column by row number."""
    return bool(values) and all(re.fullmatch(r"-?[0-9]+", key) for key in values)
