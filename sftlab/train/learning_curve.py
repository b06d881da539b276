"""The learning curve of a sweep over train.data_share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from sftlab.dataset import tokenize
from sftlab.dataset.tokenize import COUNTS
from sftlab.eval.checkpoints import Scores
from sftlab.eval.statistics import mean_interval
from sftlab.eval.statistics.curve import power_law
from sftlab.records import Candidate
from sftlab.results import Curve, CurvePoint, CurvePrediction, Selection, TokenCounts
from sftlab.runtime.job import Job
from sftlab.train.checkpoints import ROWS


def of(jobs: Sequence[Job], selection: Selection, scores: Scores | None = None) -> Curve | None:
    """The curve of jobs that are ranked together; None unless they differ in ``train.data_share`` and nothing else.

    Of each job the best checkpoint counts, by what the selection ranks by; a job with the untrained model only is left
    out. Seeds may differ too. ``scores`` are those that rank the checkpoints; None if the loss does.
    """
    settings = [job.settings() for job in jobs]
    shares = {cfg.train.data_share for cfg in settings}
    own = {"data_share": 1.0, "gradient_checkpointing": False}
    recipes = [cfg.model_copy(update={"seed": 0, "train": cfg.train.model_copy(update=own)}) for cfg in settings]
    if len(shares) < 2 or any(recipe != recipes[0] for recipe in recipes):
        return None
    alpha = settings[0].eval.alpha
    by_job: dict[int, list[Candidate]] = {}
    for row in selection.candidates:
        by_job.setdefault(row.job, []).append(row)
    intervals = {} if scores is None else _score_intervals(jobs, scores, alpha)
    points = []
    for job, cfg in zip(jobs, settings, strict=True):
        trained = [row for row in by_job[job.number] if row.step and not row.average_of]
        if not trained:
            continue
        best = min(trained, key=lambda row: (-(row.score or 0), row.eval_loss))
        counts = TokenCounts.model_validate_json((Path(job.stages["tokens"]) / COUNTS).read_bytes())
        groups = tokenize.validation_groups(Path(job.stages["tokens"]))
        interval = intervals.get((job.number, best.checkpoint))
        points.append(_point(cfg.train.data_share, counts.train.rows, best, groups, interval, alpha))
    if len({point.share for point in points}) < 2:
        return None
    points.sort(key=lambda point: (point.rows, point.job))
    rows, losses = [point.rows for point in points], [point.eval_loss for point in points]
    means = [point.score for point in points if point.score is not None]
    return Curve(
        metric=selection.metric,
        level=1 - alpha,
        points=points,
        loss=_predicted(rows, losses, alpha, 0.0),
        score=_score(rows, means, selection.scored_rows, alpha) if len(means) == len(rows) else None,
    )


def _score_intervals(jobs: Sequence[Job], scores: Scores, alpha: float) -> dict[tuple[int, str], tuple[float, float]]:
    """The interval of the mean score of each checkpoint, by job and folder."""
    places = [(job.number, candidate.checkpoint) for job in jobs for candidate in job.candidates]
    return {
        place: mean_interval(rows, scores.groups, alpha=alpha) for place, rows in zip(places, scores.rows, strict=True)
    }


def _point(
    share: float,
    rows: int,
    best: Candidate,
    groups: Sequence[str | None],
    interval: tuple[float, float] | None,
    alpha: float,
) -> CurvePoint:
    losses = json.loads((Path(best.checkpoint) / ROWS).read_text("utf-8"))
    return CurvePoint(
        job=best.job,
        share=share,
        rows=rows,
        eval_loss=best.eval_loss,
        loss_interval=_loss_interval(losses, groups, best.eval_loss, alpha),
        score=best.score,
        score_interval=interval,
    )


def _loss_interval(
    rows: Sequence[Sequence[float]], groups: Sequence[str | None], loss: float, alpha: float
) -> tuple[float, float] | None:
    """The interval of a loss per token, a ratio of sums over groups of rows, by Student's t."""
    from scipy.stats import t

    residuals: dict[str | int, float] = {}
    for place, ((nats, own), group) in enumerate(zip(rows, groups, strict=True)):
        if own:
            key = place if group is None else group
            residuals[key] = residuals.get(key, 0.0) + nats - loss * own
    count, tokens = len(residuals), sum(own for _, own in rows)
    if count < 2:
        return None
    squares = sum(value**2 for value in residuals.values())
    half = float(t.isf(alpha / 2, count - 1)) * sqrt(squares * count / (count - 1)) / tokens
    return max(0.0, loss - half), loss + half


def _predicted(rows: Sequence[int], values: Sequence[float], alpha: float, noise: float) -> CurvePrediction | None:
    made = power_law(rows, values, 2 * max(rows), alpha=alpha, noise=noise)
    if made is None:
        return None
    return CurvePrediction(rows=int(made.rows), value=made.value, interval=made.interval, exponent=made.exponent)


def _score(rows: Sequence[int], scores: Sequence[float], scored: int | None, alpha: float) -> CurvePrediction | None:
    """The law is that of the error, 1 − score. Its noise is at least that of so few questions."""
    answers = scored or 1
    mean = (sum(scores) / len(scores) * answers + 1) / (answers + 2)  # not 0 or 1, which few questions cannot show
    made = _predicted(rows, [1 - score for score in scores], alpha, sqrt(mean * (1 - mean) / answers))
    if made is None:
        return None
    low, high = made.interval
    changes = {"value": max(0.0, 1 - made.value), "interval": (max(0.0, 1 - high), min(1.0, 1 - low))}
    return made.model_copy(update=changes)
