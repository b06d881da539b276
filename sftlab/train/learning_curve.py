"""The learning curve of a sweep over train.data_share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from sftlab.dataset.tokenize import COUNTS
from sftlab.eval.statistics import mean_interval
from sftlab.eval.statistics.curve import power_law
from sftlab.records import Candidate
from sftlab.results import Curve, CurvePoint, CurvePrediction, Selection, TokenCounts
from sftlab.runtime.job import Job
from sftlab.train.checkpoints import ROWS


def of(jobs: Sequence[Job], selection: Selection) -> Curve | None:
    """The curve of jobs that are ranked together; None unless they differ in ``train.data_share`` and nothing else.

    Of each job the best checkpoint counts, by what the selection ranks by. Seeds may differ too.
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
    points = []
    for job, cfg in zip(jobs, settings, strict=True):
        trained = [row for row in by_job[job.number] if row.step and not row.average_of]
        best = min(trained, key=lambda row: (-(row.score or 0), row.eval_loss))
        counts = TokenCounts.model_validate_json((Path(job.stages["tokens"]) / COUNTS).read_bytes())
        points.append(_point(job.number, cfg.train.data_share, counts.train.rows, best, selection.scored_rows, alpha))
    points.sort(key=lambda point: (point.rows, point.job))
    rows, losses = [point.rows for point in points], [point.eval_loss for point in points]
    scores = [point.score for point in points if point.score is not None]
    return Curve(
        metric=selection.metric,
        level=1 - alpha,
        points=points,
        loss=_predicted(rows, losses, alpha, 0.0),
        score=_score(rows, scores, selection.scored_rows, alpha) if len(scores) == len(rows) else None,
    )


def _point(job: int, share: float, rows: int, best: Candidate, scored: int | None, alpha: float) -> CurvePoint:
    losses = json.loads((Path(best.checkpoint) / ROWS).read_text("utf-8"))
    interval = None
    if best.score is not None and scored:
        right = round(best.score * scored)
        interval = mean_interval([1.0] * right + [0.0] * (scored - right), None, alpha=alpha)
    return CurvePoint(
        job=job,
        share=share,
        rows=rows,
        eval_loss=best.eval_loss,
        loss_interval=_loss_interval(losses, best.eval_loss, alpha),
        score=best.score,
        score_interval=interval,
    )


def _loss_interval(rows: Sequence[Sequence[float]], loss: float, alpha: float) -> tuple[float, float] | None:
    """The interval of a loss per token, a ratio of sums over rows, by Student's t."""
    from scipy.stats import t

    used = [(nats, tokens) for nats, tokens in rows if tokens]
    count, tokens = len(used), sum(tokens for _, tokens in used)
    if count < 2:
        return None
    squares = sum((nats - loss * own) ** 2 for nats, own in used)
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
