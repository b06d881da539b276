#!/usr/bin/env python
r"""Check and time sftlab on one GPU, in ten minutes, without vLLM and without the hub.

    scripts/gpu_check.py --out gpu_check.json      on a machine with an H100 or similar, 80 GB
    scripts/gpu_check.py --cpu                     the same with tiny models, on a CPU: two minutes

Models have real shapes and random weights, rows have random tokens. Checks: the CPU, the GPU and Liger give the same
losses, a merged model has the loss of its adapter, QLoRA quantises. Measurements: tokens/s, model FLOPs utilisation
(MFU) and peak memory, compared with bare TRL with the same settings, and the error of `mode=plan`.

Each training, merge or plan is a cell. The JSON file is written after every cell. If a cell fails, the others continue;
a cell that would not end within --minutes is skipped. The exit code is 1 if a cell failed or was skipped, or if a check
does not hold; missed targets do not change it. scripts/gpu_wheels collects what a machine without a network needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_train

from sftlab.instance.machine import visible_gpus
from sftlab.results import MergeCheck
from sftlab.runtime.processes import NEEDED, QUIET, TOO_LARGE, die_with_parent
from sftlab.runtime.store import versions, write_json

TOLERANCE = 0.01  # nats per token by which losses may differ
GRACE = 15  # seconds by which the last cell may exceed --minutes
LEFT_GIB = 0.3  # a cell that leaves more on the GPU ends its process
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "liger-kernel", "bitsandbytes", "triton",
    "flash-attn", "huggingface-hub", "numpy", "hydra-core", "pydantic",
)  # fmt: skip
CHECKPOINTING = "train.gradient_checkpointing"


@dataclass(frozen=True)
class Sizes:
    """What differs between the check on a GPU and the one on a CPU."""

    gpu: bool
    small: tuple[str, ...]  # shapes that a CPU can train, whose losses are compared
    llama: str
    gemma: str
    lengths: tuple[int, ...]  # tokens of full rows
    target: int  # the length to which the targets apply
    tokens: int  # per optimizer step, in full rows
    steps: int
    medqa: tuple[int, int, int, int]  # rows per device, rows and number of optimizer steps, tokens of a row at most
    loss: tuple[int, int, int]  # rows, steps, tokens of a row at most
    merged: int  # tokens of the rows on which a merged model is checked


REAL = Sizes(
    gpu=True, small=("smollm2-135m", "gemma-3-270m"), llama="llama-3.1-8b", gemma="gemma-3-4b",
    lengths=(2048, 512, 8192), target=2048, tokens=4096, steps=8, medqa=(16, 64, 6, 2048), loss=(4, 8, 256),
    merged=8192,
)  # fmt: skip
TINY = Sizes(
    gpu=False, small=("tiny-llama", "tiny-gemma3"), llama="tiny-llama", gemma="tiny-gemma3", lengths=(64, 32),
    target=64, tokens=64, steps=3, medqa=(2, 4, 3, 64), loss=(4, 4, 64), merged=64,
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A call of the function for ``kind`` (see KINDS) with these arguments.

    ``seconds`` is about the time that it takes on an H100; it is skipped if less is left. ``needs`` are packages, or
    "a GPU".
    """

    name: str
    kind: str
    arguments: dict[str, Any]
    seconds: int
    needs: tuple[str, ...] = ()


@dataclass
class Worker:
    """A process that runs some cells in turn."""

    cells: list[Cell]
    device: str = "cuda"  # cuda | cpu


# ------------------------------------------------------------------- the cells


def phases_of(sizes: Sizes, place: Path) -> list[list[Worker]]:
    """All cells. The processes of a phase run at once; those that measure time run alone."""
    here = ("instance=small", "instance.memory_gib=null") if sizes.gpu else ("instance=cpu",)
    on, off = "train.use_liger_kernel=true", "train.use_liger_kernel=false"
    fastest, liger = (on, ("liger_kernel",)) if sizes.gpu else (off, ())

    def train(name: str, base: str, rows: str, overrides: Sequence[str], seconds: int, *needs: str) -> Cell:
        arguments = {
            "side": "bare" if name.startswith("bare ") else "sftlab",
            "overrides": list({text.partition("=")[0]: text for text in overrides}.values()),  # the last one wins
            "base": str(place / "models" / base),
            "tokens": str(place / "rows" / rows),
            "out": str(place / "out" / name),
        }
        return Cell(name, "train", arguments, seconds, needs)

    def model(shape: str, seconds: int) -> Cell:
        return Cell(f"model {shape}", "model", {"folder": str(place / "models" / shape), "shape": shape}, seconds)

    batch, _, length = sizes.loss
    settings = [
        "peft=demo", *here, off, *_batches(batch, length), f"{CHECKPOINTING}=false", "train.learning_rate=1e-3",
        "train.per_device_eval_batch_size=4",
    ]  # fmt: skip

    def loss(name: str, shape: str, *overrides: str, needs: Sequence[str] = ()) -> Cell:
        return train(f"loss {shape}, {name}", shape, "loss", [*settings, *overrides], 6, *needs)

    reference, others, with_liger = [], [], []
    for shape in sizes.small:
        reference.append(loss("CPU", shape, "instance=cpu"))
        others += [loss("GPU", shape)] if sizes.gpu else []
        others.append(loss("eager attention", shape, "instance.attn_implementation=eager"))
        others.append(loss("checkpointing", shape, f"{CHECKPOINTING}=true"))
        with_liger.append(loss("Liger", shape, on, needs=("liger_kernel", "a GPU")))
    training = train("merge", sizes.small[-1], "merge", settings, 0).arguments
    merging = {"training": training, "folder": str(place / "out" / "merged")}
    merge = Cell(f"merge {sizes.small[-1]}", "merge", merging, 25)

    ours, bare, plans = [], [], []
    for shape, rows, overrides, seconds in _benches(sizes):
        overrides = [*here, fastest, *overrides]
        ours.append(train(f"sftlab {shape}, {rows}", shape, rows, overrides, seconds, *liger))
        bare.append(train(f"bare {shape}, {rows}", shape, rows, overrides, seconds, *liger))
        arguments = {key: ours[-1].arguments[key] for key in ("overrides", "tokens")}
        arguments["base"] = str(place / "configs" / shape)
        # The study leaves gradient checkpointing to sftlab, which traces a step to decide.
        plans.append(Cell(f"plan {shape}, {rows}", "plan", arguments, 40 if rows == "medqa" else 20))
    target = next(cell for cell in ours if cell.name == f"sftlab {sizes.llama}, full-{sizes.target}")
    overrides, rows = target.arguments["overrides"], f"full-{sizes.target}"
    unfused = [
        train(f"plain adapters {sizes.llama}, {rows}", sizes.llama, rows, [*overrides, "peft.fused=false"], 18, *liger)
    ]
    plain = [train(f"without Liger {sizes.llama}, {rows}", sizes.llama, rows, [*overrides, off], 18)]
    quantised = ("peft=qlora", "peft.r=16", "peft.lora_dropout=0.0")
    qlora = [
        train(f"qlora {sizes.small[0]}, loss", sizes.small[0], "loss", [*settings, *quantised], 15, "bitsandbytes"),
        train(f"qlora {sizes.llama}, {rows}", sizes.llama, rows, [*overrides, *quantised], 35, "bitsandbytes", *liger),
    ]
    large = [model(shape, 25) for shape in (sizes.llama, sizes.gemma) if shape not in sizes.small]
    first = [Worker([*(model(shape, 5) for shape in sizes.small), *reference], "cpu"), Worker(large)]
    return [
        [*first, *(Worker([cell]) for cell in (plans if sizes.gpu else plans[:1]))],
        # Liger patches classes of transformers for the rest of the process, so trainings with Liger are last.
        [Worker([*others, merge, *(plain if sizes.gpu else []), *with_liger, *ours, *(unfused if sizes.gpu else [])])],
        [Worker(bare)],
        [Worker(qlora)],
    ]


def _benches(sizes: Sizes) -> Iterator[tuple[str, str, list[str], int]]:
    """Shape, rows, overrides and seconds of each training that is compared with bare TRL, those with targets first."""
    device, together, _, longest = sizes.medqa
    # The unchanged study, with the rows per optimizer step that it has on four GPUs.
    study = ["+experiment=medqa", f"train.global_batch_size={together}"]
    for length in sizes.lengths:
        for shape, seconds in ((sizes.llama, 18), (sizes.gemma, 14)):
            # The activations of 8,192 tokens do not fit beside the 8B model.
            checkpointing = length > sizes.tokens and shape == sizes.llama
            lora = ["peft=demo", f"{CHECKPOINTING}={str(checkpointing).lower()}"]
            yield shape, f"full-{length}", [*lora, *_batches(max(1, sizes.tokens // length), length)], seconds
        if length == sizes.lengths[0]:
            yield sizes.gemma, "medqa", [*study, *_batches(device, longest)], 30


def _batches(size: int, longest: int) -> list[str]:
    return [f"train.per_device_train_batch_size={size}", f"train.max_length={longest}"]


def make_rows(sizes: Sizes, folder: Path) -> None:
    """The rows of all cells."""
    batch, steps, longest = sizes.loss
    medqa = bench_train.lengths("medqa", batch * steps, longest)
    bench_train.rows(folder / "loss", medqa, medqa[: 2 * batch])
    bench_train.rows(folder / "merge", medqa[: 4 * batch], [sizes.merged] * 4)
    for length in sizes.lengths:
        full = [length] * max(1, sizes.tokens // length) * sizes.steps
        bench_train.rows(folder / f"full-{length}", full, full[:1])
    _, together, steps, longest = sizes.medqa
    medqa = bench_train.lengths("medqa", together * steps, longest)
    bench_train.rows(folder / "medqa", medqa, medqa[:4], bench_train.COMPLETION["medqa"])


# ------------------------------------------------------------------- in the processes that run the cells


def make_model(folder: str, shape: str) -> dict[str, Any]:
    """Save a model."""
    bench_train.model(Path(folder), shape)
    return {"gib": round(sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**30, 2)}


def train(overrides: list[str], **arguments: Any) -> dict[str, Any]:
    """Train; with gradient checkpointing if it runs out of memory without it."""
    try:
        return bench_train.training(overrides=overrides, **arguments)
    except (MemoryError, RuntimeError) as error:
        too_large = isinstance(error, MemoryError) or any(words in str(error) for words in TOO_LARGE)
        if not too_large or f"{CHECKPOINTING}=true" in overrides:
            raise
    # Outside of the block above, whose error refers to the model.
    shutil.rmtree(arguments["out"])
    return bench_train.training(overrides=[*overrides, f"{CHECKPOINTING}=true"], **arguments)


def merge(training: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train, merge the checkpoint by sftlab's own stage, and compare the two."""
    from sftlab.model import merge_worker
    from sftlab.model.base import Base

    trained = train(**training, save=True)
    _, machine = bench_train.settings(training["overrides"])
    (checkpoint,) = Path(training["out"]).glob("checkpoint-*")
    bench_train.release()
    begin = time.perf_counter()
    Path(folder).mkdir()
    base = Base("base", Path(training["base"]), "", trust_remote_code=False, chat_template=None)
    task = merge_worker.MergeTask(
        checkpoint=checkpoint, base=base, tokens=Path(training["tokens"]), device=machine.device
    )
    merge_worker.run(Path(folder), task)
    check = MergeCheck.model_validate_json(Path(folder, merge_worker.CHECK).read_bytes())
    seconds = round(time.perf_counter() - begin, 1)
    return {"training": trained, **check.model_dump(), **bench_train.peaks(machine), "merge_seconds": seconds}


def plan(overrides: list[str], base: str, tokens: str) -> dict[str, Any]:
    """The estimate of ``mode=plan`` for a training."""
    from sftlab.train.plan import cell

    cfg, machine = bench_train.settings(overrides)
    cfg = bench_train.resolved(cfg, machine, base, tokens)
    return cell(cfg, bench_train.model_at(base), bench_train.tokenized(tokens), machine).model_dump()


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"model": make_model, "train": train, "merge": merge, "plan": plan}


def work(file: Path) -> int:
    """Run the cells of a file, and write a line at the start and end of each. After a failure this process ends."""
    die_with_parent()
    task = json.loads(file.read_text("utf-8"))
    results = Path(task["results"])

    def write(name: str, **values: Any) -> None:
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"name": name, **values}) + "\n")

    for cell in task["cells"]:
        if time.time() + cell["seconds"] > task["deadline"]:
            write(cell["name"], status="skipped", error="no time left")
            continue
        write(cell["name"], status="started", since=time.time())
        begin = time.perf_counter()
        try:
            result = KINDS[cell["kind"]](**cell["arguments"])
        except Exception:
            lines = traceback.format_exc().splitlines()[-12:]
            write(cell["name"], status="failed", seconds=round(time.perf_counter() - begin, 1), error="\n".join(lines))
            return 1
        left = left_gib()
        write(cell["name"], status="done", seconds=round(time.perf_counter() - begin, 1), result=result, left_gib=left)
        if left > LEFT_GIB:
            return 0  # another process runs the others
    return 0


def left_gib() -> float:
    """GiB that are still allocated on the GPU after everything is released."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    bench_train.release()
    return round(float(torch.cuda.memory_allocated()) / 2**30, 2)


# ------------------------------------------------------------------- the process that starts them


class Report:
    """The JSON file: all cells in their order, and checks, targets and table from their results."""

    def __init__(self, path: Path, sizes: Sizes, phases: list[list[Worker]], minutes: float) -> None:
        self.path, self.sizes, self.begin = path, sizes, time.time()
        self.deadline = self.begin + 60 * minutes
        self.cells: dict[str, dict[str, Any]] = {}
        for cell in (cell for phase in phases for worker in phase for cell in worker.cells):
            missing = [name for name in cell.needs if not self._available(name)]
            status = {"status": "left out", "error": f"needs {' and '.join(missing)}"} if missing else {}
            self.cells[cell.name] = {"kind": cell.kind, "status": "pending", **status}
        self.machine, self.versions = machine(), versions(*PACKAGES)
        self.header = {"minutes": minutes, "machine": self.machine, "versions": self.versions}
        self.write()

    def _available(self, name: str) -> bool:
        return self.sizes.gpu if name == "a GPU" else importlib.util.find_spec(name) is not None

    def pending(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that have not ended."""
        return [cell for cell in cells if self.cells[cell.name]["status"] in ("pending", "started")]

    def note(self, name: str, **values: Any) -> None:
        """Print and write the state of a cell."""
        self.cells[name].update(values)
        if values["status"] != "started":
            error = values.get("error", "").strip().splitlines()
            seconds = values.get("seconds")
            print(
                f"{time.time() - self.begin:5.0f} s  {values['status']:8} {name}"
                + (f" ({seconds:.0f} s)" if seconds is not None else "")
                + (f": {error[-1]}" if error else ""),
                flush=True,
            )
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        values = {**self.header, "seconds": round(time.time() - self.begin, 1), "cells": self.cells}
        write_json(self.path, {**values, "checks": self.checks(), "targets": self.targets(), "table": self.rows()})

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a cell, if it is done."""
        return self.cells[name].get("result") if name in self.cells else None

    def checks(self) -> list[dict[str, Any]]:
        """Checks, each with its value and limit. ``holds`` is None if it was left out or not reached."""
        checks = []
        for name, cell in self.cells.items():
            kind, _, what = name.partition(" ")
            if (result := cell.get("result")) is None:
                continue
            if kind == "loss" and not name.endswith(", CPU"):
                reference = self.result(f"{name.partition(',')[0]}, CPU")
                gap = None if reference is None else loss_gap(result, reference)
                checks.append(_check(f"{name} against the CPU", gap, TOLERANCE))
            if kind == "sftlab" and (bare := self.result(f"bare {what}")) is not None:
                checks.append(_check(f"loss of {what}, sftlab against bare TRL", loss_gap(result, bare), TOLERANCE))
            if kind == "merge":
                gap = abs(result["merged_loss"] - result["adapter_loss"])
                checks.append(_check(f"{name}: loss against the adapter's", gap, TOLERANCE))
            if name.endswith(", Liger"):
                checks.append(_check(f"{name}: no module runs Liger", int(not result["receipt"]["liger_modules"]), 0))
            if kind == "qlora":
                layers = bench_train.SHAPES[what.partition(",")[0]]["num_hidden_layers"]
                missing = 7 * layers - result["receipt"]["quantized_layers"]
                checks.append(_check(f"{name}: layers that are not quantised", missing, 0))
        return checks

    def targets(self) -> list[dict[str, Any]]:
        """Targets; ``met`` is None if the value was not measured."""
        sizes = self.sizes
        full = self.result(f"sftlab {sizes.llama}, full-{sizes.target}") or {}
        ours, bare = (self.result(f"{side} {sizes.gemma}, medqa") for side in ("sftlab", "bare"))
        ratio = ours["tokens_per_second"] / bare["tokens_per_second"] if ours and bare else None
        speed, mfu = full.get("tokens_per_second"), full.get("mfu")
        named = (
            (f"{sizes.gemma}, MedQA-shaped rows: speed against bare TRL", ratio, 1.5),
            (f"{sizes.llama} LoRA, {sizes.target} tokens: tokens/s", speed, 12000),
            (f"{sizes.llama} LoRA, {sizes.target} tokens: MFU", mfu, 0.45),
        )
        return [
            {"name": name, "value": value, "goal": goal, "met": None if value is None else value >= goal}
            for name, value, goal in named
        ]

    def rows(self) -> list[dict[str, Any]]:
        """The table: a training with sftlab, with bare TRL, and as estimated by ``mode=plan``."""
        rows = []
        for name, cell in self.cells.items():
            ours = cell.get("result")
            if name.startswith("sftlab "):
                what = name.removeprefix("sftlab ")
                rows.append({"name": what, **_row(ours, self.result(f"bare {what}"), self.result(f"plan {what}"))})
            elif name.startswith(("qlora ", "without Liger ", "plain adapters ")):
                rows.append({"name": name, **_row(ours, None, None)})
        return rows


def _check(name: str, value: float | None, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "holds": None if value is None else value <= limit}


def loss_gap(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest difference between the losses of two trainings at any step, and between their validation losses."""
    pairs: list[tuple[float, float]] = list(zip(first["losses"], second["losses"], strict=True))
    if first["eval_loss"] is not None and second["eval_loss"] is not None:
        pairs.append((first["eval_loss"], second["eval_loss"]))
    return round(max(abs(a - b) for a, b in pairs), 5)


def _row(
    ours: dict[str, Any] | None, bare: dict[str, Any] | None, plan: dict[str, Any] | None
) -> dict[str, float | bool | None]:
    row: dict[str, float | bool | None] = {}
    for side, result in (("", ours), ("bare_", bare)):
        for key in ("tokens_per_second", "mfu", "peak_memory_gib", "gradient_checkpointing"):
            row[side + key] = None if result is None else result[key]
    if ours and bare:
        row["ratio"] = round(ours["tokens_per_second"] / bare["tokens_per_second"], 3)
        if ours["mfu"] is not None:  # the same arithmetic in another time
            row["bare_mfu"] = round(ours["mfu"] / row["ratio"], 4)
        row["loss_gap"] = loss_gap(ours, bare)
    if ours and plan:
        row["planned_gib"], row["planned_seconds"] = plan["training_gib"], plan["seconds_per_epoch"]
        row["memory_error"] = round(plan["training_gib"] / ours["peak_memory_gib"] - 1, 3)
        if plan["seconds_per_epoch"] is not None:
            row["time_error"] = round(plan["seconds_per_epoch"] / ours["epoch_seconds"] - 1, 3)
    return row


def machine() -> dict[str, Any]:
    """The GPU and the rest of the machine."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        shown = ""
    return {
        "gpu": shown.splitlines()[0] if shown else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


@dataclass
class Running:
    """A process that runs the remaining cells of a worker, and the number of its lines that were read."""

    process: subprocess.Popen[bytes]
    worker: Worker
    folder: Path
    seen: int = 0


def run(workers: Sequence[Worker], report: Report, place: Path) -> None:
    """Run the processes of a phase. If one ends before its cells have run, another runs the rest."""
    running = [started for worker in workers if (started := _start(worker, report, place))]
    try:
        while running:
            time.sleep(0.1)
            for each in list(running):
                late = time.time() > report.deadline + GRACE
                hangs = report.sizes.gpu and _hangs(each.worker, report)
                if each.process.poll() is None and (late or hangs):
                    each.process.kill()
                    each.process.wait()
                ended = each.process.poll() is not None
                each.seen = _read(each.folder, each.seen, report)
                if not ended:
                    continue
                running.remove(each)
                for cell in report.pending(each.worker.cells):
                    if late:
                        report.note(cell.name, status="skipped", error="stopped at the end of --minutes")
                    elif report.cells[cell.name]["status"] == "started" or not each.seen:
                        code = each.process.returncode
                        error = (
                            f"{_tail(each.folder)}\n{'stopped: it hung' if hangs else f'ended with exit code {code}'}"
                        )
                        report.note(cell.name, status="failed", error=error)
                if started := _start(each.worker, report, place):
                    running.append(started)
    finally:
        for each in running:
            each.process.kill()
            each.process.wait()


def _hangs(worker: Worker, report: Report) -> bool:
    """Whether a cell takes several times as long as expected."""
    begun = [cell for cell in worker.cells if report.cells[cell.name]["status"] == "started"]
    return any(time.time() - report.cells[cell.name]["since"] > 60 + 3 * cell.seconds for cell in begun)


def _start(worker: Worker, report: Report, place: Path) -> Running | None:
    """Start a process for the remaining cells of a worker, if there are any and there is time."""
    cells = report.pending(worker.cells)
    for cell in cells:
        if time.time() + cell.seconds > report.deadline:
            report.note(cell.name, status="skipped", error="no time left")
    if not (cells := report.pending(cells)):
        return None
    folder = Path(tempfile.mkdtemp(prefix="worker-", dir=place))
    task = {"cells": [asdict(cell) for cell in cells], "deadline": report.deadline}
    write_json(folder / "cells.json", {**task, "results": str(folder / "results.jsonl")})
    (folder / "results.jsonl").touch()
    gpu = report.sizes.gpu and worker.device == "cuda"
    machine = bench_train.settings(["instance=small" if gpu else "instance=cpu"])[1]
    # Bare TRL on a GPU runs without the variables that sftlab sets for its own training.
    is_bare = any(cell.arguments.get("side") == "bare" for cell in cells)
    variables = machine.environment() if gpu and is_bare else machine.training_environment()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(folder / "cells.json")],
            env={**QUIET, **os.environ, **NEEDED, **variables},
            stdout=log,
            stderr=log,
        )
    return Running(process, worker, folder)


def _read(folder: Path, seen: int, report: Report) -> int:
    """Read the lines that a process has written since; their number now."""
    text = (folder / "results.jsonl").read_text("utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    for line in lines[seen:]:
        report.note(**json.loads(line))
    return len(lines)


def _tail(folder: Path) -> str:
    """The last lines of a process's log, without progress bars."""
    lines = (folder / "log").read_text("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return "\n".join([line for line in lines if line.strip() and "it/s]" not in line][-12:])


def show(report: Report) -> bool:
    """Print the table, the checks, the targets and the missing cells; whether all checks hold and none is missing."""

    def text(value: Any, form: str) -> str:
        return "—" if value is None else format(value, form)

    print(f"\n{report.machine['gpu'] or 'CPU'}; " + ", ".join(
        f"{name} {version}" for name, version in report.versions.items() if version))  # fmt: skip
    print(f"\n{'':42} {'sftlab':>27}   {'bare TRL':>27}   {'':13}   {'plan':>26}")
    print(
        f"{'training':42} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} ckpt   {'tokens/s':>9} {'MFU':>6} {'GiB':>6} ckpt   "
        f"{'ratio':>5} {'loss ±':>7}   {'GiB':>6} {'error':>6} {'s':>6} {'error':>6}"
    )
    for row in report.rows():
        sides = (
            f"{text(row.get(side + 'tokens_per_second'), '9,.0f'):>9} {text(row.get(side + 'mfu'), '6.1%'):>6} "
            f"{text(row.get(side + 'peak_memory_gib'), '6.1f'):>6} "
            f"{ {None: '—', True: 'yes', False: 'no'}[row.get(side + 'gradient_checkpointing')]:4}"
            for side in ("", "bare_")
        )
        print(
            f"{row['name']:42} {'   '.join(sides)}   {text(row.get('ratio'), '5.2f'):>5} "
            f"{text(row.get('loss_gap'), '7.4f'):>7}   {text(row.get('planned_gib'), '6.1f'):>6} "
            f"{text(row.get('memory_error'), '+6.0%'):>6} {text(row.get('planned_seconds'), '6.1f'):>6} "
            f"{text(row.get('time_error'), '+6.0%'):>6}"
        )
    print("\nchecks")
    for check in report.checks():
        word = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[check["holds"]]
        print(f"  {word:13} {check['name']}: {text(check['value'], '.4g')} (at most {check['limit']:g})")
    print("targets")
    for target in report.targets():
        word = {True: "met", False: "not met", None: "not measured"}[target["met"]]
        print(f"  {word:13} {target['name']}: {text(target['value'], ',.4g')} (at least {target['goal']:,g})")
    missing = {name: cell for name, cell in report.cells.items() if cell["status"] != "done"}
    for status in ("left out", "skipped", "failed"):
        names = [
            f"{name} ({cell['error'].splitlines()[-1]})" for name, cell in missing.items() if cell["status"] == status
        ]
        if names:
            print(f"{status}:\n  " + "\n  ".join(names))
    print(f"{time.time() - report.begin:.0f} s; {report.path}")
    return not any(cell["status"] != "left out" for cell in missing.values()) and all(
        check["holds"] is not False for check in report.checks()
    )


def main() -> int:
    """Run all cells within the time, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="no cell starts after that (default: 9)")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU, to test this script")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="JSON file (default: gpu_check.json)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return work(options.worker)
    if options.out.is_dir() or not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: must be a file in a folder that exists")
    if not options.cpu and not visible_gpus():
        if machine()["gpu"] is None or "CUDA_VISIBLE_DEVICES" in os.environ:
            parser.error("no NVIDIA GPU is visible on this machine; add --cpu to test this script on the CPU")
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # a virtual machine may have a driver and no /proc/driver/nvidia
    sizes = TINY if options.cpu else REAL
    os.environ.update({**QUIET, **os.environ})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # The models take 25 GiB, and load faster from memory.
    shm = Path("/dev/shm")  # noqa: S108
    roomy = sizes.gpu and shm.is_dir() and shutil.disk_usage(shm).free > 50 * 2**30
    with tempfile.TemporaryDirectory(prefix="gpu_check_", dir=shm if roomy else None) as name:
        place = Path(name)
        phases = phases_of(sizes, place)
        report = Report(options.out.absolute(), sizes, phases, options.minutes)
        for shape in bench_train.SHAPES:
            bench_train.describe(place / "configs" / shape, shape)
        make_rows(sizes, place / "rows")
        for phase in phases:
            run(phase, report, place)
    report.write()
    return 0 if show(report) else 1


if __name__ == "__main__":
    sys.exit(main())
