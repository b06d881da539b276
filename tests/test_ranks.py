"""Two gloo ranks stand in for several GPUs: the same training as one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

TINY = ["model=tiny_random", "tracking=none", "mode=train", "instance=cpu"]
# Training rows that fill the last batch of both ranks (accelerate fills it with the first rows again where they do
# not, and that is another training), and an odd number of validation rows, of which none may count twice.
ROWS = "dataset.split={train: 32, validation: 7, test: 8}"
# Without dropout, whose draws differ between ranks; in fp32, whose sums differ least.
EXACT = [
    "instance.bf16=false",
    "peft.lora_dropout=0.0",
    "train.num_train_epochs=2",
    "train.per_device_eval_batch_size=2",
]


def train(folder: Path, name: str, *overrides: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "sftlab", *TINY, ROWS, *EXACT, f"hydra.run.dir={name}", *overrides],
        cwd=folder,
        # As if sftlab itself had been started by a launcher: its ranks must not believe these.
        env={**os.environ, "RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_PORT": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name / "run.json").read_text("utf-8"))


def test_two_ranks_train_like_one_process_with_twice_the_batch(tmp_path: Path) -> None:
    batch = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1"]
    one = train(tmp_path, "one", "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")
    two = train(tmp_path, "two", *batch, "instance.num_processes=2")
    assert one["receipt"]["effective_batch"] == two["receipt"]["effective_batch"] == 8
    assert two["receipt"]["num_processes"] == 2
    first, second = (run["selection"]["candidates"] for run in (one, two))
    assert [row["eval_loss"] for row in second] == pytest.approx([row["eval_loss"] for row in first], abs=1e-3)
    curves = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        curves.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    # Ranks that did not share their gradients would have drifted apart.
    checksums = two["receipt"]["rank_checksums"]
    assert len(checksums) == 2
    assert checksums[0] == checksums[1]
