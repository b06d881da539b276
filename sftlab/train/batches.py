"""Divide the rows of an optimizer step among ranks and micro-batches with little padding and equal work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler

if TYPE_CHECKING:
    from datasets import Dataset


def row_lengths(rows: Dataset) -> list[int]:
    """Number of tokens of each row."""
    import pyarrow.compute

    lengths: list[int] = pyarrow.compute.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_pylist()
    return lengths


class StepSampler(BatchRebalanceSampler):  # type: ignore[misc]
    """Micro-batches of one rank. Each optimizer step has the rows that random sampling with this seed would give it.

    The rows of a step are sorted by length and divided into one micro-batch per rank and accumulation step, long rows
    into smaller ones. Without padding (``padded`` is false) the rows of a micro-batch are one sequence. The loss is
    averaged over the tokens of the whole step, so it does not depend on the division.

    A last step with fewer rows than micro-batches is filled with row number ``len(lengths)``, which must have no
    target. (The class of transformers fills it with rows that then count twice, and ignores the seed.)
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        rows_per_step: int,
        ranks: int,
        micro_batches: int,
        seed: int,
        hidden: int,
        padded: bool = True,
        rank: int = 0,
    ) -> None:
        super().__init__(
            [*lengths, 1],
            effective_batch_size=rows_per_step,
            dp_size=ranks,
            grad_accum=micro_batches,
            seed=seed,
            rank=rank,
            drop_last=False,
        )
        self.rows = len(lengths)
        self.padded = padded
        self.num_global_batches = -(-self.rows // rows_per_step)
        # Operations per token of a causal layer: 4 × length × hidden for attention scores, 24 × hidden² for matrices.
        self.QUADRATIC_COST_COEF = 1 / (6 * hidden)

    def tokens(self, batch: Sequence[int]) -> int:
        """Number of tokens that a micro-batch computes, padding included."""
        lengths = [self.lengths[row] for row in batch]
        return len(lengths) * max(lengths) if self.padded else sum(lengths)

    def _group_cost(self, group: Sequence[tuple[int, int]]) -> float:
        if self.padded or not group:
            return float(super()._group_cost(group))
        return float(sum(self._cost(1, length) for _, length in group))

    def __iter__(self) -> Iterator[list[int]]:
        """Row numbers of each micro-batch of this rank in an epoch."""
        for step in self.steps():
            yield from step[self.rank]

    def steps(self) -> Iterator[list[list[list[int]]]]:
        """Row numbers by step, rank and micro-batch."""
        # The same order as that of accelerate's SeedableRandomSampler.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        fewest = self.dp_size * self.grad_accum
        for first in range(0, self.rows, self.effective_batch_size):
            rows = order[first : first + self.effective_batch_size]
            rows += [self.rows] * (fewest - len(rows))
            yield self._assign(rows, [self.lengths[row] for row in rows])
