"""``dry_run=true``: check what a run checks, with the same functions, and log what it would do.

Every function takes the config, the run's folder and a temporary folder, which is all that is written. Finished stages
are read from the store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sftlab.config import Config, ModelConfig
from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.dataset.leakage import gate
from sftlab.dataset.pinning import pinned_data
from sftlab.eval import contenders, definitions, endpoint, guards, reuse
from sftlab.eval import stage as evaluate
from sftlab.eval.checks import check_answers
from sftlab.eval.contenders import Contender
from sftlab.eval.predictions import load_others, load_pair
from sftlab.eval.scorers import scorer
from sftlab.eval.statistics import margin_to_rule_out
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model.base import Base
from sftlab.pipeline import evaluated_model, with_precision, with_task
from sftlab.report.text import plural
from sftlab.runtime import ledger
from sftlab.runtime.modes import MODES
from sftlab.runtime.store import ScratchStore, Store
from sftlab.train import memory, plan, schedule
from sftlab.train import stage as train
from sftlab.train.plan_table import print_table

log = logging.getLogger(__name__)


def training(cfg: Config, folder: Path, scratch: Path) -> None:
    """Check a training and log its stages, with memory and time if the model is on this machine.

    Raises:
        ConfigError: what the run would refuse. Of a model that would be downloaded only the name is checked.
    """
    store, temporary = _stores(cfg, scratch)
    cfg = pinned_data(cfg)
    machine = instance.find(cfg.instance)
    batch = machine.effective_batch(cfg.train)
    log.info("machine: %s, %d process(es), effective batch %d", machine.device, machine.world_size, batch)
    data = _dataset(cfg, store, temporary)
    test = contenders.read_test(cfg, temporary, data)
    cfg = with_task(cfg, test, data)
    gate(cfg, temporary, data, test.examples, test.key)
    check_answers(cfg, {**data.for_training(), "test": test.examples})
    base = _model("model", cfg.model, store, cfg.seed)
    is_trained = False
    if base is None:
        _log_stage("tokens", is_cached=False)
        _log_stage("train", is_cached=False)
        log.info("memory and time: mode=plan estimates them, and downloads the model for it")
    else:
        cfg, _ = with_precision(cfg, base, temporary, machine)
        guards.check(cfg, temporary, base, test)
        inputs = _token_inputs(cfg, data, base)
        _log_stage("tokens", is_cached=store.has("tokens", inputs))
        token_key = store.path("tokens", inputs).name
        is_trained = store.has("train", train.inputs(token_key, base, cfg.peft, cfg.train, machine, cfg.seed))
        _log_stage("train", is_cached=is_trained)
        tokens = tokenize.make(temporary, data, base, cfg)
        schedule.check_length(tokens.counts, cfg.train, machine)
        log.info("training: %s", schedule.described(tokens.counts, cfg.train, machine))
        cfg, _ = memory.with_checkpointing(cfg, base, tokens, machine, temporary)
        print_table([(cfg.name, plan.cell(cfg, base, tokens, machine))])
    if MODES[cfg.mode].evaluates:
        log.info("select, merge, evaluate, report: %s", "from the cached training" if is_trained else "will run")
        _log_power(cfg, [row.group for row in test.examples])
        _log_reuse(store, test)
        _log_guards(cfg, temporary)


def evaluation(cfg: Config, folder: Path, scratch: Path) -> None:
    """Check an evaluation and log which answers are in the store.

    Raises:
        ConfigError: what the run would refuse. Of a model that would be downloaded only the name is checked.
    """
    store, temporary = _stores(cfg, scratch)
    cfg = pinned_data(cfg)
    machine = instance.find(cfg.instance)
    data = _dataset(cfg, store, temporary) if cfg.eval.dataset is None else None
    test = contenders.read_test(cfg, temporary, data)
    cfg = with_task(cfg, test, data)
    check_answers(cfg, {"test": test.examples})
    log.info("test set: %d rows; engine: %s on %s", len(test.examples), cfg.eval.engine, machine.device)
    pair: dict[str, Contender] = {}
    for name, section in {"baseline": cfg.model, "finetuned": evaluated_model(cfg)}.items():
        base = _model(name, section, store, cfg.seed)
        if base is None:
            continue
        cfg, _ = with_precision(cfg, base, temporary, machine)  # the first model decides, as in the run
        if name == "baseline" and not cfg.eval.baseline:
            continue
        if name == "finetuned":
            evaluate.check_engine(base, cfg.eval)
        pair[name] = Contender.of(base)
        _log_answers(cfg, store, pair[name], test, machine)
    if "baseline" in pair:
        for name, one in definitions.defined(_without_downloads(cfg, store), temporary, pair, test)[0].items():
            log.info("%-9s a contender on the same questions", name)
            if isinstance(one, Contender):
                _log_answers(cfg, store, one, one.asked or test, machine)
            else:
                key = endpoint.inputs(one.endpoint, one.asked.key, cfg.eval, cfg.seed)
                _log_stage("answers", is_cached=store.has("generations", key))
    _log_power(cfg, [row.group for row in test.examples])
    _log_reuse(store, test)
    _log_guards(cfg, temporary)


def planning(cfg: Config, folder: Path, scratch: Path) -> None:
    """Check a plan and log whether its rows are tokenized. Nothing is estimated or measured."""
    store, temporary = _stores(cfg, scratch)
    cfg = pinned_data(cfg)
    machine = instance.find(cfg.instance, elsewhere=not cfg.plan.probe)
    log.info("machine: %s, %d process(es)", machine.device, machine.num_processes)
    data = _dataset(cfg, store, temporary)
    base = _model("model", cfg.model, store, cfg.seed)
    if base is not None:
        _log_stage("tokens", is_cached=store.has("tokens", _token_inputs(cfg, data, base)))
        tokenize.make(temporary, data, base, cfg)
    log.info("plan      memory and time of a step will be %s", "measured" if cfg.plan.probe else "estimated")


def preview(cfg: Config, folder: Path, scratch: Path) -> None:
    """Check the rows of a preview."""
    store, temporary = _stores(cfg, scratch)
    cfg = pinned_data(cfg)
    _dataset(cfg, store, temporary)
    _model("model", cfg.model, store, cfg.seed)
    log.info("preview   will be written: preview.html")


def comparison(cfg: Config, folder: Path, scratch: Path) -> None:
    """Check files of predictions and log how small a difference they can show."""
    first, second, *more = map(Path, cfg.eval.predictions)
    (rows, *_), _ = load_pair(first, second, cfg.eval)
    load_others(cfg.eval, rows)
    log.info("compare: %d rows in each of %s", len(rows), ", ".join(map(str, (first, second, *more))))
    _log_power(cfg, [row.group for row in rows])


def _stores(cfg: Config, scratch: Path) -> tuple[Store, Store]:
    """The store, and one that reads from it and writes to the temporary folder."""
    store = Store(cfg.store)
    return store, ScratchStore(scratch, store)


def _dataset(cfg: Config, store: Store, temporary: Store) -> dataset.Dataset:
    _log_stage("dataset", is_cached=store.has("dataset", dataset.inputs(cfg.dataset)))
    data = dataset.make(temporary, cfg.dataset)
    if data.stage.cached:  # otherwise `make` has logged this
        log.info("dataset: %s", data.counts())
    data.announce()
    return data


def _model(name: str, model: ModelConfig, store: Store, seed: int) -> Base | None:
    """The model if it is on this machine."""
    base = models.cached(model, store, seed)
    place = "on this machine" if base is not None else "will be downloaded or generated"
    log.info("%-9s %s: %s", name, model.name_or_path, place)
    return base


def _token_inputs(cfg: Config, data: dataset.Dataset, base: Base) -> Mapping[str, object]:
    return tokenize.inputs(data.stage.key, base, cfg)


def _log_stage(stage: str, *, is_cached: bool) -> None:
    log.info("%-8s %s", stage, "cached" if is_cached else "will run")


def _without_downloads(cfg: Config, store: Store) -> Config:
    """Leave out the contenders whose models are not on this machine."""
    known = dict(cfg.eval.contenders or {})
    for name, one in known.items():
        if one is not None and one.name_or_path is not None:
            changes = {"name_or_path": one.name_or_path, "revision": one.revision}
            if _model(name, cfg.model.model_copy(update=changes), store, cfg.seed) is None:
                known[name] = None
    return cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"contenders": known})})


def _log_answers(
    cfg: Config, store: Store, one: Contender, test: contenders.EvalSet, machine: instance.Machine
) -> None:
    prompts = contenders.prompts(cfg, one.base, test)
    model = replace(one.model, identity=one.request(prompts).identity)
    _log_stage("answers", is_cached=evaluate.cached(store, model, prompts, cfg.eval, machine, cfg.seed))


def _log_power(cfg: Config, groups: Sequence[str | None]) -> None:
    """Log the minimum detectable effect of a test set."""
    for level, message in scorer(cfg.eval).power(groups):
        log.log(level, "%s", message)


def _log_guards(cfg: Config, temporary: Store) -> None:
    """Check the guards, and log their questions and the smallest acceptable loss that they can rule out."""
    for name, task in cfg.eval.guard_tasks.items():
        log.info("guard %s: %s", name, task)
    for name in cfg.eval.guards:
        own, test = guards.read(cfg, temporary, name)
        groups = len({row.group or number for number, row in enumerate(test.examples)})
        log.info("guard %s: %d questions, eval.task=%s", name, len(test.examples), own.eval.task)
        if (most := margin_to_rule_out(groups, own.eval.alpha)) > own.eval.margin:
            log.warning(
                "guard %s: %d questions are too few for a margin of %.1f points: they can rule out a loss of %.1f "
                "points or more (80 %% power, if nothing is lost and a tenth of the answers change)",
                name,
                groups,
                100 * own.eval.margin,
                100 * most,
            )


def _log_reuse(store: Store, test: contenders.EvalSet) -> None:
    """Log how many models were judged on the test set; the run itself would count one more, unless it is among them."""
    count = max(ledger.judged(store.root, reuse.rows_key(test.examples)), default=0)
    log.info("test set: %s judged on it so far", plural(count, "model"))
