"""Find what a sweep varies, and check before the first job that every value changes the result of its job."""

from __future__ import annotations

import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem, shown
from sftlab.hydra_app.compose import COMPOSITION_ERRORS, without_hydra
from sftlab.runtime.job import RUN, conflict, owner
from sftlab.runtime.modes import MODES, SAME_WEIGHTS, Mode
from sftlab.runtime.run import LONGEST, not_writable
from sftlab.validation.keys import known_keys

GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
UNREAD = ("train.", "peft.", "select.", "merge.", "plan.")  # sections without an effect in modes that do not train
RUN_WIDE = ("mode", "dry_run")  # the same for all jobs of a sweep
# A component of a path that differs between any two jobs.
NUMBERED = re.compile(r"[^$/{}]*\$\{hydra[.:]job\.num\}[^$/{}]*")


@dataclass(frozen=True)
class Axis:
    """One override with several values."""

    key: str  # as in the override: train.learning_rate, +experiment, dataset@eval.dataset
    text: str  # the override
    values: list[str]
    in_file: bool  # from hydra.sweeper.params, and not from the command line

    @property
    def first(self) -> str:
        """The override of the first job."""
        return f"{self.key}={self.values[0]}"


@dataclass(frozen=True)
class Sweep:
    """A sweep before it starts."""

    first: DictConfig  # composed config of the first job
    axes: list[Axis]
    varied: dict[str, Axis]  # keys that differ between jobs, each with the axis that varies it
    jobs: list[list[str]] | None  # overrides of each job; None if the sweeper chooses them while it runs


def examine(config: DictConfig) -> Sweep:
    """Find what a sweep varies, from the config that Hydra composed for the sweep as a whole.

    The choices of a swept group are composed, because a file can set any key.

    Raises:
        HydraException: a value or choice cannot be composed.
        ConfigError: a choice of a swept group sets another sweeper.
    """
    params = OmegaConf.to_container(config.hydra.sweeper, resolve=True).get("params") or {}  # type: ignore[union-attr]
    in_file = [f"{key}={value}" for key, value in params.items()]
    typed = [str(override) for override in config.hydra.overrides.task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    # As in Hydra's sweepers, an override on the command line replaces one in the file.
    parsed = {override.get_key_element(): override for override in parser.parse_overrides([*in_file, *typed])}
    axes = [_axis(override, in_file) for override in parsed.values() if override.is_sweep_override()]
    fixed = {key: override for key, override in parsed.items() if not override.is_sweep_override()}
    chosen = {key: f"{key}={override.get_value_element_as_str()}" for key, override in fixed.items()}
    chosen |= {axis.key: axis.first for axis in axes}
    first = _composed(config, list(chosen.values()))
    leaves = set(known_keys(Config)) - {key.rpartition(".")[0] for key in known_keys(Config)}
    before, varied = _flat(first), dict[str, Axis]()
    for axis in axes:
        name = str(parsed[axis.key].key_or_group)
        several = len(axis.values) > 1 or not parsed[axis.key].is_discrete_sweep()
        if name in leaves or not parsed[axis.key].is_discrete_sweep():
            varied |= {name: axis} if several else {}
            continue
        for value in axis.values:
            other = _composed(config, [*(chosen | {axis.key: f"{axis.key}={value}"}).values()])
            if other.hydra.sweeper != config.hydra.sweeper:
                raise ConfigError(
                    Problem(
                        axis.key,
                        value,
                        f"sets hydra.sweeper, which has no effect within a sweep over {name}",
                        f"run it separately: python -m sftlab {axis.key}={value}",
                    )
                )
            after = _flat(other)
            varied |= {key: axis for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    for key in OmegaConf.select(config, "hydra.sweeper.search_space") or {}:
        varied[str(key)] = Axis(str(key), str(key), [], in_file=True)
    jobs = None
    if config.hydra.sweeper._target_ == GRID:
        (jobs,) = BasicSweeper.split_arguments(list(parsed.values()), None)
    return Sweep(first, axes, varied, jobs)


def check_sweep(sweep: Sweep, config: DictConfig, mode: Mode) -> list[PurePath]:
    """Refuse a sweep in which a value would have no effect.

    Returns:
        The folders of the jobs, relative to the sweep's folder.

    Raises:
        ConfigError: the mode cannot be swept, a varied key changes no job's result, or jobs would share a folder.
    """
    if not mode.has_jobs:
        raise ConfigError(
            Problem(
                "mode",
                mode.name,
                f"cannot be swept, because {mode.instead}",
                "run one command for each value, without -m and with one value per key (and with "
                "hydra.mode=RUN if an experiment file sweeps)",
            )
        )
    if sweep.jobs is None and not mode.trains:
        raise ConfigError(
            Problem(
                "mode",
                mode.name,
                "has no validation loss, which a searching sweeper needs",
                "set mode=all or mode=train, or list the values in a plain sweep with hydra/sweeper=basic",
            )
        )
    _check_sweeper(sweep, config.hydra.sweeper)
    if mode.trains and sweep.first.sweep.prune is not None and "seed" in sweep.varied:
        raise ConfigError(
            Problem(
                "sweep.prune",
                str(sweep.first.sweep.prune),
                "would stop the worse seeds of a recipe, and its mean over seeds would be too good",
                "sweep with one seed, or set sweep.prune=null",
            )
        )
    refused = _refused(sweep, mode)
    if refused:
        raise ConfigError(_refusal(sweep, config, mode, refused))
    return _folders(sweep, config)


def _check_sweeper(sweep: Sweep, sweeper: DictConfig) -> None:
    """Refuse settings of a sweeper that run no job, or search for the worst one."""
    for key in ("max_batch_size", "n_trials", "n_jobs"):
        value = OmegaConf.select(sweeper, key)
        if value is not None and value < 1:
            raise ConfigError(Problem(f"hydra.sweeper.{key}", shown(value), "no job would run", "set it to 1 or more"))
    directions = OmegaConf.select(sweeper, "direction")
    several = list(directions) if OmegaConf.is_list(directions) else [directions]
    names = [str(getattr(direction, "name", direction)) for direction in several]
    if len(names) != 1 or names[0] not in ("minimize", "None"):
        raise ConfigError(
            Problem(
                "hydra.sweeper.direction",
                ",".join(names),
                "a job returns one validation loss, and a lower one is better",
                "set it to minimize",
            )
        )
    if sweep.jobs is None and not sweep.varied:
        raise ConfigError(
            Problem(
                "hydra/sweeper",
                None,
                "has nothing to search",
                "give a key several values or a range, such as 'train.learning_rate=interval(1e-4,1e-2)', or leave out "
                "the sweeper",
            )
        )


def check_job_folders(folder: Path, jobs: list[PurePath]) -> None:
    """Refuse a sweep whose jobs could not write their records, or would replace those of other runs.

    Raises:
        ConfigError: the folder of a job cannot be created or written, or belongs to another run.
    """
    previous = owner(folder / RUN)  # this sweep deletes the jobs of the run that was in its folder before
    for number, job in enumerate(jobs):
        if reason := not_writable((folder / job).absolute()):
            message = f"the folder {job} of job {number} {reason}"
        elif reason := conflict(folder / job, folder, (previous,)):
            message = f"job {number} would replace a record: {reason}"
        else:
            continue
        raise ConfigError(Problem("hydra.sweep.dir", shown(str(folder)), message, "set it to an empty folder"))


def _refused(sweep: Sweep, mode: Mode) -> dict[str, list[str]]:
    """For each axis with values that would have no effect, the keys that no job's result depends on."""
    by_axis: defaultdict[str, list[str]] = defaultdict(list)
    for key, axis in sorted(sweep.varied.items()):
        by_axis[axis.key].append(key)

    def used(key: str) -> bool:
        mounted = not mode.trains and mode.evaluates and sweep.first.eval.dataset is not None
        return mode.depends_on(key) and not (mounted and key.startswith("dataset."))

    refused: dict[str, list[str]] = {}
    for name, keys in by_axis.items():
        unused = [key for key in keys if not used(key)]
        if keys != [name]:  # a group, whose files may also set keys that this mode does not read
            harmless = [key for key in keys if key not in RUN_WIDE]
            if mode.trains:
                harmless = [key for key in harmless if key in ("name", *SAME_WEIGHTS) or key.startswith("instance.")]
            unused = [key for key in unused if key not in harmless or not any(map(used, keys))]
        if unused:
            refused[name] = unused
    return refused


def _refusal(sweep: Sweep, config: DictConfig, mode: Mode, refused: Mapping[str, list[str]]) -> Problem:
    keys = [key for some in refused.values() for key in some]
    listed = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    through = sorted(axis for axis, unused in refused.items() if unused != [axis])
    by = f" (varied by {', '.join(through)})" if through else ""
    why = "" if set(keys) & set(RUN_WIDE) else f" in mode={mode.name}, because it does not affect {mode.result}"
    key, message = f"{listed}{by}", f"cannot be swept{why}"
    evaluated = MODES["evaluate"].depends_on
    once = {key for axis in sweep.axes if axis.key in refused for key, of in sweep.varied.items() if of == axis}
    # A second command would evaluate one model, without knowing the seed, dataset or base of the selected job.
    carried = any(evaluated(key) for key, axis in sweep.varied.items() if axis.key not in refused)
    if not mode.trains or carried or not all(map(evaluated, keys)) or any(map(mode.depends_on, once)):
        single = [axis.first for axis in sweep.axes if axis.key in refused and axis.in_file]
        if not mode.trains and all(key.startswith(UNREAD) for key in keys):
            rest = f"give it one value: {' '.join(single)}" if single else "leave it out"
            return Problem(key, None, message, f"it has no effect there, so {rest}", tuple(keys))
        each = f"run one command for each value of {', '.join(sorted(refused))}"
        here = f" (here with {' '.join(single)})" if single else ""
        remedy = f"{each}. Finished stages are reused from the store{here}"
        return Problem(key, None, message, remedy, tuple(keys))
    commands = _in_two_steps(sweep, config, mode, set(refused))
    steps = (shlex.join(["python", "-m", "sftlab", *words]) for words in commands)
    remedy = "\n  ".join(["train once, then evaluate the trained model with every value:", *steps])
    remedy += "\nRUN is the folder that the first command writes"
    return Problem(key, None, message, remedy, tuple(keys))


def _in_two_steps(sweep: Sweep, config: DictConfig, mode: Mode, refused: set[str]) -> list[list[str]]:
    """The arguments of two commands that do together what a refused sweep asked for."""
    swept = {axis.text for axis in sweep.axes if not axis.in_file}
    fixed = [word for word in config.hydra.overrides.task if word not in swept and not word.startswith("mode=")]
    own = get_args_parser().parse_args(sys.argv[1:]).config_dir
    hydra = ["--config-dir", own] if own else []
    hydra += [word for word in config.hydra.overrides.hydra if not word.startswith(("hydra.mode", "hydra.sweep.", "+"))]
    trained = [axis for axis in sweep.axes if axis.key not in refused]
    typed = [axis.text for axis in trained if not axis.in_file]
    single = [axis.first for axis in sweep.axes if axis.key in refused and axis.in_file]
    evaluated = [] if mode.evaluates else ["mode=all"]
    first = [*(["-m"] if trained else []), *hydra, *fixed, *typed, *single, *evaluated]
    wanted = [axis.text for axis in sweep.axes if axis.key in refused and not axis.in_file]
    rest = [axis.first for axis in trained if axis.in_file]
    return [first, ["-m", *hydra, *fixed, *rest, *wanted, "mode=evaluate", "eval.name_or_path=RUN/merged"]]


def _folders(sweep: Sweep, config: DictConfig) -> list[PurePath]:
    """The folders of the jobs. Refuse those that jobs would share, or that are not below the sweep's folder."""
    raw = str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index,call-overload]
    key, remedy = "hydra.sweep.subdir", "set it to a folder that differs between jobs, such as '${hydra.job.num}'"
    is_numbered = any(NUMBERED.fullmatch(part) for part in raw.split("/"))
    if sweep.jobs is None and not is_numbered:
        raise ConfigError(Problem(key, shown(raw), "may be the same in two jobs", remedy))
    trials = OmegaConf.select(config, "hydra.sweeper.n_trials") or 1
    jobs = sweep.jobs or [[axis.first for axis in sweep.axes]] * trials
    if raw == "${hydra.job.num}":
        return [PurePath(str(number)) for number in range(len(jobs))]
    seen: dict[PurePath, int] = {}
    for number, overrides in enumerate(jobs):
        composed = _composed(config, overrides, number)
        try:
            folder = PurePath(str(composed.hydra.sweep.subdir))
        except OmegaConfBaseException as error:
            raise ConfigError(Problem(key, shown(raw), str(error).splitlines()[0], remedy)) from error
        message = f"is {str(folder)!r} for job {number}"
        if folder.is_absolute() or ".." in folder.parts or not folder.parts:
            raise ConfigError(Problem(key, shown(raw), f"{message}, which is not below the sweep's folder", remedy))
        if any(len(part.encode()) > LONGEST for part in folder.parts):
            raise ConfigError(Problem(key, shown(raw), f"{message}, which is too long for a file system", remedy))
        if seen.setdefault(folder, number) != number:
            raise ConfigError(Problem(key, shown(raw), f"{message} and for job {seen[folder]}", remedy))
    return list(seen)


def _axis(override: Override, in_file: list[str]) -> Axis:
    if override.is_discrete_sweep():
        values = list(dict.fromkeys(override.sweep_string_iterator()))
    else:
        values = [str(override.value().start)]  # type: ignore[union-attr]
    if not values:
        raise ConfigError(
            Problem(str(override.input_line), None, "matches no choice", "write KEY=VALUE1,VALUE2 with existing values")
        )
    text = str(override.input_line)
    return Axis(override.get_key_element(), text, values, text in in_file)


def _composed(config: DictConfig, overrides: list[str], number: int = 0) -> DictConfig:
    try:
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
    except COMPOSITION_ERRORS as error:
        fixed = {_plain(word) for word in config.hydra.overrides.task}
        own = [word for word in overrides if _plain(word) not in fixed]
        reason = str(error).splitlines()[0]
        raise ConfigError(
            Problem(" ".join(own or overrides), None, f"cannot be composed: {reason}", "sweep other values")
        ) from error
    with open_dict(composed):
        composed.hydra.job.num, composed.hydra.job.id = number, str(number)
    HydraConfig.instance().set_config(composed)  # which interpolations such as ${hydra:job.num} read
    return composed


def _plain(override: str) -> str:
    """Remove what Hydra changes in an override when it prints it again."""
    return re.sub(r"[\\\s]", "", override).lower()


def _flat(config: DictConfig) -> dict[str, Any]:
    """The values of a config by dotted key, without Hydra's section."""
    own = without_hydra(config)
    try:
        values = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException:  # validation reports it
        values = OmegaConf.to_container(own, resolve=False)
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, part in value.items():
                add(f"{prefix}.{name}" if prefix else str(name), part)
        else:
            flat[prefix] = value

    add("", values)
    return flat
