"""Read the rows of a file in any supported format, and refuse a file whose content is not what its name says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sftlab.dataset.arrow_rows import read_parquet
from sftlab.dataset.csv_rows import read_csv
from sftlab.dataset.json_rows import read_json, read_lines
from sftlab.dataset.rows import Table
from sftlab.dataset.wording import short
from sftlab.errors import ConfigError, Problem

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
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
    b"ARROW1": ("an Arrow file", None),
    b"SQLite format 3": ("a SQLite database", None),
}
"""First bytes of a file → its content, and its suffix if it can be read."""


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


def read_file(file: Path) -> Table:
    """Read the rows of a file.

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
    data = _content(file)
    if suffix == ".parquet":
        return read_parquet(file, data)
    readers: dict[str, Callable[[Path, str], Table]] = {
        ".jsonl": read_lines,
        ".json": read_json,
        ".csv": read_csv,
        ".tsv": read_csv,
    }
    return readers[suffix](file, _text(file, data))


def _content(file: Path) -> bytes:
    """Return the bytes of a file, decompressed if its name says that it is compressed."""
    import gzip
    import zlib

    data = file.read_bytes()
    if not data:
        raise ConfigError(Problem(str(file), None, "is empty", "give a file with rows"))
    compression = file.suffix.lower()
    if compression in COMPRESSED and data.startswith(LFS):
        _check_magic(file, data, compression)
    if compression == ".gz":
        if not data.startswith(GZIP):
            raise ConfigError(
                Problem(str(file), None, "is not compressed by gzip", f"rename it to {file.with_suffix('').name}")
            )
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                Problem(str(file), None, f"is damaged or incomplete: {error}", "copy or download it again")
            ) from error
    elif compression == ".zst":
        from pyarrow import BufferReader, CompressedInputStream  # type: ignore[import-untyped]

        if not data.startswith(ZSTD):
            raise ConfigError(
                Problem(str(file), None, "is not compressed by zstd", f"rename it to {file.with_suffix('').name}")
            )
        try:
            data = CompressedInputStream(BufferReader(data), "zstd").read()
        except OSError as error:
            raise ConfigError(
                Problem(str(file), None, f"is damaged or incomplete: {error}", "copy or download it again")
            ) from error
    _check_magic(file, data, suffix_of(file) or "")
    return data


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


def _text(file: Path, data: bytes) -> str:
    """Decode a file in UTF-8.

    Raises:
        ConfigError: the file has another encoding, or is not text.
    """
    encoding = _encoding(data)
    if encoding == "binary":
        raise ConfigError(Problem(str(file), None, "is not text", f"convert it to one of {', '.join(SUFFIXES)}"))
    if encoding is None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
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
