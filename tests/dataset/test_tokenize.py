"""Tokenise examples: labels, counts, and truncation to max_length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import training, vignette, vignettes, write_model, write_rows
from test_prompt import settings

from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.dataset.token_rows import read_rows
from sftlab.errors import ConfigError
from sftlab.eval.prompts import tokenize_prompts
from sftlab.model.base import Base
from sftlab.runtime.store import Store


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base("tiny", write_model(tmp_path_factory.mktemp("model")), "identity", False, None)


def data(tmp_path: Path, rows: list[dict[str, Any]]) -> dataset.Dataset:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    split = {"train": 0.75, "validation": 0.25, "test": 0}
    return dataset.make(Store(tmp_path / "store"), settings(name_or_path=str(path), split=split))


def made(tmp_path: Path, base: Base, max_length: int, allowed: bool = False, rows: Any = None) -> tokenize.Tokenized:
    cfg = training(max_length, allowed=allowed)
    return tokenize.make(Store(tmp_path / "store"), data(tmp_path, rows or vignettes(12)), base, cfg)


def lengths(tmp_path: Path, base: Base) -> tuple[list[int], list[int]]:
    """Tokens of each training and validation row, and of its prompt."""
    tokens = made(tmp_path, base, 4096)
    rows = [row for split in ("train", "validation") for row in read(tokens, split)]
    return [len(row["input_ids"]) for row in rows], [row["labels"].count(tokenize.IGNORED) for row in rows]


def read(tokens: tokenize.Tokenized, split: str) -> list[dict[str, Any]]:
    return [dict(row) for row in read_rows(tokens.stage.path, split)]


def test_only_the_completion_has_a_loss(tmp_path: Path, base: Base) -> None:
    tokens = made(tmp_path, base, 4096)
    examples = data(tmp_path, vignettes(12)).split("train")
    tokenizer = base.tokenizer()
    for example, row in zip(examples, read(tokens, "train"), strict=True):
        ignored = row["labels"].count(tokenize.IGNORED)
        assert row["labels"] == [tokenize.IGNORED] * ignored + row["input_ids"][ignored:]
        assert tokenizer.decode(row["input_ids"][ignored:]) == example.assistant + "</s>"
        assert example.assistant not in tokenizer.decode(row["input_ids"][:ignored])


def test_evaluation_has_the_prompts_that_training_masked(tmp_path: Path, base: Base, config: Any) -> None:
    """Token for token, through both stages."""
    trained = read(made(tmp_path, base, 4096), "train")
    examples = data(tmp_path, vignettes(12)).split("train")
    prompts = tokenize_prompts(examples, base, config("model=tiny_random").eval)
    masked = [row["input_ids"][: row["labels"].count(tokenize.IGNORED)] for row in trained]
    assert [prompt.token_ids for prompt in prompts.rows] == masked


def test_the_counts(tmp_path: Path, base: Base) -> None:
    tokens = made(tmp_path, base, 4096)
    rows = read(tokens, "train")
    counts = tokens.counts
    assert counts.prompt_bos == 1
    assert (counts.train.rows, counts.validation.rows) == (9, 3)
    assert counts.train.tokens == sum(len(row["input_ids"]) for row in rows)
    assert counts.train.supervised == sum(label != tokenize.IGNORED for row in rows for label in row["labels"])
    assert (counts.train.truncated, counts.train.left_out) == (0, 0)
    assert counts.train.longest == max(len(row["input_ids"]) for row in rows)


def test_max_length_shorter_than_the_shortest_prompt(tmp_path: Path, base: Base) -> None:
    whole, prompts = lengths(tmp_path, base)
    for allowed in (False, True):
        with pytest.raises(
            ConfigError, match=rf"train\.max_length={min(prompts)}: is not longer than the shortest prompt"
        ):
            made(tmp_path, base, min(prompts), allowed)
    made(tmp_path, base, max(whole))  # the length that a message names is enough
    assert list((tmp_path / "store" / "tokens").glob("*.partial")) == []


def test_a_truncated_completion_is_refused_unless_allowed(tmp_path: Path, base: Base) -> None:
    whole, prompts = lengths(tmp_path, base)
    cut = max(whole) - 1
    message = rf"train\.max_length={cut}: truncates the completion of .*set train\.max_length={max(whole)}, or "
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, base, cut)
    tokens = made(tmp_path, base, cut, allowed=True)
    counts = tokens.counts.train, tokens.counts.validation
    assert sum(count.truncated for count in counts) == sum(length > cut for length in whole)
    assert max(len(row["input_ids"]) for split in ("train", "validation") for row in read(tokens, split)) == cut
    assert cut > max(prompts)


def test_a_row_whose_prompt_fills_max_length_is_left_out_and_counted(
    tmp_path: Path, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*vignettes(11), vignette(11, question="long " * 300)]
    tokens = made(tmp_path, base, 300, rows=rows)
    counts = tokens.counts.train, tokens.counts.validation
    assert [sum(getattr(count, name) for count in counts) for name in ("rows", "left_out", "truncated")] == [11, 1, 0]
    assert "1 of " in caplog.text
    assert "left out" in caplog.text


@pytest.mark.parametrize("what", ["dataset", "base", "max_length", "allow", "train_on"])
def test_the_key_changes_with_each_input(tmp_path: Path, base: Base, what: str) -> None:
    other = Base("tiny", base.path, "another", False, None)
    before = tokenize.inputs("key", base, training(10))
    changed = training(
        11 if what == "max_length" else 10, allowed=what == "allow", train_on="last" if what == "train_on" else "all"
    )
    after = tokenize.inputs("other" if what == "dataset" else "key", other if what == "base" else base, changed)
    store = Store(tmp_path)
    assert store.path("tokens", before) != store.path("tokens", after)


def test_a_model_without_chat_template_says_what_to_do(tmp_path: Path) -> None:
    bare = Base("bare", write_model(tmp_path / "bare", template=None), "identity", False, None)
    with pytest.raises(ConfigError, match=r"no chat template.*set model\.chat_template"):
        bare.tokenizer()
