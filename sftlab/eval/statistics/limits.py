"""A difference compared with limits: is the gain large enough to matter, and the loss small enough to be accepted?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypedDict

from sftlab.results import Comparison, NonInferiority, Outcome

POWER = 0.8
"""Probability with which as many questions as ``Judged.needed`` decide."""


@dataclass(frozen=True)
class Limits:
    """The smallest gain that matters and the largest acceptable loss, fractions; no margin: it is not tested."""

    smallest_gain: float = 0.0
    margin: float | None = None


ANY = Limits()
"""Any gain matters, and no loss is tested."""


class Fields(TypedDict):
    """The fields of a Comparison that its limits decide."""

    delta: float
    interval: tuple[float, float]
    p_value: float
    smallest_gain: float
    p_gain: float | None
    needed: int | None
    noninferiority: NonInferiority | None


@dataclass(frozen=True)
class Judged:
    """A difference with the tests of its limits.

    ``p_value`` is the two-sided p of a difference, and ``bound`` the lower end of its interval at 1 − alpha.
    """

    delta: float
    interval: tuple[float, float]
    alpha: float
    limits: Limits
    p_value: Callable[[float], float]
    bound: Callable[[float], float]
    n: int
    error: float
    """Standard error of the difference."""

    @property
    def outcome(self) -> Outcome:
        """The outcome by the interval: above the smallest gain, below 0, or between; inconclusive if it has a limit."""
        gain = self.limits.smallest_gain
        if self.delta > gain and self.p_value(gain) < self.alpha:
            return "better"
        if self.delta < 0 and self.p_value(0) < self.alpha:
            return "worse"
        if gain > 0 and self.delta < gain and self.p_value(gain) < self.alpha:
            return "too_small"
        return "inconclusive"

    def fields(self) -> Fields:
        """The fields of the comparison."""
        gain = self.limits.smallest_gain
        return {
            "delta": self.delta,
            "interval": self.interval,
            "p_value": self.p_value(0),
            "smallest_gain": gain,
            "p_gain": self.p_value(gain) if gain else None,
            "needed": self.needed(gain, self.alpha / 2) if self.outcome == "inconclusive" else None,
            "noninferiority": self.noninferiority(),
        }

    def noninferiority(self) -> NonInferiority | None:
        """Test whether the loss is smaller than the margin, one-sided; None without a margin."""
        if (margin := self.limits.margin) is None:
            return None
        above = self.p_above(-margin)
        outcome: Literal["no_worse", "worse", "inconclusive"] = "inconclusive"
        if above < self.alpha:
            outcome = "no_worse"
        elif 1 - above < self.alpha:
            outcome = "worse"
        return NonInferiority(
            margin=margin,
            p_value=above,
            p_worse=1 - above,
            bound=self.bound(min(2 * self.alpha, 0.98)),
            level=1 - self.alpha,
            outcome=outcome,
            needed=self.needed(-margin, self.alpha) if outcome == "inconclusive" else None,
        )

    def p_above(self, limit: float) -> float:
        """One-sided p of a difference of at most ``limit``; small if the difference is larger."""
        tail = self.p_value(limit) / 2
        return tail if self.delta > limit else 1 - tail

    def needed(self, limit: float, alpha: float) -> int | None:
        """About how many questions decide with 80 % power whether the difference is above or below a limit.

        Differences and groups are taken to be as the observed ones, and ``alpha`` is one-sided:
        n (z(1 − alpha) + z(power))² error² / (difference − limit)². None if the difference is the limit.
        """
        distance = abs(self.delta - limit)
        if distance < 1e-9 or not 0 < alpha < 0.5:
            return None
        normal = NormalDist()
        factor = (normal.inv_cdf(1 - alpha) + normal.inv_cdf(POWER)) * self.error / distance
        return max(self.n + 1, math.ceil(self.n * factor**2))


def margin_to_rule_out(n: int, alpha: float, changed: float = 0.1) -> float:
    """About the smallest margin that a test set rules out with 80 % power if nothing is lost.

    A share ``changed`` of the answers changes, half of them each way: (z(1 − alpha) + z(power)) √(changed / n), and
    more where few questions allow no statement at all.
    """
    if n == 0 or not 0 < alpha < 0.5:
        return 1.0
    normal = NormalDist()
    critical = normal.inv_cdf(1 - alpha)
    return min(1.0, max((critical + normal.inv_cdf(POWER)) * math.sqrt(changed / n), critical**2 / n))


def deciding_p(comparison: Comparison) -> float:
    """The p-value on which the outcome of a comparison rests, to be adjusted for several of them.

    It is that of no difference for "worse", and otherwise that of the smallest gain.
    """
    worse = comparison.verdict.outcome == "worse"
    return comparison.p_value if worse or comparison.p_gain is None else comparison.p_gain
