"""Read a JSON array of rows as a stream: the parent finds where rows end, and a chunk parses its own rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from sftlab.dataset.json_rows import rows_of_array
from sftlab.dataset.rows import Table
from sftlab.errors import ConfigError, Problem

PARTIAL = 16  # characters of the longest literal or escape sequence of JSON, and more


@dataclass(frozen=True)
class Items:
    """Consecutive rows of an array, as the text between their brackets. ``first`` is the number of the first one."""

    file: Path
    first: int
    text: str

    def table(self) -> Table:
        """Parse the rows."""
        return rows_of_array(self.file, f"[{self.text}]", self.first)


def read_array(file: Path, texts: Iterator[str]) -> Iterator[Items]:
    """Yield the rows of a file that is an array, given as blocks of text.

    Raises:
        ConfigError: the file is not JSON, or has something after the array, or its first rows are not objects.
    """
    text = _Text(file, texts)
    text.grow()
    text.at = text.next_place() + 1  # after the bracket
    first, is_item_next, is_closed = 1, True, False
    while not is_closed:
        start = end = text.at
        count, has_object = 0, False
        while (place := text.next_place()) < len(text.content):
            mark = text.content[place]
            if mark == "]" and (not is_item_next or first + count == 1):
                text.at, is_closed = place + 1, True
                break
            if not is_item_next:
                if mark != ",":
                    raise text.error("Expecting ',' delimiter", place)
                text.at, is_item_next = place + 1, True
                continue
            item = text.item(place)
            if item is None:
                break
            start = start if count else place
            end = text.at
            count, has_object, is_item_next = count + 1, has_object or isinstance(item[0], dict), False
        if count:
            if first == 1 and not has_object:
                message, remedy = (
                    "is not a list of objects",
                    "write a JSON array of rows, or one object per line (.jsonl)",
                )
                raise ConfigError(Problem(str(file), None, message, remedy))
            yield Items(file, first, text.content[start:end])
            first += count
        if not is_closed and not text.grow() and place == len(text.content):
            raise text.error("Expecting value" if is_item_next else "Expecting ',' delimiter", place)
    text.check_end()


class _Text:
    """A window on the text of a file, which moves forward. ``at`` is the place up to which the text is parsed."""

    def __init__(self, file: Path, texts: Iterator[str]) -> None:
        self.file, self.texts = file, texts
        self.content, self.at = "", 0
        self.is_ended = False
        self.before = self.lines = 0  # characters and line ends before the window
        self.column = 0  # characters between the last line end and the window
        self.scan: Any = json.JSONDecoder().raw_decode

    def next_place(self) -> int:
        """Return the place of the next character that is not white space, or the end of the window."""
        return int(WHITESPACE.match(self.content, self.at).end())

    def item(self, place: int) -> tuple[Any] | None:
        """Parse the value at a place; None if the window ends before the value does.

        Raises:
            ConfigError: the value is not JSON.
        """
        try:
            value, end = self.scan(self.content, place)
        except json.JSONDecodeError as error:
            is_partial = error.pos > len(self.content) - PARTIAL or error.msg.startswith("Unterminated string")
            if is_partial and not self.is_ended:
                return None
            raise self.error(error.msg, error.pos) from error
        except (ValueError, RecursionError) as error:
            raise self.error(str(error), None) from error
        if end == len(self.content) and not self.is_ended:
            return None  # a number may go on
        self.at = end
        return (value,)

    def grow(self) -> bool:
        """Drop what is parsed, and append as much as remains, at least a block; return whether there was more."""
        parsed, rest = self.content[: self.at], self.content[self.at :]
        self.before += len(parsed)
        self.lines += parsed.count("\n")
        self.column = len(parsed) - parsed.rindex("\n") - 1 if "\n" in parsed else self.column + len(parsed)
        parts, size = [rest], 0
        while size <= len(rest) and (text := next(self.texts, None)) is not None:
            parts.append(text)
            size += len(text)
        self.content, self.at, self.is_ended = "".join(parts), 0, size <= len(rest)
        return size > 0

    def error(self, reason: str, place: int | None) -> ConfigError:
        """Return the error of a file that is not JSON, at a place of the window."""
        if place is not None:
            line = self.lines + self.content.count("\n", 0, place) + 1
            last = self.content.rfind("\n", 0, place)
            column = place - last if last >= 0 else self.column + place + 1
            reason = f"{reason}: line {line} column {column} (char {self.before + place})"
        return ConfigError(Problem(str(self.file), None, f"is not JSON: {reason}", "fix the file"))

    def check_end(self) -> None:
        """Read the rest of the file.

        Raises:
            ConfigError: it has more than white space.
        """
        while True:
            place = self.next_place()
            if place < len(self.content):
                line = self.lines + self.content.count("\n", 0, place) + 1
                message = f"line {line} has more after the array of rows"
                raise ConfigError(Problem(str(self.file), None, message, "write a single array, or one row per line"))
            self.at = place
            if not self.grow():
                return
