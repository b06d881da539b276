"""Explain a command line that Hydra cannot compose: every problem with its argument, reason and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from pydantic import ValidationError

from sftlab.errors import ConfigError, Problem
from sftlab.hydra_app.arguments import FREE_KEYS, OPTIONAL_GROUPS, PROGRAM, is_key, parse_options, problem_of
from sftlab.hydra_app.compose import COMPOSITION_ERRORS, Composer
from sftlab.validation.overrides import letters, override, parsed, refusal, shown, wants_list

NAMES_CODE = "names code, and a config may not choose what is called"


def explain(error: Exception, arguments: Sequence[str]) -> ConfigError:
    """Word Hydra's error about a command line, together with all other problems of the command line.

    Args:
        error: what Hydra raised.
        arguments: the command line, options first.
    """
    options = parse_options(arguments)
    if options.config_dir and not Path(options.config_dir).is_dir():
        message = f"config directory {options.config_dir!r} not found"
        return ConfigError(Problem(f"--config-dir {options.config_dir}", None, message, "check the path"))
    overrides = {argument: parsed(argument) for argument in options.overrides}
    composer = Composer(options, [text for text, read in overrides.items() if read and read.is_hydra_override()])
    modes = [text for text, read in overrides.items() if read and read.key_or_group in ("hydra.mode", *OPTIONAL_GROUPS)]
    sweep = bool(options.multirun) or composer.is_multirun(modes)
    diagnosis = _Diagnosis(composer)
    for argument, read in overrides.items():
        diagnosis.check_argument(argument, read, sweep=sweep)
    diagnosis.check_plugin(error)
    diagnosis.check_config()
    return ConfigError(*(diagnosis.all_problems() or [_in_one_line(error)]))


class _Diagnosis:
    """The problems of a command line, and the command line with their remedies applied.

    The fixed command line is composed and validated, which finds the problems that the first ones hide.
    """

    def __init__(self, composer: Composer) -> None:
        self.composer = composer
        self.problems: list[Problem] = []
        self.fixed: list[str] = []
        self.unquoted: dict[str, Problem] = {}
        """Problems of keys whose values need quotes, if the key accepts text."""
        self.absent: dict[str, Problem] = {}
        """Problems of keys that must be added with a +."""
        self.uncertain: set[str] = set()
        """Keys whose intended value is unknown. Problems that follow from it are not reported."""

    def all_problems(self) -> list[Problem]:
        """All problems, those of the grammar first."""
        return [*self.unquoted.values(), *self.problems, *self.absent.values()]

    def check_argument(self, argument: str, read: Override | None, *, sweep: bool) -> None:
        """Check one argument; ``read`` is the override as Hydra parses it, None if it cannot."""
        from sftlab.validation.keys import SECRET, pasted, secret

        key = argument.partition("=")[0].lstrip("+~")
        if SECRET.search(key):
            self.problems.append(secret(key))
            return
        if (key_itself := pasted(argument)) is not None:
            self.problems.append(key_itself)
            return
        problem, intended = (
            _unreadable(argument, sweep=sweep) if read is None else _unfit(argument, read, self.composer, sweep=sweep)
        )
        if problem and read is None and intended is not None:
            self.unquoted[key] = problem
        elif problem:
            self.problems.append(problem)
        if intended is None or (problem and read is not None) or (read and read.is_sweep_override()):
            self.uncertain.update((key.partition("@")[2] or key, (intended or "").partition("=")[0].lstrip("+")))
        if intended is not None and not (read and read.is_sweep_override()):
            self.fixed.append(intended)

    def check_plugin(self, error: Exception) -> None:
        """Check whether Hydra's error is about a launcher or sweeper that is not installed."""
        plugin = re.search(r"Could not find '(hydra/\w+)/(optuna|ray|joblib|submitit)(\w*)'", str(error))
        if plugin:
            group, name, kind = plugin.groups()
            extra = name.replace("submitit", "slurm")
            self.problems.append(Problem(group, name + kind, "is not installed", f"pip install 'sftlab[{extra}]'"))
            self.fixed = [argument for argument in self.fixed if not argument.startswith(f"{group}=")]

    def check_config(self) -> None:
        """Compose and validate the fixed command line, fixing further arguments until Hydra composes it."""
        from sftlab.validation.validate import validate

        while True:
            try:
                validate(self.composer.compose(self.fixed))
            except ConfigError as error:
                self._add_invalid(error)
            except (HydraException, *COMPOSITION_ERRORS) as error:
                if self._fix(str(error)):
                    continue
            return

    def _add_invalid(self, error: ConfigError) -> None:
        """Add the problems of validation, except those that follow from others."""
        for problem in error.problems:
            self.absent.pop(problem.key, None)
            if isinstance(error.__cause__, ValidationError):  # the type is wrong, with quotes or without
                self.unquoted.pop(problem.key, None)
            if not any(problem.depends_on(key) for key in self.uncertain if key):
                self.problems.append(problem)

    def _fix(self, message: str) -> bool:
        """Fix the argument that Hydra's message names. False if it names none."""
        from sftlab.validation.sftconfig import unknown_field

        added = re.search(r"An item is already at '([^']+)'", message)
        if added and (argument := self._argument(f"+{added[1]}")):
            self.problems.append(problem_of(argument, "is set already", f"write {shown(argument[1:])}"))
            self.fixed[self.fixed.index(argument)] = argument[1:]
            return True
        missing = re.search(r"Could not override '([^']+)'", message)
        argument = self._argument(missing[1]) if missing else None
        if argument is None:
            return False
        key = argument.partition("=")[0]
        self.fixed.remove(argument)
        unset = problem_of(argument, "is not set yet", f"write {shown(f'+{argument}')}")
        if key.startswith("train.extra."):  # its value takes seconds to check
            self.problems.append(unknown_field(key.removeprefix("train.extra.")) or unset)
        elif FREE_KEYS.match(key.partition("@")[2] or key):
            self.absent[key] = unset
            self.fixed.append(f"+{argument}")
        elif key.startswith("hydra."):
            unknown = problem_of(argument, "no such key", f"`{PROGRAM} --cfg hydra` lists Hydra's keys")
            code = problem_of(argument, NAMES_CODE, "leave it out")
            self.problems.append(code if key.endswith("._target_") else unknown)
        else:
            section = key.rpartition(".")[0].replace("eval.dataset", "dataset@eval.dataset")
            message = f"the chosen {section} has no such key"
            self.problems.append(problem_of(argument, message, f"choose another by {section}=…"))
            self.uncertain.add(key)
        return True

    def _argument(self, key: str) -> str | None:
        """The argument that sets a key."""
        return next((argument for argument in self.fixed if argument.partition("=")[0] == key), None)


def _in_one_line(error: Exception) -> Problem:
    """Hydra's own message in one line."""
    text = re.sub(r"\s*\n\s*", "; ", str(error).split("Config search path:")[0].strip()).removesuffix("; ")
    remedy = "" if ";" in text else f"`{PROGRAM} --cfg all` lists all keys, with values that fit"
    return Problem("", None, text, remedy)


def _unreadable(argument: str, *, sweep: bool) -> tuple[Problem, str | None]:
    """The problem of an argument that Hydra's grammar rejects, and the intended argument if it is known."""
    from sftlab.validation.keys import invalid_name, nearest

    key, equal, value = argument.partition("=")
    if not key.strip("+ "):
        return problem_of(argument, "has no key", "write KEY=VALUE"), None
    if not equal:
        return problem_of(argument, "is not KEY=VALUE", "write KEY=VALUE"), None
    plain = key.strip().lstrip("+")
    if not is_key(plain):
        return problem_of(argument, "no such key", nearest(plain)), None
    if value.strip()[:1] in ("[", "{") and value.strip()[-1:] not in ("]", "}") and refusal(plain, value):
        closing = {"[": "]", "{": "}"}[value.strip()[0]]
        return problem_of(argument, "cannot be parsed", f"write KEY=VALUE with {closing} at the end of the value"), None
    if sweep and re.search(r"(^|,)\s*(,|$)", value) and not re.search(r"['\"(\[{]", value):
        items = [item.strip() for item in value.split(",") if item.strip()]
        several = override(key.strip(), ",".join(items), sweep=True) if items else None
        return problem_of(
            argument, "has an empty value between its commas", f"write {shown(several or 'KEY=VALUE')}"
        ), several
    if wants_list(plain) and re.fullmatch(r"\(.*\)", value.strip()):
        value = f"[{value.strip()[1:-1]}]"
    intended = override(key.strip(), value, sweep=sweep)
    is_text = not sweep and not wants_list(plain) and value.strip()[:1] not in ("[", "{")
    if is_text and (reason := refusal(plain, value)):
        return invalid_name(value) if plain == "name" else Problem(plain, repr(value), reason), None
    if intended is None:
        remedy = "write it in a YAML file, and add its folder with --config-dir"
        return problem_of(argument, "cannot be parsed on a command line", remedy), None
    return problem_of(argument, "cannot be parsed without quotes", f"write {shown(intended)}"), intended


def _unfit(argument: str, read: Override, composer: Composer, *, sweep: bool) -> tuple[Problem | None, str | None]:
    """The problem of an argument that Hydra can parse, None without one, and the intended argument if it is known."""
    from sftlab.validation.keys import closest, nearest

    key = str(read.key_or_group)
    if not key:
        return problem_of(argument, "has no key", "write KEY=VALUE"), None
    if key.startswith("hydra.sweeper.params"):
        axis = key.removeprefix("hydra.sweeper.params").lstrip(".") or "KEY"
        values = argument.partition("=")[2].strip("'\"")
        swept = f"-m {shown(f'{axis}={values}')}" if axis != "KEY" else "-m KEY=VALUE1,VALUE2"
        return problem_of(argument, "is for files", f"on a command line write {swept}"), None
    choices = composer.choices(key) if not read.is_delete() else []
    if read.is_sweep_override() and key.startswith("hydra"):
        single = None if choices else override(argument.partition("=")[0], argument.partition("=")[2])
        return problem_of(argument, "takes one value", f"write {shown(single or f'{key}=VALUE')}"), single
    if read.is_sweep_override() and not sweep:
        return _several(argument, is_group=bool(choices)), None
    if choices and not key.startswith("hydra"):
        return _unfit_choice(argument, read, composer, choices)
    if choices or is_key(key):
        return None, argument
    if re.match(r"(eval\.)?dataset\.split\.", key):
        return problem_of(argument, "no such key", "the splits are train, validation and test"), None
    guess = closest(key)
    intended = argument.replace(key, guess, 1).lstrip("+") if guess and not read.is_sweep_override() else None
    return problem_of(argument, "no such key", nearest(key)), intended


def _unfit_choice(
    argument: str, read: Override, composer: Composer, choices: Sequence[str]
) -> tuple[Problem | None, str | None]:
    """The problem of an argument that chooses a file of a group, None without one, and the intended argument."""
    key, value = str(read.key_or_group), read.value()
    values = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    names = [str(name) if isinstance(name, str | int) and not isinstance(name, bool) else None for name in values]
    is_list = isinstance(value, list) and key not in OPTIONAL_GROUPS
    if (is_list or None in names) and not (value is None and read.package):
        return problem_of(argument, "a group needs one choice", f"there are {', '.join(choices)}"), None
    if unknown := [name for name in names if name and not _exists(composer, key, name, choices)]:
        hint = ""
        if close := difflib.get_close_matches(unknown[0], choices, n=1):
            hint = f"did you mean {f'+{key}={close[0]}' if key in OPTIONAL_GROUPS else close[0]}? "
        return problem_of(argument.lstrip("+"), "no such choice", f"{hint}there are {', '.join(choices)}"), None
    if key in OPTIONAL_GROUPS and not read.is_add():
        return problem_of(argument, "is added to the defaults", f"write {shown(f'+{argument}')}"), f"+{argument}"
    if read.is_add() and not read.is_force_add() and key in composer.default_groups and not read.package:
        return problem_of(argument, "has a choice already", f"write {shown(argument[1:])}"), argument[1:]
    return None, argument


def _exists(composer: Composer, group: str, name: str, choices: Sequence[str]) -> bool:
    folder, _, leaf = name.removesuffix(".yaml").rpartition("/")
    return leaf in (composer.choices(f"{group}/{folder}") if folder else choices)


def _several(argument: str, *, is_group: bool) -> Problem:
    """The problem of an argument with several values in a single run."""
    argument = re.sub(r'"(~[^",]*)"', r"\1", argument)  # the user did not type these quotes
    key, _, value = argument.partition("=")
    if is_group:
        return problem_of(argument, "a group needs one choice", "add -m to run each of them")
    text = "".join(letters(value)) or value if key.endswith("dataset.choices") else value
    single = override(key, text)
    if single and wants_list(key):
        return problem_of(argument, "is not a list", f"write {shown(single)}")
    fix = f"write {shown(single)} for one value, or " if single and refusal(key, value) is None else ""
    return problem_of(argument, "has several values", f"{fix}add -m to run each of them")
