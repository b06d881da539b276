"""Which steps of a job depend on its length, and whether its schedule fits into it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sftlab.config import Config
from sftlab.errors import ConfigError
from sftlab.instance.machine import Machine
from sftlab.results import SplitCounts, TokenCounts
from sftlab.train.schedule import Timeline, check_length, decay_steps, described

Compose = Callable[..., Config]
STABLE = [
    "train.lr_scheduler_type=warmup_stable_decay",
    "train.warmup_steps=2",
    "+train.lr_scheduler_kwargs.num_decay_steps=3",
]


def counts(rows: int) -> TokenCounts:
    split = SplitCounts(rows=rows, tokens=9, supervised=4, truncated=0, left_out=0, longest=9)
    return TokenCounts(train=split, validation=split, prompt_bos=1, turn_ends=[])


@pytest.mark.parametrize(
    ("overrides", "decay"),
    [
        (["train.lr_scheduler_type=constant"], 0),
        (["train.lr_scheduler_type=constant", "train.warmup_steps=0.1"], 0),
        (["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=5"], 0),
        (["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=0"], 0),
        (["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=0.1"], None),
        (STABLE, 3),
        ([*STABLE, "train.warmup_steps=0.1"], None),
        (["train.lr_scheduler_type=cosine", "train.warmup_steps=0"], None),
        (["train.lr_scheduler_type=linear"], None),
        (["train.lr_scheduler_type=constant", "train.save_total_limit=2"], None),
        (["train.lr_scheduler_type=constant", "train.early_stopping_patience=2"], None),
    ],
)
def test_epochs_are_shared_only_if_the_schedule_allows(
    config: Compose, overrides: list[str], decay: int | None
) -> None:
    assert decay_steps(config(*overrides).train) == decay


def test_a_decay_longer_than_the_job_is_refused(config: Compose) -> None:
    machine = Machine("cpu", "cpu", 1, "sdpa")
    cfg = config(*STABLE, "train.num_train_epochs=1", "train.per_device_train_batch_size=4")
    check_length(counts(20), cfg.train, machine)  # five steps: two of warm-up, three of decay
    with pytest.raises(ConfigError, match=r"num_decay_steps=3: .* 4 steps .* at most 2"):
        check_length(counts(16), cfg.train, machine)
    limited = config(*STABLE, "train.max_steps=4", "train.per_device_train_batch_size=4")
    with pytest.raises(ConfigError, match=r"4 steps of the job.* or raise train\.max_steps"):
        check_length(counts(20), limited.train, machine)


@pytest.mark.parametrize(
    ("overrides", "validated"),
    [
        ([], [10, 20]),
        (["train.max_steps=14"], [10, 14]),
        (["train.max_steps=24"], [10, 20, 24]),  # more than the epochs
        (["train.eval_steps=6"], [6, 12, 18, 20]),
        (["train.eval_steps=1", "train.max_steps=3", "train.eval_on_start=true"], [0, 1, 2, 3]),
        (["train.eval_steps=100"], [20]),
        (["train.eval_steps=0.5"], [5, 10, 15, 20]),
        (["train.eval_steps=0.25"], [3, 5, 8, 10, 13, 15, 18, 20]),
        (["train.eval_steps=0.2"], list(range(2, 21, 2))),
        (["train.eval_steps=0.1", "train.eval_on_start=true"], list(range(21))),
        (["train.eval_steps=0.01"], list(range(1, 21))),
        (["train.eval_steps=0.8"], [8, 16, 20]),
    ],
)
def test_validated_steps(config: Compose, overrides: list[str], validated: list[int]) -> None:
    timeline = Timeline(config("train.num_train_epochs=2", *overrides).train, steps_per_epoch=10)
    steps = range(timeline.total + 1)
    assert [step for step in steps if timeline.evaluates(step)] == validated
    assert timeline.evaluations == len(validated)
    for step in steps[1:]:
        assert timeline.previous(step) == max([0, *(before for before in validated if before < step)])


def test_a_fraction_of_an_epoch_meets_the_ends_of_all_epochs(config: Compose) -> None:
    """Also those that are no binary fractions."""
    for fraction in (0.1, 0.2, 0.05):
        timeline = Timeline(config("train.num_train_epochs=30", f"train.eval_steps={fraction}").train, 1237)
        assert all(timeline.evaluates(1237 * epoch) for epoch in range(1, 31))
        assert timeline.evaluations == round(30 / fraction)


@pytest.mark.parametrize(
    ("overrides", "forks"),
    [
        (["train.lr_scheduler_type=cosine"], set()),
        (["train.lr_scheduler_type=constant"], {30}),  # a shorter job is a copy
        (["train.lr_scheduler_type=constant", "train.eval_steps=8"], {10, 20, 30}),
        (["train.lr_scheduler_type=constant", "train.max_steps=25"], {25}),
        (STABLE, {7, 17, 27}),
        ([*STABLE, "train.max_steps=12"], {7, 9}),
    ],
)
def test_steps_where_jobs_of_another_length_resume(config: Compose, overrides: list[str], forks: set[int]) -> None:
    assert Timeline(config("train.num_train_epochs=3", *overrides).train, 10).forks == forks


def test_the_length_is_described(config: Compose) -> None:
    machine = Machine("cpu", "cpu", 1, "sdpa")
    cfg = config("train.max_steps=7", "train.eval_steps=0.5", "train.per_device_train_batch_size=4")
    assert described(counts(16), cfg.train, machine) == "7 steps (1.75 epochs), 4 validations"
    packed = cfg.train.model_copy(update={"packing": True})
    assert described(counts(16), packed, machine) == "7 steps"
