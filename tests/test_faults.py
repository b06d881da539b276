"""A sweep that is killed again and again, and one that has company: both end as an undisturbed one does."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from test_cli import Started, started

pytestmark = pytest.mark.smoke

SWEEP = [
    *("-m", "model=tiny_random", "dataset.max_rows=48", "tracking=none", "train.max_length=768"),
    *("eval.engine=transformers", "eval.max_tokens=16", "eval.max_rows=4", "eval.baseline=false"),
    *("train.lr_scheduler_type=constant", "peft.lora_dropout=0.1", "train.num_train_epochs=1,3"),
    *("dataset.split={train: 384, validation: 48, test: 200}", "train.per_device_train_batch_size=4"),
]
# What two runs of the same sweep never share: their id, the clock, and what is measured by it or by the memory.
MEASURED = re.compile(
    r"id|started|finished|times|measured|.*seconds|seconds_per_.*|tokens_per_second.*|mfu|peak_memory_gib"
)


def start(folder: Path, sweep_dir: str) -> Started:
    return started(folder, *SWEEP, f"hydra.sweep.dir={sweep_dir}")


def ended(process: Started) -> str:
    """All that a command has printed, once it has ended."""
    return "".join(process.communicate(timeout=900))


def finish(process: Started) -> str:
    out = ended(process)
    assert process.returncode == 0, out
    return out


def kept(value: Any) -> Any:
    """A record without what is measured."""
    if isinstance(value, dict):
        return {name: kept(part) for name, part in value.items() if not MEASURED.fullmatch(name)}
    return [kept(part) for part in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, Any]:
    run = kept(json.loads((folder / "run.json").read_text("utf-8")))
    predictions = {file.name: file.read_text("utf-8") for file in (folder / "predictions").iterdir()}
    merged = sha256((folder / "merged" / "model.safetensors").read_bytes()).hexdigest()
    return {"run": run, "predictions": predictions, "merged": merged}


CHILDREN = {"sftlab.train.worker": "train", "sftlab.model.merge_worker": "merge", "sftlab.eval.worker": "evaluate"}


def stage_processes(parent: int) -> Iterator[tuple[int, str]]:
    """The stages that a run's children are at, by process id."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            name = (entry / "comm").read_text().strip()
            ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has ended
        if ppid == parent:
            for module, stage in CHILDREN.items():
                if module in words[2:3] or name == module.removeprefix("sftlab.")[:15]:  # the latter is a fork
                    yield int(entry.name), stage


LONG_VALIDATION = [
    *("model=tiny_random", "mode=train", "tracking=none", "instance=cpu", "train.per_device_train_batch_size=8"),
    *("dataset.split={train: 32, validation: 150, test: 8}", "train.per_device_eval_batch_size=1"),
    *("train.num_train_epochs=3", "train.logging_steps=3", "peft.lora_dropout=0.1", "train.max_length=768"),
    # Its learning rate follows from the validation losses: worse with every epoch, as it is told.
    *("train.lr_scheduler_type=reduce_lr_on_plateau", "+train.lr_scheduler_kwargs.mode=max"),
    *("+train.lr_scheduler_kwargs.patience=0", "+train.lr_scheduler_kwargs.factor=0.5", "hydra.run.dir=run"),
]


def validated(folder: Path) -> dict[str, Any]:
    """What a training left: weights and validation of each checkpoint, and the curve."""
    run = json.loads((folder / "run" / "run.json").read_text("utf-8"))
    assert run["status"] == "success"
    stage = next((folder / "outputs" / "store" / "train").glob("*/receipt.json")).parent
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "weights": {file.parent.name: sha256(file.read_bytes()).hexdigest() for file in stage.glob("*/*.safetensors")},
        "rows": {file.parent.name: json.loads(file.read_text("utf-8")) for file in stage.glob("*/rows.json")},
        "candidates": kept(run["selection"]["candidates"]),
        "selected": run["selection"]["step"],
        # The last line is of the last process only.
        "curve": [{name: row.get(name) for name in CURVE} for row in lines if "train_runtime" not in row],
    }


CURVE = ("step", "epoch", "loss", "eval_loss", "eval_tokens", "learning_rate", "grad_norm")


def validating(store: Path, step: int) -> bool:
    """Whether the training loss at the end of an epoch is logged, and its validation loss not yet."""
    for file in store.glob("train/*.partial/metrics.jsonl"):
        last = json.loads(file.read_text("utf-8").splitlines()[-1])
        if last["step"] == step and "loss" in last:
            return True
    return False


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_while_validating_saves_first_and_validates_after_resuming(ranks: int, tmp_path: Path) -> None:
    settings = [*LONG_VALIDATION, f"instance.num_processes={ranks}", "train.global_batch_size=8"]
    settings[4] = f"train.per_device_train_batch_size={8 // ranks}"
    folder = tmp_path / "disturbed"
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    finish(started(tmp_path / "undisturbed", *settings))
    store = folder / "outputs" / "store"
    for step in (4, 12):
        process = started(folder, *settings)
        until = time.monotonic() + 900
        while not validating(store, step):
            assert time.monotonic() < until
            assert process.poll() is None, ended(process)
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGTERM)
        out = ended(process)
        assert process.returncode == 128 + signal.SIGTERM, out
        assert "Traceback" not in out
        saved = next(store.glob(f"train/*.partial/checkpoint-{step}/checkpoint.json"))
        assert json.loads(saved.read_text("utf-8"))["eval_loss"] is None
    finish(started(folder, *settings))
    found, expected = validated(folder), validated(tmp_path / "undisturbed")
    rates = [row["learning_rate"] for row in expected["curve"] if row["learning_rate"]]
    assert rates[0] == 2 * rates[-1] or rates[0] == 4 * rates[-1]  # the schedule did follow
    assert found == expected


Point = tuple[int, signal.Signals, Callable[[], bool]]
"""What is added to a signal in the exit code (or its sign), the signal, and whether the time for it has come."""


def kill_at(points: Sequence[Point], folder: Path, *settings: str) -> None:
    """Run a command once per point, and send it the signal there."""
    for sign, by, reached in points:
        process = started(folder, *settings)
        deadline = time.monotonic() + 900
        while not reached():
            assert time.monotonic() < deadline
            assert process.poll() is None, ended(process)
            time.sleep(0.005)
        os.killpg(process.pid, by)
        out = ended(process)
        assert process.returncode == (sign * by if sign < 0 else sign + by), out


STOPS_EARLY = [
    *LONG_VALIDATION[:7],  # 32 training rows in batches of 8: four steps per epoch
    *("train.num_train_epochs=5", "train.logging_steps=2", "peft.lora_dropout=0.1", "train.max_length=768"),
    *("train.eval_steps=3", "train.eval_on_start=true", "train.early_stopping_patience=3", "hydra.run.dir=run"),
    "train.learning_rate=1e-9",  # changes the weights, and no loss by more than rounding
]


def test_early_stopping_within_an_epoch_survives_kills(tmp_path: Path) -> None:
    folder, store = tmp_path / "disturbed", tmp_path / "disturbed" / "outputs" / "store"
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    out = finish(started(tmp_path / "undisturbed", *STOPS_EARLY))
    assert "Training stopped early at step 9 of 20: 3 validations without a gain" in out
    assert "11 steps" in out
    assert "step 0, the untrained model, is selected" in out.replace("Step", "step")
    points: list[Point] = [
        (-1, signal.SIGKILL, lambda: any(store.glob("train/*.partial/checkpoint-3/checkpoint.json"))),
        (128, signal.SIGTERM, lambda: validating(store, 9)),  # the validation that ends the training
    ]
    kill_at(points, folder, *STOPS_EARLY)
    out = finish(started(folder, *STOPS_EARLY))
    assert "resumes from checkpoint-9" in out
    found, expected = validated(folder), validated(tmp_path / "undisturbed")
    assert [row["step"] for row in expected["candidates"]] == [0, 3, 6, 9]
    assert found == expected
    runs = [
        json.loads((tmp_path / name / "run" / "run.json").read_text("utf-8")) for name in ("undisturbed", "disturbed")
    ]
    stops = [kept(run["receipt"]["early_stop"]) for run in runs]
    assert (stops[0]["best_step"], stops[0]["step"], stops[0]["planned_steps"]) == (0, 9, 20)
    assert stops[1] == stops[0]
    assert runs[0]["skipped"]
    assert not (tmp_path / "undisturbed" / "run" / "best").exists()


PRUNED = [
    *(
        "-m",
        *LONG_VALIDATION[:3],
        "instance=cpu",
        "dataset.split={train: 32, validation: 60, test: 8}",
        "train.bf16=false",
    ),
    *("train.per_device_train_batch_size=8", "train.per_device_eval_batch_size=1", "train.num_train_epochs=2"),
    *("train.eval_steps=2", "train.lr_scheduler_type=constant", "peft.lora_dropout=0.1", "train.max_length=768"),
    *("train.learning_rate=1e-2,1e-9,5e-3", "sweep.prune=halving", "sweep.prune_after=0.5", "hydra.sweep.dir=run"),
]


def pruned_sweep(folder: Path) -> dict[str, Any]:
    """What a pruned sweep left: what became of each job, the selection, and the weights of every checkpoint."""
    run = kept(json.loads((folder / "run" / "run.json").read_text("utf-8")))
    assert run["status"] == "success"
    weights = sorted((folder / "outputs" / "store" / "train").glob("*/checkpoint-*/adapter_model.safetensors"))
    return {
        "jobs": run["jobs"],
        "selection": run["selection"],
        "weights": {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in weights},
    }


def test_a_pruned_sweep_survives_kills(tmp_path: Path) -> None:
    folder, store = tmp_path / "disturbed", tmp_path / "disturbed" / "outputs" / "store"
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    out = finish(started(tmp_path / "undisturbed", *PRUNED))
    expected = pruned_sweep(tmp_path / "undisturbed")
    assert [job["status"] for job in expected["jobs"]] == ["pruned", "pruned", "success"]
    assert (expected["jobs"][1]["pruned"]["step"], expected["jobs"][1]["pruned"]["planned_steps"]) == (4, 8)
    assert "2 of 3 jobs were pruned because their peers are better, after 8 of their 16 optimizer steps" in out
    points: list[Point] = [
        # In the validation of the second job at whose step the jobs wait.
        (128, signal.SIGTERM, lambda: len([*store.glob("train/*.partial")]) == 2 and validating(store, 4)),
        (-1, signal.SIGKILL, lambda: validating(store, 6)),  # in the second round
    ]
    kill_at(points, folder, *PRUNED)
    finish(started(folder, *PRUNED))
    assert pruned_sweep(folder) == expected
    again = finish(started(folder, *PRUNED))  # stops the pruned jobs again, without training
    assert "resumes" not in again
    assert pruned_sweep(folder) == expected
    assert len([*(store / ".peers").glob("*")]) == len(points)  # of the killed commands only


def wait_for_stage(process: Started, stage: str, begun: Callable[[], bool]) -> int:
    """The process id of a child that is at a stage, once ``begun`` says that it has got somewhere."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        for pid, name in stage_processes(process.pid):
            if name == stage and begun():
                return pid
        assert process.poll() is None, f"ended before {stage}: {ended(process)}"
        time.sleep(0.01)
    pytest.fail(f"{stage} was never reached")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder, "swept"))
    found = results(folder / "swept")
    assert found["run"]["status"] == "success"
    assert len(found["run"]["selection"]["candidates"]) == 4
    return found


@pytest.mark.parametrize(
    ("victims", "by"),
    [
        (["parent", "child", "parent"], signal.SIGKILL),
        (["both", "child", "parent"], signal.SIGTERM),  # SLURM sends it to both
    ],
    ids=["killed", "terminated"],
)
def test_a_sweep_ended_at_three_points_ends_the_same(
    undisturbed: dict[str, Any], victims: list[str], by: signal.Signals, tmp_path: Path
) -> None:
    store = tmp_path / "outputs" / "store"
    points: list[tuple[str, Callable[[], bool]]] = [
        # The second job, in its second epoch: the decision is then made over the first one.
        ("train", lambda: any(store.glob("train/*.partial/checkpoint-16/checkpoint.json"))),
        ("merge", lambda: any(store.glob("merged/*.partial/inputs.json"))),
        ("evaluate", lambda: any(store.glob("generations/*.partial/engine-*/prompts.jsonl"))),
    ]
    for (stage, begun), victim in zip(points, victims, strict=True):
        process = start(tmp_path, "swept")
        child = wait_for_stage(process, stage, begun)
        {"parent": os.kill, "child": os.kill, "both": os.killpg}[victim](
            child if victim == "child" else process.pid, by
        )
        out = ended(process)
        assert (stage == "merge") == bool(re.search(r"resumes from checkpoint-(1[6-9]|2\d)\b", out)), out
        if victim == "child":
            assert process.returncode == 1, out
            assert by.name in out
            assert "Traceback" not in out
        elif by == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM, out
            assert "sftlab: terminated; completed stages are reused" in out
        else:
            assert process.returncode == -signal.SIGKILL
        if victim == "child" or by == signal.SIGTERM:
            assert json.loads((tmp_path / "swept" / "run.json").read_text("utf-8"))["status"] == "failed"
        if stage == "train" and by == signal.SIGTERM:  # saved where it was, and not only where the last epoch ended
            saved = [int(file.parent.name.split("-")[1]) for file in store.glob("train/*.partial/*/checkpoint.json")]
            assert max(saved) > 16
        deadline = time.monotonic() + 900  # nobody is left behind
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{child}").exists()
    finish(start(tmp_path, "swept"))
    assert results(tmp_path / "swept") == undisturbed


def test_two_sweeps_at_once_make_every_stage_once(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    both = [start(tmp_path, "swept"), start(tmp_path, "beside")]
    out = "".join(finish(process) for process in both)
    assert "waiting for another run" in out
    first = results(tmp_path / "swept")
    assert first == undisturbed
    second = results(tmp_path / "beside")
    for run in (first, second):
        del run["run"]["command"]
    assert second == first
    for job in (0, 1):
        seconds = [
            json.loads((tmp_path / run / str(job) / "job.json").read_text("utf-8"))["times"]["train"]
            for run in ("swept", "beside")
        ]
        assert sorted(second > 0 for second in seconds) == [False, True]
    assert len(list((tmp_path / "outputs" / "store").glob("generations/*/manifest.json"))) == 1
    assert not list((tmp_path / "outputs" / "store").glob("*/*.partial"))
