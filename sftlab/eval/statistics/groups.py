"""Rows that share a source are not independent: sums over groups, and the number of independent rows they are worth.

Questions about one text or patient are right or wrong together. The variance of their mean is estimated from the sums
over whole groups, and critical values come from Student's t with one degree of freedom less than there are groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FEW = 20
"""With fewer groups intervals are too narrow: the variance between groups is hardly known."""


@dataclass(frozen=True)
class Size:
    """The number of independent rows that rows are worth, and how exactly this is known.

    ``rows`` may be a fraction. ``freedom`` has the degrees of freedom of Student's t; infinite if rows are independent
    and have one answer each.
    """

    rows: float
    freedom: float

    @property
    def known(self) -> bool:
        """Whether the variance can be estimated: not from one group."""
        return self.freedom > 0

    def critical(self, alpha: float) -> float:
        """The two-sided critical value of a standardised difference."""
        from scipy.stats import t

        return float(t.isf(alpha / 2, self.freedom)) if self.known else math.inf


def numbered(groups: Sequence[str | None] | None, n: int) -> NDArray[np.int64]:
    """The number of each row's group, from 0. A row without a group is a group of its own."""
    import numpy as np

    numbers: dict[object, int] = {}
    names = [None] * n if groups is None else groups
    rows = [numbers.setdefault(row if name is None else name, len(numbers)) for row, name in enumerate(names)]
    return np.array(rows, dtype=np.int64)


def effective(residuals: NDArray[np.float64], group: NDArray[np.int64], variance: float, answers: float = 1.0) -> Size:
    """The number of independent rows with one answer each whose mean is as uncertain as that of the given rows.

    The design effect (Kish 1965) is the variance of the sum, estimated from the sums over groups, divided by the
    variance that independent rows would have. It is at least 1 / ``answers``: answers of one question are at best
    independent. Where ``variance`` is 0, nothing is known of it, and rows of a group count as one.

    Args:
        residuals: For each row the difference between its value and the mean.
        group: The number of each row's group.
        variance: The variance of the sum if rows were independent and had one answer each.
        answers: Answers per row that were averaged.
    """
    import numpy as np

    n = len(residuals)
    count = int(group.max()) + 1
    if count == n and answers == 1:
        return Size(n, math.inf)
    if count == 1:
        return Size(1, 0)
    sizes = np.bincount(group)
    if variance > 1e-12 * n:
        sums = np.bincount(group, weights=residuals)
        observed = float(count / (count - 1) * (sums**2).sum())
        design = max(observed / variance, 1 / answers)
    else:
        design = float((sizes**2).sum()) / n
    return Size(n / design, count - 1)
