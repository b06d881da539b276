"""The experiment, from top to bottom: each job trains, then one checkpoint of all jobs is selected and evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sftlab import selection
from sftlab.config import Config, ModelConfig, NoPeft
from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.dataset.leakage import gate
from sftlab.dataset.pinning import pinned, pinned_data
from sftlab.errors import ConfigError, OutOfMemoryError, PrunedError, advised
from sftlab.eval import contenders, decision, guards, release, task
from sftlab.eval import stage as evaluate
from sftlab.eval.checks import check_answers
from sftlab.eval.contenders import Contender, EvalSet
from sftlab.eval.pairwise import pairwise_of
from sftlab.eval.predictions import labels, load_others, load_pair
from sftlab.instance import machine as instance
from sftlab.instance import precision
from sftlab.model import base as models
from sftlab.model.base import Base
from sftlab.report import page, terminal
from sftlab.results import LABELS, RunRecord
from sftlab.runtime.job import Job
from sftlab.runtime.run import Run
from sftlab.runtime.store import Stage, Store
from sftlab.tracking import tracker
from sftlab.train import advice, memory, pruning, ranking, schedule, sharing
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
    variables = tracker.of_job(cfg, job, folder)
    tracker.announce(cfg, folder)
    peers = pruning.peers(cfg, store.root, job.run, job.number, tokens.counts)
    try:
        trained = train.make(store, tokens, base, cfg.peft, cfg.train, machine, cfg.seed, variables, peers)
    except PrunedError:
        job.pruned = None if peers is None else peers.decision()
        raise
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
        selection.decide(run, jobs)


def finish_evaluation(run: Run, jobs: Sequence[Job], is_sweep: bool) -> None:
    """After evaluation jobs, of which at least one succeeded: record their results."""
    if is_sweep:
        run.update(evaluations=decision.adjusted(jobs))
        terminal.evaluations(run.record.evaluations)
    else:
        run.update(**jobs[0].origin(), evaluation=jobs[0].evaluation)


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
    """``mode=compare``: compare files of predictions, of any origin: the second with each other. Returns the page."""
    first, second, *more = map(Path, cfg.eval.predictions)
    baseline, finetuned = load_pair(first, second, cfg.eval)
    others, records = load_others(cfg.eval, baseline[0])
    runs, names = {"baseline": baseline, "finetuned": finetuned, **others}, labels(first, second, cfg.eval)
    pairs = pairwise_of(cfg)
    evaluation = decision.decide(
        runs,
        names,
        cfg.eval,
        run.folder,
        both_mute=False,
        labels=names,
        contenders=records,
        pairwise=pairs,
    )
    if pairs is not None:
        run.update(stages=pairs.stages)
    sources = dict(zip([*LABELS, *others], map(str, (first, second, *more)), strict=True))
    run.update(evaluation=(evaluation := release.decided(evaluation)), sources=sources)
    terminal.evaluation(evaluation, cfg.mode, cfg.seed)
    return run.folder / "report.html"
