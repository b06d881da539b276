"""The formats of ``export.format``: what writes them, what runs them, and on which device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from sftlab.config import ExportConfig
from sftlab.errors import Problem


@dataclass(frozen=True)
class Format:
    """A format.

    ``engine`` answers the test questions with the exported model; None: the engine of the run. ``gpu_only`` is the
    reason why a CPU cannot run the format, or "".
    """

    module: str
    package: str
    engine: Literal["vllm", "transformers"] | None = None
    gpu_only: str = ""


FORMATS = {
    "gguf": Format("auto_round", "auto-round"),
    "awq": Format("auto_round", "auto-round", "vllm"),
    "fp8": Format("auto_round", "auto-round", "vllm", "vLLM computes in FP8 on a GPU only"),
    "bnb4": Format("bitsandbytes", "bitsandbytes", "transformers"),
}


def problems(cfg: ExportConfig, device: str) -> Iterator[Problem]:
    """Yield the problems of an export on this machine: a package or a GPU is missing."""
    chosen = FORMATS[cfg.format]
    if chosen.gpu_only and device == "cpu":
        remedy = "choose gguf, awq or bnb4, or export on a machine with a GPU"
        yield Problem("export.format", cfg.format, f"cannot be tested on the CPU: {chosen.gpu_only}", remedy)
    elif find_spec(chosen.module) is None:
        lock = "export.lock" if chosen.module == "auto_round" else f"{'cpu' if device == 'cpu' else 'cuda'}.lock"
        remedy = f"pip install --no-deps -r locks/{lock}"
        yield Problem("export.format", cfg.format, f"requires the package {chosen.package}", remedy)
