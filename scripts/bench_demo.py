#!/usr/bin/env python
"""Time the demo beside a bare PyTorch loop over 100,000 tokens on the same machine.

The loop trains LoRA r 16 on all linear layers of the demo's model, 4 rows of 232 tokens with the output head on 80
positions of each, in float32 and in bfloat16 (weights and autocast); the faster one counts. Then the demo runs from an
empty store. Prints tokens/s, seconds and their ratio, and the seconds of each stage.

    scripts/bench_demo.py [OVERRIDE …]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

TOKENS = 100_000
ROWS, LENGTH, POSITIONS, STEPS = 4, 232, 80, 8

LOOP = """
import json, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
folder, dtype, rows, length, positions, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
model.config.use_cache = False
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
ids = torch.randint(10, 40_000, (rows, length))
times = []
for _ in range(steps + 1):
    begin = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(input_ids=ids, logits_to_keep=positions).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -positions:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - begin)
print(json.dumps(times[1:]))
"""


def loop(model: Path, dtype: str) -> float:
    """Tokens/s of the bare loop, by its median step."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        LOOP,
        str(model),
        dtype,
        *map(str, (ROWS, LENGTH, POSITIONS, STEPS)),
    ]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds: list[float] = json.loads(out.splitlines()[-1])
    return ROWS * LENGTH / median(seconds)


def main() -> None:
    """Print the loop's speed, the demo's time and their ratio."""
    with tempfile.TemporaryDirectory(prefix="bench_demo_") as place:
        folder = Path(place)
        begin = time.monotonic()
        subprocess.run(
            [
                sys.executable,
                "-m",
                "sftlab",
                f"store={folder / 'store'}",
                f"hydra.run.dir={folder / 'run'}",
                *sys.argv[1:],
            ],
            check=True,
            env={**os.environ, "WANDB_MODE": "offline"},
        )
        seconds = time.monotonic() - begin
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        (model,) = (path for path in (folder / "store" / "model").iterdir() if path.is_dir())
        speeds = {dtype: loop(model, dtype) for dtype in ("float32", "bfloat16")}
        run: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text("utf-8"))
    dtype = max(speeds, key=speeds.__getitem__)
    alone = TOKENS / speeds[dtype]
    print(f"\nbare loop: {', '.join(f'{name} {speed:.0f} tokens/s' for name, speed in speeds.items())}")
    print(f"{TOKENS:,} tokens in {dtype}: {alone:.0f} s; demo: {seconds:.0f} s; ratio {seconds / alone:.2f}")
    print(f"largest process: {peak:.1f} GiB; stages: {run['times']}; precision: {run['precision']}")
    evaluation = run["evaluation"]
    for name in ("baseline", "finetuned"):
        print(f"{name}: {evaluation[name]['correct']} of {evaluation[name]['n']}")


if __name__ == "__main__":
    main()
