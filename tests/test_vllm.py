"""The real model in the real engine: SmolLM2-135M trains, merges and answers in vLLM on the CPU."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.smoke


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def without_compilers(folder: Path) -> str:
    """A search path with all programs but compilers, which a machine without a GPU need not have."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            if not re.match(r".*(gcc|g\+\+|clang)|(cc|c\+\+|c89|c99)$", program.name):
                with suppress(FileExistsError):
                    (folder / program.name).symlink_to(program)
    return str(folder)


def test_smollm2_trains_merges_and_answers_in_vllm(tmp_path: Path) -> None:
    overrides = ["dataset.max_rows=56", "train.num_train_epochs=1", "eval.max_rows=12", "tracking=none"]
    overrides += ["eval.contenders.few_shot={shots: 5}"]
    done = subprocess.run(
        [sys.executable, "-m", "sftlab", *overrides, "hydra.run.dir=run", "eval.max_tokens=120"],
        cwd=tmp_path,
        env={**os.environ, "PATH": without_compilers(tmp_path / "bin")},
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
    (few_shot,) = run["evaluation"]["contenders"]
    asked = rows(tmp_path / "run" / "predictions" / "few_shot.jsonl")
    assert len({*few_shot["shots"]}) == 5
    assert asked[0]["prompt"].count("<|im_start|>assistant") == 6
    assert [row["id"] for row in asked] == [
        row["id"] for row in rows(tmp_path / "run" / "predictions" / "baseline.jsonl")
    ]
    # Examples teach the base model the form, and their tokens cost more; both sets of prompts share a start of vLLM.
    assert few_shot["result"]["unparsed"] < baseline["unparsed"]
    assert few_shot["result"]["cost"]["prompt_tokens"] > 4 * baseline["cost"]["prompt_tokens"]
    assert few_shot["p_adjusted"] >= few_shot["comparison"]["p_value"]
    assert "evaluate: baseline and few_shot model" in done.stdout + done.stderr
    base, examples = (
        json.loads((tmp_path / run["stages"][name] / "speed.json").read_text("utf-8"))
        for name in ("baseline", "contenders.few_shot")
    )
    assert base["start_seconds"] == examples["start_seconds"]
    assert "NaN" not in (tmp_path / "run" / "run.json").read_text("utf-8")
