"""Multiple choice: a question, its options, and the answer as a letter, an index, a text, or yes and no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sftlab.dataset.row_formats import instruct
from sftlab.dataset.row_formats.cells import leave_out, opened, refused, required, text_in
from sftlab.dataset.row_formats.match import Match
from sftlab.dataset.row_formats.options import (
    Option,
    are_options,
    find,
    is_missing,
    mixed,
    options_of,
    separate_columns,
    wrong_columns,
)
from sftlab.dataset.row_formats.record import AnswerKind, Converted, Recognised
from sftlab.dataset.row_formats.sample import MOST, Sample, simple
from sftlab.dataset.row_formats.stated import letters_of
from sftlab.dataset.rows import Row
from sftlab.dataset.values import is_null
from sftlab.dataset.wording import column_path, listing, short
from sftlab.errors import ConfigError, Problem
from sftlab.records import Message

SYSTEM = 'Answer the question. End with "the answer is (LETTER)".'
"""The system text of rows without one. It states the form of an answer, so that the base model can be judged."""

QUESTION = (
    "question",
    "question_stem",
    "stem",
    "query",
    "problem",
    "ctx",
    "sentence",
    "goal",
    "input",
    "prompt",
    "instruction",
    "premise",
)
ASKED = ("question", "query", "problem")
"""Columns of questions that may be answered by yes and no without options."""

OPTIONS = ("options", "choices", "endings", "candidates", "answer_choices", "alternatives", "choice", "option")
ANSWER = (
    *("answer_idx", "answer_key", "answer_index", "correct_idx", "correct_index", "correct_option", "correct_answer"),
    *("correct_choice", "cop", "correct", "gold", "gold_index", "label", "answer", "answer_letter", "answer_id"),
    *("right_answer", "final_decision", "target", "best_answer"),
)
RIGHT = ("correct_answer", "right_answer", "best_answer", "correct", "answer")

WORDS = ("yes", "no", "maybe")
KINDS: Mapping[AnswerKind, str] = {
    "label": "letter or label",
    "text": "text of the option",
    "index0": "0-based index",
    "index1": "1-based index",
    "correct": "text of the right option",
    "stated": "letter that the last turn states",
}


def match(sample: Sample) -> Match | None:
    """Return the columns of a question, its options and its answer; None if there are none."""
    roles = {
        "question": sample.named("question", QUESTION),
        "answer": sample.named("answer", ANSWER),
        "context": sample.named("context", instruct.CONTEXT),
        "rationale": sample.named("rationale", instruct.RATIONALE),
        "system": sample.named("system", instruct.SYSTEM),
    }
    if not roles["question"] or not roles["answer"]:
        return None
    roles["question"] = roles["question"][:1]
    listed = [name for name in sample.named("options", OPTIONS) if _hold_options(sample, name)]
    if listed:
        return Match("multiple_choice", {**roles, "options": tuple(listed)})
    right = sample.named("answer", RIGHT)[:1]
    for columns in wrong_columns(sample.columns) if right else ():
        return Match("multiple_choice", {**roles, "answer": right}, option_columns=columns, wrong=True)
    for columns in separate_columns(sample.columns):
        if set(columns).isdisjoint(roles["answer"]):
            return Match("multiple_choice", roles, option_columns=columns)
    if simple(roles["question"][0]) not in ASKED:
        return None
    decided = tuple(name for name in roles["answer"] if words_of(sample.values(name)))
    return Match("multiple_choice", {**roles, "answer": decided}) if decided else None


def describe(sample: Sample, matched: Match) -> Recognised:
    """Determine what names the right option.

    Raises:
        ConfigError: it is ambiguous, or the answers name no options.
    """
    answers = matched.roles["answer"]
    columns = sample.decided({role: names for role, names in matched.roles.items() if role != "answer"})
    found = Recognised(
        "multiple_choice", {**columns, "answer": answers[0]}, option_columns=tuple(matched.option_columns)
    )
    if matched.wrong:
        fact = "the options are in an order that depends on their texts only"
        return replace(found, answer="correct", facts=(fact,))
    if "options" not in columns and not matched.option_columns:
        column = sample.decide("answer", answers) or answers[0]
        words = words_of(sample.values(column))
        fact = f"answer: one of {', '.join(words)} in {column}"
        return replace(found, columns={**columns, "answer": column}, answer="text", words=words, facts=(fact,))
    column, kind = _answer(sample, found, answers)
    facts = [f"answer: {KINDS[kind]} in {column}"]
    return replace(found, columns={**columns, "answer": column}, answer=kind, facts=tuple(facts))


def convert(found: Recognised, row: Row, section: str) -> Converted:
    """Convert a row to a question that lists its options, and an answer that ends with the right letter.

    Raises:
        ConfigError: the row has no question, options or answer, or the answer names no option.
    """
    columns = found.columns
    question = required(row, columns["question"], section=section)
    column, path = columns["answer"], column_path(columns["answer"])
    value = row.get(column)
    if is_missing(value):
        state = (
            "is missing" if column not in row else "is null" if is_null(value) else f"is {short(repr(opened(value)))}"
        )
        remedy = leave_out(section, f'{path} ~ "" not in ["", "-1"]')  # `string` leaves null as it is
        raise refused(f"{path} {state}: the row has no answer", remedy, f"{section}.keep")
    if found.answer == "correct":
        right = required(row, column, section=section).strip()
        wrong = [text.strip() for name in found.option_columns if (text := text_in(row, name, section=section)).strip()]
        options = mixed(right, wrong, question, listing(found.option_columns))
        correct = find(right, options, "text")
    else:
        options = options_of(row, columns.get("options"), found.option_columns, found.words)
        correct = find(value, options, found.answer or "label")
    if correct is None:
        raise _no_option(path, value, options, found, section)
    context = instruct.context_in(row, columns.get("context"), section)
    lines = [question.strip(), *(f"({option.letter}) {option.text}" for option in options)]
    rationale = text_in(row, columns["rationale"], section=section).strip() if "rationale" in columns else ""
    final = "" if letters_of(rationale) == [correct.letter] else f"The answer is ({correct.letter})."
    system = instruct.system_in(row, columns.get("system"), section) or [Message(role="system", content=SYSTEM)]
    messages: list[Message] = [
        *system,
        {"role": "user", "content": "\n\n".join(filter(None, [context, "\n".join(lines)]))},
        {"role": "assistant", "content": "\n\n".join(filter(None, [rationale, final]))},
    ]
    return Converted(
        messages,
        None,
        [correct.letter],
        "".join(sorted(option.letter for option in options)),
        {option.letter: option.text for option in options},
    )


def words_of(values: Sequence[object]) -> tuple[str, ...]:
    """Return yes, no, and maybe if it occurs, if all values are of these words or booleans; () otherwise."""
    names = {("yes" if value else "no") if isinstance(value, bool) else str(value).strip().lower() for value in values}
    if not names or not names <= {*WORDS, "true", "false"}:
        return ()
    if names & {"true", "false"}:
        return () if names & {*WORDS} else ("true", "false")
    return WORDS if "maybe" in names else WORDS[:2]


def _hold_options(sample: Sample, column: str) -> bool:
    values = sample.opened(column)
    return sum(map(are_options, values)) > MOST * len(values) if values else False


def _answer(sample: Sample, found: Recognised, columns: Sequence[str]) -> tuple[str, AnswerKind]:
    """Return the column of the answer, and what its values name.

    Raises:
        ConfigError: no column names options, or it is ambiguous which option they name.
    """
    wanted = sample.settings.answer_kind
    kinds: Sequence[AnswerKind] = ("label", "text", "index0", "index1") if wanted == "auto" else (wanted,)
    options = [_options(found, row) for row in sample.rows]
    readings: dict[str, dict[AnswerKind, list[str | None]]] = {}
    for column in columns:
        read = {kind: _letters(sample.rows, options, column, kind) for kind in kinds}
        most = max(sum(letter is not None for letter in letters) for letters in read.values())
        total = sum(not is_missing(row.get(column)) for row in sample.rows)
        if most > MOST * total:
            best = {kind: letters for kind, letters in read.items() if len(letters) - letters.count(None) == most}
            if "label" in best:  # an explicit label is not an index
                best = {kind: letters for kind, letters in best.items() if kind not in ("index0", "index1")}
            readings[column] = best
    section = sample.settings.section
    if not readings:
        value = next((value for column in columns for value in sample.values(column)), None)
        raise ConfigError(
            Problem(
                f"{section}.columns.answer",
                None,
                f"the values of {listing(columns)} name no option, neither by a letter, an index nor a text: "
                f"{short(repr(opened(value)))}",
                f"set {section}.columns.answer to the column of the answers, or {section}.format to another format",
            )
        )
    return _unambiguous(readings, section)


def _unambiguous(readings: Mapping[str, Mapping[AnswerKind, list[str | None]]], section: str) -> tuple[str, AnswerKind]:
    """Return the column and the kind on which all readings agree."""
    certain = {column: next(iter(read)) for column, read in readings.items() if _agree(list(read.values()))}
    columns = list(certain or readings)
    first = columns[0]
    if certain:
        agreed = readings[first][certain[first]]
        different = [
            column
            for column, read in readings.items()
            if not any(_agree([agreed, letters]) for letters in read.values())
        ]
        if not different:
            return first, certain[first]
        columns = [first, *different]
        raise ConfigError(
            Problem(
                f"{section}.columns.answer",
                None,
                f"the columns {listing(columns)} name different options",
                "set " + " or ".join(f"{section}.columns.answer={column}" for column in columns),
            )
        )
    names = " or ".join(f"the {KINDS[kind]}" for kind in readings[first])
    raise ConfigError(
        Problem(
            f"{section}.answer_kind",
            "auto",
            f"the values of {first} may be {names}, and the rows fit both",
            "set " + " or ".join(f"{section}.answer_kind={kind}" for kind in readings[first]),
        )
    )


def _agree(readings: Sequence[list[str | None]]) -> bool:
    """Return whether all readings name the same option in every row that they all read."""
    rows = [set(letters) for letters in zip(*readings, strict=True)]
    return all(len(letters - {None}) <= 1 for letters in rows)


def _options(found: Recognised, row: Row) -> list[Option]:
    try:
        return options_of(row, found.columns.get("options"), found.option_columns)
    except ConfigError:
        return []


def _letters(
    rows: Sequence[Row], options: Sequence[Sequence[Option]], column: str, kind: AnswerKind
) -> list[str | None]:
    named = [
        None if is_missing(row.get(column)) else find(row.get(column), there, kind)
        for row, there in zip(rows, options, strict=True)
    ]
    return [None if option is None else option.letter for option in named]


def _no_option(path: str, value: object, options: Sequence[Option], found: Recognised, section: str) -> ConfigError:
    kind = found.answer or "label"
    there = {
        "label": listing(option.label or option.letter for option in options),
        "index0": f"0 to {len(options) - 1}",
        "index1": f"1 to {len(options)}",
    }.get(kind, listing(option.text for option in options))
    several = isinstance(opened(value), list)
    named = f"{'a single' if several else 'the'} {KINDS[kind]} ({there})"
    message = f"{path} is {short(repr(opened(value)))}, which is not {named}"
    return refused(
        message, f"fix the row, or set {section}.answer_kind", f"{section}.answer_kind", f"{section}.columns"
    )
