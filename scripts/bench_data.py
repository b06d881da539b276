#!/usr/bin/env python
"""Measure the speed and memory of reading and tokenising chats, on generated rows of about 2 kB.

    scripts/bench_data.py                          10,000, 100,000 and 1,000,000 rows
    scripts/bench_data.py --rows 1000000           one size (2 GB; half an hour on two idle cores, 15 GB of TMPDIR)
    scripts/bench_data.py --overrides dataset=auto other settings of sftlab

A figure is printed as soon as it is measured, so an interrupted run keeps those before it:

    dry_run       the command with dry_run=true: reads and renders the rows, and compares the splits
    read          sftlab reads and renders the rows into Arrow files / ``load_dataset`` reads them
    tokenize      sftlab makes token ids and loss masks / ``Dataset.map`` makes token ids

``Dataset.map`` has the same tokenizer, chat template and number of processes (one for each core). All read the file
from the cache of the operating system. The memory of a step is the largest sum of the proportional set sizes (PSS) of
all its processes, in which a page that several processes share counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from sftlab.dataset import vignettes
from sftlab.runtime.processes import QUIET

DATASETS = """
import os, sys, time
from datasets import load_dataset
from transformers import AutoTokenizer
path, cache, folder = sys.argv[1:]
start = time.monotonic()
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = load_dataset("json", data_files=path, split="train", cache_dir=cache)
print("read", len(rows), time.monotonic() - start, flush=True)
start = time.monotonic()
def tokenize(batch):
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
    return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}
rows = rows.map(tokenize, batched=True, num_proc=len(os.sched_getaffinity(0)), remove_columns=rows.column_names)
print("tokenize", len(rows), time.monotonic() - start, flush=True)
"""
DRY_RUN = """
import json, subprocess, sys, time
from pathlib import Path
path, store, folder, rows = sys.argv[1:]
start = time.monotonic()
overrides = ["dry_run=true", "train.max_length=2048", f"store={store}", f"hydra.run.dir={folder}/run"]
overrides += json.loads(Path(folder, "overrides.json").read_text())
command = [sys.executable, "-m", "sftlab", *overrides, f"dataset.name_or_path={path}"]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode:
    sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
print("dry_run", rows, time.monotonic() - start, flush=True)
"""
SFTLAB = """
import json, sys, time
from pathlib import Path
from hydra import compose, initialize_config_dir
from sftlab.dataset import stage as dataset, tokenize
from sftlab.hydra_app.compose import CONF
from sftlab.model import base as models
from sftlab.runtime.store import Store
from sftlab.validation.validate import validate
def main():
    path, store, folder, rows = sys.argv[1:]
    start = time.monotonic()
    overrides = ["mode=train", "train.max_length=2048", f"store={store}"]
    overrides += json.loads(Path(folder, "overrides.json").read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = validate(compose("config", overrides=[*overrides, f"dataset.name_or_path={path}"]))
    data = dataset.make(Store(store), cfg.dataset)
    print("read", rows, time.monotonic() - start, flush=True)
    base = models.resolve(cfg.model, Store(store), cfg.seed)  # dequantised once for all experiments
    start = time.monotonic()
    print("model", 0, 0, flush=True)
    tokenize.make(Store(store), data, base, cfg)
    rows = sum(map(len, data.for_training().values()))  # the test rows are tokenised by the evaluation
    print("tokenize", rows, time.monotonic() - start, flush=True)
if __name__ == "__main__":
    main()
"""


LIMIT = 2  # GiB of memory of the dry run, of reading and of tokenising
SPEED = 0.8  # rows per second of tokenising, as a multiple of those of Dataset.map


class Step(NamedTuple):
    """Rows and seconds of a step, and the largest memory of all its processes together, in GiB."""

    rows: int
    seconds: float
    memory: float

    @property
    def speed(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds


def write_rows(path: Path, count: int) -> None:
    """Write chats of one to three questions with answers, about 2 kB each, of words from the vignettes."""
    draw = random.Random(0)
    words = sorted({word for row in vignettes.rows(200, 0) for word in f"{row['question']} {row['rationale']}".split()})
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            turns, messages = draw.randint(1, 3), []
            for _ in range(turns):
                for role, share in (("user", 0.3), ("assistant", 0.7)):
                    text = " ".join(draw.choices(words, k=int(share * 290 / turns)))
                    messages.append({"role": role, "content": text})
            out.write(json.dumps({"messages": messages}) + "\n")


def measure(label: str, program: str, arguments: list[str], folder: Path) -> dict[str, Step]:
    """Run a program that prints each step with its rows and seconds, and watch the memory of its processes."""
    script = folder / "program.py"
    script.write_text(program, "utf-8")
    command = [sys.executable, str(script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUIET})
    peak = [0]
    threading.Thread(target=_watch, args=(process, peak), daemon=True).start()
    steps: dict[str, Step] = {}
    for line in process.stdout or ():
        name, rows, seconds = line.split()
        step, peak[0] = Step(int(rows), float(seconds), peak[0] / 2**30), 0
        if step.rows:
            steps[name] = step
            figures = f"{step.seconds:>8.1f} s{step.speed:>9,.0f} rows/s{step.memory:>7.2f} GiB"
            print(f"{step.rows:>10,}  {label:10}{name:10}{figures}", flush=True)
    if process.wait():
        sys.exit(f"{command}: exit code {process.returncode}")
    return steps


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _memory(process.pid))
        time.sleep(0.2)


def _memory(pid: int) -> int:
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for each in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended
                total += each.memory_full_info().pss
    return total


def bench(count: int, overrides: list[str], folder: Path) -> None:
    """Print the figures of a number of rows, and whether they are within the limits."""
    rows, store = folder / "rows.jsonl", folder / "store"
    write_rows(rows, count)
    (folder / "overrides.json").write_text(json.dumps(overrides), "utf-8")
    ours = [str(rows), str(store), str(folder), str(count)]
    steps = measure("sftlab", DRY_RUN, ours, folder) | measure("sftlab", SFTLAB, ours, folder)
    model = next((store / "model").glob("*/tokenizer.json")).parent
    for stage in ("dataset", "tokens"):  # of the disk space
        shutil.rmtree(store / stage)
    theirs = measure("datasets", DATASETS, [str(rows), str(folder / "cache"), str(model)], folder)
    memory, name = max((step.memory, name) for name, step in steps.items())
    mapped = steps["tokenize"].speed / theirs["tokenize"].speed
    own, other = (sum(1 / one[name].speed for name in ("read", "tokenize")) for one in (steps, theirs))
    print(f"{'':12}memory of sftlab: at most {memory:.2f} GiB ({name}); {_judged(memory <= LIMIT)} {LIMIT} GiB or less")
    print(
        f"{'':12}tokenize: {mapped:.2f} × the rows/s of Dataset.map; {_judged(mapped >= SPEED)} {SPEED} or more; "
        f"with read: {other / own:.2f} ×",
        flush=True,
    )


def _judged(holds: bool) -> str:
    return "as required," if holds else "NOT as required,"


def main() -> None:
    """Print the figures of each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--overrides", nargs="*", default=["dataset=chat"], help="of sftlab's configuration")
    arguments = parser.parse_args()
    print(f"{'rows':>10}  {'':10}{'step':10}{'time':>10}{'speed':>16}{'memory (PSS)':>13}", flush=True)
    for count in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="bench_data_") as name:
            bench(count, arguments.overrides, Path(name))


if __name__ == "__main__":
    main()
