"""What an evaluation task decides. The task ``exact`` (eval.task) is the class ``Exact`` in ``exact.py``, and so on."""

from __future__ import annotations

from importlib import import_module

from sftlab.config import EvalConfig
from sftlab.eval.scorers.base import Scorer
from sftlab.eval.scorers.view import View

__all__ = ["Scorer", "View", "scorer", "view"]


def scorer(cfg: EvalConfig) -> Scorer:
    """Return the scorer of eval.task."""
    return _class(cfg.task)(cfg)


def view(task: str) -> View:
    """Return how the results of a task are shown."""
    return _class(task).view


def _class(task: str) -> type[Scorer]:
    cls: type[Scorer] = getattr(import_module(f"{__name__}.{task}"), task.capitalize())
    return cls
