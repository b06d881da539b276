"""The bytes of a file → rows: every format, and every way in which a file is not what its name says."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

from sftlab.dataset.rows import ABSENT, Cell, listing, short
from sftlab.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
MAGIC = {
    b"PAR1": ("a Parquet file", ".parquet"),
    b"\x1f\x8b": ("compressed by gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", ".zst"),
    b"BZh": ("compressed by bzip2", None),
    b"\xfd7zXZ": ("compressed by xz", None),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet (.xlsx)", None),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (.xls)", None),
    b"ARROW1": ("an Arrow file", None),
    b"SQLite format 3": ("a SQLite database", None),
}
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}

Rows = list[dict[str, Any] | None]
"""Rows in the order of their source; None stands for one that cannot be read."""


class Table(NamedTuple):
    """The rows of a file, and what is wrong with those that cannot be read."""

    rows: Rows
    problems: list[str]


def kind(file: Path) -> str | None:
    """Return the format that a file's name indicates."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def stem(file: Path) -> str:
    """A file's name without the endings of its format."""
    stem = file.name
    for endings in (COMPRESSED, SUFFIXES):
        stem = next((stem[: -len(ending)] for ending in endings if stem.lower().endswith(ending)), stem)
    return stem


def read_file(file: Path) -> Table:
    """The rows of a file.

    Raises:
        ConfigError: it is not what its name says, or not text in UTF-8.
    """
    form = kind(file)
    if form is None:
        raise ConfigError(
            f"{file}: does not end in {', '.join(SUFFIXES)}, nor one of these and .gz or .zst; convert it, or rename "
            "it if it is one"
        )
    data = _content(file)
    if form == ".parquet":
        return _parquet(file, data)
    readers: dict[str, Callable[[Path, str], Table]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}
    return readers[form](file, _text(file, data))


def _content(file: Path) -> bytes:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    import gzip
    import zlib

    data = file.read_bytes()
    if not data:
        raise ConfigError(f"{file}: is empty; give a file with rows")
    suffix = file.suffix.lower()
    if suffix in COMPRESSED and data.startswith(b"version https://git-lfs"):
        _check_magic(file, data, suffix)
    if suffix == ".gz":
        if not data.startswith(b"\x1f\x8b"):
            raise ConfigError(f"{file}: is not compressed by gzip; rename it to {file.with_suffix('').name}")
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{file}: is damaged or not whole: {error}; copy or download it again") from error
    elif suffix == ".zst":
        from pyarrow import BufferReader, CompressedInputStream  # type: ignore[import-untyped]

        if not data.startswith(b"\x28\xb5\x2f\xfd"):
            raise ConfigError(f"{file}: is not compressed by zstd; rename it to {file.with_suffix('').name}")
        try:
            data = CompressedInputStream(BufferReader(data), "zstd").read()
        except OSError as error:
            raise ConfigError(f"{file}: is damaged or not whole: {error}; copy or download it again") from error
    _check_magic(file, data, kind(file) or "")
    return data


def _check_magic(file: Path, data: bytes, form: str) -> None:
    """Refuse a file whose content is not what its name says."""
    if data.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{file}: is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|head|body)", data[:200], re.IGNORECASE):
        raise ConfigError(
            f"{file}: is a web page (HTML) or XML: {short(data[:200].decode('utf-8', 'replace'), 40)}; "
            "download the file itself"
        )
    for magic, (content, suffix) in MAGIC.items():
        if data.startswith(magic) and suffix != form:
            if suffix is None:
                remedy = f"convert it to one of {', '.join(SUFFIXES)}"
            elif file.suffix.lower() in COMPRESSED:
                remedy = f"decompress it, and rename what is in it to {stem(file)}{suffix}"
            elif suffix in COMPRESSED:
                remedy = f"rename it to {file.name}{suffix}"
            else:
                remedy = f"rename it to {stem(file)}{suffix}"
            raise ConfigError(f"{file}: is {content}; {remedy}")


def _text(file: Path, data: bytes) -> str:
    """The text of a file in UTF-8."""
    encoding = None
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "UTF-32"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    elif b"\0" in data[:400]:
        encoding = "UTF-16LE" if data[1:2] == b"\0" else "UTF-16BE" if data[:1] == b"\0" else "binary"
    if encoding == "binary":
        raise ConfigError(f"{file}: is not text; convert it to one of {', '.join(SUFFIXES)}")
    if encoding is None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            where, encoding = f"{file}:{line}: is not UTF-8 (byte 0x{data[error.start]:02x})", "WINDOWS-1252"
    else:
        where = f"{file}: is {encoding}, not UTF-8"
    suffix = file.suffix.lower()
    command = {".gz": "zcat {} | iconv", ".zst": "zstdcat {} | iconv"}.get(suffix, "iconv").format(file.name)
    source = "" if suffix in COMPRESSED else f" {file.name}"
    raise ConfigError(
        f"{where}; write it again as UTF-8, for example with `{command} -f {encoding} -t UTF-8{source} > "
        f"utf8{kind(file)}`"
    )


def _jsonl(file: Path, text: str) -> Table:
    rows: Rows = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            row, twice = _loads(line)
        except (ValueError, RecursionError) as error:
            if not rows and (table := _spread(file, text, line)):
                return table
            problems.append(f"{file}:{number}: is not JSON: {error}; fix or delete the line")
            row = None
        else:
            alone = isinstance(row, list | dict) and not rows and not problems and text.strip() == line.strip()
            if alone and not (isinstance(row, dict) and _is_row(row)):
                return _from_json(file, row, twice)  # all rows in one line
            if twice:
                problems.append(f"{file}:{number}: has the key {twice[0][1]!r} twice in an object; fix the line")
                row = None
            elif not isinstance(row, dict):
                problems.append(
                    f"{file}:{number}: is JSON, but not an object of column → value; fix or delete the line"
                )
                row = None
        rows.append(row)
    return Table(rows, problems)


def _spread(file: Path, text: str, first: str) -> Table | None:
    """Read rows of JSON that spans several lines; None if the first line is complete JSON."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError) as error:
        if first.strip() != "{" and (not first.lstrip().startswith("[") or first.rstrip().endswith("]")):
            return None
        raise ConfigError(f"{file}: is JSON over several lines that breaks off: {error}; fix the file") from error
    if "\n" not in text.lstrip()[:end]:
        return None
    if text.lstrip()[end:].strip():
        raise ConfigError(
            f"{file}: has JSON objects that go over several lines; write one object per line: "
            f"`jq -c . {file.name} > lines.jsonl`"
        )
    return _from_json(file, *_loads(text))


Twice = list[tuple[dict[str, Any], str]]
"""Objects with a key that they have twice, of which JSON readers keep the last value."""


def _loads(text: str) -> tuple[Any, Twice]:
    """The value of a JSON text, and its objects with a key that they have twice."""
    twice: Twice = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            names = [name for name, _ in items]
            twice.append((made, next(name for name in names if names.count(name) > 1)))
        return made

    return json.loads(text, object_pairs_hook=pairs), twice


def _json(file: Path, text: str) -> Table:
    try:
        value, twice = _loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # JSON lines under another name
            return _jsonl(file, text)
        raise ConfigError(f"{file}: is not JSON: {error}; fix the file") from error
    return _from_json(file, value, twice)


def _from_json(file: Path, value: Any, twice: Twice) -> Table:
    """Rows of a JSON array of objects, of an object around one, or of an object of id → row."""
    if twice:
        part, key = twice[0]
        rows = value if isinstance(value, list) else list(value.values())
        row = next((f", row {number}" for number, row in enumerate(rows, start=1) if _holds(row, part)), "")
        raise ConfigError(f"{file}{row}: has the key {key!r} twice in an object; fix the file")
    if isinstance(value, dict):
        value = _unwrapped(file, value)
    if not isinstance(value, list) or (value and not any(isinstance(row, dict) for row in value)):
        raise ConfigError(
            f"{file}: is not a list of objects; write a JSON array of rows, or one object per line (.jsonl)"
        )
    problems = [
        f"{file}, row {number}: is {short(json.dumps(row), 40)} and not an object of column → value; fix or delete it"
        for number, row in enumerate(value, start=1)
        if not isinstance(row, dict)
    ]
    return Table([row if isinstance(row, dict) else None for row in value], problems)


def _holds(value: Any, part: dict[str, Any]) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is part or any(_holds(item, part) for item in items)


WRAPPERS = {"data", "rows", "examples", "instances", "records", "items", "samples", "entries", "questions", "train"}


def _is_row(value: dict[str, Any]) -> bool:
    """Whether the only object of a file in lines is a row, and not an object around rows or of id → row."""
    objects = [item for item in value.values() if isinstance(item, dict)]
    if len(objects) == len(value) > 1 and (set.intersection(*map(set, objects)) or all(map(_is_column, objects))):
        return False
    lists = {
        name for name, item in value.items() if isinstance(item, list) and all(isinstance(row, dict) for row in item)
    }
    wrapped = {name for name in value if name.lower() in WRAPPERS and isinstance(value[name], dict | list)}
    return not (lists | {name for name in wrapped if isinstance(value[name], dict)}) & wrapped


def _unwrapped(file: Path, value: dict[str, Any]) -> list[Any]:
    """The rows in an object."""
    lists = {name: item for name, item in value.items() if isinstance(item, list)}
    tables = [name for name, item in lists.items() if item and all(isinstance(row, dict) for row in item)]
    objects = [item for item in value.values() if isinstance(item, dict)]
    if len(lists) == 1 and (tables or lists == value or [] in lists.values()):
        return next(iter(lists.values()))
    if len(tables) > 1:
        raise ConfigError(
            f"{file}: is an object with several lists of rows ({listing(tables, 5)}); write each to a file of its own"
        )
    if len(lists) == len(value) > 1 or (len(objects) == len(value) > 1 and all(map(_is_column, objects))):
        raise ConfigError(
            f"{file}: is an object of columns ({listing(value, 5)}), as pandas writes by default; write rows: "
            "to_json(…, orient='records', lines=True)"
        )
    if len(objects) == len(value) > 1 and set.intersection(*map(set, objects)):
        named = any("id" in row for row in objects)
        return [row if named else {"id": name, **row} for name, row in value.items()]
    if not lists and len(objects) == 1 and len(inner := objects[0]) > 1:
        rows = [row for row in inner.values() if isinstance(row, dict)]
        if len(rows) == len(inner) and set.intersection(*map(set, rows)):
            return _unwrapped(file, inner)
    return [value]


def _is_column(values: dict[str, Any]) -> bool:
    """Whether an object has the values of a column by the numbers of their rows."""
    return bool(values) and all(re.fullmatch(r"-?[0-9]+", key) for key in values)


def _csv(file: Path, text: str) -> Table:
    """Rows of a table with a header. Cells stay the text that they are."""
    csv.field_size_limit(2**31 - 1)  # rationales are long
    first = text.partition("\n")[0].strip("\r")
    said = re.fullmatch(r"sep=(.)", first, re.IGNORECASE)  # as spreadsheets write it
    skipped = 1 if said else 0
    if said:
        text = text.partition("\n")[2]
        first = text.partition("\n")[0]
    candidates = [said[1]] if said else [delimiter for delimiter in DELIMITERS if delimiter in first] or [","]
    parsed = [_Cells.parse(text, delimiter) for delimiter in candidates]
    if "\t" in candidates and not any(cells.even for cells in parsed):  # tables of tabs seldom quote
        parsed.append(_Cells.parse(text, "\t", quoting=csv.QUOTE_NONE))
    if not any(cells.rows or cells.error for cells in parsed):
        return Table([], [])
    even = [cells for cells in parsed if cells.even and (len(cells.header) > 1 or len(candidates) == 1)]
    if len(even) > 1:
        names = " and ".join(f"{DELIMITERS[cells.delimiter]} ({len(cells.header)} columns)" for cells in even)
        raise ConfigError(
            f"{file}:1: cells may be separated by {names}, as every row has as many; quote the cells that hold one "
            "of them, or write the table as JSON lines"
        )
    table = even[0] if even else max(parsed, key=lambda cells: (cells.fitting, len(cells.header)))
    table = table.named(file, skipped)
    header = table.header
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ConfigError(f"{file}:1: two columns have the same name ({listing(twice, 5)}); rename one")
    widths = {len(row) for _, row in table.rows}
    if len(header) == 1 and len(widths) == 1 and not widths & {0, 1} and len(table.rows) > 1:
        name = DELIMITERS.get(table.delimiter, repr(table.delimiter))
        raise ConfigError(
            f"{file}:{1 + skipped}: the first line has 1 cell ({short(header[0], 40)}), and every other line has "
            f"{widths.pop()}; delete it if it is not the header, or quote cells that hold a {name}"
        )
    problems: list[str] = []
    rows: Rows = []
    for line, row in table.rows:
        fits = len(row) == len(header)
        rows.append(dict(zip(header, row, strict=True)) if fits else None)
        if not fits:
            name = DELIMITERS.get(table.delimiter, repr(table.delimiter))
            cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
            problems.append(
                f"{file}:{line + skipped}: has {cells}, and the header has {len(header)} "
                f"({listing(header, 5)}); quote cells that hold a {name}, or fix the row"
            )
    if table.error:
        problems.append(f"{file}:{table.line + skipped}: cannot be read as CSV: {table.error}; fix the row")
    _nest(file, header, [row for row in rows if row])
    return Table(rows, problems)


def _nest(file: Path, header: list[str], rows: list[dict[str, Any]]) -> None:
    """Replace lists and objects that are written as text, in columns that have nothing else, by their values.

    JSON, and Python's notation, which pandas writes.

    Raises:
        ConfigError: NumPy arrays, whose items cannot be separated.
    """
    for column in header:
        nested: list[tuple[dict[str, Any], Any]] = []
        for row in rows:
            if not (cell := row[column].strip()):
                continue
            if (value := _nested(cell)) is None:
                break
            nested.append((row, value))
        else:
            for row, value in nested:
                if _is_array(row[column].strip()):
                    raise ConfigError(
                        f"{file}: column {column!r} has NumPy arrays as text: {short(row[column], 40)}; write lists: "
                        f"table[{column!r}].map(list), or the table as JSON lines or Parquet"
                    )
                row[column] = Cell(row[column], value) if _is_json(row[column]) else value


def _is_json(cell: str) -> bool:
    try:
        json.loads(cell)
    except (ValueError, RecursionError):
        return False
    return True


def _is_array(cell: str) -> bool:
    """Whether a text that Python can read as a list has texts without a comma between them, as NumPy writes."""
    with suppress(tokenize.TokenError, SyntaxError):
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline)]
        kinds = [kind for kind in tokens if kind != tokenize.NL]
        return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)
    return False


def _nested(cell: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a cell is the text of."""
    if (cell[0], cell[-1]) not in {("[", "]"), ("{", "}")}:
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError), catch_warnings():
            simplefilter("ignore")  # of backslashes
            value = parse(cell)
            if isinstance(value, list) or (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
                return value
    return None


_QUOTED = re.compile(r' +"')


class _Cells(NamedTuple):
    """A table as one delimiter cuts it: rows with their first line, and the error at which it ended, if any."""

    delimiter: str
    header: list[str]
    rows: list[tuple[int, list[str]]]
    error: str | None
    line: int

    @classmethod
    def parse(cls, text: str, delimiter: str, quoting: Any = csv.QUOTE_MINIMAL, *, spaced: bool = False) -> _Cells:
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
                if any(row):  # spreadsheets write rows without a cell
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as raised:
            error = str(raised)
        # A quote after a space would be a part of the text. Where all names have a space in front, so have the cells.
        names = rows[0][1][1:] if rows else []
        quoted = quoting == csv.QUOTE_MINIMAL and any(_QUOTED.match(cell) for _, row in rows for cell in row)
        if not spaced and (quoted or (names and all(name.startswith(" ") for name in names))):
            cells = cls.parse(text, delimiter, quoting, spaced=True)
            if cells.even:
                return cells
        header = [name.strip() for name in rows[0][1]] if rows else []
        return cls(delimiter, header, rows[1:], error, line)

    def named(self, file: Path, skipped: int) -> _Cells:
        """The table without columns that have neither a name nor a cell, as spreadsheets write them.

        Raises:
            ConfigError: a column has cells and no name. The first may: it is the index that pandas writes.
        """
        nameless = [number for number, name in enumerate(self.header) if not name]
        for number in nameless if nameless != [0] else ():
            for line, row in self.rows:
                if number < len(row) and row[number].strip() and number:
                    raise ConfigError(
                        f"{file}:{1 + skipped}: column {number + 1} has no name, and line {line + skipped} has "
                        f"{short(row[number], 40)!r} in it; name the column"
                    )
        keep = [number for number in range(len(self.header)) if number not in nameless or number == 0]
        width = len(self.header)
        rows = [(line, [row[n] for n in keep] if len(row) == width else row) for line, row in self.rows]
        return self._replace(header=[self.header[number] for number in keep], rows=rows)

    @property
    def fitting(self) -> float:
        return sum(len(row) == len(self.header) for _, row in self.rows) if len(self.header) > 1 else -1

    @property
    def even(self) -> bool:
        """Whether every row has as many cells as the header."""
        return self.error is None and all(len(row) == len(self.header) for _, row in self.rows)


def _parquet(file: Path, data: bytes) -> Table:
    from pyarrow import ArrowException, BufferReader, parquet

    try:
        table = parquet.ParquetFile(BufferReader(data)).read()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as Parquet: {error}; copy or write it again") from error
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{file}: two columns have the same name ({listing(twice, 5)}); rename one")
    return Table(dense(table.to_pylist(), table.schema), [])


def dense(rows: Iterable[dict[str, Any]], schema: Any = None) -> Rows:
    """Rows of an Arrow table, in whose objects a null stands for a key that only other rows have.

    Floats of 32 bits become the shortest number that they are nearest to: 0.1, not 0.10000000149011612.
    """
    short = {field.name: field.type for field in schema or () if re.search(r"\b(half)?float\b", str(field.type))}
    return [
        {column: _dense(_shortest(value, short[column]) if column in short else value) for column, value in row.items()}
        for row in rows
    ]


def _shortest(value: Any, kind: Any) -> Any:
    """A value of an Arrow type, with its floats of 16 and 32 bits as the shortest numbers."""
    import numpy as np
    from pyarrow import types

    if value is None:
        return None
    if types.is_float32(kind) or types.is_float16(kind):
        return float(str((np.float32 if types.is_float32(kind) else np.float16)(value)))
    if types.is_struct(kind) and isinstance(value, dict):
        fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        return {name: _shortest(item, fields[name]) if name in fields else item for name, item in value.items()}
    if hasattr(kind, "value_type") and isinstance(value, list):
        return [_shortest(item, kind.value_type) for item in value]
    return value


def _dense(value: Any) -> Any:
    if isinstance(value, list):
        return [_dense(item) for item in value]
    if isinstance(value, dict):
        return {name: ABSENT if item is None else _dense(item) for name, item in value.items()}
    return value
