from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy  # which imports scipy.stats when a test uses it
from numpy.typing import NDArray

from sftlab.eval.statistics import compare, fewest
from sftlab.eval.statistics.groups import Size
from sftlab.eval.statistics.paired import changes, p_of_changes, tango
from sftlab.results import Comparison


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * both + [False] * gained + [True] * lost + [False] * neither
    b = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return a, b


def judge(
    a: Sequence[float], b: Sequence[float], groups: Sequence[str | None] | None = None, alpha: float = 0.05
) -> Comparison:
    return compare(a, b, groups=groups, alpha=alpha)


def tables(n: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All numbers of answers gained and lost with at most this many changes."""
    gained, lost = np.divmod(np.arange((most + 1) ** 2), most + 1)
    possible = gained + lost <= min(n, most)
    return gained[possible], lost[possible]


def chances(
    gained: NDArray[np.int64], lost: NDArray[np.int64], n: int, gain: float, loss: float
) -> NDArray[np.float64]:
    """The probability of each table."""
    same = n - gained - lost
    ways = scipy.special.gammaln([n + 1]) - sum(scipy.special.gammaln(count + 1) for count in (gained, lost, same))
    xlogy = scipy.special.xlogy
    every: NDArray[np.float64] = np.exp(ways + xlogy(gained, gain) + xlogy(lost, loss) + xlogy(same, 1 - gain - loss))
    return every


# Every table that has a chance worth mentioning, so that nothing is drawn.
@pytest.mark.parametrize("n", [20, 33, 60, 125, 250, 466])
def test_the_interval_covers_the_truth_and_agrees_with_the_test(n: int) -> None:
    gained, lost = tables(n, round(0.3 * n + 6 * math.sqrt(0.21 * n)))
    low, high = tango(gained, lost, n, 0.05)
    p = p_of_changes(gained, lost, n)
    assert ((p < 0.05) == ((low > 0) | (high < 0))).all()
    assert (high - low > 1 / n).all()
    for changed in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3):
        for share in (0.5, 0.75, 0.9, 1.0):  # of the changes that are gains
            truth = changed * (2 * share - 1)
            covered = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
            coverage = chances(gained, lost, n, changed * share, changed * (1 - share))[covered].sum()
            assert coverage > 0.945, (changed, share)
            if n * changed > 50:
                assert coverage < 0.975, (changed, share)


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_test_rejects_equal_models_seldom_and_more_often_than_the_exact_test(alpha: float) -> None:
    sizes = (6, 20, 33, 60, 125, 466)
    discordant, gained = np.tril_indices(max(sizes) + 1)
    weight = scipy.stats.binom.pmf(gained, discordant, 0.5)
    exact = np.minimum(1, 2 * scipy.stats.binom.cdf(np.minimum(gained, discordant - gained), discordant, 0.5))
    for n in sizes:
        possible = discordant <= n
        p = p_of_changes(gained[possible], (discordant - gained)[possible], n)
        assert (p[exact[possible] < alpha] < alpha).all()  # what the exact test finds is found
        by_changes, before = (
            np.bincount(discordant[possible], weights=weight[possible] * (value < alpha))
            for value in (p, exact[possible])
        )
        for changed in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0):
            chance = scipy.stats.binom.pmf(np.arange(n + 1), n, changed)
            assert chance @ by_changes <= alpha + 1e-12, (n, changed)
            if n * changed > 5 and changed <= 0.3 and alpha == 0.05:
                assert chance @ by_changes > chance @ before


# Fagerland, Lydersen & Laake 2013, BMC Medical Research Methodology 13:91: mid-p 0.039, exact p 0.070.
def test_mid_p_against_a_publication() -> None:
    result = judge(*answers(1, 1, 7, 12))
    assert result.p_value == pytest.approx(0.039, abs=5e-4)
    # Tango's interval without any correction is -0.517 to -0.026.
    assert result.interval[0] == pytest.approx(-0.517 - 0.5 / 21, abs=0.002)
    assert -0.026 < result.interval[1] < 0


@pytest.mark.parametrize(("both", "gained", "lost", "neither"), [(200, 60, 39, 167), (5, 9, 1, 25), (3, 1, 8, 20)])
def test_the_p_value_is_mid_p(both: int, gained: int, lost: int, neither: int) -> None:
    result = judge(*answers(both, gained, lost, neither))
    binomial = scipy.stats.binom(gained + lost, 0.5)
    less = min(gained, lost)
    assert result.p_value == pytest.approx(2 * binomial.cdf(less) - binomial.pmf(less))
    assert (result.both_right, result.gained, result.lost, result.both_wrong) == (both, gained, lost, neither)
    assert result.delta == pytest.approx((gained - lost) / result.n)
    assert result.groups is None


def test_p_is_exact_if_most_answers_change() -> None:
    assert judge([False] * 8, [True] * 8).p_value == pytest.approx(2 / 2**8)
    assert judge(*answers(0, 7, 1, 8)).p_value == pytest.approx(2 * 9 / 2**8 - 8 / 2**8)
    assert judge(*answers(0, 7, 1, 7)).p_value == pytest.approx(2 * 9 / 2**8)


def test_the_same_scores_can_be_a_gain_or_chance() -> None:
    few = judge(*answers(219, 41, 20, 186))  # 239 against 260 of 466, 61 answers changed
    many = judge(*answers(139, 121, 100, 106))  # the same, 221 changed
    assert str(few.verdict) == (
        f"better: 260 of 466 against 239 (+4.5 points, 95 % interval {100 * few.interval[0]:+.1f} to "
        f"{100 * few.interval[1]:+.1f}, p = 0.0071); 41 answers gained, 20 lost"
    )
    assert str(many.verdict).startswith(
        "inconclusive: 260 of 466 against 239; the difference of +4.5 points could be chance (p = 0.16"
    )
    assert (few.baseline, few.finetuned, few.delta) == (many.baseline, many.finetuned, many.delta)
    second, first = answers(219, 41, 20, 186)
    mirrored = judge(first, second)
    assert str(mirrored.verdict).startswith("worse: 239 of 466 against 260 (-4.5 points")
    assert mirrored.interval == pytest.approx((-few.interval[1], -few.interval[0]))


def test_the_interval_is_about_the_analytic_one_at_its_level() -> None:
    n, gained, lost = 1000, 150, 100
    result = judge(*answers(400, gained, lost, 350))
    delta = (gained - lost) / n
    error = math.sqrt((gained + lost) / n - delta**2) / math.sqrt(n)
    assert result.interval == pytest.approx((delta - 1.96 * error, delta + 1.96 * error), abs=0.001)
    wider = judge(*answers(400, gained, lost, 350), alpha=0.01)
    assert wider.interval == pytest.approx((delta - 2.576 * error, delta + 2.576 * error), abs=0.0015)
    assert "99 % interval" in wider.verdict.reason
    assert (result.level, wider.level) == (0.95, 0.99)


def test_questions_that_share_a_group_count_less() -> None:
    # Each of 12 texts has 10 questions, and all questions of a text change together.
    a = [text < 3 for text in range(12) for _ in range(10)]
    b = [text >= 3 for text in range(12) for _ in range(10)]
    groups = [f"text {text}" for text in range(12) for _ in range(10)]
    alone, grouped = judge(a, b), judge(a, b, groups)
    assert alone.p_value < 1e-6
    assert alone.verdict.outcome == "better"
    # 9 of 12 texts: a sign test over the texts.
    assert grouped.p_value == pytest.approx(float(scipy.stats.binomtest(9, 12).pvalue), abs=0.03)
    assert grouped.verdict.outcome == "inconclusive"
    assert grouped.groups == 12
    assert grouped.changes is not None
    assert grouped.changes.rows == pytest.approx(11)
    assert "12 groups of questions are few" in str(grouped.verdict)
    assert grouped.interval[1] - grouped.interval[0] > 3 * (alone.interval[1] - alone.interval[0])


@pytest.mark.parametrize(("count", "of_each"), [(20, 8), (60, 5)])
def test_groups_are_covered_and_equal_models_are_seldom_called_different(count: int, of_each: int) -> None:
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(count), of_each)
    n, trials, rejected, alone = len(group), 800, 0.0, 0.0
    for truth in (0.0, 0.12):
        counts, size = [], Size(n, math.inf)
        for _ in range(trials):
            # In each group nearly all changes have the same direction.
            up = rng.beta(0.15 + truth / 2, 0.15 - truth / 2, count)[group] > rng.random(n)
            changed = rng.random(n) < 0.3
            a, b = (changed & ~up).astype(float), (changed & up).astype(float)
            size = changes(a, b, group)
            counts.append([b.sum(), a.sum(), size.rows])
        gained, lost, rows = np.transpose(counts)
        share = rows / n
        low, high = tango(gained * share, lost * share, rows, 0.05, size.freedom)
        assert np.mean((low <= truth) & (truth <= high)) > 0.925
        if truth == 0:
            rejected = float(np.mean(p_of_changes(gained * share, lost * share, rows, size.freedom) < 0.05))
            alone = float(np.mean(p_of_changes(gained, lost, n) < 0.05))
    assert 0.01 < rejected <= 0.07
    assert alone > 2 * rejected


def gain(answers: int, trials: int = 500) -> float:
    """How often a gain of 4.5 points is found on 466 questions, by answers per question.

    The probability of a right answer to a question comes from a beta distribution around 0.5, as of a model that
    is often undecided; the second model's is higher by the same odds for every question. Answers are independent.
    """
    rng = np.random.default_rng(1)
    first = rng.beta(2, 2, (trials, 466))
    odds = np.exp(0.232) * first / (1 - first)
    second = odds / (1 + odds)
    assert np.mean(second - first) == pytest.approx(0.045, abs=0.002)
    return found(rng.binomial(answers, first) / answers, rng.binomial(answers, second) / answers, answers)


def found(a: NDArray[np.float64], b: NDArray[np.float64], answers: int) -> float:
    """How often the test finds a difference between two models, one row per trial."""
    sizes = [changes(first, second, np.arange(a.shape[1]), answers) for first, second in zip(a, b, strict=True)]
    rows = np.array([size.rows for size in sizes])
    gained, lost = (values.mean(axis=1) * rows for values in (b * (1 - a), a * (1 - b)))
    return float(np.mean(p_of_changes(gained, lost, rows, sizes[0].freedom) < 0.05))


def test_power_increases_with_the_answers_per_question() -> None:
    power = {answers: gain(answers) for answers in (1, 3, 10)}
    assert power[1] == pytest.approx(0.3, abs=0.1)
    assert power[1] + 0.2 < power[3] < power[10] - 0.1
    assert power[10] > 0.9


@pytest.mark.parametrize("answers", [2, 10])
def test_repeats_of_equal_models_are_seldom_called_different(answers: int) -> None:
    rng = np.random.default_rng(4)
    rate = rng.beta(0.5, 0.5, (2, 1000, 60))  # each model knows other questions
    first, second = rng.binomial(answers, rate) / answers
    assert 0.02 < found(first, second, answers) <= 0.065


def judge_repeats(a: Sequence[float], b: Sequence[float], answers: int) -> Comparison:
    return compare(a, b, groups=None, alpha=0.05, answers=answers)


def test_repeats_that_never_differ_tell_as_much_as_one_answer() -> None:
    a, b = answers(30, 20, 5, 45)
    once, often = judge(a, b), judge_repeats(a, b, 10)
    assert often.delta == once.delta
    assert often.p_value == pytest.approx(once.p_value, rel=0.5)
    assert often.p_value >= once.p_value
    assert "50.0 % of 100 questions against 35.0 %" in often.verdict.reason
    assert (often.both_right, often.both_wrong) == (None, None)


def test_rows_without_a_group_stand_alone() -> None:
    a, b = answers(30, 20, 5, 15)
    alone = judge(a, b)
    assert judge(a, b, [None] * 70) == alone
    assert judge(a, b, [str(row) for row in range(70)]) == alone
    assert judge(a, b, ["pair", "pair", *[None] * 68]).groups == 69


def test_one_group_alone_shows_nothing() -> None:
    result = judge([False] * 50, [True] * 50, ["same"] * 50)
    assert (result.p_value, result.interval) == (1, (-1, 1))
    assert result.verdict.outcome == "inconclusive"
    assert "no difference can be shown" in str(result.verdict)


def test_no_change_and_only_changes_have_an_interval_with_a_width() -> None:
    same = judge([True, False] * 50, [True, False] * 50)
    assert (same.p_value, same.delta) == (1.0, 0.0)
    assert same.interval == pytest.approx((-0.046, 0.046), abs=0.001)
    assert str(same.verdict) == (
        "inconclusive: both models have 50 of 100 right; 0 answers gained, 0 lost, so no answer changed sides"
    )
    groups = [str(row // 4) for row in range(100)]
    assert judge([True] * 100, [True] * 100, groups).interval[1] > 2 * same.interval[1]  # 25 groups, not 100 questions
    all_gained = judge([False] * 100, [True] * 100)
    assert all_gained.interval[0] == pytest.approx(0.917, abs=0.001)
    assert all_gained.interval[1] == 1
    assert all_gained.p_value > 0
    assert "p < 0.0001" in all_gained.verdict.reason


def test_nothing_to_judge() -> None:
    empty = judge([], [])
    assert str(empty.verdict).startswith("inconclusive: cannot be judged")
    assert (empty.n, empty.p_value, empty.groups) == (0, 1.0, None)
    even = judge(*answers(1, 3, 3, 1), groups=["x"] * 8)
    assert (even.p_value, even.delta) == (1.0, 0.0)
    for result in (empty, even, judge([True], [False])):
        json.dumps(result.model_dump(), allow_nan=False)


def test_a_p_just_below_alpha_is_not_printed_as_alpha() -> None:
    a, b = answers(200, 57, 37, 172)
    p = judge(a, b).p_value
    verdict = judge(a, b, alpha=p + 1e-4).verdict
    assert verdict.outcome == "better"
    assert f"p = {p:.4g}" in verdict.reason
    assert judge(a, b, alpha=p).verdict.outcome == "inconclusive"


def test_what_does_not_pair_up_is_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 answers"):
        judge([True, False], [True])
    with pytest.raises(ValueError, match="1 groups"):
        judge([True, False], [True, True], ["x"])
    with pytest.raises(ValueError, match="alpha = 5"):
        judge([True], [True], alpha=5)


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.01, 1e-4])
def test_fewest_is_where_the_test_begins_to_reject(alpha: float) -> None:
    n = fewest(alpha)
    for count, rejects in ((n, True), (n - 1, False)):
        assert (judge([False] * count, [True] * count, alpha=alpha).p_value < alpha) == rejects
