"""The composed configuration → ``Config``, or one ``ConfigError`` that names every problem at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from sftlab.config import Config, DatasetConfig, TrainConfig
from sftlab.errors import ConfigError
from sftlab.extract import compile_pattern

# Fields of SFTConfig that the pipeline itself sets: given in train.extra they would undo it.
MANAGED = {
    "output_dir": "hydra.run.dir",
    "seed": "seed",
    "data_seed": "seed",
    "eval_strategy": None,
    "save_strategy": None,
    "report_to": "tracking",
    "run_name": "name",
    "completion_only_loss": None,
    "dataset_kwargs": None,
    "load_best_model_at_end": None,
    "use_cpu": "instance.device",
    "do_train": None,
    "do_eval": None,
    "push_to_hub": None,
    "resume_from_checkpoint": None,
    "max_steps": "train.num_train_epochs",
    "fp16": "instance.bf16",
    "model_init_kwargs": "model",
    "chat_template_path": "model.chat_template",
    "disable_tqdm": None,
}


def validate(composed: DictConfig) -> Config:
    """Check everything that can be checked without loading data or a model.

    Raises:
        ConfigError: one message with a line for each problem: key, value and remedy.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    try:
        cfg = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_listed(_explain(dict(problem)) for problem in error.errors())) from error
    if problems := list(_impossible(cfg)):
        raise ConfigError(_listed(problems))
    return cfg


def nearest(key: str) -> str:
    """« Did you mean …? » for a key that does not exist, or an empty string."""
    known = list(known_keys(Config))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # a right name in the wrong group
        leaf = key.rsplit(".", 1)[-1]
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        close = [by_leaf[match] for match in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.75)]
    return f"did you mean {close[0]}?" if close else "`python -m sftlab --cfg job` lists all keys"


def known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration, in its order."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in [field.annotation, *get_args(field.annotation)]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def _listed(problems: Iterator[str] | list[str]) -> str:
    """One problem as it is, several as a list; each only once (a union reports per member)."""
    lines = list(dict.fromkeys(problems))
    return lines[0] if len(lines) == 1 else "\n".join(f"  - {line}" for line in lines)


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's errors as key, value and remedy."""
    tags = {"none", "lora", "qlora"}  # the union's tag stands in the location and is no key
    location = [str(part) for part in problem["loc"]]
    if len(location) > 2 and location[0] == "peft" and location[1] in tags:
        del location[1]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key; {nearest(key)}"
    if problem["type"] == "missing":
        return f"{key}: is missing; choose an option of its group, or set it"
    message = re.sub(r"^Input should be", "should be", problem["msg"])
    return f"{key}={problem['input']!r}: {message}"


def _impossible(cfg: Config) -> Iterator[str]:
    """Combinations and files that cannot work although each value has the right type."""
    for key, dataset in (("dataset", cfg.dataset), ("eval.dataset", cfg.eval.dataset)):
        if dataset is not None:
            yield from _dataset(key, dataset, trained=key == "dataset")
    yield from _model("model.name_or_path", cfg.model.name_or_path)
    if cfg.model.chat_template is not None and not Path(cfg.model.chat_template).is_file():
        yield f"model.chat_template={cfg.model.chat_template!r}: no such file; give a Jinja template, or null"
    yield from _train(cfg.train)
    if cfg.instance.device == "cpu" and cfg.train.use_liger_kernel:
        yield "train.use_liger_kernel=true: Liger needs a GPU, and instance.device is cpu; set it to false"
    if cfg.instance.device == "cpu" and cfg.instance.attn_implementation == "flash_attention_2":
        yield "instance.attn_implementation=flash_attention_2: needs a GPU, and instance.device is cpu; set sdpa"
    if cfg.mode == "evaluate" and cfg.eval.name_or_path is None:
        yield "mode=evaluate: which model? Set eval.name_or_path to a folder or hub id"
    if cfg.eval.name_or_path is not None:
        yield from _model("eval.name_or_path", cfg.eval.name_or_path)
    if cfg.eval.task == "choice":
        try:
            compile_pattern(cfg.eval.pattern)
        except ConfigError as error:
            yield str(error)
        if (cfg.eval.dataset or cfg.dataset).choices is None:
            yield "eval.task=choice: dataset.choices is null; give the letters that an answer may be, or set eval.task"


def _dataset(key: str, dataset: DatasetConfig, *, trained: bool) -> Iterator[str]:
    split = dataset.split
    if trained and (not split.get("train") or not split.get("validation")):
        yield f"{key}.split={split}: train and validation need rows; selection compares validation losses"
    sizes = [size for size in split.values() if size]
    if any(size < 1 for size in sizes) and sum(sizes) > 1 + 1e-9:
        yield f"{key}.split={split}: shares add up to {sum(sizes):g}; give shares of at most 1, or whole numbers of rows"
    if any(size > 1 and size != int(size) for size in sizes):
        yield f"{key}.split={split}: a number of rows is whole; give shares below 1, or whole numbers"
    name = dataset.name_or_path
    if name.startswith("generate:"):
        if name != "generate:vignettes":
            yield f"{key}.name_or_path={name!r}: nothing generates this; only generate:vignettes exists"
    elif _is_local(name) and not Path(name).exists():
        yield f"{key}.name_or_path={name!r}: no such file or folder (seen from {Path.cwd()}); check the path"


def _model(key: str, name: str) -> Iterator[str]:
    kind, _, rest = name.partition(":")
    if kind == "random" and rest not in ("llama", "gemma3", "qwen3"):
        yield f"{key}={name!r}: no such random model; use random:llama, random:gemma3 or random:qwen3"
    if kind in ("wheel", "random") or not _is_local(name):
        return
    folder = Path(name)
    if not folder.is_dir():
        yield f"{key}={name!r}: no such folder (seen from {Path.cwd()}); check the path"
    elif not (folder / "config.json").is_file():
        yield f"{key}={name!r}: has no config.json; give the folder of a saved model"
    elif not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield f"{key}={name!r}: has no tokenizer; save it there with tokenizer.save_pretrained({name!r})"


def _is_local(name: str) -> bool:
    """Whether a name is meant as a path: it exists, or it cannot be a hub id (owner/name)."""
    return Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or bool(Path(name).suffix in
        (".json", ".jsonl", ".csv", ".parquet"))


def _train(train: TrainConfig) -> Iterator[str]:
    if train.packing and train.allow_truncated_completion:
        yield "train.packing=true: packing cuts nothing here; set train.allow_truncated_completion=false"
    if train.global_batch_size is not None and train.global_batch_size % train.per_device_train_batch_size:
        yield (
            f"train.global_batch_size={train.global_batch_size}: is no multiple of "
            f"train.per_device_train_batch_size={train.per_device_train_batch_size}; change one of them"
        )
    if not train.extra:
        return
    for name in train.extra:
        if name in TrainConfig.model_fields:
            yield f"train.extra.{name}: is a key of its own; set train.{name}"
        elif name in MANAGED:
            own = MANAGED[name]
            yield f"train.extra.{name}: is set by sftlab; " + (f"use {own}" if own else "leave it out")
    yield from _extra({name: value for name, value in train.extra.items() if name not in MANAGED})


def _extra(extra: dict[str, Any]) -> Iterator[str]:
    """Fields of SFTConfig by name, and their values by making one (it checks them itself)."""
    from dataclasses import fields

    from trl import SFTConfig

    names = [field.name for field in fields(SFTConfig)]
    unknown = [name for name in extra if name not in names]
    for name in unknown:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "see the fields of trl.SFTConfig"
        yield f"train.extra.{name}: SFTConfig has no such field; {hint}"
    if not unknown:
        try:
            SFTConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **extra})
        except (TypeError, ValueError) as error:
            yield f"train.extra={extra}: SFTConfig refuses it: {error}"
