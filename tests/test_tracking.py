import logging
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
