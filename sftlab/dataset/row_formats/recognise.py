"""Recognise the format of rows without configuration, and convert rows to conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sftlab.dataset.row_formats import chat, instruct, multiple_choice, refusals, stated
from sftlab.dataset.row_formats.cells import check_text
from sftlab.dataset.row_formats.fitting import MOSTLY, Answered, fitting
from sftlab.dataset.row_formats.instruct import text_of_answer
from sftlab.dataset.row_formats.match import Match
from sftlab.dataset.row_formats.record import Converted, FormatName, Recognised, Settings
from sftlab.dataset.row_formats.sample import Sample
from sftlab.dataset.rows import Row
from sftlab.dataset.values import is_null
from sftlab.dataset.wording import listing
from sftlab.errors import ConfigError, Problem

SAMPLED = 200
"""Rows of each split by which a format is recognised."""

FEW = 10
"""Sampled rows from which equal answers are reported."""

AUTO = Settings()

_ROLES = {
    "chat": {"messages", "system", "tools"},
    "sharegpt": {"messages", "system", "tools"},
    **{name: {*names} for name, names in instruct.FORMATS.items()},
    "multiple_choice": {"question", "options", "answer", "context", "rationale", "system"},
}


def recognise(columns: Sequence[str], rows: Sequence[Row], settings: Settings = AUTO) -> Recognised:
    """Recognise the format of a source.

    Args:
        columns: its columns, those of all splits.
        rows: its first rows, of all splits.
        settings: what the configuration says about the format.

    Raises:
        ConfigError: the rows fit no format, or several; or the column of a role, or what the answers of multiple choice
            name, is ambiguous. Each problem has the key that decides.
    """
    sample = Sample(columns, rows, settings)
    _check_columns(sample)
    matched = _matches(sample)
    if settings.format == "auto":
        if refusal := refusals.of_matches(sample, matched):
            raise refusal
        if not matched:
            raise refusals.unrecognised(sample)
        if len(matched) > 1:
            return _same(sample, matched)
    matched = [match for match in matched if settings.format in ("auto", match.format)]
    if not matched:
        raise refusals.unfit(sample)
    return _judged(sample, _described(sample, matched[0]))


def convert(found: Recognised, row: Row, section: str = "dataset") -> Converted:
    """Convert a row to a conversation.

    Raises:
        ConfigError: the row does not have the format; the problems have no place yet.
    """
    if found.format == "multiple_choice":
        converted = multiple_choice.convert(found, row, section)
    elif found.format in ("chat", "sharegpt"):
        converted = chat.convert(found, row, section)
    else:
        converted = instruct.convert(found, row, section)
    check_text(converted)
    return stated.with_options(converted, section) if found.answer == "stated" else converted


def _matches(sample: Sample) -> list[Match]:
    """Return the formats that the rows fit, without those that are a part of another one."""
    wanted = sample.settings.format
    names: list[FormatName] = ["alpaca", "prompt_completion", "question_answer"]
    single = [match for name in names if wanted in ("auto", name) and (match := instruct.match(sample, name))]
    choice = multiple_choice.match(sample) if wanted in ("auto", "multiple_choice") else None
    if choice:  # a question with options and an answer is a question with an answer, too
        single = [*(match for match in single if match.format != "question_answer"), choice]
    parts = {column for match in single for column in match.columns if match.format == "prompt_completion"}
    turns = chat.matches(sample, sorted(parts)) if wanted in ("auto", "chat", "sharegpt") else []
    found = [*single, *turns]
    return [
        match
        for match in found
        if not any(set(match.columns) < set(other.columns) for other in found if other is not match)
    ]


def _check_columns(sample: Sample) -> None:
    """Check the roles and the columns of ``dataset.columns``."""
    key, form = f"{sample.settings.section}.columns", sample.settings.format
    known = set().union(*_ROLES.values()) if form == "auto" else _ROLES[form]
    problems = []
    for role, column in (sample.settings.columns or {}).items():
        if role not in known:
            of = "any format" if form == "auto" else f"the format {form}"
            problems.append(
                Problem(f"{key}.{role}", None, f"is not a role of {of}", f"write one of {listing(sorted(known), 20)}")
            )
        elif column is not None and column not in sample.columns:
            there = f"the rows have {listing(sample.columns, 20)}"
            problems.append(Problem(f"{key}.{role}", column, "there is no such column", there))
    if problems:
        raise ConfigError(*problems)


def _described(sample: Sample, match: Match) -> Recognised:
    describe = {"multiple_choice": multiple_choice.describe, "chat": chat.describe, "sharegpt": chat.describe}
    return describe.get(match.format, instruct.describe)(sample, match)


def _same(sample: Sample, matched: Sequence[Match]) -> Recognised:
    """Return the last of several formats if all of them give the same conversations.

    Raises:
        ConfigError: they do not, in a sampled row.
    """
    try:
        found = [_described(sample, match) for match in matched]
        agree = all(_agree(found, row) for row in sample.rows)
    except ConfigError:
        agree = False
    if not agree:
        raise _ambiguous(sample, matched)
    same = " and ".join(f"{match.format} ({listing(match.columns)})" for match in matched[:-1])
    return _judged(sample, replace(found[-1], facts=(f"{same} would give the same conversations",)))


def _agree(formats: Sequence[Recognised], row: Row) -> bool:
    """Return whether all formats convert a row to the same conversation."""
    first, *others = [convert(found, row) for found in formats]
    return all((other.messages, other.tools) == (first.messages, first.tools) for other in others)


def _ambiguous(sample: Sample, matched: Sequence[Match]) -> ConfigError:
    candidates = " and ".join(f"{match.format} ({listing(match.columns)})" for match in matched)
    choices = " or ".join(f"{sample.settings.section}.format={match.format}" for match in matched)
    if not any(sum(_has_columns_of(row, match) for match in matched) > 1 for row in sample.rows):
        remedy = "give the rows of each format as a source of their own (dataset.sources)"
        return sample.problem(f"different rows have different formats: {candidates}", remedy)
    return sample.problem(f"the rows fit {len(matched)} formats: {candidates}", f"set {choices}")


def _has_columns_of(row: Row, match: Match) -> bool:
    """Return whether a row has a value in a column of a format."""
    return any(not is_null(row.get(column)) for column in match.columns)


def _judged(sample: Sample, found: Recognised) -> Recognised:
    """Add what the sampled rows show: the evaluation that fits, and the facts to log."""
    converted: list[Converted] = []
    for row in sample.rows:
        try:
            converted.append(convert(found, row, sample.settings.section))
        except ConfigError:
            continue  # a problem of its row, which is reported when all rows are converted
    if found.answer is None and converted and sum(map(stated.states_option, converted)) >= MOSTLY * len(converted):
        found = replace(found, answer="stated")
        converted = [stated.with_options(row, "") for row in converted if stated.states_option(row)]
    rows = [Answered(row.targets[0], text_of_answer(row.messages[-1]), row.choices) for row in converted]
    task, extract = fitting(rows)
    facts = [*found.facts]
    if found.answer == "stated":
        facts.append('answer: the letter of "the answer is (X)" in the last turn; options: those of the question')
    elif found.format == "multiple_choice" and "system" not in found.columns:
        facts.append(f"system text: {multiple_choice.SYSTEM}")
    if task == "choice" and len(rows) >= FEW and len({row.target for row in rows}) == 1:
        facts.append(
            f"the answer of all {len(rows)} sampled rows is {rows[0].target}: a model can learn the letter alone"
        )
    facts += _facts(converted)
    used = {*found.columns.values(), *found.option_columns}
    if unused := [column for column in sample.columns if column and column not in used]:
        facts.append(f"not used: {listing(unused)}")
    return replace(found, task=task, extract=extract, facts=tuple(facts))


def _facts(converted: Sequence[Converted]) -> list[str]:
    """Return what the log reports about conversations."""
    facts: list[str] = []
    counts = [sum(message["role"] != "system" for message in row.messages) for row in converted]
    if counts and max(counts) > 2:
        facts.append(f"turns: {min(counts)} to {max(counts)}")
    for name, have in (
        ("a system text", [row for row in converted if _system(row) not in ("", multiple_choice.SYSTEM)]),
        ("tools", [row for row in converted if row.tools]),
        ("tool calls", [row for row in converted if any("tool_calls" in message for message in row.messages)]),
        ("reasoning", [row for row in converted if any("reasoning_content" in message for message in row.messages)]),
    ):
        if have:
            facts.append(f"{name} in {len(have)} of {len(converted)} sampled rows")
    return facts


def _system(row: Converted) -> str:
    first = row.messages[0]
    return (first.get("content") or "") if first["role"] in ("system", "developer") else ""


def summary(found: Recognised) -> str:
    """Return the recognised format as a line of the log."""
    columns = ", ".join(f"{role}: {column}" for role, column in found.columns.items())
    if found.option_columns:
        columns += f", {'wrong ' if found.answer == 'correct' else ''}options: {listing(found.option_columns)}"
    return "; ".join([f"format {found.format} ({columns})", *found.facts])
