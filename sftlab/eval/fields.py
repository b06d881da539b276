"""Compare two JSON texts field by field."""

from __future__ import annotations

import json
import re
from typing import NoReturn

Fields = dict[str, str]
"""The value of each field as JSON, by its path: ``address.city``, ``tags[0]``; "" is the path of a single value."""


def fields_of(text: str) -> Fields | None:
    """Return the fields of a JSON text; None if it is not valid JSON.

    NaN and Infinity are not valid, and a name that occurs twice in an object has its last value. An empty object or
    list is a field. Numbers are equal if their values are: 1 and 1.0.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    fields: Fields = {}
    todo: list[tuple[str, object]] = [("", value)]
    while todo:  # without recursion: a model may nest lists without end
        path, value = todo.pop()
        if isinstance(value, dict) and value:
            todo += [(f"{path}.{_part(name)}" if path else _part(name), item) for name, item in value.items()]
        elif isinstance(value, list) and value:
            todo += [(f"{path}[{place}]", item) for place, item in enumerate(value)]
        else:
            number = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
            fields[path] = json.dumps(int(value) if number else value)  # type: ignore[call-overload]
    return fields


def _part(name: str) -> str:
    """The name of an object's field in a path; in quotes where it would look like a path itself."""
    return name if name and not re.search(r'[.\[\]"]', name) else json.dumps(name)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def score(answer: Fields, target: Fields) -> float:
    """The F-measure of the fields: 2 · equal fields / (fields of the answer + fields of the target)."""
    return 2 * len(answer.items() & target.items()) / (len(answer) + len(target))


def name(path: str) -> str:
    """The name of a field in tables: the items of a list are one field."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|\[\d+\]', lambda match: match[1] or "[]", path) or "(value)"
