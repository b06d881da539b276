"""Several trainings of one recipe, each compared with its base model on the same questions.

Trainings and questions are both samples: with other seeds and other questions the mean difference would be another one.
Its variance is the sum of two parts, that of the mean over trainings and that of the mean over questions (or over their
groups), each with its n / (n − 1). These are the variances that resampling both has on average, without random numbers.
What trainings and questions have together is counted in both parts, which makes the test cautious.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sftlab.eval.statistics.groups import numbered


@dataclass(frozen=True)
class MeanGain:
    """The mean difference over trainings and questions; ``deltas`` has that of each training, ``sd`` their spread.

    ``error`` is the standard error of the mean, with ``freedom`` degrees of freedom of Student's t; 0 of them if
    nothing can be shown.
    """

    deltas: list[float]
    mean: float
    sd: float
    error: float
    freedom: float

    def p_value(self, mean: float = 0.0) -> float:
        """Two-sided p of a true mean."""
        from scipy.stats import t

        if self.freedom <= 0:
            return 1.0
        if self.error <= 1e-12:
            return 1.0 if abs(self.mean - mean) < 1e-12 else 0.0
        return 2 * float(t.sf(abs(self.mean - mean) / self.error, self.freedom))

    def interval(self, alpha: float) -> tuple[float, float]:
        """The interval of all means with p ≥ alpha."""
        from scipy.stats import t

        if self.freedom <= 0:
            return -1.0, 1.0
        half = float(t.isf(alpha / 2, self.freedom)) * self.error
        return max(-1.0, self.mean - half), min(1.0, self.mean + half)


def over_trainings(differences: Sequence[Sequence[float]], groups: Sequence[str | None] | None = None) -> MeanGain:
    """The mean difference over two or more trainings.

    Student's t with the degrees of freedom of Satterthwaite (1946): few (trainings − 1) if the trainings differ much,
    many if they agree.

    Args:
        differences: For each training and question the fine-tuned model's score minus that of the base model.
        groups: The source of each question; None, as a whole or for one question, where it stands alone.

    Raises:
        ValueError: there are fewer than two trainings, no questions, or lists of different lengths.
    """
    import numpy as np

    lengths = {len(row) for row in differences}
    if len(differences) < 2 or len(lengths) > 1 or not max(lengths) or (groups and len(groups) not in lengths):
        raise ValueError(
            f"{len(differences)} trainings over {sorted(lengths)} questions have no spread; give two or more trainings "
            "over the same questions"
        )
    values = np.array(differences, dtype=np.float64)
    trainings, questions = values.shape
    deltas = values.mean(axis=1)
    mean = float(deltas.mean())
    group = numbered(groups, questions)
    sums = np.bincount(group, weights=values.mean(axis=0) - mean)
    count = len(sums)
    parts = [(float(deltas.var(ddof=1)) / trainings, trainings - 1)]
    if count > 1:
        parts.append((count / (count - 1) * float((sums**2).sum()) / questions**2, count - 1))
    variance, sd = sum(part for part, _ in parts), float(deltas.std(ddof=1))
    if count == 1:
        freedom = 0.0
    elif variance <= 1e-24:
        freedom = float(trainings - 1)
    else:
        freedom = variance**2 / sum(part**2 / free for part, free in parts)
    return MeanGain(deltas.tolist(), mean, sd, math.sqrt(variance), freedom)
