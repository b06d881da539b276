"""Options of a multiple-choice row: find their columns, read them, and find the right one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftlab.dataset.row_formats.cells import opened, refused, written
from sftlab.dataset.row_formats.record import AnswerKind
from sftlab.dataset.row_formats.sample import simple
from sftlab.dataset.rows import Row
from sftlab.dataset.values import is_null
from sftlab.dataset.wording import column_path, listing, short

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABELS = ("label", "labels", "key", "keys", "letter", "id", "option_id")
TEXTS = ("text", "texts", "value", "values", "option", "content", "answer", "choices")

_SEPARATE = re.compile(r"(op|opt|option|choice|ending|answer|ans|candidate|sol|solution|)([a-j]|10|[0-9])")
_WRONG = re.compile(r"(distractor|incorrectanswer|wronganswer|incorrect|wrong)([0-9]+)")
_LABELLED = re.compile(r"\s*[(\[]?([A-Za-z]|[0-9]{1,2})\s?[)\].:]\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """An option: its index among all options of the row, its label in the data, its text, and its letter."""

    index: int
    label: str | None
    text: str
    letter: str = ""


def separate_columns(columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups of columns that hold one option each, such as ``opa`` to ``opd`` or ``A`` to ``D``."""
    return _groups(columns, _SEPARATE, ("ab", "01", "12"))


def wrong_columns(columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups of columns that hold one wrong option each, such as ``distractor1`` to ``distractor3``."""
    return _groups(columns, _WRONG, ("1", "0"))


def _groups(columns: Sequence[str], pattern: re.Pattern[str], starts: Sequence[str]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, bool], dict[str, str]] = {}
    for column in columns:
        if match := pattern.fullmatch(simple(column)):
            if not match[1] and match[2].isdecimal():
                continue
            groups.setdefault((match[1], match[2].isdecimal()), {})[match[2]] = column
    found = []
    for (_, numbered), group in groups.items():
        if any(set(start) <= group.keys() for start in starts):
            ordered = sorted(group, key=int) if numbered else sorted(group)
            found.append(tuple(group[suffix] for suffix in ordered))
    return found


def are_options(value: object) -> bool:
    """Return whether an opened value holds at least two options."""
    try:
        return len(_listed(value, "")) > 1
    except (TypeError, ValueError):
        return False


def options_of(row: Row, column: str | None, columns: Sequence[str], words: Sequence[str] = ()) -> list[Option]:
    """Return the options of a row, from one column, from a column each, or the same ``words`` for all rows.

    Raises:
        ConfigError: they are missing or not text, or there are less than two.
    """
    if words:
        pairs: list[tuple[str | None, object]] = [(None, word) for word in words]
        path = listing(words)
    elif column is not None:
        path, value = column_path(column), opened(row.get(column))
        try:
            pairs = _listed(value, path)
        except (TypeError, ValueError) as error:
            raise refused(f"{path} does not list the options: {short(repr(value))}", "fix the row") from error
    else:
        path = listing(columns)
        pairs = [(_suffix(name), row.get(name)) for name in columns]
    options = []
    for index, (label, value) in enumerate(pairs):
        if is_null(value) or (isinstance(value, str) and not value.strip()):
            continue
        text = written(value)
        if text is None:
            raise refused(f"{path} has an option that is not text: {short(repr(value))}", "write it as text")
        options.append(Option(index, label, text.strip()))
    if len(options) < 2:
        raise refused(
            f"{path} has {len(options)} option{'' if len(options) == 1 else 's'}", "an answer needs two or more"
        )
    return lettered(_unlabelled(options), path)


def lettered(options: Sequence[Option], path: str) -> list[Option]:
    """Give each option its letter: its label if all labels are letters, otherwise by its place."""
    labels = [(option.label or "").upper() for option in options]
    own = all(len(label) == 1 and label in LETTERS for label in labels) and len(set(labels)) == len(labels)
    if len(options) > len(LETTERS):
        raise refused(f"{path} has {len(options)} options; there are {len(LETTERS)} letters", "leave out some")
    letters = labels if own else LETTERS[: len(options)]
    return [
        Option(option.index, option.label, option.text, letter) for option, letter in zip(options, letters, strict=True)
    ]


def mixed(right: str, wrong: Sequence[str], question: str, path: str) -> list[Option]:
    """Return the right and the wrong options in an order that depends on their texts only."""
    texts = sorted(
        {right, *wrong},
        key=lambda text: hashlib.sha256(f"{question}\0{text}".encode("utf-8", "surrogatepass")).digest(),
    )
    return lettered([Option(index, None, text) for index, text in enumerate(texts)], path)


def find(value: object, options: Sequence[Option], kind: AnswerKind) -> Option | None:
    """Return the option that an answer names; None if it names none, or several."""
    value = opened(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = ("yes" if value else "no") if isinstance(value, bool) else (written(value) or "").strip()
    if kind in ("index0", "index1"):
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]+(\.0+)?", text):
            return None
        index = int(float(text)) - int(kind == "index1")
        return next((option for option in options if option.index == index), None)
    if kind == "label":
        return _by_label(text, options)
    same = [option for option in options if option.text == text]
    same = same or [option for option in options if option.text.casefold() == text.casefold()]
    return same[0] if len(same) == 1 and text else None


def is_missing(value: object) -> bool:
    """Return whether a test row has no answer: null, an empty text, an empty list or -1."""
    value = opened(value)
    return value is None or value == [] or str(value).strip() in ("", "-1", "-1.0")


def _by_label(text: str, options: Sequence[Option]) -> Option | None:
    match = _LABELLED.fullmatch(text)
    label, rest = (match[1], match[2].strip()) if match else (text.strip("()[]. "), "")
    for option in options:
        name = option.label if option.label is not None else option.letter
        if name.upper() == label.upper() and (not rest or rest.casefold() == option.text.casefold()):
            return option
    return None


def _listed(value: object, path: str) -> list[tuple[str | None, object]]:
    """Return label and text of each option in a column.

    Raises:
        ValueError, TypeError: the value does not hold options.
    """
    if isinstance(value, dict):
        texts = next((value[name] for name in TEXTS if isinstance(value.get(name), list)), None)
        labels = next((value[name] for name in LABELS if isinstance(value.get(name), list)), None)
        if texts is not None:
            names: Sequence[object] = labels if labels is not None else [None] * len(texts)
            return [(None if name is None else str(name), text) for name, text in zip(names, texts, strict=True)]
        if all(_is_label(key) for key in value):
            return [(_suffix(key) or str(key), text) for key, text in value.items()]
    if isinstance(value, str) and (parts := _in_text(value)):
        return [*parts]
    if isinstance(value, list) and value:
        if all(isinstance(item, dict) for item in value):
            return [_item(item) for item in value]
        if not any(isinstance(item, list | dict) for item in value):
            return [(None, item) for item in value]
    raise ValueError(path)


def _in_text(text: str) -> list[tuple[str, str]]:
    """Return the options of a text such as ``A. oak B. iron``: successive letters, each after a space or at a start."""
    parts: list[tuple[str, str]] = []
    start = end = 0
    for letter in LETTERS:
        mark = re.compile(rf"(?:^|(?<=\s))[(\[]?{letter}\s?[)\].:](?:\s+|(?=\S))", re.IGNORECASE)
        match = mark.search(text, end)
        if match is None:
            break
        if parts:
            parts[-1] = (parts[-1][0], text[start : match.start()].strip(" \n\t,;"))
        parts.append((letter, ""))
        start = end = match.end()
    if parts:
        parts[-1] = (parts[-1][0], text[start:].strip(" \n\t,;"))
    return parts if len(parts) > 1 and all(option for _, option in parts) else []


def _item(item: Mapping[str, object]) -> tuple[str | None, object]:
    label = next((item[name] for name in LABELS if not is_null(item.get(name))), None)
    text = next(item[name] for name in TEXTS if name in item) if any(name in item for name in TEXTS) else None
    if text is None:
        raise ValueError("no text")
    return None if label is None else str(label), text


def _is_label(key: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z]|[0-9]{1,2}", key)) or _suffix(key) is not None


def _suffix(name: str) -> str | None:
    """Return the letter by which a column or key names its option; None for a number, which may count from 0 or 1."""
    match = _SEPARATE.fullmatch(simple(name))
    return match[2].upper() if match and match[2].isalpha() else None


def _unlabelled(options: list[Option]) -> list[Option]:
    """Remove labels from texts such as ``A) Aspirin`` if every option has its own."""
    matches = [_LABELLED.fullmatch(option.text) for option in options]
    labels = [match[1].upper() for match in matches if match and match[2].strip()]
    if len(labels) < len(options) or labels != list(LETTERS[: len(options)]):
        return options
    return [
        Option(option.index, label, match[2].strip())
        for option, label, match in zip(options, labels, matches, strict=True)
        if match
    ]
