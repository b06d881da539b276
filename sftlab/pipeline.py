"""The experiment, from top to bottom: each job trains, then one checkpoint of all jobs is selected and evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sftlab.config import Config, ModelConfig, NoPeft
from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.dataset.leakage import gate
from sftlab.dataset.pinning import pinned, pinned_data
from sftlab.errors import ConfigError, OutOfMemoryError, StageError, advised
from sftlab.eval import contenders, decision
from sftlab.eval import stage as evaluate
from sftlab.eval.checkpoints import validation_answers
from sftlab.eval.contenders import Contender
from sftlab.eval.predictions import load_pair
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.instance import precision, preflight
from sftlab.model import base as models
from sftlab.model import merge
from sftlab.model.base import Base
from sftlab.report import figures, files, page, terminal
from sftlab.report.preview import preview
from sftlab.report.publish import publish, track
from sftlab.results import MergeCheck, PlanCell, PlanRow, Precision, Receipt, RunRecord, TokenCounts
from sftlab.runtime.clean import clean
from sftlab.runtime.job import Job, summary
from sftlab.runtime.run import Run, link
from sftlab.runtime.store import ScratchStore, Stage, Store
from sftlab.tracking import wandb as tracking
from sftlab.train import plan, ranking, select
from sftlab.train import stage as train

log = logging.getLogger(__name__)


def run_job(cfg: Config, job: Job, folder: Path) -> None:
    """Dataset → tokens → train. The results are set in ``job``."""
    store, machine = Store(cfg.store), instance.find(cfg.instance)
    preflight.check(machine, cfg)
    cfg = pinned_data(cfg)
    data = dataset.make(store, cfg.dataset, cfg.seed)
    test = contenders.read_test(cfg, store, data)
    job.overlap, examined = gate(cfg, store, data, test.examples, test.key)  # before the model is downloaded
    if cfg.select.metric == "exact_match":
        scorer(cfg.eval).check(data.split("validation"), "validation")
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = with_precision(pinned(cfg, base), base, store, machine)
    job.config, job.precision = cfg.model_dump(), _precision(measured, cfg)
    if cfg.mode == "all":
        if warning := scorer(cfg.eval).check_completions(data.split("train")):
            log.warning(warning)
        evaluate.check_engine(base, cfg.eval)
        contenders.prompts(cfg, base, test)  # a prompt without room for an answer fails before training
    tokens = tokenize.make(store, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
    train.check_schedule(tokens, cfg.train, machine)
    cfg, memory = plan.with_checkpointing(cfg, base, tokens, machine, store)
    job.config = cfg.model_dump()
    log.info(
        "train: %s, %s, effective batch %d (%d per device × %d devices × %d steps), %d epochs",
        base.name,
        cfg.peft.method,
        machine.effective_batch(cfg.train),
        cfg.train.per_device_train_batch_size,
        machine.world_size,
        machine.accumulation(cfg.train),
        cfg.train.num_train_epochs,
    )
    variables = tracking.of_job(cfg, job, folder)
    tracking.announce(cfg.tracking, folder)
    try:
        trained = train.make(store, tokens, base, cfg.peft, cfg.train, machine, cfg.seed, variables)
    except OutOfMemoryError as error:
        raise advised(
            error, lambda: plan.advice(cfg, base, tokens, machine), otherwise=plan.changes(cfg, machine)
        ) from error
    if trained is None:
        return  # the first machine of several has the checkpoints
    stages = [data.stage, examined, tokens.stage, trained.stage, *(stage for stage in (measured, memory) if stage)]
    job.stages = {stage.name: str(stage.path) for stage in stages}
    job.times = {stage.name: round(stage.seconds, 1) for stage in stages}
    job.receipt = Receipt.model_validate(trained.receipt)
    job.family = train.family(train.inputs(tokens.stage.key, base, cfg.peft, cfg.train, machine, cfg.seed), cfg.train)
    job.candidates = trained.candidates(job.number, job.overrides)
    counts = TokenCounts.model_validate(tokens.counts)
    job.comparable = ranking.requirements(cfg, data.split("validation"), counts, job.receipt)


def with_precision(cfg: Config, base: Base, store: Store, machine: instance.Machine) -> tuple[Config, Stage | None]:
    """Replace ``auto`` by a number format; with the stage that measured it, if it had to be measured."""
    whole = isinstance(cfg.peft, NoPeft)
    trained, evaluation, stage = precision.chosen(store, base, cfg.train, cfg.eval, machine, whole=whole)
    return cfg.model_copy(update={"train": trained, "eval": evaluation}), stage


def _precision(measured: Stage | None, cfg: Config) -> Precision:
    values = precision.record(measured, cfg.train, cfg.eval)
    return Precision(bf16=values["train.bf16"], dtype=values["eval.dtype"], measured=values["measured"])


def finish(run: Run, jobs: Sequence[Job], *, sweep: bool) -> None:
    """What a run does when its jobs are done, of which at least one succeeded: once, from their files only."""
    if run.record.mode == "plan":
        tell_plan(run, jobs)
    elif run.record.mode == "evaluate":
        decide_evaluations(run, jobs) if sweep else run.update(**jobs[0].origin(), evaluation=jobs[0].evaluation)
    elif (cfg := next(job for job in jobs if job.status == "success").settings()).instance.node_rank > 0:
        rank, nodes = cfg.instance.node_rank, cfg.instance.nnodes
        log.info("machine %d of %d: trained; machine 0 has the checkpoints", rank, nodes)
    else:
        decide(run, jobs)


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
    candidates = [candidate for job in ranked for candidate in job.candidates]
    settings = ranked[0].settings().select
    answers = validation_answers(candidates, ranked) if settings.metric == "exact_match" else None
    selected = select.select(candidates, settings.tie, run.record.seed, answers)
    winner = next(job for job in done if job.number == selected.chosen.job)
    unranked = [candidate for job in done if job not in ranked for candidate in job.candidates]
    cfg, selection = winner.settings(), select.record(selected, settings.metric, unranked)
    run.update(
        **winner.origin(),
        receipt=winner.receipt,
        overlap=winner.overlap,
        jobs=[summary(job, ranked=job in ranked, among=done) for job in jobs],
        selection=selection,
    )
    checkpoint = Path(selection.checkpoint)
    link(run.folder / "best", checkpoint)
    terminal.ranking(selected, jobs)
    files.sweep_csv(run.folder / "sweep.csv", selected, done)
    files.metrics(run.folder, jobs)
    figures.loss_curve(run.folder / "loss.png", run.record.experiment, selection, jobs)
    if cfg.mode == "all":
        store, machine = Store(cfg.store), instance.find(cfg.instance)
        base = models.resolve(cfg.model, store, cfg.seed)
        merged = merge.make(store, checkpoint, base, Path(winner.stages["tokens"]), machine, cfg.merge)
        link(run.folder / "merged", merged.stage.path)
        stages = {**winner.stages, "merged": str(merged.stage.path)}
        run.update(merge=MergeCheck.model_validate(merged.check), stages=stages)
        test = contenders.read_test(cfg, store, dataset.make(store, cfg.dataset, cfg.seed))
        finetuned = Contender(evaluate.Model(merged.stage.path, merged.stage.key, base.trust_remote_code), base)
        both = {"baseline": Contender.of(base), "finetuned": finetuned}
        judged = contenders.judge(cfg, store, both, test, run.folder)
        times = {**winner.times, **judged.times}
        run.update(evaluation=judged.evaluation, stages={**stages, **judged.stages}, times=times)
        terminal.evaluation(judged.evaluation)
    track(run, cfg, winner)
    publish(run, cfg)
    if len(done) == len(jobs):  # no job is left that might resume from their checkpoints
        for job in jobs:
            train.release(Store(cfg.store), Path(job.stages["train"]))


def evaluate_job(cfg: Config, job: Job, folder: Path) -> None:
    """``mode=evaluate``: compare a model with the base on the test set. The result is set in ``job``."""
    preflight.check(instance.find(cfg.instance), cfg)
    store, cfg = Store(cfg.store), pinned_data(cfg)
    data = dataset.make(store, cfg.dataset, cfg.seed) if cfg.eval.dataset is None else None
    test = contenders.read_test(cfg, store, data)
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = with_precision(pinned(cfg, base), base, store, instance.find(cfg.instance))
    job.config, job.precision = cfg.model_dump(), _precision(measured, cfg)
    model = models.resolve(evaluated(cfg), store, cfg.seed)
    evaluate.check_engine(model, cfg.eval)
    both = {"baseline": Contender.of(base), "finetuned": Contender.of(model)}
    judged = contenders.judge(cfg, store, both, test, folder)
    job.evaluation, job.stages, job.times = judged.evaluation, judged.stages, judged.times
    if measured is not None:
        job.stages = {**job.stages, "precision": str(measured.path)}
    terminal.evaluation(judged.evaluation)
    page.write(Run(folder, _of_job(cfg, job)))


def evaluated(cfg: Config) -> ModelConfig:
    """The model that ``mode=evaluate`` compares with the base."""
    assert cfg.eval.name_or_path is not None
    return cfg.model.model_copy(update={"name_or_path": cfg.eval.name_or_path, "revision": None})


def _of_job(cfg: Config, job: Job) -> RunRecord:
    """A job's evaluation as the record of a run, for its page."""
    fields = {"id": job.run or "", "status": "success", "experiment": cfg.name, "mode": cfg.mode, "seed": cfg.seed}
    values = {**fields, "command": "", "started": "", **job.origin(), "evaluation": job.evaluation}
    return RunRecord.model_validate(values)


def decide_evaluations(run: Run, jobs: Sequence[Job]) -> None:
    """Compare the evaluations of all jobs, with p-values adjusted for their number."""
    run.update(evaluations=decision.adjusted(jobs))
    terminal.evaluations(run.record.evaluations)


def show(cfg: Config, folder: Path) -> Path:
    """``mode=preview``: what would be trained on, token by token. Returns the page."""
    store = Store(cfg.store)
    base = models.resolve(cfg.model, store, cfg.seed)
    data = dataset.make(store, cfg.dataset, cfg.seed)
    splits = {name: data.split(name) for name in ("train", "validation")}
    preview(
        base.tokenizer(),
        splits,
        max_length=cfg.train.max_length,
        folder=folder,
        seed=cfg.seed,
        template_time=base.template_time,
    )
    return folder / "preview.html"


def plan_job(cfg: Config, job: Job) -> None:
    """``mode=plan``: what a job would take on its machine goes into ``job``; nothing is trained."""
    store = Store(cfg.store)
    machine = instance.find(cfg.instance, elsewhere=not cfg.plan.probe)
    if cfg.plan.probe:
        preflight.check(machine, cfg)
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = with_precision(cfg, base, store, machine)
    job.config = cfg.model_dump()
    if measured is not None:
        job.stages = {**job.stages, "precision": str(measured.path)}
    data = dataset.make(store, cfg.dataset, cfg.seed)
    tokens = tokenize.make(store, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
    cfg, memory = plan.with_checkpointing(cfg, base, tokens, machine, store)
    job.config = cfg.model_dump()
    if memory is not None:
        job.stages = {**job.stages, "memory": str(memory.path)}
    probe = partial(plan.measure, cfg, base, tokens, machine) if cfg.plan.probe else None
    log.info("plan: %s, %s, on %s", base.name, cfg.peft.method, machine.name)
    job.plan = PlanCell.model_validate(asdict(plan.cell(cfg, base, tokens, machine, probe)))


def tell_plan(run: Run, jobs: Sequence[Job]) -> None:
    """The plans of all jobs, in the terminal and in ``run.json``."""
    cells = [(job, plan.Cell(**job.plan.model_dump(exclude={"fits"}))) for job in jobs if job.plan is not None]
    shared = set.intersection(*(set(job.overrides) for job, _ in cells)) if len(cells) > 1 else set()
    # Of many cells only what tells them apart.
    names = [" ".join([str(job.number), *(word for word in job.overrides if word not in shared)]) for job, _ in cells]
    plan.table(list(zip(names, (cell for _, cell in cells), strict=True)))
    run.update(plan=[PlanRow(job=job.number, overrides=job.overrides, **asdict(cell)) for job, cell in cells])
    if len(cells) == 1 and cells[0][1].fits is False:
        cfg = cells[0][0].settings()
        store, machine = Store(cfg.store), instance.find(cfg.instance, elsewhere=True)
        base = models.resolve(cfg.model, store, cfg.seed)
        data = dataset.make(store, cfg.dataset, cfg.seed)
        tokens = tokenize.make(store, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
        log.warning(
            "%s",
            advised(
                StageError("plan: this does not fit"),
                lambda: plan.advice(cfg, base, tokens, machine),
                otherwise=plan.changes(cfg, machine),
            ),
        )


def compare_files(run: Run, cfg: Config) -> Path:
    """``mode=compare``: compare two files of predictions, of any origin. Returns the page."""
    first, second = map(Path, cfg.eval.predictions)
    baseline, finetuned = load_pair(first, second, cfg.eval)
    runs = {"baseline": [baseline], "finetuned": [finetuned]}
    names = {"baseline": "the first file", "finetuned": "the second file"}
    evaluation = decision.decide(runs, names, cfg.eval, cfg.seed, run.folder, both_mute=False)
    run.update(evaluation=evaluation, sources={"baseline": str(first), "finetuned": str(second)})
    terminal.evaluation(evaluation)
    return run.folder / "report.html"


def render_again(folder: Path, to: Path | None = None) -> None:
    """``mode=report``: write table, figure and page again from a run's files, into its folder or into another.

    Raises:
        ConfigError: The files are not those of a run.
    """
    run = Run.read(folder)
    try:
        _render(run, to or folder)
    except (AttributeError, LookupError, TypeError, ValueError, StageError) as error:
        raise ConfigError(
            f"{folder}: its files are not those of a run: {type(error).__name__}: {error}; run its command again"
        ) from error
    log.info("%s: %s", "done" if to is None else "would write", folder / "report.html")


def _render(run: Run, to: Path) -> None:
    from sftlab.runtime.job import jobs

    record = run.record
    if record.selection is not None:
        figures.loss_curve(to / "loss.png", record.experiment, record.selection, jobs(run.folder))
    if record.evaluation is not None:
        terminal.evaluation(record.evaluation)
    if record.evaluations:
        terminal.evaluations(record.evaluations)
    page.write(run, to)


def dry_run(cfg: Config, folder: Path, scratch: Path) -> None:
    """``dry_run=true``: check what the run would check, and report what it would do. Only ``scratch`` is written.

    Raises:
        ConfigError: what the run itself would refuse; of a model that is not on this machine only its name is checked.
    """
    if cfg.mode == "clean":
        clean(Path(cfg.store), Path(cfg.clean.outputs), delete=cfg.clean.delete, dry_run=True)
    elif cfg.mode == "report":
        render_again(folder, scratch)
    elif cfg.mode == "compare":
        first, second = map(Path, cfg.eval.predictions)
        rows, _ = load_pair(first, second, cfg.eval)
        log.info("compare: %d rows that %s and %s have in common", len(rows), first, second)
        _tell_power(cfg, [row.group for row in rows])
    else:
        store = Store(cfg.store)
        work = {"evaluate": _dry_evaluation, "plan": _dry_tokens, "preview": _dry_tokens}.get(cfg.mode, _dry_training)
        work(cfg, store, ScratchStore(scratch, store))


def _dry_tokens(cfg: Config, store: Store, scratch: Store) -> None:
    """What ``mode=plan`` and ``mode=preview`` would do."""
    if cfg.mode == "plan":
        machine = instance.find(cfg.instance, elsewhere=not cfg.plan.probe)
        if cfg.plan.probe:
            preflight.check(machine, cfg)
        log.info("machine: %s, %d process(es)", machine.device, machine.num_processes)
    data = _dry_dataset(cfg, store, scratch)
    base = _dry_model("model", cfg.model, store, cfg.seed)
    if cfg.mode == "preview":
        log.info("preview   will be written: preview.html")
        return
    if base is not None:
        _tell("tokens", store.has("tokens", _tokens(cfg, data, base)))
        tokenize.make(scratch, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
    log.info("plan      memory and time of a step will be %s", "measured" if cfg.plan.probe else "estimated")


def _dry_training(cfg: Config, store: Store, scratch: Store) -> None:
    """What ``mode=all`` and ``mode=train`` would do, with the memory and time of training where the model is here."""
    machine = instance.find(cfg.instance)
    preflight.check(machine, cfg)
    batch = machine.effective_batch(cfg.train)
    log.info("machine: %s, %d process(es), effective batch %d", machine.device, machine.world_size, batch)
    data = _dry_dataset(cfg, store, scratch)
    test = contenders.read_test(cfg, scratch, data)
    gate(cfg, scratch, data, test.examples, test.key)
    base = _dry_model("model", cfg.model, store, cfg.seed)
    trained = False
    if base is None:
        _tell("tokens", False)
        _tell("train", False)
        log.info("memory and time: mode=plan estimates them, and downloads the model for it")
    else:
        cfg, _ = with_precision(cfg, base, scratch, machine)
        if cfg.mode == "all":
            evaluate.check_engine(base, cfg.eval)
            contenders.prompts(cfg, base, test)
        inputs = _tokens(cfg, data, base)
        _tell("tokens", store.has("tokens", inputs))
        token_key = store.path("tokens", inputs).name
        trained = store.has("train", train.inputs(token_key, base, cfg.peft, cfg.train, machine, cfg.seed))
        _tell("train", trained)
        tokens = tokenize.make(scratch, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
        train.check_schedule(tokens, cfg.train, machine)
        cfg, _ = plan.with_checkpointing(cfg, base, tokens, machine, scratch)
        plan.table([(cfg.name, plan.cell(cfg, base, tokens, machine))])
    if cfg.mode == "all":
        log.info("select, merge, evaluate, report: %s", "from the cached training" if trained else "will run")
        _tell_power(cfg, [row.group for row in test.examples])


def _dry_evaluation(cfg: Config, store: Store, scratch: Store) -> None:
    """What ``mode=evaluate`` would do: which answers are in the store already."""
    machine = instance.find(cfg.instance)
    preflight.check(machine, cfg)
    data = _dry_dataset(cfg, store, scratch) if cfg.eval.dataset is None else None
    test = contenders.read_test(cfg, scratch, data)
    log.info("test set: %d rows; engine: %s on %s", len(test.examples), cfg.eval.engine, machine.device)
    for name, model in {"baseline": cfg.model, "finetuned": evaluated(cfg)}.items():
        base = _dry_model(name, model, store, cfg.seed)
        if base is None:
            continue
        cfg, _ = with_precision(cfg, base, scratch, machine)  # by the first of the two, as in the run
        if name == "baseline" and not cfg.eval.baseline:
            continue
        if name == "finetuned":
            evaluate.check_engine(base, cfg.eval)
        there = evaluate.cached(
            store, Contender.of(base).model, contenders.prompts(cfg, base, test), cfg.eval, machine, cfg.seed
        )
        _tell("answers", there)
    _tell_power(cfg, [row.group for row in test.examples])


def _dry_dataset(cfg: Config, store: Store, scratch: Store) -> dataset.Dataset:
    _tell("dataset", store.has("dataset", dataset.inputs(cfg.dataset, cfg.seed)))
    data = dataset.make(scratch, cfg.dataset, cfg.seed)
    if data.stage.cached:  # making it logs the same
        log.info("dataset: %s", ", ".join(f"{len(data.split(name)):,} {name}" for name in dataset.SPLITS))
    return data


def _dry_model(name: str, model: ModelConfig, store: Store, seed: int) -> Base | None:
    base = models.cached(model, store, seed)
    there = "on this machine" if base is not None else "will be downloaded or made"
    log.info("%-9s %s: %s", name, model.name_or_path, there)
    return base


def _tokens(cfg: Config, data: dataset.Dataset, base: Base) -> dict[str, Any]:
    return tokenize.inputs(data.stage.key, base, cfg.train.max_length, cfg.train.allow_truncated_completion)


def _tell(stage: str, cached: bool) -> None:
    log.info("%-8s %s", stage, "cached" if cached else "will run")


def _tell_power(cfg: Config, groups: Sequence[str | None]) -> None:
    for level, message in scorer(cfg.eval).power(groups):
        log.log(level, "%s", message)
