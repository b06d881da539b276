"""Checkpoints of a training: when they are complete, what they are copied as, and which are deleted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sftlab.train.checkpoints import (
    Checkpoint,
    complete,
    delete_all_but,
    delete_old_optimizers,
    incomplete,
    last_resumable,
)


def checkpoint(folder: Path, step: int, **changed: Any) -> Checkpoint:
    """A checkpoint on the disk, one epoch for every eight steps."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
        (path / name).write_text(f"{name} {step}")
    values = {"epoch": step / 8, "eval_loss": 1.0, "train_loss": None, "seconds": 1.0, **changed}
    written = Checkpoint(path, step, **values)
    written.write([[1.0, 2.0]] if written.evaluated else None)
    return written


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_checkpoint_reads_as_it_was_written(tmp_path: Path) -> None:
    written = [checkpoint(tmp_path, step, eval_loss=loss) for step, loss in ((16, None), (8, 0.5))]
    (tmp_path / "checkpoint-24").mkdir()
    assert complete(tmp_path) == written[::-1]
    assert incomplete(tmp_path) == [tmp_path / "checkpoint-24"]
    assert last_resumable(tmp_path) == written[0]


def test_training_resumes_from_a_checkpoint_with_an_optimizer(tmp_path: Path) -> None:
    first, last = checkpoint(tmp_path, 8), checkpoint(tmp_path, 16)
    last.forget_optimizer()
    assert last_resumable(tmp_path) == first
    first.forget_optimizer()
    assert last_resumable(tmp_path) is None
    assert files(last.path) == ["adapter_model.safetensors", "checkpoint.json", "rows.json"]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_only_a_finite_loss_makes_a_candidate(tmp_path: Path, loss: float | None) -> None:
    assert checkpoint(tmp_path, 8).candidate(3, ["a=1"]) is not None
    assert checkpoint(tmp_path, 16, eval_loss=loss).candidate(3, []) is None


@pytest.mark.parametrize("resumable", [True, False])
def test_a_copy_shares_files_unless_training_writes_to_it(tmp_path: Path, resumable: bool) -> None:
    original = checkpoint(tmp_path / "a", 8)
    (tmp_path / "b").mkdir()
    original.copy_into(tmp_path / "b", resumable=resumable)
    (copy,) = complete(tmp_path / "b")
    weights = "adapter_model.safetensors"
    assert os.path.samefile(copy.path / weights, original.path / weights) is not resumable
    assert copy.resumable is resumable
    assert original.resumable


@pytest.mark.parametrize(
    ("count", "left"),
    [(1, [16]), (2, [16, 40]), (3, [16, 32, 40])],
)
def test_the_best_and_the_newest_are_left(tmp_path: Path, count: int, left: list[int]) -> None:
    for step, loss in ((8, 0.9), (16, 0.5), (24, 0.6), (32, 0.7), (40, 0.8)):
        checkpoint(tmp_path, step, eval_loss=loss)
    delete_all_but(tmp_path, count)
    assert [each.step for each in complete(tmp_path)] == left


def test_a_checkpoint_saved_at_sigterm_is_left_until_there_is_a_newer_one(tmp_path: Path) -> None:
    for step, loss in ((8, 0.5), (16, 0.9), (20, None)):
        checkpoint(tmp_path, step, eval_loss=loss)
    delete_all_but(tmp_path, 2)
    assert [each.step for each in complete(tmp_path)] == [8, 16, 20]
    checkpoint(tmp_path, 24, eval_loss=0.7)
    delete_all_but(tmp_path, 2)
    assert [each.step for each in complete(tmp_path)] == [8, 24]


def test_the_untrained_model_is_left_beside_the_best_of_the_others(tmp_path: Path) -> None:
    for step, loss in ((0, 0.1), (8, 0.5), (16, 0.9)):
        checkpoint(tmp_path, step, eval_loss=loss)
    delete_all_but(tmp_path, 1)
    assert [each.step for each in complete(tmp_path)] == [0, 8]


def test_training_resumes_from_the_newest_checkpoint_or_a_fork(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        checkpoint(tmp_path, step)
    delete_old_optimizers(tmp_path, but={8})
    assert [each.step for each in complete(tmp_path) if each.resumable] == [8, 16]
    assert len(complete(tmp_path)) == 4


def test_a_copy_only_for_resuming_cannot_be_selected(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "a", 8)
    (tmp_path / "b").mkdir()
    original.copy_into(tmp_path / "b", resumable=True, selectable=False)
    assert [(each.evaluated, each.resumable) for each in complete(tmp_path / "b")] == [(False, True)]
    assert not (tmp_path / "b" / "checkpoint-8" / "rows.json").exists()
    assert complete(tmp_path / "a") == [original]
