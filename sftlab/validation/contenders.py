"""``eval.contenders`` and ``eval.chain``: definitions that are no further model, or cannot be evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from sftlab.config import Config, ContenderConfig
from sftlab.dataset.template_errors import template_problems
from sftlab.errors import Problem, shown
from sftlab.instance import machine
from sftlab.results import LABELS
from sftlab.validation.keys import key_problem


def contender_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the definitions of eval.contenders that are no further model, or whose templates cannot be used."""
    for name, one in (cfg.eval.contenders or {}).items():
        key = f"eval.contenders.{name}"
        if one is None:
            continue
        if name in LABELS:
            yield Problem(key, None, "is the name of one of the two models that are compared", "rename it")
        if one.url is not None or one.model is not None:
            yield from _endpoint(key, one)
        changed = one.shots or one.system is not None or one.user is not None or one.quantization is not None
        if one.weights == "adapter":
            changed = True
            if one.name_or_path is None and cfg.eval.name_or_path is not None:
                message = "the evaluated model is merged, and its adapter is not known"
                remedy = f"set {key}.name_or_path to the folder of the adapter"
                yield Problem(f"{key}.weights", "adapter", message, remedy)
        if one.quantization is not None:
            yield from _quantization(cfg, key, one)
        if one.name_or_path is None and one.url is None and not changed:
            message = (
                f"is the {'base' if one.weights == 'base' else 'fine-tuned'} model itself, which is evaluated anyway"
            )
            remedy = "set shots, system or user for another prompt, or name_or_path or url for another model"
            yield Problem(key, None, message, remedy)
        if (named := one.name_or_path or one.url) is not None and one.weights == "finetuned":
            of = "name_or_path" if named == one.name_or_path else "url"
            yield Problem(f"{key}.weights", one.weights, f"has no effect with {key}.{of}", "leave it out")
        if one.revision is not None and one.name_or_path is None:
            message = f"is a version of {key}.name_or_path, which is not set"
            yield Problem(f"{key}.revision", shown(one.revision), message, "leave it out, or set model.revision")
        for field in ("system", "user"):
            if (template := getattr(one, field)) is not None:
                yield from template_problems(f"{key}.{field}", template, ["system", "user"], noun="variable")


def _quantization(cfg: Config, key: str, one: ContenderConfig) -> Iterator[Problem]:
    if one.url is not None:
        yield Problem(f"{key}.quantization", one.quantization, f"has no effect with {key}.url", "leave it out")
    elif cfg.eval.engine == "vllm" and machine.find(cfg.instance, elsewhere=True).device == "cpu":
        message = "vLLM quantises weights on a GPU only"
        remedy = f"set eval.engine=transformers, or {key}.name_or_path to a model that is quantised already"
        yield Problem(f"{key}.quantization", one.quantization, message, remedy, ("eval.engine", "instance"))
    elif find_spec("bitsandbytes") is None:
        message = "needs the package bitsandbytes"
        yield Problem(f"{key}.quantization", one.quantization, message, "pip install bitsandbytes")


def chain_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of eval.chain: names of models that are not evaluated, or too few."""
    chain, value = cfg.eval.chain, shown(cfg.eval.chain)
    known = [*LABELS, *(name for name, one in (cfg.eval.contenders or {}).items() if one is not None)]
    for name in dict.fromkeys(name for name in chain if name not in known):
        remedy = f"there are {', '.join(known)}; others are defined in eval.contenders"
        yield Problem("eval.chain", value, f"no model has the name {name!r}", remedy)
    if chain and cfg.eval.task == "judge":
        message = "the judge compares answers with those of the fine-tuned model only"
        yield Problem("eval.chain", value, message, "set it to [], or set another eval.task", ("eval.task",))
    if chain and (len(chain) < 2 or len(set(chain)) < len(chain)):
        yield Problem("eval.chain", value, "is not a list of two or more different models", "write them in their order")


def _endpoint(key: str, one: ContenderConfig) -> Iterator[Problem]:
    """Check the endpoint of a contender, without contacting it."""
    for field, other in (("url", "model"), ("model", "url")):
        if getattr(one, field) is None:
            remedy = "set it to the name by which the endpoint serves the model" if field == "model" else "set it"
            yield Problem(f"{key}.{field}", "null", f"is needed with {key}.{other}", remedy)
    if one.name_or_path is not None:
        message = "has no effect with url: an endpoint has weights of its own"
        yield Problem(f"{key}.name_or_path", shown(one.name_or_path), message, "leave one of them out")
    if (unset := key_problem(f"{key}.api_key_env", one.api_key_env)) is not None:
        yield unset
    if find_spec("openai") is None:
        yield Problem(f"{key}.url", shown(one.url), "needs the package openai", "pip install 'sftlab[endpoint]'")
