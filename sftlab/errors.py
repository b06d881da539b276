"""Errors that a user can act on. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

# Names of environment variables whose values are secret.
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
LISTED = 20  # problems that the text of a ConfigError lists
# Names of configuration keys that may hold a secret, also misspelt ones: api_keyenv, apikey, hubtoken; not max_tokens.
_HIDDEN = (
    r"(?:(?:(?<![a-z])|api|access|auth|private)_?key(?!s|word|error)"
    r"|token(?!s|iz)|secret|passw|passphrase|credential)"
)
_HIDDEN_KEY = re.compile(_HIDDEN, re.IGNORECASE)
_HIDDEN_VALUE = re.compile(  # in an argument, or in a dictionary
    rf"""((?<![\w.])(?!(?:key|token)[=:])[\w.+~@]*{_HIDDEN}\w*["']?)"""
    r"""(?:(=)(?:"[^"]*"|'[^']*'|[^\s"'][^\s]*)|(:[ ]?)(?:"[^"]*"|'[^']*'|\[[^\]]*\]?|[^\s,}\])]+))""",
    re.IGNORECASE,
)
_HIDDEN_WORD = re.compile("key|token|secret|passw|passphrase|credential", re.IGNORECASE)  # faster
_QUOTES = "'\""
_HF_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def environment_secrets() -> dict[str, str]:
    """Return the secret environment variables whose values are long enough to be recognised in a text."""
    return {name: value for name, value in os.environ.items() if len(value) >= 8 and SECRET_NAME.search(name)}


def redacted(text: str, secrets: Mapping[str, str] | None = None) -> str:
    """Replace secrets in a text: values of secret environment variables by their names, hub tokens by ``hf_…``.

    ``secrets`` are those variables, for a caller with many texts.
    """
    for name, value in (environment_secrets() if secrets is None else secrets).items():
        text = text.replace(value, f"${name}")
    return _HF_TOKEN.sub("hf_…", text)


def discreet(text: str) -> str:
    """Replace secrets in a text, and the values of keys whose names look like those of secrets."""
    return redacted(_HIDDEN_VALUE.sub(r"\1\2\3…", text))


def shown(value: Any) -> str:
    """Write a value as on the command line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {shown(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else repr(value)


@dataclass(frozen=True)
class Problem:
    """One fault of the input: a configuration value, a file or a row.

    Attributes:
        key: dotted configuration key, or the place in a file (``rows.jsonl, row 41``); "" if the message names it.
        value: the value as it is written on the command line; None to leave it out.
        message: what is wrong.
        remedy: what to do about it; "" if the message says so already.
        keys: further configuration keys; a change of one of them could fix the problem too.
    """

    key: str
    value: str | None
    message: str
    remedy: str = ""
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = self.key if self.value is None else f"{self.key}={self.value}"
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}; {self.remedy}" if self.remedy else text

    def depends_on(self, key: str) -> bool:
        """Whether another value of this configuration key, or of a key in this section, could fix the problem."""
        own = [name for name in (self.key, *self.keys) if name]
        return any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in own)

    def redacted(self) -> Problem:
        """Return the problem without secrets, and without the values of keys whose names are those of secrets."""
        whole = str(self)
        hides = _HIDDEN_WORD.search(whole)
        if not hides and redacted(whole) == whole:
            return self
        value, hidden = self.value, None
        if value is not None and _HIDDEN_KEY.search(self.key.rpartition(".")[2]):
            hidden = re.compile(rf"(?<![\w.]){re.escape(value.strip(_QUOTES))}(?![\w.])")
            value = None

        def clean(text: str) -> str:
            if hidden is not None:
                text = hidden.sub("…", text)
            return discreet(text) if hides else redacted(text)

        value = None if value is None else clean(value)
        return replace(self, key=clean(self.key), value=value, message=clean(self.message), remedy=clean(self.remedy))


class SftlabError(Exception):
    """A failure that ends the command with ``exit_code``. The message has place, value and remedy, and no secret."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


class ConfigError(SftlabError):
    """Invalid input (configuration, data, files), detected before a model is loaded.

    ``problems`` are its records. ``str()`` is the text of a single problem, or a list of the first ``LISTED``.
    """

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        self.problems = tuple(dict.fromkeys(problem.redacted() for problem in problems))
        texts = list(dict.fromkeys(map(str, self.problems)))
        lines = [f"{len(texts):,} problems:", *(f"  - {text}" for text in texts[:LISTED])]
        if len(texts) > LISTED:
            lines.append(f"  … and {len(texts) - LISTED:,} more")
        super().__init__(texts[0] if len(texts) == 1 else "\n".join(lines))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Problem, ...]]:
        """Pickle the records: a launcher returns an exception of a job from another process."""
        return type(self), self.problems


class StageError(SftlabError):
    """A stage that started and failed."""


class OutOfMemoryError(StageError):
    """A stage that needed more memory than the machine has."""


def unfixable(error: ConfigError, swept: Iterable[str]) -> list[Problem]:
    """Return the problems of a sweep's first job that every other job has too.

    These are the problems that name a configuration key and depend on none of the ``swept`` keys, those that differ
    between jobs.
    """
    varied = list(swept)
    return [
        problem
        for problem in error.problems
        if (problem.key or problem.keys) and not any(map(problem.depends_on, varied))
    ]


def with_keys(error: ConfigError, *keys: str) -> list[Problem]:
    """Return the problems of a module that reads no configuration, with the keys whose change could fix them."""
    return [replace(problem, keys=(*problem.keys, *keys)) for problem in error.problems]


class PrunedError(StageError):
    """A job of a sweep was stopped because its peers are better (sweep.prune); not a failure."""


class PausedError(StageError):
    """A job of a sweep waits until its peers have trained as many of their steps (sweep.prune); not a failure."""


def to_json(error: SftlabError) -> dict[str, object]:
    """Convert an error to JSON values, for a child process to report it to its parent."""
    problems = [asdict(problem) for problem in error.problems] if isinstance(error, ConfigError) else []
    return {"type": type(error).__name__, "message": str(error), "problems": problems}


def from_json(values: Mapping[str, Any]) -> SftlabError:
    """Create the error that ``to_json`` converted; a StageError if its type is not one of this module."""
    if values["type"] == ConfigError.__name__ and values["problems"]:
        return ConfigError(*(Problem(**{**record, "keys": tuple(record["keys"])}) for record in values["problems"]))
    kinds = {kind.__name__: kind for kind in (SftlabError, StageError, OutOfMemoryError, PrunedError, PausedError)}
    return kinds.get(values["type"], StageError)(values["message"])


def advised(error: Exception, advice: Callable[[], str], otherwise: str) -> StageError:
    """Append ``advice()`` to the message of an error, or ``otherwise`` if computing the advice fails."""
    try:
        return StageError(f"{error}\n{advice()}")
    except Exception as failure:  # of any type: it must not hide the error
        reason = f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        return StageError(f"{error}\n{otherwise}\n(the memory that each change needs could not be estimated: {reason})")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which SLURM sends some time before SIGKILL: the command ends as with Ctrl-C, with exit code 143.

    Training uses that time to save a checkpoint.
    """
