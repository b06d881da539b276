"""Guards: other test sets on which the fine-tuned model may not lose more than the margin.

A guard is evaluated like the test set, with settings of its own (``eval.guards.NAME.scoring``). It is not counted in
the ledger of reused test sets, because nobody hopes for a chance gain on it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sftlab.config import Config, Scoring
from sftlab.dataset import stage as dataset
from sftlab.errors import ConfigError, Problem
from sftlab.eval import contenders, decision, harness, judging, release, task
from sftlab.eval import stage as evaluate
from sftlab.eval.checks import check_answers
from sftlab.eval.contenders import NAMES, Contender, EvalSet
from sftlab.eval.judging import Judged
from sftlab.eval.pairwise import pairwise_of
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.model.base import Base
from sftlab.results import Evaluation, Guard
from sftlab.runtime.modes import MODES
from sftlab.runtime.store import Store

log = logging.getLogger(__name__)

FOLDER = "guards"
"""The folder of a run with a folder for each guard."""

READ = "lenient"
"""How letters are read unless a guard says so: a guard is about skills, not about one form of the answer."""

OWN = re.compile(rf"\beval\.({'|'.join(Scoring.model_fields)})\b")


def settings(cfg: Config, name: str) -> Config:
    """The configuration in which a guard is the test set, with its own way of scoring."""
    data = cfg.eval.guards[name]
    own = data.scoring or Scoring()
    changes = {
        "dataset": data,
        "guards": {},
        "chain": [],
        "task": own.task or "auto",
        "pattern": own.pattern or cfg.eval.pattern,
        "reading": own.reading or (READ if own.task in (None, "choice") else "strict"),
        "extract": own.extract,
        "tolerance": own.tolerance or cfg.eval.tolerance,
        "metric": cfg.eval.metric if own.task == "metric" else None,
        "scorer": cfg.eval.scorer if own.task == "function" else None,
        "sql": own.sql or cfg.eval.sql,
        "rouge": own.rouge or cfg.eval.rouge,
        "group_by": own.group_by,
        "max_tokens": own.max_tokens or cfg.eval.max_tokens,
        "max_rows": own.max_rows,
        "margin": own.margin or cfg.eval.margin,
        "smallest_gain": 0.0,
        "correct_for_reuse": False,
        "forced": False,
        "logprobs": False,
    }
    section = cfg.eval.model_copy(update=changes)
    select = cfg.select.model_copy(update={"metric": "eval_loss"})  # no checkpoint is selected by a guard
    return task.settled(cfg.model_copy(update={"eval": section, "select": select}))


def relocated(name: str, problems: Iterable[Problem]) -> Iterator[Problem]:
    """Rename the keys in problems of a guard's settings to the keys that set them."""

    def moved(text: str) -> str:
        return OWN.sub(rf"{key(name)}.scoring.\1", text.replace("eval.dataset", key(name)))

    for problem in problems:
        yield replace(
            problem,
            key=moved(problem.key),
            message=moved(problem.message),
            remedy=moved(problem.remedy),
            keys=(*map(moved, problem.keys), *problem.keys),
        )


def key(name: str) -> str:
    """The section of a guard."""
    return f"eval.guards.{name}"


def read(cfg: Config, store: Store, name: str) -> tuple[Config, EvalSet]:
    """Read the rows of a guard, and return them with the configuration in which it is the test set.

    Raises:
        ConfigError: The rows do not fit, or answers to them cannot be judged.
    """
    own = settings(cfg, name)
    assert own.eval.dataset is not None
    try:
        data = dataset.make(store, own.eval.dataset, mounted=key(name))
        rows = dataset.test_rows(data, own.eval.max_rows, own.eval.dataset.seed)
        if own.eval.group_by is not None:
            values = dataset.subgroups(own.eval.dataset, own.eval.group_by, mounted=key(name))
            rows = [replace(row, subgroup=values[row.id]) for row in rows]
        own = fitted(task.fitted(own, rows))
        check_answers(own, {"test": rows})
    except ConfigError as error:
        raise ConfigError(*relocated(name, error.problems)) from error
    return own, EvalSet(rows, data.stage.key)


def fitted(cfg: Config) -> Config:
    """The configuration of a guard whose task is known: only letters are read in several ways."""
    if cfg.eval.task == "auto" or scorer(cfg.eval).lettered:
        return cfg
    return cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"reading": "strict"})})


def check(cfg: Config, store: Store, base: Base, test: EvalSet) -> None:
    """Check before the training that a model can be asked the questions of the test set and of every guard.

    Raises:
        ConfigError: The engine does not run the model, or a prompt leaves no room for an answer.
    """
    judging.check(cfg, store, base, test)
    for name in cfg.eval.guards if MODES[cfg.mode].evaluates else ():
        own, rows = read(cfg, store, name)
        try:
            contenders.prompts(own, base, rows)
        except ConfigError as error:
            raise ConfigError(*relocated(name, error.problems)) from error


def judge(cfg: Config, store: Store, both: Mapping[str, Contender], test: EvalSet, folder: Path) -> Judged:
    """Compare the models on the test set and on every guard."""
    asked = {name: read(cfg, store, name) for name in cfg.eval.guards}  # before anything is generated
    judged = judging.judge(cfg, store, both, test, folder, [*asked.values()])
    found, stages, times = [], dict(judged.stages), dict(judged.times)
    generated = _generate(store, both, asked)
    for name, (own, rows) in asked.items():
        of = generated[name]
        for side, one in of.items():
            stages[f"{FOLDER}.{name}.{side}"] = str(one.stage.path)
            times[f"{FOLDER}.{name}.{side}"] = round(one.seconds, 1)
        sources = " + ".join(part.cfg.name_or_path for part in cfg.eval.guards[name].parts())
        evaluation, of_judge = _evaluation(own, of, rows, folder / FOLDER / name)
        stages |= {f"{FOLDER}.{name}.{stage}": path for stage, path in of_judge.items()}
        found.append(Guard(name=name, data=sources, evaluation=evaluation))
    for name in cfg.eval.guard_tasks:
        guard, of_task = harness.judge(cfg, store, name, both)
        found.append(guard)
        for side, stage in of_task.items():
            stages[f"{FOLDER}.{name}.{side}"] = str(stage.path)
            times[f"{FOLDER}.{name}.{side}"] = round(stage.seconds, 1)
    return Judged(release.decided(judged.evaluation.model_copy(update={"guards": found})), stages, times)


def _generate(
    store: Store, both: Mapping[str, Contender], asked: Mapping[str, tuple[Config, EvalSet]]
) -> dict[str, dict[str, evaluate.Generated]]:
    """Generate answers to all guards; those with the same token limit share a start of the engine.

    Usually the answers are in the store: the engine of the test set has generated them.
    """
    generated: dict[str, dict[str, evaluate.Generated]] = {name: {} for name in asked}
    for side, one in both.items():
        written = {name: contenders.prompts(own, one.base, rows) for name, (own, rows) in asked.items()}
        together: dict[object, list[str]] = {}
        for name, (own, _) in asked.items():
            together.setdefault((own.eval.max_tokens, *written[name].stop_token_ids), []).append(name)
        for names in together.values():
            own, _ = asked[names[0]]
            count = sum(len(written[name].rows) for name in names)
            log.info("guard %s: %s model, %d questions, %s", " and ".join(names), side, count, own.eval.engine)
            machine, sets = instance.find(own.instance), [written[name] for name in names]
            answers = evaluate.make_all(store, one.model, sets, own.eval, machine, own.seed)
            for name, answer in zip(names, answers, strict=True):
                generated[name][side] = answer
    return generated


def _evaluation(
    cfg: Config, generated: Mapping[str, evaluate.Generated], test: EvalSet, folder: Path
) -> tuple[Evaluation, dict[str, str]]:
    """Compare the answers to a guard; with the stages of its judge, if it has one."""
    score = scorer(cfg.eval)
    runs = {
        side: [score.predictions(one.rows(repeat), test.examples) for repeat in range(cfg.eval.repeats)]
        for side, one in generated.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    pairs = pairwise_of(cfg, test.examples)
    evaluation = decision.decide(runs, NAMES, cfg.eval, folder, both_mute=True, pairwise=pairs)
    return evaluation, {} if pairs is None else pairs.stages
