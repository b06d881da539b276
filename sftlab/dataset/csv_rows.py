"""Read CSV and TSV files as streams: find the delimiter by all rows in a first pass, then read the rows in chunks."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.dataset.content import BLOCK
from sftlab.dataset.csv_cells import NestedColumns, value_of
from sftlab.dataset.rows import Row, Table
from sftlab.dataset.wording import listing, short
from sftlab.errors import ConfigError, Problem

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
CHUNK = 500  # rows of a chunk at most
CELL = 2**24  # characters of the longest cell; a quote that is not closed would make a cell of the rest of the file

_QUOTED = re.compile(r' +"')

Lines = Callable[[], Iterator[str]]
"""Reads the lines of a file from the start."""


class Dialect(NamedTuple):
    """How cells are separated and quoted. ``spaced`` ignores spaces after delimiters."""

    delimiter: str
    quoting: Any = csv.QUOTE_MINIMAL
    spaced: bool = False

    @property
    def name(self) -> str:
        """The name of the delimiter."""
        return DELIMITERS.get(self.delimiter, repr(self.delimiter))

    def rows(self, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows that have a cell, each with the number of its first line.

        Raises:
            BrokenRowError: a row cannot be read, and so none after it.
        """
        csv.field_size_limit(CELL)
        reader = csv.reader(
            lines, delimiter=self.delimiter, strict=True, quoting=self.quoting, skipinitialspace=self.spaced
        )
        line = 1
        try:
            for row in reader:
                if any(row):  # spreadsheets write rows without cells
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            reason = str(error)
            if "field limit" in reason:
                reason = f"a cell has more than {CELL:,} characters, perhaps because a quote is not closed"
            raise BrokenRowError(line, reason) from error


class BrokenRowError(Exception):
    """A row cannot be read: the number of its first line, and the reason."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


@dataclass(frozen=True)
class Layout:
    """What the first pass over a table finds: how rows become cells, and cells become values.

    The header has the names of the columns at ``kept`` out of ``width`` columns. ``nested`` are the columns of the
    header that hold only lists and objects. ``skipped`` lines are before the header.
    """

    file: Path
    dialect: Dialect
    header: tuple[str, ...]
    kept: tuple[int, ...]
    width: int
    nested: frozenset[int]
    skipped: int

    def chunks(self, lines: Iterator[str]) -> Iterator[CsvChunk]:
        """Yield the rows of the table; ``lines`` are those after the skipped ones."""
        rows, size = list[tuple[int, list[str]]](), 0
        broken: BrokenRowError | None = None
        try:
            numbered = self.dialect.rows(lines)
            next(numbered, None)  # the header
            for line, row in numbered:
                rows.append((line + self.skipped, row))
                size += sum(map(len, row))
                if len(rows) == CHUNK or size >= BLOCK:
                    yield CsvChunk(self, rows, None)
                    rows, size = [], 0
        except BrokenRowError as error:
            broken = error
        if broken is not None:
            place = f"{self.file}:{broken.line + self.skipped}"
            yield CsvChunk(self, rows, Problem(place, None, f"cannot be read as CSV: {broken.reason}", "fix the row"))
        elif rows:
            yield CsvChunk(self, rows, None)


@dataclass(frozen=True)
class CsvChunk:
    """Consecutive rows of a table, each with the number of its line, and the problem that ended the reading."""

    layout: Layout
    rows: list[tuple[int, list[str]]]
    broken: Problem | None

    def table(self) -> Table:
        """Name the cells, and parse the lists and objects in them."""
        layout, header = self.layout, self.layout.header
        rows: list[Row | None] = []
        problems: list[Problem] = []
        for line, row in self.rows:
            cells: list[Any] = _cells(row, layout.kept, layout.width)
            if len(cells) == len(header):
                for column in layout.nested:
                    cells[column] = value_of(cells[column])
                rows.append(dict(zip(header, cells, strict=True)))
                continue
            rows.append(None)
            counted = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
            problems.append(
                Problem(
                    f"{layout.file}:{line}",
                    None,
                    f"has {counted}, and the header has {len(header)} ({listing(header, 5)})",
                    f"quote cells that hold a {layout.dialect.name}, or fix the row",
                )
            )
        return Table(rows, [*problems, *([self.broken] if self.broken else [])])


@dataclass(frozen=True)
class CsvRows:
    """The rows of a CSV or TSV file, read again in every pass."""

    layout: Layout | None
    lines: Lines

    @classmethod
    def of(cls, file: Path, lines: Lines) -> CsvRows:
        """Find the layout of a file, which reads all lines once for each delimiter that the header has.

        Raises:
            ConfigError: the delimiter is ambiguous, the header is wrong, or a column holds NumPy arrays.
        """
        first = next(lines(), "").strip("\r\n")
        declared = re.fullmatch(r"sep=(.)", first, re.IGNORECASE)  # a line that spreadsheets write
        skipped = 1 if declared else 0
        candidates = [declared[1]] if declared else [delimiter for delimiter in DELIMITERS if delimiter in first]

        def below(dialect: Dialect) -> _Survey:
            return _Survey.of(dialect, lines, skipped)

        surveys = [below(Dialect(delimiter)) for delimiter in candidates or [","]]
        if "\t" in candidates and not any(survey.is_even for survey in surveys):  # TSV files are rarely quoted
            surveys.append(below(Dialect("\t", csv.QUOTE_NONE)))
        if not any(survey.rows or survey.is_broken for survey in surveys):
            return cls(None, lines)
        return cls(_most_plausible(file, surveys, len(candidates)).layout(file, skipped), lines)

    def __iter__(self) -> Iterator[CsvChunk]:
        if self.layout is not None:
            lines = self.lines()
            for _ in range(self.layout.skipped):
                next(lines)
            yield from self.layout.chunks(lines)


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """Divide blocks of text into lines, which end in a line feed, a carriage return, or both."""
    rest = ""
    for text in texts:
        lines = io.StringIO(rest + text, newline="").readlines()
        rest = "" if not lines or lines[-1].endswith("\n") else lines.pop()  # "\r" may be followed by "\n"
        yield from lines
    if rest:
        yield rest


def _cells(row: list[str], kept: tuple[int, ...], width: int) -> list[str]:
    """Return the cells of the columns that are kept; those of a row of another width are as they are."""
    return [row[number] for number in kept] if len(row) == width else row


@dataclass
class _Survey:
    """What a pass over a table finds if it is read in one dialect. ``rows`` counts those after the header."""

    dialect: Dialect
    header: list[str]
    kept: tuple[int, ...]
    nested: NestedColumns
    nameless: dict[int, tuple[int, str]]  # columns without a name → their first cell with its line
    widths: dict[int, int]  # cells of a row → number of such rows
    rows: int = 0
    is_broken: bool = False
    has_spaced_quotes: bool = False

    @classmethod
    def of(cls, dialect: Dialect, source: Lines, skipped: int) -> _Survey:
        """Read the lines after the skipped ones."""
        lines = source()
        for _ in range(skipped):
            next(lines)
        rows = dialect.rows(lines)
        names: list[str] = []
        survey = cls(dialect, [], (), NestedColumns(0), {}, {})
        try:
            names = next(rows, (0, names))[1]
            header = [name.strip() for name in names]
            nameless = [number for number, name in enumerate(header) if not name]
            kept = tuple(number for number in range(len(header)) if number not in nameless or number == 0)
            survey = cls(dialect, header, kept, NestedColumns(len(kept)), {}, {})
            survey.has_spaced_quotes = any(map(_QUOTED.match, names))
            for line, row in rows:
                survey._add(line, row, nameless)
        except BrokenRowError:
            survey.is_broken = True
            deque(lines, maxlen=0)  # an encoding other than UTF-8 is reported first
        # The reader takes a quote after a space as text. If all names begin with a space, so do the cells.
        quoted = dialect.quoting == csv.QUOTE_MINIMAL and survey.has_spaced_quotes
        if not dialect.spaced and (quoted or (names[1:] and all(name.startswith(" ") for name in names[1:]))):
            spaced = cls.of(dialect._replace(spaced=True), source, skipped)
            if spaced.is_even:
                return spaced
        return survey

    def _add(self, line: int, row: list[str], nameless: list[int]) -> None:
        self.rows += 1
        self.widths[len(row)] = self.widths.get(len(row), 0) + 1
        if not self.has_spaced_quotes:
            self.has_spaced_quotes = any(cell[:1] == " " and _QUOTED.match(cell) for cell in row)
        for number in nameless:
            if number < len(row) and row[number].strip() and number not in self.nameless:
                self.nameless[number] = (line, row[number])
        cells = _cells(row, self.kept, len(self.header))
        if self.nested.arrays and len(cells) == len(self.kept):
            self.nested.add(cells)

    @property
    def fitting(self) -> int:
        """Number of rows with as many cells as the header; -1 for a single column."""
        return self.widths.get(len(self.header), 0) if len(self.header) > 1 else -1

    @property
    def is_even(self) -> bool:
        """Whether every row has as many cells as the header."""
        return not self.is_broken and not self.widths.keys() - {len(self.header)}

    def layout(self, file: Path, skipped: int) -> Layout:
        """Return the layout of the table. Columns with neither a name nor a cell, as spreadsheets write, are dropped.

        Raises:
            ConfigError: the header is wrong: a column with cells has no name (the first one may lack one, since pandas
                writes its index there), or two have the same; or a column holds NumPy arrays.
        """
        header = [self.header[number] for number in self.kept]
        place = f"{file}:{1 + skipped}"
        for number, (line, cell) in sorted(self.nameless.items()):
            if number:
                message = f"column {number + 1} has no name, and line {line + skipped} has {short(cell, 40)!r} in it"
                raise ConfigError(Problem(place, None, message, "name the column"))
        if duplicates := sorted({name for name in header if header.count(name) > 1}):
            message = f"two columns have the same name ({listing(duplicates, 5)})"
            raise ConfigError(Problem(f"{file}:1", None, message, "rename one of them"))
        width = next(iter(self.widths), 0)
        if len(header) == 1 and self.rows > 1 and len(self.widths) == 1 and width > 1 and width != len(self.header):
            message = f"the first line has 1 cell ({short(header[0], 40)}), and every other line has {width}"
            remedy = f"delete it if it is not the header, or quote cells that hold a {self.dialect.name}"
            raise ConfigError(Problem(place, None, message, remedy))
        nested = self.nested.checked(file, header)
        return Layout(file, self.dialect, tuple(header), self.kept, len(self.header), nested, skipped)


def _most_plausible(file: Path, surveys: list[_Survey], candidates: int) -> _Survey:
    """Return the table with the delimiter by which every row, or else the largest number of rows, fits the header.

    Raises:
        ConfigError: every row fits by several delimiters.
    """
    even = [survey for survey in surveys if survey.is_even and (len(survey.header) > 1 or candidates <= 1)]
    if len(even) > 1:
        names = " and ".join(f"{survey.dialect.name} ({len(survey.header)} columns)" for survey in even)
        raise ConfigError(
            Problem(
                f"{file}:1",
                None,
                f"cells may be separated by {names}, as every row has as many",
                "quote the cells that hold one of them, or write the table as JSON lines",
            )
        )
    return even[0] if even else max(surveys, key=lambda survey: (survey.fitting, len(survey.header)))
