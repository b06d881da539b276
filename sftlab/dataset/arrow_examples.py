"""Examples in Arrow files: read when they are used, since a dataset may be larger than the memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sftlab.records import Example

BATCH = 500  # examples of a record batch; every batch of a file but the last one has as many
SORTED = 2**26  # bytes of examples that are in memory, with copies, while a file is written in another order
PASSES = 16  # over a file that is smaller than so many times SORTED, so that its memory is a part of its size


@dataclass(frozen=True)
class Batch:
    """Consecutive examples of a file, which are parsed when they are used, perhaps in another process."""

    column: Any

    def examples(self) -> list[Example]:
        """Parse the examples."""
        return [Example(**json.loads(text)) for text in self.column.to_pylist()]


class Examples(Sequence[Example]):
    """The examples in an Arrow file, in its order. Reading them in order is fast; another order is slower."""

    def __init__(self, path: Path) -> None:
        """Open a file that ``reorder`` has written."""
        self.path = path
        self._file = open_file(path)
        last = self._file.num_record_batches - 1
        self._length = 0 if last < 0 else last * BATCH + self._file.get_batch(last).num_rows
        self._recent: tuple[int, list[Example]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number, row = divmod(range(len(self))[index], BATCH)
        if self._recent[0] != number:
            self._recent = (number, self._batch(number).examples())
        return self._recent[1][row]

    def __iter__(self) -> Iterator[Example]:
        for batch in self.batches():
            yield from batch.examples()

    def __eq__(self, other: object) -> bool:
        """Return whether another sequence has the same examples."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(left == right for left, right in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(self.path)

    def batches(self) -> Iterator[Batch]:
        """Yield the examples in batches."""
        return map(self._batch, range(self._file.num_record_batches))

    def _batch(self, number: int) -> Batch:
        return Batch(self._file.get_batch(number).column("example"))


def open_file(path: Path) -> Any:
    """Open an Arrow file without mapping it into memory."""
    from pyarrow import OSFile, ipc

    return ipc.open_file(OSFile(str(path)))


def text_of(example: Example) -> str:
    """Return an example as it is stored."""
    return json.dumps(vars(example), ensure_ascii=False)


def batch_of(texts: Iterable[str]) -> Any:
    """Return a record batch of stored examples."""
    from pyarrow import Array, py_buffer, record_batch, string

    # pyarrow.array would import pandas.
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    column = Array.from_buffers(string(), len(encoded), [None, py_buffer(offsets), py_buffer(b"".join(encoded))])
    return record_batch([column], ["example"])


def write(path: Path, batches: Iterable[Any]) -> None:
    """Write record batches of one schema to a file."""
    from pyarrow import OSFile, ipc

    with OSFile(str(path), "wb") as out:
        writer = None
        for batch in batches:
            writer = writer or ipc.new_file(out, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()


def reorder(sources: Sequence[Path], rows: NDArray[np.int64], target: Path) -> None:
    """Write the examples in some rows of files, in the order of ``rows``, to another file of batches of ``BATCH``.

    Rows are numbered through all files, and may occur several times. The files are read once for every ``SORTED`` bytes
    of them, or in ``PASSES``, so that few examples are in memory. No file has no rows.
    """
    import pyarrow as pa

    schema = pa.schema([("example", pa.string())])
    total = sum(source.stat().st_size for source in sources)
    size = min(SORTED, max(total // PASSES, SORTED // 4))
    step = size * len(np.unique(rows)) // max(total, 1)
    step = max(step // BATCH, 1) * BATCH
    with pa.OSFile(str(target), "wb") as out, closing(pa.ipc.new_file(out, schema)) as writer:
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            table = pa.Table.from_arrays([_taken(sources, part)], schema=schema)
            writer.write_table(table, max_chunksize=BATCH)


def _taken(sources: Sequence[Path], rows: NDArray[np.int64]) -> Any:
    """Return the column ``example`` of rows in their order."""
    import pyarrow as pa

    ascending = np.sort(rows)
    before, parts = 0, []
    for file in map(open_file, sources):
        for number in range(file.num_record_batches):
            column = file.get_batch(number).column("example")
            first, last = np.searchsorted(ascending, [before, before + len(column)])
            if last > first:
                parts.append(column.take(_indices(ascending[first:last] - before)))
            before += len(column)
    column = pa.concat_arrays(parts)
    parts.clear()  # of its memory too
    # The place of each row in ascending order, the first one of a row that occurs several times.
    return column.take(_indices(np.searchsorted(ascending, rows)))


def _indices(rows: NDArray[np.int64]) -> Any:
    from pyarrow import Array, int64, py_buffer

    return Array.from_buffers(int64(), len(rows), [None, py_buffer(rows)])
