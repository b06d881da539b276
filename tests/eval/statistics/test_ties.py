from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sftlab.eval.statistics import ties


def equally_good(kind: str, count: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], list[float], list[str]]:
    """Losses of checkpoints that differ by chance only: their tokens, and the group of each row."""
    rows, groups = 150, [str(row // 3) for row in range(150)]
    tokens = rng.integers(20, 200, rows).astype(float)
    hard = rng.normal(1.0, 0.5, rows)  # a row is hard for every checkpoint
    own = rng.normal(0, 0.05, (count, rows))
    if kind == "answers":
        return (rng.random((count, rows)) < rng.beta(1, 1, rows)).astype(float), [1.0] * rows, groups
    if kind == "groups":
        own += np.repeat(rng.normal(0, 0.1, (count, 50)), 3, axis=1)
    return (hard + own) * tokens, list(tokens), groups


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 30])
@pytest.mark.parametrize("kind", ["losses", "answers", "groups"])
def test_equally_good_checkpoints_are_seldom_called_worse(kind: str, count: int) -> None:
    rng = np.random.default_rng(count)
    wrong, alone, trials = 0, 0, 150
    for _ in range(trials):
        losses, tokens, groups = equally_good(kind, count, rng)
        wrong += not all(ties(losses.tolist(), tokens, groups if kind == "groups" else None))
        alone += kind == "groups" and not all(ties(losses.tolist(), tokens))
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert kind != "groups" or alone > 0.3 * trials


def test_the_level_is_used() -> None:
    rng = np.random.default_rng(7)
    wrong = [not all(ties(rng.normal(1, 0.1, (5, 50)).tolist(), [1.0] * 50, alpha=0.3)) for _ in range(300)]
    assert 0.2 < np.mean(wrong) < 0.4


def test_worse_checkpoints_are_found_among_many() -> None:
    rng = np.random.default_rng(6)
    tokens = rng.integers(20, 200, size=300)
    hard = rng.normal(1.0, 0.5, size=300)  # a row is hard for every checkpoint, so pairing matters

    def loss(offset: float) -> list[float]:
        return list((hard + offset + rng.normal(0, 0.02, size=300)) * tokens)

    losses = [loss(0.02), loss(0.0), loss(0.0005), loss(0.5)]
    assert ties(losses, list(tokens)) == [False, True, True, False]
    assert ties([*losses, *(loss(0.1) for _ in range(26))], list(tokens))[:4] == [False, True, True, False]


def test_losses_are_weighed_by_tokens() -> None:
    # By the mean over rows the second is lower, by the mean over tokens the first.
    losses = [[100.0, 2.0] * 30, [150.0, 1.0] * 30]
    assert ties(losses, [100.0, 1.0] * 30) == [True, False]


def test_a_rounding_error_in_every_row_is_a_tie() -> None:
    loss = np.random.default_rng(5).uniform(200, 260, 150)
    assert ties([loss * (1 + 6e-8), loss, loss * (1 + 6e-5)], [30.0] * 150) == [True, True, False]


def test_ends() -> None:
    assert ties([], []) == []
    assert ties([[1.0, 2.0]], [1, 1]) == [True]
    assert ties([[1.0], [9.0]], [1]) == [True, True]  # one row tells nothing apart
    assert ties([[1.0, 1.0], [9.0, 8.0]], [1, 1], ["same", "same"]) == [True, True]
    assert ties([[math.nan, 1.0], [2.0, 2.0], [math.inf, 1.0]], [1, 1]) == [False, True, False]
    assert ties([[1.0, 0.0, 1.0], [2.0, 0.0, 2.0]], [1, 0, 1]) == [True, False]
    assert ties([[1.0, 0.5, 2.0]] * 3, [1, 1, 1]) == [True, True, True]
    with pytest.raises(ValueError, match="no validation row"):
        ties([[math.nan]], [1])
    with pytest.raises(ValueError, match="no validation row"):
        ties([[0.0]], [0])
    with pytest.raises(ValueError, match="2 validation rows"):
        ties([[1.0]], [1, 1])
