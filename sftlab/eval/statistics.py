"""Is the fine-tuned model better than its base, or is the difference chance?

Both models answer the same questions, so everything here is paired. Accuracies, differences and
intervals are fractions (0.045, not 4.5), except in the words of a verdict, which speak of points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sftlab.results import Comparison, Outcome, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLIPS = 10_000
"""Random sign flips of the cluster-level permutation test."""

BLOCK = 2_000_000
"""Numbers drawn at a time where every row is drawn: 16 MB."""


def wilson(correct: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """The Wilson score interval of an accuracy, at the level 1 − alpha.

    Raises:
        ValueError: There are no questions, or more correct answers than questions.
    """
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0:
        raise ValueError(f"an accuracy over {n} questions has no interval; give at least one question")
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct answers of {n} questions cannot be")
    low, high = proportion_confint(correct, n, alpha=alpha, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def subgroup(
    correct: Sequence[bool], groups: Sequence[str | None], alpha: float = 0.05
) -> dict[str, tuple[int, int, float, float]]:
    """For each group, in the order they appear: correct answers, questions, and the Wilson interval's ends.

    Questions whose group is None belong to no group and are left out.

    Raises:
        ValueError: The two sequences are not equally long.
    """
    members: dict[str, list[bool]] = defaultdict(list)
    for right, group in zip(correct, groups, strict=True):
        if group is not None:
            members[group].append(right)
    return {group: (sum(rows), len(rows), *wilson(sum(rows), len(rows), alpha)) for group, rows in members.items()}


def mean_interval(
    scores: Sequence[float],
    groups: Sequence[str | None] | None,
    *,
    seed: int,
    alpha: float = 0.05,
    resamples: int = 10_000,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean of scores, at the level 1 − alpha.

    Rows are resampled, and whole groups of them where any rows share one, as in ``compare_scores``.

    Raises:
        ValueError: There are no scores.
    """
    import numpy as np

    if not scores:
        raise ValueError("a mean of no scores has no interval; give at least one")
    clusters = _clusters(np.array(scores, dtype=np.float64), groups)
    return _bootstrap(clusters, alpha, resamples, np.random.default_rng(seed))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method (1979), in the same order: multiplied, at most 1."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def fewest(alpha: float) -> int:
    """The smallest number of rows (or groups of them) in which a paired test can reach p < alpha at all.

    With n of them the smallest p is 2 / 2^n: all went one way.
    """
    return math.floor(1 - math.log2(alpha)) + 1


def compare(
    a: Sequence[bool],
    b: Sequence[bool],
    *,
    groups: Sequence[str | None] | None,
    alpha: float,
    seed: int,
    resamples: int = 10_000,
    noise: float | None = None,
) -> Comparison:
    """Compare two models that answered the same questions, in the same order.

    The interval is a paired percentile bootstrap of the difference in accuracy. The p-value is that of
    the exact McNemar test: a binomial test of the answers gained against the answers lost.

    McNemar's test takes the questions to be independent. Questions that share a group (a text, a
    patient) are not: they are gained or lost together, and the test would be too sure of itself. So
    where any group has more than one question, whole groups are resampled for the interval, and the
    p-value is that of a sign-flip permutation test: if the models do not differ, then within each group
    they might as well have changed places, which turns the sign of that group's difference.
    ``FLIPS`` random flips give p = (k + 1) / (m + 1), k of m being at least as extreme as what was seen
    (Phipson & Smyth 2010). It never goes below 2 / 2^(number of groups that differ) by more than chance.

    The outcome is ``better`` or ``worse`` only if p < alpha, the interval excludes 0, and the difference is
    larger than ``noise``. If no answer changes, the interval is (0, 0): a bootstrap resamples only observed
    changes. Over no questions at all the interval is (−1, 1). A question without a group is a cluster of its own.

    Args:
        a: Which answers of the base were right.
        b: Which answers of the fine-tuned model were right.
        groups: What source each question comes from; None, as a whole or for one question, where it stands alone.
        alpha: Chance of a false alarm that is accepted, in (0, 1).
        seed: Seeds the bootstrap and the permutation test; the same seed gives the same result.
        resamples: Bootstrap resamples.
        noise: The largest change of accuracy between runs of one and the same model, a fraction.

    Raises:
        ValueError: The sequences are not equally long, or alpha is not in (0, 1).
    """
    import numpy as np
    from scipy.stats import binomtest

    n = _paired(len(a), len(b), groups, alpha)
    if n == 0:
        return _no_questions("accuracy", alpha)

    pairs = list(zip(map(bool, a), map(bool, b), strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    both_right, both_wrong = pairs.count((True, True)), pairs.count((False, False))
    clusters = _clusters(np.array([by_b - by_a for by_a, by_b in pairs], dtype=np.int64), groups)
    clustered = len(clusters) < n

    rng = np.random.default_rng(seed)
    interval = _bootstrap(clusters, alpha, resamples, rng)
    if clustered:
        p_value = _sign_flip(clusters[:, 0], rng)
    else:
        p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0

    right_a, right_b = both_right + lost, both_right + gained
    delta = (right_b - right_a) / n
    verdict = _verdict(right_a, right_b, n, gained, lost, interval, p_value, alpha, noise)
    return Comparison(
        n=n,
        metric="accuracy",
        baseline=right_a / n,
        finetuned=right_b / n,
        delta=delta,
        interval=interval,
        level=1 - alpha,
        p_value=p_value,
        gained=gained,
        lost=lost,
        both_right=both_right,
        both_wrong=both_wrong,
        groups=len(clusters) if clustered else None,
        verdict=verdict,
    )


def compare_scores(
    a: Sequence[float],
    b: Sequence[float],
    *,
    groups: Sequence[str | None] | None,
    alpha: float,
    seed: int,
    resamples: int = 10_000,
    noise: float | None = None,
    metric: str = "score",
    name: str = "mean",
) -> Comparison:
    """Compare two models by scores between 0 and 1 that are no right or wrong, such as ROUGE-L.

    As ``compare`` does: a paired bootstrap for the interval, whole groups where rows share one, and the
    same conditions for ``better`` and ``worse``. McNemar's test has nothing to count here, so the
    p-value is always that of the sign-flip permutation test, over the rows or over their groups.

    Two scores are equal only if they are the same number: a row counts as gained however small the gain. The result
    has no ``both_right`` and ``both_wrong``.

    Args:
        a: The scores of the base's answers.
        b: The scores of the fine-tuned model's answers.
        groups: What source each row comes from; None, as a whole or for one row, where it stands alone.
        alpha: Chance of a false alarm that is accepted, in (0, 1).
        seed: Seeds the bootstrap and the permutation test; the same seed gives the same result.
        resamples: Bootstrap resamples.
        noise: The largest change of the mean between runs of one and the same model, a fraction.
        metric: Key of the metric in the result.
        name: Name of the mean in the verdict.

    Raises:
        ValueError: The sequences are not equally long, a score is not in [0, 1], or alpha is not in (0, 1).
    """
    import numpy as np

    n = _paired(len(a), len(b), groups, alpha)
    if n == 0:
        return _no_questions(metric, alpha)
    scores: NDArray[np.float64] = np.array([a, b], dtype=np.float64)
    if not ((scores >= 0) & (scores <= 1)).all():
        odd = next(float(score) for score in scores.flat if not 0 <= score <= 1)
        raise ValueError(f"{odd} is no score between 0 and 1; divide scores by the highest that there can be")

    difference = scores[1] - scores[0]
    gained, lost = int(np.count_nonzero(difference > 0)), int(np.count_nonzero(difference < 0))
    clusters = _clusters(difference, groups)
    rng = np.random.default_rng(seed)
    interval = _bootstrap(clusters, alpha, resamples, rng)
    p_value = _sign_flip(clusters[:, 0], rng)

    mean_a, mean_b = (math.fsum(row) / n for row in scores)
    delta = round(math.fsum(difference) / n, 12) + 0.0  # gains that undo the losses leave no 1e-17
    verdict = _worded(
        delta,
        interval,
        p_value,
        alpha,
        noise,
        score=f"{name} {mean_b:.3f} against {mean_a:.3f}",
        same=f"both models have a {name} of {mean_a:.3f}",
        change=f"{gained} answers scored higher, {lost} lower",
        unchanged="" if gained else ", so no answer's score changed",
    )
    return Comparison(
        n=n,
        metric=metric,
        baseline=mean_a,
        finetuned=mean_b,
        delta=delta,
        interval=interval,
        level=1 - alpha,
        p_value=p_value,
        gained=gained,
        lost=lost,
        groups=len(clusters) if len(clusters) < n else None,
        verdict=verdict,
    )


def _paired(n: int, others: int, groups: Sequence[str | None] | None, alpha: float) -> int:
    """The number of questions that both models answered.

    Raises:
        ValueError: The sequences are not equally long, or alpha is not in (0, 1).
    """
    if others != n or (groups is not None and len(groups) != n):
        lengths = f"{n} and {others} answers" + ("" if groups is None else f" with {len(groups)} groups")
        raise ValueError(f"{lengths} do not pair up; both models must answer the same questions")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} is not a chance of a false alarm; give one between 0 and 1, such as 0.05")
    return n


def _no_questions(metric: str, alpha: float) -> Comparison:
    reason = "cannot be judged, because there are no questions to compare on"
    return Comparison(
        metric=metric,
        n=0,
        baseline=0.0,
        finetuned=0.0,
        delta=0.0,
        interval=(-1.0, 1.0),
        level=1 - alpha,
        p_value=1.0,
        gained=0,
        lost=0,
        verdict=Verdict(outcome="inconclusive", reason=reason, judged=False),
    )


def _clusters(differences: NDArray[Any], groups: Sequence[str | None] | None) -> NDArray[Any]:
    """What each cluster contributes: the sum of its rows' differences, and how many they are."""
    import numpy as np

    numbers: dict[object, int] = {}
    names = [None] * len(differences) if groups is None else groups
    of_row = [numbers.setdefault(row if name is None else name, len(numbers)) for row, name in enumerate(names)]
    sums = np.zeros(len(numbers), dtype=differences.dtype)
    np.add.at(sums, of_row, differences)
    return np.column_stack([sums, np.bincount(of_row)])


def _bootstrap(clusters: NDArray[Any], alpha: float, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of the summed differences over the summed sizes of resampled clusters.

    Equal clusters of whole numbers are drawn together: how often each kind comes up in a resample is
    multinomial. That is the same bootstrap, at a cost that grows with the kinds (three, without groups)
    and not with n. Sums of scores are seldom equal, so each of those is drawn by itself.
    """
    import numpy as np

    if clusters.dtype.kind == "i":
        kinds, counts = np.unique(clusters, axis=0, return_counts=True)
        drawn = rng.multinomial(len(clusters), counts / len(clusters), size=resamples)
        ratios = drawn @ kinds[:, 0] / (drawn @ kinds[:, 1])
    else:
        parts = []
        for rows in _blocks(resamples, len(clusters)):
            chosen = rng.integers(len(clusters), size=(rows, len(clusters)))
            parts.append(clusters[chosen, 0].sum(axis=1) / clusters[chosen, 1].sum(axis=1))
        ratios = np.concatenate(parts).round(12)  # an end that is 0 but for its rounding is 0
    low, high = np.quantile(ratios, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def _sign_flip(differences: NDArray[Any], rng: np.random.Generator) -> float:
    """Two-sided p-value of the sum of the differences, against random signs."""
    import numpy as np

    if differences.dtype.kind == "i":
        # Of the clusters with a difference of the same size, a binomial number turns out positive.
        sizes, counts = np.unique(np.abs(differences), return_counts=True)
        sums = (2 * rng.binomial(counts, 0.5, size=(FLIPS, len(counts))) - counts) @ sizes
        seen = abs(int(differences.sum()))
    else:
        differences = differences[differences != 0]
        parts = [
            (2 * rng.integers(2, size=(rows, len(differences)), dtype=np.int8) - 1) @ differences
            for rows in _blocks(FLIPS, len(differences))
        ]
        sums = np.concatenate(parts)
        # What is as extreme but for its rounding is as extreme: 0.1 + 0.2 against 0.3.
        seen = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    extreme = int(np.count_nonzero(np.abs(sums) >= seen))
    return (extreme + 1) / (FLIPS + 1)


def _blocks(rows: int, width: int) -> list[int]:
    """``rows`` in parts of at most ``BLOCK`` numbers each."""
    most = max(1, BLOCK // max(1, width))
    return [min(most, rows - start) for start in range(0, rows, most)]


def _verdict(
    right_a: int,
    right_b: int,
    n: int,
    gained: int,
    lost: int,
    interval: tuple[float, float],
    p_value: float,
    alpha: float,
    noise: float | None,
) -> Verdict:
    return _worded(
        (right_b - right_a) / n,
        interval,
        p_value,
        alpha,
        noise,
        score=f"{right_b} of {n} against {right_a}",
        same=f"both models have {right_b} of {n} right",
        change=f"{gained} answers gained, {lost} lost",
        unchanged="" if gained else ", so no answer changed sides",
    )


def _worded(
    delta: float,
    interval: tuple[float, float],
    p_value: float,
    alpha: float,
    noise: float | None,
    *,
    score: str,
    same: str,
    change: str,
    unchanged: str,
) -> Verdict:
    """Derive the outcome from the numbers, and put the numbers into one sentence."""
    low, high = interval
    difference = f"the difference of {_points(delta)} points"
    span = f"{100 * (1 - alpha):g} % interval {_points(low)} to {_points(high)}"
    p = "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"
    if p_value < alpha <= float(f"{p_value:.2g}"):  # 0.0496 must not read as 0.05
        p = f"p = {p_value:.4g}"

    outcome: Outcome = "inconclusive"
    if delta == 0:
        reason = f"{same}; {change}{unchanged}"
    elif noise is not None and abs(delta) <= noise:
        run_noise = f"the run-to-run noise of {100 * noise:.1f} points"
        reason = f"{score}; {difference} is no larger than {run_noise} ({span}, {p}); {change}"
    elif p_value >= alpha:
        reason = f"{score}; {difference} could be chance ({p}, {span}); {change}"
    elif low <= 0 <= high:
        reason = f"{score}; {difference} is borderline: {p}, but the {span} includes 0; {change}"
    else:
        outcome = "better" if delta > 0 else "worse"
        reason = f"{score} ({_points(delta)} points, {span}, {p}); {change}"
    return Verdict(outcome=outcome, reason=reason)


def _points(fraction: float) -> str:
    """A signed difference in points; a second digit where one would show a difference as none."""
    points = 100 * fraction
    return f"{points:+.2f}" if 0 < abs(points) < 0.05 else f"{points + 0.0:+.1f}"


def minimal_detectable_difference(n: int, changed: float = 0.2, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference in accuracy that the exact McNemar test finds with probability ``power``.

    ``n`` questions are independent. A share ``changed`` of the answers changes sides, or the share that the
    difference needs if that is larger (then all changes go one way). The power is exact: the number of changed
    answers D is binomial (n, share), the number gained is binomial (D, (1 + difference / share) / 2), and the test
    rejects on it; the difference is then searched. Connor (1987, Biometrics 43:207–211) approximates the same by
    n = (z(1 − alpha/2) √changed + z(power) √(changed − difference²))² / difference².

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
    if n < fewest(alpha):
        return math.inf
    discordant = np.arange(n + 1)
    critical = binom.ppf(alpha / 2, discordant, 0.5) - 1  # the largest count with 2 P(X ≤ count) < alpha

    def surplus(difference: float) -> float:
        share = max(changed, difference)
        gain = (1 + difference / share) / 2 if share else 0.5
        weight = binom.pmf(discordant, n, share)
        likely = weight > 1e-12
        low = binom.cdf(critical[likely], discordant[likely], gain)
        high = binom.sf(discordant[likely] - critical[likely] - 1, discordant[likely], gain)
        return float(weight[likely] @ (low + high)) - power

    return float(brentq(surplus, 0.0, 1.0, xtol=1e-6))


def detectable_mean_difference(spread: float, n: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference of means that a paired test finds with probability ``power``, in normal approximation.

    (z(1 − alpha/2) + z(power)) · spread / √n, ``spread`` being the standard deviation over ``n`` independent rows of
    the differences between the two models' scores. ``math.inf`` where n is below 2.

    Raises:
        ValueError: spread is negative, or not 0 < alpha < power < 1.
    """
    from scipy.stats import norm

    if not spread >= 0 or not 0 < alpha < power < 1:
        raise ValueError(
            f"spread = {spread}, alpha = {alpha}, power = {power} cannot be; give spread ≥ 0 and 0 < alpha < power < 1"
        )
    if n < 2:
        return math.inf
    return float(norm.ppf(1 - alpha / 2) + norm.ppf(power)) * spread / math.sqrt(n)


def spread_of_differences(a: Sequence[float], b: Sequence[float], groups: Sequence[str | None] | None) -> float:
    """Standard deviation of the differences b − a between paired scores, as if rows were independent.

    Where rows share groups it is the one that independent rows would need for the mean to be as uncertain as it is:
    √n times the standard error over whole groups. NaN never comes out; of fewer than two rows or groups it is 0.
    """
    import numpy as np

    difference: NDArray[np.float64] = np.array(b, dtype=np.float64) - np.array(a, dtype=np.float64)
    if not len(difference):
        return 0.0
    clusters = _clusters(difference, groups)
    count, n = len(clusters), len(difference)
    if count < 2:
        return 0.0
    residual = clusters[:, 0] - difference.mean() * clusters[:, 1]
    return float(math.sqrt(count / (count - 1) * float((residual**2).sum()) / n))


def noise(runs: Sequence[Sequence[float]]) -> float:
    """The largest difference in accuracy, or in mean score, between two repeats of one model, a fraction.

    Raises:
        ValueError: There are fewer than two repeats (the noise is unknown, not 0), or their lengths differ.
    """
    n = _repeats(runs)
    scores = [sum(run) for run in runs]
    return (max(scores) - min(scores)) / n if n else 0.0


def changed(runs: Sequence[Sequence[float]]) -> int:
    """How many questions are right in some repeats of one model and wrong in others, or score differently.

    Raises:
        ValueError: There are fewer than two repeats, or their lengths differ.
    """
    _repeats(runs)
    return sum(len(set(row)) > 1 for row in zip(*runs, strict=True))


def _repeats(runs: Sequence[Sequence[float]]) -> int:
    """The number of questions that all repeats answered."""
    lengths = {len(run) for run in runs}
    if len(runs) < 2 or len(lengths) > 1:
        raise ValueError(
            f"{len(runs)} repeats over {sorted(lengths)} questions tell nothing of the noise; "
            "give two or more over the same questions"
        )
    return lengths.pop()


def bootstrap_ties(
    losses: Sequence[Sequence[float]],
    tokens: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
    alpha: float = 0.05,
) -> list[bool]:
    """Which checkpoints have a validation loss that chance cannot tell from the lowest one.

    The validation rows are resampled, the same for all checkpoints, and the difference in token-weighted
    mean loss to the lowest checkpoint gets a percentile interval at the level 1 − alpha. A checkpoint is
    tied if the interval includes 0; the lowest one always is. Over a single row nothing can be told
    apart, and all are tied. A checkpoint with a loss that is not finite never is.

    Args:
        losses: For each checkpoint, the summed negative log-likelihood of each row, in nats.
        tokens: The target tokens of each row; rows without any are left out.
        seed: Seeds the resampling.
        resamples: Bootstrap resamples.
        alpha: 1 − the level of the interval.

    Raises:
        ValueError: The lengths differ, no row has a target token, or no checkpoint has a finite loss.
    """
    import numpy as np

    if len(losses) == 0:
        return []
    if any(len(row) != len(tokens) for row in losses):
        raise ValueError(f"the losses of some checkpoint are not over the {len(tokens)} validation rows")
    weight: NDArray[Any] = np.asarray(tokens, dtype=np.float64)
    kept = weight > 0
    weight, loss = weight[kept], np.asarray(losses, dtype=np.float64)[:, kept]
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(loss).all(axis=1))
    rows = len(weight)
    if not rows or not finite.any():
        raise ValueError("no validation row with target tokens and a finite loss; nothing to choose a checkpoint by")
    if rows == 1:
        return [bool(ok) for ok in finite]

    best = int(np.argmin(np.where(finite, np.where(finite[:, None], loss, 0.0).sum(axis=1), np.inf)))
    excess = loss[finite] - loss[best]
    rng = np.random.default_rng(seed)
    parts = []
    for size in _blocks(resamples, rows):
        drawn = rng.multinomial(rows, np.full(rows, 1 / rows), size=size)
        parts.append(drawn @ excess.T / (drawn @ weight)[:, None])
    low = np.quantile(np.concatenate(parts), alpha / 2, axis=0)
    tied: NDArray[np.bool_] = np.zeros(len(losses), dtype=np.bool_)
    tied[finite] = low <= 0  # the lowest cannot be significantly above another, so one end decides
    tied[best] = True
    return [bool(tie) for tie in tied]
