"""Tokenised rows in Arrow files, as training reads them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any


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
