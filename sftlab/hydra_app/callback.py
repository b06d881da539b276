"""Check a run or sweep when Hydra has composed its config, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from sftlab.errors import SECRET_NAME, ConfigError, Problem, shown, unfixable
from sftlab.hydra_app.compose import set_for_jobs, without_hydra
from sftlab.hydra_app.study import Study
from sftlab.runtime.console import drop_repeated_warnings

if TYPE_CHECKING:
    from sftlab.hydra_app.sweep import Sweep
    from sftlab.runtime.modes import Mode

# What Hydra may instantiate from a config: its plugins, their samplers, and handlers of log lines.
TRUSTED = (
    "hydra_plugins.",
    "hydra._internal.core_plugins.",
    "optuna.samplers.",
    "logging.",
    "colorlog.",
)
# Keys whose values name code to call.
CODE = ("_target_", "class", "()", "custom_search_space")
# The launcher of a sweep's dry run, whose jobs start nothing.
IN_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class StudyCallbacks(Callbacks):
    """Hydra's callbacks, with the ``StudyCallback`` of this command first.

    Exceptions in a callback end the command. Hydra itself would log a warning and continue.

    Raises:
        ConfigError: the config names code outside ``TRUSTED``, or holds a secret.
    """

    def __init__(self, study: Study, config: DictConfig) -> None:
        if problem := next(_untrusted(config), None):
            raise ConfigError(problem)
        super().__init__(config)
        self.callbacks.insert(0, StudyCallback(study))

    def _notify(self, function_name: str, reverse: bool = False, **kwargs: Any) -> None:
        for callback in reversed(self.callbacks) if reverse else self.callbacks:
            getattr(callback, function_name)(**kwargs)


class StudyCallback(Callback):
    """Validate a run or sweep and start its record, before Hydra makes the folder."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Validate a single run and write ``run.json``."""
        from sftlab.instance import preflight
        from sftlab.runtime.modes import MODES
        from sftlab.runtime.run import Run, check_folder
        from sftlab.validation.validate import validate

        self.study.has_started = True
        drop_repeated_warnings()
        cfg = validate(without_hydra(config))
        _check_names(config.hydra)
        _expand_home(config.hydra.run)
        mode, folder = MODES[cfg.mode], Path(config.hydra.run.dir)
        preflight.check_mode(cfg)
        if mode.works_on == "hydra.run.dir":
            Run.read(folder)
        if mode.has_record:
            check_folder("hydra.run.dir", folder, Path(cfg.store))
        self.study.config, self.study.mode, self.study.folder = cfg, mode, folder
        if mode.has_record and not cfg.dry_run:
            self.study.start(config, cfg.mode, cfg.seed)
            return
        # Keep Hydra from writing its own files and, unless the mode writes into it, from making the folder.
        with open_dict(config):
            config.hydra.output_subdir = None
            if OmegaConf.select(config, "hydra.job_logging.root.handlers"):
                config.hydra.job_logging.root.handlers = ["console"]
                config.hydra.job_logging.handlers.pop("file", None)
            if cfg.dry_run or not mode.writes:
                config.hydra.run.dir = "."

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a sweep as a whole and write ``run.json``. Each job validates its own config."""
        from sftlab.hydra_app import launchers
        from sftlab.hydra_app.sweep import check_job_folders, check_sweep, examine
        from sftlab.runtime.modes import MODES
        from sftlab.runtime.run import check_folder
        from sftlab.validation.validate import validate

        study = self.study
        study.has_started = study.is_sweep = True
        drop_repeated_warnings()
        sweep = examine(config)
        mode = MODES.get(sweep.first.mode)
        job_folders = check_sweep(sweep, config, mode) if mode else []
        try:
            validate(without_hydra(sweep.first))
        except ConfigError as error:
            if shared := unfixable(error, sweep.varied):
                raise ConfigError(*shared) from error
        if mode is None:
            raise ConfigError(Problem("mode", shown(sweep.first.mode), f"should be one of {', '.join(MODES)}"))
        _check_names(config.hydra)
        _expand_home(config.hydra.sweep)
        folder = Path(config.hydra.sweep.dir)
        check_folder("hydra.sweep.dir", folder, Path(str(sweep.first.store)).expanduser())
        check_job_folders(folder, job_folders)
        launchers.prepare(config, set(sweep.varied), mode)
        study.mode = mode
        study.job_count = None if sweep.jobs is None else len(sweep.jobs)
        study.starter = launchers.starter(config)
        if sweep.first.dry_run:
            study.scratch = TemporaryDirectory(prefix="sftlab-")
            _redirect(config, study.scratch.name)
        study.folder = Path(config.hydra.sweep.dir)
        if study.scratch is None:
            study.start(config, mode.name, int(sweep.first.seed))
            self._start_rounds(sweep, mode)
        # A folder named after a swept key would differ between the jobs.
        set_for_jobs(config, "hydra.sweep.dir", str(study.folder))

    def _start_rounds(self, sweep: Sweep, mode: Mode) -> None:
        """With sweep.prune=halving, launch the jobs once per round, so that they wait for each other.

        Jobs that share steps copy them from jobs that have ended, so a sweep over their length has no rounds.
        """
        from sftlab.hydra_app import launchers
        from sftlab.train import pruning

        rule, run = sweep.first.sweep, self.study.run
        if not mode.trains or rule.prune != "halving" or sweep.jobs is None or run is None:
            return
        if {"train.num_train_epochs", "train.max_steps"}.isdisjoint(sweep.varied):
            store = Path(str(sweep.first.store)).expanduser()
            rungs = pruning.Rule(rule="halving", after=float(rule.prune_after)).rungs
            launchers.in_rounds(partial(pruning.begin_round, store, run.record.id), len(rungs) + 1)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Free the configs of a finished job: Hydra would hold two per job until the sweep ends."""
        job_return.cfg = job_return.hydra_cfg = None


def _redirect(config: DictConfig, folder: str) -> None:
    """Run a sweep's jobs in this process and in a temporary folder: Hydra writes multirun.yaml and job folders."""
    with open_dict(config):
        config.hydra.launcher = {"_target_": IN_PROCESS}
        config.hydra.sweep.dir = folder
        if "storage" in config.hydra.sweeper:
            config.hydra.sweeper.storage = None  # Optuna's database of trials


def _untrusted(config: DictConfig) -> Iterator[Problem]:
    """Yield the problems of Hydra's section: values that name code to call, and secrets in environment variables."""
    todo: list[tuple[str, Any]] = [("hydra", OmegaConf.to_container(config.hydra, resolve=False))]
    while todo:
        key, value = todo.pop()
        name = key.rpartition(".")[2]
        if isinstance(value, dict | list):
            children = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{key}.{child}", inner) for child, inner in children]
        elif name in CODE and value is not None and not str(value).startswith(TRUSTED):
            yield Problem(key, shown(value), "names code, and a config may not choose what is called", "leave it out")
        elif key.startswith("hydra.job.env_set.") and SECRET_NAME.search(name):
            yield Problem(key, None, "would be written to files", "set the variable in the shell instead")


def _check_names(hydra_config: DictConfig) -> None:
    """Refuse a log file or a folder of Hydra's outside the run's folder, or with a name that cannot be written."""
    from sftlab.runtime.run import LONGEST

    name, subdir = str(hydra_config.job.name), hydra_config.output_subdir
    if "/" in name or len(os.fsencode(name)) > LONGEST - len(".log"):
        raise ConfigError(
            Problem("hydra.job.name", shown(name), "names the log file", "set it to a short name without /")
        )
    if subdir is not None and (Path(subdir).is_absolute() or ".." in Path(subdir).parts):
        raise ConfigError(
            Problem("hydra.output_subdir", shown(subdir), "is not below the run's folder", "set it to .hydra or null")
        )


def _expand_home(section: DictConfig) -> None:
    """Expand ~ in the folder of a run or sweep."""
    from pydantic_core import PydanticCustomError

    from sftlab.config import located

    try:
        section.dir = located(str(section.dir))
    except PydanticCustomError as error:
        raise ConfigError(Problem(section._get_full_key("dir"), shown(section.dir), error.message())) from error
