"""Load a metric of the ``evaluate`` library."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any


@cache
def library_metric(name: str) -> Any:
    """Load a metric of the ``evaluate`` library from this package."""
    # The evaluators of evaluate import the pipelines of transformers, and with them torch: 5 s and 300 MB for nothing.
    blocked: Any = None
    imported, sys.modules["transformers"] = sys.modules.get("transformers"), blocked
    try:
        import evaluate
    finally:
        del sys.modules["transformers"]
        if imported is not None:
            sys.modules["transformers"] = imported

    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)
