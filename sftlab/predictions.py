"""Two files of answers to the same questions, from wherever they come → predictions read by one pattern.

A row has ``id``, ``completion`` and ``target``, as in this project's own predictions; ``prompt``, ``group``,
``finish_reason``, ``choices``, ``options`` and ``readings.forced`` are used where they are there, and the column
that ``eval.group_by`` names (in ``doc``, too; own predictions keep it as ``subgroup``). In a choice, a
target is a letter ("B", "(B)"), or a text that the pattern reads ("#### 42") or that is the answer as it stands.

Or it is a row of ``samples_*.jsonl`` of lm-evaluation-harness. Its id is ``doc_id``, which every task has, and
not ``doc["id"]``. Scored is the raw text in ``resps``, not ``filtered_resps``, which another pattern made of it;
rows for one question under several filters hold the same text, and count once. Where ``resps`` holds
log-likelihoods, the likeliest option is the answer, and options are called A, B, C … in their order.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import regex

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError
from sftlab.extract import compile_pattern, normalise, strict
from sftlab.records import Example, Generation, Prediction
from sftlab.rows import is_null
from sftlab.score import check, predictions

log = logging.getLogger(__name__)
_LETTER = re.compile(r"\W*([A-Za-z])\W*")


@dataclass(frozen=True)
class _Row:
    """What is used of a row. Two are equal that differ only in line and filter."""

    line: int = field(compare=False)
    filter: str | None = field(compare=False)  # None where the row is not from lm-evaluation-harness
    generation: Generation
    target: str
    group: str | None
    options: dict[str, str]  # letter → text, which is "" where only the letter is known
    likeliest: str | None  # a letter, "" for none of them, and None where the answer is a text
    answers: int
    doc_hash: str
    subgroup: str | None


def load_pair(a: Path, b: Path, cfg: EvalConfig) -> tuple[list[Prediction], list[Prediction]]:
    """The predictions of both files, paired by id in the order of file ``a``, read again as ``cfg`` says.

    Options and groups that only one of the files tells are used for both.

    Raises:
        ConfigError: a file that cannot be read, a row that does not fit, or files that do not pair up.
    """
    left, right = _read(a, cfg), _read(b, cfg)
    pairs = _pairs(a, left, b, right, cfg)
    letters = _letters(a, pairs) if cfg.task == "choice" else ""
    examples = []
    for row, other in pairs:
        options = other.options | row.options
        choices = "".join(sorted({*options, row.target})) if letters and options else letters
        texts = {letter: text for letter, text in options.items() if text} or None
        group, subgroup = row.group or other.group, row.subgroup or other.subgroup
        examples.append(Example(row.generation.id, "", "", "", row.target, choices, group, texts, subgroup))
    if cfg.task != "choice":
        check(examples, cfg)
    if cfg.group_by is not None and all(example.subgroup is None for example in examples):
        columns = ", ".join(_columns(next(_objects(a))[1]))
        raise ConfigError(
            f"eval.group_by={cfg.group_by!r}: no row of {a} or {b} has a value in such a column; there are {columns}"
        )
    made = _score([row for row, _ in pairs], examples, cfg), _score([row for _, row in pairs], examples, cfg)
    answers = {row.answer for rows in made for row in rows if row.answer}
    if cfg.task == "choice" and not letters and answers and all(map(_is_letter, answers)):
        odd = next(row for row, _ in pairs if not _is_letter(row.target))
        raise ConfigError(
            f"{a}:{odd.line}: target {odd.target[:60]!r} is no letter, but eval.pattern={cfg.pattern!r} reads letters; "
            "write the letter of the right option as target, or set another eval.pattern"
        )
    return made


def unjudgeable(given: Mapping[str, list[Prediction]], *, every: bool = False) -> str | None:
    """Why models cannot be judged: no answer of one of them (or of ``every`` one) could be read. None where they can.

    ``given`` has the predictions of each by the name that people know them by. Scores cannot be judged either where
    no target has a word that could be shared.
    """
    first = next(iter(given.values()))
    if first and first[0].score is not None and not any(re.search(r"[a-zA-Z0-9]", row.target) for row in first):
        return (
            "cannot be judged by this score: no target has a word of ASCII letters or digits, and ROUGE knows no other "
            f"words; see id {first[0].id!r}"
        )
    mute = {name: rows for name, rows in given.items() if rows and all(row.answer is None for row in rows)}
    if not mute or (every and len(mute) < len(given)):
        return None
    names, row = " or ".join(mute), next(iter(mute.values()))[0]
    if not row.readings and any(row.completion.strip() for rows in mute.values() for row in rows):
        return f"cannot be judged: eval.extract makes nothing of any answer of {names}; see id {row.id!r}"
    if not row.readings:
        return f"cannot be judged: every completion of {names} is empty; generate them again"
    return (
        f"cannot be judged by this pattern: no answer of {names} could be read; see id {row.id!r}, "
        f"which ends in {row.completion.strip()[-80:]!r}, and set eval.pattern to match what is written there"
    )


def _score(rows: list[_Row], examples: list[Example], cfg: EvalConfig) -> list[Prediction]:
    made = predictions([row.generation for row in rows], examples, cfg)
    for number, row in enumerate(rows):
        if row.likeliest is not None:  # there is no text to read
            answer = row.likeliest or None
            readings: dict[str, str | None] = dict.fromkeys(made[number].readings, answer)
            made[number] = replace(made[number], answer=answer, correct=answer == row.target, readings=readings)
    return made


def _pairs(a: Path, left: dict[str, _Row], b: Path, right: dict[str, _Row], cfg: EvalConfig) -> list[tuple[_Row, _Row]]:
    lacking = [
        f"{there}: lacks {len(ids)} of the {len(rows)} ids of {here}: "
        + ", ".join(f"{name!r} (line {rows[name].line})" for name in ids[:3])
        for here, rows, there, others in ((a, left, b, right), (b, right, a, left))
        if (ids := [name for name in rows if name not in others])
    ]
    if lacking:
        raise ConfigError("; ".join(lacking) + "; let both models answer the same questions, or delete the other rows")
    same = str if cfg.task == "choice" else normalise
    pairs = [(row, right[name]) for name, row in left.items()]
    for row, other in pairs:
        if same(row.target) != same(other.target):
            raise ConfigError(
                f"{a}:{row.line}: id {row.generation.id!r} has target {row.target[:60]!r}, but {other.target[:60]!r} "
                f"in {b}:{other.line}; give two files about the same questions"
            )
    if changed := [row.line for row, other in pairs if "" != row.doc_hash != other.doc_hash != ""]:
        log.warning("%s:%d: %d questions have another doc_hash in %s", a, changed[0], len(changed), b)
    return pairs


def _letters(a: Path, pairs: list[tuple[_Row, _Row]]) -> str:
    """All letters that may be an answer; "" where some targets are texts."""
    letters = {letter for row, other in pairs for letter in (row.target, *row.options, *other.options)}
    if (choice := all(_is_letter(row.target) for row, _ in pairs)) and len(letters) < 2:
        raise ConfigError(
            f'{a}: an answer set of one letter, {pairs[0][0].target!r}; add choices to rows, as in "choices": "ABCD"'
        )
    return "".join(sorted(letters)) if choice else ""


def _read(path: Path, cfg: EvalConfig) -> dict[str, _Row]:
    pattern = compile_pattern(cfg.pattern) if cfg.task == "choice" else None
    rows: dict[str, _Row] = {}
    for line, values in _objects(path):
        row = _row(values, line, f"{path}:{line}", pattern, cfg.group_by)
        seen = rows.setdefault(row.generation.id, row)
        again = row == seen and row.filter is not None and (row.filter == "" or row.filter != seen.filter)
        if seen is not row and not again:
            where = f"is in line {seen.line} already; delete one of them, and give the rows of one task only"
            raise ConfigError(f"{path}:{line}: id {row.generation.id!r} {where}")
    if not rows:
        raise ConfigError(f"{path}: is empty or has no rows; give a JSONL file with at least one prediction")
    if several := [row.line for row in rows.values() if row.answers > 1]:
        log.warning("%s:%d: %d questions have several answers; the first is scored", path, several[0], len(several))
    return rows


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    values = json.loads(text)
                    if not isinstance(values, dict):
                        raise ValueError(f"{text[:60]!r} has no fields")
                    yield number, values
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; name a JSONL file of predictions") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}:{number}: is not a JSON object: {error}; write one object a line") from error


def _row(values: dict[str, Any], line: int, place: str, pattern: regex.Pattern[str] | None, column: str | None) -> _Row:
    harness = "completion" not in values and not {"doc_id", "resps"}.isdisjoint(values)
    needed = ("doc_id", "resps", "target") if harness else ("id", "completion", "target")
    if missing := [name for name in needed if values.get(name) is None or (name == "target" and values[name] == "")]:
        raise ConfigError(
            f"{place}: has no {' and no '.join(missing)}, but {', '.join(list(values)[:12]) or 'no fields'}; give rows "
            "with id, completion and target, or samples_*.jsonl of lm-evaluation-harness (doc_id, resps, target)"
        )
    plain, likeliest, answers = _harness(values, place, pattern is not None) if harness else (values, None, 1)
    name, completion, target, readings = plain["id"], plain["completion"], _text(plain["target"]), plain.get("readings")
    if isinstance(name, float) and name.is_integer():
        name = int(name)  # tables make 7.0 of 7
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ConfigError(f"{place}: {needed[0]} {_text(name)[:60]} is neither text nor a whole number; mend the row")
    if not isinstance(completion, str):
        raise ConfigError(f"{place}: completion {_text(completion)[:60]} is no text; mend the row")
    if pattern:
        letter = _LETTER.fullmatch(target)
        target = letter[1].upper() if letter else strict(target, pattern) or target.strip()
    forced = readings["forced"] if isinstance(readings, dict) and _is_letter(readings.get("forced")) else None
    prompt, reason = _text(plain.get("prompt")), _text(plain.get("finish_reason")) or "unknown"
    made = Generation(_text(name), prompt, _text(completion), reason, 0, forced)
    kept = _text(values.get("filter")) if harness else None
    options = _options(plain.get("choices")) | _options(plain.get("options"))
    group, doc_hash = _name(plain.get("group")), _text(values.get("doc_hash"))
    subgroup = None if column is None else _name(_columns(values).get(column))
    return _Row(line, kept, made, target, group, options, likeliest, answers, doc_hash, subgroup)


def _harness(values: dict[str, Any], place: str, choice: bool) -> tuple[dict[str, Any], str | None, int]:
    """A row of lm-evaluation-harness as a plain one, its likeliest option, and how many answers it has."""
    resps, arguments, doc = values["resps"], values.get("arguments"), values.get("doc")
    if not isinstance(resps, list) or not resps or not all(isinstance(answers, list) and answers for answers in resps):
        raise ConfigError(f"{place}: resps {_text(resps)[:60]} has no list of answers a request; log the samples again")
    asked = [_items(one) or [""] for one in _items(arguments)]
    row = {"id": values["doc_id"], "target": values["target"], "prompt": asked[0][0] if asked else ""}
    first = [answers[0] for answers in resps]
    if all(isinstance(answer, str) for answer in first):
        options = {name: doc.get(name) for name in ("choices", "options")} if isinstance(doc, dict) else {}
        return row | options | {"completion": first[0]}, None, sum(map(len, resps))
    if len(asked) == len(first) and any(one[0] for one in asked):  # acc_mutual_info asks without a prompt, too
        first = [answer for answer, one in zip(first, asked, strict=True) if one[0]]
        asked = [one for one in asked if one[0]]
    try:
        likelihoods = [float(answer[0]) for answer in first]
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(f"{place}: resps {_text(resps)[:60]} is neither text nor log-likelihoods") from error
    if not choice or not 2 <= len(likelihoods) <= len(ascii_uppercase):
        raise ConfigError(f"{place}: resps has {len(first)} log-likelihoods; eval.task=choice reads 2 to 26 of them")
    letters = ascii_uppercase[: len(likelihoods)]
    target, texts = _text(values["target"]).strip(), [_text(one[1]).strip() for one in asked if len(one) > 1]
    if target.isdecimal() and len(target) < 3 and int(target) < len(letters):
        row["target"] = letters[int(target)]
    elif len(texts) == len(letters) and texts.count(target) == 1:
        row["target"] = letters[texts.index(target)]
    elif not (match := _LETTER.fullmatch(target)) or match[1].upper() not in letters:
        raise ConfigError(f"{place}: target {target[:60]!r} is none of {len(letters)} options; give index or letter")
    best = "" if any(map(math.isnan, likelihoods)) else letters[likelihoods.index(max(likelihoods))]
    return row | {"choices": letters, "completion": ""}, best, len(resps[0])


def _columns(values: dict[str, Any]) -> dict[str, Any]:
    """What a row can be told apart by: its own fields, and those of the question where lm-evaluation-harness has it."""
    doc = values.get("doc")
    return (doc if isinstance(doc, dict) else {}) | values


def _items(value: Any) -> list[Any]:
    """The arguments of a list, or of what newer versions write: {"gen_args_0": {"arg_0": …}}."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _options(value: Any) -> dict[str, str]:
    """Letters and texts of options, told as "ABCD", a list of letters or of texts, or letter → text."""
    if isinstance(value, dict):
        return {letter: _text(text) for letter, text in value.items() if _is_letter(letter)}
    if isinstance(value, str | list) and all(map(_is_letter, value)):
        return dict.fromkeys(value, "")
    return dict(zip(ascii_uppercase, map(_text, value), strict=False)) if isinstance(value, list) else {}


def _text(value: Any) -> str:
    """A value as text that can be written as UTF-8, which half of a surrogate pair cannot."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def _name(value: Any) -> str | None:
    """The name of a group; None where there is none: rows without a group share none."""
    return None if is_null(value) or not _text(value).strip() else _text(value)


def _is_letter(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1 and value in ascii_uppercase
