"""Write overrides in Hydra's grammar: quote values with ``=``, ``,``, ``:``, quotes or ``~``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from pydantic import TypeAdapter, ValidationError

from sftlab.config import Config

CLOSING = {"[": "]", "{": "}"}
SUFFIXES = (".jsonl", ".json")
KEY = re.compile(r"(\+\+?)?[\w./$-]+(@[\w.$:]*)?")


def parsed(argument: str) -> Override | None:
    """Parse an argument as Hydra does; None if Hydra cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def override(key: str, value: str, *, sweep: bool = False) -> str | None:
    """Write ``KEY=VALUE`` with the quotes that Hydra's grammar needs; None if the grammar cannot express the value.

    A value in brackets or braces is a list or a dictionary. In a ``sweep``, commas separate values.
    """
    value = value.strip()
    as_list = wants_list(key)
    if as_list and not value.startswith("["):
        value = f"[{value}]"
    if sweep and not Path(value).exists() and value[:1] not in CLOSING:
        text = ",".join(_element(item) for item in _items(value, files=as_list))
    else:
        text = _element(value, files=as_list)
    read = parsed(f"{key}={text}") if KEY.fullmatch(key) else None
    return f"{key}={text}" if read is not None and read.is_sweep_override() <= sweep else None


def shown(argument: str) -> str:
    """Write an argument as it is typed in a shell."""
    return shlex.quote(argument)


def repeated(argument: str) -> list[str]:
    """Return the keys that a dictionary has twice: Hydra would use the last one."""
    value = argument.partition("=")[2].strip()
    if value[:1] != "{" or _end(value) != len(value):
        return []
    names = [piece.partition(":")[0].strip() for piece in _pieces(value[1:-1], keyed=True)]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def with_home(argument: str) -> str:
    """Quote an override that Hydra cannot parse because of a ``~``, which shells leave as it is in KEY=~."""
    key, _, value = argument.partition("=")
    if "~" not in value or parsed(argument) is not None or parsed(f"{key}={value.replace('~', 'x')}") is None:
        return argument
    return override(key, value, sweep=True) or argument


def refusal(key: str, value: Any) -> str | None:
    """Return why a configuration key does not accept a value; None if it does, or if the key does not exist."""
    names = key.lstrip("+").split(".")
    model: Any = Config
    for name in names[:-1]:
        field = getattr(model, "model_fields", {}).get(name)
        options = [] if field is None else [field.annotation, *get_args(field.annotation)]
        model = next((part for part in options if hasattr(part, "model_fields")), None)
    field = getattr(model, "model_fields", {}).get(names[-1])
    if field is None or model is None:
        return None
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(value, strict=True)
    except ValidationError as error:
        return type_message(error)
    return None


def type_message(error: ValidationError, number: int = 0) -> str:
    """Reword pydantic's "Input should be …" or "String should have …": in our messages it follows a key."""
    return re.sub(r"^\w+ should", "should", error.errors()[number]["msg"])


def wants_list(key: str) -> bool:
    """Whether a key accepts lists only."""
    return refusal(key, "x") is not None and refusal(key, ["x"]) is None


def letters(value: Any) -> list[str]:
    """Split a value of dataset.choices that is a list or has commas into its letters; [] for any other value."""
    items = value if isinstance(value, list) else str(value).split(",")
    names = [str(item).strip() for item in items]
    return names if all(len(name) == 1 and name.isalnum() for name in names) else []


def _element(text: str, *, files: bool = False) -> str:
    """Write one value, a list or a dictionary in the grammar."""
    text = text.strip()
    if text[:1] in CLOSING and _end(text) == len(text):
        if text[0] == "[":
            return f"[{','.join(map(_element, _items(text[1:-1], files=files)))}]"
        pairs = [item.partition(":") for item in _pieces(text[1:-1], keyed=True) if item.strip()]
        if all(colon for _, colon, _ in pairs):
            return "{" + ", ".join(f"{_escaped(key.strip())}: {_element(value)}" for key, _, value in pairs) + "}"
    read = parsed(f"k={text}") if text else None
    if read is not None and not read.is_sweep_override() and not text.endswith("\\"):
        value = read.value()
        quoted = text[0] in "'\"" and text[-1] == text[0]
        if quoted or not isinstance(value, str) or value == text:
            return text
    return QuotedString(text, Quote.double).with_quotes()


def _escaped(key: str) -> str:
    """Escape a key of a dictionary, which the grammar does not allow to quote."""
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", key)


def _items(text: str, *, files: bool) -> list[str]:
    """Split at commas outside quotes and brackets; an existing file whose name has commas is one item."""
    pieces = list(_pieces(text))
    if len(pieces) > 1 and (joined := _existing(pieces)):
        return joined
    if files and pieces[-1].strip().endswith(SUFFIXES):  # each name ends with a suffix
        joined = [""]
        for piece in pieces:
            joined[-1] += piece
            if piece.strip().endswith((*SUFFIXES, "'", '"')):
                joined.append("")
            else:
                joined[-1] += ","
        return joined[:-1]
    return pieces if text.strip() else []


def _existing(pieces: Sequence[str]) -> list[str]:
    """Join the pieces to names of existing files; [] if that is not possible for all of them."""
    if not pieces:
        return []
    for count in range(len(pieces), 0, -1):
        name = ",".join(pieces[:count]).strip()
        if name and len(name) < 4096 and Path(name).exists():
            if count == len(pieces):
                return [name]
            if rest := _existing(pieces[count:]):
                return [name, *rest]
    return []


def _pieces(text: str, *, keyed: bool = False) -> Iterator[str]:
    """Split at commas; quotes and brackets protect a comma only if they enclose a whole value."""
    rest = text
    while True:
        before = re.match(r"[^,:'\"\[{]*:\s*" if keyed else r"\s*", rest)
        start = before.end() if before else 0
        end = _end(rest[start:]) if rest[start : start + 1] in {*CLOSING, "'", '"'} else None
        whole = end is not None and re.match(r"\s*(,|$)", rest[start + end :])
        comma = rest.find(",", start + end if end is not None and whole else 0)
        if comma < 0:
            yield rest
            return
        yield rest[:comma]
        rest = rest[comma + 1 :]


def _end(text: str) -> int | None:
    """Return the index after the bracket or quote that closes the first character; None if nothing closes it."""
    opening = text[0]
    if opening in "'\"":
        closed = re.match(rf"{opening}(\\.|[^\\{opening}])*{opening}", text, re.DOTALL)
        return closed.end() if closed else None
    depth, position = [], 0
    while position < len(text):
        character = text[position]
        if character in "'\"" and (closed_at := _end(text[position:])) and text[position - 1] in "[{,: ":
            position += closed_at
            continue
        if character in CLOSING:
            depth.append(CLOSING[character])
        elif depth and character == depth[-1]:
            depth.pop()
            if not depth:
                return position + 1
        position += 1
    return None
