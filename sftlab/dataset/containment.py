"""Compute which set of a collection contains the largest share of a given set: exact, for millions of sets."""

# Libraries for near duplicates (datasketch and other MinHash indexes) estimate Jaccard similarity, which misses a short
# question inside a long row. This module computes exact containment.

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.integer[Any]]

BUDGETS = (2**10, 2**14, 2**18)  # holders looked up for one query, in turn, before it is compared with all
TABLE = 2**22  # cells of the tables in which queries are compared with all (16 MiB each)


class Containment:
    """Sets of 64-bit hashes (queries), and for each the set (holder) that contains the largest share of it.

    Holders are added in chunks, of which only members of queries are retained. Boilerplate makes every query share
    members with every holder, which gives too many pairs to compare and too much to retain. Therefore members that are
    in the same holders are merged: within a chunk when it is added, then over all chunks. Holders with the same members
    are merged too.
    """

    def __init__(self, members: Hashes, sizes: Indices) -> None:
        """Take the queries: the members of all, each once per query, and the number of members of each."""
        self._members, self._sizes = members, sizes
        self._vocabulary = _Vocabulary(_distinct(members))
        # Two sets are equal if the sums of random numbers of their members are equal.
        self._signatures = np.zeros(len(self._vocabulary), dtype=np.uint64)  # of the holders of each member
        self._places = np.zeros(len(self._vocabulary), dtype=np.int32)
        self._chunks: deque[_Chunk] = deque()
        self._count = 0

    def add(self, members: Hashes, sizes: Indices) -> None:
        """Add holders: the members of all, repeats allowed, and the number of members of each."""
        place, column = self._vocabulary.find(members)
        row = np.searchsorted(np.cumsum(sizes), place, side="right")
        row, column = np.divmod(_distinct(row * len(self._vocabulary) + column), len(self._vocabulary))
        start, self._count = self._count, self._count + len(sizes)
        if not len(row):
            return
        starts = _is_first(row)
        rows, row = row[starts], np.cumsum(starts) - 1
        is_column = np.zeros(len(self._vocabulary), dtype=bool)
        is_column[column] = True
        columns = np.flatnonzero(is_column)
        self._places[columns] = np.arange(len(columns))
        in_columns = self._places[column]
        holders = _sums(_random(start + rows)[row], in_columns, len(columns))
        self._signatures[columns] += holders
        _, first, groups = np.unique(holders, return_index=True, return_inverse=True)
        represents = np.zeros(len(columns), dtype=bool)
        represents[first] = True
        retained = represents[in_columns]
        self._chunks.append(
            _Chunk(
                rows=start + rows,
                signatures=_sums(_random(column), row, len(rows)),
                columns=columns.astype(np.int32),
                groups=groups.astype(np.int32),
                row=row[retained].astype(np.int32),
                group=groups[in_columns[retained]].astype(np.int32),
            )
        )

    def closest(self, skip: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the share of each query, and the first holder that contains it (-1 for none).

        Queries under ``skip`` are left out. To be called once, at the end.
        """
        hits, closest = np.zeros(len(self._sizes)), np.full(len(self._sizes), -1)
        used = np.flatnonzero(self._signatures)
        if not len(used):
            return hits, closest
        values, merged = np.unique(self._signatures[used], return_inverse=True)
        queries = self._queries(used, merged)
        first, holders = self._holders(used, merged)
        postings, weight, undecided = holders.tocsc(), np.zeros(len(values)), []
        for row in np.flatnonzero((np.diff(queries.indptr) > 0) & ~skip):
            span = slice(*queries.indptr[row : row + 2])
            members = queries.indices[span]
            weight[members] = queries.data[span]
            if match := _closest(members, weight, holders, postings):
                hits[row], closest[row] = match[0], first[match[1]]
            else:
                undecided.append(row)
            weight[members] = 0
        step = 1 + TABLE // (1 + max(holders.shape))
        for some in (undecided[start : start + step] for start in range(0, len(undecided), step)):
            score = np.ascontiguousarray((holders @ queries[some].T.toarray()).T)
            hits[some], closest[some] = score.max(axis=1), first[score.argmax(axis=1)]
        return hits / self._sizes, closest

    def _queries(self, used: Indices, merged: Indices) -> Any:
        """Return a sparse matrix with the number of merged members of each query."""
        place, column = _Vocabulary(self._vocabulary.values[used]).find(self._members)
        row = np.searchsorted(np.cumsum(self._sizes), place, side="right")
        return _matrix(row, merged[column], (len(self._sizes), merged.max() + 1))

    def _holders(self, used: Indices, merged: Indices) -> tuple[Indices, Any]:
        """Return the first row of each distinct holder, and a sparse matrix of their merged members."""
        from scipy import sparse

        self._places[used] = merged
        signatures = np.concatenate([chunk.signatures for chunk in self._chunks])
        is_first = np.zeros(len(signatures), dtype=bool)
        is_first[np.unique(signatures, return_index=True)[1]] = True  # in the order of rows: ties go to the first row
        first, parts, start = [], [], 0
        while self._chunks:
            chunk = self._chunks.popleft()
            distinct = is_first[start : start + len(chunk.rows)]
            start += len(chunk.rows)
            count = int(chunk.groups.max()) + 1
            members = _matrix(chunk.groups, self._places[chunk.columns], (count, merged.max() + 1))
            members.data[:] = 1
            parts.append(_matrix(chunk.row, chunk.group, (len(chunk.rows), count))[distinct] @ members)
            first.append(chunk.rows[distinct])
        return np.concatenate(first), sparse.vstack(parts, format="csr")


@dataclass(frozen=True)
class _Chunk:
    """The holders of a chunk that have members in the vocabulary."""

    rows: Indices
    """Number of each holder."""
    signatures: Hashes
    """Signature of its members."""
    columns: Indices
    """Places of the members in the vocabulary, each once."""
    groups: Indices
    """Group of each of these: those in the same holders of the chunk."""
    row: Indices
    """Pairs of a holder (its place in ``rows``) …"""
    group: Indices
    """… and a group."""


class _Vocabulary:
    """Sorted distinct hashes."""

    def __init__(self, values: Hashes) -> None:
        self.values = values
        # Most hashes are not in it: a table of the highest bits excludes nearly all before the slow search.
        bits = (4 * len(values)).bit_length()
        self.shift = np.uint64(64 - bits)
        self.table = np.zeros(1 << bits, dtype=bool)
        self.table[values >> self.shift] = True

    def __len__(self) -> int:
        return len(self.values)

    def find(self, hashes: Hashes) -> tuple[Indices, Indices]:
        """Return the places in ``hashes`` of those in the vocabulary, and their places in the vocabulary."""
        place = np.flatnonzero(self.table[hashes >> self.shift])
        column = np.searchsorted(self.values[:-1], hashes[place])
        known = self.values[column] == hashes[place]
        return place[known], column[known]


def _distinct(values: Any) -> Any:
    """Return the sorted distinct values."""
    values = np.sort(values)  # several times faster than numpy.unique, which hashes
    return values[_is_first(values)]


def _is_first(values: Any) -> NDArray[np.bool_]:
    """Return where sorted values differ from those before."""
    first = np.ones(len(values), dtype=bool)
    first[1:] = values[1:] != values[:-1]
    return first


def _random(numbers: Indices) -> Hashes:
    """Return a pseudo-random number for each number (SplitMix64)."""
    value = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _sums(values: Hashes, index: Indices, size: int) -> Hashes:
    """Return the sum, modulo 2**64, of the values with each index."""
    total = np.zeros(size, dtype=np.uint64)
    np.add.at(total, index, values)
    return total


def _matrix(rows: Indices, columns: Indices, shape: tuple[int, int]) -> Any:
    """Return a sparse matrix that counts the pairs of a row and a column."""
    from scipy import sparse

    return sparse.csr_array((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)


def _closest(members: Indices, weight: NDArray[Any], holders: Any, postings: Any) -> tuple[float, int] | None:
    """Return the largest total weight of ``members`` in a row of ``holders``, and the first such row.

    Only the rows with the rarest members are examined; None means that another row may contain as much.
    """
    frequency = postings.indptr[members + 1] - postings.indptr[members]
    order = np.argsort(frequency, kind="stable")
    members, total, examined = members[order], frequency[order].cumsum(), 0
    for known in np.searchsorted(total, BUDGETS, side="right"):
        if known == examined:
            continue
        examined = known
        rare, rest = members[:known], weight[members[known:]].sum()
        posted, owner = _entries(postings, rare)
        score = np.bincount(posted, weights=weight[rare][owner])
        held, _ = _entries(holders, np.array([score.argmax()]))
        rows = np.flatnonzero((score > 0) & (score + rest >= weight[held].sum()))
        held, owner = _entries(holders, rows)
        score = np.bincount(owner, weights=weight[held])
        if score.max() > rest:
            return float(score.max()), int(rows[score.argmax()])
    return None


def _entries(matrix: Any, lines: Indices) -> tuple[Indices, Indices]:
    """Concatenate the entries of lines of a compressed matrix; return them, and the index in ``lines`` of each."""
    start, length = matrix.indptr[lines], matrix.indptr[lines + 1] - matrix.indptr[lines]
    owner = np.repeat(np.arange(len(lines)), length)
    return matrix.indices[np.arange(len(owner)) + (start - length.cumsum() + length)[owner]], owner
