"""Bad input on the command line: one message, exit code 2, nothing written, nothing heavy imported."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import pytest
from conftest import skip_without_plugins, vignette, vignettes, write_model, write_rows

HEAVY = {
    "torch", "transformers", "datasets", "trl", "peft", "accelerate", "vllm", "evaluate", "wandb", "pandas", "scipy",
    "matplotlib", "bitsandbytes",
}  # fmt: skip


# Modules that take a run and its stages seconds to import.
WHOLE = ("torch", "transformers.models.auto.tokenization_auto", "datasets", "matplotlib.pyplot", "scipy.stats", "peft",
         "transformers.models.llama.modeling_llama", "sftlab.train.trainer", "torch.distributed.run")  # fmt: skip


# Modules that a command without a model imports to search for leakage, compare, plot and report.
REPORTED = ("datasets", "matplotlib.pyplot", "scipy.optimize", "scipy.sparse", "statsmodels.stats.multitest",
            "statsmodels.stats.proportion")  # fmt: skip


@cache
def server(*modules: str) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "default", Path(__file__).parents[1] / "commands.py", *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A process forked while OpenMP has threads waits forever for them: a fork does not copy threads.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.stdout.close)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return server


class Started:
    """A command that runs in a fork of a server. It has what tests use of ``subprocess.Popen``."""

    def __init__(self, folder: Path, *arguments: str, modules: tuple[str, ...], code: str = "", session: bool = True,
                 environment: Mapping[str, str] | None = None) -> None:  # fmt: skip
        skip_without_plugins(arguments)
        self.server, self.output = server(*modules), Path(tempfile.mkdtemp())
        self.returncode: int | None = None
        case = {"folder": str(folder), "arguments": arguments, "names": list(HEAVY), "code": code, "session": session}
        self.pid = int(
            self._ask(case | {"environment": {**os.environ, **(environment or {})}, "output": str(self.output)})
        )

    def _ask(self, line: dict[str, Any]) -> str:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(line) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline()

    def wait(self) -> tuple[str, str, str]:
        """Standard output, standard error, and the heavy modules that it imported, once it has ended."""
        status, seconds = self._ask({"wait": self.pid}).split()
        self.returncode, self.cpu_seconds = int(status), float(seconds)
        files = [self.output / name for name in ("out", "err", "loaded")]
        out, errors, loaded = (file.read_text("utf-8") if file.is_file() else "" for file in files)
        shutil.rmtree(self.output)
        return out, errors, loaded

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self.returncode is None and Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            self.left = self.wait()
        return self.returncode

    def communicate(self, timeout: float = 900) -> tuple[str, str]:
        """Standard output and standard error, once it has ended."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        return self.left[0], self.left[1]

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def sftlab(
    folder: Path, *arguments: str, limit: float = inf, modules: tuple[str, ...] = (), code: str = "",
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str, str, str]:  # fmt: skip
    """Run a command: exit code, standard output, standard error, and the heavy modules that it imported.

    ``limit`` is in CPU seconds.
    """
    process = Started(folder, *arguments, modules=modules, code=code, session=False, environment=environment)
    out, errors, loaded = process.wait()
    assert process.cpu_seconds < limit
    assert process.returncode is not None
    return process.returncode, out, errors, loaded


def whole(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, code: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command with a model. Its stages and ranks run in child processes, most of them forked."""
    status, out, errors, _ = sftlab(folder, *arguments, modules=WHOLE, environment=environment, code=code)
    return subprocess.CompletedProcess(arguments, status, out, errors)


def started(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Started:
    """Start a command with a model, as ``whole`` does, in a session of its own."""
    return Started(folder, *arguments, modules=WHOLE, environment=environment)


def quick(
    folder: Path, *arguments: str, code: str = "", modules: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command without a model, or with a part replaced by ``code``; it must not import torch.

    If it needs them, ``modules`` are ``REPORTED``, which take seconds to import once.
    """
    status, out, errors, loaded = sftlab(folder, *arguments, modules=modules, code=code)
    assert "torch" not in loaded.split()
    return subprocess.CompletedProcess(arguments, status, out, errors)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(folder: Path, *arguments: str) -> str:
    """The message for a command line that must be refused before anything is written."""
    before = files(folder)
    code, out, message, loaded = sftlab(folder, *arguments, limit=20)
    assert code == 2, message
    assert out == ""
    assert message.startswith("sftlab: ")
    assert message.count("sftlab: ") == 1, message
    assert "Traceback" not in message
    assert loaded == ""
    assert files(folder) == before
    return message


# The messages are in tests/golden/messages.txt: here five problems at once, and an option of Hydra's that only prints.
OVERRIDES = [
    (
        ["train.lerning_rate=1", "+train.warmup_step=1", "train.num_train_epochs=abc", "train.bf16=1", "model=gemma9"],
        [
            "5 problems",
            "train.lerning_rate",
            "train.warmup_step",
            "train.num_train_epochs",
            "train.bf16",
            "model=gemma9",
        ],
    ),
    (["--cfg", "job", "train.lerning_rate=1"], ["train.lerning_rate"]),
]


@pytest.mark.parametrize(("arguments", "keys"), OVERRIDES, ids=[" ".join(arguments) for arguments, _ in OVERRIDES])
def test_an_invalid_override_is_refused(tmp_path: Path, arguments: list[str], keys: list[str]) -> None:
    message = refused(tmp_path, *arguments)
    assert [key for key in keys if key not in message] == [], message


MISSING = [("hydra/sweeper=optuna", "optuna"), ("hydra/launcher=submitit_slurm", "slurm")]


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "extra"), MISSING)
def test_a_plugin_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, extra: str
) -> None:
    # The namespace of the plugins cannot be imported. In a new process, because Hydra searches for plugins once.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "hydra_plugins.py").write_text("raise ImportError", "utf-8")
    command = [sys.executable, "-m", "sftlab", "-m", choice, "train.lerning_rate=1,2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert files(tmp_path) == ["hydra_plugins.py"]
    message = done.stderr
    assert f"{choice}: is not installed; pip install 'sftlab[{extra}]'" in message
    assert "did you mean train.learning_rate?" in message


LAUNCHED = [
    (["hydra/launcher=joblib", "instance=large"], ["hydra/launcher=joblib: a job needs 4 GPUs (instance=large)",
                                                   "this machine shows none"]),
    (["hydra/launcher=ray", "instance=small"], ["a job needs 1 GPU (instance=small)", "hydra.launcher.ray.init.addr"]),
    (["hydra/launcher=submitit_slurm", "instance=large"], ["none of the 4 GPUs of instance=large", "set mode=train"]),
    (["hydra/launcher=submitit_slurm", "instance=small,large", "mode=train"], ["instance: cannot be swept"]),
    (["hydra/launcher=ray", "instance=cpu", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"], ["a job on one"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "parts"), LAUNCHED, ids=[" ".join(arguments) for arguments, _ in LAUNCHED])
def test_a_launcher_that_could_not_start_a_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = refused(tmp_path, "-m", *arguments, "model=tiny_random", "train.learning_rate=1e-3,2e-3")
    assert [part for part in parts if part not in message] == [], message


def test_a_secret_is_refused_and_not_repeated(tmp_path: Path) -> None:
    message = refused(tmp_path, "++train.extra.hub_token=abc123")
    assert "HF_TOKEN" in message
    assert "abc123" not in message


def test_bad_rows_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*vignettes(40), vignette(40, answer_idx="E")])
    message = refused(tmp_path, "dataset.name_or_path=rows.jsonl", "model=tiny_random")
    assert "rows.jsonl, row 41 (row-40): target 'E' is not one of A, B" in message


def test_bad_csv_and_parquet_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("question\nWhat?\n", "utf-8")
    (tmp_path / "rows.parquet").write_text("no parquet", "utf-8")
    message = refused(
        tmp_path, "dataset.name_or_path=rows.parquet", "dataset@eval.dataset=medqa",
        "eval.dataset.name_or_path=test.csv", "model=tiny_random",
    )  # fmt: skip
    assert "rows.parquet: cannot be read as Parquet" in message
    assert "eval.dataset.user: there is no column 'options'; the rows have question" in message


@pytest.mark.smoke  # libraries that take seconds to import
def test_a_prompt_longer_than_max_length_exits_with_2_and_leaves_no_stage(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", vignettes(40))
    write_model(tmp_path / "model")
    code, _, message, _ = sftlab(
        tmp_path, "dataset.name_or_path=rows.jsonl", "model.name_or_path=model", "train.max_length=16", "mode=train",
        "tracking=none", "instance=cpu", "dataset.split={train: 0.5, validation: 0.5, test: 0}",
    )  # fmt: skip
    assert code == 2, message
    assert "train.max_length=16: is not longer than the shortest prompt" in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.glob("outputs/store/tokens/*") if path.is_dir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["+experiment=medqa", "--cfg", "job", "--resolve"]])
def test_help_and_cfg_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    names = HEAVY | {"numpy", "pyarrow", "huggingface_hub"}
    code = f"import atexit, sys; atexit.register(lambda: print({names} & set(sys.modules), file=sys.stderr)); "
    done = subprocess.run(
        [sys.executable, "-c", code + "from sftlab.cli import main; main()", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert "python -m sftlab" in done.stdout or "learning_rate: " in done.stdout
    assert files(tmp_path) == []
