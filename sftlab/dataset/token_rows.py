"""Tokenised rows in Arrow files, as training reads them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.dataset.prompt import Tokens
from sftlab.records import IGNORED


def read_rows(folder: Path, split: str) -> Any:
    """Return the rows of a split (``input_ids`` and ``labels``) as a ``datasets.Dataset``, without reading them."""
    from datasets import Dataset as Table

    return Table.from_file(str(folder / f"{split}.arrow"))


def schema() -> Any:
    """Return the columns of the rows."""
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    return pa.schema([("input_ids", tokens), ("labels", tokens)])


def write_rows(folder: Path, split: str, batches: Iterable[Any]) -> None:
    """Write record batches with ``input_ids`` and ``labels`` so that ``read_rows`` reads them."""
    import pyarrow as pa

    with pa.OSFile(str(folder / f"{split}.arrow"), "wb") as out, closing(pa.ipc.new_stream(out, schema())) as writer:
        for batch in batches:
            writer.write_batch(batch)


def labels_of(row: Tokens, ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return ``row.labels`` as far as ``ids`` go."""
    labels = np.full_like(ids, IGNORED)
    end = 0
    for segment in row.segments:
        start, end = end, end + len(segment.ids)
        if segment.supervised:
            labels[start:end] = ids[start:end]
    return labels


def record_batch(ids: list[NDArray[np.int32]], labels: list[NDArray[np.int32]]) -> Any:
    """Return rows as a record batch of the file."""
    import pyarrow as pa
    from pyarrow import Array, ListArray, int32, py_buffer

    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)

    def column(rows: list[NDArray[np.int32]]) -> Any:
        # pyarrow.array would import pandas.
        values = np.concatenate(rows) if rows else np.array([], dtype=np.int32)
        flat = Array.from_buffers(int32(), len(values), [None, py_buffer(values)])
        return ListArray.from_arrays(Array.from_buffers(int32(), len(offsets), [None, py_buffer(offsets)]), flat)

    return pa.record_batch([column(ids), column(labels)], ["input_ids", "labels"])
