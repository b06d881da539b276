"""Sort the arguments of a command line, and explain those that are neither an option nor KEY=VALUE."""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from hydra import __version__ as hydra_version
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Quote, QuotedString

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem
from sftlab.hydra_app.compose import CONF
from sftlab.runtime.modes import MODES
from sftlab.validation.overrides import SUFFIXES, override, parsed, refusal, repeated, shown, with_home

PROGRAM = "python -m sftlab"
OPTIONAL_GROUPS = ("experiment", "debug")  # groups without a default, which are added with +
# Dictionaries in which users may add keys.
FREE_KEYS = re.compile(
    r"train\.(extra|lr_scheduler_kwargs)\.|(eval\.)?dataset\.(split\.(train|validation|test)$|columns\.|sources\.)"
    r"|eval\.contenders(\.|$)|eval\.guards\.[\w-]+($|\.)"
)
PLACEHOLDERS = ('"BASE.jsonl"', '"TUNED.jsonl"')


def options_first(arguments: Sequence[str]) -> list[str]:
    """Sort arguments as Hydra's parser accepts them, options before overrides, and quote ``~``.

    Raises:
        ConfigError: an argument is neither an option nor KEY=VALUE.
    """
    if "--version" in arguments:
        print(f"sftlab {metadata.version('sftlab')} (Hydra {hydra_version})")
        sys.exit(0)
    options, overrides, problems = _sorted(arguments)
    for argument in overrides:
        for name in repeated(argument):
            problems.append(Problem(argument.partition("=")[0], None, f"has the key {name!r} twice", "rename one"))
    if problems := [*_words(overrides, options), *problems]:
        raise ConfigError(*problems)
    parse_options([*options, *overrides])
    return [*options, *map(with_home, overrides)]


def parse_options(arguments: Sequence[str]) -> Namespace:
    """Parse arguments as Hydra does.

    Raises:
        ConfigError: an option lacks its value, or has an invalid one.
    """
    parser = get_args_parser()
    parser.__class__, parser.allow_abbrev = _Parser, False
    return parser.parse_args(list(arguments))


def is_key(key: str) -> bool:
    """Whether a key of sftlab or Hydra has this name, or could have it."""
    from sftlab.validation.keys import known_keys

    return key in set(known_keys(Config)) or key.startswith("hydra") or bool(FREE_KEYS.match(key)) or "@" in key


def problem_of(argument: str, message: str, remedy: str = "") -> Problem:
    """Return a problem of an argument, with its key and value as they were typed."""
    key, equal, value = argument.partition("=")
    return Problem(key, value if equal else None, message, remedy)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem("", None, message, f"`{PROGRAM} --help` shows how commands are written"))


def _sorted(arguments: Sequence[str]) -> tuple[list[str], list[str], list[Problem]]:
    """Options with their values, overrides, and the problems of options that do not exist."""
    actions = {name: action for action in get_args_parser()._actions for name in action.option_strings}
    options, overrides = list[str](), list[str]()
    problems: list[Problem] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equal, value = argument.partition("=")
        action = actions.get(name if argument.startswith("--") else argument)
        if action is not None:
            options.append(argument)
            has_value = action.nargs is None or (rest and action.choices and rest[0] in action.choices)
            if rest and has_value and not equal:
                options.append(rest.pop(0))
        elif name == "--mode" and (value or " ".join(rest[:1])) in MODES:
            overrides.append(value or rest.pop(0))  # treated like the mode as a single word
        elif argument.startswith("-") and argument != "--":
            is_value = rest and "=" not in rest[0] and not rest[0].startswith("-") and not equal
            problems.append(_unknown_option(argument, rest.pop(0) if is_value else None))
        elif argument != "--":
            overrides.append(argument)
    return options, overrides, problems


def _unknown_option(argument: str, next_word: str | None) -> Problem:
    """The problem of an option that does not exist, which may be followed by a value."""
    from sftlab.validation.keys import known_keys, nearest

    name, equal, value = argument.partition("=")
    key, value = name.strip("-").replace("-", "_"), value if equal else next_word or "true"
    if key in set(known_keys(Config)):
        return problem_of(argument, "is not an option", f"write {shown(override(key, value) or f'{key}=VALUE')}")
    known = [name for action in get_args_parser()._actions for name in action.option_strings]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return problem_of(argument, "no such option", f"did you mean {close[0]}?")
    return problem_of(argument, "no such option", f"settings are written as KEY=VALUE: {nearest(key)}")


def _words(arguments: Sequence[str], options: Sequence[str]) -> Iterator[Problem]:
    """The problems of arguments that are not KEY=VALUE, such as ``compare a.jsonl b.jsonl``."""
    if name := _command_word(arguments):
        words: list[str] = []
        settings: list[str] = []
        for argument in arguments:
            (words if _is_word(argument) or not _is_setting(argument) else settings).append(argument)
        if name in words:
            words.remove(name)
        wrong = [argument for argument in words if not _is_word(argument) and not _is_file(argument)]
        words = [argument for argument in words if argument not in wrong]
        typed = [argument for argument in arguments if argument in words or argument == name]
        command = _command(name, words, [*settings, *wrong], options)
        yield Problem(" ".join(typed), None, "is not KEY=VALUE", f"write {command}")
        return
    rest, before = list(arguments), ""
    while rest:
        spaced = re.match(r"([\w.@/+]+)( = | =|= )(?=[^= ])", " ".join(rest[:3]))
        if spaced and rest[0] in (spaced[1], f"{spaced[1]}="):
            taken = rest[: 1 + spaced[2].count(" ")]
            key, value = spaced[1], taken[-1].lstrip("=")
            yield Problem(
                " ".join(taken),
                None,
                "has spaces around its =",
                f"write {shown(override(key, value) or f'{key}=VALUE')}",
            )
        else:
            taken = rest[:1]
            if _is_word(rest[0]):
                yield _single_word(rest[0], before)
        before, rest = taken[-1] if "=" in taken[-1] else "", rest[len(taken) :]


def _command_word(arguments: Sequence[str]) -> str | None:
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
    mode = next((text.partition("=")[2] for text in arguments if text.startswith("mode=")), None)
    if mode in MODES and MODES[mode].works_on:
        return mode
    return "compare" if mode is None and len(words) == 2 and all(word.endswith(SUFFIXES) for word in words) else None


def _is_word(argument: str) -> bool:
    return "=" not in argument and not argument.startswith("~")


def _is_file(argument: str) -> bool:
    return argument.endswith(SUFFIXES) or os.path.exists(argument)  # Path.exists fails for very long names


def _is_setting(argument: str) -> bool:
    key, equal, _ = argument.partition("=")
    plain = key.lstrip("+~").partition("@")[0]
    return (bool(equal) or key.startswith("~")) and (is_key(plain) or os.path.isdir(CONF / plain))


def _command(name: str, words: Sequence[str], settings: list[str], options: Sequence[str]) -> str:
    """The command line that single words ask for."""
    if name in ("help", "version"):
        return f"{PROGRAM} --{name}"
    mode = MODES.get(name)
    if mode is not None:
        settings = [f"mode={name}", *(setting for setting in settings if not setting.startswith("mode="))]
    key = "" if mode is None else mode.works_on
    several = key == "eval.name_or_path" and len(words) > 1
    if key == "eval.predictions":
        files = [QuotedString(_predictions(word), Quote.double).with_quotes() for word in words]
        settings.insert(1, f"{key}=[{','.join(files if len(words) == 2 else PLACEHOLDERS)}]")
    elif several:
        models = [(override(key, word) or "=FOLDER").partition("=")[2] for word in words]
        settings.insert(1, f"{key}={','.join(models)}")
    elif key:
        settings.insert(1, override(key, words[0] if len(words) == 1 else "FOLDER") or f'{key}="FOLDER"')
    else:
        start = 0 if mode is None else 1
        settings[start:start] = [_choice(word) or "KEY=VALUE" for word in words]
    swept = any((read := parsed(setting)) and read.is_sweep_override() for setting in settings)
    asked = any(option in ("-m", "--multirun") for option in options)
    others = [option for option in options if option not in ("-m", "--multirun")]
    can_sweep = mode is None or mode.has_jobs
    flag = ["-m"] if can_sweep and (asked or swept or several or name == "sweep") else []
    return " ".join([PROGRAM, *map(shown, [*flag, *others, *settings])])


def _predictions(path: str) -> str:
    """The file of predictions in a run's folder; any other path unchanged."""
    file = Path(path) / "predictions" / "finetuned.jsonl"
    return str(file) if file.is_file() else path


def _single_word(word: str, before: str) -> Problem:
    """The problem of a single word: a key without a value, an option of a group, or part of the value before it."""
    from sftlab.validation.keys import known_keys

    if word in set(known_keys(Config)):
        is_switch = refusal(word, True) is None and refusal(word, "x") is not None
        return Problem(word, None, "has no value", f"write {word}={f'true or {word}=false' if is_switch else 'VALUE'}")
    if choice := _choice(word):
        return Problem(word, None, "is not KEY=VALUE", f"write {shown(choice)}")
    key, equal, value = before.partition("=")
    is_separate = _is_file(word) and not os.path.exists(f"{value} {word}")
    fits = equal and not is_separate and refusal(key, f"{value} {word}") is None
    joined = override(key, f"{value} {word}") if fits else None
    if joined and not os.path.isdir(CONF / key.lstrip("+").partition("@")[0]):
        return Problem(word, None, "is not KEY=VALUE", f"if it belongs to {before}, write {shown(joined)}")
    return Problem(word, None, "is not KEY=VALUE", f"`{PROGRAM} --help` shows how settings are written")


def _choice(word: str) -> str | None:
    """The override that chooses a config file of this name; None if there is no such file."""
    for group in ("experiment", "dataset", "model", "peft", "instance", "eval", "tracking", "debug", "train"):
        if os.path.isfile(CONF / group / f"{word}.yaml"):
            return f"{'+' * (group in OPTIONAL_GROUPS)}{group}={word}"
    return None
