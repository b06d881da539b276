"""Two files of answers to the same questions, from wherever they come → predictions read by one pattern.

A row has ``id``, ``completion`` and ``target``, as in this project's own predictions; ``prompt``, ``group``,
``finish_reason``, ``choices``, ``options`` and ``readings.forced`` are used where they are there, and the column
that ``eval.group_by`` names (in ``doc``, too; own predictions keep it as ``subgroup``). In a choice, a
target is a letter ("B", "(B)"), or a text that the pattern reads ("#### 42") or that is the answer as it stands. A
list of targets (as JSON text, too) holds several correct answers.

Or it is a row of ``samples_*.jsonl`` of lm-evaluation-harness. Its id is ``doc_id``, which every task has, and
not ``doc["id"]``. Scored is the raw text in ``resps``, not ``filtered_resps``, which another pattern made of it;
rows for one question under several filters hold the same text, and count once. Where ``resps`` holds
log-likelihoods, the likeliest option is the answer, and options are called A, B, C … in their order. A target that
is a whole number is an index into the choices of ``doc``, and one of the texts in ``doc["answers"]`` stands for all.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import math
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import regex

from sftlab.config import EvalConfig
from sftlab.dataset.values import is_null
from sftlab.errors import ConfigError
from sftlab.eval.extract import can_read, compile_pattern, normalise_answer, strict
from sftlab.eval.score import folded, predictions, unmatched
from sftlab.model.reasoning import answered, opened_by_prompt, unclosed
from sftlab.records import Example, Generation, Prediction

log = logging.getLogger(__name__)
_LETTER = re.compile(r"\W*([A-Za-z])\W*")
SHOWN = 20  # broken rows that a message names
# What engines call the end at a limit of tokens.
_TRUNCATED = ("length", "max_tokens", "max_length", "max_new_tokens", "model_length")


@dataclass(frozen=True)
class _Row:
    """What is used of a row. Two are equal that differ only in line and filter."""

    line: int = field(compare=False)
    filter: str | None = field(compare=False)  # None where the row is not from lm-evaluation-harness
    generation: Generation
    targets: list[str]
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
    problems: list[str] = []
    left, right = _read(a, cfg, problems), _read(b, cfg, problems)
    if problems:
        raise ConfigError(*_first(problems))
    pairs = _pairs(a, left, b, right, cfg)
    letters = _letters(a, pairs) if cfg.task == "choice" else ""
    examples = []
    for row, other in pairs:
        options = other.options | row.options
        choices = "".join(sorted({*options, *row.targets})) if letters and options else letters
        texts = {letter: text for letter, text in options.items() if text} or None
        group, subgroup = row.group or other.group, row.subgroup or other.subgroup
        several = row.targets if len(row.targets) > 1 else None
        examples.append(
            Example(row.generation.id, "", "", "", row.targets[0], choices, group, texts, subgroup, several)
        )
    lines = {row.generation.id: row.line for row, other in pairs if row.likeliest is None or other.likeliest is None}
    read = [example for example in examples if example.id in lines]
    made = _score([row for row, _ in pairs], examples, cfg), _score([row for _, row in pairs], examples, cfg)
    answers = {row.answer for rows in made for row in rows if row.answer}
    lettered = cfg.task == "choice" and bool(answers) and all(map(_is_letter, answers))
    targets = [(row.line, target) for row, _ in pairs for target in row.targets]
    if lettered and all(target.isdecimal() for _, target in targets):
        line, target = targets[0]
        raise ConfigError(
            f"{a}:{line}: target {target[:60]!r} is a number, as all targets are, but all answers that "
            f"eval.pattern={cfg.pattern!r} reads are letters; write the letter of the right option as target in every "
            "row of both files"
        )
    if problems := list(unmatched(read, cfg, lambda example: f"{a}:{lines[example.id]}: id {example.id!r}")):
        raise ConfigError(*problems)
    if cfg.group_by is not None and all(example.subgroup is None for example in examples):
        columns = ", ".join(_columns(next(_objects(a, []))[1]))
        raise ConfigError(
            f"eval.group_by={cfg.group_by!r}: no row of {a} or {b} has a value in such a column; there are {columns}"
        )
    if lettered and (words := [(line, target) for line, target in targets if len(target) > 1]):
        line, target = words[0]
        raise ConfigError(
            f"{a}:{line}: target {target[:60]!r} is not a letter, but all answers that eval.pattern={cfg.pattern!r} "
            "reads are letters; write the letter of the right option as target, or set another eval.pattern"
        )
    return made


def unjudgeable(given: Mapping[str, list[Prediction]], *, every: bool = False) -> str | None:
    """Why models cannot be judged: no answer of one of them (or of ``every`` one) could be read. None where they can.

    ``given`` has the predictions of each by the name that people know them by.
    """
    mute = {name: rows for name, rows in given.items() if rows and all(row.answer is None for row in rows)}
    if not mute or (every and len(mute) < len(given)):
        return None
    names, row = " or ".join(mute), next(iter(mute.values()))[0]
    silent = [row for rows in mute.values() for row in rows if row.completion.strip()]
    if silent and all(map(_unfinished, silent)):
        return (
            f"cannot be judged: every answer of {names} ends within its reasoning, see id {silent[0].id!r}; generate "
            "them again with more tokens (eval.max_tokens)"
        )
    if not row.readings and silent:
        return f"cannot be judged: eval.extract makes nothing of any answer of {names}; see id {row.id!r}"
    if not row.readings:
        return f"cannot be judged: every completion of {names} is empty; generate them again"
    return (
        f"cannot be judged by this pattern: no answer of {names} could be read; see id {row.id!r}, "
        f"which ends in {row.completion.strip()[-80:]!r}, and set eval.pattern to match what is written there"
    )


def _unfinished(row: Prediction) -> bool:
    """Whether a completion ends within its reasoning, or right behind it."""
    truncated = row.finish_reason == "length"
    if unclosed(row.completion, row.prompt, truncated=truncated):
        return True
    return not answered(row.completion, row.prompt, truncated=truncated).strip()


def _first(problems: list[str]) -> list[str]:
    """The first of many problems, and how many more there are."""
    more = [f"… and {len(problems) - SHOWN:,} more broken rows"] if len(problems) > SHOWN else []
    return [*problems[:SHOWN], *more]


def _score(rows: list[_Row], examples: list[Example], cfg: EvalConfig) -> list[Prediction]:
    made = predictions([row.generation for row in rows], examples, cfg)
    for number, row in enumerate(rows):
        if row.likeliest is not None:  # there is no text to read
            answer = row.likeliest or None
            readings: dict[str, str | None] = dict.fromkeys(made[number].readings, answer)
            made[number] = replace(made[number], answer=answer, correct=answer in row.targets, readings=readings)
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
    same = folded if cfg.task == "choice" else normalise_answer
    pairs = [(row, right[name]) for name, row in left.items()]
    problems = []
    for row, other in pairs:
        if set(map(same, row.targets)) != set(map(same, other.targets)):
            ours, theirs = (" or ".join(targets)[:60] for targets in (row.targets, other.targets))
            problems.append(
                f"{a}:{row.line}: id {row.generation.id!r} has target {ours!r}, but {theirs!r} "
                f"in {b}:{other.line}; give two files about the same questions"
            )
    if problems:
        raise ConfigError(*_first(problems))
    if changed := [row.line for row, other in pairs if "" != row.doc_hash != other.doc_hash != ""]:
        log.warning("%s:%d: %d questions have another doc_hash in %s", a, changed[0], len(changed), b)
    return pairs


def _letters(a: Path, pairs: list[tuple[_Row, _Row]]) -> str:
    """All letters that may be an answer; "" where some targets are texts."""
    letters = {letter for row, other in pairs for letter in (*row.targets, *row.options, *other.options)}
    if (choice := all(_is_letter(target) for row, _ in pairs for target in row.targets)) and len(letters) < 2:
        raise ConfigError(
            f"{a}: an answer set of one letter, {pairs[0][0].targets[0]!r}; add choices to rows, as in "
            '"choices": "ABCD"'
        )
    return "".join(sorted(letters)) if choice else ""


def _read(path: Path, cfg: EvalConfig, problems: list[str]) -> dict[str, _Row]:
    """The rows of a file by their ids. What is wrong with rows is added to ``problems``, a line for each."""
    pattern = compile_pattern(cfg.pattern) if cfg.task == "choice" else None
    rows: dict[str, _Row] = {}
    before = len(problems)
    for line, values in _objects(path, problems):
        try:
            row = _row(values, line, f"{path}:{line}", pattern, cfg.group_by)
        except ConfigError as error:
            problems.append(str(error))
            continue
        seen = rows.setdefault(row.generation.id, row)
        again = row == seen and row.filter is not None and (row.filter == "" or row.filter != seen.filter)
        if seen is not row and not again:
            where = f"is in line {seen.line} already; delete one of them, and give the rows of one task only"
            problems.append(f"{path}:{line}: id {row.generation.id!r} {where}")
    if not rows and len(problems) == before:
        raise ConfigError(f"{path}: is empty or has no rows; give a JSONL file with at least one prediction")
    if several := [row.line for row in rows.values() if row.answers > 1]:
        log.warning("%s:%d: %d questions have several answers; the first is scored", path, several[0], len(several))
    return _opened(path, rows)


def _opened(path: Path, rows: dict[str, _Row]) -> dict[str, _Row]:
    """The rows, with a block of reasoning opened by the prompts of truncated ones where other rows only close one.

    Where it is unknown which rows were truncated, a block that most rows close was opened for all.
    """
    texts = {name: row.generation for name, row in rows.items() if row.likeliest is None}
    marks = {name: opened_by_prompt(generation.completion) for name, generation in texts.items()}
    counts = Counter(mark for mark in marks.values() if mark)
    if not counts:
        return rows
    mark, usual = counts.most_common(1)[0][0], 2 * counts.total() > len(texts)
    cut = [
        name
        for name, generation in texts.items()
        if marks[name] is None
        and opened_by_prompt(generation.prompt) is None
        and (generation.finish_reason == "length" or (usual and generation.finish_reason == "unknown"))
    ]
    if cut:
        log.warning(
            "%s:%d: %d completions hold no reasoning mark and count as unfinished reasoning, as those of %d other rows "
            "end reasoning that their prompts began (%s)",
            *(path, rows[cut[0]].line, len(cut), counts.total(), mark),
        )
    opened = {name: replace(texts[name], prompt=f"{texts[name].prompt}{mark}") for name in cut}
    return {name: replace(row, generation=opened.get(name, row.generation)) for name, row in rows.items()}


def _objects(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their lines. Lines that hold none are added to ``problems``."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if not (text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip()):
                        continue
                    values = json.loads(text)
                    if not isinstance(values, dict):
                        raise ValueError(f"{text[:60]!r} has no fields")
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path}:{number}: is not a JSON object: {error}; write one object a line")
                    continue
                yield number, values
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; name a JSONL file of predictions") from error


def _row(values: dict[str, Any], line: int, place: str, pattern: regex.Pattern[str] | None, column: str | None) -> _Row:
    harness = "completion" not in values and not {"doc_id", "resps"}.isdisjoint(values)
    needed = ("doc_id", "resps", "target") if harness else ("id", "completion", "target")
    if missing := [name for name in needed if values.get(name) is None or (name == "target" and values[name] == "")]:
        raise ConfigError(
            f"{place}: has no {' and no '.join(missing)}, but {', '.join(list(values)[:12]) or 'no fields'}; give rows "
            "with id, completion and target, or samples_*.jsonl of lm-evaluation-harness (doc_id, resps, target)"
        )
    plain, likeliest, answers = _harness(values, place, pattern is not None) if harness else (values, None, 1)
    name, completion, readings = plain["id"], plain["completion"], plain.get("readings")
    if isinstance(name, float) and name.is_integer():
        name = int(name)  # tables make 7.0 of 7
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ConfigError(f"{place}: {needed[0]} {_text(name)[:60]} is neither text nor a whole number; mend the row")
    if not isinstance(completion, str):
        raise ConfigError(f"{place}: completion {_text(completion)[:60]} is no text; mend the row")
    options = _options(plain.get("choices")) | _options(plain.get("options"))
    targets = [_target(target, options, place, pattern, index=harness) for target in _targets(plain, place)]
    letter = readings.get("forced") if isinstance(readings, dict) else None
    forced = letter.upper() if isinstance(letter, str) and len(letter) == 1 and letter.isalnum() else None
    prompt, reason = _text(plain.get("prompt")), _text(plain.get("finish_reason")).lower() or "unknown"
    made = Generation(_text(name), prompt, _text(completion), "length" if reason in _TRUNCATED else reason, 0, forced)
    kept = _text(values.get("filter")) if harness else None
    group, doc_hash = _name(plain.get("group")), _text(values.get("doc_hash"))
    subgroup = None if column is None else _name(_columns(values).get(column))
    return _Row(line, kept, made, list(dict.fromkeys(targets)), group, options, likeliest, answers, doc_hash, subgroup)


def _harness(values: dict[str, Any], place: str, choice: bool) -> tuple[dict[str, Any], str | None, int]:
    """A row of lm-evaluation-harness as a plain one, its likeliest option, and how many answers it has."""
    resps, arguments, doc = values["resps"], values.get("arguments"), values.get("doc")
    if not isinstance(resps, list) or not resps or not all(isinstance(answers, list) and answers for answers in resps):
        raise ConfigError(f"{place}: resps {_text(resps)[:60]} has no list of answers a request; log the samples again")
    asked = [_items(one) or [""] for one in _items(arguments)]
    row = {"id": values["doc_id"], "target": values["target"], "prompt": asked[0][0] if asked else ""}
    first = [answers[0] for answers in resps]
    if all(isinstance(answer, str) for answer in first):
        about = {name: doc.get(name) for name in ("choices", "options", "answers")} if isinstance(doc, dict) else {}
        return row | about | {"completion": first[0]}, None, sum(map(len, resps))
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
    texts = [_text(one[1]).strip() for one in asked if len(one) > 1]
    value = _parsed(values["target"])
    row["target"] = [
        _gold(_text(one).strip(), letters, texts, place) for one in (value if isinstance(value, list) else [value])
    ]
    best = "" if any(map(math.isnan, likelihoods)) else letters[likelihoods.index(max(likelihoods))]
    return row | {"choices": letters, "completion": ""}, best, len(resps[0])


def _gold(target: str, letters: str, texts: list[str], place: str) -> str:
    """The letter of the right option, which is given by its index, its text or itself."""
    if target.isdecimal() and len(target) < 3 and int(target) < len(letters):
        return letters[int(target)]
    if len(texts) == len(letters) and texts.count(target) == 1:
        return letters[texts.index(target)]
    if (match := _LETTER.fullmatch(target)) and match[1].upper() in letters:
        return match[1].upper()
    raise ConfigError(f"{place}: target {target[:60]!r} is none of {len(letters)} options; give index or letter")


def _targets(plain: dict[str, Any], place: str) -> list[str | int | float]:
    """Every correct answer of a row: of ``targets``, of ``target``, or of the ``answers`` of which that is one."""
    own = plain.get("targets")
    value = own if isinstance(own, list) and own else plain["target"]
    if isinstance(value, str) and "correct" not in plain:  # own predictions have a list in ``targets``
        parsed = _parsed(value)
        value = parsed if isinstance(parsed, list) and all(isinstance(one, str) for one in parsed) else value
    answers = _several(_parsed(plain.get("answers")))
    if isinstance(value, str) and isinstance(answers, list) and value in answers:
        value = [value, *answers]
    several = _several(value)
    targets = several if isinstance(several, list) else [several]
    for target in targets:
        number = isinstance(target, int | float) and math.isfinite(target)
        if not (number or (isinstance(target, str) and target.strip())):
            raise ConfigError(
                f"{place}: target {_text(value)[:60]} holds {_text(target)[:60] or 'nothing'!r}, which is neither text "
                'nor a number; write the right answer, or a list of them as in ["Berne", "Bern"]'
            )
    if not targets:
        raise ConfigError(f"{place}: target [] holds no answer; write at least one")
    # Tables make 7.0 of 7.
    whole = [int(target) for target in targets if isinstance(target, float) and target.is_integer()]
    return [*whole, *targets]


def _several(value: Any) -> Any:
    """The texts of SQuAD's {"text": […], "answer_start": […]}, and any other value as it is."""
    return value["text"] if isinstance(value, dict) and isinstance(value.get("text"), list) else value


def _parsed(value: Any) -> Any:
    """A list that is written as text by JSON, Python or NumPy, and any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = _printed(value.strip())
        return found if isinstance(found, list) and found else value
    return value


def _printed(text: str) -> list[str]:
    """The texts of a list as Python prints it, with or without commas; none where it holds anything else."""
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
    """A correct answer as it is compared. ``index`` is whether a whole number may stand for one of the options."""
    target, texts = answered(_text(value)), list(options.values())
    whole = isinstance(value, int) and not isinstance(value, bool)
    if pattern and target.strip().isdecimal() and not can_read(pattern.pattern, target.strip()):
        whole = True
    if index and whole and texts and 0 <= int(value) < len(texts):
        if target.strip() in texts and texts.index(target.strip()) != int(value):
            raise ConfigError(
                f"{place}: target {target} may be the index of an option or its text; write the "
                f"{'letter' if pattern else 'text'} of the right option"
            )
        return list(options)[int(value)] if pattern else texts[int(value)] or target
    if pattern is None:
        return target
    if letter := _LETTER.fullmatch(target):
        return letter[1].upper()
    same = [letter for letter, text in options.items() if text and normalise_answer(text) == normalise_answer(target)]
    return same[0] if len(same) == 1 else strict(target, pattern) or target.strip()


def _columns(values: dict[str, Any]) -> dict[str, Any]:
    """What a row can be told apart by: its own fields, and those of the question where lm-evaluation-harness has it."""
    doc = values.get("doc")
    return (doc if isinstance(doc, dict) else {}) | values


def _items(value: Any) -> list[Any]:
    """The arguments of a list, or of what newer versions write: {"gen_args_0": {"arg_0": …}}."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _options(value: Any) -> dict[str, str]:
    """Letters and texts of options: "ABCD", a list of letters or of texts, letter → text, or ARC's two lists."""
    if isinstance(value, dict) and isinstance(value.get("label"), list) and isinstance(value.get("text"), list):
        value = dict(zip(map(_text, value["label"]), value["text"], strict=False))
    if isinstance(value, str | list) and all(isinstance(letter, str) and len(letter) == 1 for letter in value):
        value = [letter.upper() for letter in value]
    if isinstance(value, dict):
        value = {letter.upper() if isinstance(letter, str) else letter: text for letter, text in value.items()}
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
