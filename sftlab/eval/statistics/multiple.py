"""Several tests at once, and the fewest rows with which a test can reject."""

from __future__ import annotations

import math
from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method (1979), in the same order: multiplied, at most 1."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def fewest(alpha: float) -> int:
    """The smallest number of rows (or groups of them) in which a paired test can reach p < alpha at all.

    With n of them the smallest p is 2 / 2^n: all went one way.
    """
    return math.floor(1 - math.log2(alpha)) + 1
