"""``mode=plan``: whether a configuration fits into its machine, and how long an epoch takes, before anything trains."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sftlab.config import Config, InstanceConfig, Lora, Qlora, TrainConfig
from sftlab.dataset.tokenize import Tokenized
from sftlab.errors import OutOfMemoryError
from sftlab.instance.machine import Machine, nvidia_smi, peak_flops
from sftlab.model.base import Base
from sftlab.runtime.modes import MODES
from sftlab.runtime.processes import child
from sftlab.runtime.store import Stage, Store, versions, write_json
from sftlab.train.stage import TrainTask
from sftlab.train.trace import Batch, Shape, Traced, traced

log = logging.getLogger(__name__)

GIB = 2**30
IGNORED = -100

# The share of a GPU's peak arithmetic that training takes as a rule: for a first guess without plan.probe.
GPU_SHARE = 0.35
# What an allocator cannot use for its gaps, as a part of a GPU's memory, and of activations on the CPU.
GPU_GAPS, CPU_GAPS = 0.05, 0.4
# On the CPU a process that trains holds a little more than one that does not, and oneDNN, in bfloat16, scratch for
# each length that batches have had: a multiple of the weights. Measured by scripts/bench_plan.py.
CPU_GIB, CPU_SHAPES = 0.15, 2.2
# The estimate errs by up to a tenth (docs/performance.md). Training without gradient checkpointing must fit even so: to
# run out of memory costs more than the third of the time that is saved.
SAFE_SHARE = 0.9
# Generation beside weights and cache: a context, and the activations of a batch.
ENGINE_GIB = 1.5
PROBE_STEPS = 3
DRAWN_STEPS = 200
HIDDEN = 2048  # where a config has another name for the width, of which little depends on it


@dataclass(frozen=True)
class Work:
    """What an epoch takes one process: padded tokens of training and of validation, and steps."""

    train_tokens: int
    eval_tokens: int
    batches: int


@dataclass(frozen=True)
class Cell:
    """A configuration on its machine. Memory is GiB a device, time seconds an epoch with its validation.

    ``fits`` is None where it is not known how much memory there is; ``timed_by`` says where the time comes from.
    """

    memory: dict[str, float]
    training_gib: float
    generation_gib: float
    capacity_gib: float | None
    seconds_per_epoch: float | None
    timed_by: str
    gradient_checkpointing: bool = False
    trouble: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether both phases, which follow each other, fit into a device's memory."""
        if self.trouble is not None:
            return False
        return None if self.capacity_gib is None else max(self.training_gib, self.generation_gib) <= self.capacity_gib


def batches(tokens: Tokenized, train: TrainConfig, machine: Machine, hidden: int) -> tuple[Batch, Batch, Work]:
    """The longest batch of training and of validation, as one process sees them, and what an epoch has of them.

    ``hidden`` is the width of the model.
    """
    rows = {split: _rows(tokens, split) for split in ("train", "validation")}
    longest, evaluated = _longest_batches(rows, train)
    size, eval_size = train.per_device_train_batch_size, train.per_device_eval_batch_size
    lengths = [length for length, _ in rows["validation"]]
    groups = [lengths[at : at + eval_size] for at in range(0, len(lengths), eval_size)]
    eval_tokens = sum(max(group) * len(group) for group in groups) // machine.world_size
    lengths = [length for length, _ in rows["train"]]
    if train.packing:
        count = max(1, round(sum(lengths) / machine.world_size / longest.length))
        return longest, evaluated, Work(count * longest.length, eval_tokens, count)
    here = round(len(lengths) / machine.world_size)
    work = Work(step_tokens(lengths, train, machine, hidden), eval_tokens, max(1, -(-here // size)))
    return longest, evaluated, work


def _longest_batches(rows: Mapping[str, list[tuple[int, int]]], train: TrainConfig) -> tuple[Batch, Batch]:
    evaluated = _batch(_longest(rows["validation"], train.per_device_eval_batch_size))
    size = train.per_device_train_batch_size
    if train.packing:
        total = sum(length for length, _ in rows["train"])
        targets = sum(length - first for length, first in rows["train"])
        length = size * train.max_length
        share = length * targets // total
        return Batch(1, length, share, share), evaluated
    longest = _longest(rows["train"], size)
    if train.extra.get("padding_free"):  # the rows of a batch are one sequence
        length, targets = sum(length for length, _ in longest), sum(length - first for length, first in longest)
        return Batch(1, length, targets, targets), evaluated
    return _batch(longest), evaluated


def step_tokens(lengths: Sequence[int], train: TrainConfig, machine: Machine, hidden: int) -> int:
    """Tokens that an epoch computes, with padding, in each step those of the rank that has the most.

    Of a long epoch the first ``DRAWN_STEPS`` steps are drawn.
    """
    from sftlab.train.batches import StepSampler

    per_step = machine.effective_batch(train)
    sampler = StepSampler(
        lengths,
        rows_per_step=per_step,
        ranks=machine.world_size,
        micro_batches=machine.accumulation(train),
        seed=0,
        hidden=hidden,
        padded=not train.extra.get("padding_free"),
    )
    steps = list(islice(sampler.steps(), DRAWN_STEPS))
    tokens = sum(max(sum(map(sampler.tokens, batches)) for batches in ranks) for ranks in steps)
    return round(tokens * max(1.0, len(lengths) / (len(steps) * per_step)))


def _rows(tokens: Tokenized, split: str) -> list[tuple[int, int]]:
    """Each row's length, and where its first target is."""
    from datasets import load_from_disk

    labels = load_from_disk(str(tokens.stage.path / split))["labels"]
    return [(len(row), next((at for at, label in enumerate(row) if label != IGNORED), 0)) for row in labels]


def _longest(rows: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    return sorted(rows)[-size:]


def _batch(rows: Sequence[tuple[int, int]]) -> Batch:
    length, first = max(length for length, _ in rows), min(first for _, first in rows)
    return Batch(len(rows), length, length - first, sum(length - first for length, first in rows))


def cell(
    cfg: Config,
    base: Base,
    tokens: Tokenized,
    machine: Machine,
    probe: Callable[[], dict[str, Any]] | None = None,
) -> Cell:
    """What a training step takes and what the machine has; a ``probe`` measures instead of reckoning."""
    (planned,) = _planned([cfg], base, tokens, machine)
    return _cell(cfg, machine, *planned, probe)


def _planned(
    cfgs: Sequence[Config], base: Base, tokens: Tokenized, machine: Machine
) -> list[tuple[Traced, Batch, Batch, Work]]:
    """For each configuration its longest batches traced, these batches, and what an epoch has of them."""
    config = json.loads((base.path / "config.json").read_text("utf-8"))
    hidden = {**config, **config.get("text_config", {})}.get("hidden_size", HIDDEN)
    found = [batches(tokens, cfg.train, machine, hidden) for cfg in cfgs]
    shapes = [
        Shape(cfg.peft, cfg.train, longest, evaluated) for cfg, (longest, evaluated, _) in zip(cfgs, found, strict=True)
    ]
    return [(trace, *planned) for trace, planned in zip(traced(base, machine, shapes), found, strict=True)]


def _cell(
    cfg: Config,
    machine: Machine,
    found: Traced,
    longest: Batch,
    evaluated: Batch,
    work: Work,
    probe: Callable[[], dict[str, Any]] | None = None,
) -> Cell:
    gpu, capacity = device(cfg.instance, machine)
    training = _training(found, cfg.train, machine)
    flops = found.train_flops * work.train_tokens / (longest.rows * longest.length)
    flops += found.eval_flops * work.eval_tokens / (evaluated.rows * evaluated.length)
    seconds, how, trouble = None, "unknown without plan.probe=true", None
    if gpu is not None and (peak := peak_flops(gpu)) is not None:
        seconds, how = flops / (GPU_SHARE * peak), f"guessed by {100 * GPU_SHARE:.0f} % of what {gpu} can do"
    elif found.flops_per_second is not None:
        seconds, how = flops / found.flops_per_second, "guessed by the speed of one layer"
    if probe is not None:
        try:
            measured = probe()
        except OutOfMemoryError:
            trouble = "a probe ran out of memory"
        else:
            training, how = measured["peak_memory_gib"], "measured by a probe"
            seconds = flops / found.train_flops * measured["step_seconds"]
    parts = ("libraries", "weights", "gradients", "optimizer", "activations", "logits")
    return Cell(
        memory={name: round(getattr(found, name) / GIB, 3) for name in parts},
        training_gib=round(training, 2),
        generation_gib=round(_generation(cfg, found, longest, machine, capacity), 2),
        capacity_gib=None if capacity is None else round(capacity, 1),
        seconds_per_epoch=None if seconds is None else round(seconds, 1),
        timed_by=how,
        gradient_checkpointing=bool(cfg.train.gradient_checkpointing),
        trouble=trouble,
    )


def _training(found: Traced, train: TrainConfig, machine: Machine) -> float:
    """GiB of a device that training needs."""
    if machine.device != "cpu":
        return found.peak / GIB * (1 + GPU_GAPS)
    shapes = CPU_SHAPES * found.merged_bytes if train.bf16 else 0.0
    return CPU_GIB + (found.peak + CPU_GAPS * (found.activations + found.logits) + shapes) / GIB


def with_checkpointing(
    cfg: Config, base: Base, tokens: Tokenized, machine: Machine, store: Store
) -> tuple[Config, Stage | None]:
    """The configuration with gradient checkpointing on or off in the place of ``auto``, and the stage that says why.

    It is on where the longest batch is not known to fit without. Machines that train together must agree: they go by
    instance.memory_gib, and not by what each of them finds.
    """
    if cfg.train.gradient_checkpointing != "auto":
        return cfg, None
    capacity = device(cfg.instance, machine)[1] if machine.nnodes == 1 else cfg.instance.memory_gib
    stage, on, why = None, True, "it is not known how much memory there is"
    if capacity is not None:
        try:
            stage = _without_checkpointing(cfg, base, tokens, machine, store)
            needed = json.loads((stage.path / "memory.json").read_text("utf-8"))["training_gib"]
        except Exception as failed:  # whatever it is, training can do without the estimate
            reason = f"{type(failed).__name__}: {next(iter(str(failed).splitlines()), '')}"
            why = f"how much memory it takes could not be estimated: {reason}"
        else:
            safe = SAFE_SHARE * capacity
            on = needed > safe
            why = f"without it training takes about {needed:.1f} GiB; {safe:.1f} of {capacity:.1f} can be relied on"
    log.info("train: gradient checkpointing is %s; %s", "on" if on else "off", why)
    return _checkpointing(cfg, on=on), stage


def _without_checkpointing(cfg: Config, base: Base, tokens: Tokenized, machine: Machine, store: Store) -> Stage:
    """The stage with the memory that training takes without checkpointing. Jobs with the same batches share it."""
    off = _checkpointing(cfg, on=False)
    rows = {split: _rows(tokens, split) for split in ("train", "validation")}
    longest, evaluated = _longest_batches(rows, cfg.train)
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
        (found,) = traced(base, machine, [Shape(off.peft, off.train, longest, evaluated)])
        write_json(folder / "memory.json", {"training_gib": round(_training(found, off.train, machine), 2)})

    return store.stage("memory", inputs, build)


def _checkpointing(cfg: Config, *, on: bool) -> Config:
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"gradient_checkpointing": on})})


def _generation(cfg: Config, found: Traced, longest: Batch, machine: Machine, capacity: float | None) -> float:
    """GiB of a device that generation needs: the merged model, and the cache that it is given or cannot do without.

    vLLM takes all of ``eval.gpu_memory_utilization`` of a GPU; what it needs is a cache for the longest answer.
    """
    mode = MODES[cfg.mode]
    if mode.trains and not mode.evaluates:
        return 0.0
    split = cfg.eval.tensor_parallel_size if machine.device == "cuda" else 1
    weights = found.merged_bytes / split / GIB
    a_row = found.kv_bytes_per_token * (longest.length + cfg.eval.max_tokens) / split / GIB
    if cfg.eval.engine == "transformers":
        return ENGINE_GIB + weights + cfg.eval.batch_size * a_row
    if machine.device == "cpu":
        return ENGINE_GIB + weights + max(cfg.eval.kv_cache_gib, a_row)
    needed = ENGINE_GIB + weights + a_row
    # What does not fit into its share is told as if it were the share's part of all.
    return max(needed, 0.0) / (1.0 if capacity is None else cfg.eval.gpu_memory_utilization)


def device(cfg: InstanceConfig, machine: Machine) -> tuple[str | None, float | None]:
    """The name of a GPU, and GiB for each process: what the instance says, or what there is; None if unknown."""
    if machine.device == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        limit = Path("/sys/fs/cgroup/memory.max")
        with suppress(OSError, ValueError):  # a word where there is no limit
            there = min(there, int(limit.read_text()) / GIB)
        return None, cfg.memory_gib or there / machine.num_processes
    name, memory = None, None
    with suppress(IndexError, ValueError):  # no GPU, or one that does not report its memory
        name = nvidia_smi("name")[0]
        memory = float(nvidia_smi("memory.total")[0]) / 1024
    return name, cfg.memory_gib or memory


def measure(cfg: Config, base: Base, tokens: Tokenized, machine: Machine) -> dict[str, Any]:
    """Train three steps on the longest batch and validate on the longest: peak GiB, and seconds of a step.

    Raises:
        OutOfMemoryError: it does not fit.
    """
    from datasets import concatenate_datasets, load_from_disk

    with TemporaryDirectory(prefix="sftlab-") as name:
        folder = Path(name)
        size, world = cfg.train.per_device_train_batch_size, machine.world_size
        for split, rows, times in (
            ("train", size, world * PROBE_STEPS),
            ("validation", cfg.train.per_device_eval_batch_size, world),
        ):
            table = load_from_disk(str(tokens.stage.path / split))
            order = sorted(range(len(table)), key=[len(row) for row in table["labels"]].__getitem__)
            part = table.select(order[-rows:])
            # Fewer rows than a batch has are repeated.
            part = concatenate_datasets([part] * -(-rows * times // len(part))).select(range(rows * times))
            part.save_to_disk(folder / split)
        settings = {
            "num_train_epochs": 1,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "global_batch_size": None,
            "lr_scheduler_type": "constant",
            "lr_scheduler_kwargs": {},
            "extra": {**cfg.train.extra, "save_strategy": "no"},
        }
        given = {
            "checkpoints": str(folder),
            "tokens": str(folder),
            "base": str(base.path.resolve()),
            "trust_remote_code": base.trust_remote_code,
            "chat_template": base.chat_template,
            "peft": cfg.peft.model_dump(),
            "train": {**cfg.train.model_dump(), **settings},
            "machine": asdict(machine),
            "seed": cfg.seed,
            "counts": tokens.counts,
            "report_to": [],
        }
        child(
            "sftlab.train.stage",
            folder,
            TrainTask(given),
            launcher=machine.launcher(),
            environment=machine.training_environment(),
        )
        receipt = json.loads((folder / "receipt.json").read_text("utf-8"))
    return {"peak_memory_gib": receipt["peak_memory_gib"], "step_seconds": receipt["step_seconds"]}


def smaller(cfg: Config, machine: Machine) -> Iterator[tuple[str, Config]]:
    """What could be changed to need less memory, mildest first, as overrides and as the configuration they make.

    None of them changes which rows are in an optimizer step, and none cuts a row.
    """

    def changed(**keys: Any) -> tuple[str, Config]:
        words = [f"train.{name}={str(value).lower()}" for name, value in keys.items()]
        return " ".join(words), cfg.model_copy(update={"train": cfg.train.model_copy(update=keys)})

    size, together = cfg.train.per_device_train_batch_size, machine.effective_batch(cfg.train)
    sizes = [size // 2**halved for halved in range(1, size.bit_length())]
    batch = [{"per_device_train_batch_size": less, "global_batch_size": together} for less in sizes]
    batch = [keys for keys in batch if together % (keys["per_device_train_batch_size"] * machine.world_size) == 0]
    if not cfg.train.gradient_checkpointing:
        yield changed(gradient_checkpointing=True)
    if batch:
        yield changed(**batch[0])
    if len(batch) > 1:
        yield changed(**batch[-1])
    if batch and not cfg.train.gradient_checkpointing:
        yield changed(gradient_checkpointing=True, **batch[-1])
    if isinstance(cfg.peft, Lora):
        values = {**cfg.peft.model_dump(), "method": "qlora"}
        qlora = Qlora(**values, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        yield "peft=qlora", cfg.model_copy(update={"peft": qlora})


def changes(cfg: Config, machine: Machine) -> str:
    """What to change where memory is too small, without an estimate."""
    lines = ["to need less memory, mildest first:", *(f"  {words}" for words, _ in smaller(cfg, machine))]
    return "\n".join([*lines, "  a smaller train.max_length, or an instance= with more memory"])


def advice(cfg: Config, base: Base, tokens: Tokenized, machine: Machine) -> str:
    """What to change where memory is too small, each with the memory that training would then take."""
    options = list(smaller(cfg, machine))
    cfgs = [cfg, *(changed for _, changed in options)]
    planned = _planned(cfgs, base, tokens, machine)
    now, *others = (_cell(each, machine, *plan) for each, plan in zip(cfgs, planned, strict=True))
    longest = planned[0][1]
    lines = [
        f"training needs about {now.training_gib:.1f} GiB for each process, and there is "
        f"{'an unknown amount' if now.capacity_gib is None else f'{now.capacity_gib:.1f} GiB'}; to need less:"
    ]
    for (words, _), other in zip(options, others, strict=True):
        lines.append(f"  {words}: about {other.training_gib:.1f} GiB")
    lines.append(
        f"  a shorter longest row (it has {longest.length:,} tokens, train.max_length={cfg.train.max_length}), or an "
        "instance= with more memory"
    )
    return "\n".join(lines)


def table(cells: Sequence[tuple[str, Cell]]) -> None:
    """Print what each configuration takes; the ones that cannot fit are marked."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="GiB for each process, at the longest batch", title_justify="left")
    shown.add_column("job")
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "training", "generation", "there is"):
        shown.add_column(name, justify="right")
    shown.add_column("checkpointing")
    shown.add_column("an epoch", justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for words, found in cells:
        parts = [found.memory[name] for name in ("weights", "gradients", "optimizer", "activations", "logits")]
        shown.add_row(
            words,
            *(f"{value:.2f}" for value in [*parts, found.training_gib, found.generation_gib]),
            "?" if found.capacity_gib is None else f"{found.capacity_gib:.1f}",
            "on" if found.gradient_checkpointing else "off",
            "?" if found.seconds_per_epoch is None else duration(found.seconds_per_epoch),
            {True: "fits", False: "[bold]cannot fit[/]", None: "memory unknown"}[found.fits],
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(shown)
    for words in sorted({found.timed_by for _, found in cells}):
        console.print(f"time: {words}")


def duration(seconds: float) -> str:
    """A time as people say it: 41 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
