"""Stages are computed once, and whatever happens in between leaves no half of one under its final name."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sftlab.errors import StageError
from sftlab.runtime import store as module
from sftlab.runtime.store import Store, key_of, write_json

INPUTS = {"version": 1, "rows": [1, 2], "name": "é"}


def writes(text: str = "made") -> Callable[[Path], None]:
    return lambda folder: (folder / "result").write_text(text, "utf-8") and None


def fails(error: BaseException) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half", "utf-8")
        raise error

    return build


def folders(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir() and path.name != ".in-use")


def test_the_same_inputs_are_built_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.stage("tokens", INPUTS, writes())
    second = Store(tmp_path).stage("tokens", dict(reversed(INPUTS.items())), lambda _: pytest.fail("was built again"))
    assert (first.cached, second.cached) == (False, True)
    assert first.path == second.path == store.path("tokens", INPUTS)
    assert (first.path / "result").read_text("utf-8") == "made"
    assert store.has("tokens", INPUTS)
    manifest = json.loads((first.path / "manifest.json").read_text("utf-8"))
    assert manifest["inputs"] == INPUTS
    assert store.finished("tokens") == [(first.path, manifest)]


@pytest.mark.parametrize(
    "changed", [{"version": 2}, {"rows": [2, 1]}, {"name": "e"}, {"more": None}, {"version": "1"}, {"version": True}]
)
def test_the_key_changes_with_each_input(changed: dict[str, Any]) -> None:
    assert key_of({**INPUTS, **changed}) != key_of(INPUTS)
    assert key_of(dict(INPUTS)) == key_of(INPUTS)


def test_two_stages_of_the_same_inputs_are_two(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.stage("a", INPUTS, writes()).path != store.stage("b", INPUTS, writes()).path


@pytest.mark.parametrize("error", [ValueError("a bug"), StageError("a reason"), KeyboardInterrupt(), OSError("odd")])
@pytest.mark.parametrize("resumable", [False, True])
def test_a_build_that_raises_leaves_no_finished_stage(tmp_path: Path, error: BaseException, resumable: bool) -> None:
    store = Store(tmp_path)
    with pytest.raises(type(error)) as caught:
        store.stage("train", INPUTS, fails(error), resumable=resumable)
    assert caught.value is error  # as it was: neither worded as a full disk nor hidden
    assert not store.has("train", INPUTS)
    assert store.finished("train") == []
    assert not store.path("train", INPUTS).exists()
    partial = [name for name in folders(tmp_path) if name.endswith(".partial")]
    assert len(partial) == resumable
    seen: list[list[str]] = []
    store.stage("train", INPUTS, lambda folder: seen.append(sorted(os.listdir(folder))), resumable=resumable)
    assert seen == [["half"] if resumable else []]


# What a real process does: it writes to a log when it builds, and may end itself in the middle of it.
BUILDER = """
import os, signal, sys, time
from pathlib import Path
from sftlab.runtime.store import Store
root, log, kind = sys.argv[1:]
def build(folder):
    with open(log, "a") as out:
        out.write("built\\n")
    (folder / "half").write_text("half")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
stage = Store(root).stage("train", {"version": 1}, build)
print(stage.cached)
"""


def builder(tmp_path: Path, kind: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "store"), str(tmp_path / "log"), kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("resumable", [False, True])
def test_what_a_killed_build_left_is_thrown_away_or_handed_over(tmp_path: Path, resumable: bool) -> None:
    process = builder(tmp_path, "killed")
    process.communicate(timeout=900)
    assert process.returncode == -signal.SIGKILL
    store = Store(tmp_path / "store")
    assert not store.has("train", {"version": 1})
    seen: list[list[str]] = []
    store.stage("train", {"version": 1}, lambda folder: seen.append(sorted(os.listdir(folder))), resumable=resumable)
    assert seen == [["half"] if resumable else []]


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    both = [builder(tmp_path, "slow") for _ in range(2)]
    answers = sorted(process.communicate(timeout=900)[0].strip() for process in both)
    assert answers == ["False", "True"]  # the second waited, and found it
    assert (tmp_path / "log").read_text("utf-8") == "built\n"


@pytest.mark.parametrize("library", [False, True], ids=["Python", "safetensors"])
def test_a_full_disk_says_so_and_is_not_kept_full(tmp_path: Path, library: bool) -> None:
    store = Store(tmp_path)
    kept = store.stage("dataset", INPUTS, writes())

    def build(folder: Path) -> None:
        (folder / "large").write_bytes(b"x" * 10_000)
        if library:  # in Rust, with an error of its own
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        Path("/dev/full").write_text("the kernel answers ENOSPC", "utf-8")

    with pytest.raises(StageError) as caught:
        store.stage("merged", INPUTS, build)
    assert "merged: cannot write" in str(caught.value)
    assert os.strerror(errno.ENOSPC) in str(caught.value)
    assert "free some space, or set store= to a folder on another disk. Completed stages are reused" in str(
        caught.value
    )
    assert folders(tmp_path) == ["dataset", f"dataset/{kept.key}", "merged"]
    assert (kept.path / "result").read_text("utf-8") == "made"
    assert not store.stage("merged", INPUTS, writes()).cached


def test_a_disk_that_fills_up_at_the_manifest_leaves_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(StageError, match=r"train: cannot write .*manifest\.json: No space left"):
        Store(tmp_path).stage("train", INPUTS, writes(), resumable=True)
    monkeypatch.undo()
    assert not Store(tmp_path).has("train", INPUTS)
    seen: list[str] = []
    Store(tmp_path).stage("train", INPUTS, lambda folder: seen.extend(os.listdir(folder)), resumable=True)
    assert seen == ["result"]


def test_a_store_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(StageError, match=r"store='.*file': cannot be written: .*; set store= to a writable folder"):
        Store(tmp_path / "file").stage("train", INPUTS, writes())


def test_a_store_that_may_only_be_read_is_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).stage("train", INPUTS, writes())

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "utime", refuse)
    assert Store(tmp_path).stage("train", INPUTS, writes("again")).cached


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})
    with pytest.raises(TypeError):
        write_json(path, {"status": object()})
    (tmp_path / f".run.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"status": "success"})
    assert json.loads(path.read_text("utf-8")) == {"status": "running"}
    assert os.listdir(tmp_path) == ["run.json"]
