"""Tokenise the prompts of a test set."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sftlab.config import EvalConfig
from sftlab.dataset.prompt import prompt_tokens, tokenize_all, turn_end
from sftlab.errors import ConfigError, Problem, shown
from sftlab.eval.forced import FORCING, answer_pattern, continuations, with_logprobs
from sftlab.model.base import Base, stop_tokens
from sftlab.records import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """The prompt of a test row as text and token ids, and the letters that may be chosen from."""

    id: str
    text: str
    token_ids: list[int]
    choices: str


@dataclass(frozen=True)
class Prompts:
    """The prompts of a test set in its order, for one tokenizer.

    ``key`` identifies them in stage keys: ``rows`` is the hash of all. Completions end at ``stop_token_ids``.
    """

    rows: list[Prompt]
    key: Mapping[str, object]
    stop_token_ids: list[int] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.token_ids) for prompt in self.rows)


def tokenize_prompts(examples: Sequence[Example], base: Base, cfg: EvalConfig, *, of_judge: bool = False) -> Prompts:
    """Tokenise the prompts of a test set with the code that tokenises training rows.

    The result depends on the tokenizer and the test set only: models with the same ``base.identity`` can share it.

    Raises:
        ConfigError: the test set is empty, the chat template changes a text, a prompt and its answer do not fit into
            the model, or the tokenizer gives two choices the same tokens.
    """
    if not examples:
        raise ConfigError(
            Problem(
                "eval",
                None,
                "the test set has no rows",
                "give the dataset a test split, or set eval.dataset to another dataset",
            )
        )
    tokenizer = base.tokenizer()
    tokenized = tokenize_all(partial(prompt_tokens, tokenizer), examples, "test")
    rows = [
        Prompt(example.id, text, token_ids, example.choices)
        for example, (token_ids, text) in zip(examples, tokenized, strict=True)
    ]
    if answer_pattern(cfg) is not None or with_logprobs(cfg):
        for choices in sorted({example.choices for example in examples}):
            continuations(tokenizer, FORCING, choices)
    ends = {turn_end(tokenizer, example) for example in examples}
    if None in ends:
        log.warning(
            "model.chat_template: the template of %s writes no special token after an assistant turn. Generation stops "
            "only at the end tokens of the model's own files, or after eval.max_tokens=%d; if answers run on, set "
            "model.chat_template to a Jinja file that writes {{ eos_token }} (%s) after the assistant's text",
            base.name,
            cfg.max_tokens,
            tokenizer.eos_token,
        )
    key = {"rows": _content(rows), "tokenizer": base.identity}
    prompts = Prompts(rows, key, stop_tokens(base.path, tokenizer, [end for end in ends if end is not None]))
    _check_length(prompts.longest, base.path, cfg, of_judge=of_judge)
    return prompts


def _content(rows: Sequence[Prompt]) -> str:
    """Hash prompts: the same ones are answered once, whichever dataset they come from."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps([row.id, row.text, row.choices, len(row.token_ids)]).encode())
        hashed.update(array("q", row.token_ids).tobytes())
    return hashed.hexdigest()[:16]


def _check_length(longest: int, model: Path, cfg: EvalConfig, *, of_judge: bool) -> None:
    length = context_length(model)
    left = length - longest
    if cfg.max_tokens <= left:
        return
    key, otherwise = "eval.max_tokens", "leave out long rows with dataset.keep"
    if of_judge:
        key, otherwise = "eval.judge.max_tokens", "set eval.judge.name_or_path to a model with a longer context"
    message = f"the longest prompt has {longest} tokens, and the model's context is {length} tokens"
    remedy = f"set {key}={left} or less" if left > 0 else otherwise
    raise ConfigError(Problem(key, shown(cfg.max_tokens), message, remedy))


def context_length(model: Path) -> int:
    """Read a model's context length in tokens from its config.json; 2**30 if it names none."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    config = {**config, **config.get("text_config", {})}
    return int(config.get("max_position_embeddings") or 1 << 30)
