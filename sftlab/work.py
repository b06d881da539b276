"""The functions that carry out each mode: one entry per row of ``runtime.modes.MODES``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sftlab import dry_run, pipeline
from sftlab.config import Config
from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.dataset.pinning import pinned_data
from sftlab.errors import ConfigError, Problem, StageError, advised, shown
from sftlab.eval import stage as evaluate
from sftlab.export import formats
from sftlab.export import stage as export
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model import finished
from sftlab.report import figures, index, page, runs, terminal
from sftlab.report.preview import preview
from sftlab.report.publish import write_card
from sftlab.results import PlanRow
from sftlab.runtime import ledger, listing
from sftlab.runtime.clean import clean
from sftlab.runtime.job import Job, jobs
from sftlab.runtime.run import Run, not_writable
from sftlab.runtime.store import Store
from sftlab.serve import chat, server
from sftlab.serve import page as chat_page
from sftlab.serve.client import streaming
from sftlab.train import advice, memory, plan, probe
from sftlab.train.plan_table import print_table

log = logging.getLogger(__name__)

DryRun = Callable[[Config, Path, Path], None]  # config, run's folder, temporary folder


@dataclass(frozen=True)
class InJobs:
    """A mode that runs as jobs, which a launcher may start on other machines."""

    job: Callable[[Config, Job, Path], None]
    """The work of one job. Fills in the job's record; the path is the job's folder."""
    finish: Callable[[Run, Sequence[Job], bool], None]
    """What follows when all jobs have ended and at least one succeeded; the flag says whether this is a sweep."""
    dry_run: DryRun


@dataclass(frozen=True)
class WithoutJobs:
    """A mode that runs once, in the process of the command."""

    run: Callable[[Config, Path, Run | None], Path | None]
    """The work. Takes the run's folder, and the record of modes that have one; returns the page it leads to."""
    dry_run: DryRun


# ------------------------------------------------------------------- mode=plan


def plan_job(cfg: Config, job: Job, folder: Path) -> None:
    """Estimate or measure the memory and time of one configuration on its machine. Nothing is trained."""
    store, cfg = Store(cfg.store), pinned_data(cfg)
    machine = instance.find(cfg.instance, elsewhere=not cfg.plan.probe)
    base = models.resolve(cfg.model, store, cfg.seed)
    cfg, measured = pipeline.with_precision(cfg, base, store, machine)
    job.config = cfg.model_dump()
    if measured is not None:
        job.stages = {**job.stages, "precision": str(measured.path)}
    data = dataset.make(store, cfg.dataset)
    tokens = tokenize.make(store, data, base, cfg)
    cfg, estimate = memory.with_checkpointing(cfg, base, tokens, machine, store)
    job.config = cfg.model_dump()
    if estimate is not None:
        job.stages = {**job.stages, "memory": str(estimate.path)}
    measure = partial(probe.measure, cfg, base, tokens, machine) if cfg.plan.probe else None
    log.info("plan: %s, %s, on %s", base.name, cfg.peft.method, machine.name)
    job.plan = plan.cell(cfg, base, tokens, machine, measure)


def finish_plan(run: Run, records: Sequence[Job], is_sweep: bool) -> None:
    """Print and record the plans of all jobs. If there is one that does not fit, list what needs less memory."""
    cells = [(job, job.plan) for job in records if job.plan is not None]
    shared = set.intersection(*(set(job.overrides) for job, _ in cells)) if len(cells) > 1 else set()
    names = [" ".join([str(job.number), *(word for word in job.overrides if word not in shared)]) for job, _ in cells]
    print_table(list(zip(names, (cell for _, cell in cells), strict=True)))
    run.update(
        plan=[
            PlanRow(job=job.number, overrides=job.overrides, **cell.model_dump(exclude={"fits"})) for job, cell in cells
        ]
    )
    if len(cells) == 1 and cells[0][1].fits is False:
        cfg = cells[0][0].settings()
        store, machine = Store(cfg.store), instance.find(cfg.instance, elsewhere=True)
        base = models.resolve(cfg.model, store, cfg.seed)
        data = dataset.make(store, cfg.dataset)
        tokens = tokenize.make(store, data, base, cfg)
        log.warning(
            "%s",
            advised(
                StageError("plan: this does not fit"),
                lambda: advice.advice(cfg, base, tokens, machine),
                otherwise=advice.changes(cfg, machine),
            ),
        )


# ------------------------------------------------------------------- modes without jobs


def show_rows(cfg: Config, folder: Path, run: Run | None) -> Path:
    """``mode=preview``: show the rows that would be trained on, token by token. Returns the page."""
    store, cfg = Store(cfg.store), pinned_data(cfg)
    base = models.resolve(cfg.model, store, cfg.seed)
    data = dataset.make(store, cfg.dataset)
    data.announce()
    preview(
        base.tokenizer(),
        data.for_training(),
        max_length=cfg.train.max_length,
        train_on=cfg.dataset.supervised(),
        folder=folder,
        seed=cfg.seed,
        template_time=base.template_time,
    )
    return folder / "preview.html"


def compare_files(cfg: Config, folder: Path, run: Run | None) -> Path:
    """``mode=compare``: compare two files of predictions. Returns the page."""
    assert run is not None
    return pipeline.compare_files(run, cfg)


def render_again(folder: Path, destination: Path) -> Path:
    """``mode=report``: write table, figure and page of a finished run, from its files. Returns the page.

    Raises:
        ConfigError: the folder has no ``run.json``, or its files were changed.
    """
    run = Run.read(folder)
    record = run.record
    try:
        if record.selection is not None:
            figures.loss_curve(destination / "loss.png", record.experiment, record.selection, jobs(folder))
        if record.evaluation is not None:
            terminal.evaluation(record.evaluation, record.mode, record.seed, record.replication)
        if record.evaluations:
            terminal.evaluations(record.evaluations)
        page.write(run, destination)
    except (AttributeError, LookupError, TypeError, ValueError, StageError) as error:
        raise ConfigError(
            Problem(
                str(folder),
                None,
                f"its files are not those of a run: {type(error).__name__}: {error}",
                "run its command again",
            )
        ) from error
    return destination / "report.html"


def _render_dry(cfg: Config, folder: Path, scratch: Path) -> None:
    render_again(folder, scratch)
    log.info("would write: %s", folder / "report.html")


def clean_store(cfg: Config, *, dry_run: bool) -> None:
    """``mode=clean``: list the stages that no run refers to, and delete them with ``clean.delete=true``."""
    clean(Path(cfg.store), Path(cfg.clean.outputs), delete=cfg.clean.delete, dry_run=dry_run)


def list_runs(cfg: Config, *, dry_run: bool) -> Path | None:
    """``mode=runs``: print the runs that match the keys of ``runs``, and write the page of all. Returns the page.

    Raises:
        ConfigError: there is no folder of runs, or the page cannot be written into it.
    """
    outputs, store = Path(cfg.runs.outputs), Path(cfg.store)
    if not outputs.is_dir():
        message, remedy = f"no such folder in {Path.cwd()}", "set it to the folder of your runs"
        raise ConfigError(Problem("runs.outputs", shown(str(outputs)), message, remedy))
    if not dry_run and (reason := not_writable(outputs)):
        remedy = "set dry_run=true to list the runs without writing their page"
        raise ConfigError(Problem("runs.outputs", shown(str(outputs)), reason, remedy))
    every = runs.rows(listing.runs(outputs, store), outputs)
    runs.show(runs.selected(every, cfg.runs), cfg.runs.limit, len(every))
    if dry_run:
        log.info("would write: %s", outputs / index.PAGE)
        return None
    return index.write(every, ledger.entries(store), outputs)


def serve_run(cfg: Config, *, dry_run: bool) -> None:
    """``mode=serve``: serve the base model and the fine-tuned model of a run until Ctrl-C.

    Raises:
        ConfigError: the run or its merged model is missing, or a port is in use.
    """
    run = finished.find(cfg)
    evaluate.check_engine(run.base, cfg.eval)
    planned = server.servers(run, cfg.serve.port, adapter=cfg.serve.adapter)
    server.check_ports(planned)
    places = ", ".join(f"{' and '.join(one.names)} at {one.url}" for one in planned)
    if dry_run:
        log.info("would serve: %s (%s)", places, run.folder)
        return
    server.run(run, planned, cfg, lambda: log.info("serve: ready: %s; Ctrl-C stops it", places))


def chat_with_run(cfg: Config, *, dry_run: bool) -> None:
    """``mode=chat``: ask the base model and the fine-tuned model of a run in the terminal, until the input ends.

    Raises:
        ConfigError: the run does not exist, or has no merged model.
    """
    from rich.console import Console

    run = finished.find(cfg)
    evaluate.check_engine(run.base, cfg.eval)
    planned = server.servers(run, server.free_port(), adapter=cfg.serve.adapter)
    if dry_run:
        log.info("would start a conversation with: %s", run.folder)
        return
    log.info("chat: starting %s", run.folder)
    with server.background(run, planned, cfg):
        urls = {name: one.url for one in planned for name in one.names}
        chat.converse(chat.typed(), list(urls), streaming(urls, run.generation.max_tokens), Console())


def show_page(cfg: Config, *, dry_run: bool) -> None:
    """``mode=page``: ask the base model and the fine-tuned model of a run in the browser, until Ctrl-C.

    Raises:
        ConfigError: the run or its merged model is missing, or Gradio is not installed.
    """
    run = finished.find(cfg)
    evaluate.check_engine(run.base, cfg.eval)
    chat_page.check(cfg.serve.page_port)
    planned = server.servers(run, server.free_port(), adapter=cfg.serve.adapter)
    address = f"http://127.0.0.1:{cfg.serve.page_port}"
    if dry_run:
        log.info("would show: %s (%s)", address, run.folder)
        return
    log.info("page: starting %s", run.folder)
    with server.background(run, planned, cfg) as ended:
        urls = {name: one.url for one in planned for name in one.names}
        chat_page.show(
            list(urls),
            streaming(urls, run.generation.max_tokens),
            title=f"{run.record.experiment}: {runs.short(run.base.name)}",
            examples=[row.question for row in run.split("test")],
            port=cfg.serve.page_port,
            when_ready=lambda: log.info("page: ready: %s; Ctrl-C stops it", address),
            until=ended,
        )
        raise StageError("page: the server of the models has ended")


def export_run(cfg: Config, *, dry_run: bool) -> None:
    """``mode=export``: write the merged model of a run in another format, and test that it is no worse.

    Raises:
        ConfigError: the run does not exist or has no merged model, or the machine cannot export in this format.
    """
    run = finished.find(cfg)
    if reason := not_writable(run.folder):
        remedy = "make it writable: the exported model and its answers are added to it"
        raise ConfigError(Problem("run", shown(str(run.folder)), reason, remedy))
    if problems := list(formats.problems(cfg.export, instance.find(cfg.instance).device)):
        raise ConfigError(*problems)
    if dry_run:
        export.settings(run, cfg)
        log.info("would export: %s as %s", run.folder, export.label(cfg.export))
        return
    result = export.export(run, cfg)
    recorded = Run.read(run.folder)
    page.write(recorded)
    write_card(recorded, run.job.settings())
    terminal.exported(result, run.folder / "export" / export.label(cfg.export))


def _list_dry(cfg: Config) -> None:
    list_runs(cfg, dry_run=True)


WORK: dict[str, InJobs | WithoutJobs] = {
    "all": InJobs(pipeline.run_job, pipeline.finish_training, dry_run.training),
    "train": InJobs(pipeline.run_job, pipeline.finish_training, dry_run.training),
    "evaluate": InJobs(pipeline.evaluate_job, pipeline.finish_evaluation, dry_run.evaluation),
    "plan": InJobs(plan_job, finish_plan, dry_run.planning),
    "preview": WithoutJobs(show_rows, dry_run.preview),
    "compare": WithoutJobs(compare_files, dry_run.comparison),
    "report": WithoutJobs(lambda cfg, folder, run: render_again(folder, folder), _render_dry),
    "clean": WithoutJobs(
        lambda cfg, folder, run: clean_store(cfg, dry_run=False),
        lambda cfg, folder, scratch: clean_store(cfg, dry_run=True),
    ),
    "runs": WithoutJobs(
        lambda cfg, folder, run: list_runs(cfg, dry_run=False),
        lambda cfg, folder, scratch: _list_dry(cfg),
    ),
    "serve": WithoutJobs(
        lambda cfg, folder, run: serve_run(cfg, dry_run=False),
        lambda cfg, folder, scratch: serve_run(cfg, dry_run=True),
    ),
    "chat": WithoutJobs(
        lambda cfg, folder, run: chat_with_run(cfg, dry_run=False),
        lambda cfg, folder, scratch: chat_with_run(cfg, dry_run=True),
    ),
    "page": WithoutJobs(
        lambda cfg, folder, run: show_page(cfg, dry_run=False),
        lambda cfg, folder, scratch: show_page(cfg, dry_run=True),
    ),
    "export": WithoutJobs(
        lambda cfg, folder, run: export_run(cfg, dry_run=False),
        lambda cfg, folder, scratch: export_run(cfg, dry_run=True),
    ),
}
