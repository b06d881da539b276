"""float32 or bfloat16 on a CPU: measured once, retained in the store, and used in training and generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, write_model
from test_cli import whole

from sftlab.errors import StageError
from sftlab.instance import precision
from sftlab.instance.machine import Machine
from sftlab.instance.precision_worker import PrecisionTask
from sftlab.model.base import Base
from sftlab.runtime.store import Store

CPU = Machine("cpu", "cpu", 1, "sdpa")
KINDS = ("adapters", "all_weights", "generation")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """A model's folder, on a machine with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Base("base", write_model(tmp_path / "model"), "identity", False, None)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Replace measurements by these seconds in float32 and bfloat16; return the folders that were measured in."""

    def measure(**seconds: tuple[float, float]) -> list[Path]:
        measured: list[Path] = []

        def child(module: str, folder: Path, task: PrecisionTask, **_: Any) -> None:
            measured.append(folder)
            times = {kind: seconds.get(kind, (1.0, 0.5)) for kind in KINDS}
            values = {kind: {"float32": single, "bfloat16": half} for kind, (single, half) in times.items()}
            (folder / "seconds.json").write_text(json.dumps({"cpu": task.cpu, **values}))

        monkeypatch.setattr(precision, "child", child)
        return measured

    return measure


def choose(store: Path, base: Base, *overrides: str, machine: Machine = CPU, whole: bool = False) -> tuple[Any, str]:
    cfg = composed("instance=cpu", *overrides)
    train, evaluation, _ = precision.chosen(Store(store), base, cfg.train, cfg.eval, machine, whole=whole)
    return train.bf16, evaluation.dtype


@pytest.mark.parametrize(
    ("seconds", "whole", "chosen"),
    [
        ({}, False, (True, "bfloat16")),
        ({"adapters": (1.0, 1.5)}, False, (False, "bfloat16")),
        ({"adapters": (1.0, 1.5)}, True, (True, "bfloat16")),
        ({"all_weights": (1.0, 1.5)}, True, (False, "bfloat16")),
        ({"generation": (1.0, 1.5)}, False, (True, "float32")),
        ({"adapters": (1.0, 0.99), "generation": (1.0, 1.0)}, False, (False, "float32")),  # a tie
    ],
)
def test_the_faster_format_is_used(
    tmp_path: Path,
    base: Base,
    measure: Callable[..., list[Path]],
    seconds: dict[str, tuple[float, float]],
    whole: bool,
    chosen: tuple[bool, str],
) -> None:
    measure(**seconds)
    assert choose(tmp_path / "store", base, whole=whole) == chosen


def test_a_store_retains_the_first_choice_and_a_machine_measures_once(
    tmp_path: Path, base: Base, measure: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(adapters=(1.0, 2.0))
    assert choose(tmp_path / "a", base) == choose(tmp_path / "a", base) == (False, "bfloat16")
    assert choose(tmp_path / "b", base) == (False, "bfloat16")
    assert len(first) == 1
    # Another machine, on which bfloat16 is faster: runs with the first store resume in float32 there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    again = measure()
    assert choose(tmp_path / "a", base) == (False, "bfloat16")
    assert again == []
    assert choose(tmp_path / "c", base) == (True, "bfloat16")
    assert len(again) == 1


@pytest.mark.parametrize(
    ("overrides", "machine", "chosen"),
    [
        (["instance.bf16=false", "eval.dtype=float32"], CPU, (False, "float32")),
        (["train.bf16=true", "eval.dtype=bfloat16"], CPU, (True, "bfloat16")),
        ([], Machine("small", "cuda", 1, "sdpa"), (True, "bfloat16")),
        ([], Machine("cpu", "cpu", 1, "sdpa", nnodes=2), (True, "bfloat16")),
    ],
)
def test_nothing_is_measured_without_a_choice(
    tmp_path: Path,
    base: Base,
    measure: Callable[..., list[Path]],
    overrides: list[str],
    machine: Machine,
    chosen: tuple[bool, str],
) -> None:
    measured = measure(adapters=(1.0, 2.0), generation=(1.0, 2.0))
    assert choose(tmp_path / "store", base, *overrides, machine=machine) == chosen
    assert measured == []


def test_a_model_that_cannot_be_timed_is_warned_about(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise StageError("no layer")

    monkeypatch.setattr(precision, "child", fails)
    assert choose(tmp_path / "store", base) == (True, "bfloat16")
    assert "Set instance.bf16 and eval.dtype" in caplog.text


@pytest.mark.smoke
def test_a_cpu_without_bfloat16_trains_and_generates_in_float32(tmp_path: Path) -> None:
    """With a real measurement, and the instructions for bfloat16 disabled in oneDNN."""
    common = ["model=tiny_random", "instance=cpu", "tracking=none", "eval.engine=transformers", "eval.max_tokens=8",
              "dataset.split={train: 8, validation: 4, test: 4}", "train.num_train_epochs=1"]  # fmt: skip
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "ONEDNN_MAX_CPU_ISA": "AVX2"}

    def run(name: str, *overrides: str, **variables: str) -> dict[str, Any]:
        done = whole(tmp_path, *common, f"hydra.run.dir={name}", *overrides, environment={**environment, **variables})
        assert done.returncode == 0, done.stderr
        values: dict[str, Any] = json.loads((tmp_path / name / "run.json").read_text("utf-8"))
        return values

    first = run("first")
    assert first["precision"]["bf16"] is False
    assert first["precision"]["dtype"] == "float32"
    assert first["receipt"]["autocast"] is None
    assert first["receipt"]["base_dtype"] == "torch.float32"
    seconds = first["precision"]["measured"]["adapters"]
    assert 0 < seconds["float32"] < seconds["bfloat16"]
    second = run("second", "seed=1", ONEDNN_MAX_CPU_ISA="DEFAULT")
    assert second["precision"] == first["precision"]
    fixed = run("fixed", "instance.bf16=true", "eval.dtype=bfloat16", ONEDNN_MAX_CPU_ISA="DEFAULT")
    assert fixed["receipt"]["autocast"] == "bfloat16"
    assert fixed["stages"]["train"] != first["stages"]["train"]
    assert fixed["stages"]["baseline"] != first["stages"]["baseline"]
