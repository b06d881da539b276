"""Means of scores between 0 and 1, such as ROUGE, and of their differences: tests and intervals that skew cannot fool.

If a model writes slightly better texts and ruins one of 25, 20 rows often hold none of the ruined ones, and every
difference that they show is a gain. No test that only looks at the observed rows can know. Gaffke's test (2005) adds
what was not observed: one row with the lowest possible value. With weights E from an exponential distribution, one
per row, the lower end of the interval is the alpha/2 quantile of the weighted mean of all n + 1 values. For values of
0 and 1 that is the interval of Clopper and Pearson, and no distribution of bounded values is known for which it has
less than its level (Learned-Miller & Thomas 2019, arXiv 1905.06208). For many rows it approaches Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

from sftlab.eval.statistics.groups import Size, numbered
from sftlab.eval.statistics.limits import ANY, Judged, Limits
from sftlab.eval.statistics.verdict import few_groups, no_questions, pairs, worded
from sftlab.results import Comparison

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NODES = 64
"""Points of the numerical integral: p has an error of about 1e-6 of its value."""

BLOCK = 32
"""Factors multiplied before a logarithm is taken, within the range of a float."""


class Mean:
    """The mean of values between ``low`` and ``high``, whose rows may share groups.

    Of groups, sums are weighted as the values of rows are. In addition they are tested by Student's t with the
    variance between groups, and the larger p counts: with few groups the exponential weights vary too little.
    """

    def __init__(self, values: NDArray[np.float64], group: NDArray[np.int64], *, low: float, high: float = 1.0) -> None:
        import numpy as np

        self.sizes = np.bincount(group, weights=np.ones(len(values)))
        self.sums = np.bincount(group, weights=values)
        self.limits = (low, high)
        self.rows, count = len(values), len(self.sizes)
        self.mean = round(math.fsum(values) / self.rows, 12) + 0.0  # gains that undo losses leave no 1e-17
        self.size = Size(count, math.inf if count == self.rows else count - 1)
        residuals = self.sums - self.mean * self.sizes
        self.error = math.sqrt(count / max(1, count - 1) * float((residuals**2).sum())) / self.rows

    def shifted(self, by: float) -> Mean:
        """The same rows with other values: ``by`` is added to each."""
        other = copy(self)
        other.mean, other.sums = self.mean + by, self.sums + by * self.sizes
        return other

    def p_value(self, mean: float) -> float:
        """Two-sided p of a mean."""
        import numpy as np
        from scipy.stats import t

        if not self.size.known:
            return 1.0
        side, limit = (1, self.limits[0]) if mean < self.mean else (-1, self.limits[1])
        weights = side * np.append(self.sums - mean * self.sizes, limit - mean)
        p = 2 * float(at_most_zero(weights[None])[0])
        if math.isfinite(self.size.freedom) and self.error > 0:
            p = max(p, 2 * float(t.sf(abs(self.mean - mean) / self.error, self.size.freedom)))
        return min(1.0, p)

    def interval(self, alpha: float) -> tuple[float, float]:
        """The interval of all means with p ≥ alpha."""
        from scipy.optimize import brentq

        def excess(mean: float) -> float:
            return math.log(max(self.p_value(mean), 1e-300) / alpha)

        ends = []
        for limit in self.limits:
            inside = excess(limit) >= 0 or abs(limit - self.mean) < 1e-12
            ends.append(limit if inside else float(brentq(excess, limit, self.mean, xtol=1e-10)))
        return ends[0], ends[1]


def at_most_zero(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each row of weights w the probability that Σ w·E ≤ 0, with independent E from an exponential distribution.

    That is the integral of exp(K(s)) / −s along a line through the saddle point of K(s) = −Σ log(1 − s·w), by the
    trapezoidal rule (Daniels 1954 has its first terms). It is exact to rounding, and draws no random numbers.
    """
    import numpy as np

    lowest, highest = weights.min(axis=1), weights.max(axis=1)
    result = np.where(highest <= 0, 1.0, 0.0)
    todo = (lowest < 0) & (highest > 0)
    if not todo.any():
        return result
    w = weights[todo]
    negative = w.sum(axis=1) < 0
    w = np.where(negative[:, None], -w, w)
    w = w / np.sqrt((w**2).sum(axis=1, keepdims=True))

    low, high = 1 / w.min(axis=1), np.zeros(len(w))
    limit = low / 2
    for _ in range(20):  # any line near the saddle point will do
        s = (low + high) / 2
        right = (w / (1 - s[:, None] * w)).sum(axis=1) >= 0  # the derivative of K increases
        low, high = np.where(right, low, s), np.where(right, s, high)
    s = np.minimum((low + high) / 2, np.maximum(-0.5, limit))  # not too near to the pole at 0
    scale = 1 / np.sqrt(((w / (1 - s[:, None] * w)) ** 2).sum(axis=1))

    terms = w.shape[1]
    end = math.asinh(math.sqrt(terms * (10 ** (32 / terms) - 1))) + 1  # where nothing is left of the integrand
    nodes = (np.arange(NODES) + 0.5) * end / NODES
    points = s[:, None] + 1j * scale[:, None] * np.sinh(nodes)
    steps = scale[:, None] * np.cosh(nodes) * end / NODES
    logarithm = np.zeros_like(points)
    for start in range(0, terms, BLOCK):
        factors = 1 - points[:, :, None] * w[:, None, start : start + BLOCK]
        logarithm -= np.log(np.prod(factors, axis=2))
    tail = np.clip((np.exp(logarithm) / -points * steps).real.sum(axis=1) / math.pi, 0, 1)
    result[todo] = np.where(negative, 1 - tail, tail)
    return result


def mean_interval(
    scores: Sequence[float], groups: Sequence[str | None] | None, *, alpha: float = 0.05
) -> tuple[float, float]:
    """The interval of a mean of scores between 0 and 1, at the level 1 − alpha.

    Raises:
        ValueError: There are no scores.
    """
    import numpy as np

    if not scores:
        raise ValueError("a mean of no scores has no interval; give at least one")
    return Mean(np.array(scores, dtype=np.float64), numbered(groups, len(scores)), low=0.0).interval(alpha)


def differences(a: Sequence[float], b: Sequence[float], groups: Sequence[str | None] | None) -> Mean:
    """The mean of the differences b − a."""
    import numpy as np

    values = np.array(b, dtype=np.float64) - np.array(a, dtype=np.float64)
    return Mean(values, numbered(groups, len(values)), low=-1.0)


def compare_scores(
    a: Sequence[float],
    b: Sequence[float],
    *,
    groups: Sequence[str | None] | None,
    alpha: float,
    metric: str = "score",
    name: str = "mean",
    limits: Limits = ANY,
) -> Comparison:
    """Compare two models by scores between 0 and 1 that are no right or wrong, such as ROUGE-L.

    Interval and p belong to the mean of the differences (``Mean``): the interval contains 0 if and only if p ≥ alpha.
    Two scores are equal only if they are the same number: a row counts as gained however small the gain. The result
    has no ``both_right`` and ``both_wrong``.

    Args:
        a: The scores of the base's answers.
        b: The scores of the fine-tuned model's answers.
        groups: What source each row comes from; None, as a whole or for one row, where it stands alone.
        alpha: Chance of a false alarm that is accepted, in (0, 1).
        metric: Key of the metric in the result.
        name: Name of the mean in the verdict.
        limits: The smallest gain that matters and the largest acceptable loss.

    Raises:
        ValueError: The sequences are not equally long, a score is not in [0, 1], or alpha is not in (0, 1).
    """
    import numpy as np

    n = pairs(len(a), len(b), groups, alpha)
    if n == 0:
        return no_questions(metric, alpha)
    scores: NDArray[np.float64] = np.array([a, b], dtype=np.float64)
    if not ((scores >= 0) & (scores <= 1)).all():
        odd = next(float(score) for score in scores.flat if not 0 <= score <= 1)
        raise ValueError(f"{odd} is not a score between 0 and 1; divide all scores by the highest possible one")

    gained, lost = int((scores[1] > scores[0]).sum()), int((scores[1] < scores[0]).sum())
    difference = differences(a, b, groups)
    judged = Judged(
        delta=difference.mean,
        interval=difference.interval(alpha),
        alpha=alpha,
        limits=limits,
        p_value=difference.p_value,
        bound=lambda level: difference.interval(level)[0],
        n=n,
        error=math.hypot(difference.error, 1 / n),  # with the row that the test adds
    )
    count = len(difference.sums)
    mean_a, mean_b = (math.fsum(row) / n for row in scores)
    verdict = worded(
        judged,
        score=f"{name} {mean_b:.3f} against {mean_a:.3f}",
        same=f"both models have a {name} of {mean_a:.3f}",
        change=f"{gained} answers scored higher, {lost} lower",
        unchanged="" if gained else ", so no answer's score changed",
        notes=few_groups(count, n),
    )
    return Comparison(
        n=n,
        metric=metric,
        baseline=mean_a,
        finetuned=mean_b,
        level=1 - alpha,
        **judged.fields(),
        gained=gained,
        lost=lost,
        groups=count if count < n else None,
        verdict=verdict,
    )
