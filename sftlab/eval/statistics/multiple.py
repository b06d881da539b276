"""Several tests at once, and the fewest rows with which a test can reject."""

from __future__ import annotations

import math
from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method (1979), in the same order: multiplied, at most 1.

    multipletests of statsmodels computes the same, and collects the garbage of the process at every call.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for before, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - before) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def fewest(alpha: float) -> int:
    """The smallest number of rows (or groups of them) in which a paired test can reach p < alpha at all.

    With n of them the smallest p is 2 / 2^n: all went one way.
    """
    return math.floor(1 - math.log2(alpha)) + 1
