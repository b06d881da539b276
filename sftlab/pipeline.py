"""The experiment, from top to bottom: every job trains, then one decision is made over all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from sftlab.config import Config, DatasetConfig, ModelConfig, NoPeft
from sftlab.dataset import overlap, tokenize
from sftlab.dataset import stage as dataset
from sftlab.errors import ConfigError, OutOfMemoryError, StageError, advised
from sftlab.eval import score
from sftlab.eval import stage as evaluate
from sftlab.eval.predictions import load_pair, unjudgeable
from sftlab.eval.statistics import compare, detectable_mean_difference, holm, minimal_detectable_difference
from sftlab.eval.subgroups import subgroups
from sftlab.instance import machine as instance
from sftlab.instance import precision, preflight
from sftlab.model import base as models
from sftlab.model import merge
from sftlab.model.base import Base
from sftlab.records import Candidate, Example, Prediction, read_jsonl
from sftlab.report import terminal as report
from sftlab.report.card import card, push
from sftlab.report.preview import preview
from sftlab.results import PlanCell
from sftlab.runtime.clean import clean
from sftlab.runtime.job import Job, trained_as
from sftlab.runtime.run import Run
from sftlab.runtime.store import ScratchStore, Stage, Store, key_of, write_json
from sftlab.tracking import wandb as tracking
from sftlab.train import advice, memory, plan, probe, schedule, select, sharing
from sftlab.train import stage as train
from sftlab.train.plan_table import print_table

log = logging.getLogger(__name__)


def run_job(cfg: Config, job: Job, folder: Path) -> None:
    """Dataset → tokens → training: what it found goes into ``job`` and its file."""
    store = Store(cfg.store)
    machine = instance.find(cfg.instance)
    preflight.check(machine, cfg)
    cfg = pinned_data(cfg)
    data = dataset.make(store, cfg.dataset, cfg.seed)
    test = test_data(cfg, store, data)
    job.overlap, checked = gate(cfg, store, data, test)  # before the model is downloaded
    if cfg.select.metric == "exact_match":
        score.check(data.split("validation"), cfg.eval, "validation")
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = with_precision(pinned(cfg, base), base, store, machine)
    job.config = cfg.model_dump()
    job.precision = precision.record(measured, cfg.train, cfg.eval)
    if cfg.mode == "all":
        if warning := score.check_completions(data.split("train"), cfg.eval):
            log.warning(warning)
        evaluate.check_engine(base, cfg.eval)
        test_prompts(cfg, base, test)  # a prompt that leaves no room for an answer is found before training
    tokens = tokenize.make(store, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
    schedule.check_length(tokens.counts, cfg.train, machine)
    cfg, estimate = memory.with_checkpointing(cfg, base, tokens, machine, store)
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
    variables = tracking.environment(cfg.tracking, folder, f"{cfg.name}-{job.number}", _run_id(folder, job))
    tracking.announce(cfg.tracking, folder)
    try:
        trained = train.make(store, tokens, base, cfg.peft, cfg.train, machine, cfg.seed, variables)
    except OutOfMemoryError as error:
        raise advised(
            error, lambda: advice.advice(cfg, base, tokens, machine), otherwise=advice.changes(cfg, machine)
        ) from error
    if trained is None:
        return  # another machine has what was trained
    stages = [data.stage, checked, tokens.stage, trained.stage, *(stage for stage in (measured, estimate) if stage)]
    job.stages = {stage.name: str(stage.path) for stage in stages}
    job.times = {stage.name: round(stage.seconds, 1) for stage in stages}
    job.receipt = trained.receipt.model_dump()
    job.family = sharing.family(train.inputs(tokens.stage.key, base, cfg.peft, cfg.train, machine, cfg.seed), cfg.train)
    job.candidates = trained.candidates(job.number, job.overrides)
    if cfg.select.metric == "exact_match":
        job.comparable = {
            "validation questions": key_of({"rows": [[row.id, row.accepted] for row in data.split("validation")]}),
            **cfg.eval.model_dump(
                include={"engine", "max_tokens", "temperature", "task", "pattern", "reading", "extract", "dtype"}
            ),
        }
    else:
        job.comparable = {
            # Rows, their order, tokenizer, template, truncation and loss mask all show in the token ids and labels.
            "validation tokens": tokens.counts.validation.content,
            "base precision": trained.receipt.base_dtype,
            "quantised layers": trained.receipt.quantized_layers,
            "autocast": trained.receipt.autocast,
        }


def pinned_data(cfg: Config) -> Config:
    """The configuration with the commits of its datasets: a branch or tag of the hub may move during a run."""

    def pin(data: DatasetConfig) -> DatasetConfig:
        return data.model_copy(update={"revision": dataset.revision(data) or data.revision})

    evaluation = cfg.eval.model_copy(update={"dataset": cfg.eval.dataset and pin(cfg.eval.dataset)})
    read = cfg.mode != "evaluate" or cfg.eval.dataset is None
    return cfg.model_copy(update={"dataset": pin(cfg.dataset) if read else cfg.dataset, "eval": evaluation})


def pinned(cfg: Config, base: Base) -> Config:
    """The configuration with the commit of its model, and the time that its chat template is given, too."""
    model = cfg.model.model_copy(
        update={
            "revision": base.revision or cfg.model.revision,
            "template_time": base.template_time or cfg.model.template_time,
        }
    )
    return pinned_data(cfg).model_copy(update={"model": model})


def with_precision(cfg: Config, base: Base, store: Store, machine: instance.Machine) -> tuple[Config, Stage | None]:
    """The configuration with a number format in the place of ``auto``, and the stage with the measurement if any."""
    whole = isinstance(cfg.peft, NoPeft)
    trained, evaluation, stage = precision.chosen(store, base, cfg.train, cfg.eval, machine, whole=whole)
    return cfg.model_copy(update={"train": trained, "eval": evaluation}), stage


def revisions(cfg: Config) -> dict[str, str]:
    """The commits of a pinned configuration, by the keys with which the same command gets the same bytes again."""
    test = cfg.eval.dataset
    found = {
        "model.revision": cfg.model.revision,
        "dataset.revision": cfg.dataset.revision,
        "eval.dataset.revision": test and test.revision,
    }
    return {key: commit for key, commit in found.items() if commit}


def finish(run: Run, jobs: Sequence[Job], *, sweep: bool) -> None:
    """What a run does when its jobs are done, of which at least one succeeded: once, from their files only."""
    if run.values["mode"] == "plan":
        tell_plan(run, jobs)
    elif run.values["mode"] == "evaluate":
        tell_evaluations(run, jobs) if sweep else tell_evaluation(run, jobs[0])
    elif (cfg := next(job for job in jobs if job.status == "success").settings()).instance.node_rank > 0:
        rank, nodes = cfg.instance.node_rank, cfg.instance.nnodes
        log.info("machine %d of %d: trained; machine 0 has the checkpoints", rank, nodes)
    else:
        decide(run, jobs)


def decide(run: Run, jobs: Sequence[Job]) -> None:
    """Select over all jobs, merge, evaluate both models, report: once, after the jobs, from files only.

    Raises:
        StageError: no job has a checkpoint to select from.
    """
    for job in jobs:
        if job.status == "success" and not (job.candidates and {"tokens", "train"} <= job.stages.keys()):
            raise StageError(
                f"job {job.number}: reports success and no checkpoint, as if {job.folder / 'job.json'} had been "
                "changed. Run the same command again; finished stages are reused"
            )
    done = [job for job in jobs if job.status == "success"]
    groups = comparable(done)
    _warn_of_batches(done)
    ranked = max(groups, key=len)  # of equally large ones the first
    candidates = [candidate for job in ranked for candidate in job.candidates]
    how = ranked[0].settings().select
    answers = validation_answers(candidates, ranked) if how.metric == "exact_match" else None
    selection = select.select(candidates, how.tie, run.values["seed"], answers)
    unranked = [candidate for job in done if job not in ranked for candidate in job.candidates]
    winner = next(job for job in done if job.number == selection.chosen.job)
    cfg = winner.settings()
    run.update(
        revisions=revisions(cfg),
        template_time=cfg.model.template_time,
        precision=winner.precision,
        receipt=winner.receipt,
        overlap=winner.overlap,
        stages=winner.stages,
        times=winner.times,
        jobs=[
            {
                "job": job.number,
                "overrides": job.overrides,
                "status": job.status,
                "error": job.error,
                "ranked": job in ranked,
                "trained_as": trained_as(job, done),
            }
            for job in jobs
        ],
        selection={
            **asdict(selection.chosen),
            "metric": how.metric,
            "lowest_eval_loss": min(candidate.eval_loss for candidate in candidates),
            "best": selection.best.checkpoint,
            "ties": [candidate.checkpoint for candidate in selection.ties],
            "candidates": [asdict(candidate) for candidate in [*selection.candidates, *unranked]],
        },
    )
    _link(run.folder / "best", Path(selection.chosen.checkpoint))
    report.ranking(selection, jobs)
    report.sweep_csv(run.folder / "sweep.csv", selection, done)
    report.metrics(run, jobs)
    report.loss_curve(run.folder / "loss.png", run.values, jobs)
    if cfg.mode == "all":
        store = Store(cfg.store)
        machine = instance.find(cfg.instance)
        base = models.resolve(cfg.model, store, cfg.seed)
        checkpoint = Path(selection.chosen.checkpoint)
        merged = merge.make(store, checkpoint, base, Path(winner.stages["tokens"]), machine, cfg.merge)
        _link(run.folder / "merged", merged.stage.path)
        run.update(merge=merged.check, stages={**run.values["stages"], "merged": str(merged.stage.path)})
        data = dataset.make(store, cfg.dataset, cfg.seed)
        finetuned = evaluate.Model(merged.stage.path, merged.stage.key, base.trust_remote_code)
        test = test_data(cfg, store, data)
        evaluation, stages, times = judge(cfg, store, base, finetuned, base, test, run.folder)
        run.update(
            evaluation=evaluation, stages={**run.values["stages"], **stages}, times={**run.values["times"], **times}
        )
    _track(run, cfg, winner)
    publish(run, cfg)
    if len(done) == len(jobs):  # nothing is left that might go on from their checkpoints
        for job in jobs:
            sharing.release(Store(cfg.store), Path(job.stages["train"]))


def validation_answers(candidates: Sequence[Candidate], jobs: Sequence[Job]) -> list[list[bool]]:
    """For each checkpoint, which validation questions it answers rightly, by the same reading as on the test set.

    Each is merged for that, and its merged model deleted again: of a long sweep's they would fill a disk.
    """
    right = []
    for number, candidate in enumerate(candidates, 1):
        job = next(job for job in jobs if job.number == candidate.job)
        cfg = job.settings()
        log.info("select: validation answers of checkpoint %d of %d", number, len(candidates))
        store, machine = Store(cfg.store), instance.find(cfg.instance)
        base = models.resolve(cfg.model, store, cfg.seed)
        data = dataset.make(store, cfg.dataset, cfg.seed)
        settings = cfg.eval.model_copy(update={"forced": False, "max_rows": None})
        examples = data.split("validation")
        prompts = evaluate.prompts(examples, base, f"{data.stage.key}/validation", settings, cfg.seed)
        merged = store.path("merged", merge.inputs(Path(candidate.checkpoint), base))
        model = evaluate.Model(merged, merged.name, base.trust_remote_code)
        made = None
        if not evaluate.cached(store, model, prompts, settings, machine, cfg.seed):
            made = merge.make(
                store, Path(candidate.checkpoint), base, Path(job.stages["tokens"]), machine, cfg.merge
            ).stage
        generated = evaluate.make(store, model, prompts, settings, machine, cfg.seed)
        if made is not None and not made.cached:
            store.remove(made)
        right.append([row.correct for row in score.predictions(generated.rows(), examples, settings)])
    return right


def publish(run: Run, cfg: Config) -> None:
    """The model card beside the merged model, and both to the hub if the config asks for it."""
    if "evaluation" not in run.values:
        return
    text = card(run.values, cfg.model_dump())
    (run.folder / "model_card.md").write_text(text, encoding="utf-8")
    if cfg.hub.push:
        assert cfg.hub.repo_id is not None
        log.info(
            "hub: pushed to %s", push(run.folder / "merged", cfg.hub.repo_id, private=cfg.hub.private, readme=text)
        )


def comparable(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups whose validation losses can be ranked together, with a warning if there are several."""
    groups: list[list[Job]] = []
    for job in jobs:
        same = next((group for group in groups if group[0].comparable == job.comparable), None)
        if same is None:
            groups.append([job])
        else:
            same.append(job)
    for other in groups[1:]:
        first = groups[0][0]
        names = dict.fromkeys([*first.comparable, *other[0].comparable])
        differs = [name for name in names if other[0].comparable.get(name) != first.comparable.get(name)]
        log.warning(
            "select: jobs %s and jobs %s cannot be ranked together: %s differ. Only the largest group is ranked; %s",
            ", ".join(str(job.number) for job in groups[0]),
            ", ".join(str(job.number) for job in other),
            " and ".join(differs),
            "make them equal, or compare the groups' best by mode=evaluate on one test set"
            if first.settings().select.metric == "exact_match"
            else "select.metric=exact_match ranks by answers on validation instead",
        )
    return groups


def _warn_of_batches(jobs: Sequence[Job]) -> None:
    """Say so when the machine, which should change nothing, changed how many rows there are in a step."""
    batches = {job.receipt["effective_batch"] for job in jobs}
    machines = {(job.receipt["device"], job.receipt["num_processes"]) for job in jobs}
    if len(batches) > 1 and len(machines) > 1:
        each = ", ".join(f"job {job.number}: {job.receipt['effective_batch']}" for job in jobs)
        log.warning(
            "select: the jobs ran on different machines with different effective batches (%s), and differ by these "
            "too; set train.global_batch_size to have the same on each",
            each,
        )


def evaluate_job(cfg: Config, job: Job, folder: Path) -> None:
    """``mode=evaluate``: any model against the base, on the test set; the result goes into ``job`` and its page."""
    preflight.check(instance.find(cfg.instance), cfg)
    store = Store(cfg.store)
    assert cfg.eval.name_or_path is not None
    cfg = pinned_data(cfg)
    data = dataset.make(store, cfg.dataset, cfg.seed) if cfg.eval.dataset is None else None
    test = test_data(cfg, store, data)
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = with_precision(pinned(cfg, base), base, store, instance.find(cfg.instance))
    job.config = cfg.model_dump()
    job.precision = precision.record(measured, cfg.train, cfg.eval)
    named = models.resolve(_evaluated(cfg), store, cfg.seed)
    evaluate.check_engine(named, cfg.eval)
    finetuned = evaluate.Model(named.path, named.identity, named.trust_remote_code)
    job.evaluation, job.stages, job.times = judge(cfg, store, base, finetuned, named, test, folder)
    if measured is not None:
        job.stages["precision"] = str(measured.path)
    report.page(Run(folder, {"experiment": cfg.name, "seed": cfg.seed, **_evaluation(job)}))


def _evaluated(cfg: Config) -> ModelConfig:
    """The model that ``mode=evaluate`` compares with the base."""
    return cfg.model.model_copy(update={"name_or_path": cfg.eval.name_or_path, "revision": None})


def _evaluation(job: Job) -> dict[str, Any]:
    return {
        "revisions": revisions(job.settings()),
        "template_time": job.settings().model.template_time,
        "precision": job.precision,
        "evaluation": job.evaluation,
        "stages": job.stages,
        "times": job.times,
    }


def tell_evaluation(run: Run, job: Job) -> None:
    """The evaluation of a single run, in ``run.json``."""
    run.update(**_evaluation(job))


def tell_evaluations(run: Run, jobs: Sequence[Job]) -> None:
    """The evaluations of all jobs, in the terminal and in ``run.json``, with p-values adjusted for their number."""
    rows: list[dict[str, Any]] = []
    for job in jobs:
        row: dict[str, Any] = {"job": job.number, "overrides": job.overrides, "status": job.status, "error": job.error}
        if job.status == "success":
            cfg = job.settings()
            row |= {"model": cfg.eval.name_or_path, "base": cfg.model.name_or_path, **_evaluation(job)}
        rows.append(row)
    compared = [row for row in rows if "comparison" in row.get("evaluation", {})]
    results = [row["evaluation"]["comparison"] for row in compared]
    for row, result, p in zip(compared, results, holm([result["p_value"] for result in results]), strict=True):
        alpha = next(job for job in jobs if job.number == row["job"]).settings().eval.alpha
        row |= {"p_adjusted": p, "verdict": result["verdict"]}
        word, _, reason = str(result["verdict"]).partition(": ")
        if word != "inconclusive" and p >= alpha:
            many = f"among {len(compared)} comparisons p is {p:.2g} by Holm's method"
            row["verdict"] = f"inconclusive: {reason}; {many}"
    run.update(evaluations=rows)
    report.evaluations(rows)


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
        job.stages["precision"] = str(measured.path)
    data = dataset.make(store, cfg.dataset, cfg.seed)
    tokens = tokenize.make(store, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
    cfg, estimate = memory.with_checkpointing(cfg, base, tokens, machine, store)
    job.config = cfg.model_dump()
    if estimate is not None:
        job.stages["memory"] = str(estimate.path)
    measure = partial(probe.measure, cfg, base, tokens, machine) if cfg.plan.probe else None
    log.info("plan: %s, %s, on %s", base.name, cfg.peft.method, machine.name)
    job.plan = plan.cell(cfg, base, tokens, machine, measure).model_dump()


def tell_plan(run: Run, jobs: Sequence[Job]) -> None:
    """The plans of all jobs, in the terminal and in ``run.json``."""
    cells = [(job, PlanCell.model_validate(job.plan)) for job in jobs if job.plan is not None]
    shared = set.intersection(*(set(job.overrides) for job, _ in cells)) if len(cells) > 1 else set()
    # Of many cells only what tells them apart.
    names = [" ".join([str(job.number), *(word for word in job.overrides if word not in shared)]) for job, _ in cells]
    print_table(list(zip(names, (cell for _, cell in cells), strict=True)))
    values = [{"job": job.number, "overrides": job.overrides, **cell.model_dump()} for job, cell in cells]
    run.update(plan=values)
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
                lambda: advice.advice(cfg, base, tokens, machine),
                otherwise=advice.changes(cfg, machine),
            ),
        )


def compare_files(run: Run, cfg: Config) -> Path:
    """``mode=compare``: the verdict for two prediction files, whoever made them. Returns the page."""
    first, second = map(Path, cfg.eval.predictions)
    pair = [score.scored(rows, cfg.eval) for rows in load_pair(first, second, cfg.eval)]
    names = ("baseline", "finetuned")
    rows = dict(zip(names, pair, strict=True))
    result: dict[str, Any] = {}
    for name in names:
        result[name] = evaluation_of(rows[name], run.folder, name, cfg)
    result["comparison"] = comparison(rows["baseline"], rows["finetuned"], cfg)
    if cfg.eval.group_by is not None:
        result["subgroups"] = subgroups(rows, cfg.eval, cfg.seed)
    named = {"the first file": pair[0], "the second file": pair[1]}
    if reason := unjudgeable(named):
        result["comparison"]["verdict"] = f"inconclusive: {reason}"
    result["comparison"]["verdict"] += score.mostly_truncated(named)
    run.update(evaluation=result, sources=dict(zip(names, map(str, (first, second)), strict=True)))
    report.table(result)
    return run.folder / "report.html"


def evaluation_of(rows: list[Prediction], folder: Path, name: str, cfg: Config) -> dict[str, Any]:
    """Keep a model's predictions in the run's folder, and sum them up."""
    (folder / "predictions").mkdir(exist_ok=True)
    Prediction.write(folder / "predictions" / f"{name}.jsonl", rows)
    return {
        **score.summary(rows, cfg.eval, cfg.seed),
        "readings": score.readings_table(rows),
        "letters": score.letters(rows),
    }


def render_again(folder: Path, to: Path | None = None) -> None:
    """``mode=report``: table, figure and page anew from a run's files, into its folder or into another."""
    run = Run.read(folder)
    try:
        _render(run, to or folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}: its files are not as a run writes them: {type(error).__name__}: {error}; run its command again"
        ) from error
    log.info("%s: %s", "done" if to is None else "would write", folder / "report.html")


def _render(run: Run, to: Path) -> None:
    from sftlab.runtime.job import jobs

    if "selection" in run.values:
        report.loss_curve(to / "loss.png", run.values, jobs(run.folder))
    if "evaluation" in run.values:
        report.table(run.values["evaluation"])
    if "evaluations" in run.values:
        report.evaluations(run.values["evaluations"])
    report.page(run, to)


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
    test = test_data(cfg, scratch, data)
    gate(cfg, scratch, data, test)
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
            test_prompts(cfg, base, test)
        inputs = _tokens(cfg, data, base)
        _tell("tokens", store.has("tokens", inputs))
        token_key = store.path("tokens", inputs).name
        trained = store.has("train", train.inputs(token_key, base, cfg.peft, cfg.train, machine, cfg.seed))
        _tell("train", trained)
        tokens = tokenize.make(scratch, data, base, cfg.train.max_length, cfg.train.allow_truncated_completion)
        schedule.check_length(tokens.counts, cfg.train, machine)
        cfg, _ = memory.with_checkpointing(cfg, base, tokens, machine, scratch)
        print_table([(cfg.name, plan.cell(cfg, base, tokens, machine))])
    if cfg.mode == "all":
        log.info("select, merge, evaluate, report: %s", "from the cached training" if trained else "will run")
        _tell_power(cfg, [row.group for row in test[0]])


def _dry_evaluation(cfg: Config, store: Store, scratch: Store) -> None:
    """What ``mode=evaluate`` would do: which answers are in the store already."""
    machine = instance.find(cfg.instance)
    preflight.check(machine, cfg)
    data = _dry_dataset(cfg, store, scratch) if cfg.eval.dataset is None else None
    test = test_data(cfg, scratch, data)
    log.info("test set: %d rows; engine: %s on %s", len(test[0]), cfg.eval.engine, machine.device)
    for name, model in {"baseline": cfg.model, "finetuned": _evaluated(cfg)}.items():
        base = _dry_model(name, model, store, cfg.seed)
        if base is None:
            continue
        cfg, _ = with_precision(cfg, base, scratch, machine)  # by the first of the two, as in the run
        if name == "baseline" and not cfg.eval.baseline:
            continue
        if name == "finetuned":
            evaluate.check_engine(base, cfg.eval)
        contender = evaluate.Model(base.path, base.identity, base.trust_remote_code)
        there = evaluate.cached(store, contender, test_prompts(cfg, base, test), cfg.eval, machine, cfg.seed)
        _tell("answers", there)
    _tell_power(cfg, [row.group for row in test[0]])


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


def _tokens(cfg: Config, data: dataset.Dataset, base: Base) -> Mapping[str, Any]:
    return tokenize.inputs(data.stage.key, base, cfg.train.max_length, cfg.train.allow_truncated_completion)


def _tell(stage: str, cached: bool) -> None:
    log.info("%-8s %s", stage, "cached" if cached else "will run")


def _tell_power(cfg: Config, groups: Sequence[str | None]) -> None:
    """How small a difference the test set can show. Rows of one group are gained and lost together."""
    n = len({group or number for number, group in enumerate(groups)})
    if cfg.eval.task == "rouge":
        visible = detectable_mean_difference(0.1, n, alpha=cfg.eval.alpha)
        log.info(
            "test set: %d texts can show %.1f points of %s or more if the models' scores differ from text to text by a "
            "standard deviation of 10 points (80 %% power; the report says it for the spread that was found, and "
            "eval.hoped_difference is for accuracies)",
            n,
            100 * visible,
            score.METRICS[cfg.eval.rouge],
        )
        return
    visible = minimal_detectable_difference(n, alpha=cfg.eval.alpha)
    shown = f"{100 * visible:.1f} points or more" if isfinite(visible) else "nothing, whatever the difference"
    log.info(
        "test set: %d %s can show %s (80 %% power, if a fifth of the answers change, or more where the "
        "difference needs more)",
        n,
        "questions" if n == len(groups) else "groups of questions, each counted once,",
        shown,
    )
    if visible > cfg.eval.hoped_difference:
        log.warning(
            "the study hopes for %.1f points (eval.hoped_difference): this test set is too small to show them",
            100 * cfg.eval.hoped_difference,
        )


def judge(
    cfg: Config,
    store: Store,
    base: Base,
    finetuned: evaluate.Model,
    tokenizer_of: Base,
    test: tuple[list[Example], str],
    folder: Path,
) -> tuple[dict[str, Any], dict[str, str], dict[str, float]]:
    """Generate with both models, read the answers, compare: the only place that reads the test set.

    Predictions go into ``folder``. Returns the evaluation, and the folder and seconds of each model's stage.
    """
    examples, _ = test
    machine = instance.find(cfg.instance)
    result: dict[str, Any] = {}
    rows: dict[str, list[Prediction]] = {}
    plain = evaluate.Model(base.path, base.identity, base.trust_remote_code)
    contenders = {"baseline": (plain, base)} if cfg.eval.baseline else {}
    contenders["finetuned"] = (finetuned, tokenizer_of)
    stages: dict[str, str] = {}
    times: dict[str, float] = {}
    for name, (model, source) in contenders.items():
        log.info("evaluate: %s model, %d questions, %s", name, len(examples), cfg.eval.engine)
        prompts = test_prompts(cfg, source, test)
        generated = evaluate.make(store, model, prompts, cfg.eval, machine, cfg.seed)
        stages[name], times[name] = str(generated.stage.path), round(generated.stage.seconds, 1)
        repeats = [
            score.scored(score.predictions(generated.rows(number), examples, cfg.eval), cfg.eval)
            for number in range(cfg.eval.repeats)
        ]
        rows[name] = repeats[0]
        result[name] = evaluation_of(rows[name], folder, name, cfg)
        if len(repeats) > 1:
            result[name]["repeats"] = score.repeats(repeats)
    if cfg.eval.baseline:
        result["comparison"] = comparison(rows["baseline"], rows["finetuned"], cfg, result)
        # A base model that never answers in the form asked for is a finding; two such models show nothing.
        named = {"the base model": rows["baseline"], "the fine-tuned model": rows["finetuned"]}
        if reason := unjudgeable(named, every=True):
            result["comparison"]["verdict"] = f"inconclusive: {reason}"
        result["comparison"]["verdict"] += score.mostly_truncated(named)
    if cfg.eval.group_by is not None:
        result["subgroups"] = subgroups(rows, cfg.eval, cfg.seed)
    report.table(result)
    return result, stages, times


def comparison(
    baseline: list[Prediction], finetuned: list[Prediction], cfg: Config, evaluation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The verdict, by eval.reading and by answers where every question has one (forced); or by scores.

    A verdict that would be another one by another reading names all of them.

    Where ``evaluation`` tells how much each model's repeats differ, nothing smaller is called a difference.
    """
    repeats = [values["repeats"] for values in (evaluation or {}).values() if "repeats" in values]
    noise = max((found["noise"] for found in repeats), default=None)
    if cfg.eval.task == "rouge":
        return score.comparison(baseline, finetuned, cfg.eval, cfg.seed, noise)
    groups = [row.group for row in baseline]
    settings: dict[str, Any] = {"groups": groups, "alpha": cfg.eval.alpha, "seed": cfg.seed}
    found = compare([row.correct for row in baseline], [row.correct for row in finetuned], **settings, noise=noise)
    result = asdict(found)
    result["ci95"] = list(result.pop("interval"))
    if cfg.eval.task == "choice":
        result["verdict"] += score.disagreement(score.by_reading(baseline, finetuned, **settings, noise=noise))
    visible = minimal_detectable_difference(found.n, alpha=cfg.eval.alpha)
    result["smallest_visible_difference"] = visible if isfinite(visible) else None
    if cfg.eval.task == "choice" and cfg.eval.forced:
        right = [[row.readings.get("forced") in row.accepted for row in rows] for rows in (baseline, finetuned)]
        noise = max((found["forced_noise"] for found in repeats), default=None)
        forced = asdict(compare(right[0], right[1], **settings, noise=noise))
        forced["ci95"] = list(forced.pop("interval"))
        result["forced"] = forced
    return result


def gate(
    cfg: Config, store: Store, data: dataset.Dataset, test: tuple[list[Example], str]
) -> tuple[dict[str, Any], Stage]:
    """Look for questions that an earlier split already holds, and stop before training where there are any.

    Returns the shares of overlap and the worst pairs, for the record, and the stage that has them: the
    jobs of a sweep share it.

    Raises:
        ConfigError: exact duplicates or too large overlaps, with the worst pairs.
    """
    examples, test_key = test

    def build(folder: Path) -> None:
        splits = {"train": data.split("train"), "validation": data.split("validation"), "test": examples}
        write_json(folder / "overlap.json", asdict(overlap.check(splits, max_overlap=cfg.dataset.max_overlap)))

    inputs = {"version": 1, "dataset": data.stage.key, "test": [test_key, cfg.eval.max_rows, cfg.seed]}
    stage = store.stage("overlap", {**inputs, "max_overlap": cfg.dataset.max_overlap}, build)
    found = overlap.Report.read(stage.path / "overlap.json")
    for pair in found.pairs:
        log.info(
            "overlap: %s in %s: %d exact, %d over %.0f %%, largest share %.0f %%, median %.0f %%",
            pair.left_split,
            pair.right_split,
            pair.exact,
            pair.near,
            100 * found.max_overlap,
            100 * pair.max,
            100 * pair.p50,
        )
    if found.leaking and not cfg.dataset.allow_overlap:
        raise ConfigError(
            f"dataset.max_overlap={cfg.dataset.max_overlap}: {found.leaking} questions of one split are in another; "
            "drop them, raise the limit, or go on with dataset.allow_overlap=true (the report will say so)\n"
            + overlap.describe(found)
        )
    return {**asdict(found), "leaking": found.leaking, "allow_overlap": cfg.dataset.allow_overlap}, stage


def test_data(cfg: Config, store: Store, data: dataset.Dataset | None) -> tuple[list[Example], str]:
    """The test set and the key of the dataset that it comes from: the dataset's own, or a mounted one."""
    mounted = cfg.eval.dataset is not None
    if cfg.eval.dataset is not None:
        data = dataset.make(store, cfg.eval.dataset, cfg.seed, mounted=True)
    assert data is not None
    rows = dataset.test_rows(data, cfg.eval.max_rows, cfg.seed)
    if cfg.mode != "train":
        score.check(rows, cfg.eval)
        if warning := score.check_completions(rows, cfg.eval, "test"):
            log.warning(warning)
        if cfg.eval.group_by is not None:
            source = cfg.eval.dataset or cfg.dataset
            values = dataset.subgroups(source, cfg.seed, cfg.eval.group_by, mounted=mounted)
            rows = [replace(row, subgroup=values[row.id]) for row in rows]
    return rows, data.stage.key


def test_prompts(cfg: Config, base: Base, test: tuple[list[Example], str]) -> evaluate.Prompts:
    """The test set as one model's tokenizer writes it."""
    examples, key = test
    return evaluate.prompts(examples, base, key, cfg.eval, cfg.seed)


def _run_id(folder: Path, job: Job) -> str:
    return key_of({"folder": str(folder.resolve()), "job": job.number})


def _track(run: Run, cfg: Config, winner: Job) -> None:
    folder = winner.folder
    variables = tracking.environment(cfg.tracking, folder, f"{cfg.name}-{winner.number}", _run_id(folder, winner))
    evaluation = run.values.get("evaluation", {})
    trained_now = winner.times["train"] > 0
    history = [] if trained_now else list(read_jsonl(Path(winner.stages["train"]) / "metrics.jsonl"))
    metric = score.metric(evaluation)
    summary = {
        f"{name}_{metric}": evaluation[name][metric] for name in ("baseline", "finetuned") if name in evaluation
    } | {"best_eval_loss": run.values["selection"]["eval_loss"], "best_epoch": run.values["selection"]["epoch"]}
    tracking.log_result(variables, summary, report.table_rows(evaluation), run.folder / "loss.png", history)


def _link(link: Path, target: Path) -> None:
    """A relative symbolic link, replaced in one step."""
    import os

    if not target.exists():
        raise StageError(f"{target}: is gone; run the command again")
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    partial.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    partial.replace(link)
