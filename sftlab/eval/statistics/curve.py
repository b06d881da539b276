"""A learning curve: how a loss or an error falls with the number of training rows, and what more rows would give.

The law is c + a·n^(−b): an error c that no number of rows removes, and a part that falls with a power of the rows. A
curve has few points, and its noise is unknown, so no single fit is trusted: all laws are weighed by how well they fit.
For given b and c the law is linear in a, and a and the noise are integrated in closed form (a flat prior for a, 1/σ for
the noise σ), which leaves Student's t. b and c are summed over a grid. No random numbers are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

EXPONENTS = (0.05, 1.2, 47)  # lowest, highest, number; published exponents are between 0.05 and 1
OFFSETS = 48  # values of c, from 0 to the lowest value


@dataclass(frozen=True)
class Prediction:
    """The value at a number of rows with its interval, and the mean exponent of the laws that fit."""

    rows: float
    value: float
    interval: tuple[float, float]
    exponent: float


def power_law(
    rows: Sequence[float], values: Sequence[float], at: float, *, alpha: float = 0.05, noise: float = 0.0
) -> Prediction | None:
    """Predict the value of one more training at a number of rows; None from fewer than three different numbers.

    Args:
        rows: The training rows of each training.
        values: Its loss or error, at least 0.
        at: The number of rows to predict at.
        alpha: 1 − the level of the interval.
        noise: A standard deviation of the values that is known, such as that of an error over few questions; the
            noise that the points show is added to it.
    """
    import numpy as np
    from scipy.special import stdtr

    if len(set(rows)) < 3 or not all(math.isfinite(value) and value >= 0 for value in values):
        return None
    n, y = np.array(rows, dtype=np.float64) / max(rows), np.array(values, dtype=np.float64)
    freedom = len(y) - 1
    b = np.linspace(*EXPONENTS[:2], EXPONENTS[2])[:, None]
    c = np.linspace(0, float(y.min()), OFFSETS, endpoint=False)[None, :]
    x = n[None, :] ** -b  # (exponents, points)
    square = (x**2).sum(axis=1)[:, None]
    rest = y[None, None, :] - c[:, :, None]  # (1, offsets, points)
    a = np.maximum((x[:, None, :] * rest).sum(axis=2) / square, 0)
    # Values that no law explains better than a millionth would make one law certain.
    floor = freedom * (noise**2 + (1e-4 * float(y.mean())) ** 2)
    squares = ((rest - a[:, :, None] * x[:, None, :]) ** 2).sum(axis=2) + floor
    weight = np.exp(-freedom / 2 * np.log(squares / squares.min())) / np.sqrt(square)
    weight /= weight.sum()
    new = (at / max(rows)) ** -b
    center, scale = c + a * new, np.sqrt(squares / freedom * (1 + new**2 / square))

    likely = weight > 1e-6 * weight.max()
    parts, center, scale = weight[likely] / weight[likely].sum(), center[likely], scale[likely]

    def quantile(p: float) -> float:
        low, high = float((center - 60 * scale).min()), float((center + 60 * scale).max())
        for _ in range(40):
            middle = (low + high) / 2
            below = float((parts * stdtr(freedom, (middle - center) / scale)).sum())
            low, high = (middle, high) if below < p else (low, middle)
        return max(0.0, (low + high) / 2)

    return Prediction(
        rows=at,
        value=quantile(0.5),
        interval=(quantile(alpha / 2), quantile(1 - alpha / 2)),
        exponent=float((weight * b).sum()),
    )
