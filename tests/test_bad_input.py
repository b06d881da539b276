"""Invalid input on the complete command line: exit code 2, nothing written, nothing heavy imported, no secret shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import problem, write_model
from test_cli import refused, sftlab

from sftlab.config import ModelConfig
from sftlab.errors import ConfigError, Problem, StageError
from sftlab.model import base as models
from sftlab.runtime.store import Store

Make = Callable[[Path], Any]
Case = tuple[list[str], Make | None, list[str]]  # arguments, a function that writes files, parts of the message


def text(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


REPORT = ["mode=report", "hydra.run.dir=r"]
FILE = ["model=tiny_random", "dataset.name_or_path=a.jsonl"]
# One case of each kind goes through the complete command line; so do those that only a mode checks. The messages of
# all others, also of those that Hydra checks, are in tests/golden/messages.txt.
CASES: list[Case] = [
    (["seed=-1"], None, ["seed=-1"]),
    (FILE, text("a.jsonl", "{}\n{'a': 1}\n"), ["a.jsonl:2"]),
    (["model.name_or_path=./m"], None, ["model.name_or_path='./m'"]),
    (["mode=compare"], None, ["eval.predictions"]),
    (["mode=runs"], None, ["runs.outputs='outputs': no such folder", "set it to the folder of your runs"]),
    (REPORT, None, ["r: has no run.json", "set hydra.run.dir to the folder of a run"]),
    (REPORT, text("r/run.json", "{"), ["r/run.json: is not JSON", "name another run, or run the command again"]),
    (REPORT, text("r/run.json", "[]"), ["r/run.json: schema_version=None is not supported", "run the command again"]),
    (
        REPORT,
        text("r/run.json", '{"schema_version": 1, "evaluation": 3}'),
        ["r/run.json: is not the record of a run: AttributeError", "run the command again"],
    ),
]


@pytest.mark.parametrize(("arguments", "make", "parts"), CASES)
def test_invalid_input_is_refused(tmp_path: Path, arguments: list[str], make: Make | None, parts: list[str]) -> None:
    if make:
        make(tmp_path)
    message = refused(tmp_path, *arguments)
    assert [part for part in parts if part not in message] == [], message


def test_a_traceback_is_there_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, message, _ = sftlab(tmp_path, "train.lerning_rate=1")
    assert code == 2
    assert message.startswith("Traceback (most recent call last):")
    assert message.rstrip().endswith("sftlab: train.lerning_rate=1: no such key; did you mean train.learning_rate?")


SECRETS = {
    "HF_TOKEN": "hf_" + "s" * 34,
    "WANDB_API_KEY": "w" * 40,
    "OPENAI_API_KEY": "sk-o" + "o" * 30,
    "X_TOKEN": "x" * 9,
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("HF_TOKEN", ["name={secret}"]),
        ("X_TOKEN", ["name=${{oc.env:X_TOKEN}}"]),
        ("HF_TOKEN", ["train.lerning_rate={secret}"]),
        ("OPENAI_API_KEY", ["OPENAI_API_KEY={secret}"]),
        ("X_TOKEN", ["model.name_or_path=https://user:{secret}@hub/model"]),
        ("OPENAI_API_KEY", ["-m", "name=a,{secret}"]),
        ("WANDB_API_KEY", ["+train.extra.run_name={secret}"]),
    ],
)
def test_a_secret_in_a_command_is_refused_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]
) -> None:
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    message = refused(tmp_path, *(argument.format(secret=SECRETS[name]) for argument in arguments))
    assert "HF_TOKEN or WANDB_API_KEY" in message
    assert not any(secret in message for secret in SECRETS.values()), message


@pytest.mark.parametrize("value", ["sk-abc123", "abc123", "sk=abc123", "a,abc123"])
@pytest.mark.parametrize(
    "setting", ["eval.judge.api_key_env={}", "+eval.contenders.big={{url: 'http://h/v1', model: m, api_key_env: {}}}"]
)
def test_a_key_in_place_of_the_name_of_its_variable_is_not_repeated(setting: str, value: str) -> None:
    judge = ["eval.task=judge", "eval.judge.url=http://h/v1", "eval.judge.model=m"]
    message = str(problem(["model=tiny_random", *judge, setting.format(value)]))
    assert "api_key_env" in message
    assert "abc123" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval.judge.api_keyenv={}"],
        ["+eval.judge.apikey_env={}"],
        ["eval.judge.apikey='{} and more'"],
        ["+eval.contenders.big={{url: 'http://h/v1', model: m, api_keyenv: {}}}"],
        ["+eval.contenders.apikey={}"],
        ["eval.judge={{api_keyenv: {}"],
        ["-m", "eval.judge.api_keyenv={},b"],
        ["train.extra.hubtoken={}"],
        ["+password={}"],
        ["key={}"],
        ["+dataset.sources={{apikeys: 1, apikey: [1, {}]}}"],
    ],
)
def test_the_value_of_a_key_that_looks_like_a_secret_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, message, _ = sftlab(tmp_path, *(argument.format("abc123") for argument in arguments))
    assert code == 2
    assert "abc123" not in message


def test_a_key_of_the_judge_is_refused_with_the_key_to_set() -> None:
    remedy = "set eval.judge.api_key_env to the name of an environment variable"
    assert remedy in str(problem(["+eval.judge.api_key=abc"]))


def test_an_error_repeats_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh1234")
    said = StageError("GET https://hub/?key=abcdefgh1234 with hf_" + "x" * 34 + " failed")
    assert str(said) == "GET https://hub/?key=$SOME_API_KEY with hf_… failed"
    monkeypatch.setenv("SHORT_KEY", "GET")  # too short to be told from a word
    assert str(ConfigError(Problem("", None, "GET failed"))) == "GET failed"


def test_trusting_a_models_code_is_said_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "m")
    for trusted in (False, True):
        caplog.clear()
        cfg = ModelConfig(
            name_or_path=str(folder), revision=None, trust_remote_code=trusted, chat_template=None, template_time=None
        )
        assert models.resolve(cfg, Store(tmp_path / "store"), 1).trust_remote_code is trusted
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [f"Python code of {folder} will run" in text for text in warned] == [True] * trusted
