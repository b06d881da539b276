"""Several generations of one test set by one model: how much they differ, pass@k and the majority of answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def noise(runs: Sequence[Sequence[float]]) -> float:
    """The largest difference in accuracy, or in mean score, between two repeats of one model, a fraction.

    Raises:
        ValueError: There are fewer than two repeats (the noise is unknown, not 0), or their lengths differ.
    """
    n = _questions(runs)
    scores = [sum(run) for run in runs]
    return (max(scores) - min(scores)) / n if n else 0.0


def changed(runs: Sequence[Sequence[float]]) -> int:
    """How many questions are right in some repeats of one model and wrong in others, or score differently.

    Raises:
        ValueError: There are fewer than two repeats, or their lengths differ.
    """
    _questions(runs)
    return sum(len(set(row)) > 1 for row in zip(*runs, strict=True))


def averages(runs: Sequence[Sequence[float]]) -> list[float]:
    """For each question the mean over its repeats."""
    return [sum(row) / len(row) for row in zip(*runs, strict=True)]


def answers_per_question(first: int, second: int) -> float:
    """The answers per question of two models: the harmonic mean of both counts, since their variances add."""
    return 2 * first * second / (first + second)


def pass_at(runs: Sequence[Sequence[bool]], k: int) -> float:
    """The probability that at least one of ``k`` answers to a question is right (Chen et al. 2021, arXiv 2107.03374).

    The unbiased estimate from n repeats, of which c are right: 1 − C(n − c, k) / C(n, k), averaged over questions.

    Raises:
        ValueError: There are fewer than ``k`` repeats.
    """
    n = len(runs)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} answers per question")
    failing = [math.comb(n - sum(row), k) / math.comb(n, k) for row in zip(*runs, strict=True)]
    return 1 - sum(failing) / len(failing) if failing else 0.0


def majority(answers: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]]) -> float:
    """The accuracy of the most frequent answer of several repeats (Wang et al. 2022, arXiv 2203.11171).

    Answers that were not extracted have no vote. Of equally frequent answers each has the same chance.

    Args:
        answers: The answers of each repeat.
        right: Whether they are right.
    """
    total = 0.0
    rows = list(zip(zip(*answers, strict=True), zip(*right, strict=True), strict=True))
    for given, correct in rows:
        votes = Counter(answer for answer in given if answer is not None)
        most = max(votes.values(), default=0)
        first = [answer for answer, count in votes.items() if count == most]
        graded = dict(zip(given, correct, strict=True))
        total += sum(graded[answer] for answer in first) / len(first) if first else 0.0
    return total / len(rows) if rows else 0.0


def _questions(runs: Sequence[Sequence[float]]) -> int:
    """The number of questions that all repeats answered."""
    lengths = {len(run) for run in runs}
    if len(runs) < 2 or len(lengths) > 1:
        raise ValueError(
            f"{len(runs)} repeats over {sorted(lengths)} questions tell nothing of the noise; "
            "give two or more over the same questions"
        )
    return lengths.pop()
