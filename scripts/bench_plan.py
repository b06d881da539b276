#!/usr/bin/env python
"""Compare the plan of several trainings with their measured peak memory and time per epoch.

    scripts/bench_plan.py                    SmolLM2-135M in several shapes (about 15 minutes on two cores)
    scripts/bench_plan.py --tolerance 0.2    exit code 1 if an error is larger

Each shape is estimated, probed and trained for an epoch on this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = {
    "LoRA, batch 4": [],
    "LoRA, batch 8, checkpointing": ["train.per_device_train_batch_size=8", "train.gradient_checkpointing=true"],
    "LoRA r 64, batch 2, fp32": ["train.per_device_train_batch_size=2", "peft.r=64", "train.bf16=false"],
    "all weights, batch 2": ["train.per_device_train_batch_size=2", "peft=none"],
    "LoRA, batch 4, eager": ["instance.attn_implementation=eager"],
}
COMMON = ["instance=cpu", "tracking=none", "dataset.split={train: 64, validation: 16, test: 8}"]


def sftlab(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Run the command; the content of its run.json."""
    command = [sys.executable, "-m", "sftlab", *COMMON, *overrides, f"hydra.run.dir={name}"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    values: dict[str, Any] = json.loads((folder / name / "run.json").read_text("utf-8"))
    return values


def main() -> None:
    """Print a line per shape: estimated, probed and measured, with the errors of the first two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=0.2, help="largest error without a failure (default: 0.2)")
    tolerance = parser.parse_args().tolerance
    errors: list[float] = []
    heads = ["estimated GiB", "probed GiB", "measured", "estimated s", "probed s", "measured"]
    print(f"{'':30}", *(f"{text:>16}" for text in heads))
    with tempfile.TemporaryDirectory(prefix="bench_plan_") as place:
        folder = Path(place)
        for number, (name, overrides) in enumerate(SHAPES.items()):
            settings = [*overrides, "train.num_train_epochs=1"]
            (plain,) = sftlab(folder, f"plan{number}", "mode=plan", *settings)["plan"]
            (probed,) = sftlab(folder, f"probe{number}", "mode=plan", "plan.probe=true", *settings)["plan"]
            run = sftlab(folder, f"run{number}", "mode=train", *settings)
            gib, seconds = run["receipt"]["peak_memory_gib"], run["receipt"]["train_seconds"]
            both = (plain, probed)
            cells = [(plan["training_gib"], gib) for plan in both]
            cells += [(plan["seconds_per_epoch"], seconds) for plan in both]
            off = [value / true - 1 for value, true in cells]
            texts = [f"{value:.2f} ({100 * error:+.0f} %)" for (value, _), error in zip(cells, off, strict=True)]
            columns = [*texts[:2], f"{gib:.2f}", *texts[2:], f"{seconds:.0f}"]
            print(f"{name:30}", *(f"{text:>16}" for text in columns), flush=True)
            errors += off
    worst = max(map(abs, errors))
    print(f"largest error: {100 * worst:.0f} %")
    sys.exit(worst > tolerance)


if __name__ == "__main__":
    main()
