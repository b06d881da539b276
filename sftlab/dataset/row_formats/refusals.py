"""Why rows cannot be used for supervised fine-tuning as they are, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sftlab.dataset.row_formats import instruct, multiple_choice, turns
from sftlab.dataset.row_formats.match import Match
from sftlab.dataset.row_formats.sample import Sample, simple
from sftlab.dataset.wording import column_path, listing, short
from sftlab.errors import ConfigError

PLAIN = {"text", "content", "document", "body", "raw", "code", "story"}
LABELS = {"label", "labels", "class", "category", "sentiment", "summary", "target", "translation"}
"""Columns that may hold what a model is to write about a text."""

MARKS = re.compile(
    r"###\s*(?:Human|Assistant|Instruction|Response)\s*:|<\|(?:im_start|user|assistant|start_header_id)\|?>?|\[INST\]"
    r"|(?:^|\n)\s*(?:USER|ASSISTANT|Human|Assistant)\s*:"
)
"""Marks of the turns of a conversation that is one text."""


def of_matches(sample: Sample, matched: Sequence[Match]) -> ConfigError | None:
    """Return the refusal of rows that fit a format, but of which a part would be lost."""
    return _preference(sample, matched) or _judged(sample, matched) or _unread_options(sample, matched)


def _judged(sample: Sample, matched: Sequence[Match]) -> ConfigError | None:
    """Return the refusal of completions that are marked as good or bad (KTO)."""
    label = next((column for column in sample.columns if simple(column) == "label"), None)
    values = sample.values(label) if label else []
    fits = [match for match in matched if match.format in ("prompt_completion", "chat", "sharegpt")]
    if not fits or not values or not all(isinstance(value, bool) for value in values):
        return None
    section = sample.settings.section
    return sample.problem(
        f"the column {label} marks each answer as good or bad: that is preference data (KTO), and supervised "
        "fine-tuning would train on the bad answers too",
        f"to train on the good answers, set {section}.format={fits[0].format} {section}.keep={label}",
    )


def _unread_options(sample: Sample, matched: Sequence[Match]) -> ConfigError | None:
    """Return the refusal of questions whose options are written in a form that is not known."""
    options = [column for column in sample.named("options", multiple_choice.OPTIONS) if sample.values(column)]
    if not options or [match.format for match in matched] != ["question_answer"]:
        return None
    section, value = sample.settings.section, sample.opened(options[0])[0]
    return sample.problem(
        f"the column {options[0]} does not list options, or no column names the right one: {short(repr(value))}",
        f"name the column of the right one by {section}.columns.answer, write a list or an object of letter and text, "
        f"or set {section}.format=question_answer to leave {options[0]} out",
    )


def _preference(sample: Sample, matched: Sequence[Match]) -> ConfigError | None:
    """Return the refusal of preference data: rows with a chosen and a rejected answer."""
    columns = {simple(column): column for column in sample.columns}
    if not {"chosen", "rejected"} <= columns.keys():
        return None
    section = sample.settings.section
    chosen = columns["chosen"]
    names = {turns.layout_of(value, chosen) for value in sample.opened(chosen)}
    if "turns" in names:
        remedy = f"to train on the chosen answers, set {section}.format=chat {section}.columns.messages={chosen}"
    elif prompts := sample.named("prompt", (*instruct.PROMPT["prompt"], *instruct.QUESTION["question"])):
        remedy = (
            f"to train on the chosen answers, set {section}.format=prompt_completion "
            f"{section}.columns.prompt={prompts[0]} {section}.columns.completion={chosen}"
        )
    else:
        remedy = (
            f"to train on the chosen answers, write templates ({section}.format=template) over {column_path(chosen)}"
        )
    other = [f"{section}.format={match.format}" for match in matched]
    remedy += f", or set {' or '.join(other)} to train on {listing(matched[0].columns)}" if other else ""
    return sample.problem(
        f"the rows have the columns {chosen} and {columns['rejected']}: that is preference data (DPO), and supervised "
        "fine-tuning has no use for a rejected answer",
        remedy,
    )


def unrecognised(sample: Sample) -> ConfigError:
    """Return the refusal of rows that fit no format."""
    section, columns = sample.settings.section, {simple(column): column for column in sample.columns}
    texts = [column for column in sample.columns if sample.has_text(column)]
    marked = [
        column for column in texts if any(len(MARKS.findall(str(value))) > 1 for value in sample.values(column)[:20])
    ]
    if marked:
        return sample.problem(
            f"the column {marked[0]} has whole conversations as one text, with marks between the turns",
            f"split it into turns, and write a list of messages; or write templates ({section}.format=template) "
            "that extract question and answer by the filter search",
        )
    speaker = next((columns[name] for name in turns.SPEAKERS if name in columns), None)
    if speaker and any(str(value).strip().lower() in turns.ROLES for value in sample.values(speaker)):
        return sample.problem(
            f"each row is a single turn, whose speaker is in the column {speaker}, and not a conversation",
            "join the turns of each conversation to one row with a list of messages",
        )
    plain = [columns[name] for name in PLAIN if name in columns and columns[name] in texts]
    if plain and columns.keys().isdisjoint(_questions() | LABELS):
        return sample.problem(
            f"the rows have plain text (column {plain[0]}) without a prompt and an answer: that is pretraining, and "
            "supervised fine-tuning trains on answers",
            f"give rows with a prompt and a completion, or write templates that divide {plain[0]} into "
            f"{section}.user and {section}.assistant ({section}.format=template)",
        )
    for column in sample.columns:
        if any(turns.layout_of(value, column) for value in sample.opened(column)):
            return sample.problem(
                f"the conversations in the column {column} do not end with an answer of the assistant",
                "give rows with answers: the last turn is the one to train on",
            )
    prompts = [columns[name] for name in _questions() if name in columns]
    if prompts:
        return sample.problem(
            f"the rows have a prompt ({listing(prompts)}), and no column that is known to hold the answer; their "
            f"columns are {listing(sample.columns, 20)}",
            f"name the column of the answer, for example {section}.format=prompt_completion "
            f"{section}.columns.prompt={prompts[0]} {section}.columns.completion=COLUMN",
        )
    prompt, completion = texts if len(texts) == 2 else ("COLUMN", "COLUMN")
    return sample.problem(
        f"the columns {listing(sample.columns, 20)} fit no format",
        f"name the columns of prompt and answer, for example {section}.format=prompt_completion "
        f"{section}.columns.prompt={prompt} {section}.columns.completion={completion}, or write templates",
    )


def unfit(sample: Sample) -> ConfigError:
    """Return the refusal of rows that do not fit the format that the configuration names."""
    needed = {
        "chat": "a column with lists of messages, each with role and content",
        "sharegpt": "a column with lists of turns, each with from and value",
        "alpaca": "the columns instruction and output",
        "prompt_completion": "the columns prompt and completion",
        "question_answer": "the columns question and answer",
        "multiple_choice": "the columns question and answer, and options in one column (options, choices) or "
        "in several (opa … opd, A … D)",
    }[sample.settings.format]
    key = f"{sample.settings.section}.columns"
    return sample.problem(
        f"needs {needed}; the rows have {listing(sample.columns, 20)}",
        f"name the columns by {key}.ROLE=COLUMN, or set {sample.settings.section}.format=auto",
    )


def _questions() -> set[str]:
    formats = instruct.FORMATS.values()
    return {simple(name) for names in formats for name in next(iter(names.values()))} - {"input", "inputs", "user"}
