"""Validate a composed configuration: return a ``Config``, or raise one ``ConfigError`` with all problems."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem
from sftlab.eval.task import settled
from sftlab.runtime.modes import MODES
from sftlab.validation.combinations import (
    evaluation_problems,
    instance_problems,
    run_problems,
    training_problems,
)
from sftlab.validation.contenders import chain_problems, contender_problems
from sftlab.validation.files import since_problems, store_problems
from sftlab.validation.guards import gate_problems
from sftlab.validation.keys import secrets, type_problems
from sftlab.validation.models import model_problems
from sftlab.validation.rows import dataset_problems, prediction_problems
from sftlab.validation.schedule import schedule_problems
from sftlab.validation.selection import selection_problems
from sftlab.validation.sftconfig import extra_problems


def validate(composed: DictConfig) -> Config:
    """Check everything that can be checked without a model: keys, files, every local row, access to the hub.

    Raises:
        ConfigError: the input is invalid; it has a record for each problem.
    """
    composed = _without_unused_names(composed)
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise ConfigError(Problem(key, None, str(error).splitlines()[0], "set it to a value")) from error
    assert isinstance(values, dict)
    problems = list(secrets(values))
    try:
        cfg = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*problems, *type_problems(error)) from error
    cfg = settled(cfg)
    if problems := [*problems, *_problems(cfg)]:
        raise ConfigError(*problems)
    return cfg


def _without_unused_names(composed: DictConfig) -> DictConfig:
    """Set ``name_or_path`` to null where it is not set and ``sources`` stands in its place."""
    guards = OmegaConf.select(composed, "eval.guards")
    named = [f"eval.guards.{name!s}" for name in guards] if isinstance(guards, DictConfig) else []
    for section in ("dataset", "eval.dataset", *named):
        key = f"{section}.name_or_path"
        node = OmegaConf.select(composed, section)
        if (
            isinstance(node, DictConfig)
            and OmegaConf.is_missing(node, "name_or_path")
            and node.get("sources") is not None
        ):
            composed = composed.copy()
            OmegaConf.update(composed, key, None)
    return composed


def _problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of a configuration whose keys and types are valid."""
    yield from run_problems(cfg)
    yield from gate_problems(cfg)
    yield from training_problems(cfg)
    yield from selection_problems(cfg)
    yield from schedule_problems(cfg.train)
    yield from extra_problems(cfg.train.extra)
    yield from instance_problems(cfg)
    yield from store_problems(cfg.store)
    yield from since_problems(cfg.runs.since)
    yield from evaluation_problems(cfg)
    yield from contender_problems(cfg)
    yield from chain_problems(cfg)
    if MODES[cfg.mode].works_on == "eval.predictions":
        yield from prediction_problems(cfg)
    if MODES[cfg.mode].reads_data:  # other modes read the files of finished runs only
        yield from model_problems(cfg)
        yield from dataset_problems(cfg)  # last, since there may be one per row
