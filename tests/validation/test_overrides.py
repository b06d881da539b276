"""Hydra parses a suggested override as the intended value."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftlab.validation.overrides import override, parsed, shown, with_home

settings.register_profile("any machine", deadline=None, max_examples=40)  # a busy machine is not a fault
settings.load_profile("any machine")

WEIRD = st.text("ab1-.=,:~ \\'\"()[]{}$%#&;/äß→\t", min_size=1, max_size=12)
PLAIN = st.text("ab=~:\\ ()ä'", min_size=1, max_size=8).map(str.strip).filter(lambda text: text[:1] not in ("", "'"))


def value(key: str, text: str) -> object:
    suggested = override(key, text)
    assert suggested is not None
    (typed,) = shlex.split(shown(suggested))
    read = parsed(typed)
    assert read is not None
    assert not read.is_sweep_override()
    assert read.key_or_group == key
    return read.value()


@given(WEIRD)
def test_a_value_is_quoted_as_it_was_written(text: str) -> None:
    meant = text.strip()
    if meant[:1] in ("[", "{", "'", '"') or not meant:
        return  # a list, a dictionary, or quotes of the user's
    read = value("dataset.name_or_path", text)
    assert read == meant or not isinstance(read, str)  # a number stays a number


@given(st.lists(PLAIN, min_size=1, max_size=4))
def test_each_item_of_a_list_is_quoted(items: list[str]) -> None:
    read = value("train.extra.x", f"[{','.join(items)}]")
    assert isinstance(read, list)
    assert [item if isinstance(item, str) else known for item, known in zip(read, items, strict=True)] == items


@given(
    st.dictionaries(st.sampled_from(["a", "b=c", "d e", "f,g"]).filter(lambda key: "," not in key), PLAIN, min_size=1)
)
def test_each_value_of_a_dictionary_is_quoted(items: dict[str, str]) -> None:
    read = value("train.extra.x", "{" + ", ".join(f"{key}: {text}" for key, text in items.items()) + "}")
    assert isinstance(read, dict)
    assert {key: text if isinstance(text, str) else items[key] for key, text in read.items()} == items


@given(st.text(max_size=30))
def test_a_suggestion_for_any_text_can_be_parsed(text: str) -> None:
    for key in ("store", "eval.predictions", "train.extra.x"):
        for sweep in (False, True):
            suggested = override(key, text, sweep=sweep)
            assert suggested is None or parsed(suggested) is not None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[run,lr=1e-4/base.jsonl,run,lr=1e-4/tuned.jsonl]", ["run,lr=1e-4/base.jsonl", "run,lr=1e-4/tuned.jsonl"]),
        ("[a=1.jsonl, b=2.jsonl]", ["a=1.jsonl", "b=2.jsonl"]),
        ("['a,b=1.jsonl',c=2.jsonl]", ["a,b=1.jsonl", "c=2.jsonl"]),
        ("a=1.jsonl,b.jsonl", ["a=1.jsonl", "b.jsonl"]),
        ("[~/a,~/b]", ["~/a", "~/b"]),
    ],
)
def test_files_in_a_list(written: str, meant: list[str]) -> None:
    assert value("eval.predictions", written) == meant


def test_names_of_existing_files_are_split_correctly(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("x,y=1", "z", "p,q,r=2")]
    for name in names:
        Path(name).write_text("", "utf-8")
    assert value("train.extra.x", f"[{','.join(names)}]") == names


@pytest.mark.parametrize("written", ["{ä: 1}", "{'a b': 1, c}"])
def test_a_dictionary_that_the_grammar_cannot_express(written: str) -> None:
    suggested = override("train.extra", written)
    assert suggested is None or parsed(suggested) is not None


def test_a_home_folder_is_quoted() -> None:
    assert with_home("store=~/a") == 'store="~/a"'
    assert with_home("eval.predictions=[~/a.jsonl,~b/c.jsonl]") == 'eval.predictions=["~/a.jsonl","~b/c.jsonl"]'
    assert with_home("store=~/a,~/b") == 'store="~/a","~/b"'
    for as_it_is in ("~peft.r", "store='~/a'", "store=~/a=b,c", "seed=1", json.dumps("~")):
        assert with_home(as_it_is) == as_it_is
