"""Number of optimizer steps of a job, and how many of them depend on it through the learning rate schedule."""

from __future__ import annotations

from math import ceil

from sftlab.config import TrainConfig
from sftlab.errors import ConfigError, Problem, shown
from sftlab.instance.machine import Machine
from sftlab.results import TokenCounts


def steps(counts: TokenCounts, train: TrainConfig, machine: Machine) -> int | None:
    """Optimizer steps of a job; None with packing, where the number of sequences is not known before."""
    if train.packing:
        return None
    return train.num_train_epochs * ceil(counts.train.rows / machine.effective_batch(train))


def check_length(counts: TokenCounts, train: TrainConfig, machine: Machine) -> None:
    """Refuse a schedule whose warm-up and decay take more steps than the job has.

    Raises:
        ConfigError: they do; transformers would silently drop a part of them.
    """
    if train.lr_scheduler_type != "warmup_stable_decay" or (total := steps(counts, train, machine)) is None:
        return
    decay = int(train.lr_scheduler_kwargs["num_decay_steps"])
    warmup = train.warmup_steps if train.warmup_steps >= 1 else train.warmup_steps * total
    if warmup + decay > total:
        room = total - warmup
        raise ConfigError(
            Problem(
                "train.lr_scheduler_kwargs.num_decay_steps",
                shown(decay),
                f"warm-up ({warmup:g} steps) and decay take more than the {total} steps of the job",
                (f"set num_decay_steps to at most {int(room)}" if room >= 1 else "lower train.warmup_steps")
                + ", or raise train.num_train_epochs",
            )
        )


def decay_steps(train: TrainConfig) -> int | None:
    """Optimizer steps at the end of a job whose learning rate depends on the length of the job.

    Up to there, two jobs that differ only in ``num_train_epochs`` have the same weights: the checkpoints of the shorter
    job can be copied from the longer one, and the longer job can resume from the shorter one.

    The result is 0 for a constant schedule and the length of the decay for ``warmup_stable_decay``. It is None if every
    step depends on the length (cosine, linear, a warm-up that is a fraction of the steps) or if checkpoints are deleted
    (save_total_limit).
    """
    if train.save_total_limit is not None:
        return None
    warmup_is_fraction = 0 < train.warmup_steps < 1
    match train.lr_scheduler_type:
        case "constant":  # has no warm-up, whatever train.warmup_steps is
            return 0
        case "constant_with_warmup" if not warmup_is_fraction:
            return 0
        case "warmup_stable_decay" if not warmup_is_fraction:
            return int(train.lr_scheduler_kwargs["num_decay_steps"])
    return None
