"""Read a file in any supported format in chunks of rows.

Files are read as streams, so that a large one is never in memory as a whole. Only a JSON object around rows, and a
small JSON file, are parsed as a whole.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

from sftlab.dataset.arrow_rows import BATCH, arrow_rows, table_batches
from sftlab.dataset.content import COMPRESSED, SUFFIXES, Content, decoded, suffix_of, texts
from sftlab.dataset.csv_rows import CsvRows, lines_of
from sftlab.dataset.json_array import read_array
from sftlab.dataset.json_rows import begins_with_row, read_json, read_lines, table_of_lines
from sftlab.dataset.rows import Table
from sftlab.errors import ConfigError, Problem


class Chunk(Protocol):
    """Consecutive rows of a file, which are parsed when they are used, perhaps in another process."""

    def table(self) -> Table:
        """Return the rows.

        Raises:
            ConfigError: the file is not UTF-8.
        """
        ...


@dataclass(frozen=True)
class Parsed:
    """Rows that are in memory."""

    content: Table

    def table(self) -> Table:
        """Return the rows."""
        return self.content

    @classmethod
    def of(cls, table: Table) -> Iterator[Parsed]:
        """Divide a table. The problems, which name their rows, belong to the first part."""
        for start in range(0, max(len(table.rows), 1), BATCH):
            yield cls(Table(table.rows[start : start + BATCH], table.problems if start == 0 else []))


@dataclass(frozen=True)
class Lines:
    """Whole lines of a JSON lines file. ``first`` is the number of the first one."""

    file: Path
    first: int
    data: bytes

    def table(self) -> Table:
        """Parse the lines."""
        return table_of_lines(self.file, decoded(self.file, self.data, self.first), self.first)


@dataclass(frozen=True)
class Batch:
    """A record batch of Arrow."""

    batch: Any

    def table(self) -> Table:
        """Convert the batch to rows."""
        return Table(arrow_rows(self.batch.to_pylist(), self.batch.schema), [])


class FileRows:
    """The rows of a file in chunks, in any number of passes. Rows that had to be parsed as a whole stay in memory."""

    def __init__(self, file: Path) -> None:
        """Name the file, which the first pass opens.

        Raises:
            ConfigError: its format is not supported.
        """
        suffix = suffix_of(file)
        if suffix is None:
            raise ConfigError(
                Problem(
                    str(file),
                    None,
                    f"does not end in {', '.join(SUFFIXES)} (with .gz or .zst if it is compressed)",
                    "convert the file, or rename it if it has one of these formats",
                )
            )
        self.file, self.suffix = file, suffix
        self._parsed: list[Parsed] | None = None
        self._csv: CsvRows | None = None

    def __iter__(self) -> Iterator[Chunk]:
        """Read the file.

        Raises:
            ConfigError: the content is not what the file's name says, or not text in UTF-8.
        """
        if self._parsed is not None:
            yield from self._parsed
        elif self.suffix in (".csv", ".tsv"):
            self._csv = self._csv or CsvRows.of(self.file, self._lines)
            yield from self._csv
        else:
            with closing(Content(self.file, self.suffix)) as content:
                if self.suffix in (".parquet", ".arrow"):
                    yield from self._batches(content)
                else:
                    yield from self._json(content)

    def _lines(self) -> Iterator[str]:
        with closing(Content(self.file, self.suffix)) as content:
            yield from lines_of(texts(self.file, content.blocks()))

    def _batches(self, content: Content) -> Iterator[Chunk]:
        """Read a table of Arrow, which is decompressed to a temporary file since it is not read in order."""
        from pyarrow import OSFile

        if content.compression not in COMPRESSED:
            yield from map(Batch, table_batches(self.file, OSFile(str(self.file))))
            return
        with NamedTemporaryFile() as whole:
            for block in content.blocks():
                whole.write(block)
            whole.flush()
            yield from map(Batch, table_batches(self.file, OSFile(whole.name)))

    def _json(self, content: Content) -> Iterator[Chunk]:
        """Read an array by items, a file whose first line is a row by lines, and any other, or a small one, whole."""
        file, head = self.file, content.head
        more = content.read()
        blocks = filter(None, chain([head, more], iter(content.read, b"")))
        first = next((line for line in head.split(b"\n")[:-1] if line.strip()), None)
        if more and first is not None and begins_with_row(first.decode("utf-8-sig", "replace")):
            yield from _whole_lines(file, blocks)
        elif more and head.removeprefix(BOM_UTF8).lstrip()[:1] == b"[":
            yield from read_array(file, texts(file, blocks))
        else:
            text = decoded(file, b"".join(blocks))
            self._parsed = [*Parsed.of((read_lines if self.suffix == ".jsonl" else read_json)(file, text))]
            yield from self._parsed


def _whole_lines(file: Path, blocks: Iterator[bytes]) -> Iterator[Lines]:
    number, rest = 1, b""
    for block in blocks:
        rest += block
        end = rest.rfind(b"\n") + 1
        if end:
            yield Lines(file, number, rest[:end])
            number, rest = number + rest.count(b"\n", 0, end), rest[end:]
    if rest:
        yield Lines(file, number, rest)
