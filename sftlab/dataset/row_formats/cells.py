"""Read cells of a row: null is None, JSON text is the list or object that it encodes, and numbers are texts."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from decimal import Decimal

from sftlab.dataset.row_formats.record import Converted
from sftlab.dataset.rows import Row
from sftlab.dataset.values import Cell, is_null, plain
from sftlab.dataset.wording import column_path, short
from sftlab.errors import ConfigError, Problem

_SURROGATE = re.compile("[\ud800-\udfff]")


def refused(message: str, remedy: str = "", *keys: str) -> ConfigError:
    """Return the error of a row; the caller adds its place."""
    return ConfigError(Problem("", None, message, remedy, keys))


def opened(value: object) -> object:
    """Return a value in plain JSON types: null is None, and text that encodes a list or an object is parsed."""
    if is_null(value):
        return None
    if isinstance(value, Cell):
        return plain(value.value)
    if isinstance(value, str):
        text = value.strip()
        if (text[:1], text[-1:]) in {("[", "]"), ("{", "}")}:
            with suppress(ValueError, RecursionError):
                return plain(json.loads(text))
        return str(value)
    return plain(value)


def written(value: object) -> str | None:
    """Return the text of a text or a number; None for null and any other value."""
    if isinstance(value, Cell):
        return str.__str__(value)
    if is_null(value) or isinstance(value, bool):
        return None
    return str(value) if isinstance(value, str | int | float | Decimal) else None


def text_in(row: Row, column: str, *, section: str) -> str:
    """Return the text of a column; "" for null.

    Raises:
        ConfigError: the value is neither text nor a number.
    """
    value = row.get(column)
    if is_null(value):
        return ""
    text = written(value)
    if text is None:
        raise not_text(column_path(column), value, section)
    return text


def required(row: Row, column: str, *, section: str) -> str:
    """Return the text of a column that must not be empty.

    Raises:
        ConfigError: the column is missing, null, empty, or not text.
    """
    text = text_in(row, column, section=section)
    if not text.strip():
        raise empty(row, column, section)
    return text


def check_text(row: Converted) -> None:
    """Check that a conversation can be written as JSON in UTF-8.

    Raises:
        ConfigError: a text has half of a surrogate pair, or a tool has a value that JSON does not have.
    """
    for message in row.messages:
        for name in ("content", "reasoning_content"):
            text = message.get(name)
            if isinstance(text, str) and not text.isascii() and (half := _SURROGATE.search(text)):
                state = f"has half of a surrogate pair (\\u{ord(half[0]):04x}), which is not a character"
                raise refused(f"the {message['role']} text {state}", "write the file again as UTF-8")
    calls = [message["tool_calls"] for message in row.messages if "tool_calls" in message]
    if row.tools or calls:
        try:
            json.dumps([row.tools, calls], ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise refused(f"a tool or a tool call is not JSON: {error}", "fix the row") from error


def not_text(path: str, value: object, section: str) -> ConfigError:
    """Return the error of a value that is not text."""
    kind = {"dict": "an object", "list": "a list", "bool": "true or false"}.get(
        type(value).__name__, type(value).__name__
    )
    return refused(
        f"{path} is {kind}, not text: {short(repr(plain(value)))}",
        f"write it as text, or convert it by a template ({section}.format=template)",
        f"{section}.format",
    )


def empty(row: Row, column: str, section: str) -> ConfigError:
    """Return the error of a column without text."""
    path = column_path(column)
    state = "is missing" if column not in row else "is null" if is_null(row[column]) else "is empty"
    return refused(f"{path} {state}", leave_out(section, path), f"{section}.keep")


def leave_out(section: str, condition: str) -> str:
    """Return the remedy that leaves out the rows for which a condition is false."""
    quoted = condition.replace('"', r"\"")
    setting = f'{section}.keep="{quoted}"'
    return f"fix the row, or leave such rows out by {shlex.quote(setting)}"
