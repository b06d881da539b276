"""Child processes: their errors reach the parent, and none outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launched import Task
from pydantic import BaseModel

from sftlab.errors import ConfigError, SftlabError, StageError
from sftlab.runtime.processes import Child, child, children


@pytest.fixture(autouse=True)
def _find_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}")


def run(folder: Path, **values: Any) -> None:
    child("launched", folder, Task(**values))


def test_a_task_reaches_the_child_and_success_writes_no_error(tmp_path: Path) -> None:
    run(tmp_path, do="nothing", text="é")
    assert json.loads((tmp_path / "inputs.json").read_text("utf-8")) == {"do": "nothing", "code": 0, "text": "é"}
    assert not (tmp_path / "error.json").exists()
    assert (tmp_path / "pid").read_text("utf-8") != str(os.getpid())


@pytest.mark.parametrize(
    ("what", "kind", "code", "message"),
    [("config", ConfigError, 2, "dataset.user: a reason\nof two lines – é"),
     ("stage", StageError, 1, "the loss is not a number")],
)  # fmt: skip
def test_the_parent_raises_the_error_of_its_child(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str, kind: type[SftlabError], code: int, message: str
) -> None:
    with pytest.raises(SftlabError) as caught:
        run(tmp_path, do=what)
    assert type(caught.value) is kind
    assert (caught.value.exit_code, str(caught.value)) == (code, message)
    assert "Traceback" not in capfd.readouterr().err


def test_a_task_of_another_type_is_refused(tmp_path: Path) -> None:
    class Other(BaseModel):
        do: list[str] = []

    with pytest.raises(StageError, match="ValidationError: 1 validation error for Task"):
        child("launched", tmp_path, Other())


def test_a_bug_keeps_its_traceback_and_its_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError, match=r"KeyError: 'key' \(.*launched\.py:\d+\)"):
        run(tmp_path, do="bug")
    assert "Traceback" in capfd.readouterr().err


def test_a_full_disk_in_a_library_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"launched: the disk is full \(.*\); free some space, or set store="):
        run(tmp_path, do="full")


def test_a_killed_child_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"launched: ended by SIGKILL, usually because memory ran out"):
        run(tmp_path, do="kill")


@pytest.mark.parametrize(
    ("code", "message"),
    [(3, "ended with exit code 3 and no message"), (137, "ended by SIGKILL"), (255, "exit code 255")],
)
def test_a_child_that_only_exits(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(StageError, match=message):
        run(tmp_path, do="exit", code=code)


def test_the_error_of_an_earlier_child_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text('{"type": "ConfigError", "message": "old"}', "utf-8")
    with pytest.raises(StageError, match="exit code 3"):
        run(tmp_path, do="exit", code=3)


def test_an_outer_launchers_variables_are_stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stripped = [
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK",
        "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "PET_NPROC_PER_NODE",
    ]  # fmt: skip
    inherited = {
        "SFTLAB_TEST": "kept", "LOCAL_DATA": "/data", "GROUP_ID": "7", "PET_NAME": "Rex", "MASTER_KEY_FILE": "/key",
        "RANKING": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "PYTHONWARNINGS": "default",
    }  # fmt: skip
    for name in stripped:
        monkeypatch.setenv(name, "1")
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # children are offline, whatever the user has set
    child("launched", tmp_path, Task(do="environment"), environment={"ACCELERATE_USE_CPU": "true"})
    variables = dict(line.partition("=")[::2] for line in (tmp_path / "environment").read_text("utf-8").splitlines())
    assert [name for name in stripped if name in variables] == []
    assert {name: variables.get(name) for name in inherited} == inherited
    assert variables["TRANSFORMERS_VERBOSITY"] == "error"
    assert variables["ACCELERATE_USE_CPU"] == "true"
    assert variables["HF_HUB_OFFLINE"] == "1"


# — several children —


@pytest.mark.slow
def test_several_children_run_at_once_each_with_its_own_task(tmp_path: Path) -> None:
    tasks = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tasks.append(Child(tmp_path / name, Task(do="environment"), {"SFTLAB_TEST": name}))
    watched: list[set[Path]] = []
    children("launched", tasks, watch=lambda running: watched.append(set(running)))
    for name in ("a", "b"):
        assert f"SFTLAB_TEST={name}" in (tmp_path / name / "environment").read_text("utf-8").splitlines()
    assert watched[0] == {tmp_path / "a", tmp_path / "b"}


@pytest.mark.slow
def test_a_child_that_fails_ends_the_others_and_its_error_is_raised(tmp_path: Path) -> None:
    does = {"first": "sleep", "second": "config", "third": "sleep"}
    tasks = []
    for name, do in does.items():
        (tmp_path / name).mkdir()
        tasks.append(Child(tmp_path / name, Task(do=do)))
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"dataset\.user: a reason"):
        children("launched", tasks)
    assert time.monotonic() - begin < 900  # they sleep for an hour
    left = [tmp_path / name / "pid" for name in ("first", "third")]
    assert not any(alive(int(pid.read_text("utf-8"))) for pid in left if pid.is_file())


# — signals —

PARENT = """
import signal, sys
from pathlib import Path
from launched import Task
from sftlab.runtime.processes import Child, children
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
try:
    children("launched", [Child(Path(folder), Task(do=sys.argv[1])) for folder in sys.argv[2:]])
except KeyboardInterrupt:
    print("interrupted")
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(condition: Any, seconds: float = 300) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def started(folder: Path, do: str = "sleep", count: int = 2) -> tuple[subprocess.Popen[str], list[int]]:
    """A parent and the process ids of its sleeping children."""
    folders = [folder / str(number) for number in range(count)]
    for each in folders:
        each.mkdir()
    # In its own group, so that a signal reaches the parent alone, as one from a batch system does.
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, do, *map(str, folders)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [each / "pid" for each in folders]
    assert wait(lambda: all(pid.is_file() and pid.read_text("utf-8") for pid in pids))
    return parent, [int(pid.read_text("utf-8")) for pid in pids]


@pytest.mark.slow
def test_ctrl_c_in_the_parent_ends_its_children(tmp_path: Path) -> None:
    parent, pids = started(tmp_path)
    assert all(map(alive, pids))
    parent.send_signal(signal.SIGINT)
    out, _ = parent.communicate(timeout=900)
    assert (parent.returncode, out) == (0, "interrupted\n")
    assert not any(map(alive, pids))


@pytest.mark.parametrize("do", ["sleep", "sleep early"])
def test_a_child_dies_with_a_parent_that_was_killed(tmp_path: Path, do: str) -> None:
    parent, pids = started(tmp_path, do)
    assert all(map(alive, pids))
    parent.kill()
    parent.communicate(timeout=900)
    assert wait(lambda: not any(map(alive, pids)))


# — ranks —


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("do", "message", "printed"),
    [("bug", r"KeyError: 'key' \(.*launched\.py:\d+\)", 1),
     ("kill", "launched: rank 1: ended by SIGKILL, usually because memory ran out", 0)],
)  # fmt: skip
def test_a_rank_that_dies_ends_the_others_and_its_error_is_raised(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], do: str, message: str, printed: int
) -> None:
    start = time.monotonic()
    with pytest.raises(StageError, match=message):
        child("launched", tmp_path, Task(do=do), launcher=["--standalone", "--nproc-per-node=2"])
    assert time.monotonic() - start < 900  # gloo itself waits for half an hour
    assert not alive(int((tmp_path / "pid").read_text("utf-8")))
    errors = capfd.readouterr().err
    assert errors.count("Traceback") == printed
