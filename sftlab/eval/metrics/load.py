"""Load a metric of the ``evaluate`` library."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from sftlab.errors import ConfigError, Problem, shown


def library_metric(name: str) -> Any:
    """Load a metric of this package."""
    return _loaded(str(Path(__file__).with_name(f"{name}.py")))


def load_metric(name: str) -> Any:
    """Load a metric by the path of its file or folder, without a network, or by its name on the hub.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = Path(name).expanduser()
    try:
        return _loaded(str(path.resolve()) if path.exists() else name)
    except Exception as error:  # a metric is code that is imported, perhaps from the hub
        message = f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        remedy = "name the file of a metric, or a metric of the hub, which needs its packages and a network"
        raise ConfigError(Problem("eval.metric", shown(name), message, remedy, ("eval.task",))) from error


@cache
def _loaded(name: str) -> Any:
    # The evaluators of evaluate import the pipelines of transformers, and with them torch: 5 s and 300 MB for nothing.
    blocked: Any = None
    imported, sys.modules["transformers"] = sys.modules.get("transformers"), blocked
    try:
        import evaluate
    finally:
        del sys.modules["transformers"]
        if imported is not None:
            sys.modules["transformers"] = imported

    return evaluate.load(name, keep_in_memory=True)
