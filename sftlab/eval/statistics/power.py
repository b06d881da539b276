"""The smallest difference that a test set can show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sftlab.eval.statistics.groups import Size
from sftlab.eval.statistics.means import Mean
from sftlab.eval.statistics.multiple import fewest
from sftlab.eval.statistics.paired import p_of_changes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def minimal_detectable_difference(
    n: float, changed: float = 0.2, alpha: float = 0.05, power: float = 0.8, freedom: float = math.inf
) -> float:
    """The smallest difference in accuracy that the paired test finds with probability ``power``.

    A share ``changed`` of the answers changes sides, or the share that the difference needs if that is larger (then
    all changes go one way). The power is exact: the number of changed answers D is binomial (n, share), the number
    gained is binomial (D, (1 + difference / share) / 2), and the test rejects on it; the difference is then searched.
    Connor (1987, Biometrics 43:207–211) approximates the same by
    n = (z(1 − alpha/2) √changed + z(power) √(changed − difference²))² / difference².

    Args:
        n: Independent questions, or how many the given ones are worth (``groups.effective``).
        changed: Share of the answers that change sides.
        alpha: Level of the test.
        power: Probability that it finds the difference.
        freedom: Degrees of freedom of Student's t if questions share groups.

    Returns:
        A fraction in (0, 1]; ``math.inf`` where not even n gained answers would be found, so that no difference can
        be shown.

    Raises:
        ValueError: n is negative, changed not in [0, 1], or not 0 < alpha < power < 1.
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import binom

    if n < 0 or not 0 <= changed <= 1 or not 0 < alpha < power < 1:
        raise ValueError(
            f"n = {n}, changed = {changed}, alpha = {alpha}, power = {power} cannot be; "
            "give n ≥ 0, changed in [0, 1] and 0 < alpha < power < 1"
        )
    n = math.floor(n + 1e-9)
    if n < fewest(alpha) or freedom <= 0:
        return math.inf
    discordant = np.arange(n + 1)
    critical = _critical(discordant, n, alpha, freedom)
    if critical[-1] < 0:
        return math.inf

    def surplus(difference: float) -> float:
        share = max(changed, difference)
        gain = (1 + difference / share) / 2 if share else 0.5
        weight = binom.pmf(discordant, n, share)
        likely = weight > 1e-12
        low = binom.cdf(critical[likely], discordant[likely], gain)
        high = binom.sf(discordant[likely] - critical[likely] - 1, discordant[likely], gain)
        return float(weight[likely] @ (low + high)) - power

    return float(brentq(surplus, 0.0, 1.0, xtol=1e-6))


def _critical(discordant: NDArray[np.int64], n: int, alpha: float, freedom: float) -> NDArray[np.int64]:
    """For each number of changed answers the largest number lost that is p < alpha; −1 if there is none."""
    import numpy as np
    from scipy.stats import binom

    score = np.ceil((discordant - Size(n, freedom).critical(alpha) * np.sqrt(discordant)) / 2) - 1
    most = np.minimum(binom.ppf(alpha / 2, discordant, 0.5), score).astype(np.int64)
    result = np.full_like(discordant, -1)
    for lost in (most - 1, most):
        possible = lost >= 0
        p = p_of_changes(np.where(possible, discordant - lost, 0), np.where(possible, lost, 0), n, freedom)
        result = np.where(possible & (p < alpha), lost, result)
    return result


def detectable_mean_difference(differences: Mean, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference of mean scores that the paired test finds with probability ``power``.

    The differences of the rows are taken to spread as the given ones do, around another mean. The power is that of
    a normal approximation: the test rejects a mean that is z(power) standard errors below the true one.

    Returns:
        A fraction in (0, 1]; ``math.inf`` where no difference can be shown.

    Raises:
        ValueError: not 0 < alpha < power < 1.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if not 0 < alpha < power < 1:
        raise ValueError(f"alpha = {alpha}, power = {power} cannot be; give 0 < alpha < power < 1")
    below = float(norm.ppf(power)) * differences.error

    def excess(difference: float) -> float:
        shifted = differences.shifted(difference - below - differences.mean)
        return math.log(max(shifted.p_value(0.0), 1e-300) / alpha)

    if excess(1.0) >= 0:
        return math.inf
    return float(brentq(excess, below, 1.0, xtol=1e-6))
