"""The content of a data file: decompressed, decoded as UTF-8 in blocks, or refused with what it is instead."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
BLOCK = 2**20  # bytes of a file that are read at once


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


class Content:
    """The bytes of a file, decompressed if its name says that it is compressed. ``head`` has the first block."""

    def __init__(self, file: Path, suffix: str) -> None:
        """Open a file whose format has the suffix ``suffix``.

        Raises:
            ConfigError: the file is empty or damaged, or its first bytes belong to another format.
        """
        import gzip

        self.file, self.compression = file, file.suffix.lower()
        with file.open("rb") as raw:
            head = raw.read(400)
        if not head:
            raise ConfigError(Problem(str(file), None, "is empty", "give a file with rows"))
        magic = {".gz": ("gzip", GZIP), ".zst": ("zstd", ZSTD)}.get(self.compression)
        if magic is None:
            self._stream: Any = file.open("rb")
        else:
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
        with ExitStack() as refused:  # closes the file unless its content is accepted
            refused.callback(self.close)
            self.head = self.read()
            _check_magic(file, self.head, suffix)
            refused.pop_all()

    def read(self) -> bytes:
        """Read the next block; nothing at the end.

        Raises:
            ConfigError: the file is damaged.
        """
        import zlib

        try:
            return bytes(self._stream.read(BLOCK))
        except (OSError, EOFError, zlib.error) as error:
            if self.compression not in COMPRESSED:
                raise
            message = f"is damaged or incomplete: {error}"
            raise ConfigError(Problem(str(self.file), None, message, "copy or download it again")) from error

    def blocks(self) -> Iterator[bytes]:
        """Yield the blocks of the file; to be called before any ``read``."""
        block = self.head
        while block:
            yield block
            block = self.read()

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


def texts(file: Path, blocks: Iterator[bytes]) -> Iterator[str]:
    """Decode the blocks of a file in UTF-8. A character that is in two blocks belongs to the text of the second.

    Raises:
        ConfigError: the file has another encoding, or is not text.
    """
    line, rest, block = 1, b"", next(blocks, b"")
    is_start = True
    while block:
        data, block = rest + block, next(blocks, b"")
        text, used = _decoded(file, data, line, is_start=is_start, is_end=not block)
        yield text
        line, rest, is_start = line + data.count(b"\n", 0, used), data[used:], False


def decoded(file: Path, data: bytes, first: int = 1) -> str:
    """Decode lines of a file in UTF-8. ``first`` is the number of the first one.

    Raises:
        ConfigError: the file has another encoding, or is not text.
    """
    return _decoded(file, data, first, is_start=first == 1, is_end=True)[0]


def _decoded(file: Path, data: bytes, first: int, *, is_start: bool, is_end: bool) -> tuple[str, int]:
    """Decode a part of a file; return the text and the number of its bytes, without a part of a character at the end.

    Args:
        file: the file.
        data: the part.
        first: the number of its first line.
        is_start: whether the file begins with it.
        is_end: whether the file ends with it, so that a part of a character at the end is wrong.
    """
    encoding = _encoding(data) if is_start else None
    if encoding == "binary":
        raise ConfigError(Problem(str(file), None, "is not text", f"convert it to one of {', '.join(SUFFIXES)}"))
    if encoding is not None:
        raise _not_utf8(file, str(file), f"is {encoding}, not UTF-8", encoding)
    mark = len(codecs.BOM_UTF8) if is_start and data.startswith(codecs.BOM_UTF8) else 0
    try:
        text, used = codecs.utf_8_decode(data[mark:], "strict", is_end)
    except UnicodeDecodeError as error:
        at = mark + error.start
        line = data.count(b"\n", 0, at) + first
        raise _not_utf8(file, f"{file}:{line}", f"is not UTF-8 (byte 0x{data[at]:02x})", "WINDOWS-1252") from error
    return text, mark + used


def _not_utf8(file: Path, place: str, message: str, encoding: str) -> ConfigError:
    compression = file.suffix.lower()
    command = {".gz": "zcat {} | iconv", ".zst": "zstdcat {} | iconv"}.get(compression, "iconv").format(file.name)
    source = "" if compression in COMPRESSED else f" {file.name}"
    return ConfigError(
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
