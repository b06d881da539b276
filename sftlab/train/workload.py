"""The longest batches of a training, and the tokens of an epoch, for one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import NamedTuple

from sftlab.config import TrainConfig
from sftlab.dataset.tokenize import SPLITS, Tokenized
from sftlab.instance.machine import Machine
from sftlab.train.counting import Batch
from sftlab.train.schedule import Timeline

DRAWN_STEPS = 200  # steps from which the padding of a longer epoch is estimated


class Row(NamedTuple):
    """Number of tokens of a row, the position of its first target, and the tokens without a target after it."""

    length: int
    first_target: int
    between: int = 0


@dataclass(frozen=True)
class Workload:
    """Longest training and validation batch, and the tokens of an epoch with its validations, padding included.

    ``epochs`` is the length of the job.
    """

    longest: Batch
    evaluated: Batch
    train_tokens: int
    eval_tokens: int
    epochs: float


def workload(tokens: Tokenized, train: TrainConfig, machine: Machine, hidden: int) -> Workload:
    """What one process computes in an epoch with its validations; ``hidden`` is the width of the model."""
    splits = rows_by_split(tokens)
    longest, evaluated = longest_batches(splits, train)
    lengths = [row.length for row in splits["validation"]]
    size = train.per_device_eval_batch_size
    groups = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    eval_tokens = sum(max(group) * len(group) for group in groups) // machine.world_size
    lengths = [row.length for row in splits["train"]]
    if train.packing:
        count = max(1, round(sum(lengths) / machine.world_size / longest.length))
        steps, train_tokens = ceil(count / machine.accumulation(train)), count * longest.length
    else:
        steps = ceil(len(lengths) / machine.effective_batch(train))
        train_tokens = step_tokens(lengths, train, machine, hidden)
    timeline = Timeline(train, steps)
    eval_tokens = round(eval_tokens * timeline.evaluations_per_epoch)
    return Workload(longest, evaluated, train_tokens, eval_tokens, timeline.total / steps)


def rows_by_split(tokens: Tokenized) -> dict[str, list[Row]]:
    """The tokenised rows of training and validation."""
    return {
        split: [Row(*row) for row in zip(*(lengths.tolist() for lengths in tokens.lengths(split)), strict=True)]
        for split in SPLITS
    }


def longest_batches(splits: Mapping[str, Sequence[Row]], train: TrainConfig) -> tuple[Batch, Batch]:
    """The longest batch of training and of validation."""
    evaluated = _padded(sorted(splits["validation"])[-train.per_device_eval_batch_size :])
    size = train.per_device_train_batch_size
    if train.packing:
        total = sum(row.length for row in splits["train"])
        length = size * train.max_length
        targets = length * _targets(splits["train"]) // total
        return Batch(1, length, targets, targets), evaluated
    rows = sorted(splits["train"])[-size:]
    if train.extra.get("padding_free"):  # the rows of a batch are one sequence
        targets = _targets(rows)
        return Batch(1, sum(row.length for row in rows), targets, targets), evaluated
    return _padded(rows), evaluated


def _padded(rows: Sequence[Row]) -> Batch:
    length, first = max(row.length for row in rows), min(row.first_target for row in rows)
    return Batch(len(rows), length, length - first, _targets(rows))


def _targets(rows: Sequence[Row]) -> int:
    return sum(row.length - row.first_target - row.between for row in rows)


def step_tokens(lengths: Sequence[int], train: TrainConfig, machine: Machine, hidden: int) -> int:
    """Tokens of an epoch on the rank that has the most in each step, padding included.

    For a long epoch they are extrapolated from its first ``DRAWN_STEPS`` steps.
    """
    from sftlab.train.batches import StepSampler

    per_step = machine.effective_batch(train)
    sampler = StepSampler(
        lengths,
        rows_per_step=per_step,
        ranks=machine.world_size,
        micro_batches=machine.accumulation(train),
        seed=0,
        hidden=hidden,
        padded=not train.extra.get("padding_free"),
    )
    steps = list(islice(sampler.steps(), DRAWN_STEPS))
    tokens = sum(max(sum(map(sampler.tokens, batches)) for batches in ranks) for ranks in steps)
    return round(tokens * max(1.0, len(lengths) / (len(steps) * per_step)))
