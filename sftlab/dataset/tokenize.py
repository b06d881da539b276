"""Tokenise the examples of a dataset into token ids and labels; all jobs with the same inputs share the result."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sftlab.dataset.prompt import tokenize, tokenize_all, turn_end
from sftlab.dataset.stage import Dataset
from sftlab.errors import ConfigError, Problem, shown
from sftlab.model.base import Base
from sftlab.records import IGNORED, Example
from sftlab.results import SplitCounts, TokenCounts
from sftlab.runtime.store import Stage, Store, key_of, versions, write_json

log = logging.getLogger(__name__)

COUNTS, GROUPS = "counts.json", "groups.json"


@dataclass(frozen=True)
class Tokenized:
    """The finished stage: ``train`` and ``validation`` as datasets on disk, ``counts.json`` and ``groups.json``."""

    stage: Stage

    @property
    def counts(self) -> TokenCounts:
        """Rows and tokens of both splits."""
        return TokenCounts.model_validate_json((self.stage.path / COUNTS).read_text("utf-8"))


def validation_groups(folder: Path) -> list[str | None]:
    """The group of each validation row of a finished stage, in the order of its rows."""
    groups: list[str | None] = json.loads((folder / GROUPS).read_text("utf-8"))
    return groups


def inputs(dataset_key: str, base: Base, max_length: int, allow_truncated_completion: bool) -> Mapping[str, Any]:
    """What the token ids depend on."""
    return {
        "version": 6,
        "dataset": dataset_key,
        "tokenizer": base.identity,
        "libraries": versions("transformers", "tokenizers", "jinja2"),
        "max_length": max_length,
        "allow_truncated_completion": allow_truncated_completion,
    }


@dataclass(frozen=True)
class Row:
    """A tokenised example. Labels are the token ids of the completion, and ``IGNORED`` in the prompt."""

    id: str
    input_ids: list[int]
    labels: list[int]

    @property
    def prompt(self) -> list[int]:
        """The tokens of the prompt."""
        return [token for token, label in zip(self.input_ids, self.labels, strict=True) if label == IGNORED]


def make(store: Store, dataset: Dataset, base: Base, max_length: int, allow_truncated_completion: bool) -> Tokenized:
    """Tokenise training and validation rows, with a loss on the completion only.

    Raises:
        ConfigError: ``max_length`` truncates a completion (unless allowed), no prompt fits, or the chat template
            changes a text or does not end a turn.
    """

    def build(folder: Path) -> None:
        tokenizer = base.tokenizer()
        splits: dict[str, list[Row]] = {}
        counts: dict[str, SplitCounts] = {}
        turn_ends: set[int | None] = set()
        for split in ("train", "validation"):
            examples = dataset.split(split)
            whole = list(_rows(examples, tokenizer, split))
            splits[split] = _fit(whole, split, max_length, allow_truncated_completion)
            counts[split] = _count(whole, splits[split], max_length)
            turn_ends |= {turn_end(tokenizer, example) for example in examples}
            _save(splits[split], folder / split)
            log.info(
                "tokens: %s: %s rows, %s tokens, %s of them supervised; longest row %s tokens, truncated rows %s",
                split,
                *(
                    f"{getattr(counts[split], name):,}"
                    for name in ("rows", "tokens", "supervised", "longest", "truncated")
                ),
            )
        group_of = {example.id: example.group for example in dataset.split("validation")}
        write_json(folder / GROUPS, [group_of[row.id] for row in splits["validation"]])
        record = TokenCounts(
            train=counts["train"],
            validation=counts["validation"],
            prompt_bos=splits["train"][0].prompt.count(tokenizer.bos_token_id),
            turn_ends=sorted(token for token in turn_ends if token is not None),
        )
        write_json(folder / COUNTS, record.model_dump())

    key = inputs(dataset.stage.key, base, max_length, allow_truncated_completion)
    return Tokenized(store.stage("tokens", key, build))


def _rows(examples: Sequence[Example], tokenizer: Any, split: str) -> Iterator[Row]:
    dedented = []
    for example, tokens in zip(examples, tokenize_all(partial(tokenize, tokenizer), examples, split), strict=True):
        if tokens.dedented:
            dedented.append(example.id)
        yield Row(
            id=example.id,
            input_ids=tokens.prompt + tokens.completion,
            labels=[IGNORED] * len(tokens.prompt) + tokens.completion,
        )
    if dedented:
        log.warning(
            "model.chat_template: the template removes the indentation of the first line of the assistant text in %d "
            "of %d %s rows (first: %s). If it matters, as in code, set model.chat_template to a Jinja file that does "
            "not trim the text, or start the text of dataset.assistant with another line, such as ```",
            len(dedented),
            len(examples),
            split,
            dedented[0],
        )


def _fit(rows: Sequence[Row], split: str, max_length: int, allowed: bool) -> list[Row]:
    """Truncate rows to ``max_length``. A row whose prompt alone fills it has no target and is left out.

    Raises:
        ConfigError: no prompt fits, or a completion would be truncated and that is not ``allowed``.
    """
    fitting = [row for row in rows if any(label != IGNORED for label in row.labels[:max_length])]
    longest = max(len(row.input_ids) for row in rows)
    if not fitting:
        shortest = min(len(row.prompt) for row in rows)
        raise ConfigError(
            Problem(
                "train.max_length",
                shown(max_length),
                f"is not longer than the shortest prompt ({shortest} tokens, {split})",
                f"set at least {longest}, the length of the longest row",
            )
        )
    over = [row for row in fitting if len(row.input_ids) > max_length]
    if over and not allowed:
        worst = max(over, key=lambda row: len(row.input_ids))
        raise ConfigError(
            Problem(
                "train.max_length",
                shown(max_length),
                f"truncates the completion of {len(over)} of {len(rows)} {split} rows (the longest, "
                f"{worst.id}, has {len(worst.input_ids)} tokens)",
                f"set train.max_length={len(worst.input_ids)}, or allow it with train.allow_truncated_completion=true",
            )
        )
    if left_out := len(rows) - len(fitting):
        log.warning(
            "tokens: %d of %d %s rows are left out: their prompts fill train.max_length=%d (the longest row has %d "
            "tokens)",
            left_out,
            len(rows),
            split,
            max_length,
            longest,
        )
    return [replace(row, input_ids=row.input_ids[:max_length], labels=row.labels[:max_length]) for row in fitting]


def _count(whole: Sequence[Row], rows: Sequence[Row], max_length: int) -> SplitCounts:
    """Counts of a split: ``whole`` has all of its rows, ``rows`` those that are used, truncated."""
    left_out = len(whole) - len(rows)
    return SplitCounts(
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        supervised=sum(label != IGNORED for row in rows for label in row.labels),
        truncated=sum(len(row.input_ids) > max_length for row in whole) - left_out,
        left_out=left_out,
        longest=max(len(row.input_ids) for row in rows),
        content=key_of({"rows": [[row.input_ids, row.labels] for row in rows]}),
    )


def _save(rows: Sequence[Row], folder: Path) -> None:
    from datasets import Dataset as Table

    Table.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows]).save_to_disk(folder)
