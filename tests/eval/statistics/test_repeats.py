from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sftlab.eval.statistics import changed, majority, noise, pass_at
from sftlab.eval.statistics.repeats import averages


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


def test_pass_at_is_the_mean_over_all_choices_of_answers() -> None:
    runs = (np.random.default_rng(1).random((6, 20)) < 0.3).tolist()
    assert pass_at(runs, 1) == pytest.approx(np.mean(runs))
    assert pass_at(runs, 6) == np.mean(np.any(runs, axis=0))
    chosen = [np.any([runs[number] for number in some], axis=0) for some in combinations(range(6), 3)]
    assert pass_at(runs, 3) == pytest.approx(np.mean(chosen))
    with pytest.raises(ValueError, match="pass@7 cannot be estimated from 6"):
        pass_at(runs, 7)


def test_the_majority_decides_and_equally_frequent_answers_share() -> None:
    answers = [["A", "B", None, "A", None], ["A", "C", None, "B", "B"], ["B", "B", None, "C", None]]
    right = [[answer == "B" for answer in row] for row in answers]
    # A (wrong), B (right), none, one of three, and the only answer that was extracted.
    assert majority(answers, right) == pytest.approx((0 + 1 + 0 + 1 / 3 + 1) / 5)
    assert majority([[], []], [[], []]) == 0


def test_averages() -> None:
    assert averages([[True, False, True], [True, False, False]]) == [1, 0, 0.5]
