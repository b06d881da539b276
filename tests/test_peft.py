"""Each way to train reaches the model, and what it leaves merges into a model that answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

TINY = [
    "model=tiny_random",
    "dataset.max_rows=24",
    "train.num_train_epochs=1",
    "tracking=none",
    "eval=transformers",
    "eval.baseline=false",
    "eval.max_rows=2",
    "eval.max_tokens=4",
]
LINEAR_LAYERS = 14  # of two layers: q, k, v, o, gate, up and down


@pytest.mark.parametrize("method", ["none", "qlora"])
def test_method(tmp_path: Path, method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sftlab", *TINY, f"peft={method}", "hydra.run.dir=run"],
        cwd=tmp_path,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    receipt = run["receipt"]
    if method == "none":
        assert receipt["trainable_parameters"] == receipt["parameters"]
        assert receipt["quantized_layers"] == 0
        assert receipt["base_dtype"] == "torch.float32"
    else:
        assert receipt["quantized_layers"] == LINEAR_LAYERS
        assert 0 < receipt["trainable_parameters"] < receipt["parameters"]
    assert run["merge"]["changed_tensors"] > 0
    assert run["evaluation"]["finetuned"]["n"] == 2
    assert "baseline" not in run["evaluation"]
