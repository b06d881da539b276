import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, problem
from test_cli import Started, started, whole

from sftlab.config import TrackingConfig
from sftlab.errors import PrunedError, Terminated
from sftlab.results import Scalar
from sftlab.runtime.job import Job
from sftlab.tracking import tracker
from sftlab.tracking import wandb as tracking
from sftlab.tracking.base import End, Result, named

WANDB = TrackingConfig(backend="wandb", project="p", entity=None)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a key."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_without_a_key_it_goes_offline_and_says_so_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert tracking.environment(WANDB, tmp_path, "name", "id")["SFTLAB_WANDB_MODE"] == "offline"
    tracking.announce(WANDB, tmp_path)
    (line,) = caplog.messages
    assert line.startswith("wandb: offline (no API key; `wandb login`")


def test_with_a_key_it_goes_online_and_the_key_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    variables = tracking.environment(WANDB, tmp_path, "name", "id")
    assert variables["SFTLAB_WANDB_MODE"] == "online"
    assert "secret" not in variables.values()
    tracking.announce(WANDB, tmp_path)
    assert caplog.messages == []


def test_a_key_in_netrc_is_found(tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert tracking.mode() == "online"


def job(tmp_path: Path, backend: str) -> tuple[Any, dict[str, str]]:
    """A configuration with this backend, and the environment of its training."""
    cfg = composed(f"tracking={backend}", f"runs.outputs={tmp_path}/outputs")
    (tmp_path / "outputs" / "run").mkdir(parents=True, exist_ok=True)
    return cfg, tracker.of_job(cfg, Job(number=0, overrides=[], config={}), tmp_path / "outputs" / "run")


def test_none_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cfg, variables = job(tmp_path, "none")
    assert variables == {}
    tracker.announce(cfg, tmp_path)
    tracker.log_result({}, Result({}, [], [], tmp_path / "loss.png", []))
    assert caplog.messages == []


def test_the_address_of_a_server_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org")
    tracker.announce(job(tmp_path, "mlflow")[0], tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker.announce(job(tmp_path, "mlflow")[0], tmp_path)
    server, local = caplog.messages
    assert "secret" not in server
    assert "MLFLOW_TRACKING_URI" in server
    assert f"--backend-store-uri sqlite:///{tmp_path}/outputs/mlflow.db" in local


class Recorder:
    """A tracker that records how it ends."""

    def __init__(self) -> None:
        self.ends: list[End] = []

    def settings(self, values: Mapping[str, Scalar]) -> None:
        pass

    def close(self, end: End) -> None:
        self.ends.append(end)


@pytest.mark.parametrize(
    ("error", "end"),
    [(PrunedError("worse"), "killed"), (Terminated(), "killed"), (ValueError("a bug"), "failed"), (None, "finished")],
)
def test_a_training_ends_its_tracker_once_with_its_own_end(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, end: End
) -> None:
    from sftlab.train.callbacks import Tracking

    recorder = Recorder()
    monkeypatch.setattr(tracker, "start", lambda: recorder)
    with suppress(PrunedError, Terminated, ValueError), Tracking("mlflow", {}):
        if error is not None:
            raise error
    assert recorder.ends == [end]


# ------------------------------------------------------------------- other trackers

ROW = {"step": 2, "eval_loss": 0.5, "loss": 0.7, "epoch": 1.0, "grad_norm": None}
LOGGED = {"train/loss", "eval/loss", "train/epoch"}


def result(tmp_path: Path, history: list[dict[str, float | None]]) -> Result:
    from matplotlib.image import imsave

    imsave(tmp_path / "loss.png", [[0.0, 1.0]])
    return Result({"best_eval_loss": 0.5}, ["model", "accuracy"], [["base", "0.1"]], tmp_path / "loss.png", history)


def read_tensorboard(tmp_path: Path) -> tuple[set[str], set[float], bool]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "outputs" / "run" / "tensorboard"))
    events.Reload()
    names = {name.removeprefix("summary/") for name in events.Tags()["scalars"]}
    steps = {event.step for event in events.Scalars("eval/loss")}
    return names, steps, bool(events.Tags()["images"]) and "result/text_summary" in events.Tags()["tensors"]


def read_trackio(tmp_path: Path) -> tuple[set[str], set[float], bool]:
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads(job(tmp_path, "trackio")[1][tracker.VARIABLE])["id"][:6]
    (run,) = [run for run in SQLiteStorage.get_runs("sftlab") if run.endswith(name)]  # of all tests in this process
    rows = SQLiteStorage.get_logs("sftlab", run)
    names = {name.removeprefix("summary/") for row in rows for name in row}
    return names, {row["step"] for row in rows if "eval/loss" in row}, {"result", "bias_variance"} <= names


def mlflow_run(tmp_path: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sftlab").experiment_id])
    return client, run


def read_mlflow(tmp_path: Path) -> tuple[set[str], set[float], bool]:
    client, run = mlflow_run(tmp_path)
    steps = {metric.step for metric in client.get_metric_history(run.info.run_id, "eval/loss")}
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    return set(run.data.metrics), steps, files == {"result.json", "loss.png"}


READERS = {"tensorboard": read_tensorboard, "trackio": read_trackio, "mlflow": read_mlflow}


@pytest.fixture(params=READERS)
def installed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that is installed, in a process that no test shares the environment with, and without network."""
    name: str = request.param
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'sftlab[{name}]'")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for variable in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)

    def refuse(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "localhost", "::1") or isinstance(address, str), f"connects to {address}"

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return name


@pytest.mark.smoke  # torch, or a database
@pytest.mark.filterwarnings("ignore")
def test_curves_and_results_are_one_run_in_every_tracker(tmp_path: Path, installed: str) -> None:
    _, variables = job(tmp_path, installed)
    ends: list[tuple[int, End]] = [(1, "killed"), (2, "finished")]
    for step, end in ends:  # the second start continues a training that was killed
        training = tracker.start(variables)
        training.settings({"train.learning_rate": 1e-4, "seed": 1})
        training.log(step, named({**ROW, "step": step}))
        training.close(end)
        if installed == "mlflow":
            assert mlflow_run(tmp_path)[1].info.status == end.upper()
    tracker.log_result(variables, result(tmp_path, []))
    names, steps, has_media = READERS[installed](tmp_path)
    assert names >= LOGGED | {"best_eval_loss"}
    assert (steps, has_media) == ({1, 2}, True)


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore")
def test_a_training_of_an_earlier_run_is_logged_with_the_results(tmp_path: Path, installed: str) -> None:
    _, variables = job(tmp_path, installed)
    tracker.log_result(variables, result(tmp_path, [ROW]))
    names, steps, _ = READERS[installed](tmp_path)
    assert (names >= LOGGED, steps) == (True, {2})


@pytest.mark.parametrize("name", READERS)
def test_a_backend_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tracker, "find_spec", lambda module: None)
    monkeypatch.chdir(tmp_path)
    message = problem([f"tracking={name}", "mode=train", "model=tiny_random", "instance=cpu"])
    assert message == (
        f"tracking={name}: requires the package {name}; pip install 'sftlab[{name}]', or set tracking=wandb or "
        "tracking=none"
    )
    assert problem([f"tracking={name}", "mode=preview", "model=tiny_random", "instance=cpu"]) is None


@pytest.mark.slow
def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, variables = job(tmp_path, "mlflow")
    (tmp_path / "outputs" / "mlflow.db").mkdir()
    tracker.log_result(variables, result(tmp_path, []))
    (line,) = caplog.messages
    assert line.startswith("mlflow: the results could not be logged (")


class Wandb(BaseHTTPRequestHandler):
    """As much of a wandb server as a run's beginning and its curves need; with ``fails``, one that answers 500."""

    fails = False
    seen: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        if self.fails:
            self.send_error(500)
            return
        self.seen.append(f"{self.path} {body}")
        answer = json.dumps({"data": self.answer(json.loads(body))} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, given = asked["query"], asked.get("variables") or {}
        entity = {"id": "e", "name": "me"}
        if "query Viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "mutation UpsertBucket" in query:
            project = {"id": "p", "name": given["project"], "entity": entity}
            run = {"id": "r", "name": given["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": run, "inserted": True}}
        if "mutation CreateRunFiles" in query:
            url = f"http://{self.headers['Host']}/upload"
            files = [{"name": name, "uploadUrl": url} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(*, fails: bool) -> Iterator[tuple[str, type[Wandb]]]:
    """A wandb server's address, and its class, with which it can be made to fail."""
    handler = type("Handler", (Wandb,), {"fails": fails, "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}", handler
        made.shutdown()


@pytest.fixture(params=["says nothing", "fails"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a wandb server that is of no use."""
    if request.param == "fails":
        with serving(fails=True) as (address, _):
            yield address
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


TRAIN = [
    *("mode=train", "model=tiny_random", "dataset.max_rows=48"),
    *("train.max_length=768", "train.num_train_epochs=1", "hydra.run.dir=run"),
]


def online(server: str, patience_seconds: int = 5) -> dict[str, str]:
    patience = dict.fromkeys(("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"), str(patience_seconds))
    return {**patience, "WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}


def logged(folder: Path, pattern: str) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob(f"wandb/{pattern}/*.wandb"))


def wait(condition: Callable[[], Any], process: Started) -> Any:
    end = time.monotonic() + 900
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.mark.smoke
def test_a_server_of_no_use_neither_ends_nor_delays_a_run(tmp_path: Path, server: str) -> None:
    done = whole(tmp_path, *TRAIN, environment=online(server, 2))
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["status"] == "success"
    assert "Traceback" not in output
    assert f"`wandb sync {tmp_path}/run/wandb/offline-run-*` uploads it later" in output
    kept = logged(tmp_path / "run", "offline-run-*")
    assert b"eval/loss" in kept
    assert b"best_eval_loss" in kept


@pytest.mark.smoke
@pytest.mark.parametrize("what", ["server", "client"])
def test_wandb_may_fail_in_mid_run(tmp_path: Path, what: str) -> None:
    """The server begins to answer 500; the process that wandb itself starts beside the training is killed."""
    with serving(fails=False) as (address, handler):
        process = started(
            tmp_path, *TRAIN, "train.num_train_epochs=6", "train.logging_steps=1", environment=online(address)
        )
        checkpoint = "outputs/store/train/*.partial/checkpoint-*/checkpoint.json"
        wait(lambda: any("file_stream" in line for line in handler.seen) and list(tmp_path.glob(checkpoint)), process)
        assert not [line for line in handler.seen if "otel" in line]  # no telemetry
        if what == "server":
            handler.fails = True
        else:
            for pid in wandb_cores(process.pid):
                os.kill(pid, signal.SIGKILL)
        output = "".join(process.communicate(timeout=900))
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["status"] == "success"
    assert "Traceback" not in output
    assert re.search(r"`wandb sync \S*run/wandb/\S+` uploads it later", output)
    kept = logged(tmp_path / "run", "*run-*")
    assert kept.count(b"eval/loss") >= 5
    assert b"best_eval_loss" in kept


def wandb_cores(parent: int) -> list[int]:
    """The processes below one that are wandb's own."""
    found, parents = [], {parent}
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            state = (entry / "stat").read_text().rpartition(")")
            name = (entry / "comm").read_text().strip()
        except OSError:
            continue
        if int(state[2].split()[1]) in parents:
            parents.add(int(entry.name))
            found += [int(entry.name)] if name == "wandb-core" else []
    return found
