"""The verdict of a comparison, in numbers and words. Differences are fractions, and points in words."""

from __future__ import annotations

from collections.abc import Sequence

from sftlab.eval.statistics.groups import FEW
from sftlab.eval.statistics.limits import Judged
from sftlab.results import Comparison, Verdict


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


def worded(judged: Judged, *, score: str, same: str, change: str, unchanged: str, notes: list[str]) -> Verdict:
    """Put the numbers of a comparison into one sentence, with its outcome."""
    delta, alpha, p_value, (low, high) = judged.delta, judged.alpha, judged.p_value(0), judged.interval
    span = f"{100 * (1 - alpha):g} % interval {points(low)} to {points(high)}"
    p = stated(p_value)
    if p_value < alpha <= float(f"{p_value:.2g}"):  # 0.0496 must not read as 0.05
        p = f"p = {p_value:.4g}"

    smallest = f"the smallest gain that matters ({points(judged.limits.smallest_gain)} points)"
    outcome, numbers = judged.outcome, f"{points(delta)} points, {span}"
    if outcome == "too_small":
        reason = f"{score} ({numbers}); any gain is below {smallest}; {change}"
    elif delta == 0:
        reason = f"{same}; {change}{unchanged}"
    elif p_value >= alpha:
        reason = f"{score}; the difference of {points(delta)} points could be chance ({p}, {span}); {change}"
    elif outcome == "inconclusive":
        reason = f"{score} ({numbers}, {p}), but the gain could be below {smallest}; {change}"
    else:
        above = f", above {smallest}" if outcome == "better" and judged.limits.smallest_gain else ""
        reason = f"{score} ({numbers}, {p}){above}; {change}"
    return Verdict(outcome=outcome, reason=reason, notes=notes)


def stated(p_value: float) -> str:
    """A p-value with two digits, as in "p = 0.02"."""
    return "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"


def points(fraction: float) -> str:
    """A signed difference in points; a second digit where one would show a difference as none."""
    value = 100 * fraction
    return f"{value:+.2f}" if 0 < abs(value) < 0.05 else f"{value + 0.0:+.1f}"


def percentage(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.1f} %"
