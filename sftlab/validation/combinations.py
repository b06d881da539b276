"""Values that are valid on their own and cannot work together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sftlab.config import Config, InstanceConfig, NoPeft, RowSettings
from sftlab.dataset.template_errors import template_problems
from sftlab.errors import ConfigError, Problem, shown, with_keys
from sftlab.eval.extract import probe
from sftlab.eval.scorers import scorer
from sftlab.instance import machine
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
