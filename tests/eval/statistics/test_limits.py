from __future__ import annotations

import math

import numpy as np
import pytest
import scipy
from numpy.typing import NDArray

from sftlab.eval.statistics import Limits, compare, compare_scores, deciding_p, differences
from sftlab.eval.statistics.paired import changes, p_of_difference, tango
from sftlab.results import Comparison


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * both + [False] * gained + [True] * lost + [False] * neither
    b = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return a, b


def judge(gained: int, lost: int, n: int, *, smallest_gain: float = 0.0, margin: float | None = None) -> Comparison:
    a, b = answers(0, gained, lost, n - gained - lost)
    return compare(a, b, groups=None, alpha=0.05, limits=Limits(smallest_gain, margin))


def chances(n: int, gain: float, loss: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Every table of answers gained and lost that is not next to impossible, with its probability."""
    gained, lost = np.divmod(np.arange((n + 1) ** 2), n + 1)
    possible = gained + lost <= n
    gained, lost = gained[possible], lost[possible]
    chance = scipy.stats.multinomial.pmf(
        np.stack([gained, lost, n - gained - lost], axis=1), n, [gain, loss, 1 - gain - loss]
    )
    likely = chance > 1e-9
    return gained[likely], lost[likely], chance[likely]


@pytest.mark.parametrize("n", [60, 150, 250])
@pytest.mark.parametrize("margin", [0.02, 0.05, 0.1])
def test_a_loss_of_the_margin_is_seldom_called_acceptable(n: int, margin: float) -> None:
    rates = []
    for gain in (0.0, 0.02, 0.05, 0.1, 0.2):
        gained, lost, chance = chances(n, gain, gain + margin)
        p = p_of_difference(gained, lost, n, -margin) / 2
        acceptable = (p < 0.05) & (gained - lost > -margin * n)
        rates.append(float(chance[acceptable].sum()))
    assert max(rates) < 0.055, rates
    assert max(rates) > 0.02, rates


def test_a_gain_of_the_smallest_size_is_seldom_called_larger_or_smaller() -> None:
    for gain, loss in ((0.05, 0.02), (0.15, 0.12), (0.1, 0.07)):
        gained, lost, chance = chances(250, gain, loss)
        p = p_of_difference(gained, lost, 250, 0.03)
        assert 0.02 < chance[p < 0.05].sum() < 0.055


def test_the_test_of_a_limit_agrees_with_the_interval() -> None:
    gained, lost = np.divmod(np.arange(51**2), 51)
    low, high = tango(gained, lost, 120, 0.05)
    for limit in (-0.1, -0.05, -0.01, 0.02, 0.3):
        outside = (limit < low) | (limit > high)
        assert (outside == (p_of_difference(gained, lost, 120, limit) < 0.05)).all()


@pytest.mark.parametrize(("gained", "lost"), [(30, 33), (30, 24), (12, 10)])
def test_as_many_questions_as_needed_decide_in_four_of_five_cases(gained: int, lost: int) -> None:
    n, margin = 200, 0.05
    test = judge(gained, lost, n, margin=margin).noninferiority
    assert test is not None
    if test.needed is None:
        assert test.outcome == "no_worse"
        return
    assert test.outcome == "inconclusive"
    rng = np.random.default_rng(1)
    drawn = rng.multinomial(test.needed, [gained / n, lost / n, 1 - (gained + lost) / n], size=4000)
    p = p_of_difference(drawn[:, 0], drawn[:, 1], test.needed, -margin) / 2
    assert 0.74 < (p < 0.05).mean() < 0.88


def test_outcomes_by_the_smallest_gain() -> None:
    assert judge(41, 20, 466).verdict.outcome == "better"
    unsure = judge(41, 20, 466, smallest_gain=0.03)
    assert unsure.verdict.outcome == "inconclusive"
    assert "could be below the smallest gain that matters (+3.0 points)" in unsure.verdict.reason
    assert unsure.needed is not None
    assert unsure.needed > 466
    assert judge(80, 20, 466, smallest_gain=0.03).verdict.outcome == "better"
    small = judge(20, 15, 2000, smallest_gain=0.03)
    assert small.verdict.outcome == "too_small"
    assert small.interval[1] < 0.03
    assert small.needed is None
    assert judge(15, 60, 466, smallest_gain=0.03).verdict.outcome == "worse"
    assert judge(0, 0, 2000, smallest_gain=0.03).verdict.outcome == "too_small"


def test_the_p_value_to_adjust_is_the_one_that_decides() -> None:
    better = judge(80, 20, 466, smallest_gain=0.03)
    assert better.p_gain is not None
    assert deciding_p(better) == better.p_gain > better.p_value
    worse = judge(15, 60, 466, smallest_gain=0.03)
    assert deciding_p(worse) == worse.p_value
    plain = judge(41, 20, 466)
    assert deciding_p(plain) == plain.p_value


def test_outcomes_by_the_margin() -> None:
    outcomes = {}
    for lost in (10, 30, 80):
        test = judge(10, lost, 400, margin=0.05).noninferiority
        assert test is not None
        outcomes[lost] = test.outcome
        assert (test.bound > -0.05) == (test.outcome == "no_worse")
    assert outcomes == {10: "no_worse", 30: "inconclusive", 80: "worse"}
    assert judge(10, 30, 400).noninferiority is None


def test_groups_that_lose_the_margin_are_seldom_called_acceptable() -> None:
    rng, count, each, margin = np.random.default_rng(4), 40, 8, 0.1
    group = np.repeat(np.arange(count), each)
    called: dict[bool, int] = {True: 0, False: 0}
    for _ in range(400):
        up = np.repeat(rng.beta(0.5, 1.0, count), each) > rng.random(count * each)  # gains 1 of 3 changes
        changed = rng.random(count * each) < 0.3
        a, b = np.where(changed, ~up, 0), np.where(changed, up, 0)
        gained, lost = float((b > a).sum()), float((b < a).sum())
        for grouped in called:
            size = changes(a.astype(float), b.astype(float), group if grouped else np.arange(count * each))
            share = size.rows / (count * each)
            p = p_of_difference(gained * share, lost * share, size.rows, -margin, size.freedom)
            called[grouped] += gained - lost > -margin * count * each and p / 2 < 0.05
    assert called[True] / 400 < 0.08
    assert called[False] > 1.4 * called[True]  # what would happen without groups


def test_scores_that_lose_the_margin_are_seldom_called_acceptable() -> None:
    rng, called = np.random.default_rng(2), 0
    for _ in range(400):
        change = -0.5 * (rng.random(80) < 0.1)  # one of ten texts loses 0.5, the others keep their score
        mean = differences([0.5] * 80, list(0.5 + change), None)
        called += mean.mean > -0.05 and mean.p_value(-0.05) / 2 < 0.05
    assert called / 400 < 0.07
    same = compare_scores([0.4] * 150, [0.4] * 150, groups=None, alpha=0.05, limits=Limits(0.03, 0.05))
    assert same.verdict.outcome == "too_small"
    assert same.noninferiority is not None
    assert same.noninferiority.outcome == "no_worse"
    assert math.isclose(same.noninferiority.level, 0.95)
