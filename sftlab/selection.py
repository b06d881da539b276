"""After the jobs of a run have trained: select a checkpoint, merge it, and evaluate it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftlab import results
from sftlab.config import Config
from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.errors import StageError
from sftlab.eval import contenders, guards, replication
from sftlab.eval import stage as evaluate
from sftlab.eval.checkpoints import Scores, validation_scores
from sftlab.eval.contenders import Contender
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model import merge, variants
from sftlab.model.base import Base
from sftlab.report import figures, files, terminal
from sftlab.report.publish import publish, track
from sftlab.runtime.job import Job, summary
from sftlab.runtime.modes import MODES
from sftlab.runtime.run import Run, link
from sftlab.runtime.store import Store
from sftlab.train import average, learning_curve, pruning, ranking, recipes, select, sharing


@dataclass(frozen=True)
class Decision:
    """The selection, for the record and with the losses of all rows; the job that it is from, and its base model.

    ``untrained`` is why nothing is merged, if the selected checkpoint has the weights of the base model. ``scores`` are
    those that rank the checkpoints; None if the loss does.
    """

    record: results.Selection
    selected: select.Selection
    winner: Job
    cfg: Config
    base: Base
    untrained: str | None
    scores: Scores | None


def decide(run: Run, jobs: Sequence[Job]) -> None:
    """Select → merge → evaluate → report: once, after all jobs, from their files only.

    Raises:
        StageError: No job has a checkpoint to select from.
    """
    for job in jobs:
        if job.status == "success" and not (job.candidates and {"tokens", "train"} <= job.stages.keys()):
            raise StageError(
                f"job {job.number}: reports success and no checkpoint, as if {job.folder / 'job.json'} had been "
                "changed. Run the same command again; completed stages are reused"
            )
    done = [job for job in jobs if job.status == "success"]
    ranking.warn_of_batches(done)
    ranked = max(ranking.comparable(done), key=len)  # the first of equally large groups
    decision = _selection(ranked, done)
    winner, cfg, selection = decision.winner, decision.cfg, decision.record
    run.update(
        **winner.origin(),
        receipt=winner.receipt,
        overlap=winner.overlap,
        jobs=[summary(job, ranked=job in ranked, among=done) for job in jobs],
        selection=selection,
    )
    link(run.folder / "best", None if decision.untrained else Path(selection.checkpoint))
    terminal.ranking(decision.selected, jobs, selection)
    curve = learning_curve.of(ranked, selection, decision.scores)
    if curve is not None:
        run.update(curve=curve)
        terminal.learning_curve(curve)
        figures.learning_curve(run.folder / "curve.png", curve)
    files.sweep_csv(run.folder / "sweep.csv", decision.selected, done)
    files.metrics(run.folder, jobs)
    figures.loss_curve(run.folder / "loss.png", run.record.experiment, selection, jobs)
    if decision.untrained:
        link(run.folder / "merged", None)
        run.update(skipped=decision.untrained)
        terminal.skipped(decision.untrained)
        if cfg.hub.push:
            raise StageError("hub.push=true: nothing was pushed, because the untrained model is selected")
    elif MODES[cfg.mode].evaluates:
        _evaluate(run, decision, done)
    track(run, cfg, winner)
    publish(run, cfg)
    pruning.forget(Path(cfg.store), run.record.id)
    if all(job.status in ("success", "pruned") for job in jobs):  # no other job may resume from their checkpoints
        for job in done:
            sharing.release(Store(cfg.store), Path(job.stages["train"]))


def _selection(ranked: Sequence[Job], done: Sequence[Job]) -> Decision:
    """Rank the checkpoints of jobs that can be ranked together, by the loss or by scores of their answers."""
    order, scores = _ranking(ranked)
    winner, cfg, base = _winner(order, done)
    if cfg.select.average is not None:
        averaged = average.make(Store(cfg.store), order.selection.ties, winner, base, instance.find(cfg.instance))
        if averaged is not None:
            winner.candidates = [*winner.candidates, averaged]
            order, scores = _ranking(ranked)
            winner, cfg, base = _winner(order, done)  # with the average another recipe may be the best
            winner.stages = {**winner.stages, "average": str(Path(averaged.checkpoint).parent)}
    chosen = order.selection.chosen
    unranked = [candidate for job in done if job not in ranked for candidate in job.candidates]
    sources = tokenize.validation_sources(Path(winner.stages["tokens"]))
    metric, count = ("eval_loss", None) if scores is None else (scores.metric, len(scores.groups))
    record = select.record(order.selection, metric, unranked, sources, order.recipes, count)
    is_untrained = chosen.step == 0 or variants.equals_base(Path(chosen.checkpoint), base.path)
    untrained = select.untrained(cfg.select.tie, chosen.step) if is_untrained else None
    return Decision(record, order.selection, winner, cfg, base, untrained, scores)


def _winner(order: recipes.Ranking, done: Sequence[Job]) -> tuple[Job, Config, Base]:
    """The job of the selected checkpoint, with its settings and base model."""
    winner = next(job for job in done if job.number == order.selection.chosen.job)
    cfg = winner.settings()
    return winner, cfg, models.resolve(cfg.model, Store(cfg.store), cfg.seed)  # the job may be of another process


def _ranking(ranked: Sequence[Job]) -> tuple[recipes.Ranking, Scores | None]:
    """Rank the checkpoints of jobs; with the scores that rank them, or None if the loss does."""
    settings = ranked[0].settings().select
    if settings.metric == "score":
        scores = validation_scores(ranked)
        return recipes.rank(ranked, settings.tie, scores.rows, scores.groups), scores
    return recipes.rank(ranked, settings.tie, None, tokenize.validation_groups(Path(ranked[0].stages["tokens"]))), None


def _evaluate(run: Run, decision: Decision, done: Sequence[Job]) -> None:
    """Merge the selected checkpoint, and compare it with the base model on the test set."""
    winner, cfg, base, selection = decision.winner, decision.cfg, decision.base, decision.record
    store, machine = Store(cfg.store), instance.find(cfg.instance)
    checkpoint, tokens = Path(selection.checkpoint), Path(winner.stages["tokens"])
    merged = merge.make(store, checkpoint, base, tokens, machine, cfg.merge)
    link(run.folder / "merged", merged.stage.path)
    stages = {**winner.stages, "merged": str(merged.stage.path)}
    run.update(merge=merged.check, stages=stages)
    test = contenders.read_test(cfg, store, dataset.make(store, cfg.dataset))
    model = evaluate.Model(merged.stage.path, merged.stage.key, base.trust_remote_code)
    finetuned = Contender(model, base, adapter=checkpoint)
    both = {"baseline": Contender.of(base), "finetuned": finetuned}
    judged = guards.judge(cfg, store, both, test, run.folder)
    times = {**winner.times, **judged.times}
    run.update(evaluation=judged.evaluation, stages={**stages, **judged.stages}, times=times)
    if selection.recipes and len(selection.recipes[0].seeds) > 1:
        replicated = replication.replicate(cfg, store, selection.recipes[0], done, test, judged.evaluation)
        run.update(replication=replicated)
    terminal.evaluation(judged.evaluation, cfg.mode, cfg.seed, run.record.replication)
