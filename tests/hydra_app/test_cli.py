"""Bad input, as a user meets it: one message, exit code 2, nothing written, nothing heavy loaded."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from math import inf
from pathlib import Path

import pytest
from conftest import problem, skip_without_plugins, vignette, vignettes, write_model, write_rows

HEAVY = {
    "torch", "transformers", "datasets", "trl", "peft", "accelerate", "vllm", "evaluate", "wandb", "pandas", "scipy",
    "matplotlib", "bitsandbytes",
}  # fmt: skip


# What takes a whole run and its stages seconds to import.
WHOLE = ("torch", "transformers.models.auto.tokenization_auto", "datasets", "matplotlib.pyplot", "scipy.stats", "peft",
         "transformers.models.llama.modeling_llama", "sftlab.train.trainer")  # fmt: skip


# What a run without a model imports to compare, plot and report.
REPORTED = ("matplotlib.pyplot", "scipy.optimize", "scipy.sparse", "statsmodels.stats.multitest",
            "statsmodels.stats.proportion")  # fmt: skip


@cache
def server(*modules: str) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "default", Path(__file__).parents[1] / "commands.py", *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A process that is forked while OpenMP has threads waits for them for ever: they are not in it.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.stdout.close)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return server


def sftlab(
    folder: Path, *arguments: str, limit: float = inf, modules: tuple[str, ...] = (), code: str = ""
) -> tuple[int, str, str, str]:
    """Exit code, standard output, standard error, and the heavy modules that were imported, within CPU seconds."""
    skip_without_plugins(arguments)
    process = server(*modules)
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as output:
        case = {"folder": str(folder), "arguments": arguments, "environment": dict(os.environ), "names": list(HEAVY)}
        case["code"] = code
        process.stdin.write(json.dumps(case | {"output": output}) + "\n")
        process.stdin.flush()
        status, seconds = map(float, process.stdout.readline().split())
        assert seconds < limit
        out, errors, loaded = ((Path(output) / name).read_text("utf-8") for name in ("out", "err", "loaded"))
        return int(status), out, errors, loaded


def whole(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A whole run. Its stages are processes of their own, most of them forked from it (``commands.start``)."""
    code, out, errors, _ = sftlab(folder, *arguments, modules=WHOLE)
    return subprocess.CompletedProcess(arguments, code, out, errors)


def quick(folder: Path, *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """A run without a model, or with a part replaced by ``code``."""
    status, out, errors, _ = sftlab(folder, *arguments, modules=REPORTED, code=code)
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


OVERRIDES = [
    (["train.lerning_rate=1"], ["train.lerning_rate=1", "did you mean train.learning_rate?"]),
    (["+train.lerning_rate=1"], ["train.lerning_rate", "did you mean train.learning_rate?"]),
    (["++x=1"], ["x: no such key", "--cfg job"]),
    (
        ["train.lerning_rate=1", "+train.warmup_step=1", "train.num_train_epochs=abc", "train.bf16=1", "model=gemma9"],
        [
            "5 problems",
            "train.lerning_rate",
            "did you mean train.warmup_steps?",
            "train.num_train_epochs='abc': should be a valid integer",
            "train.bf16=1: should be true, false or auto",
            "model=gemma9: no such choice; did you mean gemma3_4b? there are gemma3_270m, gemma3_4b, smollm2_",
        ],
    ),
    (["dataset@eval.dataset=medq"], ["dataset@eval.dataset=medq: no such choice", "did you mean medqa?"]),
    (["experiment=medqa"], ["write +experiment=medqa"]),
    (["+experiment=medqqa"], ["experiment=medqqa: no such choice", "medqa"]),
    (["+model=gemma3_4b"], ["write model=gemma3_4b"]),
    (["train.x=[1"], ["train.x=[1: no such key"]),
    (["eval.predictions=[1"], ["eval.predictions=[1: cannot be read", "KEY=VALUE with ]"]),
    (["train.extra.neftune_noise_alfa=5"], ["SFTConfig has no such field; did you mean neftune_noise_alpha?"]),
    (["peft=none", "peft.r=8"], ["peft.r=8: the chosen peft has no such key", "peft=…"]),
    (["eval.dataset.max_rows=8"], ["eval.dataset.max_rows=8: the chosen dataset@eval.dataset has no such key"]),
    (["train.extra.neftune_noise_alpha=5"], ["write +train.extra.neftune_noise_alpha=5"]),
    (["+train.extra.neftune_noise_alfa=5"], ["train.extra.neftune_noise_alfa", "did you mean neftune_noise_alpha?"]),
    (["--cfg", "job", "train.lerning_rate=1"], ["did you mean train.learning_rate?"]),
    (["dataset.name_or_path=missing.jsonl"], ["dataset.name_or_path='missing.jsonl': no such file", "check the path"]),
    (["model.name_or_path=./missing"], ["model.name_or_path='./missing': no such folder", "check the path"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), OVERRIDES, ids=[" ".join(arguments) for arguments, _ in OVERRIDES])
def test_an_override_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Through the real command line go one problem, five at once, and what only an option of Hydra's reads.
    whole_command = "--cfg" in arguments or arguments in (OVERRIDES[0][0], OVERRIDES[3][0])
    message = refused(tmp_path, *arguments) if whole_command else problem(arguments) or ""
    assert [part for part in said if part not in message] == [], message


MISSING = [("hydra/sweeper=optuna", "optuna"), ("hydra/launcher=submitit_slurm", "slurm")]


@pytest.mark.parametrize(("choice", "extra"), MISSING)
def test_a_plugin_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, extra: str
) -> None:
    # As if none were: the namespace that they are found in cannot be imported. In a process of its own, as they are
    # looked for once.
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
    (["hydra/launcher=joblib", "instance=large"], ["hydra/launcher=joblib: a job takes 4 GPUs (instance=large)",
                                                   "this machine shows none"]),
    (["hydra/launcher=ray", "instance=small"], ["a job takes 1 GPU (instance=small)", "hydra.launcher.ray.init.addr"]),
    (["hydra/launcher=submitit_slurm", "instance=large"], ["none of the 4 GPUs of instance=large", "set mode=train"]),
    (["hydra/launcher=submitit_slurm", "instance=small,large", "mode=train"], ["instance: cannot be swept"]),
    (["hydra/launcher=ray", "instance=cpu", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"], ["gives a job one"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), LAUNCHED, ids=[" ".join(arguments) for arguments, _ in LAUNCHED])
def test_a_launcher_whose_jobs_could_not_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = refused(tmp_path, "-m", *arguments, "model=tiny_random", "train.learning_rate=1e-3,2e-3")
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize("override", ["+hf_token=abc123", "hf_token=abc123", "++train.extra.hub_token=abc123"])
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, override: str) -> None:
    message = refused(tmp_path, override)
    assert "secrets are not part of a configuration" in message
    assert "HF_TOKEN" in message
    assert "abc123" not in message


def test_bad_rows_are_found_before_anything_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*vignettes(40), vignette(40, answer_idx="E")])
    message = refused(tmp_path, "dataset.name_or_path=rows.jsonl", "model=tiny_random")
    assert "rows.jsonl, row 41 (row-40): target 'E' is not one of A, B" in message


def test_bad_csv_and_parquet_load_nothing_heavy_either(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("question\nWhat?\n", "utf-8")
    (tmp_path / "rows.parquet").write_text("no parquet", "utf-8")
    message = refused(
        tmp_path, "dataset.name_or_path=rows.parquet", "dataset@eval.dataset=medqa",
        "eval.dataset.name_or_path=test.csv", "model=tiny_random",
    )  # fmt: skip
    assert "rows.parquet: cannot be read as Parquet" in message
    assert "eval.dataset.user: there is no column 'options'; the rows have question" in message


@pytest.mark.smoke  # libraries that take seconds to import
def test_a_prompt_that_max_length_cuts_ends_with_2_and_leaves_no_stage(tmp_path: Path) -> None:
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
