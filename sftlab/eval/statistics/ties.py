"""Which checkpoints have a validation loss that chance cannot tell from the lowest one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from sftlab.eval.statistics.groups import numbered

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Of the loss. Losses are computed in float32 (2⁻²⁴ = 6e-8): weights that hardly change shift every row by a rounding
# error in the same direction, which a test over rows takes for a difference.
ROUNDING = 1e-6


def ties(
    losses: Sequence[Sequence[float]],
    tokens: Sequence[float],
    groups: Sequence[str | None] | None = None,
    *,
    alpha: float = 0.05,
) -> list[bool]:
    """For each checkpoint whether chance can explain that its token-weighted mean loss is not the lowest.

    A multiple comparison with the best: if all checkpoints are equally good, the probability that any of them is
    called worse is at most ``alpha``, however many there are. A checkpoint is worse if its difference to the lowest
    loss exceeds a number of standard errors of this difference: the 1 − alpha quantile of the largest standardised
    difference among as many checkpoints (Tukey's studentised range), stretched to Student's t for the number of rows.
    It is correct for checkpoints whose losses are independent given the row, and holds for correlated ones, whose
    largest difference is smaller (Hayter 1984). Then the bound is computed again for the checkpoints that are left,
    until no more are worse.

    The lowest one is always tied. Over a single row, or a single group, no difference can be shown, and all are tied.
    A checkpoint with a loss that is not finite never is. A difference of a millionth of the loss or less is rounding.

    Args:
        losses: For each checkpoint, the summed negative log-likelihood of each row, in nats.
        tokens: The target tokens of each row; rows without any are left out.
        groups: The source of each row: rows of a group vary together. None, where a row stands alone.
        alpha: The probability that a checkpoint which is as good as the best is called worse.

    Raises:
        ValueError: The lengths differ, no row has a target token, or no checkpoint has a finite loss.
    """
    import numpy as np

    if len(losses) == 0:
        return []
    if any(len(row) != len(tokens) for row in losses) or (groups is not None and len(groups) != len(tokens)):
        raise ValueError(f"the losses of some checkpoint are not over the {len(tokens)} validation rows")
    weight: NDArray[Any] = np.asarray(tokens, dtype=np.float64)
    rows = weight > 0
    loss: NDArray[Any] = np.asarray(losses, dtype=np.float64)[:, rows]
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(loss).all(axis=1))
    if not rows.any() or not finite.any():
        raise ValueError("no validation row with target tokens and a finite loss; nothing to choose a checkpoint by")
    group, weight, loss = numbered(groups, len(tokens))[rows], weight[rows], loss[finite]
    group = np.unique(group, return_inverse=True)[1]
    tied: NDArray[np.bool_] = finite.copy()
    if len(set(group)) > 1:
        tied[finite] = _equal(loss, weight, group, alpha)
    return [bool(tie) for tie in tied]


def _equal(
    loss: NDArray[np.float64], weight: NDArray[np.float64], group: NDArray[np.int64], alpha: float
) -> NDArray[np.bool_]:
    """Which checkpoints are not worse than the one with the lowest loss; all losses are finite."""
    import numpy as np
    from scipy.stats import norm, t

    mean = loss.sum(axis=1) / weight.sum()
    best = int(mean.argmin())
    excess = mean - mean[best]
    # Rows that are hard for all checkpoints do not distinguish them.
    residual = (loss - loss[best] - excess[:, None] * weight) / weight.sum()
    order = np.argsort(group, kind="stable")
    sums = np.add.reduceat(residual[:, order], np.searchsorted(group[order], np.arange(group.max() + 1)), axis=1)
    weights = np.bincount(group, weights=weight)
    # The noise of a loss grows with its tokens, and few long rows decide on its variance: the degrees of freedom of a
    # variance are 2n / (kurtosis - 1), and the kurtosis is three times that of the weights.
    kurtosis = 3 * len(weights) * float((weights**4).sum() / (weights**2).sum() ** 2)
    count = 2 * len(weights) / (kurtosis - 1)
    error = np.sqrt(len(weights) / (len(weights) - 1) * (sums**2).sum(axis=1))
    constant = error <= 1e-12 * weight.size  # the same difference in every row
    rounding = max(1e-12, ROUNDING * float(mean[best]))

    left: NDArray[np.bool_] = np.ones(len(mean), dtype=np.bool_)
    while (members := int(left.sum())) > 1:
        bound = float(t.isf(norm.sf(_range(members, alpha)), max(1.0, count - 1)))
        worse = left & (excess > np.maximum(rounding, np.where(constant, 0.0, bound * error)))
        if not worse.any():
            break
        left &= ~worse
    return left


@cache
def _range(checkpoints: int, alpha: float) -> float:
    """The quantile of the largest difference of as many standard normal numbers, in its standard errors."""
    from scipy.stats import studentized_range

    return float(studentized_range.isf(alpha, checkpoints, math.inf)) / math.sqrt(2)
