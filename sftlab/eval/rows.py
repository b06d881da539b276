"""One row of a file of predictions, in the form of sftlab or of lm-evaluation-harness, as typed values.

A row has ``id``, ``completion`` and ``target``, as in sftlab's own predictions. ``prompt``, ``group``,
``finish_reason``, ``choices``, ``options``, ``readings.forced``, ``context`` and the column that eval.group_by names
are used if they exist; the column also in ``doc``, and sftlab's own predictions have it as ``subgroup``. In multiple
choice a target is a letter ("B", "(B)"), a text that the pattern reads ("#### 42"), or the answer itself. A list of
targets, also as JSON text, holds several right answers.

Or it is a row of ``samples_*.jsonl`` of lm-evaluation-harness. Its id is ``doc_id``, which every task has, and not
``doc["id"]``. The raw texts in ``resps`` are scored, not ``filtered_resps``, which another pattern has extracted;
several texts (``repeats`` of a task) are several answers of the model. If ``resps`` holds log-likelihoods, the most
likely option is the answer (the harness's ``acc``), options are A, B, C … in their order, and the most likely option
per character is a further reading (``acc_norm``). A
target that is a whole number is an index into the choices of ``doc``; one of the texts in ``doc["answers"]`` stands
for all of them.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

import regex

from sftlab.dataset.values import is_null
from sftlab.errors import ConfigError, Problem
from sftlab.eval.extract import can_read, likeliest, normalise_answer, strict
from sftlab.model.reasoning import answered
from sftlab.records import Generation

_LETTER = re.compile(r"\W*([A-Za-z])\W*")
FLOOR = -1e6  # stands for a log-likelihood of minus infinity, which JSON cannot write
# What engines call the end at the token limit.
_TRUNCATED = ("length", "max_tokens", "max_length", "max_new_tokens", "model_length")


@dataclass(frozen=True)
class Row:
    """The values of a row that are used. Rows that differ only in line and filter are equal."""

    line: int = field(compare=False)
    filter: str | None = field(compare=False)  # None if the row is not from lm-evaluation-harness
    generation: Generation  # the letters' log-probabilities of such rows are in ``logprobs``
    targets: list[str]
    group: str | None
    options: dict[str, str]  # letter → text; "" if only the letter is known
    likeliest: str | None  # a letter, "" for none of them, None if the answer is a text
    likeliest_norm: str | None  # the same by log-likelihood per character of the option, None if that is unknown
    others: list[Generation]  # further answers of the model to the same question
    doc_hash: str
    subgroup: str | None
    context: str | None


def parse(
    values: dict[str, Any],
    line: int,
    place: str,
    pattern: regex.Pattern[str] | None,
    column: str | None,
    *,
    json_targets: bool = False,
) -> Row:
    """Read a row.

    Args:
        values: Its JSON object.
        line: Its line number.
        place: File and line for messages.
        pattern: The answer pattern; None if the task has no option letters.
        column: The config key eval.group_by.
        json_targets: Whether the target is a JSON value, as such or as its text, and a list no list of targets.

    Raises:
        ConfigError: A value is missing or has the wrong type.
    """
    harness = "completion" not in values and not {"doc_id", "resps"}.isdisjoint(values)
    needed = ("doc_id", "resps", "target") if harness else ("id", "completion", "target")
    if missing := [name for name in needed if values.get(name) is None or (name == "target" and values[name] == "")]:
        raise ConfigError(
            Problem(
                place,
                None,
                f"has no {' and no '.join(missing)}, but {', '.join(list(values)[:12]) or 'no fields'}",
                "give rows with id, completion and target, or samples_*.jsonl of lm-evaluation-harness "
                "(doc_id, resps, target)",
            )
        )
    if json_targets and "targets" not in values:
        target = values["target"]
        values = {**values, "targets": [target if isinstance(target, str) else json.dumps(target, ensure_ascii=False)]}
    plain, best, texts = _harness(values, place, pattern is not None) if harness else (values, None, [])
    per_character = plain.get("per_character") if best is not None else None
    name, completion, readings = plain["id"], plain["completion"], plain.get("readings")
    if isinstance(name, float) and name.is_integer():
        name = int(name)  # data frames turn 7 into 7.0
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ConfigError(
            Problem(place, None, f"{needed[0]} {_text(name)[:60]} is neither text nor a whole number", "fix the row")
        )
    if not isinstance(completion, str):
        raise ConfigError(Problem(place, None, f"completion {_text(completion)[:60]} is not text", "fix the row"))
    options = _options(plain.get("choices")) | _options(plain.get("options"))
    targets = [_target(target, options, place, pattern, index=harness) for target in _targets(plain, place)]
    letter = readings.get("forced") if isinstance(readings, dict) else None
    forced = letter.upper() if isinstance(letter, str) and len(letter) == 1 and letter.isalnum() else None
    prompt, reason = _text(plain.get("prompt")), _text(plain.get("finish_reason")).lower() or "unknown"
    reason = "length" if reason in _TRUNCATED else reason
    by_choice, direct = (_letters(plain.get(name)) for name in ("forced_logprobs", "logprobs"))
    generation = Generation(_text(name), prompt, _text(completion), reason, 0, forced, by_choice, direct)
    source = _text(values.get("filter")) if harness else None
    group, doc_hash = _name(plain.get("group")), _text(values.get("doc_hash"))
    subgroup = None if column is None else _name(columns(values).get(column))
    others = [replace(generation, completion=_text(text)) for text in texts]
    return Row(
        line,
        source,
        generation,
        list(dict.fromkeys(targets)),
        group,
        options,
        best,
        per_character,
        others,
        doc_hash,
        subgroup,
        _text(values["context"]) if values.get("context") is not None else None,
    )


def _harness(values: dict[str, Any], place: str, choice: bool) -> tuple[dict[str, Any], str | None, list[str]]:
    """A row of lm-evaluation-harness as a plain row, its most likely option, and further answers."""
    resps, arguments, doc = values["resps"], values.get("arguments"), values.get("doc")
    if not isinstance(resps, list) or not resps or not all(isinstance(answers, list) and answers for answers in resps):
        raise ConfigError(
            Problem(
                place, None, f"resps {_text(resps)[:60]} lacks a list of answers per request", "log the samples again"
            )
        )
    asked = [_items(request) or [""] for request in _items(arguments)]
    row = {"id": values["doc_id"], "target": values["target"], "prompt": asked[0][0] if asked else ""}
    first = [answers[0] for answers in resps]
    every = [answer for answers in resps for answer in answers]
    if all(isinstance(answer, str) for answer in every):
        about = {name: doc.get(name) for name in ("choices", "options", "answers")} if isinstance(doc, dict) else {}
        return row | about | {"completion": every[0]}, None, every[1:]
    if len(asked) == len(first) and any(request[0] for request in asked):  # acc_mutual_info also asks without a prompt
        first = [answer for answer, request in zip(first, asked, strict=True) if request[0]]
        asked = [request for request in asked if request[0]]
    try:
        likelihoods = [float(answer[0]) for answer in first]
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(
            Problem(place, None, f"resps {_text(resps)[:60]} is neither text nor log-likelihoods")
        ) from error
    if not choice or not 2 <= len(likelihoods) <= len(ascii_uppercase):
        raise ConfigError(
            Problem(place, None, f"resps has {len(first)} log-likelihoods", "eval.task=choice reads 2 to 26 of them")
        )
    letters = ascii_uppercase[: len(likelihoods)]
    texts = [_text(request[1]).strip() for request in asked if len(request) > 1]
    value = _parsed(values["target"])
    row["target"] = [
        _gold(_text(target).strip(), letters, texts, place)
        for target in (value if isinstance(value, list) else [value])
    ]
    row |= {"choices": letters, "completion": ""}
    if any(map(math.isnan, likelihoods)):
        return row, "", []
    row["logprobs"] = {letter: max(value, FLOOR) for letter, value in zip(letters, likelihoods, strict=True)}
    if len(texts) == len(letters) and all(texts):  # acc_norm of the harness divides by the characters of the option
        lengths = {letter: len(text) for letter, text in zip(letters, texts, strict=True)}
        row["per_character"] = likeliest({letter: row["logprobs"][letter] / lengths[letter] for letter in letters})
    return row, likeliest(row["logprobs"]), []


def _letters(value: Any) -> dict[str, float] | None:
    """The log-probabilities of letters in sftlab's own predictions; None if there are none."""
    if not isinstance(value, dict) or not value:
        return None
    numbers = all(isinstance(number, int | float) and not math.isnan(number) for number in value.values())
    return {str(letter): float(number) for letter, number in value.items()} if numbers else None


def _gold(target: str, letters: str, texts: list[str], place: str) -> str:
    """The letter of the right option, from its index, its text or its letter."""
    if target.isdecimal() and len(target) < 3 and int(target) < len(letters):
        return letters[int(target)]
    if len(texts) == len(letters) and texts.count(target) == 1:
        return letters[texts.index(target)]
    if (match := _LETTER.fullmatch(target)) and match[1].upper() in letters:
        return match[1].upper()
    raise ConfigError(
        Problem(place, None, f"target {target[:60]!r} is none of {len(letters)} options", "give index or letter")
    )


def _targets(plain: dict[str, Any], place: str) -> list[str | int | float]:
    """Every right answer of a row: from ``targets``, ``target``, or ``answers`` if the target is among them."""
    own = plain.get("targets")
    value = own if isinstance(own, list) and own else plain["target"]
    if isinstance(value, str) and "correct" not in plain:  # sftlab's own predictions have a list in ``targets``
        parsed = _parsed(value)
        value = parsed if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed) else value
    answers = _several(_parsed(plain.get("answers")))
    if isinstance(value, str) and isinstance(answers, list) and value in answers:
        value = [value, *answers]
    several = _several(value)
    targets = several if isinstance(several, list) else [several]
    for target in targets:
        number = isinstance(target, int | float) and math.isfinite(target)
        if not (number or (isinstance(target, str) and target.strip())):
            raise ConfigError(
                Problem(
                    place,
                    None,
                    f"target {_text(value)[:60]} holds {_text(target)[:60] or 'nothing'!r}, which is neither "
                    "text nor a number",
                    'write the right answer, or a list of them as in ["Berne", "Bern"]',
                )
            )
    if not targets:
        raise ConfigError(Problem(place, None, "target [] has no answer", "write at least one"))
    # Data frames turn 7 into 7.0.
    whole = [int(target) for target in targets if isinstance(target, float) and target.is_integer()]
    return [*whole, *targets]


def _several(value: Any) -> Any:
    """The texts of SQuAD's {"text": […], "answer_start": […]}; any other value unchanged."""
    return value["text"] if isinstance(value, dict) and isinstance(value.get("text"), list) else value


def _parsed(value: Any) -> Any:
    """A list that JSON, Python or NumPy wrote as text; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            items = json.loads(value)
        except (ValueError, RecursionError):
            items = _printed(value.strip())
        return items if isinstance(items, list) and items else value
    return value


def _printed(text: str) -> list[str]:
    """The texts of a list as Python prints it, with or without commas; none if it holds anything else."""
    texts = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING:
                texts.append(ast.literal_eval(token.string))
            elif token.string.strip() not in ("[", "]", ",", ""):
                return []
    except (tokenize.TokenError, SyntaxError, ValueError):
        return []
    return texts if text.endswith("]") and all(isinstance(item, str) for item in texts) else []


def _target(
    value: str | int | float,
    options: dict[str, str],
    place: str,
    pattern: regex.Pattern[str] | None,
    *,
    index: bool,
) -> str:
    """A right answer as it is compared. ``index`` is whether a whole number may be the index of an option."""
    target, texts = answered(_text(value)), list(options.values())
    whole = isinstance(value, int) and not isinstance(value, bool)
    if pattern and target.strip().isdecimal() and not can_read(pattern.pattern, target.strip()):
        whole = True
    if index and whole and texts and 0 <= int(value) < len(texts):
        if target.strip() in texts and texts.index(target.strip()) != int(value):
            raise ConfigError(
                Problem(
                    place,
                    None,
                    f"target {target} may be the index of an option or its text",
                    f"write the {'letter' if pattern else 'text'} of the right option",
                )
            )
        return list(options)[int(value)] if pattern else texts[int(value)] or target
    if pattern is None:
        return target
    if letter := _LETTER.fullmatch(target):
        return letter[1].upper()
    same = [letter for letter, text in options.items() if text and normalise_answer(text) == normalise_answer(target)]
    return same[0] if len(same) == 1 else strict(target, pattern) or target.strip()


def columns(values: dict[str, Any]) -> dict[str, Any]:
    """The columns by which rows can be grouped: their own, and those of the ``doc`` of lm-evaluation-harness."""
    doc = values.get("doc")
    return (doc if isinstance(doc, dict) else {}) | values


def _items(value: Any) -> list[Any]:
    """The arguments of a list, or of the form of newer versions: {"gen_args_0": {"arg_0": …}}."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _options(value: Any) -> dict[str, str]:
    """Letters and texts of options: "ABCD", a list of letters or of texts, letter → text, or ARC's two lists."""
    if isinstance(value, dict) and isinstance(value.get("label"), list) and isinstance(value.get("text"), list):
        value = dict(zip(map(_text, value["label"]), value["text"], strict=False))
    if isinstance(value, str | list) and all(isinstance(letter, str) and len(letter) == 1 for letter in value):
        value = [letter.upper() for letter in value]
    if isinstance(value, dict):
        value = {letter.upper() if isinstance(letter, str) else letter: text for letter, text in value.items()}
        return {letter: _text(text) for letter, text in value.items() if is_letter(letter)}
    if isinstance(value, str | list) and all(map(is_letter, value)):
        return dict.fromkeys(value, "")
    return dict(zip(ascii_uppercase, map(_text, value), strict=False)) if isinstance(value, list) else {}


def _text(value: Any) -> str:
    """A value as text that can be written as UTF-8, without lone surrogates."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def _name(value: Any) -> str | None:
    """The name of a group; None if there is none, since rows without a group share none."""
    return None if is_null(value) or not _text(value).strip() else _text(value)


def is_letter(value: Any) -> bool:
    """Whether a value is a capital letter."""
    return isinstance(value, str) and len(value) == 1 and value in ascii_uppercase
