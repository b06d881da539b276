from __future__ import annotations

import numpy as np
import pytest

from sftlab.eval.statistics import over_trainings


def drawn(rng: np.random.Generator, trainings: int, spread: float, gain: float = 0.0) -> list[list[float]]:
    """Differences on 200 questions of which a quarter change; each training has its own mean difference."""
    shift = rng.normal(gain, spread, (trainings, 1)) / 0.5
    up = rng.random((trainings, 200)) < np.clip(rng.beta(0.5, 0.5, 200) + shift, 0, 1)
    return np.where(rng.random((trainings, 200)) < 0.25, np.where(up, 1.0, -1.0), 0.0).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_recipe_without_a_mean_gain_is_rarely_called_better_or_worse(spread: float) -> None:
    rng = np.random.default_rng(3)
    wrong = [over_trainings(drawn(rng, 3, spread)).p_value() < 0.05 for _ in range(400)]
    assert np.mean(wrong) < 0.075


def test_a_gain_of_all_trainings_is_found() -> None:
    rng = np.random.default_rng(4)
    assert np.mean([over_trainings(drawn(rng, 3, 0.01, 0.15)).p_value() < 0.05 for _ in range(100)]) > 0.9


def test_trainings_that_disagree_decide_over_questions_that_agree() -> None:
    """Every question is gained in one training and lost in the other: 1,000 questions cannot tell."""
    apart = over_trainings([[0.1] * 1000, [0.02] * 1000])
    assert apart.p_value() > 0.05
    assert apart.interval(0.05)[0] < 0 < apart.interval(0.05)[1]
    assert apart.deltas == pytest.approx([0.1, 0.02])
    assert over_trainings([[0.1] * 1000, [0.1] * 1000]).p_value() == 0


def test_the_interval_contains_0_if_and_only_if_p_is_large() -> None:
    rng = np.random.default_rng(5)
    for gain in np.linspace(0, 0.15, 30):
        seen = over_trainings(drawn(rng, 3, 0.02, gain))
        assert (seen.interval(0.1)[0] <= 0 <= seen.interval(0.1)[1]) == (seen.p_value() >= 0.1)


def test_questions_of_one_group_count_together() -> None:
    differences = drawn(np.random.default_rng(6), 3, 0.0, 0.1)
    twice = [row * 2 for row in differences]
    names = [str(place) for place in range(200)] * 2
    assert over_trainings(twice, names).p_value() == pytest.approx(over_trainings(differences).p_value(), rel=0.02)
    assert over_trainings(differences, ["a"] * 200).p_value() == 1


def test_one_training_has_no_spread() -> None:
    for few in ([], [[0.1]], [[0.1], [0.1, 0.2]], [[], []]):
        with pytest.raises(ValueError, match="two or more trainings"):
            over_trainings(few)
