"""Read a file in any supported format in chunks of rows, and refuse a file whose content is not what its name says.

JSON lines, Parquet and Arrow files are read as streams, so that a large file is never in memory as a whole. A JSON
array, a CSV file and a compressed Parquet or Arrow file can only be parsed as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sftlab.dataset.arrow_rows import BATCH, arrow_rows, table_batches
from sftlab.dataset.csv_rows import read_csv
from sftlab.dataset.json_rows import begins_with_row, read_json, read_lines, table_of_lines
from sftlab.dataset.rows import Table
from sftlab.dataset.wording import short
from sftlab.errors import ConfigError, Problem

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
GZIP, ZSTD, LFS = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"version https://git-lfs"
MAGIC = {
    b"PAR1": ("a Parquet file", ".parquet"),
    GZIP: ("compressed by gzip", ".gz"),
    ZSTD: ("compressed by zstd", ".zst"),
    b"BZh": ("compressed by bzip2", None),
    b"\xfd7zXZ": ("compressed by xz", None),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet (.xlsx)", None),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (.xls)", None),
    b"ARROW1": ("an Arrow file", ".arrow"),
    b"SQLite format 3": ("a SQLite database", None),
}
"""First bytes of a file → its content, and its suffix if it can be read."""
BLOCK = 2**20  # bytes of JSON lines in a chunk


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
        return table_of_lines(self.file, _text(self.file, self.data, self.first), self.first)


@dataclass(frozen=True)
class Batch:
    """A record batch of Arrow."""

    batch: Any

    def table(self) -> Table:
        """Convert the batch to rows."""
        return Table(arrow_rows(self.batch.to_pylist(), self.batch.schema), [])


def suffix_of(file: Path) -> str | None:
    """Return the suffix of a file's format, without that of its compression; None if the format is not supported."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def stem(file: Path) -> str:
    """Return the name of a file without the suffixes of its format and compression."""
    stem = file.name
    for suffixes in (COMPRESSED, SUFFIXES):
        stem = next((stem[: -len(suffix)] for suffix in suffixes if stem.lower().endswith(suffix)), stem)
    return stem


def read_file(file: Path) -> Iterator[Chunk]:
    """Yield the rows of a file in chunks.

    Raises:
        ConfigError: the content is not what the file's name says, or not text in UTF-8.
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
    with closing(_Content(file)) as content:
        head = content.read(BLOCK)
        _check_magic(file, head, suffix)
        if suffix in (".parquet", ".arrow"):
            yield from map(Batch, table_batches(file, _source(file, content, head)))
        elif suffix in (".jsonl", ".json"):
            yield from _json(file, suffix, content, head)
        else:
            yield from Parsed.of(read_csv(file, _text(file, head + content.read())))


def _source(file: Path, content: _Content, head: bytes) -> Any:
    """Return what Arrow reads: the file, or its decompressed content."""
    from pyarrow import BufferReader, OSFile

    return BufferReader(head + content.read()) if file.suffix.lower() in COMPRESSED else OSFile(str(file))


def _json(file: Path, suffix: str, content: _Content, head: bytes) -> Iterator[Chunk]:
    """Read a file whose first line is a row by lines, and any other file, or a small one, as a whole."""
    more = content.read(BLOCK)
    lines = head.split(b"\n")[:-1]
    first = next((line for line in lines if line.strip()), None)
    if not more or first is None or not begins_with_row(first.decode("utf-8-sig", "replace")):
        text = _text(file, head + more + content.read())
        yield from Parsed.of((read_lines if suffix == ".jsonl" else read_json)(file, text))
        return
    number, rest = 1, head
    while more:
        rest += more
        end = rest.rfind(b"\n") + 1
        if end:
            yield Lines(file, number, rest[:end])
            number, rest = number + rest.count(b"\n", 0, end), rest[end:]
        more = content.read(BLOCK)
    if rest:
        yield Lines(file, number, rest)


class _Content:
    """The content of a file, decompressed if its name says that it is compressed."""

    def __init__(self, file: Path) -> None:
        import gzip

        self.file, self.compression = file, file.suffix.lower()
        with file.open("rb") as raw:
            head = raw.read(400)
        if not head:
            raise ConfigError(Problem(str(file), None, "is empty", "give a file with rows"))
        magic = {".gz": ("gzip", GZIP), ".zst": ("zstd", ZSTD)}.get(self.compression)
        if magic is None:
            self._stream: Any = file.open("rb")
            return
        if head.startswith(LFS):
            _check_magic(file, head, self.compression)
        if not head.startswith(magic[1]):
            message, remedy = f"is not compressed by {magic[0]}", f"rename it to {file.with_suffix('').name}"
            raise ConfigError(Problem(str(file), None, message, remedy))
        if self.compression == ".gz":
            self._stream = gzip.GzipFile(file)
        else:
            from pyarrow import CompressedInputStream, OSFile

            self._stream = CompressedInputStream(OSFile(str(file)), "zstd")

    def read(self, size: int | None = None) -> bytes:
        """Read at most ``size`` bytes, or all that remain; nothing at the end.

        Raises:
            ConfigError: the file is damaged.
        """
        import zlib

        try:
            return bytes(self._stream.read(size))
        except (OSError, EOFError, zlib.error) as error:
            if self.compression not in COMPRESSED:
                raise
            message = f"is damaged or incomplete: {error}"
            raise ConfigError(Problem(str(self.file), None, message, "copy or download it again")) from error

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _check_magic(file: Path, data: bytes, expected: str) -> None:
    """Refuse a file whose first bytes belong to another format than the suffix ``expected``."""
    if data.startswith(LFS):
        raise ConfigError(
            Problem(str(file), None, "is a pointer of Git LFS, not the file itself", "run `git lfs pull`")
        )
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|head|body)", data[:200], re.IGNORECASE):
        raise ConfigError(
            Problem(
                str(file),
                None,
                f"is a web page (HTML) or XML: {short(data[:200].decode('utf-8', 'replace'), 40)}",
                "download the file itself",
            )
        )
    for magic, (content, suffix) in MAGIC.items():
        if data.startswith(magic) and suffix != expected:
            if suffix is None:
                remedy = f"convert it to one of {', '.join(SUFFIXES)}"
            elif file.suffix.lower() in COMPRESSED:
                remedy = f"decompress it, and rename the result to {stem(file)}{suffix}"
            elif suffix in COMPRESSED:
                remedy = f"rename it to {file.name}{suffix}"
            else:
                remedy = f"rename it to {stem(file)}{suffix}"
            raise ConfigError(Problem(str(file), None, f"is {content}", remedy))


def _text(file: Path, data: bytes, first: int = 1) -> str:
    """Decode lines of a file in UTF-8. ``first`` is the number of the first one.

    Raises:
        ConfigError: the file has another encoding, or is not text.
    """
    encoding = _encoding(data) if first == 1 else None
    if encoding == "binary":
        raise ConfigError(Problem(str(file), None, "is not text", f"convert it to one of {', '.join(SUFFIXES)}"))
    if encoding is None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + first
            place, message = f"{file}:{line}", f"is not UTF-8 (byte 0x{data[error.start]:02x})"
            encoding = "WINDOWS-1252"
    else:
        place, message = str(file), f"is {encoding}, not UTF-8"
    compression = file.suffix.lower()
    command = {".gz": "zcat {} | iconv", ".zst": "zstdcat {} | iconv"}.get(compression, "iconv").format(file.name)
    source = "" if compression in COMPRESSED else f" {file.name}"
    raise ConfigError(
        Problem(
            place,
            None,
            message,
            f"write it again as UTF-8, for example with `{command} -f {encoding} -t UTF-8{source} > "
            f"utf8{suffix_of(file)}`",
        )
    )


def _encoding(data: bytes) -> str | None:
    """Return the encoding of a file that is evidently not UTF-8, "binary" if it is not text; None otherwise."""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if b"\0" in data[:400]:
        return "UTF-16LE" if data[1:2] == b"\0" else "UTF-16BE" if data[:1] == b"\0" else "binary"
    return None
