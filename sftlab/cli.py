"""The command line: Hydra composes, every job runs, then the decision is made; errors become exit codes."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal import hydra as engine
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sftlab.errors import SECRET_NAME, ConfigError, SftlabError, StageError, Terminated, redacted

if TYPE_CHECKING:
    from sftlab.config import Config
    from sftlab.runtime.job import Job
    from sftlab.runtime.modes import Mode
    from sftlab.runtime.run import Run

log = logging.getLogger(__name__)

# Beside the package in a checkout, inside it in a wheel.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if path.is_dir())


@dataclass
class Study:
    """What Hydra was asked to run: told by the callback, which sees it before the first job."""

    asked: bool = False  # whether Hydra has called the callback, and not only printed something
    mode: Mode | None = None
    folder: Path | None = None
    sweep: bool = False
    jobs: int | None = None  # that a sweep has; None where its sweeper decides
    config: Config | None = None  # of a single run
    run: Run | None = None
    tracebacks: bool = False
    held: Any = None
    scratch: TemporaryDirectory[str] | None = None
    plugin: str = ""  # what starts the jobs of a sweep
    lost: str | None = None  # what ended it before the jobs

    def start(self, composed: DictConfig, mode: str, seed: int) -> None:
        """Take the folder, and write ``run.json``: the run has begun."""
        from sftlab.runtime.run import Run, hold

        assert self.folder is not None
        self.held = hold(self.folder)
        self.run = Run.start(self.folder, name=str(composed.name), mode=mode, seed=seed, command=_command())
        _for_jobs(composed, f"hydra.job.env_set.{RUN_ID}", self.run.record.id)

    def fail(self, reason: str) -> None:
        """Write into ``run.json`` that the run did not end well, unless it has a reason already."""
        if self.run is not None and self.run.record.status != "failed":
            with suppress(OSError):  # what cannot be written must not hide the reason
                self.run.finish("failed", redacted(reason))


def _for_jobs(composed: DictConfig, key: str, value: str) -> None:
    """Set a key of Hydra's here and in every job, whose configurations are composed anew from the overrides."""
    OmegaConf.update(composed, key, value, force_add=True)
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    composed.hydra.overrides.hydra.append(f"++{key}='{quoted}'")


def _find_home(place: DictConfig) -> None:
    """Expand ~ in the folder of a run or sweep."""
    from pydantic_core import PydanticCustomError

    from sftlab.config import located

    try:
        place.dir = located(str(place.dir))
    except PydanticCustomError as error:
        _fail(ConfigError(f"{place._get_full_key('dir')}={place.dir!r}: {error.message()}"))


def _check_names(hydra_config: DictConfig) -> None:
    """Refuse a log file or a folder of Hydra's that would be outside the run's folder, or could not be written."""
    from sftlab.runtime.run import LONGEST

    name, subdir = str(hydra_config.job.name), hydra_config.output_subdir
    if "/" in name or len(os.fsencode(name)) > LONGEST - len(".log"):
        raise ConfigError(f"hydra.job.name={name!r}: names the log file; set it to a short name without /")
    if subdir is not None and (Path(subdir).is_absolute() or ".." in Path(subdir).parts):
        raise ConfigError(f"hydra.output_subdir={subdir!r}: is not below the run's folder; set it to .hydra or null")


STUDY = Study()
RUN_ID = "SFTLAB_RUN"  # the variable of a job's environment that names the run it belongs to
KEPT = "what was finished is kept, and the same command goes on from there"
USE = "set HF_TOKEN or WANDB_API_KEY in the environment, or log in, and leave it out here"

# What Hydra may make of a configuration: its plugins, their samplers, handlers of log lines, and our callback.
TRUSTED = (
    "sftlab.cli.StudyCallback",
    "hydra_plugins.",
    "hydra._internal.core_plugins.",
    "optuna.samplers.",
    "logging.",
    "colorlog.",
)
# Keys whose values name what is called.
CODE = ("_target_", "class", "()", "custom_search_space")


class TrustedCallbacks(Callbacks):
    """Hydra's callbacks, made once it is clear that the configuration names no code besides ``TRUSTED``.

    Their exceptions end the program. Hydra itself would log a warning and continue.
    """

    def __init__(self, config: DictConfig | None = None) -> None:
        if config is not None and (reason := next(_distrusted(config), None)):
            raise ConfigError(reason)
        super().__init__(config)

    def _notify(self, function_name: str, reverse: bool = False, **kwargs: Any) -> None:
        for callback in reversed(self.callbacks) if reverse else self.callbacks:
            getattr(callback, function_name)(**kwargs)


class ComposeOnce(ConfigLoaderImpl):
    """Compose a command line once. Hydra itself composes it to find its mode, and again to run it."""

    overrides: Sequence[str] = ()
    composed: DictConfig | Exception | None = None

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose, or return what was composed to find the mode, with the override of the mode that Hydra adds."""
        settings = config_name, overrides, run_mode, from_shell
        if not validate_sweep_overrides:  # to find the mode, with a sweep's tolerance of missing defaults
            self.overrides = tuple(overrides)
            try:
                # Where nothing is missing, a run and a sweep are composed alike.
                self.composed = super().load_configuration(config_name, overrides, RunMode.RUN, from_shell, False)
            except Exception as error:
                self.composed = error
                if "You must specify" in str(error):
                    return super().load_configuration(*settings, False)
                raise
            return self.composed
        first, self.composed = self.composed, None
        added = overrides[len(self.overrides) :]
        again = tuple(overrides) == (*self.overrides, *added) and all(text.startswith("hydra.mode=") for text in added)
        if first is None or not again or (isinstance(first, Exception) and run_mode == RunMode.MULTIRUN):
            return super().load_configuration(*settings)
        self.validate_sweep_overrides_legal(OverridesParser.create().parse_overrides(overrides), run_mode, from_shell)
        if isinstance(first, Exception):
            raise first
        for text in added:
            first.hydra.mode = RunMode[text.partition("=")[2]]
            first.hydra.overrides.hydra.append(text)
        return first


class Once(logging.Filter):
    """Lets a warning through once: what holds for all jobs of a sweep need not be repeated for each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record: every record that is not a warning, and each warning once."""
        if record.levelno != logging.WARNING:
            return True
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


ON_TERMINAL = Once()


def _warn_once() -> None:
    """Of the log's handlers, which Hydra makes anew for each job, the terminal's is the same to the end."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(Once() if isinstance(handler, logging.FileHandler) else ON_TERMINAL)


def _distrusted(config: DictConfig) -> Iterator[str]:
    hydra_config = OmegaConf.to_container(config.hydra, resolve=False)
    assert isinstance(hydra_config, dict)
    if (hydra_config.get("callbacks") or {}).get("study") != {"_target_": "sftlab.cli.StudyCallback"}:
        yield "hydra.callbacks.study: is what checks a run before it starts; leave it as it is"
    todo: list[tuple[str, Any]] = [("hydra", hydra_config)]
    while todo:
        place, value = todo.pop()
        last = place.rpartition(".")[2]
        if isinstance(value, dict | list):
            children = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{place}.{name}", child) for name, child in children]
        elif last in CODE and value is not None and not str(value).startswith(TRUSTED):
            yield f"{place}={value!r}: no code is run that a configuration names; leave it out"
        elif place.startswith("hydra.job.env_set.") and SECRET_NAME.search(last):
            yield f"{place}: is written to files; set the variable in the shell instead"


def _extend_launchers() -> None:
    """What a launcher reserves for a job comes from the instance: conf/hydra/reserve, on top of the plugin's config.

    A file in conf/hydra/launcher would take the place of the plugin's, and not be known to need it.
    """

    def gpus(device: str, num_processes: int | None) -> int | None:
        from sftlab.instance.machine import gpus_per_job

        return gpus_per_job(device, num_processes) or None

    def at_once(device: str, num_processes: int | None) -> int:
        from sftlab.hydra_app import launchers

        return launchers.at_once(device, num_processes)

    OmegaConf.register_new_resolver("sftlab.gpus", gpus, replace=True)
    OmegaConf.register_new_resolver("sftlab.at_once", at_once, replace=True)
    Plugins.instance()  # finds the installed ones, which register their configs
    store = ConfigStore.instance()
    for file in (CONF / "hydra" / "reserve").glob("*.yaml"):
        with suppress(ConfigLoadError):
            node = store.load(f"hydra/launcher/{file.name}").node
            store.store(file.stem, OmegaConf.merge(node, OmegaConf.load(file)), "hydra/launcher", provider="sftlab")


_extend_launchers()
# Hydra copies it for each group that --help lists, and only reads the copies.
ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]

# What a dry run, which starts nothing, does with the jobs instead.
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class StudyCallback(Callback):
    """Learns the folder of a run or sweep, and stops one that is invalid before anything is written."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Let go of the job's configurations: Hydra would keep two of each job to the end of a sweep, for nobody."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Validate, before Hydra makes the run's folder."""
        from sftlab.instance import machine as instance
        from sftlab.instance import preflight
        from sftlab.runtime.modes import MODES
        from sftlab.runtime.run import Run, check_folder
        from sftlab.validation.validate import validate

        STUDY.asked = True
        _warn_once()
        cfg = validate(_without_hydra(config))
        _check_names(config.hydra)
        _find_home(config.hydra.run)
        mode, folder = MODES[cfg.mode], Path(config.hydra.run.dir)
        if mode.trains or mode.evaluates:
            preflight.check(instance.find(cfg.instance), cfg)
        if cfg.mode == "report":
            Run.read(folder)
        if mode.records:
            check_folder("hydra.run.dir", folder, Path(cfg.store))
        STUDY.config, STUDY.mode, STUDY.folder = cfg, mode, folder
        if mode.records and not cfg.dry_run:
            STUDY.start(config, cfg.mode, cfg.seed)
            return
        # Nothing but the report is written: no .hydra, no log file and no folder.
        with open_dict(config):
            config.hydra.output_subdir = None
            if OmegaConf.select(config, "hydra.job_logging.root.handlers"):
                config.hydra.job_logging.root.handlers = ["console"]
                config.hydra.job_logging.handlers.pop("file", None)
            if cfg.dry_run or cfg.mode == "clean":
                config.hydra.run.dir = "."

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Stop a sweep that cannot do all that it is asked for, before anything is written, and take its folder."""
        from sftlab.hydra_app import launchers, sweep
        from sftlab.runtime.modes import MODES
        from sftlab.runtime.run import check_folder
        from sftlab.validation.validate import validate

        STUDY.asked = STUDY.sweep = True
        _warn_once()
        looked = sweep.look(config)
        first, folders = looked.first, []
        if first.mode in MODES:
            STUDY.mode = MODES[first.mode]
            folders = sweep.check(looked, config, STUDY.mode)
        try:
            validate(_without_hydra(first))
        except ConfigError as error:
            if hopeless := _in_every_job(error, set(looked.varied)):
                raise ConfigError(hopeless) from error
        if STUDY.mode is None:
            raise ConfigError(f"mode={first.mode!r}: should be one of {', '.join(MODES)}")
        _check_names(config.hydra)
        _find_home(config.hydra.sweep)
        check_folder("hydra.sweep.dir", Path(config.hydra.sweep.dir), Path(str(first.store)).expanduser())
        sweep.check_jobs(Path(config.hydra.sweep.dir), folders)
        launchers.prepare(config, set(looked.varied))
        STUDY.jobs = None if looked.jobs is None else len(looked.jobs)
        choices = config.hydra.runtime.choices
        parallel = choices["hydra/launcher"] in launchers.PARALLEL
        kind = "hydra/launcher" if parallel else "hydra/sweeper"
        STUDY.plugin = f"{kind}={choices[kind]}"
        if first.dry_run:
            # Hydra writes multirun.yaml and the jobs' folders in any case: to where they are gone afterwards.
            STUDY.scratch = TemporaryDirectory(prefix="sftlab-")
            with open_dict(config):
                config.hydra.launcher = {"_target_": BASIC}
                config.hydra.sweep.dir = STUDY.scratch.name
                if "storage" in config.hydra.sweeper:
                    config.hydra.sweeper.storage = None  # Optuna's record of trials
            STUDY.folder = Path(STUDY.scratch.name)
        else:
            STUDY.folder = Path(config.hydra.sweep.dir)
            STUDY.start(config, STUDY.mode.name, int(first.seed))
        # A folder that is named after a swept key would be another one in each job.
        _for_jobs(config, "hydra.sweep.dir", str(STUDY.folder))


def _study() -> Study:
    """Return STUDY. Launchers pickle ``job`` with the globals that it names, and a folder's lock cannot be pickled."""
    return STUDY


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(composed: DictConfig) -> float:
    """One job, in this process or in a worker of a launcher. Returns its lowest validation loss."""
    from sftlab.hydra_app import launchers
    from sftlab.pipeline import dry_run, evaluate_job, plan_job, run_job
    from sftlab.runtime.job import Job, conflict
    from sftlab.runtime.modes import MODES
    from sftlab.runtime.store import Store
    from sftlab.validation.validate import validate

    study = _study()
    _environment()
    _warn_once()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if study.config is not None and (study.config.dry_run or not MODES[study.config.mode].has_jobs):
        return 0.0  # main does the work
    number = int(hydra_config.job.num) if hydra_config.mode == RunMode.MULTIRUN else 0
    values = OmegaConf.to_container(_without_hydra(composed), resolve=False)
    assert isinstance(values, dict)
    record = Job(
        number=number,
        overrides=list(hydra_config.overrides.task),
        config={str(key): value for key, value in values.items()},
        run=hydra_config.job.env_set.get(RUN_ID),
    )
    # Known beforehand, unless the other run began in the meantime.
    around = Path(hydra_config.sweep.dir).absolute() if hydra_config.mode == RunMode.MULTIRUN else None
    if around and record.run and (reason := conflict(folder, around, (record.run,))):
        raise ConfigError(f"job {number} would replace a record: {reason}; set hydra.sweep.dir to an empty folder")
    try:
        _go_where_the_sweep_was_started(hydra_config.runtime.cwd)
        cfg = study.config or validate(_without_hydra(composed))  # a single run was validated by the callback
        record.config = cfg.model_dump()
        if MODES[cfg.mode].records and not cfg.dry_run:
            for place in {folder, Path(hydra_config.sweep.dir)} if hydra_config.mode == RunMode.MULTIRUN else {folder}:
                Store(cfg.store).register(place)
        if cfg.dry_run:
            assert study.scratch is not None
            log.info("job %d: %s", number, " ".join(record.overrides))
            dry_run(cfg, folder, Path(study.scratch.name, ".store"))
        else:
            record.write(folder)
            launcher = str(hydra_config.runtime.choices["hydra/launcher"])
            with launchers.devices(launcher, cfg.instance.device, cfg.instance.num_processes):
                if cfg.mode == "plan":
                    plan_job(cfg, record)
                elif cfg.mode == "evaluate":
                    evaluate_job(cfg, record, folder)
                else:
                    run_job(cfg, record, folder)
        record.status = "success"
    except SftlabError as error:
        # Told in the job's file and not by an exception, which would end the other jobs of some launchers.
        record.status, record.error, record.exit_code = "failed", str(error), error.exit_code
        log.error("job %d: %s", number, error)
    except Exception as error:  # a bug, of ours or of a library: it ends this job and no other
        record.status, record.error, record.exit_code = "failed", f"{type(error).__name__}: {error}", 1
        log.exception("job %d: ended by an error that nobody expected; please report it", number)
    record.write(folder)
    if record.status == "success" and record.config["dry_run"]:
        return 0.0
    return min((candidate.eval_loss for candidate in record.candidates), default=float("inf"))


def main() -> None:
    """The entry of ``python -m sftlab`` and of the ``sftlab`` command."""
    from sftlab.hydra_app.wording import COMPOSITION, explain, options_first

    STUDY.tracebacks = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach this function, which words them
    engine.Callbacks = TrustedCallbacks  # type: ignore[attr-defined]
    engine.ConfigLoaderImpl = ComposeOnce  # type: ignore[attr-defined]
    _environment()
    signal.signal(signal.SIGTERM, _terminated)
    logging.raiseExceptions = False  # a log file that cannot be written is no reason for a traceback at every line
    try:
        for argument in sys.argv[1:]:
            if redacted(argument) != argument:
                raise ConfigError(f"{redacted(argument)}: holds a secret; the command is written to files, so {USE}")
        sys.argv[1:] = options_first(sys.argv[1:], CONF)
        _run_jobs()
        if STUDY.folder is None:
            code = _only_printed(sys.argv[1:])
        else:
            code = _finish(STUDY)
            if code == 0 and STUDY.run is not None and STUDY.run.record.status != "success":
                code = 1
    except HydraException as error:
        STUDY.fail(str(error))
        _fail(ConfigError(explain(error, sys.argv[1:], job, CONF)))
    except SftlabError as error:
        STUDY.fail(str(error))
        _fail(error)
    except Terminated:
        STUDY.fail("terminated by SIGTERM")
        print(f"sftlab: terminated; {KEPT}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        STUDY.fail("interrupted")
        print(f"sftlab: interrupted; {KEPT}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        if not STUDY.asked and isinstance(error, COMPOSITION):
            # Hydra's own, about an override such as model=null or train=[1]
            _fail(ConfigError(explain(error, sys.argv[1:], job, CONF)))
        if STUDY.folder is None and isinstance(error, OmegaConfBaseException):
            # A key of Hydra's, such as hydra.run.dir; those of sftlab are validated.
            _fail(ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}; set it to a value"))
        reason = _of_files(error)
        STUDY.fail(reason or f"{type(error).__name__}: {error}")
        if reason:
            _fail(StageError(reason))
        raise  # a bug: it keeps its traceback, and the record says that the run has ended
    sys.exit(code)


def _only_printed(arguments: list[str]) -> int:
    """The exit code where no run was started: 0 only for a command that asks for none."""
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args(arguments)
    if given.help or given.hydra_help or given.cfg or given.info or given.shell_completion:
        return 0
    raise StageError("nothing was run: Hydra did not call hydra.callbacks.study; leave hydra.callbacks as it is")


def _of_files(error: BaseException) -> str | None:
    """The message for an error of files or folders, also one that a library wraps; None for any other."""
    from sftlab.runtime.store import full

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    where = getattr(cause, "filename", None) or STUDY.folder or "a file"
    if reason := full(error):
        return f"cannot write {where}: {reason}; free some space. Completed stages are reused"
    if cause is None or cause.errno is None:
        return None
    return f"cannot read or write {where}: {cause.strerror}; check its permissions, or set another folder"


def _run_jobs() -> None:
    """Let Hydra compose and start the jobs, which keep their errors to themselves; a launcher has errors of its own.

    If it could not start (no cluster there), that is all. If it loses a worker, which was killed, it stops waiting for
    the others, and the decision is made over what is finished.
    """
    try:
        job()
    except (HydraException, SftlabError):
        raise
    except Exception as error:
        from sftlab.runtime.job import jobs

        if not STUDY.sweep or (STUDY.run is None and STUDY.scratch is None):  # none has begun
            raise
        assert STUDY.folder is not None
        what = _of_files(error) or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        reason = f"{STUDY.plugin}: {what}"
        if not jobs(STUDY.folder):
            raise StageError(reason) from error
        log.error("%s", reason)
        STUDY.lost = reason


def _environment() -> None:
    """Quiet and without telemetry: here, and in a launcher's workers, which may have none of these variables."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _go_where_the_sweep_was_started(folder: str) -> None:
    """Relative paths (the store, a dataset) mean the same in every worker of a launcher."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise StageError(
            f"{folder}: cannot be entered on {os.uname().nodename} ({error.strerror}); a launcher's machines must "
            "share the folder that the command was started in"
        ) from error


def _finish(study: Study) -> int:
    """After the jobs: the decision, or what the mode asks for instead. Returns the exit code."""
    from sftlab import pipeline
    from sftlab.report import page
    from sftlab.runtime.job import jobs

    assert study.folder is not None
    assert study.mode is not None
    _warn_once()
    cfg, run, mode = study.config, study.run, study.mode
    if cfg is not None and (cfg.dry_run or not mode.has_jobs):
        return _alone(study, cfg)
    found = jobs(study.folder)
    for one in found:
        if one.status == "running":
            one.status, one.exit_code = "failed", 1
            one.error = "ended without a word: it was killed, or its machine is gone; run the same command again"
            one.write(one.folder)
    done = [one for one in found if one.status == "success"]
    reasons = [f"job {one.number}: {one.error}" if study.sweep else str(one.error) for one in found if one not in done]
    reasons += [study.lost] if study.lost else []
    if lacking := sorted(set(range(study.jobs or 1)) - {one.number for one in found}):
        reasons.append(f"job {', '.join(map(str, lacking))}: left no record; run the same command again")
        print(f"sftlab: {reasons[-1]}", file=sys.stderr)
    if study.scratch is not None:  # the dry run of a sweep
        study.scratch.cleanup()
        failed = _all_failed([one for one in found if one not in done]) if reasons else 0
        return 1 if reasons and done else failed
    code = 0 if not reasons else _all_failed(found) if not done else 1
    assert run is not None
    try:
        if done:
            pipeline.finish(run, found, sweep=study.sweep)
    except Exception as error:
        with suppress(OSError):
            reason = str(error) if isinstance(error, SftlabError) else f"{type(error).__name__}: {error}"
            study.fail("; ".join([*reasons, reason]))
        raise
    run.finish("failed" if reasons else "success", "; ".join(reasons) or None)
    if mode.name != "plan":
        try:
            page.write(run)
        except Exception as error:
            if not reasons:
                raise
            log.warning("report.html was not written: %s", error)  # which must not hide why the run failed
        else:
            if done:
                log.info("done: %s", study.folder / "report.html")
    return code


def _alone(study: Study, cfg: Config) -> int:
    """What needs no job: a dry run, and the modes that cannot be swept."""
    from sftlab import pipeline
    from sftlab.runtime.store import Store

    assert study.folder is not None
    if cfg.dry_run:
        with TemporaryDirectory(prefix="sftlab-") as scratch:
            pipeline.dry_run(cfg, study.folder, Path(scratch))
    elif cfg.mode == "clean":
        from sftlab.runtime.clean import clean

        clean(Path(cfg.store), Path(cfg.clean.outputs), delete=cfg.clean.delete)
    elif cfg.mode == "report":
        pipeline.render_again(study.folder)
    else:
        assert study.run is not None
        Store(cfg.store).register(study.folder)
        page = pipeline.show(cfg, study.folder) if cfg.mode == "preview" else pipeline.compare_files(study.run, cfg)
        study.run.finish("success")
        if cfg.mode == "compare":
            from sftlab.report import page as report

            report.write(study.run)
        log.info("done: %s", page)
    return 0


def _all_failed(found: list[Job]) -> int:
    for one in found:
        print(f"sftlab: {f'job {one.number}: ' if STUDY.sweep else ''}{one.error}", file=sys.stderr)
    return 2 if found and all(one.exit_code == 2 for one in found) else 1


def _in_every_job(error: ConfigError, swept: set[str]) -> str:
    """Of a sweep's problems those that no value of a swept key can fix; "" if there is none.

    These are the problems whose message names no key that differs between the jobs.
    """
    from sftlab.config import Config
    from sftlab.validation.validate import known_keys, listed, problems

    known = set(known_keys(Config))
    hopeless = []
    for problem in problems(error):
        place = re.match(r"[\w.]*", problem)
        words = {word for word in re.findall(r"[\w.]+", problem) if word in known or word.partition(".")[0] in known}
        mendable = any(
            word == key or word.startswith(f"{key}.") or key.startswith(f"{word}.") for word in words for key in swept
        )
        if place and place[0] in known and not mendable:
            hopeless.append(problem)
    return listed(hopeless) if hopeless else ""


def _command() -> str:
    return shlex.join(["python", "-m", "sftlab", *sys.argv[1:]])


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _fail(error: SftlabError) -> NoReturn:
    if STUDY.tracebacks and sys.exc_info()[0]:
        print(redacted(traceback.format_exc()), file=sys.stderr)
    print(f"sftlab: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _terminated(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the saving
    raise Terminated
