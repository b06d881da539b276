"""Real launchers and sweepers: jobs in workers of joblib, Ray and submitit, and trials of Optuna."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import interruptible, skip_without_plugins
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_cli import REPORTED, quick, whole

from sftlab.hydra_app.compose import CONF
from sftlab.hydra_app.launchers import RAY_LOOPBACK, claim

pytestmark = pytest.mark.timeout(900)

# ------------------------------------------------------------------- what a job reserves


def reserved(*overrides: str) -> dict[str, Any]:
    skip_without_plugins(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    config.hydra.sweep.dir = "swept"
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    return launcher


@pytest.mark.parametrize(
    ("overrides", "visible", "gpus"),
    [
        (["instance=large"], None, 4),
        (["instance=large", "instance.num_processes=2"], None, 2),
        (["instance=cpu"], "0,1", None),
        (["instance=auto"], "0,1,2", 3),
        (["instance=auto"], "", None),
    ],
)
def test_a_job_reserves_the_gpus_of_its_instance(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], visible: str | None, gpus: int | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert reserved("hydra/launcher=ray", *overrides)["ray"]["remote"]["num_gpus"] == gpus
    assert reserved("hydra/launcher=submitit_slurm", *overrides)["gpus_per_node"] == gpus
    assert reserved("hydra/launcher=submitit_local", *overrides)["gpus_per_node"] == gpus


def test_slurm_gets_partition_time_and_cores_from_the_instance_and_the_command_line_wins() -> None:
    slurm = reserved("hydra/launcher=submitit_slurm", "instance=medium", "instance.partition=a100")
    assert (slurm["partition"], slurm["timeout_min"], slurm["cpus_per_task"]) == ("a100", 720, 8)
    slurm = reserved("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.partition=b")
    assert (slurm["partition"], slurm["timeout_min"]) == ("b", 5)


@pytest.mark.slow
def test_joblib_runs_as_many_jobs_as_there_are_gpus_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert reserved("hydra/launcher=joblib", "instance=medium")["n_jobs"] == 2
    assert reserved("hydra/launcher=joblib", "instance=auto")["n_jobs"] == 1
    assert reserved("hydra/launcher=joblib", "instance=cpu")["n_jobs"] == -1


# ------------------------------------------------------------------- GPUs of a job

HOLDER = """
import json, sys, time
from sftlab.hydra_app.launchers import claim
with claim(int(sys.argv[1]), ["0", "1", "2", "3"]) as gpus:
    start = time.monotonic()
    print("has", *gpus, flush=True)
    sys.stdin.readline()
    end = time.monotonic()
print(json.dumps([start, end, gpus]))
"""


@pytest.fixture
def gpu_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def holder(count: int) -> subprocess.Popen[str]:
    """A process that claims GPUs, prints them, and holds them until it reads a line or the end of its input."""
    command = [sys.executable, "-c", HOLDER, str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_locks")
def test_no_two_jobs_ever_share_a_gpu_and_all_get_theirs() -> None:
    together, others = (2, 1), (2, 3, 4)
    processes = [holder(count) for count in together]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("has")  # while the other one has its own
    for process in (waiting := [holder(count) for count in others]):
        assert process.stdin is not None
        process.stdin.write("\n")  # to hold its GPUs for no time
        process.stdin.flush()
    spans = []
    for process, count in zip([*processes, *waiting], together + others, strict=True):
        out, _ = process.communicate(None if process in waiting else "\n", timeout=900)
        start, end, gpus = json.loads(out.splitlines()[-1])
        assert len(set(gpus)) == count
        spans.append((start, end, set(gpus)))
    at_once = 0
    for number, (start, end, gpus) in enumerate(spans):
        for other_start, other_end, other_gpus in spans[:number]:
            if start < other_end and other_start < end:
                at_once += 1
                assert not gpus & other_gpus
    assert at_once > 0


@pytest.mark.usefixtures("gpu_locks")
def test_the_gpus_of_a_killed_job_are_free_again() -> None:
    process = holder(4)
    assert process.stdout is not None
    assert process.stdout.readline() == "has 0 1 2 3\n"
    process.kill()
    process.communicate()
    with claim(3, ["0", "1", "2", "3"]) as gpus:
        assert gpus == ["0", "1", "2"]


# ------------------------------------------------------------------- whole sweeps

TINY = [
    "model=tiny_random",
    "dataset.max_rows=48",
    "eval.engine=transformers",
    "eval.max_tokens=16",
    "tracking=none",
    "train.max_length=768",
    "train.num_train_epochs=1",
    "mode=train",
]
PRUNED = ["train.eval_steps=2", "train.lr_scheduler_type=constant", "sweep.prune=halving", "sweep.prune_after=0.5"]


def command(*overrides: str) -> list[str]:
    skip_without_plugins(overrides)
    return [sys.executable, "-m", "sftlab", *overrides]


def sftlab(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*overrides),
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def wait(condition: Any, process: subprocess.Popen[str], seconds: float = 600) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def workers(folder: Path, module: str) -> list[int]:
    """The processes that run this module for a stage below a folder, whose name no other test may use."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if module in words and any(word.startswith(str(folder)) for word in words):
            found.append(int(path.parent.name))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.mark.smoke
@pytest.mark.parametrize("launcher", ["joblib", "ray", "submitit_local"])
def test_jobs_run_in_workers_a_failed_job_stops_no_other_and_one_checkpoint_is_selected(
    place: Path, launcher: str
) -> None:
    """Two jobs at a time: the worse one waits for the better one, which it is compared with, and is stopped."""
    done = sftlab(
        place, "-m", *TINY, f"hydra/launcher={launcher}", "instance=cpu", f"store={launcher}_store", *PRUNED,
        "train.learning_rate=1e-9,1e-2", "train.per_device_train_batch_size=8,0", f"hydra.sweep.dir={launcher}",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    run = read(place / launcher / "run.json")
    assert run["status"] == "failed"
    assert [job["status"] for job in run["jobs"]] == ["pruned", "failed", "success", "failed"]
    assert (run["jobs"][0]["pruned"]["step"], run["jobs"][0]["pruned"]["peer"]) == (2, 2)
    for number in (1, 3):
        assert f"job {number}: train.per_device_train_batch_size=0" in run["error"]
    candidates = run["selection"]["candidates"]
    assert [(row["job"], row["step"]) for row in candidates] == [(2, 2), (2, 4)]
    assert run["selection"]["eval_loss"] == min(row["eval_loss"] for row in candidates)
    assert (place / launcher / "best" / "adapter_model.safetensors").is_file()
    # Each job ran in its own process, and has its own log.
    assert "train: random:llama" in (place / launcher / "0" / "sftlab.log").read_text("utf-8")
    assert "train: resumes from checkpoint-2" in (place / launcher / "2" / "sftlab.log").read_text("utf-8")
    assert list((place / f"{launcher}_store").glob("train/*/manifest.json"))


CLUSTER = """
import ray, sys
ray.init("local", num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster with four fictitious GPUs, started by another process in another folder."""
    skip_without_plugins(["hydra/launcher=ray"])
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], cwd=tmp_path_factory.mktemp("elsewhere"), env={**environment, **RAY_LOOPBACK},
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address
        yield address


@pytest.mark.smoke
def test_jobs_on_a_ray_cluster_share_paths_and_see_their_reserved_gpus(place: Path, cluster: str) -> None:
    done = sftlab(
        place, "-m", *TINY, "hydra/launcher=ray", "instance=medium", "store=ray_store", "train.learning_rate=1e-3,2e-3",
        "train.use_liger_kernel=false", "hydra.sweep.dir=on_cluster",
        f"hydra.launcher.ray.init.address={cluster}", RAY_AUTH_MODE="token", **RAY_LOOPBACK,
    )  # fmt: skip
    # The jobs fail when they look for their GPUs, which do not exist.
    assert done.returncode == 2, done.stdout + done.stderr
    given = []
    for number in (0, 1):
        assert "instance=medium" in read(place / "on_cluster" / str(number) / "job.json")["error"]
        log = (place / "on_cluster" / str(number) / "sftlab.log").read_text("utf-8")
        given.append(log.partition("gpus: ")[2].partition("\n")[0].split(", "))
    assert [len(set(gpus)) for gpus in given] == [2, 2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("srun") is not None, reason="there is a SLURM")
def test_a_launcher_that_cannot_start_is_reported(tmp_path: Path) -> None:
    done = quick(tmp_path, "-m", *TINY, "hydra/launcher=submitit_slurm", "instance=cpu", "hydra.sweep.dir=swept")
    assert done.returncode == 1, done.stderr
    assert 'sftlab: hydra/launcher=submitit_slurm: RuntimeError: Could not detect "srun"' in done.stderr
    assert "Traceback" not in done.stderr
    assert read(tmp_path / "swept" / "run.json")["status"] == "failed"


@pytest.mark.slow
def test_a_dry_run_uses_no_launcher(tmp_path: Path) -> None:
    done = quick(tmp_path, "-m", *TINY, "hydra/launcher=submitit_slurm", "instance=cpu", "seed=1,2", "dry_run=true",
                 modules=REPORTED)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("train    will run") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.smoke
def test_a_requeued_slurm_job_resumes_from_its_last_checkpoint(place: Path) -> None:
    # So many epochs that the training has not ended when the signal arrives, however fast the machine is.
    process = subprocess.Popen(
        command("-m", *TINY, "hydra/launcher=submitit_local", "instance=cpu", "store=requeue_store",
                "train.num_train_epochs=40", "hydra.sweep.dir=requeued"),
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    store = place / "requeue_store"
    wait(lambda: list(store.glob("train/*.partial/checkpoint-*/checkpoint.json")), process)
    training = workers(Path("requeue_store"), "sftlab.train.worker")
    assert len(training) == 1
    os.kill(parent(training[0]), signal.SIGUSR2)  # what SLURM sends before it takes a job's machine away
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    assert "resumes from checkpoint" in (place / "requeued" / "0" / "sftlab.log").read_text("utf-8")
    assert len(read(place / "requeued" / "run.json")["selection"]["candidates"]) == 40


@pytest.mark.smoke
def test_a_worker_that_is_killed_is_a_failed_job(place: Path) -> None:
    # The first job reuses the training of another test. The second is killed while it trains.
    process = subprocess.Popen(
        command("-m", *TINY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "instance=cpu", "store=joblib_store",
                "train.per_device_train_batch_size=8", "train.learning_rate=1e-2", "train.num_train_epochs=1,50",
                *PRUNED[:2], "hydra.sweep.dir=killed"),
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    first = place / "killed" / "0" / "job.json"
    wait(lambda: first.is_file() and read(first)["status"] == "success", process)
    training = wait(lambda: workers(Path("joblib_store"), "sftlab.train.worker"), process)
    os.kill(parent(training[0]), signal.SIGKILL)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 1, out
    run = read(place / "killed" / "run.json")
    assert [job["status"] for job in run["jobs"]] == ["success", "failed"]
    assert "job 1: ended without a result" in run["error"]
    assert "hydra/launcher=joblib: TerminatedWorkerError" in run["error"]
    assert run["selection"]["job"] == 0
    assert workers(Path("joblib_store"), "sftlab.train.worker") == []


@pytest.mark.smoke
def test_ctrl_c_ends_the_workers_too(place: Path) -> None:
    process = subprocess.Popen(
        command("-m", *TINY, "hydra/launcher=joblib", "instance=cpu", "store=interrupted_workers_store",
                "train.num_train_epochs=50,60", "hydra.sweep.dir=interrupted"),
        cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=interruptible,
    )  # fmt: skip
    wait(lambda: workers(Path("interrupted_workers_store"), "sftlab.train.worker"), process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 130, err
    assert "sftlab: interrupted" in err
    assert workers(Path("interrupted_workers_store"), "sftlab.train.worker") == []
    assert read(place / "interrupted" / "run.json")["status"] == "failed"


@pytest.mark.smoke
def test_optuna_gets_the_best_validation_loss_of_every_trial(place: Path) -> None:
    done = whole(
        place, "+experiment=demo_optuna", *TINY, "dataset.split={train: 24, validation: 8, test: 8}",
        "hydra.sweeper.n_trials=2", "hydra.sweep.dir=searched", "instance=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = read(place / "searched" / "run.json")
    losses = {row["job"]: row["eval_loss"] for row in run["selection"]["candidates"]}
    assert sorted(losses) == [0, 1]
    found = OmegaConf.load(place / "searched" / "optimization_results.yaml")
    assert found.best_value == min(losses.values()) == run["selection"]["eval_loss"]
    best = read(place / "searched" / str(run["selection"]["job"]) / "job.json")
    assert best["config"]["train"]["learning_rate"] == found.best_params["train.learning_rate"]
    assert str(best["config"]["peft"]["r"]) == str(found.best_params["peft.r"])


@pytest.mark.smoke
def test_a_failed_trial_does_not_end_the_search(place: Path) -> None:
    done = whole(
        place, "+experiment=demo_optuna", *TINY, "dataset.split={train: 24, validation: 8, test: 8}", "instance=cpu",
        "hydra.sweeper.n_trials=4", "train.learning_rate=1e-3", "peft.r=choice(0,4)", "hydra.sweep.dir=half",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    run = read(place / "half" / "run.json")
    assert {job["status"] for job in run["jobs"]} == {"failed", "success"}
    assert len(run["jobs"]) == 4
    assert "peft.r=0" in run["error"]
    found = OmegaConf.load(place / "half" / "optimization_results.yaml")
    assert found.best_value == run["selection"]["eval_loss"]
