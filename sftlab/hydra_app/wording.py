"""Command lines that cannot be carried out: what is wrong with each argument, and what to write instead."""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from hydra import __version__ as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import (
    create_automatic_config_search_path,
    detect_calling_file_or_module_from_task_function,
    get_args_parser,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem
from sftlab.runtime.modes import MODES
from sftlab.validation.overrides import SUFFIXES, letters, override, parsed, refusal, shown, wants_list, with_home

# Dictionaries that take keys of the user's choosing.
FREE = re.compile(r"train\.(extra|lr_scheduler_kwargs)\.|(eval\.)?dataset\.split\.(train|validation|test)$")
COMPOSITION = (TypeError, ValueError, AttributeError, AssertionError)  # that Hydra raises about an override
ADDED = ("experiment", "debug")  # groups without a default
# Modes that work on files or folders, and the key for these.
FILES = {"compare": "eval.predictions", "evaluate": "eval.name_or_path", "report": "hydra.run.dir"}
PAIR = ('"BASE.jsonl"', '"TUNED.jsonl"')
PROGRAM = "python -m sftlab"


def options_first(given: Sequence[str], conf: Path) -> list[str]:
    """The arguments in the order that Hydra's parser takes them: options, then overrides; ``~`` is quoted.

    Raises:
        ConfigError: an argument is neither an option nor KEY=VALUE.
    """
    if "--version" in given:
        print(f"sftlab {metadata.version('sftlab')} (Hydra {hydra_version})")
        sys.exit(0)
    options, overrides, problems = _sorted(given)
    if problems := [*_commands(overrides, options, conf), *problems]:
        raise ConfigError(*problems)
    _options([*options, *overrides])
    return [*options, *map(with_home, overrides)]


def _sorted(given: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Options with their values, overrides, and what is wrong with options that do not exist."""
    actions = {name: action for action in get_args_parser()._actions for name in action.option_strings}
    options, overrides, problems = [], [], []
    left = list(given)
    while left:
        argument = left.pop(0)
        action = actions.get(argument.partition("=")[0] if argument.startswith("--") else argument)
        if action is not None:
            options.append(argument)
            takes_next = action.nargs is None or (left and action.choices and left[0] in action.choices)
            if left and takes_next and "=" not in argument:
                options.append(left.pop(0))
        elif argument.partition("=")[0] == "--mode" and (argument.partition("=")[2] or " ".join(left[:1])) in MODES:
            overrides.append(argument.partition("=")[2] or left.pop(0))  # which is read as a word
        elif argument.startswith("-") and argument != "--":
            word = left and "=" not in left[0] and not left[0].startswith("-") and "=" not in argument
            problems.append(_option(argument, left.pop(0) if word else None))
        elif argument != "--":
            overrides.append(argument)
    return options, overrides, problems


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{PROGRAM} --help` shows how commands are written")


def _options(given: Sequence[str]) -> Namespace:
    parser = get_args_parser()
    parser.__class__, parser.allow_abbrev = _Parser, False
    return parser.parse_args(list(given))


def _option(argument: str, after: str | None) -> str:
    """What to write for an option that does not exist, with the word after it."""
    from sftlab.validation.keys import known_keys, nearest

    name, equal, value = argument.partition("=")
    key, value = name.strip("-").replace("-", "_"), value if equal else after or "true"
    if key in set(known_keys(Config)):
        return f"{argument}: is not an option; write {shown(override(key, value) or f'{key}=VALUE')}"
    known = [name for action in get_args_parser()._actions for name in action.option_strings]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return f"{argument}: no such option; did you mean {close[0]}?"
    return f"{argument}: no such option; settings are written as KEY=VALUE: {nearest(key)}"


def _commands(arguments: Sequence[str], options: Sequence[str], conf: Path) -> Iterator[str]:
    """What to write for arguments that are not KEY=VALUE, such as ``compare a.jsonl b.jsonl``."""
    if name := _named(arguments):
        words: list[str] = []
        settings: list[str] = []
        for argument in arguments:
            (words if _is_word(argument) or not _is_setting(argument, conf) else settings).append(argument)
        if name in words:
            words.remove(name)
        wrong = [argument for argument in words if not _is_word(argument) and not _is_file(argument)]
        words = [argument for argument in words if argument not in wrong]
        command = _command(name, words, [*settings, *wrong], options, conf)
        given = [argument for argument in arguments if argument in words or argument == name]
        yield f"{' '.join(given)}: is not KEY=VALUE; write {command}"
        return
    left, before = list(arguments), ""
    while left:
        spaced = re.match(r"([\w.@/+]+)( = | =|= )(?=[^= ])", " ".join(left[:3]))
        if spaced and left[0] in (spaced[1], f"{spaced[1]}="):
            taken = left[: 1 + spaced[2].count(" ")]
            key, value = spaced[1], taken[-1].lstrip("=")
            yield f"{' '.join(taken)}: has spaces around its =; write {shown(override(key, value) or f'{key}=VALUE')}"
        else:
            taken = left[:1]
            if _is_word(left[0]):
                yield _word(left[0], before, conf)
        before, left = taken[-1] if "=" in taken[-1] else "", left[len(taken) :]


def _named(arguments: Sequence[str]) -> str | None:
    """The mode, or another word for a command, that single words of a command line ask for; None if they do not."""
    if arguments and arguments[0] in (*MODES, "help", "version", "sweep", "run"):
        return arguments[0]
    words = [argument for argument in arguments if _is_word(argument)]
    if not words or any(argument[:1] == "=" or argument[-1:] == "=" for argument in arguments):
        return None
    if name := next((word for word in words if word in MODES), None):
        return name
    if not all(map(_is_file, words)):
        return None
    set_to = next((text.partition("=")[2] for text in arguments if text.startswith("mode=")), None)
    if set_to in FILES:
        return set_to
    return "compare" if set_to is None and len(words) == 2 and all(word.endswith(SUFFIXES) for word in words) else None


def _is_word(argument: str) -> bool:
    return "=" not in argument and not argument.startswith("~")


def _is_file(argument: str) -> bool:
    return argument.endswith(SUFFIXES) or os.path.exists(argument)  # which takes names of any length


def _is_setting(argument: str, conf: Path) -> bool:
    key, equal, _ = argument.partition("=")
    plain = key.lstrip("+~").partition("@")[0]
    return (bool(equal) or key.startswith("~")) and (_is_key(plain) or os.path.isdir(conf / plain))


def _command(name: str, words: list[str], settings: list[str], options: Sequence[str], conf: Path) -> str:
    if name in ("help", "version"):
        return f"{PROGRAM} --{name}"
    if name in MODES:
        settings = [f"mode={name}", *(setting for setting in settings if not setting.startswith("mode="))]
    several = name == "evaluate" and len(words) > 1
    files = FILES.get(name)
    if files == "eval.predictions":
        items = [QuotedString(_predictions(word), Quote.double).with_quotes() for word in words]
        settings.insert(1, f"{files}=[{','.join(items if len(words) == 2 else PAIR)}]")
    elif several:
        items = [(override(str(files), word) or "=FOLDER").partition("=")[2] for word in words]
        settings.insert(1, f"{files}={','.join(items)}")
    elif files:
        settings.insert(1, override(files, words[0] if len(words) == 1 else "FOLDER") or f'{files}="FOLDER"')
    else:
        at = 1 if name in MODES else 0
        settings[at:at] = [_choice(word, conf) or "KEY=VALUE" for word in words]
    swept = any((read := parsed(setting)) and read.is_sweep_override() for setting in settings)
    asked = any(option in ("-m", "--multirun") for option in options)
    others = [option for option in options if option not in ("-m", "--multirun")]
    jobs = name not in MODES or MODES[name].has_jobs
    flag = ["-m"] if jobs and (asked or swept or several or name == "sweep") else []
    return " ".join([PROGRAM, *map(shown, [*flag, *others, *settings])])


def _predictions(word: str) -> str:
    """The file of answers in a run's folder, for the folder."""
    file = Path(word) / "predictions" / "finetuned.jsonl"
    return str(file) if file.is_file() else word


def _word(word: str, before: str, conf: Path) -> str:
    """What to write for a single word: a key without a value, an option of a group, or part of the value before it."""
    from sftlab.validation.keys import known_keys

    if word in set(known_keys(Config)):
        switch = refusal(word, True) is None and refusal(word, "x") is not None
        return f"{word}: has no value; write {word}={f'true or {word}=false' if switch else 'VALUE'}"
    if choice := _choice(word, conf):
        return f"{word}: is not KEY=VALUE; write {shown(choice)}"
    key, equal, value = before.partition("=")
    apart = _is_file(word) and not os.path.exists(f"{value} {word}")  # a file of its own
    fits = equal and not apart and refusal(key, f"{value} {word}") is None
    joined = override(key, f"{value} {word}") if fits else None
    if joined and not os.path.isdir(conf / key.lstrip("+").partition("@")[0]):
        return f"{word}: is not KEY=VALUE; if it belongs to {before}, write {shown(joined)}"
    return f"{word}: is not KEY=VALUE; `{PROGRAM} --help` shows how settings are written"


def _choice(word: str, conf: Path) -> str | None:
    for group in ("experiment", "dataset", "model", "peft", "instance", "eval", "tracking", "debug", "train"):
        if os.path.isfile(conf / group / f"{word}.yaml"):
            return f"{'+' * (group in ADDED)}{group}={word}"
    return None


class _Composer:
    """The configurations that Hydra sees on a command line: those of sftlab, ``--config-dir`` and hydra.searchpath."""

    def __init__(self, options: Namespace, task: Callable[..., Any], conf: Path) -> None:
        file, module = detect_calling_file_or_module_from_task_function(task)
        path = create_automatic_config_search_path(file, module, options.config_path or str(conf))
        if options.config_dir:
            folder = Path(options.config_dir).absolute()
            path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema", path=None))
        GlobalHydra.instance().clear()
        loader = Hydra.create_main_hydra2("sftlab", path).config_loader
        GlobalHydra.instance().clear()  # Hydra refuses to start twice in a process
        assert isinstance(loader, ConfigLoaderImpl)
        self.loader, self.name = loader, options.config_name or "config"
        self.own = bool(options.config_dir or options.config_path or options.config_name)
        self.searched: list[str] = []

    def choices(self, group: str) -> list[str]:
        """List the options of a group; empty if the group does not exist."""
        return self.loader.get_group_options(group, config_name=self.name, overrides=self.searched)

    def sweeps(self, overrides: dict[str, Override | None]) -> bool:
        """Whether hydra.mode, from the command line or a chosen file, asks for a sweep."""
        chosen = [text for text, read in overrides.items() if read and read.key_or_group in ("hydra.mode", *ADDED)]
        if not chosen and not self.own:
            return False
        try:
            config = self.loader.load_configuration(self.name, chosen, RunMode.RUN)
        except (HydraException, *COMPOSITION):
            return False
        return bool(config.hydra.mode == RunMode.MULTIRUN)

    def compose(self, overrides: list[str]) -> DictConfig:
        """The configuration with these overrides, without Hydra's own part."""
        config = self.loader.load_configuration(self.name, overrides, RunMode.RUN)
        return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def explain(error: Exception, given: Sequence[str], task: Callable[..., Any], conf: Path) -> str:
    """Hydra's error about a command line as argument, reason and remedy, together with all else that is wrong."""
    from sftlab.validation.keys import SECRET, secret
    from sftlab.validation.sftconfig import unknown_field
    from sftlab.validation.validate import validate

    options = _options(given)
    if options.config_dir and not Path(options.config_dir).is_dir():
        return f"--config-dir {options.config_dir}: config directory {options.config_dir!r} not found; check the path"
    composer = _Composer(options, task, conf)
    overrides = {argument: parsed(argument) for argument in options.overrides}
    composer.searched = [argument for argument, read in overrides.items() if read and read.is_hydra_override()]
    sweep = bool(options.multirun) or composer.sweeps(overrides)
    found: list[Problem | str] = []
    fixed: list[str] = []  # the command line with the remedies applied, for what is wrong besides
    unquoted: dict[str, str] = {}  # keys whose values need quotes, if a text is what they take
    doubtful: set[str] = set()  # keys whose meant value is not known, so that nothing is said that depends on them
    for argument, read in overrides.items():
        key = argument.partition("=")[0].lstrip("+~")
        if SECRET.search(key):
            found.append(secret(key))
            continue
        problem, meant = (
            _unreadable(argument, sweep=sweep) if read is None else _misfit(argument, read, composer, sweep=sweep)
        )
        if problem and read is None and meant is not None:
            unquoted[key] = problem
        elif problem:
            found.append(problem)
        if meant is None or (problem and read is not None) or (read and read.is_sweep_override()):
            doubtful.update((key.partition("@")[2] or key, (meant or "").partition("=")[0].lstrip("+")))
        if meant is not None and not (read and read.is_sweep_override()):
            fixed.append(meant)
    plugin = re.search(r"Could not find '(hydra/\w+)/(optuna|ray|joblib|submitit)(\w*)'", str(error))
    if plugin:
        group, name, kind = plugin.groups()
        extra = name.replace("submitit", "slurm")
        found.append(f"{group}={name}{kind}: is not installed; pip install 'sftlab[{extra}]'")
        fixed = [argument for argument in fixed if not argument.startswith(f"{group}=")]
    absent: dict[str, str] = {}  # keys that are added with a +
    while True:
        try:
            validate(composer.compose(fixed))
        except ConfigError as wrong:
            for invalid in wrong.problems:
                absent.pop(invalid.key, None)
                if isinstance(wrong.__cause__, ValidationError):  # the value has the wrong type, with quotes or without
                    unquoted.pop(invalid.key, None)
                if not any(invalid.depends_on(key) for key in doubtful if key):
                    found.append(invalid)
        except (HydraException, *COMPOSITION) as wrong:
            twice = re.search(r"An item is already at '([^']+)'", str(wrong))
            if again := next((one for one in fixed if twice and one.partition("=")[0] == f"+{twice[1]}"), None):
                found.append(f"{again}: is there already; write {shown(again[1:])}")
                fixed[fixed.index(again)] = again[1:]
                continue
            missing = re.search(r"Could not override '([^']+)'", str(wrong))
            culprit = next((one for one in fixed if missing and one.partition("=")[0] == missing[1]), None)
            if culprit:
                key = culprit.partition("=")[0]
                fixed.remove(culprit)
                if key.startswith("train.extra."):  # its value takes seconds to check
                    unknown = unknown_field(key.removeprefix("train.extra."))
                    found.append(unknown or f"{culprit}: is not set yet; write {shown(f'+{culprit}')}")
                elif FREE.match(key):
                    absent[key] = f"{culprit}: is not set yet; write {shown(f'+{culprit}')}"
                    fixed.append(f"+{culprit}")
                elif key.startswith("hydra."):
                    found.append(
                        f"{culprit}: no code is run that a configuration names; leave it out"
                        if key.endswith("._target_")
                        else f"{culprit}: no such key; `{PROGRAM} --cfg hydra` lists Hydra's keys"
                    )
                else:
                    section = key.rpartition(".")[0].replace("eval.dataset", "dataset@eval.dataset")
                    found.append(f"{culprit}: the chosen {section} has no such key; choose another by {section}=…")
                    doubtful.add(key)
                continue
            if not found and not absent and not unquoted:
                return _hydras(error)
        break
    found = [*unquoted.values(), *found, *absent.values()]
    return str(ConfigError(*found)) if found else _hydras(error)


def _hydras(error: Exception) -> str:
    """Hydra's own words in one line."""
    text = re.sub(r"\s*\n\s*", "; ", str(error).split("Config search path:")[0].strip()).removesuffix("; ")
    return text if ";" in text else f"{text}; `{PROGRAM} --cfg all` lists all keys, with values that fit"


def _unreadable(argument: str, *, sweep: bool) -> tuple[str, str | None]:
    """An argument that Hydra's grammar does not take: the problem, and what was meant if that is known."""
    from sftlab.validation.keys import invalid_name, nearest

    key, equal, value = argument.partition("=")
    if not key.strip("+ "):
        return f"{argument}: has no key; write KEY=VALUE", None
    if not equal:
        return f"{argument}: is not KEY=VALUE; write KEY=VALUE", None
    plain = key.strip().lstrip("+")
    if not _is_key(plain):
        return f"{argument}: no such key; {nearest(plain)}", None
    if value.strip()[:1] in ("[", "{") and value.strip()[-1:] not in ("]", "}") and refusal(plain, value):
        closing = {"[": "]", "{": "}"}[value.strip()[0]]
        return f"{argument}: cannot be read; write KEY=VALUE with {closing} at the end of the value", None
    if sweep and re.search(r"(^|,)\s*(,|$)", value) and not re.search(r"['\"(\[{]", value):
        items = [item.strip() for item in value.split(",") if item.strip()]
        several = override(key.strip(), ",".join(items), sweep=True) if items else None
        return f"{argument}: has an empty value between its commas; write {shown(several or 'KEY=VALUE')}", several
    if wants_list(plain) and re.fullmatch(r"\(.*\)", value.strip()):
        value = f"[{value.strip()[1:-1]}]"
    meant = override(key.strip(), value, sweep=sweep)
    if not sweep and not wants_list(plain) and value.strip()[:1] not in ("[", "{") and (no := refusal(plain, value)):
        return str(invalid_name(value)) if plain == "name" else f"{plain}={value!r}: {no}", None
    if meant is None:
        return (
            f"{argument}: cannot be read on a command line; write it in a YAML file and add that by --config-dir",
            None,
        )
    return f"{argument}: cannot be read without quotes; write {shown(meant)}", meant


def _misfit(argument: str, read: Override, composer: _Composer, *, sweep: bool) -> tuple[str | None, str | None]:
    """An argument that Hydra can read: its problem if it has one, and what was meant as far as that is known."""
    from sftlab.validation.keys import closest, nearest

    key, value = str(read.key_or_group), read.value()
    if not key:
        return f"{argument}: has no key; write KEY=VALUE", None
    if key.startswith("hydra.sweeper.params"):
        axis = key.removeprefix("hydra.sweeper.params").lstrip(".") or "KEY"
        given = argument.partition("=")[2].strip("'\"")
        swept = f"-m {shown(f'{axis}={given}')}" if axis != "KEY" else "-m KEY=VALUE1,VALUE2"
        return f"{argument}: is for files; on a command line write {swept}", None
    choices = composer.choices(key) if not read.is_delete() else []
    if read.is_sweep_override() and key.startswith("hydra"):
        as_one = None if choices else override(argument.partition("=")[0], argument.partition("=")[2])
        return f"{argument}: takes one value; write {shown(as_one or f'{key}=VALUE')}", as_one
    if read.is_sweep_override() and not sweep:
        return _several(argument, group=bool(choices)), None
    if choices and not key.startswith("hydra"):
        named = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
        names = [str(name) if isinstance(name, str | int) and not isinstance(name, bool) else None for name in named]
        many = isinstance(value, list) and key not in ADDED
        if (many or None in names) and not (value is None and read.package):
            return f"{argument}: a group needs one choice; there are {', '.join(choices)}", None
        wrong = [name for name in names if name and not _is_choice(composer, key, name, choices)]
        if wrong:
            close = difflib.get_close_matches(wrong[0], choices, n=1)
            written = f"+{key}={close[0]}" if close and key in ADDED else close[0] if close else ""
            hint = f"did you mean {written}? " if close else ""
            return f"{argument.lstrip('+')}: no such choice; {hint}there are {', '.join(choices)}", None
        if key in ADDED and not read.is_add():
            return f"{argument}: is added to the defaults; write {shown(f'+{argument}')}", f"+{argument}"
        if read.is_add() and not read.is_force_add() and key in _defaults(composer) and not read.package:
            return f"{argument}: has a choice already; write {shown(argument[1:])}", argument[1:]
        return None, argument
    if choices or _is_key(key):
        return None, argument
    if re.match(r"(eval\.)?dataset\.split\.", key):
        return f"{argument}: no such key; the splits are train, validation and test", None
    guess = closest(key)
    meant = argument.replace(key, guess, 1).lstrip("+") if guess and not read.is_sweep_override() else None
    return f"{argument}: no such key; {nearest(key)}", meant


def _is_key(key: str) -> bool:
    from sftlab.validation.keys import known_keys

    return key in set(known_keys(Config)) or key.startswith("hydra") or bool(FREE.match(key)) or "@" in key


def _is_choice(composer: _Composer, group: str, name: str, choices: list[str]) -> bool:
    folder, _, leaf = name.removesuffix(".yaml").rpartition("/")
    return leaf in (composer.choices(f"{group}/{folder}") if folder else choices)


def _defaults(composer: _Composer) -> set[str]:
    """The groups that have a choice without being asked."""
    return {str(group) for group in composer.loader.compute_defaults_list(
        composer.name, composer.searched, RunMode.RUN).overrides.known_choices}  # fmt: skip


def _several(argument: str, *, group: bool) -> str:
    argument = re.sub(r'"(~[^",]*)"', r"\1", argument)  # quoted by with_home
    key, _, value = argument.partition("=")
    if group:
        return f"{argument}: a group needs one choice; add -m to run each of them"
    as_one = (
        override(key, "".join(letters(value)) or value) if key.endswith("dataset.choices") else override(key, value)
    )
    if as_one and wants_list(key):
        return f"{argument}: is not a list; write {shown(as_one)}"
    text = f"write {shown(as_one)} for one value, or " if as_one and refusal(key, value) is None else ""
    return f"{argument}: has several values; {text}add -m to run each of them"
