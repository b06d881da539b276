"""Generate the answers of all contenders, compare them, and update the ledger."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftlab import results
from sftlab.config import Config, PriceConfig
from sftlab.eval import contenders, decision, endpoint, reuse
from sftlab.eval import stage as evaluate
from sftlab.eval.contenders import NAMES, Contender, EvalSet, Remote
from sftlab.eval.cost import cost
from sftlab.eval.definitions import defined, left_out
from sftlab.eval.pairwise import pairwise_of
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.model.base import Base
from sftlab.records import Prediction
from sftlab.results import Evaluation
from sftlab.runtime import ledger
from sftlab.runtime.modes import MODES
from sftlab.runtime.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """An evaluation, and the folder and seconds of each model's stage."""

    evaluation: Evaluation
    stages: dict[str, str]
    times: dict[str, float]


def check(cfg: Config, store: Store, base: Base, test: EvalSet) -> None:
    """Check before training that the model can answer the test set, and write the prompts of its contenders.

    Raises:
        ConfigError: The engine does not run the model, or a prompt leaves no room for an answer.
    """
    if MODES[cfg.mode].evaluates:
        evaluate.check_engine(base, cfg.eval)
        contenders.prompts(cfg, base, test)
        defined(cfg, store, {"baseline": Contender.of(base)}, test)


def judge(
    cfg: Config,
    store: Store,
    pair: Mapping[str, Contender],
    test: EvalSet,
    folder: Path,
    also: Sequence[tuple[Config, EvalSet]] = (),
) -> Judged:
    """Generate with every contender, compare the answers, and update the ledger.

    ``pair`` has ``baseline`` and ``finetuned``; those of eval.contenders are added. Contenders with the same
    weights share the start of their engines. The models of ``pair`` also answer the questions of further sets in this
    start, each with its own settings; the answers are in the store then.
    """
    others, records = defined(cfg, store, pair, test)
    known = {name: one for name, one in pair.items() if name != "baseline" or cfg.eval.baseline}
    local = known | {name: one for name, one in others.items() if isinstance(one, Contender)}
    generated, costs = _generated(cfg, store, local, test, also)
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
    pairs = pairwise_of(cfg, test.examples)
    evaluation = decision.decide(
        runs, NAMES, cfg.eval, folder, both_mute=True, contenders=records, costs=costs, pairwise=pairs
    )
    stages |= pairs.stages if pairs is not None else {}
    models_of = {name: ledger.name_of(one.model.path, one.model.identity) for name, one in pair.items()}
    if models_of["finetuned"] != models_of["baseline"]:
        evaluation = reuse.counted(cfg, store.root, evaluation, test.examples, models_of["finetuned"])
    return Judged(evaluation, stages, times)


def _generated(
    cfg: Config,
    store: Store,
    local: Mapping[str, Contender],
    test: EvalSet,
    also: Sequence[tuple[Config, EvalSet]],
) -> tuple[dict[str, evaluate.Generated], dict[str, results.Cost]]:
    """Generate with the models on this machine; those with the same weights share the start of their engines."""
    machine = instance.find(cfg.instance)
    written = {name: contenders.prompts(cfg, one.base, one.asked or test) for name, one in local.items()}
    together: dict[object, list[str]] = {}
    for name, one in local.items():
        adapter = one.adapter if one.lora_rank is not None else None
        together.setdefault((one.model, adapter, *written[name].stop_token_ids), []).append(name)
    generated: dict[str, evaluate.Generated] = {}
    for names in together.values():
        log.info("evaluate: %s model, %d questions, %s", " and ".join(names), len(test.examples), cfg.eval.engine)
        first, sets = local[names[0]], [written[name] for name in names]
        if first.lora_rank is None and also and not NAMES.keys().isdisjoint(names):
            requests = [first.request(one) for one in sets]
            for settings, rows in also:
                asked = contenders.prompts(settings, first.base, rows)
                if asked.stop_token_ids == sets[0].stop_token_ids:
                    requests.append(replace(first.request(asked), cfg=settings.eval))
            answers = evaluate.make_each(store, first.model, requests, cfg.eval, machine, cfg.seed)[: len(names)]
        elif first.lora_rank is None:
            answers = evaluate.make_all(store, first.model, sets, cfg.eval, machine, cfg.seed)
        else:
            requests = [first.request(one) for one in sets]
            answers = evaluate.make_each(store, first.model, requests, cfg.eval, machine, cfg.seed, first.lora_rank)
        generated |= dict(zip(names, answers, strict=True))
    costs = {}
    for name, own in generated.items():
        lengths = [len(prompt.token_ids) for prompt in written[name].rows]
        costs[name] = cost(own, cfg.eval.repeats, lengths, _price(cfg, name))
    return generated, costs


def _price(cfg: Config, name: str) -> PriceConfig | None:
    definition = (cfg.eval.contenders or {}).get(name)
    return definition.price if definition is not None and definition.price is not None else cfg.eval.price
