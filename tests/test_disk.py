"""What a disk can do to a run: fill up, be read-only, lose its last writes, move; and a clock that jumps."""

import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from test_cli import whole
from test_faults import kept

pytestmark = pytest.mark.smoke

TINY = [
    *("model=tiny_random", "dataset.max_rows=48", "tracking=none", "train.max_length=768", "peft.lora_dropout=0.1"),
    *("eval.engine=transformers", "eval.max_tokens=16", "eval.max_rows=6", "eval.baseline=false"),
]
# A small disk that fills up or is made read-only, in a namespace of its own: run as `sh -c SCRIPT sh COMMAND…`.
DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
MOUNT = "mount -t tmpfs -o size=48m none disk; cp -a before/. disk; cd disk; "


def may_mount() -> bool:
    done = subprocess.run([*DISK, "mount -t tmpfs none /mnt"], capture_output=True, check=False)
    return done.returncode == 0


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "sftlab", *TINY, "hydra.run.dir=run", *overrides]


def sftlab(folder: Path, *overrides: str, code: str = "") -> subprocess.CompletedProcess[str]:
    return whole(folder, *TINY, "hydra.run.dir=run", *overrides, code=code)


def result(folder: Path) -> dict[str, Any]:
    run = kept(json.loads((folder / "run" / "run.json").read_text("utf-8")))
    run["answers"] = (folder / "run" / "predictions" / "finetuned.jsonl").read_text("utf-8")
    return run


def merged(folder: Path) -> str:
    return sha256((folder / "run" / "merged" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = sftlab(folder)
    assert done.returncode == 0, done.stderr
    return folder


def copy(undisturbed: Path, to: Path, *without: str) -> Path:
    """The outputs, moved to another folder, without some kinds of stages and without the run."""
    shutil.copytree(undisturbed / "outputs", to / "outputs")
    for kind in without:
        shutil.rmtree(to / "outputs" / "store" / kind)
    return to


@pytest.mark.parametrize(
    ("missing", "free_kib"),
    [(["train", "merged", "generations"], 700), (["merged", "generations"], 300), (["generations"], 24)],
    ids=["checkpoint", "merge", "predictions"],
)
def test_a_full_disk_stops_a_stage_and_nothing_is_lost(
    undisturbed: Path, tmp_path: Path, missing: list[str], free_kib: int
) -> None:
    if not may_mount():
        pytest.skip("this machine does not let a test mount a disk")
    copy(undisturbed, tmp_path / "before", *missing)
    (tmp_path / "disk").mkdir()
    fill = (
        f"free=$(($(df -k --output=avail . | tail -1) - {free_kib})); "
        "dd if=/dev/zero of=filler bs=1024 count=$free 2> /dev/null; "
    )
    first = 'set +e; "$@" 2> ../full; echo $? > ../code; set -e; '
    script = MOUNT + fill + first + "rm filler; cp -a . ../after"
    subprocess.run([*DISK, script, "sh", *command()], cwd=tmp_path, capture_output=True, timeout=900, check=True)
    output = (tmp_path / "full").read_text("utf-8")
    assert (tmp_path / "code").read_text("utf-8").strip() == "1", output
    assert "No space left on device" in output or "disk is full" in output
    assert "Traceback" not in output
    assert "free some space" in output
    done = sftlab(tmp_path / "after")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "after") == result(undisturbed)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("store=../disk/outputs/store", "outputs/store is not a folder that you can write to"),
        (
            "hydra.run.dir=../disk/run",
            "hydra.run.dir='../disk/run': may not be written to; set it to a folder",
        ),
    ],
)
def test_outputs_that_are_read_only(undisturbed: Path, tmp_path: Path, where: str, said: str) -> None:
    if not may_mount():
        pytest.skip("this machine does not let a test mount a disk")
    copy(undisturbed, tmp_path / "before")
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere").mkdir()
    script = MOUNT + 'mount -o remount,ro .; cd ../elsewhere; "$@"'
    done = subprocess.run(
        [*DISK, script, "sh", *command(where)], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_outputs_that_were_moved_are_found(undisturbed: Path, tmp_path: Path) -> None:
    copy(undisturbed, tmp_path)
    shutil.copytree(undisturbed / "run", tmp_path / "run", symlinks=True)
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").is_file()  # links go along
    assert sftlab(tmp_path, "mode=report").returncode == 0
    done = sftlab(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["times"]["train"] == 0
    assert result(tmp_path) == result(undisturbed)


def test_writes_that_a_power_failure_cut_off(undisturbed: Path, tmp_path: Path) -> None:
    """Of everything the end is missing, and the name is that of a whole one only where the disk had all of it."""
    copy(undisturbed, tmp_path, "merged")
    store = tmp_path / "outputs" / "store"
    (train,) = (path.parent for path in store.glob("train/*/manifest.json"))
    partial = train.rename(train.with_name(train.name + ".partial"))
    (partial / "manifest.json").unlink()
    # The last checkpoint was being written; the one before it was marked as whole after the disk had it.
    first, last = sorted(partial.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2:]
    (last / "checkpoint.json").unlink()
    cut(last / "adapter_model.safetensors")
    cut(partial / "metrics.jsonl")
    for generations in store.glob("generations/*/manifest.json"):
        generations.write_bytes(b"")
    (tokens,) = store.glob("tokens/*/manifest.json")
    cut(tokens)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").write_text('{"number": 0, "over', "utf-8")
    (tmp_path / "run" / "run.json").write_bytes(b"\0" * 100)
    done = sftlab(tmp_path)
    assert done.returncode == 0, done.stderr
    assert first.parent == partial
    assert result(tmp_path) == result(undisturbed)
    assert merged(tmp_path) == merged(undisturbed)


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


JUMPING = """
import itertools, time
real, jumps = time.time, itertools.cycle([0, 86_400, -86_400])
time.time = lambda: real() + next(jumps)
"""


def test_a_clock_that_jumps(undisturbed: Path, tmp_path: Path) -> None:
    """Back and forth by a day at every look, in parent and children; and what is in the store is from tomorrow."""
    copy(undisturbed, tmp_path, "train", "merged", "generations")
    tomorrow = time.time() + 86_400
    for path in (tmp_path / "outputs").rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    done = sftlab(tmp_path, code=JUMPING)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path) == result(undisturbed)
    times = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["times"]
    assert all(0 <= seconds < 600 for seconds in times.values())
