"""docs/configuration.md is current, and has every key that a command line can set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import compose

from sftlab.report import reference
from sftlab.report.reference import GROUPS, PAGE, choices, lines, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run scripts/schema"


def keys(section: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    for key, value in section.items():
        name = f"{above}{key}"
        maps = ("dataset.scoring", "dataset.split", "eval.contenders", "train.lr_scheduler_kwargs", "train.extra")
        if isinstance(value, Mapping) and name not in maps:
            yield from keys(value, f"{name}.")
        else:
            yield name


@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_every_composed_key_has_a_row(peft: str) -> None:
    text = PAGE.read_text("utf-8")
    composed = list(keys(compose(f"peft={peft}")))
    assert len(composed) > 80
    assert [key for key in composed if f"| `{key}` | " not in text] == []


def test_every_choice_has_a_row_and_its_value() -> None:
    text = PAGE.read_text("utf-8")
    for group in GROUPS:
        assert all(f"| `{group}={choice}` | " in text for choice in choices(group))
    assert "| `train.learning_rate` | number above 0 | `3e-3`; `2e-4` (default) |" in text
    assert "| `instance.rdzv_timeout_min` | number above 0 | `15` | minutes |" in text


def test_a_key_without_a_comment_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in reference.CONF.rglob("*.yaml"):
        copy = tmp_path / file.relative_to(reference.CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text("utf-8")
        copy.write_text(text.replace("weight_decay: 0.0 # weight decay of the optimizer", "weight_decay: 0.0"), "utf-8")
    monkeypatch.setattr(reference, "CONF", tmp_path)
    with pytest.raises(ValueError, match=r"train\.weight_decay: no file in conf/ has a comment"):
        page()


def test_comments_are_read_from_the_line_or_the_lines_above(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "# About the file.\nfirst: 1\n# Two\n# lines.\nsecond: '# no' # comment\nthird:\n  inner: a # in it\n"
    )
    found = lines(file)
    assert (found["first"].comment, found["first"].value) == ("", "1")
    assert (found["second"].comment, found["second"].value) == ("Two lines; comment", "'# no'")
    assert found["third.inner"].comment == "in it"
