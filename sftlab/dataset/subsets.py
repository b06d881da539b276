"""Nested subsets of the training rows (train.data_share), for learning curves."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence

from sftlab.dataset.arrow_examples import Batch, Examples


def subset(splits: Mapping[str, Examples], share: float, seed: int) -> tuple[list[Iterator[Batch]], dict[str, int]]:
    """The batches of each split, and their numbers of rows; of ``train`` a share."""
    rows, batches = {name: len(examples) for name, examples in splits.items()}, []
    for name, examples in splits.items():
        if name == "train" and share < 1:
            places = nested(len(examples), share, seed)
            rows[name] = len(places)
            batches.append(chosen(examples.batches(), places))
        else:
            batches.append(examples.batches())
    return batches, rows


def nested(count: int, share: float, seed: int) -> list[int]:
    """The places of the rows that a share uses, in order. Those of a smaller share are among those of a larger one."""
    order = random.Random(seed).sample(range(count), count)
    return sorted(order[: max(1, math.ceil(share * count - 1e-9))])


def chosen(batches: Iterator[Batch], places: Sequence[int]) -> Iterator[Batch]:
    """Leave only the rows at these places, which are in order."""
    start, first = 0, 0
    for batch in batches:
        end, last = start + len(batch.column), first
        while last < len(places) and places[last] < end:
            last += 1
        if last > first:
            yield Batch(batch.column.take([place - start for place in places[first:last]]))
        start, first = end, last
