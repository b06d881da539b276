"""How far two raters agree beyond chance, and a preference at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sftlab.eval.statistics.groups import numbered
from sftlab.eval.statistics.means import Mean
from sftlab.results import Estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWS = 2000


def kappa(a: Sequence[object], b: Sequence[object], groups: Sequence[str | None], alpha: float) -> Estimate:
    """Cohen's kappa of two raters with its interval, by a Bayesian bootstrap over groups.

    1 is full agreement, 0 that of chance. Where both raters give all rows the same rating, it is 0. Each draw has two
    unseen rows of weight Gamma(½), one of agreement at random and one of disagreement, so that full agreement has an
    interval, too.
    """
    import numpy as np
    from scipy.stats import norm, t

    ratings = sorted({*map(str, a), *map(str, b)})
    places = {rating: place for place, rating in enumerate(ratings)}
    size, group = len(ratings), numbered(groups, len(a))
    count = int(group.max()) + 1
    cells = np.zeros((count, size * size))
    cell = np.array([places[str(x)] * size + places[str(y)] for x, y in zip(a, b, strict=True)])
    np.add.at(cells, (group, cell), 1.0)
    value = float(_kappa(cells.sum(axis=0)[None], size)[0])
    if count == 1 or size == 1:
        return Estimate(value=value, interval=(-1.0, 1.0))
    draw = np.random.default_rng(0)
    tables = draw.exponential(size=(DRAWS, count)) @ cells
    unseen = np.full(size * size, 1 / (size * size))
    scale = len(a) / count
    low = tables + scale * draw.gamma(0.5, size=(DRAWS, 1)) * unseen
    agreed = np.diag(np.full(size, 1 / size)).ravel()
    high = tables + scale * draw.gamma(0.5, size=(DRAWS, 1)) * agreed
    tail = float(norm.cdf(np.sqrt(count / (count - 1)) * t.ppf(alpha / 2, count - 1)))
    ends = float(np.quantile(_kappa(low, size), tail)), float(np.quantile(_kappa(high, size), 1 - tail))
    return Estimate(value=value, interval=(min(ends[0], value), max(ends[1], value)))


def _kappa(tables: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    import numpy as np

    cells = tables.reshape(-1, size, size)
    cells = cells / cells.sum(axis=(1, 2), keepdims=True)
    observed = np.trace(cells, axis1=1, axis2=2)
    chance = (cells.sum(axis=1) * cells.sum(axis=2)).sum(axis=1)
    kappa: NDArray[np.float64] = np.where(chance < 1 - 1e-12, (observed - chance) / np.maximum(1 - chance, 1e-12), 0.0)
    return kappa


def at_equal_length(
    scores: Sequence[float], lengths: Sequence[float], groups: Sequence[str | None], alpha: float
) -> Estimate:
    """The mean score where both answers are equally long: the intercept of a regression on the difference in length.

    The interval is from the variance between groups, with Student's t. If all scores are equal, they have no variance,
    and the interval is that of the mean of bounded scores.

    Args:
        scores: The preference for the second answer, −1 to 1.
        lengths: By how much the second answer is longer, as the logarithm of the ratio of both lengths.
        groups: What source each row comes from.
        alpha: Chance that the interval misses the value.
    """
    import numpy as np
    from scipy.stats import t

    y, group = np.array(scores, dtype=np.float64), numbered(groups, len(scores))
    if np.ptp(y) < 1e-12:
        return Estimate(value=float(y[0]), interval=Mean(y, group, low=-1.0).interval(alpha))
    x = np.array(lengths, dtype=np.float64)
    columns = [np.ones(len(y))] + ([x] if x.std() > 1e-12 else [])
    design = np.stack(columns, axis=1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    count, free = int(group.max()) + 1, len(columns)
    if count <= free:
        return Estimate(value=float(coefficients[0]), interval=(-1.0, 1.0))
    residual = design * (y - design @ coefficients)[:, None]
    sums = np.zeros((count, free))
    np.add.at(sums, group, residual)
    covariance = inverse @ (sums.T @ sums) @ inverse * count / (count - free)
    half = float(t.isf(alpha / 2, count - free) * np.sqrt(covariance[0, 0]))
    value = float(np.clip(coefficients[0], -1, 1))
    return Estimate(value=value, interval=(max(-1.0, value - half), min(1.0, value + half)))
