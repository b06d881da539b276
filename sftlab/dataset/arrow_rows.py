"""Read rows from Parquet files and Arrow tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sftlab.dataset.rows import Row, Rows
from sftlab.dataset.values import ABSENT
from sftlab.dataset.wording import listing
from sftlab.errors import ConfigError, Problem

BATCH = 500  # rows of a batch: few enough to be in memory many times, enough to be worth sending to another process


def table_batches(file: Path, source: Any) -> Iterator[Any]:
    """Yield the record batches of a Parquet or Arrow file, each of at most ``BATCH`` rows.

    Args:
        file: the file, whose name decides the format.
        source: its path, or its decompressed content as a buffer.

    Raises:
        ConfigError: the file is damaged, or two columns have the same name.
    """
    from pyarrow import ArrowException

    kind = "Parquet" if ".parquet" in file.suffixes[-2:] else "Arrow"
    try:
        for batch in _parquet(source) if kind == "Parquet" else _arrow(source):
            names = batch.schema.names
            if duplicates := sorted({name for name in names if names.count(name) > 1}):
                message = f"two columns have the same name ({listing(duplicates, 5)})"
                raise ConfigError(Problem(str(file), None, message, "rename one of them"))
            for start in range(0, batch.num_rows, BATCH):
                yield batch.slice(start, BATCH)
    except (ArrowException, OSError) as error:
        message = f"cannot be read as {kind}: {error}"
        raise ConfigError(Problem(str(file), None, message, "copy or write it again")) from error


def _parquet(source: Any) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(source) as file:
        yield from file.iter_batches(BATCH)


def _arrow(source: Any) -> Iterator[Any]:
    """Yield the batches of an Arrow file, or of an Arrow stream, which `datasets` writes."""
    from pyarrow import ArrowInvalid, ipc

    try:
        reader = ipc.open_file(source)
    except ArrowInvalid:
        source.seek(0)
        with ipc.open_stream(source) as stream:
            yield from stream
        return
    with reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def arrow_rows(rows: Iterable[Row], schema: Any = None) -> Rows:
    """Convert the rows of an Arrow table.

    Arrow stores null where an object lacks a key that other rows' objects have; such a null becomes ABSENT. Floats of
    16 and 32 bits become the shortest number that rounds to them: 0.1, not 0.10000000149011612.
    """
    floats = {field.name: field.type for field in schema or () if re.search(r"\b(half)?float\b", str(field.type))}
    return [
        {
            column: _absent_keys(_shortest(value, floats[column]) if column in floats else value)
            for column, value in row.items()
        }
        for row in rows
    ]


def _shortest(value: Any, kind: Any) -> Any:
    """Replace the floats of 16 and 32 bits in a value of an Arrow type by the shortest numbers."""
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


def _absent_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_absent_keys(item) for item in value]
    if isinstance(value, dict):
        return {name: ABSENT if item is None else _absent_keys(item) for name, item in value.items()}
    return value
