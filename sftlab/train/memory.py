"""Estimate the memory of training and generation on a device, and choose gradient checkpointing by it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from sftlab.config import Config, InstanceConfig, TrainConfig
from sftlab.dataset.tokenize import Tokenized
from sftlab.instance.machine import BRIEF_SPIN, Machine, nvidia_smi
from sftlab.model.base import Base
from sftlab.runtime.processes import child
from sftlab.runtime.store import Stage, Store, versions, write_json
from sftlab.train.trace import TRACES, Shape, Trace, TraceTask
from sftlab.train.workload import longest_batches, rows_by_split

log = logging.getLogger(__name__)

GIB = 2**30
MEMORY = "memory.json"

# What the allocator loses to fragmentation: a share of the memory on a GPU, of the activations on a CPU.
GPU_GAPS, CPU_GAPS = 0.05, 0.4
# A process that trains on a CPU holds a little more than one that does not. In bfloat16, oneDNN also retains buffers
# for every length that batches have had: a multiple of the weights. Measured by scripts/bench_plan.py.
CPU_GIB, CPU_SHAPES = 0.15, 2.2
# The estimate has an error of up to 10 % (docs/performance.md). Training without gradient checkpointing must fit even
# then: running out of memory costs more than the third of the time that it saves.
SAFE_SHARE = 0.9
# Generation besides weights and cache: a context, and the activations of a batch.
ENGINE_GIB = 1.5


def traced(base: Base, machine: Machine, shapes: Sequence[Shape]) -> list[Trace]:
    """Trace a step of each training in a child process, which needs no GPU and at most the memory of one layer."""
    task = TraceTask(
        model=base.path.resolve(), trust_remote_code=base.trust_remote_code, machine=machine, shapes=list(shapes)
    )
    with TemporaryDirectory(prefix="sftlab-") as name:
        folder = Path(name)
        child("sftlab.train.trace", folder, task, environment={"CUDA_VISIBLE_DEVICES": "", **BRIEF_SPIN})
        return [Trace(**trace) for trace in json.loads((folder / TRACES).read_text("utf-8"))]


def training_gib(trace: Trace, train: TrainConfig, machine: Machine) -> float:
    """Memory of a device in training, in GiB."""
    if machine.device != "cpu":
        return trace.peak / GIB * (1 + GPU_GAPS)
    shapes = CPU_SHAPES * trace.merged_bytes if train.bf16 else 0.0
    return CPU_GIB + (trace.peak + CPU_GAPS * (trace.activations + trace.logits) + shapes) / GIB


def generation_gib(cfg: Config, trace: Trace, longest_row: int, machine: Machine, capacity: float | None) -> float:
    """Memory of a device in generation, in GiB: the merged model, and the cache that is configured or needed.

    vLLM takes ``eval.gpu_memory_utilization`` of a GPU, and needs a cache for the longest answer at least. If that does
    not fit into its share, the result is scaled up as if the share were the whole GPU.
    """
    if cfg.mode == "train":
        return 0.0
    ranks = cfg.eval.tensor_parallel_size if machine.device == "cuda" else 1
    weights = trace.merged_bytes / ranks / GIB
    cache_per_row = trace.kv_bytes_per_token * (longest_row + cfg.eval.max_tokens) / ranks / GIB
    if cfg.eval.engine == "transformers":
        return ENGINE_GIB + weights + cfg.eval.batch_size * cache_per_row
    if machine.device == "cpu":
        return ENGINE_GIB + weights + max(cfg.eval.kv_cache_gib, cache_per_row)
    needed = ENGINE_GIB + weights + cache_per_row
    return needed / (1.0 if capacity is None else cfg.eval.gpu_memory_utilization)


def device(cfg: InstanceConfig, machine: Machine) -> tuple[str | None, float | None]:
    """The name of the GPU, and the GiB that each process has: as configured, or measured; None if unknown."""
    if machine.device == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        limit = Path("/sys/fs/cgroup/memory.max")
        with suppress(OSError, ValueError):  # it holds "max" if there is no limit
            total = min(total, int(limit.read_text()) / GIB)
        return None, cfg.memory_gib or total / machine.num_processes
    name, memory = None, None
    with suppress(IndexError, ValueError):  # no GPU, or one that does not report its memory
        name = nvidia_smi("name")[0]
        memory = float(nvidia_smi("memory.total")[0]) / 1024
    return name, cfg.memory_gib or memory


def with_checkpointing(
    cfg: Config, base: Base, tokens: Tokenized, machine: Machine, store: Store
) -> tuple[Config, Stage | None]:
    """Resolve ``train.gradient_checkpointing=auto``, and return the stage with the estimate that decided, if any.

    It is on unless the longest batch is known to fit without it. Machines that train together must decide the same:
    they use instance.memory_gib, and not the memory that each of them has.
    """
    if cfg.train.gradient_checkpointing != "auto":
        return cfg, None
    capacity = device(cfg.instance, machine)[1] if machine.nnodes == 1 else cfg.instance.memory_gib
    stage, on, reason = None, True, "the memory of the device is unknown (instance.memory_gib sets it)"
    if capacity is not None:
        try:
            stage = _without_checkpointing(cfg, base, tokens, machine, store)
            needed = json.loads((stage.path / MEMORY).read_text("utf-8"))["training_gib"]
        except Exception as error:  # training does not depend on the estimate
            first = next(iter(str(error).splitlines()), "")
            reason = f"the memory that training takes could not be estimated: {type(error).__name__}: {first}"
        else:
            safe = SAFE_SHARE * capacity
            on = needed > safe
            reason = f"without it training takes about {needed:.1f} GiB; {safe:.1f} of {capacity:.1f} GiB are safe"
    log.info("train: gradient checkpointing is %s: %s", "on" if on else "off", reason)
    return _checkpointing(cfg, on=on), stage


def _without_checkpointing(cfg: Config, base: Base, tokens: Tokenized, machine: Machine, store: Store) -> Stage:
    """The stage with the memory of training without checkpointing, which jobs with the same batches share."""
    off = _checkpointing(cfg, on=False)
    longest, evaluated = longest_batches(rows_by_split(tokens), cfg.train)
    inputs = {
        "version": 1,
        "base": base.identity,
        "peft": cfg.peft.model_dump(),
        "train": {"bf16": cfg.train.bf16, "optim": cfg.train.optim},
        "machine": machine.numerics(),
        "batches": [asdict(longest), asdict(evaluated)],
        "libraries": versions("torch", "transformers", "peft"),
    }

    def build(folder: Path) -> None:
        (trace,) = traced(base, machine, [Shape(off.peft, off.train, longest, evaluated)])
        write_json(folder / MEMORY, {"training_gib": round(training_gib(trace, off.train, machine), 2)})

    return store.stage("memory", inputs, build)


def _checkpointing(cfg: Config, *, on: bool) -> Config:
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"gradient_checkpointing": on})})
