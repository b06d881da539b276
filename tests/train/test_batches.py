"""Rows of an optimizer step, divided among ranks and micro-batches: the same rows, with less padding."""

from __future__ import annotations

import random
from itertools import chain

import pytest
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from sftlab.train.batches import StepSampler


def sampler(lengths: list[int], size: int, ranks: int, micro_batches: int, **changed: int) -> StepSampler:
    values = {"seed": 7, "hidden": 64, **changed}
    return StepSampler(
        lengths, rows_per_step=size * ranks * micro_batches, ranks=ranks, micro_batches=micro_batches, **values
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    size=st.integers(1, 5),
    ranks=st.integers(1, 3),
    micro_batches=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_every_step_has_the_rows_of_random_sampling_and_each_rank_as_many_batches(
    lengths: list[int], size: int, ranks: int, micro_batches: int, epoch: int
) -> None:
    drawn = SeedableRandomSampler(range(len(lengths)), data_seed=7)
    drawn.set_epoch(epoch)
    order, per_step = list(drawn), size * ranks * micro_batches
    of_ranks = [sampler(lengths, size, ranks, micro_batches, rank=rank) for rank in range(ranks)]
    for rows in of_ranks:
        rows.set_epoch(epoch)
    batches = [list(rows) for rows in of_ranks]
    steps = -(-len(lengths) // per_step)
    assert [len(of_rank) for of_rank in batches] == [len(rows) for rows in of_ranks] == [steps * micro_batches] * ranks
    assert all(map(len, chain(*batches)))
    for step in range(steps):
        places = range(step * micro_batches, (step + 1) * micro_batches)
        numbers = sorted(row for of_rank in batches for place in places for row in of_rank[place])
        wanted = sorted(order[step * per_step : (step + 1) * per_step])
        # A row without a target fills a micro-batch that would be empty.
        assert numbers == [*wanted, *[len(lengths)] * max(0, ranks * micro_batches - len(wanted))]


def test_seeds_and_epochs_have_different_orders() -> None:
    first, other = sampler([5] * 40, 4, 1, 2), sampler([5] * 40, 4, 1, 2, seed=99)
    orders = [list(first), list(other)]
    first.set_epoch(1)
    orders.append(list(first))
    assert all(left != right for left in orders for right in orders if left is not right)


def test_the_slowest_rank_has_little_padding() -> None:
    """16 rows on each of 4 ranks, with the lengths of MedQA-CoT: log-normal, a few of them very long."""
    draw = random.Random(1)
    lengths = [min(4000, round(draw.lognormvariate(6, 0.5))) for _ in range(6400)]

    def slowest(steps: list[list[list[int]]]) -> int:
        return sum(max(len(rows) * max(lengths[row] for row in rows) for rows in ranks) for ranks in steps)

    plain = list(SeedableRandomSampler(range(len(lengths)), data_seed=7))
    at_random = [
        [plain[first : first + 16] for first in range(step, step + 64, 16)] for step in range(0, len(plain), 64)
    ]
    balanced = [
        [micro_batches[0] for micro_batches in ranks] for ranks in sampler(lengths, 16, 4, 1, hidden=2560).steps()
    ]
    least = sum(lengths) / 4
    assert slowest(at_random) > 2 * least
    assert slowest(balanced) < 1.4 * least


def test_long_rows_count_for_their_attention() -> None:
    lengths = [8000, *[1000] * 15]
    narrow, wide = (next(sampler(lengths, 8, 2, 1, hidden=hidden).steps()) for hidden in (64, 65536))
    rows_beside_the_long_one = [min(len(rank[0]) for rank in step) for step in (narrow, wide)]
    assert rows_beside_the_long_one[0] <= rows_beside_the_long_one[1]
    assert rows_beside_the_long_one[0] == pytest.approx(1)


def test_without_padding_the_tokens_of_ranks_are_equal() -> None:
    draw = random.Random(1)
    lengths = [min(4000, round(draw.lognormvariate(6, 0.5))) for _ in range(640)]
    rows = StepSampler(
        lengths, rows_per_step=64, ranks=4, micro_batches=1, seed=7, hidden=1 << 20, padded=False
    )  # fmt: skip
    slowest = sum(max(sum(map(rows.tokens, batches)) for batches in ranks) for ranks in rows.steps())
    assert slowest < 1.1 * sum(lengths) / 4
