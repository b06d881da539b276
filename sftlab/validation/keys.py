"""Names and types of configuration keys: unknown keys, wrong types, secrets."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sftlab.config import Config, ContenderConfig, DatasetConfig, Lora, NoPeft, Qlora, Scoring, SourceConfig
from sftlab.errors import Problem, environment_secrets, redacted, shown
from sftlab.validation import overrides

METHODS = {get_args(part.model_fields["method"].annotation)[0]: part for part in (NoPeft, Lora, Qlora)}
FORMS = {  # of the values that must match a pattern
    "instance.rdzv_endpoint": "HOST:PORT",
    "hub.repo_id": "owner/name",
    "url": "http://HOST/v1 or https://HOST/v1, without user and password",
    "api_key_env": "the name of an environment variable",
}

SOURCE = re.compile(r"((?:eval\.)?dataset|eval\.guards\.[^.]+)\.sources\.([^.]+)")
GUARD = re.compile(r"eval\.guards\.[^.]+")
SCORING = re.compile(r"eval\.guards\.[^.]+\.scoring")
CONTENDER = re.compile(r"eval\.contenders\.[^.]+")

API_KEY_ENV = re.compile(r"\bapi_key_env\s*[=:]\s*(.*?)\s*(?:,\s*\w+\s*:|\}|$)")  # also in a dictionary
VARIABLE = re.compile(r"['\"]?(\w*|\$\{[\w.:]+\})['\"]?")  # or an interpolation
ENDPOINT = re.compile(r"eval\.(judge|contenders\.[^.]+)\.")

# Keys whose values would be readable for everybody in job.json and .hydra/.
SECRET = re.compile(
    r"(^|[._])(hf|hub|access|auth|wandb|api)_?(token|key)$|(^|\.)token$|password|secret|credential"
    r"|(?-i:(^|\.)[A-Z0-9_]+_(TOKEN|KEY)$)",  # an environment variable
    re.I,
)


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the configuration in its order, sections included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in [field.annotation, *get_args(field.annotation)]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def closest(key: str) -> str | None:
    """Return the existing key that an unknown key was probably meant to be; None if no key is similar."""
    section, _, leaf = key.rpartition(".")
    for pattern, named in (
        (SOURCE, SourceConfig),
        (CONTENDER, ContenderConfig),
        (GUARD, DatasetConfig),
        (SCORING, Scoring),
    ):
        if pattern.fullmatch(section):
            close = difflib.get_close_matches(leaf, [*named.model_fields], n=1)
            return f"{section}.{close[0]}" if close else None
    known = list(known_keys())
    if section:  # a key of a section is not meant to be a section
        sections = {name.rpartition(".")[0] for name in known}
        known = [name for name in known if name not in sections]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    for word, names, cutoff in (
        (leaf, siblings, 0.6),
        (key, {name: name for name in known}, 0.75),
        (leaf, by_leaf, 0.75),
    ):
        if close := difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff):
            return names[close[0]]
    return None


def nearest(key: str) -> str:
    """Return the remedy for an unknown key: the closest key, or the command that lists all keys."""
    close = closest(key)
    return f"did you mean {close}?" if close else "`python -m sftlab --cfg job` lists all keys"


def alternatives(options: Sequence[str]) -> str:
    """Write two or more options as "a, b or c"."""
    return f"{', '.join(options[:-1])} or {options[-1]}"


def invalid_name(value: str) -> Problem:
    """Return the problem of a value that ``name`` cannot have, with the closest valid one."""
    valid = re.sub(r"[^\w.-]+", "_", value).strip("_") or "demo"
    return Problem("name", shown(value), "may contain only letters, digits and . _ -", f"write name={valid}")


def secret(key: str) -> Problem:
    """Return the problem of a key whose value is secret. The value is left out."""
    remedy = "leave it out, and set HF_TOKEN or WANDB_API_KEY in the environment"
    if ENDPOINT.match(key):
        remedy = f"set {key.rpartition('.')[0]}.api_key_env to the name of an environment variable with the key"
    return Problem(key, None, "secrets are not allowed in the configuration, which is written to files", remedy)


def pasted(argument: str) -> Problem | None:
    """Return the problem of an override that gives a key where the name of its variable is expected."""
    given = API_KEY_ENV.search(argument)
    if given is None or VARIABLE.fullmatch(given[1]):
        return None
    key, message = argument.lstrip("+~").partition("=")[0], f"should be {FORMS['api_key_env']}"
    return _not_a_name(key, message if key.endswith("api_key_env") else f"api_key_env {message}")


def _not_a_name(key: str, message: str) -> Problem:
    return Problem(key, None, message, "write its name, and not the key itself")


def key_problem(key: str, variable: str | None) -> Problem | None:
    """Return the problem of an environment variable that is not set. Its name is left out: it may be a secret."""
    if variable is None or os.environ.get(variable):
        return None
    message = "names an environment variable that is not set or empty"
    return Problem(key, None, message, "export it, or write the name of another one")


def secrets(values: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield a problem for each key that holds a secret, by its name or by its value."""
    variables = environment_secrets()
    for key, value in _leaves(values):
        if SECRET.search(key) or redacted(str(value), variables) != str(value):
            yield secret(key)


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def type_problems(error: ValidationError) -> Iterator[Problem]:
    """Yield the problems of keys and types that pydantic reports."""
    wrong = {".".join(map(str, details["loc"])) for details in error.errors()}
    for number, details in enumerate(error.errors()):
        location = ".".join(map(str, details["loc"]))
        inherited = SOURCE.sub(r"\1", location, count=1)  # the key of the section whose value a source has
        if inherited == location or inherited not in wrong:
            yield _type_problem(dict(details), overrides.type_message(error, number))


def _type_problem(details: Mapping[str, Any], message: str) -> Problem:
    location, kind, value = [str(part) for part in details["loc"]], details["type"], details["input"]
    tag = None
    if location[0] == "peft" and len(location) > 2:  # the tag of the union, which is not a part of the key
        tag = location.pop(1)
    key = ".".join(location).removesuffix(".[key]")
    if key.startswith("peft.target_modules"):
        return Problem("peft.target_modules", shown(value), "should be the name of a layer, or a list of names")
    if SECRET.search(key):
        return secret(key)
    fields = {name for part in METHODS.values() for name in part.model_fields}
    if tag and len(location) == 2 and kind in ("missing", "extra_forbidden") and location[1] in fields:
        unset = "the other keys of this method are not set"
        return Problem("peft.method", tag, unset, f"choose peft={tag}, which sets all of them", ("peft",))
    if location[-1] == "[key]" and location[-3] in ("sources", "guards"):
        message = f"is not a name of a {location[-3][:-1]}: it may contain only letters, digits, _ and -"
        return Problem(key, None, message, "rename it")
    if location[-1] == "[key]" and location[-3] == "contenders":
        message = "is not a name of a contender: it may contain only letters, digits, _ and -"
        return Problem(key, None, message, "rename it")
    if kind == "model_type" and CONTENDER.fullmatch(key):
        return Problem(key, shown(value), "describes no model", f"write {overrides.shown(f'+{key}.shots=5')}")
    if location[-1] == "[key]":
        return Problem(key, None, "no such key", "the splits are train, validation and test")
    if kind in ("model_type", "dict_type") and GUARD.fullmatch(key):
        return Problem(key, shown(value), "is not a dataset", f"write +dataset@{key}=NAME")
    if kind in ("model_type", "dict_type") and ".sources" in key:
        form = "{name_or_path: FILE}" if SOURCE.fullmatch(key) else "{a: {name_or_path: FILE}, b: {name_or_path: FILE}}"
        return Problem(key, shown(value), "names no files", f"write {overrides.shown(f'{key}={form}')}")
    whole, _, leaf = key.rpartition(".")
    if kind == "extra_forbidden" and SOURCE.fullmatch(whole) and leaf in ("max_overlap", "allow_overlap"):
        section = whole.partition(".sources")[0]
        return Problem(key, None, "holds for all sources together", f"set {section}.{leaf}")
    if kind == "extra_forbidden":
        return Problem(key, None, "no such key", nearest(key))
    if kind == "missing" and SOURCE.fullmatch(key.rpartition(".")[0]):
        return Problem(key, None, "is missing", "set it to a file, a folder or a hub id")
    if kind == "missing":
        return Problem(key, None, "is missing", "choose an option of its group, or set it")
    if kind == "union_tag_invalid":
        remedy = f"choose {alternatives([f'{key}={method}' for method in METHODS])}"
        return Problem(f"{key}.method", shown(details["ctx"]["tag"]), f"should be one of {', '.join(METHODS)}", remedy)
    if key == "name" and kind == "string_pattern_mismatch":
        return invalid_name(value)
    if kind == "path":
        return Problem(key, shown(value), details["ctx"]["message"], details["ctx"]["remedy"])
    if kind == "string_pattern_mismatch":
        message = f"should be {FORMS.get(key) or FORMS[location[-1]]}"
        if "@" in str(value):  # there may be a password before it
            return Problem(key, None, message, _remedy(key, kind, value))
    message = "should be true or false" if kind == "bool_type" else message
    if location[-1] == "api_key_env":  # the value may be the key itself
        return _not_a_name(key, message)
    return Problem(key, shown(value), message, _remedy(key, kind, value))


def _remedy(key: str, kind: str, value: Any) -> str:
    """Return how to write a value of the wrong type; "" if that is not known."""
    if key == "eval.predictions" and kind == "list_type" and ("," not in str(value) or os.path.exists(str(value))):
        return "give two files, the base model's first: 'eval.predictions=[BASE.jsonl,TUNED.jsonl]'"
    if kind == "string_type" and type(value) is int:
        quoted = f'{key}="{value}"'
        return f"write {overrides.shown(quoted)}"
    if key.endswith("dataset.choices") and (letters := overrides.letters(value)):
        return f"write {key}={''.join(letters)}"
    if key.endswith("dataset.split") and kind == "dict_type":
        form = overrides.override(key, str(value).replace("=", ": "))
        form = form if form and "{" in form else f"{key}={{train: 0.6, validation: 0.2, test: 0.2}}"
        return f"write {overrides.shown(form)}"
    if kind == "list_type" and isinstance(value, str):
        return f"write {overrides.shown(overrides.override(key, value) or f'{key}=[…]')}"
    return ""
