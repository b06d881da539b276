"""The verdict of a comparison, in numbers and words. Differences are fractions, and points in words."""

from __future__ import annotations

from collections.abc import Sequence

from sftlab.eval.statistics.groups import FEW
from sftlab.results import Comparison, Outcome, Verdict


def pairs(n: int, others: int, groups: Sequence[str | None] | None, alpha: float) -> int:
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


def no_questions(metric: str, alpha: float) -> Comparison:
    """The comparison of two models that answered nothing."""
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


def few_groups(count: int, n: int) -> list[str]:
    """The note of a comparison over few groups of rows; empty if rows are independent, or groups many."""
    if count == n or count >= FEW:
        return []
    if count == 1:
        return ["all questions are of one group, so that no difference can be shown"]
    return [f"{count} groups of questions are few: intervals may be too narrow and p too small (fewer than {FEW})"]


def worded(
    delta: float,
    interval: tuple[float, float],
    p_value: float,
    alpha: float,
    *,
    score: str,
    same: str,
    change: str,
    unchanged: str,
    notes: list[str],
) -> Verdict:
    """Derive the outcome from the numbers, and put the numbers into one sentence."""
    low, high = interval
    span = f"{100 * (1 - alpha):g} % interval {points(low)} to {points(high)}"
    p = "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"
    if p_value < alpha <= float(f"{p_value:.2g}"):  # 0.0496 must not read as 0.05
        p = f"p = {p_value:.4g}"

    outcome: Outcome = "inconclusive"
    if delta == 0:
        reason = f"{same}; {change}{unchanged}"
    elif p_value >= alpha:
        reason = f"{score}; the difference of {points(delta)} points could be chance ({p}, {span}); {change}"
    else:
        outcome = "better" if delta > 0 else "worse"
        reason = f"{score} ({points(delta)} points, {span}, {p}); {change}"
    return Verdict(outcome=outcome, reason=reason, notes=notes)


def points(fraction: float) -> str:
    """A signed difference in points; a second digit where one would show a difference as none."""
    value = 100 * fraction
    return f"{value:+.2f}" if 0 < abs(value) < 0.05 else f"{value + 0.0:+.1f}"


def percentage(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.1f} %"
