"""The prediction of a learning curve: its interval has its level on synthetic curves."""

from __future__ import annotations

import numpy as np
import pytest

from sftlab.eval.statistics.curve import power_law

SHARES = np.array([0.12, 0.25, 0.5, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize(("exponent", "offset"), [(0.15, 0.0), (0.3, 1.0), (0.7, 1.5)])
def test_the_interval_covers_the_next_training(exponent: float, offset: float) -> None:
    rng, covered, count = np.random.default_rng(1), 0, 40
    for _ in range(count):
        value = offset + (2 - offset) * SHARES**-exponent + rng.normal(0, 0.02, 4)
        truth = offset + (2 - offset) * 2**-exponent + rng.normal(0, 0.02)
        made = power_law((1000 * SHARES).tolist(), value.tolist(), 2000)
        assert made is not None
        covered += made.interval[0] <= truth <= made.interval[1]
    assert covered / count >= 0.85  # 0.95 within three standard errors


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_of_an_error_covers_trainings_that_differ_by_more_than_the_questions(seeds: int) -> None:
    """Trainings differ by 5 points beside the noise of 96 questions, of which only the latter is known."""
    rng, covered, count, questions = np.random.default_rng(4), 0, 20, 96
    for _ in range(count):
        law = 0.1 + 0.4 * np.append(np.repeat(SHARES, seeds), 2.0) ** -0.5
        errors = rng.binomial(questions, np.clip(law + rng.normal(0, 0.05, len(law)), 0, 1)) / questions
        rows = (192 * np.repeat(SHARES, seeds)).tolist()
        made = power_law(rows, errors[:-1].tolist(), 384, noise=0.05)
        assert made is not None
        covered += made.interval[0] <= errors[-1] <= made.interval[1]
    assert covered / count >= 0.85


def test_a_clear_curve_is_extrapolated_and_seeds_narrow_the_interval() -> None:
    rng = np.random.default_rng(2)
    value = 0.5 + 1.5 * SHARES**-0.4
    clear = power_law((1000 * SHARES).tolist(), (value + rng.normal(0, 1e-4, 4)).tolist(), 2000)
    assert clear is not None
    assert clear.value == pytest.approx(0.5 + 1.5 * 2**-0.4, abs=0.03)
    noisy = [power_law((1000 * np.repeat(SHARES, seeds)).tolist(),
                       (np.repeat(value, seeds) + rng.normal(0, 0.03, 4 * seeds)).tolist(), 2000)
             for seeds in (1, 5)]  # fmt: skip
    widths = [made.interval[1] - made.interval[0] for made in noisy if made is not None]
    assert widths[1] < widths[0]


def test_a_known_noise_widens_the_interval_and_few_sizes_predict_nothing() -> None:
    value = (0.5 + 1.5 * SHARES**-0.4).tolist()
    sure, unsure = (power_law((100 * SHARES).tolist(), value, 200, noise=noise) for noise in (0.0, 0.1))
    assert sure is not None
    assert unsure is not None
    assert unsure.interval[1] - unsure.interval[0] > 2 * (sure.interval[1] - sure.interval[0])
    assert power_law([10, 20, 20], [1.0, 0.9, 0.8], 40) is None
    assert power_law([10, 20, 30], [1.0, 0.9, float("nan")], 60) is None
