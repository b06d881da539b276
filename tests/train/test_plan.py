"""What a configuration takes, reckoned before anything trains, beside what it then takes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import composed
from test_cli import quick

from sftlab import pipeline
from sftlab.errors import ConfigError, OutOfMemoryError, StageError
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.runtime.job import Job
from sftlab.runtime.store import Store
from sftlab.train import plan
from sftlab.train.plan import Cell, duration
from sftlab.train.trace import Batch, Traced, trace

TINY = ["model=tiny_random", "dataset.max_rows=48", "tracking=none", "train.max_length=768", "instance=cpu"]
LONGEST = Batch(rows=4, length=256, positions=100, targets=300)
VALIDATION = Batch(rows=2, length=128, positions=64, targets=100)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, 128 wide."""
    return models.resolve(composed("model=tiny_random").model, Store(tmp_path_factory.mktemp("store")), 42).path


def traced(path: Path, *overrides: str, batch: Batch = LONGEST) -> Traced:
    cfg = composed(*TINY, "instance.bf16=true", *overrides)
    machine = instance.find(cfg.instance, elsewhere=True)
    return trace(path, cfg.peft, cfg.train, machine, batch, VALIDATION)


@pytest.mark.smoke  # torch
def test_a_trace_by_hand(llama: Path) -> None:
    found = traced(llama, "peft=none")
    # Embeddings (tied or not) are read off the file: what is saved is what is counted.
    saved = sum(tensor for tensor in sizes(llama))
    assert found.parameters == found.trainable == saved
    assert found.weights == found.gradients == 4 * saved
    assert found.optimizer == 8 * saved
    assert found.merged_bytes == 2 * saved
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 2 * 32  # key and value, bytes, layers, heads, their size
    # 2 FLOPs a weight and token forward and 4 backward, of all weights but those that are looked up; and attention.
    config = json.loads((llama / "config.json").read_text("utf-8"))
    tokens, head = LONGEST.rows * LONGEST.length, 128 * config["vocab_size"]
    layers = saved - head * (1 if config["tie_word_embeddings"] else 2)
    forward = 2 * (tokens * layers + LONGEST.rows * LONGEST.positions * head)
    scores = 2 * 2 * 2 * LONGEST.rows * LONGEST.length**2 * 128
    # Backward the kernel makes the scores once more.
    assert found.train_flops == pytest.approx(3 * forward + 3.5 * scores, rel=0.02)


@pytest.mark.smoke  # torch
def test_a_long_packed_sequence_takes_no_memory_to_plan(llama: Path) -> None:
    found = traced(llama, "instance.attn_implementation=eager", batch=Batch(1, 2**16, 100, 100))
    assert found.activations > 2**36  # the scores alone: more than there is here
    assert found.flops_per_second is not None
    assert found.flops_per_second > 0


def sizes(folder: Path) -> list[int]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return [file.get_tensor(name).numel() for name in file.keys()]  # noqa: SIM118  # it has nothing else


@pytest.mark.smoke  # torch
def test_what_saves_memory_shows_in_the_trace(llama: Path) -> None:
    whole = traced(llama)
    checkpointed = traced(llama, "train.gradient_checkpointing=true")
    assert checkpointed.activations < whole.activations / 2
    assert checkpointed.peak < whole.peak
    # The forward pass once more, in half of the work of LoRA: forward, and backward to the inputs.
    assert 1.3 < checkpointed.train_flops / whole.train_flops < 1.6
    half = traced(llama, batch=Batch(2, 256, 100, 150))
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.05)
    assert half.weights == whole.weights
    eager = traced(llama, "instance.attn_implementation=eager")
    assert eager.activations > whole.activations + 2 * 4 * 4 * 256 * 256 * 2  # scores of layers, rows and heads
    quantised = traced(llama, "peft=qlora", "instance.bf16=true")
    assert quantised.weights < 0.8 * traced(llama, "peft=lora", "instance.bf16=true").weights
    adam, small = traced(llama, "peft=none"), traced(llama, "peft=none", "train.optim=adamw_8bit")
    assert small.optimizer < 0.3 * adam.optimizer


@pytest.mark.smoke  # torch
def test_ranks_share_a_model_by_fsdp_and_copy_it_by_ddp(llama: Path) -> None:
    one = traced(llama, "peft=none", "instance=small")
    ddp = traced(llama, "peft=none", "instance=large")
    fsdp = traced(llama, "peft=none", "instance=large", "instance.strategy=fsdp")
    assert ddp.weights == one.weights
    assert ddp.peak == one.peak + one.gradients
    assert fsdp.weights == one.weights / 4
    assert fsdp.peak < ddp.peak


@pytest.mark.smoke  # torch
@pytest.mark.parametrize("architecture", ["gemma3", "gemma3_vision", "qwen3"])
def test_every_architecture_can_be_traced(tmp_path: Path, architecture: str) -> None:
    cfg = composed("model=tiny_random", f"model.name_or_path=random:{architecture}")
    base = models.resolve(cfg.model, Store(tmp_path), 42)
    found = traced(base.path, "train.gradient_checkpointing=true")
    assert 0 < found.trainable < found.parameters
    assert found.activations > 0


def test_the_rows_of_a_batch_without_padding_are_one_sequence(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"train": [(10, 4), (30, 10), (20, 5), (40, 20)], "validation": [(8, 2)]}
    monkeypatch.setattr(plan, "_rows", lambda _, split: rows[split])
    settings = ["model=tiny_random", "instance=cpu", "train.per_device_train_batch_size=2"]
    tokens: Any = None
    cfg = config(*settings, "+train.extra.padding_free=true")
    longest, _, work = plan.batches(tokens, cfg.train, instance.find(cfg.instance), 64)
    assert longest == Batch(rows=1, length=70, positions=40, targets=40)
    assert (work.train_tokens, work.batches) == (100, 2)
    padded, _, work = plan.batches(tokens, config(*settings).train, instance.find(cfg.instance), 64)
    assert (padded.rows, padded.length) == (2, 40)
    assert work.train_tokens > 100


def found_cell(**changed: Any) -> Cell:
    return Cell({}, **{"training_gib": 5.0, "generation_gib": 7.0, "capacity_gib": 8.0, "seconds_per_epoch": 1.0,
                       "timed_by": "", **changed})  # fmt: skip


def test_a_cell_fits_if_both_phases_do() -> None:
    assert found_cell().fits
    assert found_cell(training_gib=8.1).fits is False
    assert found_cell(generation_gib=8.1).fits is False
    assert found_cell(capacity_gib=None).fits is None
    assert found_cell(trouble="a probe ran out of memory").fits is False
    assert [duration(seconds) for seconds in (41.4, 719, 12_600)] == ["41 s", "12 min", "3.5 h"]


def test_what_to_change_keeps_the_rows_of_a_step(config: Callable[..., Any]) -> None:
    cfg = config("instance=cpu", "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=3")
    machine = instance.find(cfg.instance)
    changes = dict(plan.smaller(cfg, machine))
    assert list(changes) == [
        "train.gradient_checkpointing=true",
        "train.per_device_train_batch_size=4 train.global_batch_size=24",
        "train.per_device_train_batch_size=1 train.global_batch_size=24",
        "train.gradient_checkpointing=true train.per_device_train_batch_size=1 train.global_batch_size=24",
        "peft=qlora",
    ]
    steps = {machine.effective_batch(changed.train) for changed in changes.values()}
    assert steps == {24}
    assert changes["peft=qlora"].peft.method == "qlora"


@pytest.mark.smoke  # tokenizers
@pytest.mark.parametrize(
    "failure",
    [
        KeyError("vocab_size"),
        ConfigError("model.name_or_path: cannot be read"),
        OutOfMemoryError("trace: out of memory"),
        StageError("sftlab.train.trace: was ended by SIGKILL"),
    ],
)
def test_an_estimate_that_fails_does_not_hide_that_memory_ran_out(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def runs_out(*_: Any, **__: Any) -> None:
        raise OutOfMemoryError("train: out of memory: tried to allocate 20 GiB")

    def fails(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("sftlab.train.stage.child", runs_out)
    monkeypatch.setattr("sftlab.train.plan.child", fails)
    monkeypatch.setattr("sftlab.train.trace.child", fails)
    settings = ["train.per_device_train_batch_size=4", "dataset.max_rows=30", f"store={tmp_path / 'store'}"]
    cfg = config("model=tiny_random", "instance=cpu", "mode=train", "tracking=none", *settings)
    with pytest.raises(StageError) as told:
        pipeline.run_job(cfg, Job(number=0, overrides=[], config={}), tmp_path)
    text = str(told.value)
    assert "tried to allocate 20 GiB" in text
    assert str(failure) in text
    remedies = [line.split() for line in text.splitlines() if line.startswith("  train.per_device")]
    assert len(remedies) == 2
    for remedy in remedies:
        assert config("model=tiny_random", "instance=cpu", *remedy).train.global_batch_size == 4


@pytest.mark.smoke
def test_a_plan_of_a_sweep_marks_what_cannot_fit(tmp_path: Path) -> None:
    done = quick(
        tmp_path, "-m", *TINY, "mode=plan", "dataset.max_rows=480", "instance.attn_implementation=eager",
        "train.per_device_train_batch_size=2,256", "instance.memory_gib=1.6", "eval.engine=transformers",
        "train.gradient_checkpointing=auto", "hydra.sweep.dir=plan",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot fit") == 1
    small, large = json.loads((tmp_path / "plan" / "run.json").read_text("utf-8"))["plan"]
    assert (small["fits"], large["fits"]) == (True, False)
    assert (small["gradient_checkpointing"], large["gradient_checkpointing"]) == (False, True)
    assert large["training_gib"] > 1.6 > small["training_gib"] > 0.3
    assert not list(tmp_path.glob("outputs/store/train/*"))


@pytest.mark.smoke
def test_a_probe_measures(tmp_path: Path) -> None:
    settings = [*TINY, "train.per_device_train_batch_size=8", "train.num_train_epochs=1"]
    done = quick(tmp_path, *settings, "mode=plan", "plan.probe=true", "hydra.run.dir=plan")
    assert done.returncode == 0, done.stderr
    (planned,) = json.loads((tmp_path / "plan" / "run.json").read_text("utf-8"))["plan"]
    assert planned["timed_by"] == "measured by a probe"
    assert 0 < planned["seconds_per_epoch"] < 60
    done = quick(tmp_path, *settings, "mode=train", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert planned["training_gib"] == pytest.approx(run["receipt"]["peak_memory_gib"], rel=0.2)


@pytest.mark.smoke
def test_out_of_memory_ends_with_what_to_change(tmp_path: Path) -> None:
    batch = ["dataset.max_rows=600", "train.per_device_train_batch_size=256"]
    settings = [*TINY, *batch, "mode=train", "instance.attn_implementation=eager"]

    def little_memory() -> None:  # more than it takes to begin (1.6 GB), less than the batch takes (3.9)
        resource.setrlimit(resource.RLIMIT_DATA, (2_500_000_000, 2_500_000_000))

    done = subprocess.run(
        [sys.executable, "-m", "sftlab", *settings, "hydra.run.dir=run"],
        cwd=tmp_path, preexec_fn=little_memory, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "out of memory" in done.stderr
    assert "train.per_device_train_batch_size=128 train.global_batch_size=256: about" in done.stderr
    assert "Traceback" not in done.stderr
