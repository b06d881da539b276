"""Code that the configuration names: the function of eval.scorer."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from sftlab.errors import ConfigError, Problem, shown
from sftlab.records import Prediction

KEY = "eval.scorer"

Function = Callable[[str, Prediction], object]
"""An answer and its row → a score between 0 and 1."""


def split(name: str | None) -> tuple[Path, str]:
    """Return the file and the name of the function; ``path.py:function`` is their form."""
    path, _, function = (name or "").rpartition(":")
    return Path(path).expanduser(), function


def problems(name: str | None) -> Iterator[Problem]:
    """Yield what is wrong with a function's name or file. The file is parsed, and not executed."""
    path, function = split(name)
    keys = ("eval.task",)
    if not function.isidentifier() or path.suffix != ".py":
        remedy = "write FILE.py:FUNCTION, as in score.py:score"
        yield Problem(KEY, shown(name), "does not name a file and a function", remedy, keys)
        return
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror} (seen from {Path.cwd()})"
        yield Problem(KEY, shown(name), message, "check the path", keys)
        return
    except (SyntaxError, ValueError) as error:
        yield Problem(KEY, shown(name), f"{path} is not Python: {error}", "correct the file", keys)
        return
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in functions:
        there = f"there are {', '.join(functions)}" if functions else "it has none"
        yield Problem(KEY, shown(name), f"{path} has no function {function}", there, keys)


@cache
def hash_of(path: Path) -> str:
    """The SHA-256 of a file, as it was when it was first read in this process."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def load(name: str | None) -> Function:
    """Execute the file and return its function.

    Raises:
        ConfigError: the file cannot be executed.
    """
    path, function = split(name)
    module_name = f"sftlab_scorer_{hash_of(path)[:12]}"
    spec = spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[module_name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the code is the user's, and may raise anything
        message = f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConfigError(Problem(KEY, shown(name), message, "correct the file")) from error
    found: Function = getattr(module, function)
    return found
