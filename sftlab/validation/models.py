"""The models of a run: their folders, files and chat templates, and access to the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from sftlab.config import Config, ModelConfig
from sftlab.errors import ConfigError, Problem, shown, with_keys
from sftlab.model import gguf, hub, random
from sftlab.model.base import another
from sftlab.model.variants import ADAPTER
from sftlab.runtime.modes import MODES
from sftlab.validation.files import is_local
from sftlab.validation.keys import alternatives

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
OBJECTS = ("config.json", "tokenizer.json", "tokenizer_config.json")


def model_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of the base model, of the model to evaluate and of the chat template."""
    yield from _model(cfg.model, "model.name_or_path")
    if cfg.eval.name_or_path is not None:
        evaluated = cfg.model.model_copy(update={"name_or_path": cfg.eval.name_or_path, "revision": None})
        yield from _model(evaluated, "eval.name_or_path")
    for name, one in (cfg.eval.contenders or {}).items():
        if one is None or one.name_or_path is None or not MODES[cfg.mode].evaluates:
            continue
        key = f"eval.contenders.{name}.name_or_path"
        if one.weights != "adapter":
            yield from _model(another(cfg.model, one.name_or_path, one.revision), key)
        elif not (Path(one.name_or_path) / ADAPTER).is_file():
            message = f"has no {ADAPTER} (seen from {Path.cwd()})"
            yield Problem(key, shown(one.name_or_path), message, "name the folder of an adapter on this machine")
    template, time = cfg.model.chat_template, cfg.model.template_time
    if template is not None and Path(template).is_file():
        yield from _template_problems("model.chat_template", template, Path(template))
    elif template is not None:
        remedy = "name a Jinja file, or set it to null"
        yield Problem("model.chat_template", shown(template), "no such file", remedy)
    if time is not None:
        try:
            datetime.fromisoformat(time)
        except ValueError:
            remedy = "write it as 2026-11-30 or '2026-11-30T09:00:00', or set it to null"
            yield Problem("model.template_time", shown(time), "is not an ISO time", remedy)


def judge_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of a judge on this machine."""
    judge, mode = cfg.eval.judge, MODES[cfg.mode]
    if judge.name_or_path is not None and (mode.reads_data or mode.works_on == "eval.predictions"):
        yield from _model(another(cfg.model, judge.name_or_path, judge.revision), "eval.judge.name_or_path")


def _model(settings: ModelConfig, key: str) -> Iterator[Problem]:
    name = settings.name_or_path
    kind, _, rest = name.partition(":")
    try:
        if kind == "random":
            if rest not in random.ARCHITECTURES:
                options = [f"random:{known}" for known in random.ARCHITECTURES]
                yield Problem(key, shown(name), "no such random model", f"choose {alternatives(options)}")
        elif kind == "wheel":
            gguf.wheel_file(name)
        elif not is_local(name):
            hub.check_model(name, settings.revision, key)
        elif problem := _folder_problem(settings, key):
            yield problem
        elif settings.chat_template is None:
            yield from _own_template(key, name)
    except ConfigError as error:
        yield from with_keys(error, key, "model.revision")


def _folder_problem(settings: ModelConfig, key: str) -> Problem | None:
    """Return what a model's folder lacks, or the first file that is damaged; None if it is complete."""
    name = settings.name_or_path
    folder, value = Path(name), shown(name)
    if not folder.is_dir():
        return Problem(key, value, f"no such folder (seen from {Path.cwd()})", "check the path")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            remedy = "name its base model, or merge it into that"
            return Problem(key, value, "has no config.json: it is an adapter and not a model", remedy)
        return Problem(key, value, "has no config.json", "name the folder of a saved model")
    custom = settings.trust_remote_code and any(folder.glob("*.py"))  # such a tokenizer may read other files
    if not custom and not any((folder / file).is_file() for file in TOKENIZERS):
        remedy = f"save it there with tokenizer.save_pretrained({name!r})"
        return Problem(key, value, "has no tokenizer", remedy, ("model.trust_remote_code",))
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        message = "has no weights (*.safetensors)"
        message += "; its pickled weights can run code and are not loaded" if pickled else ""
        return Problem(key, value, message, f"save them there with model.save_pretrained({name!r})")
    if damage := next(_damage(folder), None):
        return Problem(key, value, damage, "copy or download the model again")
    return None


def _damage(folder: Path) -> Iterator[str]:
    """Yield the files of a model's folder that are truncated, or are not what their names say."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.json")):
        try:
            values = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            yield f"{file.name} cannot be read as JSON ({error})"
            continue
        if file.name in OBJECTS and not isinstance(values, dict):
            yield f"{file.name} is not a JSON object"
        elif file.name.endswith(".safetensors.index.json"):
            missing = sorted({str(shard) for shard in values.get("weight_map", {}).values()} - set(os.listdir(folder)))
            if missing:
                yield f"{file.name} names {missing[0]}, which does not exist"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):  # reads the header, and compares the length of the file
                pass
        except (OSError, SafetensorError) as error:
            yield f"{file.name} is not a complete safetensors file ({error})"


def _template_problems(key: str, value: str, file: Path) -> Iterator[Problem]:
    """Check that a file is a chat template that transformers can compile."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    keys = ("model.chat_template",)
    try:
        # {% generation %} is an extension of transformers.
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", file.read_text("utf-8"))
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except (OSError, UnicodeDecodeError) as error:
        yield Problem(key, shown(value), f"{file.name} cannot be read: {error}", "write it as UTF-8", keys)
    except TemplateSyntaxError as error:
        message = f"{file.name} is not a Jinja template: {error.message} (line {error.lineno})"
        yield Problem(key, shown(value), message, "fix the template", keys)


def _own_template(key: str, name: str) -> Iterator[Problem]:
    """Yield the problem of a model whose tokenizer brings no chat template that can be used."""
    folder = Path(name)
    if (file := folder / "chat_template.jinja").is_file():
        yield from _template_problems(key, name, file)
    elif not _has_chat_template(folder):
        message = "its tokenizer has no chat template (it may be a pretrained model that was not tuned for chat)"
        replaced = key in ("model.name_or_path", "eval.name_or_path")  # model.chat_template is not for other models
        remedy = "set model.chat_template to a Jinja file" if replaced else "name a model whose tokenizer has one"
        yield Problem(key, shown(name), message, remedy, ("model.chat_template",) if replaced else ())


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text("utf-8")).get("chat_template"))
