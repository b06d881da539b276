import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sftlab import tracking
from sftlab.config import TrackingConfig

WANDB = TrackingConfig(backend="wandb", project="p", entity=None)
NONE = TrackingConfig(backend="none", project="p", entity=None)


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


def test_none_is_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert tracking.environment(NONE, tmp_path, "name", "id") == {}
    tracking.announce(NONE, tmp_path)
    tracking.log_result({}, {}, [["model"]], tmp_path / "loss.png", [])
    assert caplog.messages == []


class Failing(BaseHTTPRequestHandler):
    """A server that answers every request with an error."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["says nothing", "fails"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a wandb server that is of no use."""
    if request.param == "fails":
        with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as made:
            threading.Thread(target=made.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{made.server_port}"
            made.shutdown()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.smoke
def test_a_server_of_no_use_neither_ends_nor_delays_a_run(tmp_path: Path, server: str) -> None:
    command = [
        *(sys.executable, "-m", "sftlab", "mode=train", "model=tiny_random", "dataset.max_rows=48"),
        *("train.max_length=768", "train.num_train_epochs=1", "hydra.run.dir=run"),
    ]
    environment = {**os.environ, "WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["status"] == "success"
    assert "Traceback" not in told
    assert f"`wandb sync {tmp_path}/run/wandb/offline-run-*` sends it later" in told
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert b"eval/loss" in kept
    assert b"best_eval_loss" in kept
