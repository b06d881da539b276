"""The settings of single tasks: code of the user, a judge, the dialect of SQL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from sftlab.config import Config
from sftlab.dataset.template_errors import template_problems
from sftlab.errors import ConfigError, Problem, shown, with_keys
from sftlab.eval import own_code
from sftlab.eval.extract import probe
from sftlab.eval.pairwise import preferences
from sftlab.validation.keys import key_problem
from sftlab.validation.models import judge_problems


def scoring_problems(cfg: Config) -> Iterator[Problem]:
    """Yield settings of a task that it lacks, that do not fit, or that have no effect."""
    yield from _sql(cfg)
    if cfg.eval.task == "function":
        yield from own_code.problems(cfg.eval.scorer)
    if cfg.eval.task == "metric" and cfg.eval.metric is None:
        remedy = "set it to the file of a metric of the evaluate library, or to its name on the hub"
        yield Problem("eval.metric", "null", "eval.task=metric needs it", remedy, ("eval.task",))
    if cfg.eval.task == "judge":
        yield from _judge(cfg)
    for key, task in (("metric", "metric"), ("scorer", "function")):
        of_guards = {data.scoring.task for data in cfg.eval.guards.values() if data.scoring is not None}
        if (value := getattr(cfg.eval, key)) is not None and task not in {cfg.eval.task, *of_guards}:
            message = f"has an effect only with eval.task={task}, and eval.task is {cfg.eval.task}"
            yield Problem(f"eval.{key}", shown(value), message, f"set eval.task={task}", ("eval.task",))


def _judge(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of a judge: which model it is, its prompt, and the file by which it is calibrated."""
    judge, keys = cfg.eval.judge, ("eval.task",)
    if (judge.name_or_path is None) == (judge.url is None):
        message = "eval.task=judge needs a judge" if judge.url is None else "there are two judges"
        remedy = "set either eval.judge.name_or_path, or eval.judge.url and eval.judge.model"
        yield Problem("eval.judge", None, message, remedy, keys)
    elif judge.url is not None and judge.model is None:
        yield Problem("eval.judge.model", "null", "the endpoint needs it", "set it to the model's name", keys)
    if judge.url is not None and find_spec("openai") is None:
        yield Problem(
            "eval.judge.url", shown(judge.url), "needs the package openai", "pip install 'sftlab[endpoint]'", keys
        )
    for problem in judge_problems(cfg):
        yield replace(problem, keys=(*problem.keys, *keys))
    if (unset := key_problem("eval.judge.api_key_env", judge.api_key_env)) is not None:
        yield replace(unset, keys=keys)
    for name in ("system", "user"):
        variables = ["question", "reference", "first", "second"]
        for problem in template_problems(f"eval.judge.{name}", getattr(judge, name), variables, noun="variable"):
            yield replace(problem, keys=keys)
    for answer in ("first", "second"):
        if answer not in judge.user:
            message = f"does not show the {answer} answer"
            yield Problem("eval.judge.user", None, message, f"write {{{{ {answer} }}}} in it", keys)
    try:
        probe(judge.pattern)
    except ConfigError as error:
        for problem in error.problems:
            yield Problem("eval.judge.pattern", None, problem.message, problem.remedy, keys)
    if judge.preferences is not None:
        try:
            preferences(judge.preferences)
        except ConfigError as error:
            yield from with_keys(error, "eval.task")
    if not cfg.eval.baseline:
        yield Problem("eval.baseline", "false", "eval.task=judge compares with the base model", "set it to true", keys)


def _sql(cfg: Config) -> Iterator[Problem]:
    """Yield the problem of a dialect that needs a package which is not installed."""
    if cfg.eval.task == "sql" and cfg.eval.sql.dialect != "sqlite" and find_spec("sqlglot") is None:
        message, remedy = "requires the package sqlglot", "pip install sqlglot, or set it to sqlite"
        yield Problem("eval.sql.dialect", cfg.eval.sql.dialect, message, remedy, ("eval.task",))
