"""Remedies work: each is read from its message, applied to the command line, and the problem is gone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Row, problem, vignette, vignettes, write_rows
from test_cli import sftlab

from sftlab.validation.keys import known_keys
from sftlab.validation.overrides import parsed
from sftlab.validation.sftconfig import MANAGED

Make = Callable[[Path], Any]


def changed(arguments: list[str], *settings: str, drop: str = "") -> list[str]:
    """A command line with these settings instead of those of the same keys."""
    keys = [setting.partition("=")[0].lstrip("+~") for setting in settings]
    gone = [text for text in arguments if text.partition("=")[0].lstrip("+~") in (*keys, drop) and "=" in text + "="]
    return [*(text for text in arguments if text not in gone), *settings]


SPLIT = "dataset.split={train: 8, validation: 4, test: 4}"
TRAIN = [SPLIT, "model=tiny_random", "instance=cpu", "mode=train"]
BOTH = [*TRAIN[:3], "mode=all", "eval.engine=transformers"]
PAIR = ["mode=compare"]
FREE = "train.lr_scheduler_kwargs"


def rows(name: str = "rows.jsonl") -> Make:
    return lambda folder: write_rows(folder / name, vignettes(40))


def pair(*names: str) -> Make:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            row = {"id": 1, "completion": "the answer is (A)", "target": "A", "choices": "AB"}
            write_rows(folder / name, [row])

    return make


# Answers of which one is null, and one is the number that stands for none.
ANSWERS: list[Row] = [
    {"question": f"Which is {n}?", "options": ["x", f"{n}"], "answer": {5: None, 8: "-1"}.get(n, "AB"[n % 2])}
    for n in range(30)
]

COMMAND = r"write python -m sftlab (?P<command>.*)"
# Arguments; a function that writes files; the part of the message that is applied: its groups are settings (KEY=VALUE)
# as a shell reads them, a key (key_of) with its new value (to), or an option.
CASES: list[tuple[list[str], Make | None, str]] = [
    # — the command line —
    (["compare", "a.jsonl", "b.jsonl"], pair("a.jsonl", "b.jsonl"), r"write python -m sftlab (?P<command>.*)"),
    (["compare", "a b.jsonl", "it's,x=1.jsonl"], pair("a b.jsonl", "it's,x=1.jsonl"), r"python -m sftlab (?P<command>.*)"),  # noqa: E501
    (["train", *TRAIN[:3]], None, r"write python -m sftlab (?P<command>.*)"),
    (["clean"], None, r"write python -m sftlab (?P<command>.*)"),
    (["sweep", "seed=1,2", *TRAIN], None, r"write python -m sftlab (?P<command>.*)"),
    (["train", "seed=1,2", *TRAIN[:3]], None, r"write python -m sftlab (?P<command>-m .*)"),
    (["-m", "train", "seed=1", *TRAIN[:3]], None, r"write python -m sftlab (?P<command>-m .*)"),
    (["evaluate", "random:llama", "random:qwen3", *TRAIN[:3], "eval.engine=transformers"], None,
     r"write python -m sftlab (?P<command>-m .*)"),
    (["tracking=none", "compare", "a.jsonl", "b.jsonl"], pair("a.jsonl", "b.jsonl"), COMMAND),
    (["a.jsonl", "b.jsonl", "compare"], pair("a.jsonl", "b.jsonl"), COMMAND),
    (["mode=compare", "a.jsonl", "b.jsonl"], pair("a.jsonl", "b.jsonl"), COMMAND),
    (["tracking.project=x", "a.jsonl", "b.jsonl"], pair("a.jsonl", "b.jsonl"), COMMAND),
    (["--mode", "compare", "a.jsonl", "b.jsonl"], pair("a.jsonl", "b.jsonl"), COMMAND),
    (["--mode=compare", "a.jsonl", "b.jsonl"], pair("a.jsonl", "b.jsonl"), COMMAND),
    (["-m", "compare", "r1", "r2"], pair("r1/predictions/finetuned.jsonl", "r2/predictions/finetuned.jsonl"), COMMAND),
    (["mode=compare", "eval.predictions=(a.jsonl,b.jsonl)"], pair("a.jsonl", "b.jsonl"), r"write (?P<set>.*)"),
    ([*TRAIN, "hydra.run.dir=out/a,b"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "hydra.callbacks.x._target_=os.getcwd"], None, r"(?P<drop>hydra\S+)=.*; leave it out"),
    ([*TRAIN, "dataset.choices=A,B,C,D,E"], None, r"write (?P<set>\S+) for one value"),
    ([*TRAIN, "dataset.choices=[A,B,C,D,E]"], None, r"write (?P<set>\S+)"),
    ([*TRAIN, "dry_run"], None, r"write (?P<set>\S+) or"),
    ([*TRAIN, "dry_run=yes"], None, r"(?P<key_of>dry_run)=.* should be (?P<to>\w+)"),
    ([*TRAIN[1:], "dataset.split={train=8,validation=4,test=4}"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "name='my run'"], None, r"write (?P<set>\S+)"),
    ([*TRAIN, "name=my/run"], None, r"write (?P<set>\S+)"),
    ([*TRAIN, "--seed", "3"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "--dry-run"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "--multirn", "seed=1,2"], None, r"did you mean (?P<option>--\w+)\?"),
    ([*TRAIN, "seed", "=", "3"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "dataset.name_or_path=my", "rows.jsonl", "dataset.split={train: 0.5, validation: 0.5, test: 0}"],
     rows("my rows.jsonl"), r"write (?P<set>.*)"),
    ([*TRAIN[:1], "mode=train", "instance=cpu", "tiny_random"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "seed=1,2"], None, r"add (?P<option>-m)"),
    ([*TRAIN[1:], "dataset=vignettes,slds"], None, r"add (?P<option>-m)"),
    ([*TRAIN, "tracking.project=a,b"], None, r"write (?P<set>.*) for one value"),
    ([*TRAIN, "train.lerning_rate=1"], None, r"did you mean (?P<key>\S+)\?"),
    ([*TRAIN, "experiment=demo_sweep"], None, r"write (?P<set>.*)"),
    ([SPLIT, "instance=cpu", "experiment=demo_swep", "model=tiny_random"], None, r"did you mean (?P<set>\S+)\?"),
    ([*TRAIN, "peft=loora"], None, r"did you mean (?P<value>\w+)\?"),
    ([*TRAIN, "+peft=lora"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "+seed=3"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "peft=none", "peft.r=8"], None, r"choose another by (?P<set>peft=)…"),
    ([*TRAIN, f"{FREE}.num_cycles=2"], None, r"write (?P<set>.*)"),
    (["mode=compare", "eval.predictions=[x,lr=1/b.jsonl,x,lr=1/t.jsonl]"], pair("x,lr=1/b.jsonl", "x,lr=1/t.jsonl"),
     r"write (?P<set>.*)"),
    (["mode=compare", "eval.predictions=a=1.jsonl,b.jsonl"], pair("a=1.jsonl", "b.jsonl"), r"write (?P<set>.*)"),
    (["mode=compare", "eval.predictions=a.jsonl,b.jsonl"], pair("a.jsonl", "b.jsonl"), r"write (?P<set>.*)"),
    (["mode=compare", 'eval.predictions="[a=1.jsonl,b.jsonl]"'], pair("a=1.jsonl", "b.jsonl"), r"write (?P<set>.*)"),
    ([*TRAIN, "dataset.name_or_path=größe.jsonl", "dataset.split={train: 0.5, validation: 0.5, test: 0}"], rows("größe.jsonl"),  # noqa: E501
     r"write (?P<set>.*)"),
    ([*TRAIN, "tracking.project=2026"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "dataset.system=[INST] do"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "dataset.system={a} and b"], None, r"write (?P<set>.*)"),
    ([*TRAIN, "dataset.split={train: 8, validation: 4, test: 4"], None, r"with (?P<end>\}) at the end"),
    ([*TRAIN, "store=~/x,y"], None, r"write (?P<set>.*) for one value"),
    ([*TRAIN, "store=$HOME/x"], None, r"(?P<key_of>store)='.*; write (?P<to>.*)"),
    # — combinations —
    ([*TRAIN, "peft.method=qlora"], None, r"choose (?P<set>peft=\w+)"),
    ([*TRAIN, "peft.method=none"], None, r"choose (?P<set>peft=\w+)"),
    ([*TRAIN, "train.use_liger_kernel=true"], None, r"(?P<key_of>train\S+)=true: .* set it to (?P<to>\w+)"),
    ([*TRAIN, "instance.attn_implementation=flash_attention_2"], None, r"(?P<key_of>\S+)=f.*; set it to (?P<to>\w+)"),
    ([*TRAIN, "instance=large"], None, r"choose (?P<set>instance=auto)"),
    ([*TRAIN, "instance=large"], None, r"or (?P<set>instance=cpu)"),
    ([*TRAIN, "instance=auto", "instance.device=cuda"], None, r"set (?P<set>instance.device=cpu)"),
    ([*TRAIN, "instance.num_processes=2", "instance.strategy=fsdp"], None, r"set (?P<set>instance\S+)"),
    ([*TRAIN, "instance.nnodes=2"], None, r"set (?P<key_of>\S+) to (?P<to>HOST:PORT)"),
    ([*TRAIN, "train.optim=paged_adamw_8bit"], None, r"on the CPU|set (?P<set>train.optim=adamw_torch)"),
    ([*TRAIN, "train.optim=galore_adamw"], None, r"set (?P<set>train.optim=\w+)"),
    ([*TRAIN, "train.packing=true", "train.allow_truncated_completion=true"], None, r"set (?P<set>train.allow\S+)"),
    ([*TRAIN, "+train.extra.learning_rate=1"], None, r"set (?P<renamed>train.learning_rate)"),
    ([*TRAIN, "+train.extra.save_steps=3"], None, r"use (?P<renamed>train.eval_steps)"),
    ([*TRAIN, "+train.extra.do_eval=true"], None, r"(?P<drop>train\S+): .*leave it out"),
    ([*TRAIN, f"+{FREE}.cycles=2"], None, r"(?P<drop>train\S+): .* takes (?P<sub>num_cycles); rename it"),
    ([*TRAIN, "train.lr_scheduler_type=linear", f"+{FREE}.cycles=2"], None, r"(?P<drop>train\S+): .*; leave it out"),
    ([*TRAIN, "train.lr_scheduler_type=warmup_stable_decay"], None, r"write (?P<set>\S+)"),
    ([*TRAIN, "train.lr_scheduler_type=warmup_stable_decay", f"+{FREE}.num_decay_steps=0"], None, r"write (?P<set>\S+)"),  # noqa: E501
    # Two remedies in turn: without letters, the answer has to be extracted.
    ([*BOTH, "eval.task=choice", "dataset.choices=null"], None, r"or set (?P<set>eval.task=exact) >> set (?P<set>'eval.extract=.*)"),  # noqa: E501
    ([*BOTH, "eval.task=choice", "dataset@eval.dataset=vignettes",
      "eval.dataset.split={train: 0, validation: 0, test: 4}", "eval.dataset.choices=null"], None, r"or set (?P<set>eval.task=exact)"),  # noqa: E501
    ([*BOTH, "eval.task=choice", "eval.dataset.choices=null", "dataset@eval.dataset=vignettes",
      "eval.dataset.split={train: 0, validation: 0, test: 4}"], None, r"(?P<key_of>eval.dataset.choices) is (?P<from>null)"),  # noqa: E501
    ([*BOTH, "eval.extract=x"], None, r"(?P<key_of>eval.extract)=.*set it to (?P<to>null)"),
    ([*BOTH, "eval.extract='{{ text }}'"], None, r"or set (?P<key_of>eval.task) to (?P<to>exact) >> set (?P<set>'eval.extract=.*)"),  # noqa: E501
    ([*BOTH, "select.max_rows=5"], None, r"(?P<key_of>select.max_rows)=.*set it to (?P<to>\w+)"),
    ([*BOTH, "eval.tensor_parallel_size=2"], None, r"(?P<key_of>eval.tensor\S+)=.*set it to (?P<to>1)"),
    ([*BOTH, "hub.push=true"], None, r"set (?P<key_of>hub.repo_id) to (?P<to>\S+)"),
    ([*BOTH, "dataset.split.test=0"], None, r"set (?P<set>mode=train)"),
    ([*BOTH, "dataset.split.test=0"], None, r"set (?P<some>dataset.split.test) to a number"),
    (["mode=compare"], pair("a.jsonl", "b.jsonl"), r"write (?P<set>'[^']*')"),
    ([*TRAIN, "model.name_or_path=random:x"], None, r"choose (?P<random>random:\w+)"),
    ([*TRAIN, "model.chat_template=none.jinja"], None, r"(?P<key_of>model\S+)=.*set it to (?P<to>null)"),
    ([*TRAIN, "dataset.max_rows=1", "dataset.split={train: 8, validation: 4, test: 4}"], None,
     r"(?P<key_of>dataset.max_rows)=.*set at least (?P<to>\d+)"),
    ([*TRAIN, "dataset.name_or_path=two.jsonl", "dataset.split={train: 0.5, validation: 0.5, test: 0}"],
     lambda folder: write_rows(folder / "two.jsonl", [*vignettes(9), vignette(3)]), r"(?P<key_of>dataset.id), or set it to (?P<to>null)"),  # noqa: E501
    ([*TRAIN, "dataset=auto", "dataset.name_or_path=a.jsonl"], lambda folder: write_rows(folder / "a.jsonl", ANSWERS),
     r"answer is null: .*leave such rows out by (?P<set>'dataset.keep=[^']*')"),
]  # fmt: skip


def applied(arguments: list[str], message: str, pattern: str) -> list[str]:
    """The command line after the remedy of a message."""
    match = re.search(pattern, message)
    assert match, message
    part = {name: text for name, text in match.groupdict().items() if text is not None}
    if "command" in part:
        return shlex.split(part["command"])
    if "set" in part:
        setting = shlex.split(part["set"])[0]
        setting += "lora" * setting.endswith("=")
        words = [text for text in arguments if "=" in text and not text.startswith(("-", "="))]
        return changed(words, setting)
    if "end" in part:
        return [*arguments[:-1], arguments[-1] + part["end"]]
    if "option" in part:
        return [part["option"], *(text for text in arguments if not text.startswith("-"))]
    if "key" in part:
        return [re.sub(r"^[\w.]*lerning_rate", part["key"], text) for text in arguments]
    if "value" in part:
        return [f"peft={part['value']}" if text == "peft=loora" else text for text in arguments]
    if "extra" in part:
        return [*arguments[:-1], f"+train.extra.{part['extra']}=5"]
    if "renamed" in part:
        return [*arguments[:-1], f"{part['renamed']}={arguments[-1].partition('=')[2]}"]
    if "sub" in part:
        return [*arguments[:-1], arguments[-1].replace(".cycles", f".{part['sub']}")]
    if "drop" in part:
        return changed(arguments, drop=part["drop"])
    if "some" in part:
        return changed(arguments, f"{part['some']}=4")
    if "random" in part:
        return changed(arguments, f"model.name_or_path={part['random']}")
    return changed(arguments, f"{part['key_of']}={part.get('to', 'AB').replace('PORT', '29500')}")


@pytest.mark.smoke  # imports trl
def test_the_remedy_for_a_field_of_sftconfig_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"alpha=5": r"write (?P<set>.*)", "alfa=5": r"did you mean (?P<extra>\w+)\?"}
    for end, pattern in cases.items():
        test_the_remedy_works(tmp_path, monkeypatch, [*TRAIN, f"train.extra.neftune_noise_{end}"], None, pattern)


@pytest.mark.parametrize(("arguments", "make", "pattern"), CASES, ids=[" ".join(case[0][-2:]) for case in CASES])
def test_the_remedy_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], make: Make | None, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if make:
        make(tmp_path)
    for remedy in pattern.split(" >> "):
        message = problem(arguments)
        assert message is not None
        arguments = applied(arguments, message, remedy)
    assert problem(arguments) is None, arguments


def test_a_remedy_has_the_intended_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for arguments, key, value in [
        ([*TRAIN, "store=~/x,y"], "store", "~/x,y"),
        ([*TRAIN, "dataset.system=[INST] do"], "dataset.system", "[INST] do"),
    ]:
        read = parsed(applied(arguments, problem(arguments) or "", r"write (?P<set>.*?)( for one value|$)")[-1])
        assert read is not None
        assert (read.key_or_group, read.value()) == (key, value)


def test_the_keys_to_use_instead_of_managed_fields_exist() -> None:
    known = {*known_keys(), "hydra.run.dir", "mode=plan"}
    assert {own for own in MANAGED.values() if own} <= known


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--config-dir", "conf", "compare", "a.jsonl", "b.jsonl"],
         ["--config-dir", "conf", "mode=compare", 'eval.predictions=["a.jsonl","b.jsonl"]']),
        (["-m", "evaluate", "out/a", "out/b"], ["-m", "mode=evaluate", "eval.name_or_path=out/a,out/b"]),
        (["train", "-m", "seed=1,2"], ["-m", "mode=train", "seed=1,2"]),
        (["seed=1,2", "train"], ["-m", "mode=train", "seed=1,2"]),
    ],
)  # fmt: skip
def test_no_option_or_word_is_lost(arguments: list[str], command: list[str]) -> None:
    message = problem(arguments)
    assert message is not None
    assert shlex.split(message.partition("python -m sftlab ")[2]) == command


def test_a_file_is_not_joined_to_the_previous_value() -> None:
    message = problem(["tracking.project=x", "b.jsonl"])
    assert message is not None
    assert "tracking.project=" not in message


def test_one_file_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ("a.jsonl", "[a.jsonl]"):
        message = problem(["mode=compare", f"eval.predictions={value}"])
        assert message is not None
        assert "two" in message
        assert "[a.jsonl]" not in message


@pytest.mark.parametrize("setting", ["hydra.mode=MULTIRUN", "+experiment=own", "-m"])
def test_a_sweep_is_not_reported_beside_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n"
    (tmp_path / "own" / "experiment" / "own.yaml").write_text(text, "utf-8")
    message = problem(["--config-dir", "own", setting, "seed=3,4", "train.lerning_rate=1"])
    assert message is not None
    assert message.startswith("train.lerning_rate=1: no such key")
    assert "seed" not in message


@pytest.mark.parametrize("word", ["version", "help"])
def test_the_commands_for_help_and_version(tmp_path: Path, word: str) -> None:
    code, out, message, _ = sftlab(tmp_path, word)
    assert (code, out) == (2, "")
    code, out, _, _ = sftlab(tmp_path, *shlex.split(message.partition("python -m sftlab ")[2]))
    assert code == 0
    assert ("sftlab 0" in out) == (word == "version")


def test_all_problems_of_a_command_line_are_reported_and_no_consequences_of_them(tmp_path: Path) -> None:
    code, _, message, _ = sftlab(
        tmp_path,
        "mode=compare",
        "eval.predictions=[a=1.jsonl",
        "train.bf16=maybe",
        "eval.seed=x=1",
        "+seed=3",
        "peft=x",
    )
    assert code == 2
    assert [line.partition(":")[0] for line in message.splitlines()[1:]] == [
        "  - eval.predictions=[a=1.jsonl", "  - eval.seed=x=1", "  - peft=x", "  - +seed=3", "  - train.bf16='maybe'",
    ]  # fmt: skip


def test_a_word_longer_than_the_name_of_a_file_is_explained() -> None:
    message = problem(["x" * 400])
    assert message is not None
    assert "is not KEY=VALUE" in message
