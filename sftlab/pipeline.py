"""The experiment, from top to bottom: each job trains, then one checkpoint of all jobs is selected and evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sftlab.config import Config, ModelConfig, NoPeft
from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.dataset.leakage import gate
from sftlab.dataset.pinning import pinned, pinned_data
from sftlab.errors import ConfigError, OutOfMemoryError, StageError, advised
from sftlab.eval import contenders, decision, guards, release, replication, task
from sftlab.eval import stage as evaluate
from sftlab.eval.checkpoints import validation_answers
from sftlab.eval.checks import check_answers
from sftlab.eval.contenders import Contender, EvalSet
from sftlab.eval.predictions import labels, load_pair
from sftlab.instance import machine as instance
from sftlab.instance import precision
from sftlab.model import base as models
from sftlab.model import merge
from sftlab.model.base import Base
from sftlab.report import figures, files, page, terminal
from sftlab.report.publish import publish, track
from sftlab.results import RunRecord
from sftlab.runtime.job import Job, summary
from sftlab.runtime.modes import MODES
from sftlab.runtime.run import Run, link
from sftlab.runtime.store import Stage, Store
from sftlab.tracking import wandb as tracking
from sftlab.train import advice, memory, ranking, recipes, schedule, select, sharing
from sftlab.train import stage as train
from sftlab.validation.combinations import evaluation_problems

log = logging.getLogger(__name__)


def run_job(cfg: Config, job: Job, folder: Path) -> None:
    """Dataset → tokens → train. The results are set in ``job``."""
    store, machine, cfg = Store(cfg.store), instance.find(cfg.instance), pinned_data(cfg)
    data = dataset.make(store, cfg.dataset)
    data.announce()
    job.row_format, job.data_sources = data.row_format(), data.sources()
    test = contenders.read_test(cfg, store, data)
    cfg = with_task(cfg, test, data)
    job.overlap, examined = gate(cfg, store, data, test.examples, test.key)  # before the model is downloaded
    check_answers(cfg, {**data.for_training(), "test": test.examples})
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = with_precision(pinned(cfg, base), base, store, machine)
    job.config, job.precision = cfg.model_dump(), precision.record(measured, cfg.train, cfg.eval)
    guards.check(cfg, store, base, test)
    tokens = tokenize.make(store, data, base, cfg)
    schedule.check_length(tokens.counts, cfg.train, machine)
    cfg, estimate = memory.with_checkpointing(cfg, base, tokens, machine, store)
    job.config = cfg.model_dump()
    log.info(
        "train: %s, %s, effective batch %d (%d per device × %d devices × %d steps), %s",
        base.name,
        cfg.peft.method,
        machine.effective_batch(cfg.train),
        cfg.train.per_device_train_batch_size,
        machine.world_size,
        machine.accumulation(cfg.train),
        schedule.described(tokens.counts, cfg.train, machine),
    )
    variables = tracking.of_job(cfg, job, folder)
    tracking.announce(cfg.tracking, folder)
    try:
        trained = train.make(store, tokens, base, cfg.peft, cfg.train, machine, cfg.seed, variables)
    except OutOfMemoryError as error:
        raise advised(
            error, lambda: advice.advice(cfg, base, tokens, machine), otherwise=advice.changes(cfg, machine)
        ) from error
    if trained is None:
        return  # the first machine of several has the checkpoints
    stages = [data.stage, examined, tokens.stage, trained.stage, *(stage for stage in (measured, estimate) if stage)]
    job.stages = {stage.name: str(stage.path) for stage in stages}
    job.times = {stage.name: round(stage.seconds, 1) for stage in stages}
    job.receipt = trained.receipt
    job.family = sharing.family(train.inputs(tokens.stage.key, base, cfg.peft, cfg.train, machine, cfg.seed), cfg.train)
    job.candidates = trained.candidates(job.number, job.overrides)
    job.comparable = ranking.requirements(cfg, data.split("validation"), tokens.counts, trained.receipt)


def with_task(cfg: Config, test: EvalSet, data: dataset.Dataset | None) -> Config:
    """Replace ``eval.task=auto`` by the task that fits the rows.

    Raises:
        ConfigError: Other settings do not fit that task.
    """
    known = task.fitted(cfg, test.examples, [] if data is None else data.split("train"))
    if known is not cfg and (problems := list(evaluation_problems(known))):
        raise ConfigError(*problems)
    task.announce(cfg, known)
    return known


def with_precision(cfg: Config, base: Base, store: Store, machine: instance.Machine) -> tuple[Config, Stage | None]:
    """Replace ``auto`` by a number format; with the stage that measured it, if it had to be measured."""
    whole = isinstance(cfg.peft, NoPeft)
    trained, evaluation, stage = precision.chosen(store, base, cfg.train, cfg.eval, machine, whole=whole)
    return cfg.model_copy(update={"train": trained, "eval": evaluation}), stage


def finish_training(run: Run, jobs: Sequence[Job], is_sweep: bool) -> None:
    """After training jobs, of which at least one succeeded: select and evaluate, on the first machine of several."""
    cfg = next(job for job in jobs if job.status == "success").settings()
    if cfg.instance.node_rank > 0:
        rank, nodes = cfg.instance.node_rank, cfg.instance.nnodes
        log.info("machine %d of %d: trained; machine 0 has the checkpoints", rank, nodes)
    else:
        decide(run, jobs)


def finish_evaluation(run: Run, jobs: Sequence[Job], is_sweep: bool) -> None:
    """After evaluation jobs, of which at least one succeeded: record their results."""
    if is_sweep:
        run.update(evaluations=decision.adjusted(jobs))
        terminal.evaluations(run.record.evaluations)
    else:
        run.update(**jobs[0].origin(), evaluation=jobs[0].evaluation)


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
    settings = ranked[0].settings().select
    answers, groups = None, tokenize.validation_groups(Path(ranked[0].stages["tokens"]))
    if settings.metric == "exact_match":
        answers, groups = validation_answers(ranked)
    order = recipes.rank(ranked, settings.tie, answers, groups)
    selected = order.selection
    winner = next(job for job in done if job.number == selected.chosen.job)
    unranked = [candidate for job in done if job not in ranked for candidate in job.candidates]
    sources = tokenize.validation_sources(Path(winner.stages["tokens"]))
    cfg, selection = winner.settings(), select.record(selected, settings.metric, unranked, sources, order.recipes)
    run.update(
        **winner.origin(),
        receipt=winner.receipt,
        overlap=winner.overlap,
        jobs=[summary(job, ranked=job in ranked, among=done) for job in jobs],
        selection=selection,
    )
    checkpoint = Path(selection.checkpoint)
    link(run.folder / "best", checkpoint if selection.step else None)
    terminal.ranking(selected, jobs, selection)
    files.sweep_csv(run.folder / "sweep.csv", selected, done)
    files.metrics(run.folder, jobs)
    figures.loss_curve(run.folder / "loss.png", run.record.experiment, selection, jobs)
    if selection.step == 0:
        link(run.folder / "merged", None)
        run.update(skipped=select.untrained(settings.tie))
        terminal.skipped(select.untrained(settings.tie))
        if cfg.hub.push:
            raise StageError("hub.push=true: nothing was pushed, because the untrained model is selected")
    elif MODES[cfg.mode].evaluates:
        store, machine = Store(cfg.store), instance.find(cfg.instance)
        base = models.resolve(cfg.model, store, cfg.seed)  # again: the job may have run in a worker of a launcher
        merged = merge.make(store, checkpoint, base, Path(winner.stages["tokens"]), machine, cfg.merge)
        link(run.folder / "merged", merged.stage.path)
        stages = {**winner.stages, "merged": str(merged.stage.path)}
        run.update(merge=merged.check, stages=stages)
        test = contenders.read_test(cfg, store, dataset.make(store, cfg.dataset))
        finetuned = Contender(evaluate.Model(merged.stage.path, merged.stage.key, base.trust_remote_code), base)
        both = {"baseline": Contender.of(base), "finetuned": finetuned}
        judged = guards.judge(cfg, store, both, test, run.folder)
        times = {**winner.times, **judged.times}
        run.update(evaluation=judged.evaluation, stages={**stages, **judged.stages}, times=times)
        if selection.recipes and len(selection.recipes[0].seeds) > 1:
            replicated = replication.replicate(cfg, store, selection.recipes[0], done, test, judged.evaluation)
            run.update(replication=replicated)
        terminal.evaluation(judged.evaluation, cfg.mode, cfg.seed, run.record.replication)
    track(run, cfg, winner)
    publish(run, cfg)
    if len(done) == len(jobs):  # no job is left that might resume from their checkpoints
        for job in jobs:
            sharing.release(Store(cfg.store), Path(job.stages["train"]))


def evaluate_job(cfg: Config, job: Job, folder: Path) -> None:
    """``mode=evaluate``: compare a model with the base on the test set. The result is set in ``job``."""
    store, cfg = Store(cfg.store), pinned_data(cfg)
    data = dataset.make(store, cfg.dataset) if cfg.eval.dataset is None else None
    test = contenders.read_test(cfg, store, data)
    cfg = with_task(cfg, test, data)
    check_answers(cfg, {"test": test.examples})
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = with_precision(pinned(cfg, base), base, store, instance.find(cfg.instance))
    job.config, job.precision = cfg.model_dump(), precision.record(measured, cfg.train, cfg.eval)
    model = models.resolve(evaluated_model(cfg), store, cfg.seed)
    evaluate.check_engine(model, cfg.eval)
    both = {"baseline": Contender.of(base), "finetuned": Contender.of(model)}
    judged = guards.judge(cfg, store, both, test, folder)
    job.evaluation, job.stages, job.times = judged.evaluation, judged.stages, judged.times
    if measured is not None:
        job.stages = {**job.stages, "precision": str(measured.path)}
    terminal.evaluation(judged.evaluation, cfg.mode, cfg.seed)
    page.write(Run(folder, _of_job(cfg, job)))


def evaluated_model(cfg: Config) -> ModelConfig:
    """The model that ``mode=evaluate`` compares with the base."""
    assert cfg.eval.name_or_path is not None
    return cfg.model.model_copy(update={"name_or_path": cfg.eval.name_or_path, "revision": None})


def _of_job(cfg: Config, job: Job) -> RunRecord:
    """A job's evaluation as the record of a run, for its page."""
    fields = {"id": job.run or "", "status": "success", "experiment": cfg.name, "mode": cfg.mode, "seed": cfg.seed}
    values = {**fields, "command": "", "started": "", **job.origin(), "evaluation": job.evaluation}
    return RunRecord.model_validate(values)


def compare_files(run: Run, cfg: Config) -> Path:
    """``mode=compare``: compare two files of predictions, of any origin. Returns the page."""
    first, second = map(Path, cfg.eval.predictions)
    baseline, finetuned = load_pair(first, second, cfg.eval)
    runs = {"baseline": baseline, "finetuned": finetuned}
    names = labels(first, second, cfg.eval)
    evaluation = release.decided(decision.decide(runs, names, cfg.eval, run.folder, both_mute=False, labels=names))
    run.update(evaluation=evaluation, sources={"baseline": str(first), "finetuned": str(second)})
    terminal.evaluation(evaluation, cfg.mode, cfg.seed)
    return run.folder / "report.html"
