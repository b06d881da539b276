"""Memory and time of a configuration: traced by hand, estimated, probed, and measured in training."""

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
from test_cli import whole

from sftlab import pipeline
from sftlab.errors import ConfigError, OutOfMemoryError, Problem, StageError
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.results import PlanCell
from sftlab.runtime.job import Job
from sftlab.runtime.store import Store
from sftlab.train import advice, workload
from sftlab.train.counting import Batch
from sftlab.train.plan_table import duration
from sftlab.train.trace import Shape, Trace, TraceTask, trace
from sftlab.train.workload import Row

TINY = ["model=tiny_random", "dataset.max_rows=48", "tracking=none", "train.max_length=768", "instance=cpu"]
LONGEST = Batch(rows=4, length=256, positions=100, targets=300)
VALIDATION = Batch(rows=2, length=128, positions=64, targets=100)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, 128 wide."""
    return models.resolve(composed("model=tiny_random").model, Store(tmp_path_factory.mktemp("store")), 42).path


def traced(path: Path, *overrides: str, batch: Batch = LONGEST) -> Trace:
    cfg = composed(*TINY, "instance.bf16=true", *overrides)
    machine = instance.find(cfg.instance, elsewhere=True)
    shape = Shape(cfg.peft, cfg.train, batch, VALIDATION)
    return trace(TraceTask(model=path, machine=machine, shapes=[shape]), shape)


@pytest.mark.smoke  # torch
def test_a_trace_by_hand(llama: Path) -> None:
    step = traced(llama, "peft=none")
    saved = sum(sizes(llama))  # embeddings once, whether they are tied or not
    assert step.parameters == step.trainable == saved
    assert step.weights == step.gradients == 4 * saved
    assert step.optimizer == 8 * saved
    assert step.merged_bytes == 2 * saved
    assert step.kv_bytes_per_token == 2 * 2 * 2 * 2 * 32  # key and value, bytes, layers, heads, their size
    # 2 FLOPs per weight and token forward and 4 backward, for all weights but the embeddings; and attention.
    config = json.loads((llama / "config.json").read_text("utf-8"))
    tokens, head = LONGEST.rows * LONGEST.length, 128 * config["vocab_size"]
    layers = saved - head * (1 if config["tie_word_embeddings"] else 2)
    forward = 2 * (tokens * layers + LONGEST.rows * LONGEST.positions * head)
    scores = 2 * 2 * 2 * LONGEST.rows * LONGEST.length**2 * 128
    # The backward kernel computes the scores once more.
    assert step.train_flops == pytest.approx(3 * forward + 3.5 * scores, rel=0.02)


@pytest.mark.smoke  # torch
def test_a_long_packed_sequence_takes_no_memory_to_plan(llama: Path) -> None:
    step = traced(llama, "instance.attn_implementation=eager", batch=Batch(1, 2**16, 100, 100))
    assert step.activations > 2**36  # the scores alone would not fit into this machine
    assert step.flops_per_second is not None
    assert step.flops_per_second > 0


def sizes(folder: Path) -> list[int]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return [file.get_tensor(name).numel() for name in file.keys()]  # noqa: SIM118  # not a dict


@pytest.mark.smoke  # torch
def test_settings_that_save_memory_show_in_the_trace(llama: Path) -> None:
    whole = traced(llama)
    checkpointed = traced(llama, "train.gradient_checkpointing=true")
    assert checkpointed.activations < whole.activations / 2
    assert checkpointed.peak < whole.peak
    # LoRA computes forward, and backward to the inputs; with checkpointing forward once more.
    assert 1.3 < checkpointed.train_flops / whole.train_flops < 1.6
    half = traced(llama, batch=Batch(2, 256, 100, 150))
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.05)
    assert half.weights == whole.weights
    eager = traced(llama, "instance.attn_implementation=eager")
    assert eager.activations > whole.activations + 2 * 4 * 4 * 256 * 256 * 2  # scores by layer, row and head
    quantised = traced(llama, "peft=qlora", "instance.bf16=true")
    assert quantised.weights < 0.8 * traced(llama, "peft=lora", "instance.bf16=true").weights
    adam, small = traced(llama, "peft=none"), traced(llama, "peft=none", "train.optim=adamw_8bit")
    assert small.optimizer < 0.3 * adam.optimizer


@pytest.mark.smoke  # torch
def test_fsdp_shards_a_model_and_ddp_copies_it(llama: Path) -> None:
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
    step = traced(base.path, "train.gradient_checkpointing=true")
    assert 0 < step.trainable < step.parameters
    assert step.activations > 0


@pytest.mark.slow
def test_the_rows_of_a_batch_without_padding_are_one_sequence(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"train": [Row(10, 4), Row(30, 10), Row(20, 5), Row(40, 20)], "validation": [Row(8, 2)]}
    monkeypatch.setattr(workload, "rows_by_split", lambda _: rows)
    settings = ["model=tiny_random", "instance=cpu", "train.per_device_train_batch_size=2"]
    tokens: Any = None
    cfg = config(*settings, "+train.extra.padding_free=true")
    joined = workload.workload(tokens, cfg.train, instance.find(cfg.instance), 64)
    assert joined.longest == Batch(rows=1, length=70, positions=40, targets=40)
    assert joined.train_tokens == 100
    padded = workload.workload(tokens, config(*settings).train, instance.find(cfg.instance), 64)
    assert (padded.longest.rows, padded.longest.length) == (2, 40)
    assert padded.train_tokens > 100


@pytest.mark.parametrize(
    ("overrides", "validations", "epochs"),
    [
        ([], 1, 3.0),
        (["train.eval_steps=0.25"], 4, 3.0),
        (["train.eval_steps=2", "train.max_steps=18"], 6, 1.5),
    ],
)
def test_validations_and_length_of_a_job_count(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, overrides: list[str], validations: int, epochs: float
) -> None:
    rows = {"train": [Row(100, 50)] * 48, "validation": [Row(10, 5)] * 7}
    monkeypatch.setattr(workload, "rows_by_split", lambda _: rows)
    settings = ["instance=cpu", "train.per_device_train_batch_size=4", "train.num_train_epochs=3", *overrides]
    cfg = config(*settings)
    work = workload.workload(None, cfg.train, instance.find(cfg.instance), 64)  # type: ignore[arg-type]
    assert (work.train_tokens, work.eval_tokens, work.epochs) == (4800, 70 * validations, epochs)


def cell(**changed: Any) -> PlanCell:
    values = {"memory": {}, "training_gib": 5.0, "generation_gib": 7.0, "capacity_gib": 8.0, "seconds_per_epoch": 1.0}
    return PlanCell.model_validate({**values, "timed_by": "", **changed})


def test_a_cell_fits_if_both_phases_do() -> None:
    assert cell().fits
    assert cell(training_gib=8.1).fits is False
    assert cell(generation_gib=8.1).fits is False
    assert cell(capacity_gib=None).fits is None
    assert cell(trouble="the probe ran out of memory").fits is False
    assert [duration(seconds) for seconds in (41.4, 719, 12_600)] == ["41 s", "12 min", "3.5 h"]


def test_the_changes_do_not_change_the_rows_per_step(config: Callable[..., Any]) -> None:
    cfg = config("instance=cpu", "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=3")
    machine = instance.find(cfg.instance)
    changes = dict(advice.smaller(cfg, machine))
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
        ConfigError(Problem("model.name_or_path", None, "cannot be read")),
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
    monkeypatch.setattr("sftlab.train.memory.child", fails)
    settings = ["train.per_device_train_batch_size=4", "dataset.max_rows=30", f"store={tmp_path / 'store'}"]
    cfg = config("model=tiny_random", "instance=cpu", "mode=train", "tracking=none", *settings)
    with pytest.raises(StageError) as raised:
        pipeline.run_job(cfg, Job(number=0, overrides=[], config={}), tmp_path)
    text = str(raised.value)
    assert "tried to allocate 20 GiB" in text
    assert str(failure) in text
    remedies = [line.split() for line in text.splitlines() if line.startswith("  train.per_device")]
    assert len(remedies) == 2
    for remedy in remedies:
        assert config("model=tiny_random", "instance=cpu", *remedy).train.global_batch_size == 4


@pytest.mark.smoke
def test_a_plan_of_a_sweep_marks_jobs_that_cannot_fit(tmp_path: Path) -> None:
    done = whole(
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
    done = whole(tmp_path, *settings, "mode=plan", "plan.probe=true", "hydra.run.dir=plan")
    assert done.returncode == 0, done.stderr
    (planned,) = json.loads((tmp_path / "plan" / "run.json").read_text("utf-8"))["plan"]
    assert planned["timed_by"] == "measured by a probe"
    assert 0 < planned["seconds_per_epoch"] < 60
    done = whole(tmp_path, *settings, "mode=train", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert planned["training_gib"] == pytest.approx(run["receipt"]["peak_memory_gib"], rel=0.2)


@pytest.mark.smoke
def test_out_of_memory_is_reported_with_remedies(tmp_path: Path) -> None:
    batch = ["dataset.max_rows=600", "train.per_device_train_batch_size=256"]
    settings = [*TINY, *batch, "mode=train", "instance.attn_implementation=eager"]

    def little_memory() -> None:  # the process starts with 1.6 GB, and the batch needs 3.9
        resource.setrlimit(resource.RLIMIT_DATA, (2_500_000_000, 2_500_000_000))

    done = subprocess.run(
        [sys.executable, "-m", "sftlab", *settings, "hydra.run.dir=run"],
        cwd=tmp_path, preexec_fn=little_memory, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "out of memory" in done.stderr
    assert "train.per_device_train_batch_size=128 train.global_batch_size=256: about" in done.stderr
    assert "Traceback" not in done.stderr
