"""The command line: Hydra composes, every job runs, then the decision is made; errors become exit codes."""

from __future__ import annotations

import difflib
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal import hydra as engine
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sftlab.errors import SECRET_NAME, ConfigError, SftlabError, StageError, Terminated, redacted

if TYPE_CHECKING:
    from sftlab.config import Config
    from sftlab.run import Run

log = logging.getLogger(__name__)

# Beside the package in a checkout, inside it in a wheel.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if path.is_dir())


@dataclass
class Study:
    """What Hydra was asked to run: told by the callback, which sees it before the first job."""

    folder: Path | None = None
    sweep: bool = False
    config: Config | None = None
    run: Run | None = None
    tracebacks: bool = False
    held: Any = None
    scratch: TemporaryDirectory[str] | None = None
    launcher: str = "basic"
    lost: str | None = None  # what ended the launcher before its jobs

    def start(self, composed: DictConfig) -> None:
        """Take the folder, and write ``run.json``: the run has begun."""
        from sftlab.run import Run, hold

        assert self.folder is not None
        if reason := _no_folder(self.folder):
            _fail(
                ConfigError(f"hydra.run.dir={str(self.folder)!r}: {reason}; set it to a folder that you may write to")
            )
        self.held = hold(self.folder)
        name, mode, seed = str(composed.name), str(composed.mode), int(composed.seed)
        self.run = Run.start(self.folder, name=name, mode=mode, seed=seed, command=_command())

    def fail(self, reason: str) -> None:
        """Write into ``run.json`` that the run did not end well, unless that is told already."""
        if self.run is not None and self.run.values["status"] == "running":
            with suppress(OSError):  # what cannot be written must not hide the reason
                self.run.finish("failed", redacted(reason))


STUDY = Study()
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


class TrustedCallbacks(Callbacks):
    """Hydra's callbacks, made once it is clear that the configuration names no code besides ``TRUSTED``."""

    def __init__(self, config: DictConfig | None = None) -> None:
        if config is not None and (reason := next(_distrusted(config), None)):
            _fail(ConfigError(reason))
        super().__init__(config)


def _distrusted(config: DictConfig) -> Iterator[str]:
    hydra_config = OmegaConf.to_container(config.hydra, resolve=False)
    assert isinstance(hydra_config, dict)
    if hydra_config["callbacks"].get("study") != {"_target_": "sftlab.cli.StudyCallback"}:
        yield "hydra.callbacks.study: is what checks a run before it starts; leave it as it is"
    todo: list[tuple[str, Any]] = [("hydra", hydra_config)]
    while todo:
        place, value = todo.pop()
        last = place.rpartition(".")[2]
        if isinstance(value, dict | list):
            children = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{place}.{name}", child) for name, child in children]
        elif last in ("_target_", "class", "()") and value is not None and not str(value).startswith(TRUSTED):
            yield f"{place}={value!r}: no code is run that a configuration names; leave it out"
        elif place.startswith("hydra.job.env_set.") and SECRET_NAME.search(last):
            yield f"{place}: is written to files; set the variable in the shell instead"


def _extend_launchers() -> None:
    """What a launcher reserves for a job comes from the instance: conf/hydra/reserve, on top of the plugin's config.

    A file in conf/hydra/launcher would take the place of the plugin's, and not be known to need it.
    """

    def gpus(device: str, num_processes: int | None) -> int | None:
        from sftlab.instance import gpus_per_job

        return gpus_per_job(device, num_processes) or None

    def at_once(device: str, num_processes: int | None) -> int:
        from sftlab import launchers

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

# What a dry run, which starts nothing, does with the jobs instead.
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"

# Dictionaries that take keys of the user's choosing.
FREE = re.compile(r"train\.(extra|lr_scheduler_kwargs)\.|(eval\.)?dataset\.split\.")


class StudyCallback(Callback):
    """Learns the folder of a run or sweep, and stops a single run that is invalid before anything is written."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Let go of the job's configurations: Hydra would keep two of each job to the end of a sweep, for nobody."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Validate, before Hydra makes the run's folder."""
        from sftlab import instance
        from sftlab.run import Run
        from sftlab.validate import validate

        try:
            cfg = validate(_without_hydra(config))
            if cfg.mode in ("all", "train", "evaluate"):
                machine = instance.find(cfg.instance)
                if cfg.mode != "evaluate":
                    instance.check(machine, cfg.train, cfg.peft)
            if cfg.mode == "report":
                Run.read(Path(config.hydra.run.dir))
        # Hydra turns an exception in a callback into a warning; these must end the program.
        except ConfigError as error:
            _fail(error)
        except Exception:  # a bug
            traceback.print_exc()
            sys.exit(1)
        STUDY.config, STUDY.folder = cfg, Path(config.hydra.run.dir)
        if cfg.dry_run or cfg.mode in ("report", "clean"):
            # None of them makes a run: no .hydra, no log file, and but for the report no folder either.
            with open_dict(config):
                config.hydra.output_subdir = None
                config.hydra.job_logging.root.handlers = ["console"]
                config.hydra.job_logging.handlers.pop("file", None)
                if cfg.dry_run or cfg.mode == "clean":
                    config.hydra.run.dir = "."
        else:
            STUDY.start(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Stop a sweep of which every job would be invalid, before anything is written, and remember its folder."""
        from sftlab import launchers
        from sftlab.validate import validate

        try:
            validate(_without_hydra(config))
        except ConfigError as error:
            if hopeless := _in_every_job(error, config):
                _fail(ConfigError(hopeless))
        try:
            launchers.prepare(config, _swept(config))
        except ConfigError as error:
            _fail(error)
        STUDY.sweep, STUDY.launcher = True, str(config.hydra.runtime.choices["hydra/launcher"])
        if config.dry_run:
            # Hydra writes multirun.yaml and the jobs' folders in any case: to where they are gone afterwards.
            STUDY.scratch = TemporaryDirectory(prefix="sftlab-")
            with open_dict(config):
                config.hydra.launcher = {"_target_": BASIC}
                config.hydra.sweep.dir = STUDY.scratch.name
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={STUDY.scratch.name}")
            STUDY.folder = Path(STUDY.scratch.name)
        else:
            STUDY.folder = Path(config.hydra.sweep.dir)
            STUDY.start(config)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(composed: DictConfig) -> float:
    """One job, in this process or in a worker of a launcher. Returns its lowest validation loss."""
    from sftlab import launchers
    from sftlab.job import Job
    from sftlab.pipeline import dry_run, plan_job, run_job
    from sftlab.validate import validate

    _environment()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    number = int(hydra_config.job.num) if hydra_config.mode == RunMode.MULTIRUN else 0
    values = OmegaConf.to_container(_without_hydra(composed), resolve=False)
    assert isinstance(values, dict)
    record = Job(number, list(hydra_config.overrides.task), {str(key): value for key, value in values.items()})
    try:
        _go_where_the_sweep_was_started(hydra_config.runtime.cwd)
        cfg = validate(_without_hydra(composed))
        record.config = cfg.model_dump()
        if cfg.dry_run and hydra_config.mode == RunMode.MULTIRUN:
            log.info("job %d: %s", number, " ".join(record.overrides))
            dry_run(cfg)
        if cfg.mode not in ("all", "train", "plan") or cfg.dry_run:
            return 0.0  # nothing to train: main goes on with it
        record.write(folder)
        launcher = str(hydra_config.runtime.choices["hydra/launcher"])
        with launchers.devices(launcher, cfg.instance.device, cfg.instance.num_processes):
            if cfg.mode == "plan":
                plan_job(cfg, record)
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
    return min((candidate.eval_loss for candidate in record.candidates), default=float("inf"))


def main() -> None:
    """The entry of ``python -m sftlab`` and of the ``sftlab`` command."""
    from sftlab.store import FULL

    STUDY.tracebacks = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach this function, which words them
    engine.Callbacks = TrustedCallbacks  # type: ignore[attr-defined]
    _environment()
    signal.signal(signal.SIGTERM, _terminated)
    logging.raiseExceptions = False  # a log file that cannot be written is no reason for a traceback at every line
    try:
        for argument in sys.argv[1:]:
            if redacted(argument) != argument:
                raise ConfigError(f"{redacted(argument)}: holds a secret; the command is written to files, so {USE}")
        _run_jobs()
        code = 0 if STUDY.folder is None else _finish(STUDY)
    except HydraException as error:
        _fail(ConfigError(_explain(error, sys.argv[1:])))
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
        if STUDY.folder is None and isinstance(error, TypeError | ValueError):
            # Hydra's own, about an override such as model=null or train=[1]
            _fail(ConfigError(_explain(error, sys.argv[1:])))
        STUDY.fail(f"{type(error).__name__}: {error}")
        if isinstance(error, OSError) and error.errno in FULL:
            where = error.filename or STUDY.folder
            _fail(StageError(f"cannot write {where}: {error.strerror}; free some space. What was finished is kept"))
        raise  # a bug: it keeps its traceback, and the record says that the run has ended
    sys.exit(code)


def _run_jobs() -> None:
    """Hydra composes and starts the jobs, which keep their errors to themselves; a launcher has errors of its own.

    If it could not start (no cluster there), that is all. If it loses a worker, which was killed, it stops waiting for
    the others, and what is finished is decided over.
    """
    try:
        job()
    except (HydraException, SftlabError):
        raise
    except Exception as error:
        from sftlab.job import jobs
        from sftlab.launchers import PARALLEL

        if STUDY.folder is None or STUDY.launcher not in PARALLEL:
            raise
        reason = f"hydra/launcher={STUDY.launcher}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
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
    from sftlab.job import jobs
    from sftlab.stages import report

    assert study.folder is not None
    cfg = study.config
    if cfg is not None and cfg.dry_run:
        return pipeline.dry_run(cfg)
    if cfg is not None and cfg.mode == "clean":
        from sftlab.clean import clean

        clean(Path(cfg.store), Path(cfg.clean.outputs), delete=cfg.clean.delete)
        return 0
    if cfg is not None and cfg.mode == "report":
        return pipeline.render_again(study.folder)
    found, run = jobs(study.folder), study.run
    if study.scratch is not None:  # the dry run of a sweep: only jobs that cannot run have left a word
        study.scratch.cleanup()
        return _all_failed(found) if found else 0
    assert run is not None
    for one in found:
        if one.status == "running":
            one.status, one.exit_code = "failed", 1
            one.error = "ended without a word: it was killed, or its machine is gone; run the same command again"
            one.write(study.folder / str(one.number) if study.sweep else study.folder)
    first = cfg or next((job.settings() for job in found if job.exit_code != 2), None)
    failed = [job for job in found if job.status != "success"]
    if first is not None and first.mode == "preview":
        pipeline.show(first, study.folder)
        run.finish("success")
        log.info("done: %s", study.folder / "preview.html")
        return 0
    if run.values["mode"] == "plan":
        pipeline.tell_plan(run, found)
    elif run.values["mode"] == "evaluate" and first is not None:
        pipeline.evaluate_only(run, first)
    elif run.values["mode"] == "compare" and first is not None:
        pipeline.compare_files(run, first)
    elif first is not None and first.instance.node_rank > 0:
        log.info(
            "machine %d of %d: trained; machine 0 has the checkpoints", first.instance.node_rank, first.instance.nnodes
        )
    elif len(failed) < len(found):
        pipeline.decide(run, found)
    reasons = [f"job {job.number}: {job.error}" if study.sweep else str(job.error) for job in failed]
    if study.lost:
        reasons.append(study.lost)
    run.finish("failed" if reasons else "success", "; ".join(reasons) or None)
    if run.values["mode"] == "plan":
        return _all_failed(found) if len(failed) == len(found) else int(bool(reasons))
    report.page(run)
    if failed and len(failed) == len(found):
        return _all_failed(found)
    log.info("done: %s", study.folder / "report.html")
    return 1 if reasons else 0


def _all_failed(found: list[Any]) -> int:
    for one in found:
        print(f"sftlab: {f'job {one.number}: ' if STUDY.sweep else ''}{one.error}", file=sys.stderr)
    return 2 if found and all(one.exit_code == 2 for one in found) else 1


def _in_every_job(error: ConfigError, config: DictConfig) -> str:
    """Of a sweep's problems those that no value of a swept key can mend; "" if there is none.

    That is told by their words: a problem that names no swept key, nor a key of a swept group.
    """
    from sftlab.config import Config
    from sftlab.validate import known_keys, listed, problems

    swept = _swept(config)
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


def _swept(config: DictConfig) -> set[str]:
    """The keys and groups that a sweep gives more than one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = {str(override.key_or_group) for override in overrides if override.is_sweep_override()}
    return swept | set(config.hydra.sweeper.get("params") or {})


def _command() -> str:
    return shlex.join(["python", "-m", "sftlab", *sys.argv[1:]])


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _no_folder(folder: Path) -> str | None:
    """Why a folder cannot be made, having made it if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    return None if os.access(folder, os.W_OK) else "may not be written to"


def _fail(error: SftlabError) -> NoReturn:
    if STUDY.tracebacks and sys.exc_info()[0]:
        print(redacted(traceback.format_exc()), file=sys.stderr)
    print(f"sftlab: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _terminated(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the saving
    raise Terminated


def _explain(error: Exception, arguments: list[str]) -> str:
    """Hydra's error about a composition as place, value and remedy, together with all else that is wrong."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from sftlab.config import Config
    from sftlab.validate import SECRET, SECRETS, known_keys, listed, nearest, problems, validate

    groups = {str(folder.relative_to(CONF)) for folder in CONF.iterdir() if folder.is_dir()}
    known = set(known_keys(Config))
    found, rest = [], []
    for argument in get_args_parser().parse_args(arguments).overrides:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as wrong:
            reason = str(wrong).replace(f"Error parsing override '{argument}'", "").strip().partition("\n")[0]
            found.append(f"{argument}: cannot be read ({reason}); write KEY=VALUE, with quotes: 'KEY=\"VALUE\"'")
            continue
        key, value = str(override.key_or_group), override.value()
        added = override.is_add() and not override.is_force_add()
        choices = sorted(file.stem for file in (CONF / key).glob("*.yaml"))
        if SECRET.search(key):
            found.append(f"{key}: {SECRETS}")
        elif not key:
            found.append(f"{argument}: has no key; write KEY=VALUE")
        elif key in groups and key not in ("experiment", "debug") and not (isinstance(value, str) or override.package):
            found.append(f"{argument}: a group needs one choice; there are {', '.join(choices)}")
        elif key in groups and isinstance(value, str) and value not in choices:
            close = difflib.get_close_matches(value, choices, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            found.append(f"{argument.lstrip('+')}: no such choice; {hint}there are {', '.join(choices)}")
        elif key in ("experiment", "debug") and not override.is_add():
            found.append(f"{argument}: is added to the defaults; write +{argument}")
        elif key in groups and added and key not in ("experiment", "debug") and not override.package:
            found.append(f"{argument}: has a choice already; write {argument[1:]}")
        elif not (key in groups | known or key.startswith("hydra") or FREE.match(key)):
            found.append(f"{argument}: no such key; {nearest(key)}")
        elif f"Could not override '{key}'" in str(error) and not key.startswith("hydra"):
            if FREE.match(key):
                found.append(f"{argument}: is not there yet; write +{argument}")
            else:
                section = key.rpartition(".")[0].replace("eval.dataset", "dataset@eval.dataset")
                found.append(f"{argument}: the chosen {section} has no such key; choose another by {section}=…")
        else:
            rest.append(argument)
    plugin = re.search(r"Could not find '(hydra/\w+)/(optuna|ray|joblib|submitit)(\w*)'", str(error))
    if plugin:
        group, name, kind = plugin.groups()
        extra = name.replace("submitit", "slurm")
        found.append(f"{group}={name}{kind}: is not installed; pip install 'sftlab[{extra}]'")
    if not found:
        text = re.sub(r"\s*\n\s*", "; ", str(error).split("Config search path:")[0].strip()).removesuffix("; ")
        return text if ";" in text else f"{text}; `python -m sftlab --cfg all` lists all keys, with values that fit"
    GlobalHydra.instance().clear()
    try:  # what is wrong besides
        with initialize_config_dir(str(CONF), version_base="1.3"):
            validate(compose("config", overrides=rest))
    except ConfigError as wrong:
        found += problems(wrong)
    except HydraException:
        pass
    return listed(found)
