from __future__ import annotations

from itertools import pairwise

import pytest

from sftlab.dataset.arrow_examples import Batch
from sftlab.dataset.subsets import chosen, nested


def test_subsets_are_nested_and_as_large_as_their_share() -> None:
    parts = [nested(1000, share, 42) for share in (0.001, 0.12, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [1, 120, 250, 500, 1000]
    assert all(set(small) < set(large) for small, large in pairwise(parts))
    assert nested(1000, 0.5, 43) != parts[3]
    assert nested(3, 0.01, 1)  # never empty


def test_the_chosen_rows_are_those_at_the_places() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    batches = [Batch(pyarrow.array([f"{start + row}" for row in range(4)])) for start in (0, 4, 8)]
    left = [text for batch in chosen(iter(batches), [1, 3, 8, 11]) for text in batch.column.to_pylist()]
    assert left == ["1", "3", "8", "11"]
