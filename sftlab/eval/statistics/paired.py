"""Two models that answered the same questions, right or wrong: test and interval of the difference in accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sftlab.eval.statistics.groups import Size, effective, numbered
from sftlab.eval.statistics.limits import ANY, Judged, Limits
from sftlab.eval.statistics.verdict import few_groups, no_questions, pairs, percentage, worded
from sftlab.results import Changes, Comparison

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    groups: Sequence[str | None] | None,
    alpha: float,
    answers: float = 1,
    limits: Limits = ANY,
) -> Comparison:
    """Compare two models that answered the same questions, in the same order.

    Answers gained and lost are compared by the mid-p McNemar test (``mid_p``), and the difference in accuracy has
    Tango's score interval (``tango``), which contains 0 if and only if p ≥ alpha. Neither of them draws random
    numbers.

    Questions that share a group (a text, a patient) are gained or lost together, and several answers to one question
    resemble each other. Then ``effective`` estimates from the differences of whole groups, or of questions, how many
    independent questions they are worth. Answers gained and lost are reduced (or increased) in proportion, the
    critical value is that of Student's t, and p is the larger one of score test and mid-p test.

    The outcome is ``better`` or ``worse`` if p < alpha; with ``limits.smallest_gain`` the interval is compared with
    this gain too. Over no questions at all the interval is (−1, 1).

    Args:
        a: Whether each answer of the base was right; with several answers per question, the share that was.
        b: The same for the fine-tuned model.
        groups: What source each question comes from; None, as a whole or for one question, where it stands alone.
        alpha: Chance of a false alarm that is accepted, in (0, 1).
        answers: Answers per question; the harmonic mean if the models have different numbers of them.
        limits: The smallest gain that matters and the largest acceptable loss.

    Raises:
        ValueError: The sequences are not equally long, or alpha is not in (0, 1).
    """
    import numpy as np

    n = pairs(len(a), len(b), groups, alpha)
    if n == 0:
        return no_questions("accuracy", alpha)
    first, second = np.array([a, b], dtype=np.float64)
    gain, loss = float((second * (1 - first)).sum()), float((first * (1 - second)).sum())
    group = numbered(groups, n)
    size = changes(first, second, group, answers)
    share = size.rows / n
    counted = (gain * share, loss * share, size.rows)
    low, high = tango(*counted, alpha, size.freedom)
    delta = float((gain - loss) / n)
    spread = (gain + loss + 1) / (n + 1) - delta**2  # as if one more answer had changed: none is never known not to
    judged = Judged(
        delta=delta,
        interval=(float(low), float(high)),
        alpha=alpha,
        limits=limits,
        p_value=lambda limit: float(p_of_difference(*counted, limit, size.freedom)),
        bound=lambda level: float(tango(*counted, level, size.freedom)[0]),
        n=n,
        error=math.sqrt(max(spread, 0) / size.rows),
    )

    gained, lost = int((second > first).sum()), int((second < first).sum())
    count = len(np.unique(group))
    single = answers == 1
    right_a, right_b = (round(float(side.sum())) for side in (first, second))
    if single:
        score, same = f"{right_b} of {n} against {right_a}", f"both models have {right_b} of {n} right"
        change, unchanged = f"{gained} answers gained, {lost} lost", ", so no answer changed sides"
    else:
        score = f"{percentage(second.mean())} of {n} questions against {percentage(first.mean())}"
        same = f"both models have {percentage(first.mean())} of {n} questions right"
        change = f"{gained} questions are answered right more often, {lost} less often"
        unchanged = ", so none changed"
    verdict = worded(
        judged,
        score=score,
        same=same,
        change=change,
        unchanged="" if gained else unchanged,
        notes=few_groups(count, n),
    )
    return Comparison(
        n=n,
        metric="accuracy",
        baseline=float(first.mean()),
        finetuned=float(second.mean()),
        level=1 - alpha,
        **judged.fields(),
        gained=gained,
        lost=lost,
        both_right=int((first * second).sum()) if single else None,
        both_wrong=int(((1 - first) * (1 - second)).sum()) if single else None,
        groups=count if count < n else None,
        changes=Changes(
            share=(gain + loss) / n, rows=size.rows, freedom=int(size.freedom) if math.isfinite(size.freedom) else None
        ),
        verdict=verdict,
    )


def changes(
    first: NDArray[np.float64], second: NDArray[np.float64], group: NDArray[np.int64], answers: float = 1
) -> Size:
    """The number of independent questions that the differences of the given ones are worth.

    Of several answers to a question every pair is counted, which needs no rule of which answer belongs to which.
    """
    difference = second - first
    mean = float(difference.mean())
    changed = float((second * (1 - first) + first * (1 - second)).sum())
    return effective(difference - mean, group, changed - len(difference) * mean**2, answers)


def p_of_changes(
    gained: ArrayLike, lost: ArrayLike, n: ArrayLike, freedom: float = float("inf")
) -> NDArray[np.float64]:
    """Two-sided p of as many answers gained and lost: that of the mid-p McNemar test.

    If questions are not independent, the variance is estimated, and McNemar's score (gained − lost) / √(gained + lost)
    is compared with Student's t; then the larger p counts.
    """
    import numpy as np
    from scipy.stats import t

    if freedom <= 0:
        return np.ones(np.broadcast(gained, lost, n).shape)
    gained, lost = np.asarray(gained, dtype=np.float64), np.asarray(lost, dtype=np.float64)
    p = mid_p(gained, lost, n)
    if math.isfinite(freedom):
        p = np.maximum(p, 2 * t.sf(np.abs(gained - lost) / np.sqrt(np.maximum(gained + lost, 1e-300)), freedom))
    return p


def p_of_difference(
    gained: ArrayLike, lost: ArrayLike, n: ArrayLike, difference: float, freedom: float = float("inf")
) -> NDArray[np.float64]:
    """Two-sided p of a difference in accuracy: that of the interval (``tango``), and ``p_of_changes`` of no difference.

    Half of it is the one-sided p of a margin (Nam 1997, Biometrics 53:1422–1430; Liu et al. 2002, Statistics in
    Medicine 21:231–245).
    """
    import numpy as np
    from scipy.stats import t

    if difference == 0:
        return p_of_changes(gained, lost, n, freedom)
    gained, lost, n = np.broadcast_arrays(*(np.asarray(count, dtype=np.float64) for count in (gained, lost, n)))
    if freedom <= 0:
        return np.ones(gained.shape)
    excess, deviation = score(gained, lost, n, np.full(gained.shape, difference))
    return np.asarray(2 * t.sf(np.maximum(excess, 0) / np.maximum(deviation, 1e-300), freedom))


def score(
    gained: NDArray[np.float64], lost: NDArray[np.float64], n: NDArray[np.float64], delta: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distance of the observed from a true difference in answers, corrected, and its standard deviation."""
    import numpy as np

    linear = -gained - lost + (2 * n - gained + lost) * delta
    root = np.sqrt(np.maximum(linear**2 + 8 * n * lost * delta * (1 - delta), 0))
    variance = n * ((root - linear) / (2 * n) + delta * (1 - delta))
    correction = np.minimum(0.5, n * np.abs(delta) / 2)
    return np.abs(gained - lost - n * delta) - correction, np.sqrt(np.maximum(variance, 0))


def mid_p(gained: ArrayLike, lost: ArrayLike, n: ArrayLike) -> NDArray[np.float64]:
    """Two-sided mid-p of McNemar's test (Fagerland et al. 2013); the exact p if more than half of the answers changed.

    The exact test ignores that the number of changed answers is random, and rejects too seldom; mid-p counts the
    observed table by half. If nearly all answers change, their number is not random, and mid-p rejects too often.
    Counts may be fractions: binomial tails are incomplete beta functions.
    """
    import numpy as np
    from scipy.special import betainc

    more, less = np.maximum(gained, lost).astype(np.float64), np.minimum(gained, lost).astype(np.float64)
    at_least = betainc(more, less + 1, 0.5, where=more > 0, out=np.ones_like(more + less))
    above = betainc(more + 1, less, 0.5, where=less > 0, out=np.zeros_like(more + less))
    exact = 2 * at_least
    return np.asarray(np.minimum(1, np.where(more + less > np.asarray(n) / 2, exact, at_least + above)))


def tango(
    gained: ArrayLike, lost: ArrayLike, n: ArrayLike, alpha: float, freedom: float = float("inf")
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tango's score interval of a paired difference (1998), which contains 0 if and only if p ≥ alpha.

    It has all differences δ with |gained − lost − n·δ| − c ≤ z · √(n (2 q + δ (1 − δ))), where q is the probability of
    a loss that is most likely if δ is true. The correction c is half an answer, and at most n·|δ| / 2: without it the
    coverage of one-sided changes falls to 0.928. At 0 it vanishes, and the interval contains 0 where McNemar's score
    test does not reject. Where the mid-p test decides otherwise, the interval is extended to 0, or ends before 0 (only
    if alpha is below 0.001, or lies between two nearly equal p-values).

    Counts may be arrays, and fractions.
    """
    import numpy as np

    gained, lost, n = np.broadcast_arrays(*(np.asarray(count, dtype=np.float64) for count in (gained, lost, n)))
    observed = gained - lost
    if freedom <= 0:
        return -np.ones_like(observed), np.ones_like(observed)
    critical = Size(1, freedom).critical(alpha)

    def contains(delta: NDArray[np.float64]) -> NDArray[np.bool_]:
        excess, deviation = score(gained, lost, n, delta)
        inside: NDArray[np.bool_] = excess <= critical * deviation
        return inside

    limits = np.stack([-np.ones_like(observed), np.ones_like(observed)])
    inside, outside = np.stack([observed / n] * 2), limits
    for _ in range(44):
        middle = (inside + outside) / 2
        within = contains(middle)
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    ends = np.where(contains(limits), limits, inside)
    chance, tiny = p_of_changes(gained, lost, n, freedom) >= alpha, np.finfo(np.float64).tiny
    low = np.where(chance, np.minimum(ends[0], 0), np.where(observed > 0, np.maximum(ends[0], tiny), ends[0]))
    high = np.where(chance, np.maximum(ends[1], 0), np.where(observed < 0, np.minimum(ends[1], -tiny), ends[1]))
    return low, high
