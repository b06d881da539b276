#!/usr/bin/env python
"""Compare the speed and memory of reading and tokenising chats with ``datasets``, on generated rows of about 2 kB.

    scripts/bench_data.py                          10,000, 100,000 and 1,000,000 rows (2 GB; about an hour)
    scripts/bench_data.py --rows 10000             one size
    scripts/bench_data.py --tokenizer FOLDER       another tokenizer; the default is that of the demo's model

``datasets`` loads the file and tokenises it by ``Dataset.map``, with the same chat template and as many processes as
cores. sftlab validates the same file, and tokenises it into token ids and loss masks. Both read the file from the cache
of the operating system. Memory is the sum of the proportional set sizes of all processes, so shared pages count once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
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
loaded = time.monotonic()
def tokenize(batch):
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
    return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}
rows = rows.map(tokenize, batched=True, num_proc=len(os.sched_getaffinity(0)), remove_columns=rows.column_names)
print(loaded - start, time.monotonic() - loaded)
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
    path, store, folder = sys.argv[1:]
    start = time.monotonic()
    overrides = ["mode=train", "train.max_length=2048", f"store={store}"]
    overrides += json.loads(Path(folder, "overrides.json").read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = validate(compose("config", overrides=[*overrides, f"dataset.name_or_path={path}"]))
    data = dataset.make(Store(store), cfg.dataset)
    reading = time.monotonic() - start
    base = models.resolve(cfg.model, Store(store), cfg.seed)  # dequantised once for all experiments
    start = time.monotonic()
    tokenize.make(Store(store), data, base, cfg)
    print(reading, time.monotonic() - start)
if __name__ == "__main__":
    main()
"""


class Measured(NamedTuple):
    """Seconds of reading and of tokenising, and the largest memory of all processes together, in GiB."""

    reading: float
    tokenizing: float
    memory: float


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


def measure(program: str, arguments: list[str], folder: Path) -> Measured:
    """Run a program that prints two durations, and watch the memory of its processes."""
    script = folder / "program.py"
    script.write_text(program, "utf-8")
    command = [sys.executable, str(script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUIET})
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    out, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}")
    reading, tokenizing = map(float, out.split())
    return Measured(reading, tokenizing, peak[0] / 2**30)


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _memory(process.pid))
        time.sleep(0.5)


def _memory(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(each.memory_full_info().pss for each in [parent, *parent.children(recursive=True)])
    except psutil.Error:
        return 0


def main() -> None:
    """Print a table with a row for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--overrides", nargs="*", default=["dataset=chat"], help="of sftlab's configuration")
    arguments = parser.parse_args()
    print(f"{'rows':>10}  {'':10}{'read':>8}{'tokenize':>10}{'rows/s':>8}{'memory':>11}")
    for count in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="bench_data_") as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", count)
            (folder / "overrides.json").write_text(json.dumps(arguments.overrides), "utf-8")
            ours = measure(SFTLAB, [str(folder / "rows.jsonl"), str(folder / "store"), name], folder)
            model = next((folder / "store" / "model").glob("*/tokenizer.json")).parent
            theirs = measure(DATASETS, [str(folder / "rows.jsonl"), str(folder / "cache"), str(model)], folder)
            for label, one in (("datasets", theirs), ("sftlab", ours)):
                speed = count / (one.reading + one.tokenizing)
                print(
                    f"{count:>10,}  {label:10}{one.reading:>6.1f} s{one.tokenizing:>8.1f} s{speed:>8,.0f}"
                    f"{one.memory:>7.2f} GiB"
                )
            mapped = theirs.tokenizing / ours.tokenizing
            print(
                f"{'':12}tokenizing: {mapped:.2f} × Dataset.map; with reading: {sum(theirs[:2]) / sum(ours[:2]):.2f} ×"
            )


if __name__ == "__main__":
    main()
