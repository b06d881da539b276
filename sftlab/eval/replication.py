"""The verdict on a recipe: every training of it, not only the selected one, is compared with the base model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from sftlab.config import Config
from sftlab.eval import contenders, reuse
from sftlab.eval import stage as evaluate
from sftlab.eval.contenders import Contender, EvalSet
from sftlab.eval.pairwise import pairwise_of
from sftlab.eval.scorers import scorer
from sftlab.eval.scorers.base import Runs
from sftlab.eval.statistics import MeanGain, averages, over_trainings
from sftlab.eval.statistics.limits import Judged, Limits
from sftlab.eval.statistics.verdict import points, stated
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model import merge, variants
from sftlab.results import Evaluation, Recipe, Replication, TrainingResult, Verdict
from sftlab.runtime.job import Job
from sftlab.runtime.store import Store

log = logging.getLogger(__name__)

FEW = 3
"""Trainings below which their spread is hardly known."""


def replicate(
    cfg: Config, store: Store, recipe: Recipe, jobs: Sequence[Job], test: EvalSet, evaluation: Evaluation
) -> Replication:
    """Evaluate the selected checkpoint of each training of a recipe, and judge the recipe.

    All models answer with the settings of ``cfg``, that of the job whose checkpoint was selected, so that its answers
    and those of the base model are generated once. A model that was merged for this is deleted after its answers.
    """
    begin = time.monotonic()
    log.info("evaluate: the selected recipe with seeds %s", ", ".join(map(str, recipe.seeds)))
    of_number = {job.number: job for job in jobs}
    sides = []
    for number, checkpoint, step in zip(recipe.jobs, recipe.checkpoints, recipe.steps, strict=True):
        sides.append(_answers(cfg, store, of_number[number], Path(checkpoint), step, test))
    return judged(cfg, recipe, sides, evaluation, time.monotonic() - begin)


def _answers(
    cfg: Config, store: Store, job: Job, checkpoint: Path, step: int, test: EvalSet
) -> tuple[Runs | None, Runs]:
    """The answers of the base model, if it is evaluated, and of a checkpoint."""
    own, machine = job.settings(), instance.find(cfg.instance)
    base = models.resolve(own.model, store, own.seed)
    untrained = None
    is_untrained = step == 0 or variants.equals_base(checkpoint, base.path)
    if cfg.eval.baseline or is_untrained:
        untrained, _ = contenders.answers(cfg, store, Contender.of(base), test)
    if is_untrained and untrained is not None:
        return _paired(cfg, test, untrained if cfg.eval.baseline else None, untrained)
    folder = store.path("merged", merge.inputs(checkpoint, base))
    model = evaluate.Model(folder, folder.name, base.trust_remote_code)
    stage = None
    if not evaluate.cached(store, model, contenders.prompts(cfg, base, test), cfg.eval, machine, cfg.seed):
        stage = merge.make(store, checkpoint, base, Path(job.stages["tokens"]), machine, cfg.merge).stage
    tuned, _ = contenders.answers(cfg, store, Contender(model, base), test)
    if stage is not None and not stage.cached:
        store.remove(stage)
    return _paired(cfg, test, untrained, tuned)


def _paired(cfg: Config, test: EvalSet, untrained: Runs | None, tuned: Runs) -> tuple[Runs | None, Runs]:
    """The answers with scores that depend on both models, if the task compares them (eval.task=judge)."""
    pairwise = pairwise_of(cfg, test.examples)
    if pairwise is None or untrained is None:
        return untrained, tuned
    both = scorer(cfg.eval).paired({"baseline": untrained, "finetuned": tuned}, pairwise)
    return both["baseline"], both["finetuned"]


def judged(
    cfg: Config, recipe: Recipe, sides: Sequence[tuple[Runs | None, Runs]], evaluation: Evaluation, seconds: float
) -> Replication:
    """Judge a recipe from the answers of base model and fine-tuned model in each of its trainings."""
    values = [_scores(tuned) for _, tuned in sides]
    metrics = [mean(row) for row in values]
    first = sides[0][1][0]
    before = [_scores(base) for base, _ in sides if base is not None]
    gain = verdict = p_adjusted = None
    if before:
        differences = [
            [after - now for now, after in zip(*pair, strict=True)] for pair in zip(before, values, strict=True)
        ]
        gain = over_trainings(differences, [row.group for row in first])
        number = evaluation.reuse.number if evaluation.reuse is not None and cfg.eval.correct_for_reuse else None
        p_adjusted = None if number is None else reuse.adjusted(gain.p_value(), number)
        compared = evaluation.comparison
        verdict = worded(gain, cfg.eval.alpha, cfg.eval.smallest_gain, number)
        if compared is not None and not compared.verdict.judged:
            reason = "cannot be judged, because the selected checkpoint and the base model cannot be compared"
            verdict = Verdict(outcome="inconclusive", reason=reason, judged=False)
    deltas = [None] * len(sides) if gain is None else gain.deltas
    rows = zip(recipe.jobs, recipe.seeds, recipe.steps, metrics, deltas, strict=True)
    return Replication(
        metric=scorer(cfg.eval).metric,
        n=len(first),
        trainings=[
            TrainingResult(job=job, seed=seed, step=step, value=value, delta=delta)
            for job, seed, step, value, delta in rows
        ],
        mean=mean(metrics),
        sd=stdev(metrics),
        better=None if gain is None else sum(delta > 0 for delta in gain.deltas),
        delta=None if gain is None else gain.mean,
        delta_sd=None if gain is None else gain.sd,
        interval=None if gain is None else gain.interval(cfg.eval.alpha),
        level=1 - cfg.eval.alpha,
        p_value=None if gain is None else gain.p_value(),
        p_adjusted=p_adjusted,
        verdict=verdict,
        models=len(sides) - 1,
        seconds=round(seconds, 1),
    )


def worded(gain: MeanGain, alpha: float, smallest: float = 0.0, number: int | None = None) -> Verdict:
    """The verdict on a recipe: in how many trainings it is better, the mean gain and its spread.

    Args:
        gain: The mean gain.
        alpha: The config key ``eval.alpha``.
        smallest: The config key ``eval.smallest_gain``.
        number: The place of the model among those judged on the test set, for which p is adjusted; None: it is not.
    """

    def p_value(mean: float) -> float:
        return gain.p_value(mean) if number is None else reuse.adjusted(gain.p_value(mean), number)

    limits, count = Limits(smallest), len(gain.deltas)
    interval = gain.interval(alpha)
    compared = Judged(gain.mean, interval, alpha, limits, p_value, lambda _: interval[0], count, gain.error)
    low, high = map(points, interval)
    shown = stated(gain.p_value())
    if number is not None:
        shown += f", adjusted for earlier models {p_value(0):.2g}"
    better = sum(delta > 0 for delta in gain.deltas)
    notes = []
    if count < FEW:
        notes.append("two trainings hardly show how much seeds differ, so the interval may be too narrow")
    if smallest and gain.p_value() < alpha:
        notes.append(f"the smallest gain that matters is {points(smallest)} points")
    return Verdict(
        outcome=compared.outcome,
        reason=(
            f"better in {better} of {count} trainings, {points(gain.mean)} points on average, "
            f"SD {100 * gain.sd:.1f} between trainings ({100 * (1 - alpha):g} % interval for other seeds and questions "
            f"{low} to {high}, {shown})"
        ),
        notes=notes,
    )


def _scores(runs: Runs) -> list[float]:
    """The score of each question, averaged over repeats."""
    return averages([[float(row.correct) if row.score is None else row.score for row in rows] for rows in runs])
