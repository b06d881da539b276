from __future__ import annotations

import numpy as np
import pytest

from sftlab.eval.statistics import accuracy, subgroup, wilson


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


def test_independent_rows_have_wilsons_interval() -> None:
    right = [True] * 30 + [False] * 70
    assert accuracy(right) == wilson(30, 100)
    assert accuracy(right, [str(row) for row in range(100)]) == wilson(30, 100)
    assert accuracy(right, [None] * 100, alpha=0.1) == wilson(30, 100, alpha=0.1)
    with pytest.raises(ValueError, match="0 questions"):
        accuracy([])


@pytest.mark.parametrize(("count", "of_each", "rate"), [(20, 12, 0.6), (40, 5, 0.8), (60, 20, 0.5)])
def test_the_interval_covers_the_truth_where_rows_share_groups(count: int, of_each: int, rate: float) -> None:
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(count), rng.integers(of_each // 2, of_each * 3 // 2, count))
    names = [str(number) for number in group]
    covered, alone = 0, 0
    for _ in range(200):
        of_group = rng.beta(rate, 1 - rate, count)  # half of the variance is between groups
        right = list(rng.random(len(group)) < of_group[group])
        low, high = accuracy(right, names)
        covered += low <= rate <= high
        low, high = wilson(sum(right), len(right))
        alone += low <= rate <= high
    assert covered / 200 >= 0.92
    assert alone / 200 < 0.85


def test_repeats_narrow_the_interval_as_far_as_their_answers_differ() -> None:
    rng = np.random.default_rng(2)
    rate = np.full(100, 0.5)
    width: dict[int, float] = {}
    for answers in (1, 4):
        covered = 0
        for _ in range(200):
            low, high = accuracy(list(rng.binomial(answers, rate) / answers), None, 0.05, answers)
            covered += low <= 0.5 <= high
            width[answers] = width.get(answers, 0) + (high - low) / 200
        assert covered / 200 == pytest.approx(0.95, abs=0.04)
    assert width[4] == pytest.approx(width[1] / 2, rel=0.1)
    same = [True] * 50 + [False] * 50  # ten equal answers to each question tell no more than one
    low, high = wilson(50, 100)
    assert accuracy(same, None, 0.05, 10) == pytest.approx((low, high), abs=0.003)


def test_groups_in_which_all_are_right_count_as_one_row_each() -> None:
    groups = [str(row // 10) for row in range(100)]
    low, high = accuracy([True] * 100, groups)
    assert high == 1
    assert low < wilson(10, 10)[0]
    assert accuracy([True] * 100, ["same"] * 100) == (0, 1)


def test_subgroup() -> None:
    result = subgroup([True, False, True, True], ["b", "a", "b", None])
    assert list(result) == ["b", "a"]
    assert result["b"] == (2, 2, *wilson(2, 2))
    assert result["a"] == (0, 1, *wilson(0, 1))
    with pytest.raises(ValueError, match="shorter"):
        subgroup([True, True], ["a"])
