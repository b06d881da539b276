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


# Other settings that must reach the model go along: each run costs half a minute.
ALONG = {"qlora": ["train.optim=adamw_8bit"], "dora": ["train.packing=true", "train.max_length=512"]}


@pytest.mark.parametrize("method", ["none", "qlora", "dora", "rslora"])
def test_method(tmp_path: Path, method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sftlab", *TINY, f"peft={method}", *ALONG.get(method, []), "hydra.run.dir=run"],
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
        assert receipt["optimizer_state"] == ["float32"]
    else:
        adapter = json.loads((tmp_path / "run" / "best" / "adapter_config.json").read_text("utf-8"))
        assert (adapter["use_dora"], adapter["use_rslora"]) == (method == "dora", method == "rslora")
        assert receipt["quantized_layers"] == (LINEAR_LAYERS if method == "qlora" else 0)
        assert ("uint8" in receipt["optimizer_state"]) == (method == "qlora")
        assert 0 < receipt["trainable_parameters"] < receipt["parameters"]
    assert run["merge"]["changed_tensors"] > 0
    assert run["merge"]["merged_loss"] == pytest.approx(run["merge"]["adapter_loss"], abs=0.01)
    assert receipt["tokens_per_second_per_device"] == receipt["tokens_per_second"] > 0
    assert receipt["mfu"] is None  # of a CPU
    assert run["evaluation"]["finetuned"]["n"] == 2
    assert "baseline" not in run["evaluation"]
