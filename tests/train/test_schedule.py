"""Which steps of a job depend on its length, and whether its schedule fits into it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sftlab.config import Config
from sftlab.errors import ConfigError
from sftlab.instance.machine import Machine
from sftlab.results import SplitCounts, TokenCounts
from sftlab.train.schedule import check_length, decay_steps

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
