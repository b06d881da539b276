"""The real model in the real engine: SmolLM2-135M trains, merges and answers in vLLM on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke


def test_smollm2_trains_merges_and_answers_in_vllm(tmp_path: Path) -> None:
    overrides = ["dataset.max_rows=56", "train.num_train_epochs=1", "eval.max_rows=12", "tracking=none"]
    done = subprocess.run(
        [sys.executable, "-m", "sftlab", *overrides, "hydra.run.dir=run", "eval.max_tokens=120"],
        cwd=tmp_path,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert run["receipt"]["parameters"] > 134_000_000
    check = run["merge"]
    assert check["merged_loss"] == pytest.approx(check["adapter_loss"], abs=0.02)
    assert check["changed_tensors"] == 7 * 18  # of the upper 18 layers
    baseline, finetuned = run["evaluation"]["baseline"], run["evaluation"]["finetuned"]
    assert baseline["n"] == finetuned["n"] == 12
    # Few rows teach the form, not the medicine: answers that can be read, which the base model hardly gives.
    assert finetuned["unparsed"] < baseline["unparsed"]
    assert sum(baseline["readings"]["forced"].values()) == baseline["readings"]["forced"]["correct"]
    for side in (baseline, finetuned):
        assert side["readings"]["logprob"]["unparsed"] == 0
        assert side["knowledge"]["interval"][0] < side["knowledge"]["interval"][1]
    assert "NaN" not in (tmp_path / "run" / "run.json").read_text("utf-8")
