"""Read rows from CSV and TSV files: find the delimiter, and parse lists and objects in cells."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import tokenize
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

from sftlab.dataset.rows import Table
from sftlab.dataset.values import Cell
from sftlab.dataset.wording import listing, short
from sftlab.errors import ConfigError, Problem

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}

_QUOTED = re.compile(r' +"')


def read_csv(file: Path, text: str) -> Table:
    """Read a table with a header. Cells stay text, except for columns of lists and objects.

    Raises:
        ConfigError: the delimiter is ambiguous, or the header is wrong.
    """
    csv.field_size_limit(2**31 - 1)  # cells may hold long rationales
    first = text.partition("\n")[0].strip("\r")
    declared = re.fullmatch(r"sep=(.)", first, re.IGNORECASE)  # a line that spreadsheets write
    skipped = 1 if declared else 0
    if declared:
        text = text.partition("\n")[2]
        first = text.partition("\n")[0]
    candidates = [declared[1]] if declared else [delimiter for delimiter in DELIMITERS if delimiter in first] or [","]
    parsed = [_Parsed.parse(text, delimiter) for delimiter in candidates]
    if "\t" in candidates and not any(table.even for table in parsed):  # cells of TSV files are rarely quoted
        parsed.append(_Parsed.parse(text, "\t", quoting=csv.QUOTE_NONE))
    if not any(table.rows or table.error for table in parsed):
        return Table([], [])
    table = _most_plausible(file, parsed, len(candidates)).with_names(file, skipped)
    _check_header(file, table, skipped)
    header, delimiter = table.header, DELIMITERS.get(table.delimiter, repr(table.delimiter))
    rows: list[dict[str, object] | None] = []
    problems: list[Problem] = []
    for line, row in table.rows:
        fits = len(row) == len(header)
        rows.append(dict(zip(header, row, strict=True)) if fits else None)
        if not fits:
            cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
            problems.append(
                Problem(
                    f"{file}:{line + skipped}",
                    None,
                    f"has {cells}, and the header has {len(header)} ({listing(header, 5)})",
                    f"quote cells that hold a {delimiter}, or fix the row",
                )
            )
    if table.error:
        problems.append(
            Problem(f"{file}:{table.line + skipped}", None, f"cannot be read as CSV: {table.error}", "fix the row")
        )
    _parse_nested(file, header, [row for row in rows if row])
    return Table(rows, problems)


class _Parsed(NamedTuple):
    """A table parsed by a delimiter: rows with their first line, and the error that ended the parsing, if any."""

    delimiter: str
    header: list[str]
    rows: list[tuple[int, list[str]]]
    error: str | None
    line: int

    @classmethod
    def parse(cls, text: str, delimiter: str, quoting: Any = csv.QUOTE_MINIMAL, *, spaced: bool = False) -> _Parsed:
        """Parse a table. ``spaced`` ignores spaces after delimiters."""
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            strict=True,
            quoting=quoting,
            skipinitialspace=spaced,
        )
        rows: list[tuple[int, list[str]]] = []
        line, error = 1, None
        try:
            for row in reader:
                if any(row):  # spreadsheets write rows without cells
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as raised:
            error = str(raised)
        # The reader takes a quote after a space as text. If all names begin with a space, so do the cells.
        names = rows[0][1][1:] if rows else []
        quoted = quoting == csv.QUOTE_MINIMAL and any(_QUOTED.match(cell) for _, row in rows for cell in row)
        if not spaced and (quoted or (names and all(name.startswith(" ") for name in names))):
            table = cls.parse(text, delimiter, quoting, spaced=True)
            if table.even:
                return table
        header = [name.strip() for name in rows[0][1]] if rows else []
        return cls(delimiter, header, rows[1:], error, line)

    def with_names(self, file: Path, skipped: int) -> _Parsed:
        """Drop columns with neither a name nor a cell, as spreadsheets write them.

        Raises:
            ConfigError: a column with cells has no name. The first column may lack one: pandas writes its index there.
        """
        nameless = [number for number, name in enumerate(self.header) if not name]
        for number in nameless if nameless != [0] else ():
            for line, row in self.rows:
                if number < len(row) and row[number].strip() and number:
                    raise ConfigError(
                        Problem(
                            f"{file}:{1 + skipped}",
                            None,
                            f"column {number + 1} has no name, and line {line + skipped} has "
                            f"{short(row[number], 40)!r} in it",
                            "name the column",
                        )
                    )
        keep = [number for number in range(len(self.header)) if number not in nameless or number == 0]
        width = len(self.header)
        rows = [(line, [row[n] for n in keep] if len(row) == width else row) for line, row in self.rows]
        return self._replace(header=[self.header[number] for number in keep], rows=rows)

    @property
    def fitting(self) -> int:
        """Number of rows with as many cells as the header; -1 for a single column."""
        return sum(len(row) == len(self.header) for _, row in self.rows) if len(self.header) > 1 else -1

    @property
    def even(self) -> bool:
        """Whether every row has as many cells as the header."""
        return self.error is None and all(len(row) == len(self.header) for _, row in self.rows)


def _most_plausible(file: Path, parsed: list[_Parsed], candidates: int) -> _Parsed:
    """Return the table with the delimiter by which every row, or else the largest number of rows, fits the header.

    Raises:
        ConfigError: every row fits by several delimiters.
    """
    even = [table for table in parsed if table.even and (len(table.header) > 1 or candidates == 1)]
    if len(even) > 1:
        names = " and ".join(f"{DELIMITERS[table.delimiter]} ({len(table.header)} columns)" for table in even)
        raise ConfigError(
            Problem(
                f"{file}:1",
                None,
                f"cells may be separated by {names}, as every row has as many",
                "quote the cells that hold one of them, or write the table as JSON lines",
            )
        )
    return even[0] if even else max(parsed, key=lambda table: (table.fitting, len(table.header)))


def _check_header(file: Path, table: _Parsed, skipped: int) -> None:
    header = table.header
    if duplicates := sorted({name for name in header if header.count(name) > 1}):
        raise ConfigError(
            Problem(
                f"{file}:1", None, f"two columns have the same name ({listing(duplicates, 5)})", "rename one of them"
            )
        )
    widths = {len(row) for _, row in table.rows}
    if len(header) == 1 and len(widths) == 1 and not widths & {0, 1} and len(table.rows) > 1:
        delimiter = DELIMITERS.get(table.delimiter, repr(table.delimiter))
        raise ConfigError(
            Problem(
                f"{file}:{1 + skipped}",
                None,
                f"the first line has 1 cell ({short(header[0], 40)}), and every other line has {widths.pop()}",
                f"delete it if it is not the header, or quote cells that hold a {delimiter}",
            )
        )


def _parse_nested(file: Path, header: list[str], rows: list[dict[str, object]]) -> None:
    """Replace lists and objects that are written as text, in columns that hold nothing else, by their values.

    JSON is read, and Python's notation, which pandas writes.

    Raises:
        ConfigError: a column holds NumPy arrays, whose items cannot be separated.
    """
    for column in header:
        nested: list[tuple[dict[str, object], str, Any]] = []
        for row in rows:
            cell = str(row[column])
            if not cell.strip():
                continue
            if (value := _nested(cell.strip())) is None:
                break
            nested.append((row, cell, value))
        else:
            for row, cell, value in nested:
                if _is_array(cell.strip()):
                    raise ConfigError(
                        Problem(
                            str(file),
                            None,
                            f"column {column!r} has NumPy arrays as text: {short(cell, 40)}",
                            f"write lists: table[{column!r}].map(list), or the table as JSON lines or Parquet",
                        )
                    )
                row[column] = Cell(cell, value) if _is_json(cell) else value


def _is_json(cell: str) -> bool:
    try:
        json.loads(cell)
    except (ValueError, RecursionError):
        return False
    return True


def _is_array(cell: str) -> bool:
    """Return whether a text that Python reads as a list has strings without a comma between them, as NumPy writes."""
    with suppress(tokenize.TokenError, SyntaxError):
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline)]
        kinds = [kind for kind in tokens if kind != tokenize.NL]
        return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)
    return False


def _nested(cell: str) -> list[Any] | dict[str, object] | None:
    """Parse the list or object in a cell; None if the cell is neither."""
    if (cell[0], cell[-1]) not in {("[", "]"), ("{", "}")}:
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError), catch_warnings():
            simplefilter("ignore")  # warnings about backslashes
            value = parse(cell)
            if isinstance(value, list) or (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
                return value
    return None
