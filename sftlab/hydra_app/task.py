"""The task function: Hydra calls it for each job, in the process of the command or in a worker of a launcher."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sftlab.errors import ConfigError, PausedError, Problem, PrunedError, SftlabError, StageError, shown
from sftlab.hydra_app.compose import without_hydra
from sftlab.hydra_app.study import RUN_ID, Study
from sftlab.runtime.console import drop_repeated_warnings

if TYPE_CHECKING:
    from sftlab.runtime.job import Job

log = logging.getLogger(__name__)


def run_task(study: Study, composed: DictConfig) -> float:
    """Run one job and write its ``job.json``.

    Errors of the job are recorded and not raised, because some launchers stop all jobs at an exception.

    Returns:
        The lowest validation loss of the job, for a sweeper that searches; 0 for a dry run, infinity if it failed.
    """
    from sftlab.runtime.job import Job, conflict

    set_environment()
    drop_repeated_warnings()
    if study.mode is not None and study.config is not None and (study.config.dry_run or not study.mode.has_jobs):
        return 0.0  # done by `finish` in the process of the command
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    values = OmegaConf.to_container(without_hydra(composed), resolve=False)
    assert isinstance(values, dict)
    record = Job(
        number=int(hydra_config.job.num) if is_sweep else 0,
        overrides=list(hydra_config.overrides.task),
        config={str(key): value for key, value in values.items()},
        run=hydra_config.job.env_set.get(RUN_ID),
    )
    # The callback checked this for all jobs. Another run may have started since.
    around = Path(hydra_config.sweep.dir).absolute() if is_sweep else folder
    if is_sweep and record.run and (reason := conflict(folder, around, (record.run,))):
        raise ConfigError(
            Problem(
                "hydra.sweep.dir",
                shown(str(hydra_config.sweep.dir)),
                f"job {record.number} would replace a record: {reason}",
                "set it to an empty folder",
            )
        )
    if is_sweep and (ended := _ended(folder, record.run)):  # in an earlier round of sweep.prune
        return _value(ended)
    try:
        _run(study, composed, record, folder)
        record.status = "success"
    except PrunedError as error:
        record.status, record.error = "pruned", str(error)
        log.info("job %d: %s", record.number, error)
    except PausedError as error:  # its status remains "running"
        log.info("job %d: %s", record.number, error)
    except SftlabError as error:
        record.status, record.error, record.exit_code = "failed", str(error), error.exit_code
        log.error("job %d: %s", record.number, error)
    except Exception as error:  # a bug of sftlab or of a library; the other jobs continue
        record.status, record.error, record.exit_code = "failed", f"{type(error).__name__}: {error}", 1
        log.exception("job %d failed with an unexpected error; please report it", record.number)
    record.write(folder)
    return _value(record)


def _ended(folder: Path, run: str | None) -> Job | None:
    """The record of this job if the same run has ended it before."""
    from sftlab.runtime.job import JOB, Job, owner

    if run is None or owner(folder / JOB) != run:
        return None
    record = Job.read(folder / JOB)
    return None if record.status == "running" else record


def _value(record: Job) -> float:
    """The lowest validation loss of a job; infinity without one."""
    if record.status == "success" and record.config["dry_run"]:
        return 0.0
    if record.pruned is not None:
        return record.pruned.eval_loss
    trained = [candidate.eval_loss for candidate in record.candidates if candidate.step]  # step 0 is equal in all jobs
    return min(trained, default=float("inf"))


def _run(study: Study, composed: DictConfig, record: Job, folder: Path) -> None:
    """Validate the job's config and do the work of its mode."""
    from sftlab.hydra_app import launchers
    from sftlab.instance import preflight
    from sftlab.runtime.store import Store
    from sftlab.validation.validate import validate
    from sftlab.work import WORK, InJobs

    hydra_config = HydraConfig.get()
    _enter_folder(hydra_config.runtime.cwd)
    is_checked = study.config is not None  # the callback has checked config and machine of a single run
    cfg = study.config or validate(without_hydra(composed))
    record.config = cfg.model_dump()
    work = WORK[cfg.mode]
    if cfg.dry_run:
        log.info("job %d: %s", record.number, " ".join(record.overrides))
        if not is_checked:
            preflight.check_mode(cfg)
        work.dry_run(cfg, folder, Path(hydra_config.sweep.dir, ".store"))
        return
    assert isinstance(work, InJobs)
    for place in {folder, Path(hydra_config.sweep.dir)} if hydra_config.mode == RunMode.MULTIRUN else {folder}:
        Store(cfg.store).register(place)
    record.write(folder)
    launcher = str(hydra_config.runtime.choices["hydra/launcher"])
    with launchers.devices(launcher, cfg.instance.device, cfg.instance.num_processes):
        if not is_checked:
            preflight.check_mode(cfg)
        work.job(cfg, record, folder)


def set_environment() -> None:
    """Disable telemetry and progress bars, in this process and in workers that do not inherit its environment."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _enter_folder(folder: str) -> None:
    """Change to the folder of the command: relative paths mean the same in every worker of a launcher."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise StageError(
            f"{folder}: cannot be entered on {os.uname().nodename}: {error.strerror}; all machines of a launcher must "
            "share the folder that the command is started in"
        ) from error
