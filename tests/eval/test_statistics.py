from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import scipy  # which imports scipy.stats when a test uses it

from sftlab.eval.statistics import (
    _verdict,
    bootstrap_ties,
    changed,
    compare,
    compare_scores,
    detectable_mean_difference,
    fewest,
    holm,
    mean_interval,
    minimal_detectable_difference,
    noise,
    spread_of_differences,
    subgroup,
    wilson,
)
from sftlab.results import Comparison


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * both + [False] * gained + [True] * lost + [False] * neither
    b = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return a, b


@cache
def binomial_p(count: int, n: int) -> float:
    return float(scipy.stats.binomtest(count, n).pvalue)


def judge(
    a: Sequence[bool],
    b: Sequence[bool],
    groups: Sequence[str | None] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    resamples: int = 10_000,
    noise: float | None = None,
) -> Comparison:
    return compare(a, b, groups=groups, alpha=alpha, seed=seed, resamples=resamples, noise=noise)


# Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_a_textbook(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_within_0_and_1_and_narrows_with_alpha() -> None:
    assert wilson(0, 3)[0] == 0
    assert wilson(3, 3)[1] == 1
    wide, narrow = wilson(5, 10, alpha=0.01), wilson(5, 10, alpha=0.2)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_refuses_what_cannot_be(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} questions"):
        wilson(correct, n)


@pytest.mark.parametrize(("both", "gained", "lost", "neither"), [(200, 60, 39, 167), (5, 9, 1, 5), (3, 1, 8, 0)])
def test_the_p_value_is_that_of_the_exact_mcnemar_test(both: int, gained: int, lost: int, neither: int) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    result = judge(*answers(both, gained, lost, neither))
    assert result.p_value == pytest.approx(binomial_p(gained, gained + lost))
    assert result.p_value == pytest.approx(mcnemar([[both, lost], [gained, neither]], exact=True).pvalue)
    assert (result.both_right, result.gained, result.lost, result.both_wrong) == (both, gained, lost, neither)
    assert result.delta == pytest.approx((gained - lost) / result.n)
    assert result.groups is None


def test_the_same_scores_can_be_a_gain_or_chance() -> None:
    few = judge(*answers(219, 41, 20, 186))  # 239 against 260 of 466, 61 answers changed
    many = judge(*answers(139, 121, 100, 106))  # the same, 221 changed
    assert str(few.verdict) == (
        f"better: 260 of 466 against 239 (+4.5 points, 95 % interval {100 * few.interval[0]:+.1f} to "
        f"{100 * few.interval[1]:+.1f}, p = 0.0099); 41 answers gained, 20 lost"
    )
    assert str(many.verdict).startswith(
        "inconclusive: 260 of 466 against 239; the difference of +4.5 points could be chance (p = 0.18"
    )
    assert (few.baseline, few.finetuned, few.delta) == (many.baseline, many.finetuned, many.delta)
    mirrored = judge(*reversed(answers(219, 41, 20, 186)))
    assert str(mirrored.verdict).startswith("worse: 239 of 466 against 260 (-4.5 points")


def test_the_interval_is_the_analytic_one() -> None:
    n, gained, lost = 1000, 150, 100
    result = judge(*answers(400, gained, lost, 350))
    delta = (gained - lost) / n
    error = math.sqrt((gained + lost) / n - delta**2) / math.sqrt(n)
    assert result.interval == pytest.approx((delta - 1.96 * error, delta + 1.96 * error), abs=0.0015)
    wider = judge(*answers(400, gained, lost, 350), alpha=0.01)
    assert wider.interval == pytest.approx((delta - 2.576 * error, delta + 2.576 * error), abs=0.002)
    assert "99 % interval" in wider.verdict.reason
    assert (result.level, wider.level) == (0.95, 0.99)


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth, covered, trials = 0.12 - 0.06, 0, 400
    for trial in range(trials):
        kind = rng.choice(4, size=200, p=[0.4, 0.12, 0.06, 0.42])
        low, high = judge(kind % 2 == 0, kind <= 1, seed=trial, resamples=1000).interval
        # kind 0: both right, 1: gained, 2: lost, 3: both wrong
        covered += low <= truth <= high
    assert 0.92 <= covered / trials <= 0.98


def test_a_model_that_does_not_differ_is_seldom_called_better() -> None:
    rng = np.random.default_rng(1)
    verdicts = []
    for trial in range(400):
        a, b = rng.random((2, 150)) < 0.5
        verdicts.append(judge(a, b, seed=trial, resamples=1000).verdict.outcome)
    assert verdicts.count("better") + verdicts.count("worse") <= 0.075 * len(verdicts)
    assert verdicts.count("better") > 0 or verdicts.count("worse") > 0


def test_questions_that_share_a_group_count_less() -> None:
    # Each of 12 texts has 10 questions, and all questions of a text change together.
    a = [text < 3 for text in range(12) for _ in range(10)]
    b = [text >= 3 for text in range(12) for _ in range(10)]
    groups = [f"text {text}" for text in range(12) for _ in range(10)]
    alone, grouped = judge(a, b), judge(a, b, groups)
    assert alone.p_value < 1e-6
    assert alone.verdict.outcome == "better"
    # 9 of 12 signs are the same: a sign test over the texts.
    assert grouped.p_value == pytest.approx(binomial_p(9, 12), abs=0.02)
    assert grouped.verdict.outcome == "inconclusive"
    assert grouped.groups == 12
    spread = (grouped.interval[1] - grouped.interval[0]) / (alone.interval[1] - alone.interval[0])
    assert spread == pytest.approx(math.sqrt(10), rel=0.1)


def test_clusters_without_an_effect_keep_the_false_alarms_down() -> None:
    rng = np.random.default_rng(2)
    groups = [str(row // 8) for row in range(160)]
    grouped, alone = 0, 0
    for trial in range(200):
        a, b = np.repeat(rng.random((2, 20)) < 0.5, 8, axis=1)
        grouped += judge(a, b, groups, seed=trial, resamples=500).verdict.outcome != "inconclusive"
        alone += judge(a, b, seed=trial, resamples=500).verdict.outcome != "inconclusive"
    assert grouped <= 0.09 * 200
    assert alone > 0.3 * 200


def test_clusters_of_unequal_size_are_resampled_as_a_ratio() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 30, size=80)
    groups = [str(group) for group, size in enumerate(sizes) for _ in range(size)]
    a = rng.random(len(groups)) < 0.5
    b = a | (rng.random(len(groups)) < np.repeat(rng.random(80), sizes) * 0.5)
    result = judge(a, b, groups)
    sums = np.array([(b.astype(int) - a)[np.array(groups) == str(group)].sum() for group in range(80)])
    ratios = []
    for _ in range(4000):
        draw = rng.integers(80, size=80)
        ratios.append(sums[draw].sum() / sizes[draw].sum())
    assert result.interval == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.006)
    assert result.p_value < 0.001
    assert result.verdict.outcome == "better"


def test_all_gained_is_all_gained_in_every_resample() -> None:
    sizes = range(1, 31)
    groups = [str(size) for size in sizes for _ in range(size)]
    result = judge([False] * len(groups), [True] * len(groups), groups)
    assert result.interval == (1.0, 1.0)
    assert result.p_value == pytest.approx(1 / 10_001)  # chance alone never gets there, and p is still not 0
    assert "p < 0.0001" in result.verdict.reason


def test_rows_without_a_group_stand_alone() -> None:
    a, b = answers(30, 20, 5, 15)
    alone = judge(a, b)
    assert judge(a, b, [None] * 70) == alone
    assert judge(a, b, [str(row) for row in range(70)]) == alone
    assert judge(a, b, ["pair", "pair", *[None] * 68]).groups == 69


def test_one_group_alone_shows_nothing() -> None:
    result = judge([False] * 50, [True] * 50, ["same"] * 50)
    assert result.p_value == 1
    assert result.verdict.outcome == "inconclusive"


def test_a_difference_within_the_noise_is_none() -> None:
    a, b = answers(219, 41, 20, 186)
    assert judge(a, b, noise=20 / 466).verdict.outcome == "better"
    at_noise = judge(a, b, noise=21 / 466).verdict
    assert at_noise.outcome == "inconclusive"
    assert "is no larger than the run-to-run noise of 4.5 points" in at_noise.reason


def test_nothing_to_judge() -> None:
    empty = judge([], [])
    assert str(empty.verdict).startswith("inconclusive: cannot be judged")
    assert (empty.n, empty.p_value, empty.groups) == (0, 1.0, None)
    same = judge([True, False], [True, False])
    assert (same.p_value, same.delta, same.interval) == (1.0, 0.0, (0.0, 0.0))
    assert str(same.verdict) == (
        "inconclusive: both models have 1 of 2 right; 0 answers gained, 0 lost, so no answer changed sides"
    )
    even = judge(*answers(1, 3, 3, 1), groups=["x"] * 8)
    assert (even.p_value, even.delta) == (1.0, 0.0)
    for result in (empty, same, even, judge([True], [False])):
        json.dumps(result.model_dump(), allow_nan=False)


def test_where_test_and_interval_disagree_nothing_is_claimed() -> None:
    few = judge(*answers(0, 5, 0, 5))
    assert few.interval[0] > 0
    assert few.p_value == pytest.approx(0.0625)
    assert str(few.verdict).startswith(
        "inconclusive: 5 of 10 against 0; the difference of +50.0 points could be chance"
    )
    verdict = _verdict(239, 260, 466, 60, 39, (0.0, 0.09), p_value=0.04, alpha=0.05, noise=None)
    assert str(verdict) == (
        "inconclusive: 260 of 466 against 239; the difference of +4.5 points is borderline: p = 0.04, but the "
        "95 % interval +0.0 to +9.0 includes 0; 60 answers gained, 39 lost"
    )


def test_a_p_just_below_alpha_is_not_printed_as_alpha() -> None:
    gained, lost = 60, 39
    p = binomial_p(gained, gained + lost)
    verdict = judge(*answers(200, gained, lost, 167), alpha=p + 1e-4).verdict
    assert verdict.outcome == "better"
    assert f"p = {p:.4g}" in verdict.reason


def test_the_seed_decides() -> None:
    a, b = answers(50, 20, 9, 40)
    groups = [str(row % 30) for row in range(119)]
    assert judge(a, b, groups, seed=5) == judge(a, b, groups, seed=5)
    assert judge(a, b, groups, seed=5) != judge(a, b, groups, seed=6)


def test_twenty_thousand_questions_need_little_memory() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.random((2, 20_000)) < 0.5
    judge(a, b, resamples=10)  # imports
    tracemalloc.start()
    judge(a, b, [str(row // 3) for row in range(20_000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_what_does_not_pair_up_is_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 answers"):
        judge([True, False], [True])
    with pytest.raises(ValueError, match="1 groups"):
        judge([True, False], [True, True], ["x"])
    with pytest.raises(ValueError, match="alpha = 5"):
        judge([True], [True], alpha=5)


def judge_scores(
    a: Sequence[float],
    b: Sequence[float],
    groups: Sequence[str | None] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    resamples: int = 4000,
    noise: float | None = None,
) -> Comparison:
    return compare_scores(a, b, groups=groups, alpha=alpha, seed=seed, resamples=resamples, noise=noise)


def gains(n: int, mean: float, spread: float = 0.1) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(8)
    a = rng.uniform(0.3, 0.5, n)
    noise = rng.normal(0, spread, n)
    return list(a), list(np.clip(a + mean + noise - noise.mean(), 0, 1))


def test_scores_are_judged_by_their_means() -> None:
    a, b = gains(100, 0.06)
    better = judge_scores(a, b)
    low, high = better.interval
    assert str(better.verdict) == (
        f"better: mean {np.mean(b):.3f} against {np.mean(a):.3f} (+6.0 points, 95 % interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}, p < 0.0001); {better.gained} answers scored higher, {better.lost} lower"
    )
    assert (better.baseline, better.finetuned) == pytest.approx((np.mean(a), np.mean(b)))
    assert better.delta == pytest.approx(0.06)
    assert str(judge_scores(b, a).verdict).startswith("worse: mean")
    # A smaller gain, and answers that change a lot: it may be chance.
    chance = judge_scores(*gains(100, 0.02, 0.2))
    assert str(chance.verdict).startswith("inconclusive: mean")
    assert "the difference of +2.4 points could be chance (p = 0.2" in chance.verdict.reason


def test_scores_are_counted_row_by_row() -> None:
    result = judge_scores([0.0, 0.0, 0.5, 0.5, 0.5, 1.0], [0.0, 0.1, 0.5, 0.4, 0.6, 1.0])
    assert (result.gained, result.lost, result.n) == (2, 1, 6)
    json.dumps(result.model_dump(), allow_nan=False)


def test_the_interval_of_scores_is_the_analytic_one() -> None:
    a, b = gains(500, 0.03, 0.15)
    difference = np.subtract(b, a)
    error = 1.96 * difference.std() / math.sqrt(500)
    assert judge_scores(a, b).interval == pytest.approx(
        (difference.mean() - error, difference.mean() + error), abs=0.0015
    )


def test_the_p_value_of_scores_is_that_of_all_signs() -> None:
    a, b = [0.1, 0.2, 0.4, 0.3, 0.6, 0.2, 0.5, 0.5], [0.4, 0.3, 0.9, 0.2, 0.7, 0.6, 0.5, 0.3]
    exact = scipy.stats.permutation_test(
        (b, a), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert 0.05 < exact.pvalue < 0.5
    assert judge_scores(a, b).p_value == pytest.approx(exact.pvalue, abs=0.015)
    # All six differences have the same size and sign, but for rounding: 2 of 64 sign patterns are as extreme.
    a, b = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert len(set(np.subtract(b, a))) > 1
    assert judge_scores(a, b).p_value == pytest.approx(2 / 64, abs=0.007)


def test_scores_of_0_and_1_are_judged_like_right_and_wrong() -> None:
    a, b = answers(139, 121, 70, 106)
    right, scored = judge(a, b), judge_scores([float(x) for x in a], [float(x) for x in b])
    for name in ("n", "baseline", "finetuned", "gained", "lost", "groups"):
        assert getattr(scored, name) == getattr(right, name), name
    assert scored.delta == pytest.approx(right.delta)
    assert scored.interval == pytest.approx(right.interval, abs=0.005)
    assert scored.p_value == pytest.approx(right.p_value, abs=0.002)
    groups = [str(row % 40) for row in range(len(a))]
    assert judge_scores(a, b, groups).interval == pytest.approx(judge(a, b, groups).interval, abs=0.006)


def test_scores_that_share_a_group_count_less() -> None:
    rng = np.random.default_rng(9)
    a = np.full(120, 0.5)
    b = a + np.repeat(rng.permutation([0.2] * 9 + [-0.2] * 3), 10)
    groups = [str(row // 10) for row in range(120)]
    alone, grouped = judge_scores(a, b), judge_scores(a, b, groups)
    assert alone.verdict.outcome == "better"
    assert grouped.p_value == pytest.approx(binomial_p(9, 12), abs=0.02)
    assert grouped.verdict.outcome == "inconclusive"
    assert (alone.groups, grouped.groups) == (None, 12)
    spread = (grouped.interval[1] - grouped.interval[0]) / (alone.interval[1] - alone.interval[0])
    assert spread == pytest.approx(math.sqrt(10), rel=0.1)
    uneven = judge_scores([0.0] * 10, [1.0] * 10, ["a"] * 7 + ["b", "c", "c"])
    assert uneven.interval == (1.0, 1.0)  # sums over sizes, whichever groups are drawn


def test_scores_that_do_not_differ_are_seldom_called_better() -> None:
    rng = np.random.default_rng(10)
    verdicts = [judge_scores(*rng.random((2, 40)), seed=trial, resamples=400).verdict for trial in range(200)]
    claimed = sum(verdict.outcome != "inconclusive" for verdict in verdicts)
    assert 0 < claimed <= 0.1 * 200


def test_scores_with_nothing_to_judge() -> None:
    assert judge_scores([], []) == judge([], []).model_copy(update={"metric": "score"})
    same = judge_scores([0.25, 0.5], [0.25, 0.5])
    assert (same.p_value, same.delta, same.interval) == (1.0, 0.0, (0.0, 0.0))
    assert str(same.verdict) == (
        "inconclusive: both models have a mean of 0.375; 0 answers scored higher, 0 lower, so no answer's score changed"
    )
    even = judge_scores([0.1, 0.2, 0.3], [0.2, 0.3, 0.1])  # by rounding the sum of the differences is not 0
    assert even.delta == 0
    assert str(even.verdict) == "inconclusive: both models have a mean of 0.200; 2 answers scored higher, 1 lower"
    together = judge_scores([0.1, 0.7, 0.2], [0.7, 0.2, 0.1], ["same"] * 3)
    assert (together.interval, together.p_value) == ((0.0, 0.0), 1.0)
    a, b = gains(100, 0.06)
    assert "no larger than the run-to-run noise of 7.0 points" in judge_scores(a, b, noise=0.07).verdict.reason
    assert judge_scores(a, b, noise=0.05).verdict.outcome == "better"


def test_the_seed_decides_about_scores_too() -> None:
    a, b = gains(60, 0.02)
    assert judge_scores(a, b, seed=5) == judge_scores(a, b, seed=5)
    assert judge_scores(a, b, seed=5) != judge_scores(a, b, seed=6)


def test_five_thousand_scores_need_little_memory() -> None:
    a, b = np.random.default_rng(11).random((2, 5000))
    tracemalloc.start()
    judge_scores(a, b, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


@pytest.mark.parametrize("odd", [1.5, -0.1, math.nan, math.inf])
def test_what_is_no_score_is_refused(odd: float) -> None:
    with pytest.raises(ValueError, match=f"{odd} is no score between 0 and 1"):
        judge_scores([0.5, odd], [0.5, 0.5])
    with pytest.raises(ValueError, match="1 and 2 answers"):
        judge_scores([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="alpha = 5"):
        judge_scores([0.5], [0.5], alpha=5)


def connor(difference: float, changed: float, alpha: float, power: float) -> float:
    deviate = scipy.stats.norm.ppf(1 - alpha / 2) * math.sqrt(changed)
    return float((deviate + scipy.stats.norm.ppf(power) * math.sqrt(changed - difference**2)) ** 2 / difference**2)


@pytest.mark.parametrize(("n", "share"), [(466, 0.2), (2000, 0.1), (1273, 0.4)])
def test_minimal_detectable_difference_against_connor(n: int, share: float) -> None:
    difference = minimal_detectable_difference(n, share)
    assert 0 < difference <= share
    # The exact test needs a little more than the approximation says.
    assert 0.85 * n < connor(difference, share, 0.05, 0.8) < n


@pytest.mark.parametrize(("n", "share", "power"), [(100, 0.3, 0.8), (466, 0.2, 0.9)])
def test_minimal_detectable_difference_by_simulation(n: int, share: float, power: float) -> None:
    difference = minimal_detectable_difference(n, share, power=power)
    rng = np.random.default_rng(5)
    gain, lose = (share + difference) / 2, (share - difference) / 2
    counts = rng.multinomial(n, [gain, lose, 1 - share], size=3000)
    found = np.mean([binomial_p(int(up), int(up + down)) < 0.05 for up, down, _ in counts])
    assert found == pytest.approx(power, abs=0.03)


@pytest.mark.parametrize("n", [8, 12, 24, 35])
def test_a_small_test_set_shows_what_is_claimed_for_it_and_no_less(n: int) -> None:
    # More than a fifth of the answers must change for such a difference, and then all change one way.
    difference = minimal_detectable_difference(n)
    assert 0.2 < difference < 1
    rng = np.random.default_rng(11)

    def found(share: float) -> float:
        gained = rng.binomial(n, share, size=4000)
        return float(np.mean([up > 0 and binomial_p(int(up), int(up)) < 0.05 for up in gained]))

    assert found(difference) == pytest.approx(0.8, abs=0.025)
    assert found(0.8 * difference) < 0.75


def test_six_gained_answers_of_24_are_a_difference_that_can_be_shown() -> None:
    a, b = [False] * 24, [True] * 6 + [False] * 18
    assert judge(a, b).p_value < 0.05
    assert minimal_detectable_difference(24) < 1
    # The verdict, which asks for more than p, comes as often as is claimed.
    n, rng = 40, np.random.default_rng(3)
    difference = minimal_detectable_difference(n)
    verdicts = []
    for trial in range(300):
        gained = [bool(gain) for gain in rng.random(n) < difference]
        verdicts.append(judge([False] * n, gained, seed=trial, resamples=1000).verdict.outcome == "better")
    assert np.mean(verdicts) == pytest.approx(0.8, abs=0.06)


def test_minimal_detectable_difference_has_ends() -> None:
    assert minimal_detectable_difference(5) == math.inf  # five gained answers of five: p = 0.0625
    assert minimal_detectable_difference(6) == pytest.approx(0.8 ** (1 / 6), abs=1e-4)  # all six must be gained
    assert minimal_detectable_difference(0) == math.inf
    assert 0 < minimal_detectable_difference(466, 0.0) < minimal_detectable_difference(466, 0.2)
    assert minimal_detectable_difference(1000) < minimal_detectable_difference(500) < 0.2
    assert minimal_detectable_difference(466, 0.1) < minimal_detectable_difference(466, 0.3)
    assert 0.005 < minimal_detectable_difference(20_000) < 0.01
    assert 0 < minimal_detectable_difference(50, 1.0) < 1
    with pytest.raises(ValueError, match="changed = 20"):
        minimal_detectable_difference(466, 20)


def test_noise_and_changed() -> None:
    runs = [[True, True, False, False], [True, False, False, True], [True, True, True, True]]
    assert noise(runs) == 0.5
    assert changed(runs) == 3
    assert noise([runs[0], runs[1]]) == 0
    assert changed([runs[0], runs[1]]) == 2
    assert (noise([[], []]), changed([[], []])) == (0, 0)
    for few in ([], [[True]], [[True], [True, False]]):
        with pytest.raises(ValueError, match="repeats"):
            noise(few)
        with pytest.raises(ValueError, match="repeats"):
            changed(few)


def test_bootstrap_ties_tells_near_from_far() -> None:
    rng = np.random.default_rng(6)
    tokens = rng.integers(20, 200, size=300)
    hard = rng.normal(1.0, 0.5, size=300)  # a row is hard for every checkpoint, so pairing matters

    def loss(offset: float) -> list[float]:
        return list((hard + offset + rng.normal(0, 0.02, size=300)) * tokens)

    losses = [loss(0.02), loss(0.0), loss(0.0005), loss(0.5)]
    assert bootstrap_ties(losses, list(tokens), seed=0) == [False, True, True, False]


def test_bootstrap_ties_weighs_by_tokens() -> None:
    # By the mean over rows the second is lower, by the mean over tokens the first.
    losses = [[100.0, 2.0] * 30, [150.0, 1.0] * 30]
    assert bootstrap_ties(losses, [100.0, 1.0] * 30, seed=0) == [True, False]


def test_bootstrap_ties_finds_about_the_right_share() -> None:
    rng = np.random.default_rng(7)
    ties = [bootstrap_ties(rng.normal(1, 0.1, (2, 50)), [1.0] * 50, seed=seed, resamples=400) for seed in range(200)]
    assert 0.9 <= np.mean([all(tie) for tie in ties]) < 1


def test_bootstrap_ties_has_ends() -> None:
    assert bootstrap_ties([], [], seed=0) == []
    assert bootstrap_ties([[1.0, 2.0]], [1, 1], seed=0) == [True]
    assert bootstrap_ties([[1.0], [9.0]], [1], seed=0) == [True, True]  # one row tells nothing apart
    assert bootstrap_ties([[math.nan, 1.0], [2.0, 2.0], [math.inf, 1.0]], [1, 1], seed=0) == [False, True, False]
    assert bootstrap_ties([[1.0, 0.0, 1.0], [2.0, 0.0, 2.0]], [1, 0, 1], seed=0) == [True, False]
    with pytest.raises(ValueError, match="no validation row"):
        bootstrap_ties([[math.nan]], [1], seed=0)
    with pytest.raises(ValueError, match="no validation row"):
        bootstrap_ties([[0.0]], [0], seed=0)
    with pytest.raises(ValueError, match="2 validation rows"):
        bootstrap_ties([[1.0]], [1, 1], seed=0)


def test_subgroup() -> None:
    result = subgroup([True, False, True, True], ["b", "a", "b", None])
    assert list(result) == ["b", "a"]
    assert result["b"] == (2, 2, *wilson(2, 2))
    assert result["a"] == (0, 1, *wilson(0, 1))
    with pytest.raises(ValueError, match="shorter"):
        subgroup([True, True], ["a"])


def test_holm_by_hand() -> None:
    # Sorted: 0.01 · 3, then 0.02 · 2, then 0.9 · 1, and never below the one before; at most 1.
    assert holm([0.02, 0.9, 0.01]) == pytest.approx([0.04, 0.9, 0.03])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.01, 1e-4])
def test_fewest_is_where_the_exact_test_begins_to_reject(alpha: float) -> None:
    n = fewest(alpha)
    for count, rejects in ((n, True), (n - 1, False)):
        found = compare([False] * count, [True] * count, groups=None, alpha=alpha, seed=1, resamples=10)
        assert (found.p_value < alpha) == rejects


def test_interval_of_a_mean() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        low, high = mean_interval(list(rng.beta(2, 3, 60)), None, seed=1, resamples=1000)
        held += low <= 2 / 5 <= high
    assert held == pytest.approx(190, abs=10)
    assert mean_interval([0.5], None, seed=1) == (0.5, 0.5)
    scores, groups = [0.1, 0.1, 0.9, 0.9], ["a", "a", "b", "b"]
    assert mean_interval(scores, groups, seed=1) == (0.1, 0.9)  # two sources, not four rows
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([], None, seed=1)


def test_detectable_mean_difference_by_simulation() -> None:
    difference = detectable_mean_difference(0.2, 100)
    rng = np.random.default_rng(6)
    found = scipy.stats.ttest_1samp(rng.normal(difference, 0.2, (2000, 100)), 0, axis=1).pvalue < 0.05
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert detectable_mean_difference(0.2, 1) == math.inf
    with pytest.raises(ValueError, match="spread = -1"):
        detectable_mean_difference(-1, 10)


def test_spread_of_differences() -> None:
    a, b = [0.1, 0.2, 0.3, 0.9], [0.3, 0.2, 0.5, 0.6]
    assert spread_of_differences(a, b, None) == pytest.approx(np.std([0.2, 0.0, 0.2, -0.3], ddof=1))
    # Rows that are there twice tell nothing new: the mean is no more certain, though n has doubled.
    names = ["w", "x", "y", "z"]
    twice = spread_of_differences(a * 2, b * 2, names * 2)
    assert twice == pytest.approx(math.sqrt(2) * spread_of_differences(a, b, None))
    assert spread_of_differences([], [], None) == 0
    assert spread_of_differences([0.1], [0.9], None) == 0
