"""Accuracies with their intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sftlab.eval.statistics.groups import Size, effective, numbered


def wilson(correct: float, n: float, alpha: float = 0.05, freedom: float = float("inf")) -> tuple[float, float]:
    """The Wilson score interval of an accuracy, at the level 1 − alpha.

    With ``freedom`` the critical value is that of Student's t. Correct answers and questions may be fractions.

    Raises:
        ValueError: There are no questions, or more correct answers than questions.
    """
    from scipy.stats import norm
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0:
        raise ValueError(f"an accuracy over {n} questions has no interval; give at least one question")
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct answers of {n} questions cannot be")
    size = Size(n, freedom)
    if not size.known:
        return 0.0, 1.0
    tail = alpha if freedom == float("inf") else 2 * float(norm.sf(size.critical(alpha)))
    low, high = proportion_confint(correct, n, alpha=tail, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def accuracy(
    right: Sequence[float], groups: Sequence[str | None] | None = None, alpha: float = 0.05, answers: float = 1
) -> tuple[float, float]:
    """The interval of an accuracy over rows that may share groups, and may have several answers each.

    Wilson's interval for the effective number of rows, with Student's t for the number of groups (Korn & Graubard
    1998, and Franco et al. 2019 for Wilson's form).

    Args:
        right: For each question whether its answer is right, or the share of its answers that are.
        groups: The source of each question; None, as a whole or for one question, where it stands alone.
        alpha: 1 − the level.
        answers: Answers per question.
    """
    import numpy as np

    rate = np.asarray(right, dtype=np.float64)
    mean = float(rate.mean()) if len(rate) else 0.0
    if not len(rate):
        return wilson(0, 0)
    size = effective(rate - mean, numbered(groups, len(rate)), len(rate) * mean * (1 - mean), answers)
    return wilson(mean * size.rows, size.rows, alpha, size.freedom)


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
