"""Values that are valid on their own and cannot work together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from sftlab.config import Config, ContenderConfig, InstanceConfig, NoPeft, RowSettings
from sftlab.dataset.template_errors import template_problems
from sftlab.errors import ConfigError, Problem, shown, with_keys
from sftlab.eval.extract import probe
from sftlab.eval.scorers import scorer
from sftlab.instance import machine
from sftlab.results import LABELS
from sftlab.runtime.modes import MODES
from sftlab.validation.scoring import scoring_problems


def run_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of the run's own keys: its name, its mode, the hub."""
    if set(cfg.name) == {"."}:
        yield Problem("name", shown(cfg.name), "outputs would be written outside outputs/", "give a name with a letter")
    if MODES[cfg.mode].works_on == "eval.name_or_path" and cfg.eval.name_or_path is None:
        message = "mode=evaluate needs the model to evaluate"
        yield Problem("eval.name_or_path", "null", message, "set it to a folder or a hub id", ("mode",))
    if cfg.mode == "compare" and cfg.eval.correct_for_reuse:
        message = "mode=compare reads files, and does not count which models were judged on these questions"
        yield Problem("eval.correct_for_reuse", "true", message, "set it to false", ("mode",))
    if cfg.hub.push and cfg.hub.repo_id is None:
        yield Problem("hub.push", "true", "needs a repository", "set hub.repo_id to owner/name", ("hub.repo_id",))


def training_problems(cfg: Config) -> Iterator[Problem]:
    """Yield what SFTTrainer would refuse after the model is loaded, or would silently do in another way."""
    train, extra = cfg.train, cfg.train.extra
    if train.packing and train.allow_truncated_completion:
        yield Problem(
            "train.packing",
            "true",
            "does not truncate completions",
            "set train.allow_truncated_completion=false",
            ("train.allow_truncated_completion",),
        )
    if MODES[cfg.mode].trains or MODES[cfg.mode].estimates:
        try:  # for mode=plan, and for a launcher, the GPUs may be in another machine
            machine.find(cfg.instance, elsewhere=True).accumulation(train)
        except ConfigError as error:
            yield from with_keys(error, "train.global_batch_size", "train.per_device_train_batch_size", "instance")
    targets = [] if isinstance(cfg.peft, NoPeft) else cfg.peft.target_modules
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        yield Problem(
            "peft.target_modules",
            shown(targets),
            "an adapter on lm_head would not be trained: the loss uses the weight of lm_head alone",
            "leave lm_head out",
        )
    if not isinstance(cfg.peft, NoPeft) and cfg.peft.use_dora and cfg.peft.fused:
        message = "DoRA adapters have no fused form"
        yield Problem("peft.fused", "true", message, "set it to false", ("peft.use_dora",))
    if extra.get("packing_strategy") == "wrapped":
        yield Problem(
            "train.extra.packing_strategy",
            "wrapped",
            "truncates rows and lets them attend to each other",
            "leave it out (bfd), or set it to bfd_split",
        )
    if extra.get("loss_type", "nll") not in ("nll", "dft", "chunked_nll"):  # chunked_nll is an older name of nll
        yield Problem("train.extra.loss_type", shown(extra["loss_type"]), "should be nll or dft")
    checkpointing = extra.get("gradient_checkpointing_kwargs")
    if isinstance(checkpointing, dict) and checkpointing.get("selective"):
        key = "train.extra.gradient_checkpointing_kwargs.selective"
        if train.gradient_checkpointing is not True:
            needed = "train.gradient_checkpointing"
            yield Problem(key, "true", f"needs {needed}=true", f"set {needed}=true, or leave this out", (needed,))
        if checkpointing.get("use_reentrant"):
            section, message = key.rpartition(".")[0], "does not work with use_reentrant=true"
            yield Problem(key, "true", message, "set one of them to false", (section,))
    liger = extra.get("liger_kernel_config")
    if isinstance(liger, dict) and liger.get("fused_linear_cross_entropy"):
        key = "train.extra.liger_kernel_config.fused_linear_cross_entropy"
        yield Problem(key, "true", "TRL replaces it by its own output head", "leave it out")


def instance_problems(cfg: Config) -> Iterator[Problem]:
    """Yield settings that the device or the number of machines rules out."""
    instance = cfg.instance
    if instance.device == "cpu" and cfg.train.use_liger_kernel:
        message = "Liger needs a GPU, and instance.device is cpu"
        yield Problem("train.use_liger_kernel", "true", message, "set it to false", ("instance.device",))
    if instance.device == "cpu" and instance.attn_implementation == "flash_attention_2":
        yield Problem(
            "instance.attn_implementation",
            instance.attn_implementation,
            "needs a GPU, and instance.device is cpu",
            "set it to sdpa",
            ("instance.device",),
        )
    yield from _machines(instance)
    yield from _sharding(cfg)


def _machines(instance: InstanceConfig) -> Iterator[Problem]:
    if instance.nnodes > 1 and instance.rdzv_endpoint is None:
        yield Problem(
            "instance.nnodes",
            str(instance.nnodes),
            "the machines need an address at which they meet",
            "set instance.rdzv_endpoint to HOST:PORT on every machine: a name of machine 0 that the others can reach, "
            "and a free port of it",
            ("instance.rdzv_endpoint",),
        )
    if instance.node_rank >= instance.nnodes:
        yield Problem(
            "instance.node_rank",
            str(instance.node_rank),
            f"machines are counted from 0, and instance.nnodes is {instance.nnodes}",
            "set it to 0" if instance.nnodes == 1 else f"set it to a number from 0 to {instance.nnodes - 1}",
            ("instance.nnodes",),
        )


def _sharding(cfg: Config) -> Iterator[Problem]:
    size = cfg.eval.tensor_parallel_size
    gpus = cfg.instance.num_processes or len(machine.visible_gpus())
    if size == 1 or not MODES[cfg.mode].evaluates:
        return
    if cfg.instance.device == "cpu" or not gpus:
        message, remedy = "shards a model over GPUs, and this runs on the CPU", "set it to 1"
    elif cfg.eval.engine != "vllm":
        message, remedy = "only vLLM shards a model", "set it to 1, or set eval.engine=vllm"
    elif gpus % size:
        message = f"does not divide the {gpus} GPUs of instance={cfg.instance.name}"
        remedy = "set it to a divisor of that number, or change instance.num_processes"
    else:
        return
    keys = ("instance.device", "instance.num_processes", "eval.engine")
    yield Problem("eval.tensor_parallel_size", str(size), message, remedy, keys)


def evaluation_problems(cfg: Config) -> Iterator[Problem]:
    """Yield settings of the answers' extraction that do not fit the task."""
    if cfg.eval.task == "auto":  # the rows decide
        yield from _pattern(cfg)
        yield from _extract(cfg)
        return
    yield from _choice(cfg) if scorer(cfg.eval).lettered else _text(cfg)
    yield from scoring_problems(cfg)
    names, files = cfg.eval.labels, len(cfg.eval.predictions) if cfg.mode == "compare" else 2
    if names and (len(names) not in (2, files) or len(set(names)) < len(names) or not all(map(str.strip, names))):
        remedy = "write two, the base model's first, or []"
        yield Problem("eval.labels", shown(names), "is not a list of two different names", remedy)


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
        yield Problem("eval.chain", value, f"there is no model {name!r}", remedy)
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
    if one.api_key_env is not None and not os.environ.get(one.api_key_env):
        message = "there is no such variable in the environment, or it is empty"
        yield Problem(f"{key}.api_key_env", one.api_key_env, message, f"export {one.api_key_env}=…")
    if find_spec("openai") is None:
        yield Problem(f"{key}.url", shown(one.url), "needs the package openai", "pip install 'sftlab[endpoint]'")


def _text(cfg: Config) -> Iterator[Problem]:
    if cfg.eval.reading != "strict":
        message = f"has an effect only with eval.task=choice, and eval.task is {cfg.eval.task}"
        yield Problem("eval.reading", cfg.eval.reading, message, "set it to strict", ("eval.task",))
    yield from _extract(cfg)


def _extract(cfg: Config) -> Iterator[Problem]:
    if cfg.eval.extract is not None:
        for problem in template_problems("eval.extract", cfg.eval.extract, ["text"], noun="variable"):
            yield replace(problem, keys=("eval.task",))


def _pattern(cfg: Config) -> Iterator[Problem]:
    try:
        probe(cfg.eval.pattern)
    except ConfigError as error:
        for problem in error.problems:
            yield Problem("eval.pattern", None, problem.message, problem.remedy, ("eval.task",))


def _choice(cfg: Config) -> Iterator[Problem]:
    yield from _pattern(cfg)
    section, data = ("dataset", cfg.dataset) if cfg.eval.dataset is None else ("eval.dataset", cfg.eval.dataset)
    sections: dict[str, RowSettings] = {section: data}
    if data.sources is not None:
        sections = {f"{section}.sources.{name}": one for name, one in data.sources.items()}
    for key, one in sections.items():
        if one.choices is None and one.format == "template":
            yield Problem(
                "eval.task",
                "choice",
                f"{key}.choices is null",
                f"set {key}.choices to the letters that an answer may be, as in ABCD, or set eval.task=exact to "
                "compare texts",
                (section,),
            )
    if cfg.eval.extract is not None:
        yield Problem(
            "eval.extract",
            shown(cfg.eval.extract),
            "eval.task=choice extracts answers with eval.pattern",
            "set it to null, or set eval.task to exact or rouge",
            ("eval.task",),
        )
