"""What the parent of a training does with its files: reuse, resume, share and release them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
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
from sftlab.records import read_jsonl, write_jsonl
from sftlab.results import Receipt
from sftlab.runtime.store import Stage, Store, write_json
from sftlab.train import stage
from sftlab.train.checkpoints import Checkpoint, complete, last_resumable
from sftlab.train.schedule import Timeline
from sftlab.train.sharing import release
from sftlab.train.worker import TrainTask

Compose = Callable[..., Config]
RECEIPT = Receipt(
    parameters=9, trainable_parameters=3, quantized_layers=0, attn_implementation="sdpa", liger_modules=0, loss="nll",
    optimizer_state=["float32"], base_dtype="torch.float32", autocast=None, effective_batch=4, optimizer_steps=24,
    supervised_tokens=5, supervised_share=0.5, truncated_rows={"train": 0}, left_out_rows={"train": 0}, prompt_bos=1,
    device="cpu", num_processes=1, strategy="ddp", train_seconds=9.5, tokens_per_second=4.0,
    tokens_per_second_per_device=4.0, mfu=None, peak_memory_gib=1.0, step_seconds=0.5, rank_checksums=[2.0],
    earlier_machines=[], diverged_at_step=None, planned_steps=24, steps_per_epoch=8,
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
    """The tasks of all child processes. Instead of training, each writes the checkpoints that training would."""
    started: list[TrainTask] = []

    def child(module: str, folder: Path, task: TrainTask, **_: Any) -> None:
        assert module == "sftlab.train.worker"
        started.append(task)
        timeline, resumed = Timeline(task.train, RECEIPT.steps_per_epoch or 0), last_resumable(folder)
        if resumed and timeline.evaluates(resumed.step):
            replace(resumed, eval_loss=1.0).write([[1.0, 2.0]])
        for step in range(resumed.step + 1 if resumed else 1, timeline.total + 1):
            if timeline.evaluates(step) or step in timeline.forks:
                checkpoint(folder, step, eval_loss=1.0 if timeline.evaluates(step) else None)
        steps = {"optimizer_steps": timeline.total, "planned_steps": timeline.total}
        write_json(folder / "receipt.json", RECEIPT.model_copy(update=steps).model_dump())
        history = [
            {"step": step, "eval_loss": 1.0} for step in range(1, timeline.total + 1) if timeline.evaluates(step)
        ]
        write_jsonl(folder / "metrics.jsonl", history)

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
    steps = {"optimizer_steps": 16, "planned_steps": 16}
    assert shorter.receipt == trained.receipt.model_copy(update={**steps, "train_seconds": 0.0})
    assert len(tasks) == 1
    longer = make(epochs(4))
    assert [row.step for row in longer.candidates(0, [])] == [8, 16, 24, 32]
    assert [each.step for each in complete(longer.stage.path) if each.resumable] == [32]


@pytest.mark.parametrize("length", ["train.num_train_epochs", "train.max_steps"])
def test_jobs_with_validations_within_epochs_share_steps(
    config: Compose, make: Callable[[Config], stage.Trained], tasks: list[TrainTask], length: str
) -> None:
    """A job has exactly the validations that it would have alone, although each job also has one at its end."""

    def job(epochs: int) -> tuple[list[int], list[int], Path]:
        """Validated steps by the checkpoints and by the curve, and the folder."""
        count = epochs if length == "train.num_train_epochs" else 8 * epochs
        trained = make(
            config("train.bf16=true", "train.lr_scheduler_type=constant", "train.eval_steps=5", f"{length}={count}")
        )
        curve = [row["step"] for row in read_jsonl(trained.stage.path / "metrics.jsonl")]
        return [row.step for row in trained.candidates(0, [])], curve, trained.stage.path

    longest = [5, 10, 15, 20, 24]
    assert job(3)[:2] == (longest, longest)
    assert job(2)[0] == [5, 10, 15, 16]
    assert job(4)[0] == [5, 10, 15, 20, 25, 30, 32]
    assert [each.step for each in complete(job(3)[2]) if each.resumable] == [8, 16, 24]
    assert len(tasks) == 3


def test_steps_of_a_job_with_more_steps_are_copied(
    config: Compose, make: Callable[[Config], stage.Trained], tasks: list[TrainTask]
) -> None:
    def steps(count: int) -> list[int]:
        overrides = ["train.lr_scheduler_type=constant", "train.eval_steps=0.5", f"train.max_steps={count}"]
        return [row.step for row in make(config("train.bf16=true", *overrides)).candidates(0, [])]

    assert steps(22) == [4, 8, 12, 16, 20, 22]
    assert steps(12) == [4, 8, 12]
    assert len(tasks) == 1


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
