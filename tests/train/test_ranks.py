"""Two gloo ranks in place of several GPUs: the same training as one process with twice the batch."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import Started, started, whole

from sftlab.errors import ConfigError
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.results import SplitCounts, TokenCounts
from sftlab.runtime.store import key_of
from sftlab.train.worker import TrainTask, require_agreement

pytestmark = pytest.mark.smoke

# The training rows do not fill the last batch of both ranks (accelerate repeats the first rows), and the number of
# validation rows is odd: no row may count twice. Without dropout, whose draws differ between ranks, and in float32,
# where sums differ least.
EXACT = [
    "model=tiny_random",
    "tracking=none",
    "mode=train",
    "instance=cpu",
    "instance.bf16=false",
    "dataset.split={train: 29, validation: 7, test: 8}",
    "peft.lora_dropout=0.0",
    "train.num_train_epochs=3",
    "train.logging_steps=1",
    "train.per_device_eval_batch_size=2",
    "train.global_batch_size=8",
]
ONE = ["train.per_device_train_batch_size=8"]
TWO = ["train.per_device_train_batch_size=4", "instance.num_processes=2"]
# As if a launcher had started sftlab; its ranks must ignore these variables.
LAUNCHED = {**os.environ, "RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_PORT": "1"}


def start(folder: Path, name: str, *overrides: str) -> Started:
    return started(folder, *EXACT, f"hydra.run.dir={name}", *overrides, environment=LAUNCHED)


def end(process: subprocess.Popen[str] | Started, folder: Path) -> dict[str, Any]:
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return {**json.loads((folder / "run.json").read_text("utf-8")), "losses": losses(folder)}


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def eval_losses(run: dict[str, Any]) -> list[float]:
    return [row["eval_loss"] for row in sorted(run["selection"]["candidates"], key=lambda row: row["step"])]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process with twice the batch."""
    folder = tmp_path_factory.mktemp("one")
    run = end(start(folder, "run", *ONE), folder / "run")
    assert (run["receipt"]["effective_batch"], run["receipt"]["num_processes"]) == (8, 1)
    assert len(run["losses"]) == 12
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks, in processes that Python and torchrun start; in the other tests they are forks."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "sftlab", *EXACT, "hydra.run.dir=run", *TWO]
    process = subprocess.Popen(command, cwd=folder, env=LAUNCHED, stderr=subprocess.PIPE, text=True)
    return end(process, folder / "run") | {"folder": folder}


def test_two_ranks_train_like_one_process_with_twice_the_batch(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert (two["receipt"]["effective_batch"], two["receipt"]["num_processes"]) == (8, 2)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-3)
    # Every validation row counts once, by its tokens.
    assert eval_losses(two) == pytest.approx(eval_losses(one), abs=1e-3)
    # Ranks that did not average their gradients would have different weights.
    checksums = two["receipt"]["rank_checksums"]
    assert len(checksums) == 2
    assert checksums[0] == checksums[1] == pytest.approx(one["receipt"]["rank_checksums"][0], rel=1e-4)


def task_of(stage: Path, folder: Path, strategy: str) -> TrainTask:
    """The task of a finished training, to be trained in another folder with another strategy."""
    task = TrainTask.model_validate_json((stage / "inputs.json").read_text("utf-8"))
    machine = replace(task.machine, strategy=strategy)
    return task.model_copy(update={"machine": machine, "checkpoints": folder})


TRAIN = """
import sys
from pathlib import Path
from sftlab.runtime.processes import child
from sftlab.train.worker import TrainTask
folder = Path.cwd()
task = TrainTask.model_validate_json((folder / "task.json").read_text("utf-8"))
child("fsdp_on_cpu", folder, task, launcher=task.machine.launcher(), environment=task.machine.environment())
sys.exit(0)
"""


def train_again(task: TrainTask, **environment: str) -> dict[str, Any]:
    """Train a task with two ranks that may shard the model: the receipt."""
    folder = task.checkpoints
    (folder / "task.json").write_text(task.model_dump_json(), "utf-8")
    done = whole(folder, code=TRAIN, environment=environment)
    assert done.returncode == 0, done.stderr
    receipt: dict[str, Any] = json.loads((folder / "receipt.json").read_text("utf-8"))
    return receipt


def test_a_model_that_two_ranks_shard_trains_as_well(tmp_path: Path, two: dict[str, Any]) -> None:
    """FSDP2 writes full checkpoints, which differ from those of DDP only in what resuming needs."""
    import torch
    from safetensors.torch import load_file

    stage = two["folder"] / two["stages"]["train"]
    task = task_of(stage, tmp_path, "fsdp")

    def train() -> dict[str, Any]:
        receipt = train_again(task)
        assert losses(tmp_path) == pytest.approx(two["losses"], abs=1e-3)
        return receipt

    receipt = train()
    assert receipt["strategy"] == "fsdp"
    for name in ("parameters", "trainable_parameters", "effective_batch"):
        assert receipt[name] == two["receipt"][name]
    last = tmp_path / "checkpoint-12"
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (last, stage / last.name))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-3)
    shutil.rmtree(last)
    assert train()["optimizer_steps"] == 12  # from checkpoint-8
    assert last.is_dir()


def test_a_model_that_reads_images_is_sharded_in_bfloat16_with_the_losses_of_ddp(tmp_path: Path) -> None:
    """Gemma 3 names classes to wrap that it does not have, and FSDP would round outputs to bfloat16."""
    settings = ["model.name_or_path=random:gemma3_vision", "instance.bf16=true", "train.num_train_epochs=1"]
    run = end(start(tmp_path, "run", *TWO, *settings), tmp_path / "run")
    stage = tmp_path / run["stages"]["train"]
    found = {}
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path / strategy
        folder.mkdir()
        receipt = train_again(task_of(stage, folder, strategy), LOSS_AS_ON_GPU="1")
        assert receipt["strategy"] == strategy
        rows = json.loads((folder / "checkpoint-4" / "rows.json").read_text("utf-8"))
        found[strategy] = [*losses(folder), *(nats / tokens for nats, tokens in rows)]
    assert found["fsdp"] == pytest.approx(found["ddp"], abs=5e-3)


def test_rows_without_padding_are_the_same_training(tmp_path: Path, one: dict[str, Any], two: dict[str, Any]) -> None:
    """A batch is one sequence: no row attends to another, and rows repeated in the last batch do not count."""
    run = end(start(tmp_path, "run", *TWO, "+train.extra.padding_free=true"), tmp_path / "run")
    assert run["losses"] == pytest.approx(one["losses"], abs=1e-3)
    assert eval_losses(run) == pytest.approx(eval_losses(one), abs=1e-3)
    assert run["receipt"]["rank_checksums"][0] == pytest.approx(two["receipt"]["rank_checksums"][0], rel=1e-4)


def test_ddp_does_not_search_for_parameters_without_a_gradient(tmp_path: Path, two: dict[str, Any]) -> None:
    """A model that reads images has some, and they are frozen; train.extra decides if it sets the key."""
    assert two["receipt"]["find_unused_parameters"] is False
    for name, overrides, expected in (
        ("images", ["model.name_or_path=random:gemma3_vision"], False),
        ("asked", ["+train.extra.ddp_find_unused_parameters=true"], True),
    ):
        run = end(start(tmp_path, name, *TWO, *overrides, "train.num_train_epochs=1"), tmp_path / name)
        assert run["receipt"]["find_unused_parameters"] is expected
        assert len(run["losses"]) == 4
        checksums = run["receipt"]["rank_checksums"]
        assert checksums[0] == checksums[1]


def test_a_killed_run_resumes_with_another_number_of_ranks(tmp_path: Path, one: dict[str, Any]) -> None:
    for ranks, checkpoint in ((TWO, "checkpoint-4"), (ONE, "checkpoint-8")):
        process = start(tmp_path, "killed", *ranks)
        until = time.monotonic() + 900
        while not list(tmp_path.glob(f"outputs/store/train/*.partial/{checkpoint}/checkpoint.json")):
            assert time.monotonic() < until, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        shutil.rmtree(tmp_path / "killed")
    run = end(start(tmp_path, "run", *TWO), tmp_path / "run")
    assert run["losses"] == pytest.approx(one["losses"], abs=1e-3)
    assert eval_losses(run) == pytest.approx(eval_losses(one), abs=1e-3)
    elsewhere = [(row["until_step"], row["num_processes"]) for row in run["receipt"]["earlier_machines"]]
    assert elsewhere == [(4, 2), (8, 1)]
    assert list(tmp_path.glob("outputs/store/train/*.partial")) == []


def nodes(folder: Path, *overrides: str, ranks: tuple[int, ...] = (0, 1)) -> dict[int, Started]:
    """The same command on two machines, each with its own folder and store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    machines = {}
    for rank in ranks:
        (folder / str(rank)).mkdir(exist_ok=True)
        own = ["instance.nnodes=2", f"instance.node_rank={rank}", f"instance.rdzv_endpoint={endpoint}"]
        size = "train.per_device_train_batch_size=4"
        machines[rank] = start(folder / str(rank), "run", size, *own, *overrides)
    return machines


def both(machines: dict[int, Started], folder: Path) -> tuple[dict[str, Any], int]:
    """The run of machine 0, and how often machine 1 logged that there was nothing to train."""
    first = end(machines[0], folder / "0" / "run")
    _, errors = machines[1].communicate(timeout=900)
    assert machines[1].returncode == 0, errors
    second = json.loads((folder / "1" / "run" / "run.json").read_text("utf-8"))
    assert second["status"] == "success"
    assert second["selection"] is None
    return first, (folder / "1" / "run" / "sftlab.log").read_text("utf-8").count(NOTHING)


NOTHING = "there is nothing to train; machine 0 has it already"


def test_two_machines_train_like_one(tmp_path: Path, one: dict[str, Any]) -> None:
    """Each has its own store; machine 1 does not wait for a training that machine 0 has already."""
    constant = ["train.lr_scheduler_type=constant", "train.warmup_steps=0"]
    first, idle = both(nodes(tmp_path), tmp_path)
    assert first["receipt"]["num_processes"] == 2
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-3)
    assert idle == 0
    assert list((tmp_path / "1").glob("outputs/store/train/*")) == []
    again, idle = both(nodes(tmp_path), tmp_path)  # cached on machine 0
    assert again["selection"]["checkpoint"] == first["selection"]["checkpoint"]
    assert idle == 1
    both(nodes(tmp_path, *constant), tmp_path)
    shorter, idle = both(nodes(tmp_path, *constant, "train.num_train_epochs=2"), tmp_path)  # derived there
    assert len(shorter["losses"]) == 8
    assert idle == 2


def test_machines_that_share_a_store_continue_a_killed_run(tmp_path: Path, one: dict[str, Any]) -> None:
    store = f"store={tmp_path / 'store'}"
    process = start(tmp_path, "killed", *ONE, store)
    until = time.monotonic() + 900
    while not list(tmp_path.glob("store/train/*.partial/checkpoint-4/checkpoint.json")):
        assert time.monotonic() < until, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The store of machine 1 has none of them.
    shutil.copytree(tmp_path / "store", tmp_path / "0" / "outputs" / "store")
    for process in nodes(tmp_path).values():
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 2, errors
        assert "not every machine sees the checkpoints" in errors
    run, _ = both(nodes(tmp_path, store), tmp_path)
    assert [row["until_step"] for row in run["receipt"]["earlier_machines"]] in ([4], [8])
    assert run["losses"] == pytest.approx(one["losses"], abs=1e-3)
    both(nodes(tmp_path, store), tmp_path)


def test_a_machine_ends_if_the_other_one_is_killed_or_missing(tmp_path: Path) -> None:
    machines = nodes(tmp_path, "train.num_train_epochs=300")
    until = time.monotonic() + 900
    while not list(tmp_path.glob("0/outputs/store/train/*.partial/checkpoint-4/checkpoint.json")):
        assert time.monotonic() < until, machines[0].communicate()[1]
        time.sleep(0.01)
    machines[0].send_signal(signal.SIGKILL)
    machines[0].communicate()
    _, errors = machines[1].communicate(timeout=900)
    assert machines[1].returncode == 1, errors
    assert "Traceback" not in errors
    for rank in (0, 1):
        alone = nodes(tmp_path, "train.num_train_epochs=3", "instance.rdzv_timeout_min=0.05", ranks=(rank,))[rank]
        _, errors = alone.communicate(timeout=900)
        assert alone.returncode == 1, errors
        assert f"machine {1 - rank} did not" in errors
        assert "Traceback" not in errors


@pytest.fixture
def task(config: Callable[..., Any]) -> TrainTask:
    cfg = config("model=tiny_random")
    counts = SplitCounts(rows=1, tokens=9, supervised=4, truncated=0, left_out=0, longest=9)
    return TrainTask(
        checkpoints=Path("/c"),
        tokens=Path("/t"),
        counts=TokenCounts(train=counts, validation=counts, prompt_bos=1, turn_ends=[]),
        base=Base("tiny", Path("/m"), "identity", False, None),
        peft=cfg.peft,
        train=cfg.train,
        machine=Machine("cpu", "cpu", 1, "sdpa", nnodes=2),
        seed=1,
    )


@pytest.mark.parametrize(
    ("changed", "step", "message"),
    [
        ({"seed": 2}, 0, "have different rows or settings; run the same command on each"),
        ({}, 4, r"not every machine sees the checkpoints to resume from \(/c\); set store= to a folder that all"),
    ],
)
def test_machines_that_disagree_end_with_2(
    task: TrainTask, monkeypatch: pytest.MonkeyPatch, changed: dict[str, int], step: int, message: str
) -> None:
    other = task.model_copy(update=changed)
    theirs = key_of(other.model_dump(mode="json", include={"peft", "train", "seed", "counts"})), step
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, theirs])
    with pytest.raises(ConfigError, match=message):
        require_agreement(task, 0)


def test_machines_that_agree_train(task: TrainTask, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[Any] = []

    def two_machines(own: list[Any]) -> list[Any]:
        gathered.extend(own)
        return own * 2

    monkeypatch.setattr("accelerate.utils.gather_object", two_machines)
    require_agreement(task, 8)
    assert [step for _, step in gathered] == [8]
