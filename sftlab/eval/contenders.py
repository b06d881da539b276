"""The test set, and the models that are evaluated on it. Only this module reads the test set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftlab.config import Config
from sftlab.dataset import stage as dataset
from sftlab.eval import stage as evaluate
from sftlab.eval.endpoint import Endpoint
from sftlab.eval.prompts import Prompts, tokenize_prompts
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.model import variants
from sftlab.model.base import Base
from sftlab.records import Example, Prediction
from sftlab.runtime.modes import MODES
from sftlab.runtime.store import Stage, Store, key_of

log = logging.getLogger(__name__)

NAMES = {"baseline": "the base model", "finetuned": "the fine-tuned model"}


@dataclass(frozen=True)
class EvalSet:
    """The test rows, the key of the dataset that they come from, and training rows for examples in a prompt."""

    examples: list[Example]
    key: str
    train: Sequence[Example] = ()


@dataclass(frozen=True)
class Contender:
    """A model to evaluate: its weights, and the model whose tokenizer and chat template write its prompts.

    ``asked`` has the test rows with the prompts of this contender; None for the test set itself. ``adapter`` is the
    checkpoint that a fine-tuned model was merged from. With ``lora_rank`` it is not merged: the engine computes it
    beside the weights of ``model``, whose adapters have at most this rank.
    """

    model: evaluate.Model
    base: Base
    asked: EvalSet | None = None
    adapter: Path | None = None
    lora_rank: int | None = None

    @classmethod
    def of(cls, base: Base) -> Contender:
        """A model with its own tokenizer."""
        return cls(evaluate.Model(base.path, base.identity, base.trust_remote_code), base)

    def request(self, written: Prompts) -> evaluate.Request:
        """Ask this model, or the adapter on it."""
        if self.lora_rank is None or self.adapter is None:
            return evaluate.Request(self.model.identity, written)
        identity = key_of({"model": self.model.identity, "adapter": variants.content(self.adapter)})
        return evaluate.Request(identity, written, self.adapter)


@dataclass(frozen=True)
class Remote:
    """A model behind an endpoint, and the test rows as it is asked."""

    endpoint: Endpoint
    asked: EvalSet


def read_test(cfg: Config, store: Store, data: dataset.Dataset | None) -> EvalSet:
    """Read the test set: that of eval.dataset if it is set, else of the dataset itself.

    The training rows are those of ``data``; in mode=evaluate with eval.dataset, those of the latter if it has any.
    """
    mounted, trained_on = None if cfg.eval.dataset is None else "eval.dataset", data
    if cfg.eval.dataset is not None:
        data = dataset.make(store, cfg.eval.dataset, mounted="eval.dataset")
    assert data is not None
    source = cfg.eval.dataset or cfg.dataset
    rows = dataset.test_rows(data, cfg.eval.max_rows, source.seed)
    if MODES[cfg.mode].reads_test and cfg.eval.group_by is not None:
        values = dataset.subgroups(source, cfg.eval.group_by, mounted=mounted)
        rows = [replace(row, subgroup=values[row.id]) for row in rows]
    elif source.sources is not None:
        rows = [replace(row, subgroup=row.source) for row in rows]
    return EvalSet(rows, data.stage.key, (trained_on or data).split("train"))


# By everything that `tokenize_prompts` reads: a job has checked the prompts that `judge` needs after the training.
_memory: dict[str, Prompts] = {}
REMEMBERED = 4  # test sets that a process retains in memory, with prompts of different tokenizers or contenders


def prompts(cfg: Config, base: Base, test: EvalSet) -> Prompts:
    """Write the test set with a model's tokenizer and chat template, once per process.

    Raises:
        ConfigError: A prompt leaves no room for an answer.
    """
    key = key_of({"rows": test.key, "model": base.identity, "eval": cfg.eval.model_dump()})
    if key not in _memory:
        _memory[key] = tokenize_prompts(test.examples, base, cfg.eval)
        for oldest in list(_memory)[:-REMEMBERED]:
            del _memory[oldest]
    return _memory[key]


def answers(cfg: Config, store: Store, contender: Contender, test: EvalSet) -> tuple[list[list[Prediction]], Stage]:
    """Return the scored answers of a model, once per repeat, and their stage."""
    machine, score = instance.find(cfg.instance), scorer(cfg.eval)
    written = prompts(cfg, contender.base, test)  # a fine-tuned model usually has the tokenizer of its base
    generated = evaluate.make(store, contender.model, written, cfg.eval, machine, cfg.seed)
    repeats = range(cfg.eval.repeats)
    runs = [score.scored(score.predictions(generated.rows(repeat), test.examples)) for repeat in repeats]
    return runs, generated.stage
