"""Load two files of predictions about the same questions (mode=compare), and extract their answers by one pattern.

``rows.py`` has the forms of a row. Rows of lm-evaluation-harness for one question under several filters hold the same
text, and count once.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError, Problem, shown
from sftlab.eval.extract import compile_pattern, normalise_answer
from sftlab.eval.rows import Row, columns, is_letter, parse
from sftlab.eval.scorers import Scorer, scorer
from sftlab.eval.scorers.choice import folded
from sftlab.model.reasoning import opened_by_prompt
from sftlab.records import Example, Prediction, single_turn
from sftlab.results import LABELS, Contender

log = logging.getLogger(__name__)


_STAMP = re.compile(r"_\d{4}-\d\d-\d\dT[\d.:-]+$")  # in the names of lm-evaluation-harness


def labels(a: Path, b: Path, cfg: EvalConfig) -> dict[str, str]:
    """Name the compared models: by eval.labels, or by the names of the files, or by the folders that differ."""
    if cfg.labels:
        return dict(zip(("baseline", "finetuned"), cfg.labels, strict=False))
    names = [_STAMP.sub("", path.stem) for path in (a, b)]
    if names[0] == names[1]:
        folders = zip(*(reversed(path.absolute().parts[:-1]) for path in (a, b)), strict=False)
        differing = next((pair for pair in folders if pair[0] != pair[1]), None)
        names = [a.stem, b.stem] if differing is None else [f"{folder}/{names[0]}" for folder in differing]
    if names[0] == names[1]:
        names = [f"{names[0]} (first)", f"{names[1]} (second)"]
    return {"baseline": names[0], "finetuned": names[1]}


def load_others(
    cfg: EvalConfig, order: Sequence[Prediction]
) -> tuple[dict[str, list[list[Prediction]]], list[Contender]]:
    """Load the third and further files of eval.predictions, each paired with the second, in the order of other rows.

    Returns:
        The predictions and the records of these contenders, by names of which files can be made.

    Raises:
        ConfigError: see ``load_pair``.
    """
    first, second, *files = map(Path, cfg.predictions)
    runs: dict[str, list[list[Prediction]]] = {}
    records = []
    for number, path in enumerate(files):
        label = cfg.labels[number + 2] if len(cfg.labels) > 2 else _STAMP.sub("", path.stem)
        name = re.sub(r"[^\w-]+", "_", label)
        name = name if name not in (*runs, *LABELS) else f"{name}-{number + 3}"
        repeats = [{row.id: row for row in rows} for rows in load_pair(path, second, cfg, first)[0]]
        runs[name] = [[by_id[row.id] for row in order] for by_id in repeats]
        records.append(Contender(name=name, about=label, prompting=False))
    return runs, records


def load_pair(
    a: Path, b: Path, cfg: EvalConfig, also: Path | None = None
) -> tuple[list[list[Prediction]], list[list[Prediction]]]:
    """Load the predictions of both files, paired by id in the order of file ``a``, and extract their answers anew.

    Options, groups and contexts that only one of the files has, or the file ``also``, are used for both.

    Returns:
        For each file a list of predictions per answer that it has to every question.

    Raises:
        ConfigError: A file cannot be read, a row does not fit, or the files do not pair up.
    """
    score, problems = scorer(cfg), list[Problem]()
    left, right = _read(a, cfg, problems), _read(b, cfg, problems)
    if problems:
        raise ConfigError(*problems)
    if also is not None:
        right = _filled(right, _read(also, cfg, problems))
    pairs = _pairs(a, left, b, right, cfg)
    letters = _letters(a, pairs) if score.lettered else ""
    examples, nothing = [], single_turn("", "", "")
    for row, other in pairs:
        options = other.options | row.options
        choices = "".join(sorted({*options, *row.targets})) if letters and options else letters
        texts = {letter: text for letter, text in options.items() if text} or None
        group, subgroup = row.group or other.group, row.subgroup or other.subgroup
        several = row.targets if len(row.targets) > 1 else None
        example = Example(row.generation.id, nothing, row.targets[0], choices, group, texts, subgroup, several)
        examples.append(replace(example, context=row.context or other.context))
    lines = {row.generation.id: row.line for row, other in pairs if row.likeliest is None or other.likeliest is None}
    with_text = [example for example in examples if example.id in lines]
    predictions = [
        _predictions(path, [pair[side] for pair in pairs], examples, score) for side, path in enumerate((a, b))
    ]
    answers = {row.answer for runs in predictions for rows in runs for row in rows if row.answer}
    lettered = score.lettered and bool(answers) and all(map(is_letter, answers))
    targets = [(row.line, target) for row, _ in pairs for target in row.targets]
    if lettered and all(target.isdecimal() for _, target in targets):
        line, target = targets[0]
        raise ConfigError(
            Problem(
                f"{a}:{line}",
                None,
                f"target {target[:60]!r} is a number, as all targets are, but all answers that "
                f"eval.pattern={cfg.pattern!r} reads are letters",
                "write the letter of the right option as target in every row of both files",
            )
        )
    if problems := list(score.unmatched(with_text, lambda example: f"{a}:{lines[example.id]}: id {example.id!r}")):
        raise ConfigError(*problems)
    if (
        score.needs_context
        and not score.context_is_optional
        and (lost := [row.line for row, other in pairs if not (row.context or other.context)])
    ):
        message, remedy = f"{len(lost)} rows have no context", f"eval.task={cfg.task} needs it: add it to the rows"
        raise ConfigError(Problem(f"{a}:{lost[0]}", None, message, remedy, ("eval.task",)))
    if cfg.group_by is not None and all(example.subgroup is None for example in examples):
        known = ", ".join(columns(next(_objects(a, []))[1]))
        raise ConfigError(
            Problem(
                "eval.group_by",
                shown(cfg.group_by),
                f"no row of {a} or {b} has a value in such a column",
                f"there are {known}",
            )
        )
    if lettered and (words := [(line, target) for line, target in targets if len(target) > 1]):
        line, target = words[0]
        raise ConfigError(
            Problem(
                f"{a}:{line}",
                None,
                f"target {target[:60]!r} is not a letter, but all answers that "
                f"eval.pattern={cfg.pattern!r} reads are letters",
                "write the letter of the right option as target, or set another eval.pattern",
            )
        )
    return predictions[0], predictions[1]


def _filled(rows: dict[str, Row], others: dict[str, Row]) -> dict[str, Row]:
    """Rows with the options, group, subgroup and context that the same questions have in another file."""
    return {
        name: replace(
            row,
            options=other.options | row.options,
            group=row.group or other.group,
            subgroup=row.subgroup or other.subgroup,
            context=row.context or other.context,
        )
        for name, row in rows.items()
        if (other := others.get(name, row))
    }


def _predictions(path: Path, rows: list[Row], examples: list[Example], score: Scorer) -> list[list[Prediction]]:
    """The predictions of a file, once per answer that every question has."""
    fewest = min(rows, key=lambda row: len(row.others))
    answers = 1 + len(fewest.others)
    if more := [row for row in rows if len(row.others) >= answers]:
        log.warning(
            "%s:%d: %d answers, but line %d has %d: only as many of each question are scored",
            *(path, more[0].line, 1 + len(more[0].others), fewest.line, answers),
        )
    return [_scored(rows, number, examples, score) for number in range(answers)]


def _scored(rows: list[Row], number: int, examples: list[Example], score: Scorer) -> list[Prediction]:
    predictions = score.predictions([[row.generation, *row.others][number] for row in rows], examples)
    for place, row in enumerate(rows):
        if row.likeliest is not None:  # there is no text to read
            answer = row.likeliest or None
            readings: dict[str, str | None] = dict.fromkeys(predictions[place].readings, answer)
            if row.likeliest_norm is not None:
                readings["logprob_norm"] = row.likeliest_norm
            correct = answer in row.targets
            predictions[place] = replace(predictions[place], answer=answer, correct=correct, readings=readings)
    return predictions


def _pairs(a: Path, left: dict[str, Row], b: Path, right: dict[str, Row], cfg: EvalConfig) -> list[tuple[Row, Row]]:
    lacking = [
        f"{there}: lacks {len(ids)} of the {len(rows)} ids of {here}: "
        + ", ".join(f"{name!r} (line {rows[name].line})" for name in ids[:3])
        for here, rows, there, others in ((a, left, b, right), (b, right, a, left))
        if (ids := [name for name in rows if name not in others])
    ]
    if lacking:
        raise ConfigError(
            Problem("", None, "; ".join(lacking), "let both models answer the same questions, or delete the other rows")
        )
    same = folded if scorer(cfg).lettered else normalise_answer
    pairs = [(row, right[name]) for name, row in left.items()]
    problems = []
    for row, other in pairs:
        if set(map(same, row.targets)) != set(map(same, other.targets)):
            ours, theirs = (" or ".join(targets)[:60] for targets in (row.targets, other.targets))
            problems.append(
                Problem(
                    f"{a}:{row.line}",
                    None,
                    f"id {row.generation.id!r} has target {ours!r}, but {theirs!r} in {b}:{other.line}",
                    "give two files about the same questions",
                )
            )
    if problems:
        raise ConfigError(*problems)
    if changed := [row.line for row, other in pairs if "" != row.doc_hash != other.doc_hash != ""]:
        log.warning("%s:%d: %d questions have another doc_hash in %s", a, changed[0], len(changed), b)
    return pairs


def _letters(a: Path, pairs: list[tuple[Row, Row]]) -> str:
    """All letters that may be an answer; "" if some targets are texts."""
    letters = {letter for row, other in pairs for letter in (*row.targets, *row.options, *other.options)}
    if (choice := all(is_letter(target) for row, _ in pairs for target in row.targets)) and len(letters) < 2:
        raise ConfigError(
            Problem(
                str(a),
                None,
                f"an answer set of one letter, {pairs[0][0].targets[0]!r}",
                'add choices to rows, as in "choices": "ABCD"',
            )
        )
    return "".join(sorted(letters)) if choice else ""


def _read(path: Path, cfg: EvalConfig, problems: list[Problem]) -> dict[str, Row]:
    """The rows of a file by id. Problems with rows are appended to ``problems``."""
    score = scorer(cfg)
    pattern = compile_pattern(cfg.pattern) if score.lettered else None
    rows: dict[str, Row] = {}
    before = len(problems)
    for line, values in _objects(path, problems):
        try:
            row = parse(values, line, f"{path}:{line}", pattern, cfg.group_by, json_targets=score.json_targets)
        except ConfigError as error:
            problems += error.problems
            continue
        seen = rows.setdefault(row.generation.id, row)
        again = row == seen and row.filter is not None and (row.filter == "" or row.filter != seen.filter)
        if seen is not row and not again:
            message = f"id {row.generation.id!r} is in line {seen.line} already"
            remedy = "delete one of them, and use the rows of one task only"
            problems.append(Problem(f"{path}:{line}", None, message, remedy))
    if not rows and len(problems) == before:
        raise ConfigError(
            Problem(str(path), None, "is empty or has no rows", "give a JSONL file with at least one prediction")
        )
    return _opened(path, rows)


def _opened(path: Path, rows: dict[str, Row]) -> dict[str, Row]:
    """Return the rows with an opened reasoning block where the prompt must have opened it.

    If other rows only close a block, the prompts of truncated rows have opened it. If it is unknown which rows were
    truncated, a block that most rows close was opened by every prompt.
    """
    texts = {
        (name, number): generation
        for name, row in rows.items()
        if row.likeliest is None
        for number, generation in enumerate([row.generation, *row.others])
    }
    marks = {name: opened_by_prompt(generation.completion) for name, generation in texts.items()}
    counts = Counter(mark for mark in marks.values() if mark)
    if not counts:
        return rows
    mark, usual = counts.most_common(1)[0][0], 2 * counts.total() > len(texts)
    cut = [
        place
        for place, generation in texts.items()
        if marks[place] is None
        and opened_by_prompt(generation.prompt) is None
        and (generation.finish_reason == "length" or (usual and generation.finish_reason == "unknown"))
    ]
    if cut:
        log.warning(
            "%s:%d: %d completions hold no reasoning mark and count as unfinished reasoning, because %d other rows end "
            "a reasoning block that their prompts opened (%s)",
            *(path, rows[cut[0][0]].line, len(cut), counts.total(), mark),
        )
    opened = {place: replace(texts[place], prompt=f"{texts[place].prompt}{mark}") for place in cut}
    return {
        name: replace(
            row,
            generation=opened.get((name, 0), row.generation),
            others=[opened.get((name, number), other) for number, other in enumerate(row.others, start=1)],
        )
        for name, row in rows.items()
    }


def _objects(path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers. Other lines are appended to ``problems``."""
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
                    problems.append(
                        Problem(f"{path}:{number}", None, f"is not a JSON object: {error}", "write one object per line")
                    )
                    continue
                yield number, values
    except OSError as error:
        raise ConfigError(
            Problem(str(path), None, f"cannot be read: {error.strerror}", "name a JSONL file of predictions")
        ) from error
