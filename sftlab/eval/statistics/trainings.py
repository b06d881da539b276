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
    """The mean difference over trainings and questions; ``deltas`` has that of each training, ``sd`` their spread."""

    deltas: list[float]
    mean: float
    sd: float
    interval: tuple[float, float]
    p_value: float
    freedom: float


def over_trainings(
    differences: Sequence[Sequence[float]], groups: Sequence[str | None] | None = None, *, alpha: float = 0.05
) -> MeanGain:
    """Test and interval of the mean difference over two or more trainings.

    Student's t with the degrees of freedom of Satterthwaite (1946): few (trainings − 1) if the trainings differ much,
    many if they agree.

    Args:
        differences: For each training and question the fine-tuned model's score minus that of the base model.
        groups: The source of each question; None, as a whole or for one question, where it stands alone.
        alpha: 1 − the level of the interval.

    Raises:
        ValueError: there are fewer than two trainings, no questions, or lists of different lengths.
    """
    import numpy as np
    from scipy.stats import t

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
    variance = sum(part for part, _ in parts)
    sd = float(deltas.std(ddof=1))
    if count == 1:
        return MeanGain(deltas.tolist(), mean, sd, (-1.0, 1.0), 1.0, 0)
    if variance <= 1e-24:
        sure = abs(mean) > 1e-12
        return MeanGain(deltas.tolist(), mean, sd, (mean, mean), 0.0 if sure else 1.0, trainings - 1)
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    half = float(t.isf(alpha / 2, freedom)) * math.sqrt(variance)
    p = 2 * float(t.sf(abs(mean) / math.sqrt(variance), freedom))
    return MeanGain(deltas.tolist(), mean, sd, (max(-1.0, mean - half), min(1.0, mean + half)), p, freedom)
