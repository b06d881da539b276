"""The optimizer steps of a job: how many there are, which are validated, and which other jobs share."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil

from sftlab.config import TrainConfig
from sftlab.errors import ConfigError, Problem, shown
from sftlab.instance.machine import Machine
from sftlab.results import TokenCounts

# Schedules whose learning rate follows from the step, or from the validation losses.
INDEPENDENT = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class Timeline:
    """The optimizer steps of a job, from 1 to ``total``. Step 0 is the untrained model."""

    train: TrainConfig
    steps_per_epoch: int

    @property
    def total(self) -> int:
        """Optimizer steps of the job, if it does not stop early."""
        return self.train.max_steps or self.train.num_train_epochs * self.steps_per_epoch

    def evaluates(self, step: int) -> bool:
        """Whether a step has a validation and a checkpoint that can be selected."""
        if step == 0:
            return self.train.eval_on_start
        return step == self.total or step // self._interval > (step - 1) // self._interval

    def previous(self, step: int) -> int:
        """The last validated step before a step; 0 if there is none."""
        return ceil((step - 1) // self._interval * self._interval)

    @property
    def evaluations(self) -> int:
        """Number of validations, that of step 0 included."""
        last = not self.total // self._interval > (self.total - 1) // self._interval
        return self.train.eval_on_start + self.total // self._interval + last

    @property
    def evaluations_per_epoch(self) -> float:
        """Mean number of validations per epoch, without those of step 0 and of a last step between two others."""
        return float(self.steps_per_epoch / self._interval)

    @cached_property
    def forks(self) -> frozenset[int]:
        """Steps from which a job with fewer or more epochs may resume: they need the state of the optimizer.

        The last shared step of each number of epochs. A constant schedule needs none where there is a validation: a
        shorter job has the same checkpoints, and a longer one resumes from the last step.
        """
        decay = decay_steps(self.train)
        if decay is None:
            return frozenset()
        shorter = {
            end - decay
            for end in range(self.steps_per_epoch, self.total, self.steps_per_epoch)
            if end > decay and (decay or not self.evaluates(end))
        }
        return frozenset({*shorter, max(0, self.total - decay)} - {0})

    @property
    def _interval(self) -> Fraction:
        """Steps between validations. The first step at or after a multiple of them is validated."""
        every = self.train.eval_steps
        if every is None:
            return Fraction(self.steps_per_epoch)
        # Of the number as it is written: 0.1 as a binary fraction would miss the ends of epochs.
        steps = Fraction(repr(every)) * (1 if every >= 1 else self.steps_per_epoch)
        return max(steps, Fraction(1))


def timeline(counts: TokenCounts, train: TrainConfig, machine: Machine) -> Timeline | None:
    """The steps of a job; None with packing, where the number of sequences is not known before."""
    if train.packing:
        return None
    return Timeline(train, ceil(counts.train.rows / machine.effective_batch(train)))


def described(counts: TokenCounts, train: TrainConfig, machine: Machine) -> str:
    """The length of a job for logs: steps, epochs and validations as far as they are known."""
    steps = timeline(counts, train, machine)
    if steps is None:
        return f"{train.max_steps} steps" if train.max_steps else f"{train.num_train_epochs} epochs"
    return f"{steps.total} steps ({steps.total / steps.steps_per_epoch:.4g} epochs), {steps.evaluations} validations"


def check_length(counts: TokenCounts, train: TrainConfig, machine: Machine) -> None:
    """Refuse a schedule whose warm-up and decay take more steps than the job has.

    Raises:
        ConfigError: they do; transformers would silently drop a part of them.
    """
    if train.lr_scheduler_type != "warmup_stable_decay":
        return
    steps = timeline(counts, train, machine)
    total = train.max_steps if steps is None else steps.total
    if total is None:
        return
    decay = int(train.lr_scheduler_kwargs["num_decay_steps"])
    warmup = train.warmup_steps if train.warmup_steps >= 1 else train.warmup_steps * total
    if warmup + decay > total:
        room = total - warmup
        length = "train.num_train_epochs" if train.max_steps is None else "train.max_steps"
        raise ConfigError(
            Problem(
                "train.lr_scheduler_kwargs.num_decay_steps",
                shown(decay),
                f"warm-up ({warmup:g} steps) and decay take more than the {total} steps of the job",
                (f"set num_decay_steps to at most {int(room)}" if room >= 1 else "lower train.warmup_steps")
                + f", or raise {length}",
            )
        )


def depends_on_length(train: TrainConfig) -> bool:
    """Whether the learning rate depends on the number of steps of a job, so that a stopped job is not a shorter one."""
    return train.lr_scheduler_type not in INDEPENDENT


def decay_steps(train: TrainConfig) -> int | None:
    """Optimizer steps at the end of a job whose learning rate depends on the length of the job.

    Up to there, two jobs that differ only in ``num_train_epochs`` or ``max_steps`` have the same weights: the
    checkpoints of the shorter job can be copied from the longer one, and the longer job can resume from the shorter
    one.

    The result is 0 for a constant schedule and the length of the decay for ``warmup_stable_decay``. It is None if every
    step depends on the length (cosine, linear, a warm-up that is a fraction of the steps), if checkpoints are deleted
    (save_total_limit) or if the length depends on the validation losses (early_stopping_patience).
    """
    if train.save_total_limit is not None or train.early_stopping_patience is not None:
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
