"""``eval.contenders``: resolve each definition to a model and its prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from sftlab import results
from sftlab.config import Config, ContenderConfig
from sftlab.dataset.prompt import prompt_tokens
from sftlab.errors import ConfigError, Problem
from sftlab.eval import contenders
from sftlab.eval.contenders import Contender, EvalSet, Remote
from sftlab.eval.endpoint import Endpoint
from sftlab.eval.prompts import context_length
from sftlab.eval.shots import drawn, fitting, reworded, with_shots
from sftlab.model import base as models
from sftlab.model import variants
from sftlab.model.base import Base
from sftlab.model.finished import lora_rank
from sftlab.records import Example, single_turn
from sftlab.runtime.store import Store, key_of, versions

log = logging.getLogger(__name__)

SLACK = 16  # tokens by which the length of a prompt may differ from the sum of its parts


def defined(
    cfg: Config, store: Store, pair: Mapping[str, Contender], test: EvalSet
) -> tuple[dict[str, Contender | Remote], list[results.Contender]]:
    """Resolve the models of eval.contenders, and write their prompts.

    Args:
        cfg: The configuration.
        store: Where models are stored.
        pair: The models ``baseline`` and ``finetuned``; before the training only the former.
        test: The test set.

    Returns:
        The contenders by name, and the records of all. A contender is left out if no example fits into its prompt, or
        the chat template cannot write it.
    """
    found, records = dict[str, Contender | Remote](), list[results.Contender]()
    for name, definition in (cfg.eval.contenders or {}).items():
        if definition is None:
            continue
        other = definition.name_or_path is not None or definition.url is not None or definition.quantization is not None
        prompting = definition.weights == "base" and not other
        record = results.Contender(name=name, about=about(definition, definition.shots), prompting=prompting)
        try:
            of = None if definition.url is not None else _weights(cfg, store, pair, definition)
            if of is None and definition.url is None:
                continue
            asked, shots = _asked(cfg, definition, of.base if of is not None else None, test)
            if definition.shots and not shots:
                raise ConfigError(Problem(f"eval.contenders.{name}.shots", None, _none(test)))
            if of is not None:
                contenders.prompts(cfg, of.base, asked)
            found[name] = Remote(Endpoint.of(definition), asked) if of is None else replace(of, asked=asked)
            record = record.model_copy(update={"about": about(definition, len(shots)), "shots": shots})
        except ConfigError as error:
            record = left_out(record, error.problems[0].message)
        records.append(record)
    return found, records


def left_out(record: results.Contender, reason: str) -> results.Contender:
    """The record of a contender that cannot be evaluated; the others can."""
    log.warning("eval.contenders.%s is left out: %s", record.name, reason)
    return record.model_copy(update={"left_out": reason})


def _weights(cfg: Config, store: Store, pair: Mapping[str, Contender], definition: ContenderConfig) -> Contender | None:
    """The model of a definition; None before the training if it is not the base model's, or without eval.baseline.

    Raises:
        ConfigError: The adapter is missing, or the engine cannot compute it beside the weights.
    """
    trained = definition.weights != "base" or definition.name_or_path is not None
    if (trained and "finetuned" not in pair) or not (trained or cfg.eval.baseline):
        return None
    if definition.weights == "adapter":
        of = _with_adapter(cfg, pair, definition)
    elif definition.name_or_path is not None:
        named = models.another(cfg.model, definition.name_or_path, definition.revision)
        of = Contender.of(models.resolve(named, store, cfg.seed))
    else:
        of = replace(pair["baseline" if definition.weights == "base" else "finetuned"], adapter=None)
    if definition.quantization is None:
        return of
    quantised = {"model": of.model.identity, "quantization": definition.quantization}
    identity = key_of({**quantised, "libraries": versions("bitsandbytes")})
    return replace(of, model=replace(of.model, identity=identity, quantization=definition.quantization))


def _with_adapter(cfg: Config, pair: Mapping[str, Contender], definition: ContenderConfig) -> Contender:
    """The base model with the named adapter, or with that of the selected checkpoint, beside its weights."""
    folder = pair["finetuned"].adapter if definition.name_or_path is None else Path(definition.name_or_path)
    if folder is None or not (folder / variants.ADAPTER).is_file():
        reason = "the fine-tuned model has no adapter: all of its weights were trained"
        raise ConfigError(Problem("eval.contenders", None, reason))
    reserved = lora_rank(folder, pair["baseline"].base.path)
    if reserved is None and cfg.eval.engine == "vllm":
        reason = (
            "vLLM cannot compute this adapter beside the weights (DoRA, modules_to_save, a rank above 512, or a base "
            "model that also reads images)"
        )
        raise ConfigError(Problem("eval.contenders", None, reason))
    rank = json.loads((folder / variants.ADAPTER).read_text("utf-8"))["r"]
    return replace(pair["baseline"], adapter=folder, lora_rank=reserved or rank)


def _none(test: EvalSet) -> str:
    if not test.train:
        return "there are no training rows from which examples could be drawn"
    return "no training row is short enough to be an example in the prompt, or none has an answer"


def about(definition: ContenderConfig, shots: int) -> str:
    """Describe a contender in words."""
    model = {
        "base": "the base model",
        "adapter": "the adapter on the base model",
        "finetuned": "the fine-tuned model",
    }[definition.weights]
    if definition.name_or_path is not None:
        path = Path(definition.name_or_path)
        own = path.resolve().name if path.exists() else definition.name_or_path
        model = f"the adapter {own} on the base model" if definition.weights == "adapter" else own
    if definition.quantization is not None:
        model = f"{model}, quantised to {definition.quantization},"
    if definition.url is not None:
        model = f"{definition.model} at {urlsplit(definition.url).netloc}"
    parts = [f"{shots} example{'' if shots == 1 else 's'} in its prompt"] if definition.shots else []
    parts += ["another instruction"] if definition.system is not None else []
    parts += ["another form of the question"] if definition.user is not None else []
    return f"{model} with {' and '.join(parts)}" if parts else model.removesuffix(",")


def _asked(cfg: Config, definition: ContenderConfig, base: Base | None, test: EvalSet) -> tuple[EvalSet, list[str]]:
    """Write the rows of the test set with the prompts of a contender; with the ids of the examples in them.

    The context of a model without a ``base``, behind an endpoint, is not known, and is taken to be long enough.
    """
    if not definition.shots and definition.system is None and definition.user is None:
        return EvalSet(test.examples, _content(test.examples)), []
    if definition.shots and not test.train:
        return test, []
    rows = [reworded(row, definition) for row in test.examples]
    chosen = (reworded(row, definition) for row in drawn(test.train, cfg.dataset.seed))
    shots = [*islice(chosen, definition.shots)] if base is None else _fitting(cfg, definition, base, rows, test, chosen)
    rows = [with_shots(row, shots) for row in rows] if shots else rows
    return EvalSet(rows, _content(rows)), [row.id for row in shots]


def _fitting(
    cfg: Config, definition: ContenderConfig, base: Base, rows: list[Example], test: EvalSet, chosen: Iterator[Example]
) -> list[Example]:
    """Choose examples that fit into the context of a model with the longest question and an answer."""
    if not definition.shots:
        return []
    zero_shot = contenders.prompts(cfg, base, test if rows == test.examples else EvalSet(rows, _content(rows)))
    room = context_length(base.path) - cfg.eval.max_tokens - zero_shot.longest - SLACK
    shots = fitting(chosen, definition.shots, room, partial(_added, base))
    if len(shots) < definition.shots:
        number = len(shots), definition.shots
        log.warning("eval.contenders: %d of %d examples fit into the context of %s", *number, base.name)
    return shots


def _content(rows: Sequence[Example]) -> str:
    """Hash what the prompts of rows are made from: the same question is asked once, whichever dataset has it."""
    return key_of({"rows": [[row.id, row.prompt, row.tools, row.choices] for row in rows]})


def _added(base: Base, shot: Example) -> int:
    """The number of tokens that an example adds to a prompt."""
    question = Example(shot.id, single_turn("", "?", ""), "")
    alone, behind = (prompt_tokens(base.tokenizer(), row)[0] for row in (question, with_shots(question, [shot])))
    return len(behind) - len(alone)
