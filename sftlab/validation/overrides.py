"""Overrides as Hydra's grammar takes them: quotes for values with ``=``, ``,``, ``:``, quotes or ``~``."""

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
    """An argument as Hydra reads it; None if it cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def override(key: str, value: str, *, sweep: bool = False) -> str | None:
    """``KEY=VALUE`` with as many quotes as Hydra's grammar needs; None if it has no way to write the value.

    A value in brackets or braces is a list or a dictionary. In a ``sweep`` commas separate values.
    """
    value = value.strip()
    several = wants_list(key)
    if several and not value.startswith("["):
        value = f"[{value}]"
    if sweep and not Path(value).exists() and value[:1] not in CLOSING:
        text = ",".join(_element(item) for item in _items(value, files=several))
    else:
        text = _element(value, files=several)
    found = parsed(f"{key}={text}") if KEY.fullmatch(key) else None
    return f"{key}={text}" if found is not None and found.is_sweep_override() <= sweep else None


def shown(argument: str) -> str:
    """An argument as it is typed in a shell."""
    return shlex.quote(argument)


def with_home(argument: str) -> str:
    """Quote an override that is wrong only in its ``~``, which Hydra's grammar lacks; shells leave it in KEY=~."""
    key, _, value = argument.partition("=")
    if "~" not in value or parsed(argument) is not None or parsed(f"{key}={value.replace('~', 'x')}") is None:
        return argument
    return override(key, value, sweep=True) or argument


def refusal(key: str, value: Any) -> str | None:
    """Why a key of the configuration does not take a value; None if it does, or if there is no such key."""
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
        return re.sub(r"^\w+ should", "should", error.errors()[0]["msg"])
    return None


def wants_list(key: str) -> bool:
    """Whether a key takes lists and no single value."""
    return refusal(key, "x") is not None and refusal(key, ["x"]) is None


def letters(value: Any) -> list[str]:
    """The letters of dataset.choices where they are written as a list or with commas; [] for anything else."""
    items = value if isinstance(value, list) else str(value).split(",")
    found = [str(item).strip() for item in items]
    return found if all(len(item) == 1 and item.isalnum() for item in found) else []


def _element(text: str, *, files: bool = False) -> str:
    """One value, a list or a dictionary in the grammar."""
    text = text.strip()
    if text[:1] in CLOSING and _end(text) == len(text):
        if text[0] == "[":
            return f"[{','.join(map(_element, _items(text[1:-1], files=files)))}]"
        pairs = [item.partition(":") for item in _pieces(text[1:-1], keyed=True) if item.strip()]
        if all(colon for _, colon, _ in pairs):
            return "{" + ", ".join(f"{_escaped(key.strip())}: {_element(value)}" for key, _, value in pairs) + "}"
    found = parsed(f"k={text}") if text else None
    if found is not None and not found.is_sweep_override() and not text.endswith("\\"):
        value = found.value()
        quoted = text[0] in "'\"" and text[-1] == text[0]
        if quoted or not isinstance(value, str) or value == text:
            return text
    return QuotedString(text, Quote.double).with_quotes()


def _escaped(key: str) -> str:
    """A key of a dictionary, which cannot be quoted."""
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", key)


def _items(text: str, *, files: bool) -> list[str]:
    """What commas separate outside quotes and brackets; a file whose name has commas is one item."""
    pieces = list(_pieces(text))
    if len(pieces) > 1 and (joined := _existing(pieces)):
        return joined
    if files and pieces[-1].strip().endswith(SUFFIXES):  # where names of files end in a suffix, they end there
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
    """The pieces joined to the names of files that are there; [] if no joining gives only such names."""
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
    """What commas separate; a comma in quotes or brackets counts only where these enclose all of a value."""
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
    """Where the bracket or quote that a text begins with is closed; None if it is not."""
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
