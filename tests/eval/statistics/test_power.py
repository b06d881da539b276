from __future__ import annotations

import math

import numpy as np
import pytest
import scipy  # which imports scipy.stats when a test uses it

from sftlab.eval.statistics import (
    compare_scores,
    detectable_mean_difference,
    differences,
    holm,
    minimal_detectable_difference,
)
from sftlab.eval.statistics.paired import p_of_changes


def connor(difference: float, changed: float, alpha: float, power: float) -> float:
    deviate = scipy.stats.norm.ppf(1 - alpha / 2) * math.sqrt(changed)
    return float((deviate + scipy.stats.norm.ppf(power) * math.sqrt(changed - difference**2)) ** 2 / difference**2)


@pytest.mark.parametrize(("n", "share"), [(466, 0.2), (2000, 0.1), (1273, 0.4)])
def test_minimal_detectable_difference_against_connor(n: int, share: float) -> None:
    difference = minimal_detectable_difference(n, share)
    assert 0 < difference <= share
    assert connor(difference, share, 0.05, 0.8) == pytest.approx(n, rel=0.03)


@pytest.mark.parametrize(
    ("n", "share", "power", "freedom"),
    [(100, 0.3, 0.8, math.inf), (466, 0.2, 0.9, math.inf), (24, 0.1, 0.8, math.inf), (100.7, 0.3, 0.8, 9)],
)
def test_minimal_detectable_difference_by_simulation(n: float, share: float, power: float, freedom: float) -> None:
    difference = minimal_detectable_difference(n, share, power=power, freedom=freedom)
    rng = np.random.default_rng(5)
    share = max(share, difference)
    gain, lose = (share + difference) / 2, (share - difference) / 2
    for factor, expected in ((1, power), (0.7, None)):
        counts = rng.multinomial(int(n), [gain * factor, lose * factor, 1 - (gain + lose) * factor], size=4000)
        found = np.mean(p_of_changes(counts[:, 0], counts[:, 1], int(n), freedom) < 0.05)
        if expected is None:
            assert found < power - 0.05
        else:
            assert found == pytest.approx(expected, abs=0.025)


def test_minimal_detectable_difference_has_ends() -> None:
    assert minimal_detectable_difference(5) == math.inf  # five gained answers of five: p = 0.0625
    assert minimal_detectable_difference(6) == pytest.approx(0.8 ** (1 / 6), abs=1e-4)  # all six must be gained
    assert minimal_detectable_difference(0) == math.inf
    assert minimal_detectable_difference(100, freedom=0) == math.inf
    assert minimal_detectable_difference(6, freedom=2) == math.inf
    assert 0 < minimal_detectable_difference(466, 0.0) < minimal_detectable_difference(466, 0.2)
    assert minimal_detectable_difference(1000) < minimal_detectable_difference(500) < 0.2
    assert minimal_detectable_difference(466, 0.1) < minimal_detectable_difference(466, 0.3)
    assert minimal_detectable_difference(466) < minimal_detectable_difference(466, freedom=10)
    assert 0.005 < minimal_detectable_difference(20_000) < 0.01
    assert 0 < minimal_detectable_difference(50, 1.0) < 1
    with pytest.raises(ValueError, match="changed = 20"):
        minimal_detectable_difference(466, 20)


@pytest.mark.parametrize("groups", [None, 40])
def test_detectable_mean_difference_by_simulation(groups: int | None) -> None:
    rng = np.random.default_rng(6)
    names = None if groups is None else [str(row % groups) for row in range(120)]

    def drawn(mean: float) -> list[float]:
        own = rng.normal(0, 0.1, 120) if groups is None else np.tile(rng.normal(0, 0.1, groups), 3)
        return list(np.clip(0.5 + mean + own, 0, 1))

    half = [0.5] * 120
    found = [detectable_mean_difference(differences(half, drawn(0), names)) for _ in range(20)]
    difference = float(np.mean(found))
    better = [differences(half, drawn(difference), names).p_value(0.0) < 0.05 for _ in range(300)]
    assert np.mean(better) == pytest.approx(0.8, abs=0.07)


def test_detectable_mean_difference_has_ends() -> None:
    same = [0.5] * 50
    always = detectable_mean_difference(differences(same, same, None))
    assert always == pytest.approx(40 ** (1 / 50) - 1, abs=1e-4)  # even with no spread, one row may be ruined
    assert detectable_mean_difference(differences([0.5], [0.5], None)) == math.inf
    assert detectable_mean_difference(differences(same, same, ["same"] * 50)) == math.inf
    with pytest.raises(ValueError, match="power = 2"):
        detectable_mean_difference(differences(same, same, None), power=2)


def test_holm_by_hand() -> None:
    # Sorted: 0.01 · 3, then 0.02 · 2, then 0.9 · 1, and never below the one before; at most 1.
    assert holm([0.02, 0.9, 0.01]) == pytest.approx([0.04, 0.9, 0.03])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []


def test_p_is_small_enough_for_any_number_of_comparisons() -> None:
    p = compare_scores([0.4] * 100, [0.6] * 100, groups=None, alpha=0.05).p_value
    assert max(holm([p] * 100)) < 1e-5
