"""What the parent of a training does with its files: reuse, resume, share and release them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_checkpoints import checkpoint, files
from test_schedule import STABLE, counts

from sftlab.config import Config
from sftlab.dataset.tokenize import COUNTS, Tokenized
from sftlab.errors import StageError
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.results import Receipt
from sftlab.runtime.store import Stage, Store, write_json
from sftlab.train import stage
from sftlab.train.checkpoints import Checkpoint, complete
from sftlab.train.sharing import release
from sftlab.train.worker import TrainTask

Compose = Callable[..., Config]
RECEIPT = Receipt(
    parameters=9, trainable_parameters=3, quantized_layers=0, attn_implementation="sdpa", liger_modules=0, loss="nll",
    optimizer_state=["float32"], base_dtype="torch.float32", autocast=None, effective_batch=4, optimizer_steps=24,
    supervised_tokens=5, supervised_share=0.5, truncated_rows={"train": 0}, left_out_rows={"train": 0}, prompt_bos=1,
    device="cpu", num_processes=1, strategy="ddp", train_seconds=9.5, tokens_per_second=4.0,
    tokens_per_second_per_device=4.0, mfu=None, peak_memory_gib=1.0, step_seconds=0.5, rank_checksums=[2.0],
    earlier_machines=[], diverged_at_step=None,
)  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Config], stage.Trained]:
    """Train in a store of this test, on 32 rows that do not exist."""
    path = tmp_path / "tokens"
    path.mkdir()
    write_json(path / COUNTS, counts(32).model_dump())
    tokens = Tokenized(Stage("tokens", "key", path, cached=True, seconds=0.0))
    base, machine = Base("tiny", tmp_path, "identity", False, None), Machine("cpu", "cpu", 1, "sdpa")

    def train(cfg: Config) -> stage.Trained:
        trained = stage.make(Store(tmp_path / "store"), tokens, base, cfg.peft, cfg.train, machine, 0, {})
        assert trained is not None
        return trained

    return train


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[TrainTask]:
    """The tasks of all child processes. Instead of training, each writes a checkpoint for every epoch."""
    started: list[TrainTask] = []

    def child(module: str, folder: Path, task: TrainTask, **_: Any) -> None:
        assert module == "sftlab.train.worker"
        started.append(task)
        for epoch in range(1, task.train.num_train_epochs + 1):
            checkpoint(folder, 8 * epoch)
        write_json(folder / "receipt.json", RECEIPT.model_dump())
        (folder / "metrics.jsonl").write_text("")

    monkeypatch.setattr(stage, "child", child)
    return started


def test_a_released_training_retains_only_what_can_be_selected(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        checkpoint(folder, 5, eval_loss=None)
        checkpoint(folder, 8)

    store = Store(tmp_path)
    trained = store.stage("train", {}, build)
    release(store, trained.path)
    assert files(trained.path) == [
        "checkpoint-8/adapter_model.safetensors",
        "checkpoint-8/checkpoint.json",
        "checkpoint-8/rows.json",
        "manifest.json",
    ]


def test_a_shorter_job_is_copied_and_a_longer_one_resumes(
    config: Compose, make: Callable[[Config], stage.Trained], tasks: list[TrainTask]
) -> None:
    def epochs(count: int) -> Config:
        return config("train.bf16=true", "train.lr_scheduler_type=constant", f"train.num_train_epochs={count}")

    trained = make(epochs(3))
    shorter = make(epochs(2))
    assert [row.step for row in shorter.candidates(0, [])] == [8, 16]
    assert (shorter.receipt.optimizer_steps, shorter.receipt.train_seconds) == (16, 0.0)
    assert shorter.receipt == trained.receipt.model_copy(update={"optimizer_steps": 16, "train_seconds": 0.0})
    assert len(tasks) == 1
    with pytest.raises(FileExistsError):  # the child of this test starts from the beginning
        make(epochs(4))
    (partial,) = {task.checkpoints for task in tasks[1:]}
    assert [(each.step, each.resumable) for each in complete(partial)] == [(8, False), (16, False), (24, True)]


def test_a_training_that_diverges_retains_the_checkpoints_before(
    config: Compose,
    make: Callable[[Config], stage.Trained],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = []

    def diverges(module: str, folder: Path, *_: Any, **__: Any) -> None:
        started.append(module)
        for step in (8, 16):
            checkpoint(folder, step)
        write_json(folder / "receipt.json", RECEIPT.model_copy(update={"diverged_at_step": 24}).model_dump())
        (folder / "metrics.jsonl").write_text("")

    monkeypatch.setattr(stage, "child", diverges)

    def steps_of(epochs: int) -> list[int]:
        cfg = config("train.bf16=true", "train.lr_scheduler_type=constant", f"train.num_train_epochs={epochs}")
        return [candidate.step for candidate in make(cfg).candidates(0, [])]

    assert steps_of(3) == [8, 16]
    assert "train: diverged: the validation loss after step 24 is not a finite number" in caplog.text
    assert steps_of(2) == [8, 16]
    assert len(started) == 1  # the shorter job is the first epochs of the longer


def test_a_training_that_diverges_at_once_fails(
    config: Compose, make: Callable[[Config], stage.Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(module: str, folder: Path, *_: Any, **__: Any) -> None:
        checkpoint(folder, 5, eval_loss=None)  # where the decay would have begun
        write_json(folder / "receipt.json", RECEIPT.model_copy(update={"diverged_at_step": 8}).model_dump())

    monkeypatch.setattr(stage, "child", diverges)
    cfg = config(*STABLE, "train.learning_rate=7.0", "train.bf16=true")
    with pytest.raises(StageError, match=r"train: diverged: .* after step 8 .* train\.learning_rate \(it is 7\)"):
        make(cfg)


@pytest.mark.parametrize("point", ["sftlab.train.checkpoints.Checkpoint.forget_optimizer", "sftlab.runtime.store.sync"])
def test_a_kill_after_the_last_step_trains_nothing_again(
    config: Compose,
    make: Callable[[Config], stage.Trained],
    tasks: list[TrainTask],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    cfg = config("train.num_train_epochs=3", "train.bf16=true")
    with monkeypatch.context() as patched:
        patched.setattr(point, killed)
        with pytest.raises(KeyboardInterrupt):
            make(cfg)
    trained = make(cfg)
    assert len(tasks) == 1
    assert trained.receipt == RECEIPT
    assert [each.path.name for each in complete(trained.stage.path)] == [f"checkpoint-{step}" for step in (8, 16, 24)]


def test_a_killed_run_of_another_machine_is_continued(
    config: Compose, make: Callable[[Config], stage.Trained], tasks: list[TrainTask], tmp_path: Path
) -> None:
    """It has half the batch on twice the devices."""
    cfg = config("train.bf16=true", "train.per_device_train_batch_size=4", "train.num_train_epochs=1")
    made = make(cfg)
    manifest = json.loads((made.stage.path / "manifest.json").read_text("utf-8"))
    (task,) = tasks
    inputs = {**manifest["inputs"], "machine": {"elsewhere": True}}
    killed = tmp_path / "store" / "train" / "0123.partial"
    checkpoint(killed, 4, eval_loss=None)
    machine = Machine("large", "cpu", 2, "sdpa")
    train = cfg.train.model_copy(update={"per_device_train_batch_size": 2})
    elsewhere = task.model_copy(update={"inputs": inputs, "machine": machine, "train": train})
    write_json(killed / "inputs.json", elsewhere.model_dump(mode="json"))
    Store(tmp_path / "store").remove(made.stage)
    again = make(cfg)
    assert not killed.exists()
    machines = json.loads((again.stage.path / "machines.json").read_text("utf-8"))
    assert [(row["until_step"], row["num_processes"]) for row in machines] == [(4, 2)]
    assert not [each for each in complete(again.stage.path) if each.step == 4]  # it has no validation loss


def test_a_task_of_another_version_is_not_continued(
    config: Compose, make: Callable[[Config], stage.Trained], tasks: list[TrainTask], tmp_path: Path
) -> None:
    killed = tmp_path / "store" / "train" / "0123.partial"
    checkpoint(killed, 4)
    write_json(killed / "inputs.json", {"stage": {}, "tokens": "elsewhere"})
    make(config("train.bf16=true", "train.num_train_epochs=1"))
    assert len(tasks) == 1
    assert [Checkpoint.read(path) for path in killed.glob("checkpoint-*")] == complete(killed)
