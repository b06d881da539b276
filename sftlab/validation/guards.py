"""The guards of a run, and the decision that its exit code depends on."""

from __future__ import annotations

from collections.abc import Iterator

from sftlab.config import Config
from sftlab.errors import Problem
from sftlab.eval import harness
from sftlab.runtime.modes import MODES


def gate_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of a decision that the mode does not make, or that has nothing to compare with."""
    decides = MODES[cfg.mode].evaluates or cfg.mode == "compare"
    if cfg.eval.gate and not decides:
        message = f"mode={cfg.mode} decides nothing"
        yield Problem(
            "eval.gate", "true", message, "set it to false, or set mode to all, evaluate or compare", ("mode",)
        )
    if cfg.eval.gate and decides and cfg.mode != "compare" and not cfg.eval.baseline:
        message = "eval.gate decides between the fine-tuned model and the base model"
        yield Problem("eval.baseline", "false", message, "set it to true, or eval.gate to false", ("eval.gate",))
    if MODES[cfg.mode].evaluates:
        yield from harness.problems(cfg)
    if (cfg.eval.guards or cfg.eval.guard_tasks) and MODES[cfg.mode].evaluates and not cfg.eval.baseline:
        message = "eval.guards compares the fine-tuned model with the base model"
        yield Problem("eval.baseline", "false", message, "set it to true, or eval.guards to {}", ("eval.guards",))
