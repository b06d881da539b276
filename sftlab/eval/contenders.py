"""The test set, and the models that are evaluated on it. Only this module reads the test set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from sftlab import results
from sftlab.config import Config, ContenderConfig, PriceConfig
from sftlab.dataset import stage as dataset
from sftlab.dataset.prompt import prompt_tokens
from sftlab.errors import ConfigError, Problem
from sftlab.eval import decision, endpoint, reuse
from sftlab.eval import stage as evaluate
from sftlab.eval.cost import cost
from sftlab.eval.endpoint import Endpoint
from sftlab.eval.prompts import Prompts, context_length, tokenize_prompts
from sftlab.eval.scorers import scorer
from sftlab.eval.shots import drawn, fitting, reworded, with_shots
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model.base import Base
from sftlab.records import Example, Prediction, single_turn
from sftlab.results import Evaluation
from sftlab.runtime import ledger
from sftlab.runtime.modes import MODES
from sftlab.runtime.store import Stage, Store, key_of

log = logging.getLogger(__name__)

SLACK = 16  # tokens by which the length of a prompt may differ from the sum of its parts
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

    ``asked`` has the test rows with the prompts of this contender; None for the test set itself.
    """

    model: evaluate.Model
    base: Base
    asked: EvalSet | None = None

    @classmethod
    def of(cls, base: Base) -> Contender:
        """A model with its own tokenizer."""
        return cls(evaluate.Model(base.path, base.identity, base.trust_remote_code), base)


@dataclass(frozen=True)
class Remote:
    """A model behind an endpoint, and the test rows as it is asked."""

    endpoint: Endpoint
    asked: EvalSet


@dataclass(frozen=True)
class Judged:
    """An evaluation, and the folder and seconds of each model's stage."""

    evaluation: Evaluation
    stages: dict[str, str]
    times: dict[str, float]


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
        _memory[key] = tokenize_prompts(test.examples, base, test.key, cfg.eval)
        for oldest in list(_memory)[:-REMEMBERED]:
            del _memory[oldest]
    return _memory[key]


def check(cfg: Config, store: Store, base: Base, test: EvalSet) -> None:
    """Check before training that the model can answer the test set, and write the prompts of its contenders.

    Raises:
        ConfigError: The engine does not run the model, or a prompt leaves no room for an answer.
    """
    if MODES[cfg.mode].evaluates:
        evaluate.check_engine(base, cfg.eval)
        prompts(cfg, base, test)
        defined(cfg, store, {"baseline": Contender.of(base)}, test)


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
        of = None if definition is None or definition.url is not None else _weights(cfg, store, pair, definition)
        if definition is None or (of is None and definition.url is None):
            continue
        prompting = definition.weights == "base" and definition.name_or_path is None and definition.url is None
        record = results.Contender(name=name, about=about(definition, definition.shots), prompting=prompting)
        try:
            asked, shots = _asked(cfg, definition, of.base if of is not None else None, test)
            if definition.shots and not shots:
                raise ConfigError(Problem(f"eval.contenders.{name}.shots", None, _none(test)))
            if of is not None:
                prompts(cfg, of.base, asked)
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
    """The model of a definition; None before the training if it is not the base model's, or without eval.baseline."""
    if definition.name_or_path is not None and "finetuned" in pair:
        changes = {"name_or_path": definition.name_or_path, "revision": definition.revision}
        return Contender.of(models.resolve(cfg.model.model_copy(update=changes), store, cfg.seed))
    if definition.name_or_path is None and definition.weights == "base":
        return pair["baseline"] if cfg.eval.baseline else None
    return pair.get("finetuned") if definition.name_or_path is None else None


def _none(test: EvalSet) -> str:
    if not test.train:
        return "there are no training rows from which examples could be drawn"
    return "no training row is short enough to be an example in the prompt, or none has an answer"


def about(definition: ContenderConfig, shots: int) -> str:
    """Describe a contender in words."""
    model = {"base": "the base model", "finetuned": "the fine-tuned model"}[definition.weights]
    if definition.name_or_path is not None:
        path = Path(definition.name_or_path)
        model = path.resolve().name if path.exists() else definition.name_or_path
    if definition.url is not None:
        model = f"{definition.model} at {urlsplit(definition.url).netloc}"
    parts = [f"{shots} example{'' if shots == 1 else 's'} in its prompt"] if definition.shots else []
    parts += ["another instruction"] if definition.system is not None else []
    parts += ["another form of the question"] if definition.user is not None else []
    return f"{model} with {' and '.join(parts)}" if parts else model


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
    zero_shot = prompts(cfg, base, test if rows == test.examples else EvalSet(rows, _content(rows)))
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


def answers(cfg: Config, store: Store, contender: Contender, test: EvalSet) -> tuple[list[list[Prediction]], Stage]:
    """Return the scored answers of a model, once per repeat, and their stage."""
    machine, score = instance.find(cfg.instance), scorer(cfg.eval)
    written = prompts(cfg, contender.base, test)  # a fine-tuned model usually has the tokenizer of its base
    generated = evaluate.make(store, contender.model, written, cfg.eval, machine, cfg.seed)
    runs = [score.predictions(generated.rows(repeat), test.examples) for repeat in range(cfg.eval.repeats)]
    return runs, generated.stage


def judge(cfg: Config, store: Store, contenders: Mapping[str, Contender], test: EvalSet, folder: Path) -> Judged:
    """Generate with every contender, compare the answers, and update the ledger.

    ``contenders`` has ``baseline`` and ``finetuned``; those of eval.contenders are added. Contenders with the same
    weights share the start of their engines.
    """
    others, records = defined(cfg, store, contenders, test)
    known = {name: one for name, one in contenders.items() if name != "baseline" or cfg.eval.baseline}
    local = known | {name: one for name, one in others.items() if isinstance(one, Contender)}
    generated, costs = _generated(cfg, store, local, test)
    for name, one in others.items():
        if isinstance(one, Remote):
            log.info("evaluate: %s, %d questions, %s", name, len(test.examples), one.endpoint.url)
            try:
                generated[name] = endpoint.make(
                    store, one.endpoint, one.asked.examples, one.asked.key, cfg.eval, cfg.seed
                )
            except endpoint.UnreachableError as error:
                records = [left_out(record, str(error)) if record.name == name else record for record in records]
                continue
            costs[name] = cost(generated[name], cfg.eval.repeats, None, _price(cfg, name))
    score, stages, times = scorer(cfg.eval), dict[str, str](), dict[str, float]()
    runs: dict[str, list[list[Prediction]]] = {}
    for name, own in generated.items():
        key = name if name in NAMES else f"contenders.{name}"
        stages[key], times[key] = str(own.stage.path), round(own.seconds, 1)
        runs[name] = [score.predictions(own.rows(number), test.examples) for number in range(cfg.eval.repeats)]
    evaluation = decision.decide(runs, NAMES, cfg.eval, folder, both_mute=True, contenders=records, costs=costs)
    models_of = {name: ledger.name_of(one.model.path, one.model.identity) for name, one in contenders.items()}
    if models_of["finetuned"] != models_of["baseline"]:
        evaluation = reuse.counted(cfg, store.root, evaluation, test.examples, models_of["finetuned"])
    return Judged(evaluation, stages, times)


def _generated(
    cfg: Config, store: Store, local: Mapping[str, Contender], test: EvalSet
) -> tuple[dict[str, evaluate.Generated], dict[str, results.Cost]]:
    """Generate with the models on this machine; those with the same weights share the start of their engines."""
    machine = instance.find(cfg.instance)
    written = {name: prompts(cfg, one.base, one.asked or test) for name, one in local.items()}
    together: dict[object, list[str]] = {}
    for name, one in local.items():
        together.setdefault((one.model, *written[name].stop_token_ids), []).append(name)
    generated: dict[str, evaluate.Generated] = {}
    for names in together.values():
        log.info("evaluate: %s model, %d questions, %s", " and ".join(names), len(test.examples), cfg.eval.engine)
        sets = [written[name] for name in names]
        answers = evaluate.make_all(store, local[names[0]].model, sets, cfg.eval, machine, cfg.seed)
        generated |= dict(zip(names, answers, strict=True))
    costs = {}
    for name, own in generated.items():
        lengths = [len(prompt.token_ids) for prompt in written[name].rows]
        costs[name] = cost(own, cfg.eval.repeats, lengths, _price(cfg, name))
    return generated, costs


def _price(cfg: Config, name: str) -> PriceConfig | None:
    definition = (cfg.eval.contenders or {}).get(name)
    return definition.price if definition is not None and definition.price is not None else cfg.eval.price
