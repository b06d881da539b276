"""Early stopping: what counts as a gain, when training stops, and what is recorded about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sftlab.config import Config
from sftlab.train.schedule import Timeline
from sftlab.train.stopping import Patience, gains

Compose = Callable[..., Config]


@pytest.mark.parametrize(("gain", "low", "high"), [(0.0, 0.01, 0.045), (0.03, 0.75, 1.0), (-0.03, 0.0, 0.001)])
def test_noise_is_rarely_a_gain_and_a_clear_gain_is_one(gain: float, low: float, high: float) -> None:
    """Rows of different lengths, with losses that differ more between rows than between validations."""
    rng = np.random.default_rng(7)
    found = 0
    for _ in range(1000):
        tokens = rng.integers(1, 60, 150).astype(float)
        before = rng.gamma(2, 0.5, 150)
        after = before - gain + rng.normal(0, 0.5, 150) / np.sqrt(tokens)
        losses = [np.column_stack([loss * tokens, tokens]).tolist() for loss in (before, after)]
        found += gains(*losses)
    assert low <= found / 1000 <= high


def test_what_cannot_be_told_is_no_gain() -> None:
    assert not gains([[9.0, 1]], [[1.0, 1]])  # a single row
    assert not gains([[9.0, 1], [9.0, 1], [9.0, 1]], [[1.0, 1], [1.0, 1], [float("nan"), 1]])
    assert gains([[9.0, 1], [9.0, 1], [0.0, 0]], [[1.0, 1], [1.1, 1], [0.0, 0]])


def test_a_rounding_error_in_every_row_is_no_gain() -> None:
    before = [[loss, 30.0] for loss in np.linspace(200, 260, 150)]
    rounded = [[loss * (1 - 6e-8), tokens] for loss, tokens in before]
    assert not gains(before, rounded)
    assert gains(before, [[loss * (1 - 6e-5), tokens] for loss, tokens in before])


def rows(loss: float) -> list[list[float]]:
    """Twenty rows around a loss; differences of up to 0.01 are within their noise."""
    noise = np.random.default_rng(int(loss * 1000)).normal(0, 0.02, 20)
    return [[loss + float(each), 1.0] for each in noise]


@pytest.mark.parametrize(
    ("losses", "stopped_after", "best"),
    [
        ([3.0, 2.0, 1.0, 0.9], None, 4),
        ([3.0, 3.5, 4.0, 1.0], 3, 1),
        ([3.0, 3.5, 1.0, 1.5, 1.2], 5, 3),
        ([3.0, 2.999, 2.998, 1.0], 3, 1),  # within the noise
    ],
)
def test_training_stops_after_validations_without_a_gain(
    losses: list[float], stopped_after: int | None, best: int, tmp_path: Path
) -> None:
    patience = Patience(limit=2)
    for step, loss in enumerate(losses, start=1):
        patience.observe(step, rows(loss))
        patience.write(tmp_path)
        patience = Patience.read(tmp_path)  # as after a kill
        if patience.exhausted:
            break
    assert (step if patience.exhausted else None) == stopped_after
    assert patience.step == best


def test_small_gains_add_up() -> None:
    patience = Patience(limit=3)
    for step in range(40):
        patience.observe(step, rows(3 - 0.006 * step))
    assert not patience.exhausted


@pytest.mark.parametrize(("schedule", "depends"), [("cosine", True), ("constant", False)])
def test_the_saving_is_recorded(config: Compose, schedule: str, depends: bool) -> None:
    cfg = config(f"train.lr_scheduler_type={schedule}", "train.num_train_epochs=2", "train.early_stopping_patience=2")
    timeline = Timeline(cfg.train, steps_per_epoch=10)
    patience = Patience(limit=2, step=4, waited=2)
    stop = patience.record(timeline, 8, 1e-4, seconds=16.0)
    assert stop is not None
    assert (stop.saved_steps, stop.saved_seconds, stop.best_step, stop.validations) == (12, 24.0, 4, 2)
    assert stop.depends_on_length is depends
    assert patience.record(timeline, 20, 1e-4, seconds=16.0) is None  # at the last step nothing is saved
    assert Patience(limit=2, step=4, waited=1).record(timeline, 8, 1e-4, seconds=16.0) is None
