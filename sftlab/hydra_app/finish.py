"""Finish a command after Hydra has run its jobs: collect their records, or run a mode that has no jobs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sftlab.errors import SftlabError
from sftlab.hydra_app.study import Study
from sftlab.runtime.console import drop_repeated_warnings

if TYPE_CHECKING:
    from sftlab.config import Config
    from sftlab.runtime.job import Job

log = logging.getLogger(__name__)


def finish(study: Study) -> int:
    """Do what remains when Hydra returns.

    Returns:
        The exit code: 0 if everything succeeded, 2 if every job was refused as bad input, 1 otherwise. With
        eval.gate=true, that of the decision instead of 0.
    """
    from sftlab.runtime.job import jobs

    assert study.folder is not None
    assert study.mode is not None
    drop_repeated_warnings()
    if study.config is not None and (study.config.dry_run or not study.mode.has_jobs):
        _run_without_jobs(study, study.config)
        return 0 if study.config.dry_run else _gate(study, gated=study.config.eval.gate)
    records = jobs(study.folder)
    reasons = _failures(study, records)
    succeeded = any(job.status == "success" for job in records)
    if study.scratch is not None:  # the dry run of a sweep
        study.scratch.cleanup()
        if reasons:
            _print_errors(study, records)
    else:
        if reasons and not succeeded:
            _print_errors(study, records)
        _finish_run(study, records, reasons)
    if not reasons:
        return _gate(study, gated=bool(records) and records[0].settings().eval.gate)
    return 2 if records and all(job.exit_code == 2 for job in records) else 1


def _gate(study: Study, *, gated: bool) -> int:
    """The exit code of the run's decision if ``gated``, else 0."""
    from sftlab.eval.release import exit_code

    return 0 if not gated or study.run is None else exit_code(study.run.record)


def _run_without_jobs(study: Study, cfg: Config) -> None:
    """Run a mode that has no jobs, or the dry run of a single run."""
    from sftlab.report import page
    from sftlab.runtime.store import Store
    from sftlab.work import WORK, WithoutJobs

    assert study.folder is not None
    assert study.mode is not None
    work = WORK[cfg.mode]
    if cfg.dry_run:
        with TemporaryDirectory(prefix="sftlab-") as scratch:
            work.dry_run(cfg, study.folder, Path(scratch))
        return
    assert isinstance(work, WithoutJobs)
    if study.run is not None:
        Store(cfg.store).register(study.folder)
    leads_to = work.run(cfg, study.folder, study.run)
    if study.run is not None:
        study.run.finish("success")
        if study.mode.has_page:
            page.write(study.run)
    if leads_to is not None:
        log.info("done: %s", leads_to)


def _failures(study: Study, records: Sequence[Job]) -> list[str]:
    """Why jobs failed, in order. Records of jobs that ended without one are marked as failed first."""
    for job in records:
        if job.status == "running":
            job.status, job.exit_code = "failed", 1
            job.error = "ended without a result: it was killed, or its machine is lost; run the same command again"
            job.write(job.folder)
    failed = [job for job in records if job.status not in ("success", "pruned")]
    reasons = [f"job {job.number}: {job.error}" if study.is_sweep else str(job.error) for job in failed]
    if study.launch_error:
        reasons.append(study.launch_error)
    if missing := sorted(set(range(study.job_count or 1)) - {job.number for job in records}):
        reasons.append(f"job {', '.join(map(str, missing))}: left no record; run the same command again")
        print(f"sftlab: {reasons[-1]}", file=sys.stderr)
    return reasons


def _print_errors(study: Study, records: Sequence[Job]) -> None:
    for job in records:
        if job.status not in ("success", "pruned"):
            print(f"sftlab: {f'job {job.number}: ' if study.is_sweep else ''}{job.error}", file=sys.stderr)


def _finish_run(study: Study, records: Sequence[Job], reasons: Sequence[str]) -> None:
    """Do what the mode does after its jobs, close ``run.json`` and write the page."""
    from sftlab.report import page
    from sftlab.work import WORK, InJobs

    run, mode = study.run, study.mode
    assert run is not None
    assert mode is not None
    work = WORK[mode.name]
    assert isinstance(work, InJobs)
    succeeded = any(job.status == "success" for job in records)
    try:
        if succeeded:
            work.finish(run, records, study.is_sweep)
    except Exception as error:
        reason = str(error) if isinstance(error, SftlabError) else f"{type(error).__name__}: {error}"
        study.fail("; ".join([*reasons, reason]))
        raise
    run.finish("failed" if reasons else "success", "; ".join(reasons) or None)
    if not mode.has_page:
        return
    try:
        page.write(run)
    except Exception as error:
        if not reasons:
            raise
        log.warning("report.html was not written: %s", error)  # a missing page must not hide why the run failed
    else:
        if succeeded:
            log.info("done: %s", run.folder / "report.html")
