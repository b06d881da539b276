#!/usr/bin/env python
"""Time a sweep, and the same jobs one by one: each with its own rows, tokens, training, base and own evaluation.

    scripts/bench_sweep.py                                  the demo sweep (about an hour on two cores)
    scripts/bench_sweep.py 'dataset.split={train: 96, validation: 32, test: 48}'   a smaller one

Both run on this machine, one after the other, each job in a store of its own. What a user of any tool has
before the first job, the base model's folder, is given to every store.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sftlab.runtime.job import Job, jobs

EXPERIMENT = "+experiment=demo_sweep"


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds, of them those in training, and tokens that went through it (prompt and completion)."""

    seconds: float
    training: float
    tokens: float


def sftlab(*overrides: str) -> None:
    """Run the command to its end."""
    subprocess.run([sys.executable, "-m", "sftlab", *overrides], check=True)


def run(folder: Path, store: Path, overrides: list[str]) -> tuple[Cost, list[Job]]:
    """A sweep with everything that belongs to it, from an empty store."""
    start = time.monotonic()
    sftlab(*overrides, f"store={store}", f"hydra.sweep.dir={folder}")
    seconds = time.monotonic() - start
    found = jobs(folder)
    receipts = [json.loads((Path(job.stages["train"]) / "receipt.json").read_text("utf-8")) for job in found]
    # A receipt's rate and time are those of the steps that this job took itself.
    training = sum(row["train_seconds"] for row in receipts)
    return Cost(seconds, training, sum(row["tokens_per_second"] * row["train_seconds"] for row in receipts)), found


def main() -> None:
    """Print both costs and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="what to change in the demo sweep, as on sftlab's command line")
    overrides = ["+experiment=demo_sweep", "tracking=none", *parser.parse_args().overrides]
    with tempfile.TemporaryDirectory(prefix="bench_sweep_") as place:
        root = Path(place)
        # A preview makes the base model's folder and trains nothing.
        sftlab(*overrides, "hydra.mode=RUN", "mode=preview", f"store={root / 'base'}", f"hydra.run.dir={root}/preview")

        def store(name: str) -> Path:
            shutil.copytree(root / "base" / "model", root / name / "model")
            return root / name

        together, found = run(root / "sweep", store("together"), overrides)
        alone, losses = [], []
        for job in found:
            own = [override for override in job.overrides if not override.startswith("store=")]
            cost, single = run(root / f"job-{job.number}", store(f"alone-{job.number}"), own)
            alone.append(cost)
            losses += [row.eval_loss for row in single[0].candidates]
    best = min(row.eval_loss for job in found for row in job.candidates)
    seconds, tokens = sum(cost.seconds for cost in alone), sum(cost.tokens for cost in alone)
    print(f"\n{len(found)} jobs             sweep   one by one   ratio")
    print(f"wall-clock (s)   {together.seconds:8,.0f} {seconds:12,.0f} {together.seconds / seconds:7.2f}")
    beside, beside_alone = together.seconds - together.training, seconds - sum(cost.training for cost in alone)
    print(f"beside training  {beside:8,.0f} {beside_alone:12,.0f} {beside / beside_alone:7.2f}")
    print(f"tokens trained   {together.tokens:8,.0f} {tokens:12,.0f} {together.tokens / tokens:7.2f}")
    print(f"lowest validation loss: {best:.6f} in the sweep, {min(losses):.6f} one by one")


if __name__ == "__main__":
    main()
