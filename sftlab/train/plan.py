"""Plan a training (``mode=plan``): whether it fits into its machine, and how long an epoch takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sftlab.config import Config
from sftlab.dataset.tokenize import Tokenized
from sftlab.errors import OutOfMemoryError
from sftlab.instance.machine import Machine, peak_flops
from sftlab.model.base import Base
from sftlab.results import PlanCell, Receipt
from sftlab.train.memory import GIB, device, generation_gib, traced, training_gib
from sftlab.train.trace import Shape, Trace
from sftlab.train.workload import Workload, workload

# The share of a GPU's peak FLOP/s that training usually reaches: for an estimate without plan.probe.
GPU_SHARE = 0.35
HIDDEN = 2048  # if a config has another name for the width, which has little influence


@dataclass(frozen=True)
class Estimate:
    """The traced step of a training, and what an epoch has of it."""

    trace: Trace
    work: Workload

    @property
    def epoch_flops(self) -> float:
        """Floating-point operations of an epoch with its validation."""
        longest, evaluated = self.work.longest, self.work.evaluated
        training = self.trace.train_flops * self.work.train_tokens / (longest.rows * longest.length)
        return training + self.trace.eval_flops * self.work.eval_tokens / (evaluated.rows * evaluated.length)


def estimates(cfgs: Sequence[Config], base: Base, tokens: Tokenized, machine: Machine) -> list[Estimate]:
    """Trace a step of each configuration."""
    config = json.loads((base.path / "config.json").read_text("utf-8"))
    hidden = {**config, **config.get("text_config", {})}.get("hidden_size", HIDDEN)
    works = [workload(tokens, cfg.train, machine, hidden) for cfg in cfgs]
    shapes = [Shape(cfg.peft, cfg.train, work.longest, work.evaluated) for cfg, work in zip(cfgs, works, strict=True)]
    return [Estimate(trace, work) for trace, work in zip(traced(base, machine, shapes), works, strict=True)]


def cell(
    cfg: Config,
    base: Base,
    tokens: Tokenized,
    machine: Machine,
    probe: Callable[[], Receipt] | None = None,
) -> PlanCell:
    """Memory and time of a configuration on its machine; a ``probe`` measures them, otherwise they are estimated."""
    (estimate,) = estimates([cfg], base, tokens, machine)
    return cell_of(cfg, machine, estimate, probe)


def cell_of(cfg: Config, machine: Machine, estimate: Estimate, probe: Callable[[], Receipt] | None = None) -> PlanCell:
    """Memory and time of a configuration whose step is traced."""
    trace, work = estimate.trace, estimate.work
    gpu, capacity = device(cfg.instance, machine)
    training = training_gib(trace, cfg.train, machine)
    seconds, timed_by, trouble = None, "unknown; plan.probe=true measures it", None
    if gpu is not None and (peak := peak_flops(gpu)) is not None:
        seconds = estimate.epoch_flops / (GPU_SHARE * peak)
        timed_by = f"estimated at {100 * GPU_SHARE:.0f} % of the peak of {gpu}"
    elif trace.flops_per_second is not None:
        seconds = estimate.epoch_flops / trace.flops_per_second
        timed_by = "estimated from the speed of one layer"
    if probe is not None:
        try:
            receipt = probe()
        except OutOfMemoryError:
            trouble = "the probe ran out of memory"
        else:
            assert receipt.step_seconds is not None  # a probe has several steps
            training, timed_by = receipt.peak_memory_gib, "measured by a probe"
            seconds = estimate.epoch_flops / trace.train_flops * receipt.step_seconds
    parts = ("libraries", "weights", "gradients", "optimizer", "activations", "logits")
    return PlanCell(
        memory={name: round(getattr(trace, name) / GIB, 3) for name in parts},
        training_gib=round(training, 2),
        generation_gib=round(generation_gib(cfg, trace, work.longest.length, machine, capacity), 2),
        capacity_gib=None if capacity is None else round(capacity, 1),
        seconds_per_epoch=None if seconds is None else round(seconds, 1),
        epochs=round(work.epochs, 4),
        timed_by=timed_by,
        gradient_checkpointing=bool(cfg.train.gradient_checkpointing),
        trouble=trouble,
    )
