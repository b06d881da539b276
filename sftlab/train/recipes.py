"""Recipes of a sweep: jobs that differ in ``seed`` only are replicates, and a recipe is ranked by their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from sftlab.records import Candidate
from sftlab.results import Recipe
from sftlab.runtime.job import Job
from sftlab.runtime.store import key_of
from sftlab.train.select import Selection, select

# Sections that do not belong to a recipe: where it runs, and what is logged.
ELSEWHERE = ("seed", "instance", "tracking", "hub", "clean", "runs", "plan")


@dataclass(frozen=True)
class Ranking:
    """The selection, and the recipes, the best first; no recipes if none was trained with several seeds."""

    selection: Selection
    recipes: list[Recipe]


def rank(
    jobs: Sequence[Job],
    tie: str,
    scores: Sequence[Sequence[float]] | None = None,
    groups: Sequence[str | None] | None = None,
) -> Ranking:
    """Select a checkpoint from all jobs; if a recipe has several seeds, from the recipe with the best mean.

    In each training a checkpoint is selected as in a single run. The mean of a recipe is over these checkpoints, and
    the selected one is the best of them on validation.

    Args:
        jobs: Jobs whose checkpoints can be ranked together.
        tie: The config key ``select.tie``.
        scores: As for ``select``, for all candidates of the jobs in order; None to rank by the loss.
        groups: As for ``select``.
    """
    every = [candidate for job in jobs for candidate in job.candidates]
    whole = select(every, tie, scores, groups)
    members = _members(jobs)
    if all(len(own) == 1 for own in members):
        return Ranking(whole, [])
    rows: dict[tuple[int, str], Sequence[float]] = {}
    if scores is not None:
        rows = {(row.job, row.checkpoint): score for row, score in zip(every, scores, strict=True)}
    ranked: list[tuple[Recipe, list[Selection]]] = []
    for own in members:
        trainings = []
        for job in own:
            of_job = None if scores is None else [rows[row.job, row.checkpoint] for row in job.candidates]
            trainings.append(select(job.candidates, tie, of_job, groups))
        ranked.append((_recipe(own, trainings), trainings))
    ranked.sort(key=lambda pair: (-pair[0].mean if scores is not None else pair[0].mean, pair[0].jobs))
    best = min(ranked[0][1], key=lambda training: _cost(training.chosen))
    return Ranking(replace(best, candidates=whole.candidates), [recipe for recipe, _ in ranked])


def _members(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each recipe, in order; of several with the same seed the first."""
    members: dict[str, dict[int, Job]] = {}
    for job in jobs:
        cfg = job.settings()
        recipe = cfg.model_dump(mode="json", exclude={*ELSEWHERE, "dry_run"})
        recipe["train"]["gradient_checkpointing"] = None
        members.setdefault(key_of(recipe), {}).setdefault(cfg.seed, job)
    return [list(of_seed.values()) for of_seed in members.values()]


def _recipe(jobs: Sequence[Job], trainings: Sequence[Selection]) -> Recipe:
    chosen = [training.chosen for training in trainings]
    values = [row.eval_loss if row.score is None else row.score for row in chosen]
    return Recipe(
        overrides=[word for word in jobs[0].overrides if not word.startswith("seed=")],
        jobs=[job.number for job in jobs],
        seeds=[job.settings().seed for job in jobs],
        checkpoints=[row.checkpoint for row in chosen],
        steps=[row.step for row in chosen],
        values=values,
        mean=mean(values),
        sd=stdev(values) if len(values) > 1 else None,
    )


def _cost(row: Candidate) -> tuple[float, float, float]:
    return -(row.score or 0), row.eval_loss, row.epoch
