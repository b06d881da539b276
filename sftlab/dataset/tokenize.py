"""Examples → token ids and labels, made once for all jobs that share them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sftlab.dataset.prompt import tokenize, tokenize_all, turn_end
from sftlab.dataset.stage import Dataset
from sftlab.errors import ConfigError
from sftlab.model.base import Base
from sftlab.records import Example
from sftlab.runtime.store import Stage, Store, key_of, versions, write_json

log = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that the loss does not count


@dataclass(frozen=True)
class Tokenized:
    """The finished stage: ``train`` and ``validation`` as datasets on disk, and ``counts.json``."""

    stage: Stage

    @property
    def counts(self) -> dict[str, Any]:
        """By split: rows, tokens, supervised tokens, rows truncated and left out, longest row; BOS of a prompt.

        ``turn_ends`` are the tokens that the chat template ends an assistant turn with.
        """
        counts: dict[str, Any] = json.loads((self.stage.path / "counts.json").read_text("utf-8"))
        return counts


def inputs(dataset_key: str, base: Base, max_length: int, allow_truncated_completion: bool) -> dict[str, Any]:
    """What the token ids depend on."""
    return {
        "version": 5,
        "dataset": dataset_key,
        "tokenizer": base.identity,
        "libraries": versions("transformers", "tokenizers", "jinja2"),
        "max_length": max_length,
        "allow_truncated_completion": allow_truncated_completion,
    }


def make(store: Store, dataset: Dataset, base: Base, max_length: int, allow_truncated_completion: bool) -> Tokenized:
    """Training and validation rows as token ids, the loss on the completion only.

    Raises:
        ConfigError: ``max_length`` leaves a completion incomplete (unless allowed), no prompt fits, or the chat
            template changes a text or does not end a turn.
    """

    def build(folder: Path) -> None:
        from datasets import Dataset as Table

        tokenizer = base.tokenizer()
        counts: dict[str, Any] = {"turn_ends": []}
        for split in ("train", "validation"):
            examples = dataset.split(split)
            whole = list(_rows(examples, tokenizer, split))
            rows = _fit(whole, split, max_length, allow_truncated_completion)
            over = sum(len(row["input_ids"]) > max_length for row in whole)
            counts[split] = {
                "rows": len(rows),
                "tokens": sum(len(row["input_ids"]) for row in rows),
                "supervised": sum(label != IGNORED for row in rows for label in row["labels"]),
                "truncated": over - (len(whole) - len(rows)),
                "left_out": len(whole) - len(rows),
                "longest": max(len(row["input_ids"]) for row in rows),
            }
            counts[split]["content"] = key_of({"rows": [[row["input_ids"], row["labels"]] for row in rows]})
            if split == "train":
                prompt = [
                    token
                    for token, label in zip(rows[0]["input_ids"], rows[0]["labels"], strict=True)
                    if label == IGNORED
                ]
                counts["prompt_bos"] = prompt.count(tokenizer.bos_token_id)
            ends = {turn_end(tokenizer, example) for example in examples} | {*counts["turn_ends"]}
            counts["turn_ends"] = sorted(token for token in ends if token is not None)
            Table.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]).save_to_disk(
                folder / split
            )
            log.info(
                "tokens: %s: %s rows, %s tokens, %s of them count in the loss; longest row %s, truncated rows %s",
                split,
                *(f"{counts[split][name]:,}" for name in ("rows", "tokens", "supervised", "longest", "truncated")),
            )
        write_json(folder / "counts.json", counts)

    key = inputs(dataset.stage.key, base, max_length, allow_truncated_completion)
    return Tokenized(store.stage("tokens", key, build))


def _rows(examples: list[Example], tokenizer: Any, split: str) -> Iterator[dict[str, Any]]:
    made = tokenize_all(partial(tokenize, tokenizer), examples, split)
    dedented = []
    for example, tokens in zip(examples, made, strict=True):
        if tokens.dedented:
            dedented.append(example.id)
        yield {
            "id": example.id,
            "input_ids": tokens.prompt + tokens.completion,
            "labels": [IGNORED] * len(tokens.prompt) + tokens.completion,
        }
    if dedented:
        log.warning(
            "model.chat_template: the template leaves out the indentation of the first line in the assistant text of "
            "%d of %d %s rows (first: %s). Where it matters, as in code, set model.chat_template to a Jinja file that "
            "does not trim the text, or begin the text with another line in dataset.assistant, such as ```",
            len(dedented),
            len(examples),
            split,
            dedented[0],
        )


def _fit(rows: list[dict[str, Any]], split: str, max_length: int, allowed: bool) -> list[dict[str, Any]]:
    """The rows cut to ``max_length``. A row whose prompt alone fills it has nothing to learn and is left out.

    Raises:
        ConfigError: no row's prompt fits, or a completion would be cut and that is not ``allowed``.
    """
    fitting = [row for row in rows if any(label != IGNORED for label in row["labels"][:max_length])]
    longest = max(len(row["input_ids"]) for row in rows)
    if not fitting:
        shortest = min(sum(label == IGNORED for label in row["labels"]) for row in rows)
        raise ConfigError(
            f"train.max_length={max_length}: is shorter than the shortest prompt ({shortest} tokens, {split}); "
            f"set at least {longest}, the longest row"
        )
    cut = [row for row in fitting if len(row["input_ids"]) > max_length]
    if cut and not allowed:
        worst = max(cut, key=lambda row: len(row["input_ids"]))
        raise ConfigError(
            f"train.max_length={max_length}: cuts the completion of {len(cut)} of {len(rows)} {split} rows "
            f"(the longest, {worst['id']}, has {len(worst['input_ids'])} tokens); set "
            f"train.max_length={len(worst['input_ids'])}, or allow it by train.allow_truncated_completion=true"
        )
    if left_out := len(rows) - len(fitting):
        log.warning(
            "tokens: %d of %d %s rows are left out: their prompts fill train.max_length=%d (the longest has %d tokens)",
            left_out,
            len(rows),
            split,
            max_length,
            longest,
        )
    return [
        {**row, "input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]} for row in fitting
    ]
