from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
import scipy  # which imports scipy.stats when a test uses it
from numpy.typing import NDArray

from sftlab.eval.statistics import compare_scores, mean_interval
from sftlab.eval.statistics.means import at_most_zero
from sftlab.results import Comparison


def judge(a: list[float], b: list[float], groups: list[str] | None = None, alpha: float = 0.05) -> Comparison:
    return compare_scores(a, b, groups=groups, alpha=alpha)


def gains(n: int, mean: float, spread: float = 0.1) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(8)
    a = rng.uniform(0.3, 0.5, n)
    noise = rng.normal(0, spread, n)
    return list(a), list(np.clip(a + mean + noise - noise.mean(), 0, 1))


def false_alarms(differences: NDArray[np.float64]) -> float:
    """How often differences with a mean of 0 are called different, one row per trial."""
    edge = np.ones((len(differences), 1))
    worse = at_most_zero(np.hstack([differences, -edge]))
    better = at_most_zero(np.hstack([-differences, -edge]))
    first = judge(list(np.maximum(0, -differences[0])), list(np.maximum(0, differences[0])))
    assert first.p_value == pytest.approx(min(1, 2 * min(worse[0], better[0])))
    return float(np.mean(2 * np.minimum(worse, better) < 0.05))


# One text of 25 is ruined, and the others gain a little: a sign-flip test of 20 rows finds a gain in 41 % of cases.
@pytest.mark.parametrize(("n", "trials"), [(20, 1000), (50, 600), (200, 300)])
def test_skewed_differences_without_a_mean_are_seldom_called_different(n: int, trials: int) -> None:
    rng = np.random.default_rng(n)
    for ruined, loss in ((0.044, 0.9), (0.02, 0.5), (0.3, 1.0)):
        lost = rng.random((trials, n)) < ruined
        size = rng.uniform(0.8, 1.2, (trials, n))
        differences = np.where(lost, -loss, loss * ruined / (1 - ruined) * size)
        assert false_alarms(differences) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    exponential = np.minimum(rng.exponential(0.1, (trials, n)), 1)
    assert false_alarms(exponential - 0.1) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_differences_as_large_as_they_can_be_use_the_whole_level() -> None:
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, 1.0], (1000, 60))
    assert 0.015 < false_alarms(differences) <= 0.06


def test_a_true_gain_is_found() -> None:
    rng = np.random.default_rng(5)
    differences = rng.normal(0.03, 0.1, (200, 200))
    found = false_alarms(differences)
    t_test = np.mean(scipy.stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05)
    assert 0.8 < found < t_test


def test_the_distribution_of_weighted_sums() -> None:
    rng = np.random.default_rng(0)
    # Right and wrong answers: the lower end of Clopper and Pearson's interval.
    for right, n, mean in ((1, 1, 0.1), (5, 5, 0.5), (12, 20, 0.4), (1, 20, 0.01), (120, 200, 0.5), (700, 1273, 0.5)):
        weights = np.r_[np.full(right, 1 - mean), np.full(n - right + 1, -mean)]
        assert at_most_zero(weights[None])[0] == pytest.approx(
            scipy.stats.beta.cdf(mean, right, n - right + 1), rel=1e-4
        )
    weights = rng.normal(0.05, 0.4, 30)
    drawn = np.mean(rng.exponential(size=(200_000, 30)) @ weights <= 0)
    assert at_most_zero(weights[None])[0] == pytest.approx(drawn, abs=0.004)
    assert at_most_zero(-weights[None])[0] == pytest.approx(1 - drawn, abs=0.004)
    assert list(at_most_zero(np.array([[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]]))) == [0, 1, 1]


def test_scores_are_judged_by_their_means() -> None:
    a, b = gains(100, 0.06)
    better = judge(a, b)
    low, high = better.interval
    assert str(better.verdict) == (
        f"better: mean {np.mean(b):.3f} against {np.mean(a):.3f} (+6.0 points, 95 % interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}, p = {better.p_value:.2g}); {better.gained} answers scored higher, {better.lost} lower"
    )
    assert (better.baseline, better.finetuned) == pytest.approx((np.mean(a), np.mean(b)))
    assert better.delta == pytest.approx(0.06)
    worse = judge(b, a)
    assert str(worse.verdict).startswith("worse: mean")
    assert worse.interval == pytest.approx((-high, -low))
    # A smaller gain, and answers that change a lot: it may be chance.
    chance = judge(*gains(100, 0.02, 0.2))
    assert str(chance.verdict).startswith("inconclusive: mean")
    assert "the difference of +2.4 points could be chance (p = 0.4" in chance.verdict.reason


@pytest.mark.parametrize("alpha", [0.05, 0.0353])
def test_interval_and_p_agree(alpha: float) -> None:
    rng = np.random.default_rng(6)
    for trial in range(20):
        a = rng.uniform(0, 0.5, 30)
        b = a + rng.uniform(0, 0.25, 30)
        groups = [str(row // 2) for row in range(30)] if trial % 2 else None
        result = judge(list(a), list(b), groups, alpha)
        low, high = result.interval
        assert (result.p_value < alpha) == (not low <= 0 <= high)
        assert (result.verdict.outcome == "better") == (low > 0)


def test_scores_are_counted_row_by_row() -> None:
    result = judge([0.0, 0.0, 0.5, 0.5, 0.5, 1.0], [0.0, 0.1, 0.5, 0.4, 0.6, 1.0])
    assert (result.gained, result.lost, result.n) == (2, 1, 6)
    json.dumps(result.model_dump(), allow_nan=False)


def test_the_interval_of_many_scores_is_about_the_analytic_one() -> None:
    a, b = gains(4000, 0.03, 0.15)
    difference = np.subtract(b, a)
    error = 1.96 * difference.std() / math.sqrt(4000)
    assert judge(a, b).interval == pytest.approx((difference.mean() - error, difference.mean() + error), abs=6e-4)


def test_scores_that_share_a_group_count_less() -> None:
    rng = np.random.default_rng(9)
    a = np.full(300, 0.5)
    b = a + np.repeat(rng.permutation([0.2] * 22 + [-0.2] * 8), 10)
    groups = [str(row // 10) for row in range(300)]
    alone, grouped = judge(list(a), list(b)), judge(list(a), list(b), groups)
    assert (alone.groups, grouped.groups) == (None, 30)
    t_test = scipy.stats.ttest_1samp(np.subtract(b, a)[::10], 0)
    assert grouped.p_value >= t_test.pvalue > 10 * alone.p_value
    low, high = t_test.confidence_interval()
    assert grouped.interval[0] <= low + 1e-9
    assert grouped.interval[1] >= high - 1e-9
    nothing = judge([0.0] * 10, [1.0] * 10, ["same"] * 10)
    assert (nothing.interval, nothing.p_value, nothing.verdict.outcome) == ((-1, 1), 1, "inconclusive")


def test_scores_with_nothing_to_judge() -> None:
    assert judge([], []).verdict.judged is False
    same = judge([0.25, 0.5], [0.25, 0.5])
    assert (same.p_value, same.delta) == (1.0, 0.0)
    assert same.interval[0] < -0.5 < 0.5 < same.interval[1]  # two rows show nothing
    assert str(same.verdict) == (
        "inconclusive: both models have a mean of 0.375; 0 answers scored higher, 0 lower, so no answer's score changed"
    )
    even = judge([0.1, 0.2, 0.3], [0.2, 0.3, 0.1])  # by rounding the sum of the differences is not 0
    assert even.delta == 0
    assert str(even.verdict) == "inconclusive: both models have a mean of 0.200; 2 answers scored higher, 1 lower"


def test_thousands_of_scores_need_little_memory() -> None:
    a, b = np.random.default_rng(11).random((2, 5000))
    tracemalloc.start()
    judge(list(a), list(b))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


@pytest.mark.parametrize("odd", [1.5, -0.1, math.nan, math.inf])
def test_what_is_no_score_is_refused(odd: float) -> None:
    with pytest.raises(ValueError, match=f"{odd} is not a score between 0 and 1"):
        judge([0.5, odd], [0.5, 0.5])
    with pytest.raises(ValueError, match="1 and 2 answers"):
        judge([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="alpha = 5"):
        judge([0.5], [0.5], alpha=5)


def test_interval_of_a_mean() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        low, high = mean_interval(list(rng.beta(2, 3, 60)), None)
        covered += low <= 2 / 5 <= high
    assert covered >= 55
    assert high - low < 0.2
    assert mean_interval([0.5], None)[0] < 0.1
    scores, groups = [0.1, 0.1, 0.9, 0.9], ["a", "a", "b", "b"]
    assert mean_interval(scores, groups) == (0, 1)  # two sources, not four rows
    assert mean_interval([0.0] * 100, None)[0] == 0
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([], None)
