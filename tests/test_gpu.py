"""Tests that need a GPU: `pytest -m gpu` on a machine with one, with the packages of locks/cuda.lock."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftlab.instance.machine import visible_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not visible_gpus(), reason="this machine has no NVIDIA GPU")]

STUDY = [
    *("instance=small", "model=smollm2_135m", "tracking=none", "train.num_train_epochs=1", "train.bf16=true"),
    *("dataset.split={train: 128, validation: 32, test: 64}", "hydra.run.dir=run"),
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "sftlab", *STUDY, *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text("utf-8"))
    return values


@pytest.mark.parametrize("liger", ["true", "false"])
def test_a_study_on_a_gpu(tmp_path: Path, liger: str) -> None:
    found = run(tmp_path, f"train.use_liger_kernel={liger}")
    receipt = found["receipt"]
    assert (receipt["device"], receipt["num_processes"], receipt["autocast"]) == ("cuda", 1, "bfloat16")
    assert (receipt["liger_modules"] > 0) == (liger == "true")
    assert receipt["mfu"] is None or 0 < receipt["mfu"] < 1
    assert receipt["flops_per_token"] > 4 * 106e6  # the weights in the layers; head and adapters are extra
    assert found["evaluation"]["finetuned"]["n"] == 64
    assert found["merge"]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_attention_takes_effect_and_the_loss_is_the_same(tmp_path: Path, attention: str) -> None:
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    found = run(tmp_path, "mode=train", f"instance.attn_implementation={attention}")
    assert found["receipt"]["attn_implementation"] == attention
    plain = run(tmp_path, "mode=train")
    assert found["selection"]["eval_loss"] == pytest.approx(plain["selection"]["eval_loss"], rel=0.02)


def test_rows_without_padding_have_the_same_loss(tmp_path: Path) -> None:
    attention = "sdpa" if importlib.util.find_spec("flash_attn") is None else "flash_attention_2"
    settings = ["mode=train", f"instance.attn_implementation={attention}"]
    padded = run(tmp_path, *settings)
    joined = run(tmp_path, *settings, "+train.extra.padding_free=true")
    assert joined["selection"]["eval_loss"] == pytest.approx(padded["selection"]["eval_loss"], rel=0.02)


@pytest.mark.skipif(len(visible_gpus()) < 2, reason="this machine has fewer than two GPUs")
def test_a_sharded_model_has_the_losses_of_ddp(tmp_path: Path) -> None:
    settings = ["mode=train", "instance=medium", "model=tiny_random", "model.name_or_path=random:gemma3_vision"]
    found = {}
    for strategy in ("ddp", "fsdp"):
        values = run(tmp_path, *settings, "train.max_length=768", f"instance.strategy={strategy}")
        assert values["receipt"]["strategy"] == strategy
        found[strategy] = values["selection"]["eval_loss"]
    assert found["fsdp"] == pytest.approx(found["ddp"], abs=5e-3)


def test_weights_on_a_gpu_are_quantised(tmp_path: Path) -> None:
    found = run(tmp_path, "mode=train", "peft=qlora")
    assert found["receipt"]["quantized_layers"] == 30 * 7


def test_the_plan_matches_the_training(tmp_path: Path) -> None:
    (planned,) = run(tmp_path, "mode=plan")["plan"]
    (probed,) = run(tmp_path, "mode=plan", "plan.probe=true")["plan"]
    took = run(tmp_path, "mode=train")["receipt"]["peak_memory_gib"]
    assert probed["training_gib"] == pytest.approx(took, rel=0.2)
    # The plan includes the CUDA context and fragmentation, which the peak of the allocator does not.
    assert took < planned["training_gib"] < 1.3 * took + 0.7
