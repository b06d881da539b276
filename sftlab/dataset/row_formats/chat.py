"""Conversations in one column: messages of OpenAI, ShareGPT, pairs, and alternating texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sftlab.dataset.row_formats import instruct, turns
from sftlab.dataset.row_formats.match import Match
from sftlab.dataset.row_formats.record import Converted, FormatName, Layout, Recognised
from sftlab.dataset.row_formats.sample import MOST, Sample
from sftlab.dataset.row_formats.tools import tools_in
from sftlab.dataset.rows import Row
from sftlab.dataset.wording import column_path

# Lists of messages that are a part of another format.
PARTS = {"history", "chosen", "rejected"}


def matches(sample: Sample, without: Sequence[str] = ()) -> list[Match]:
    """Return a match for each of the formats chat and sharegpt whose conversations a column has.

    Args:
        sample: the columns and rows.
        without: columns that are the parts of conversations.
    """
    named = sample.named("messages", ())
    columns = named or [column for column in sample.columns if column not in without and column.lower() not in PARTS]
    found: dict[FormatName, dict[str, Layout]] = {"chat": {}, "sharegpt": {}}
    for column in columns:
        values = sample.opened(column)
        layouts = Counter(layout for value in values if (layout := turns.layout_of(value, column)))
        if not layouts:
            continue
        layout, count = layouts.most_common(1)[0]
        fitting = [value for value in values if turns.layout_of(value, column) == layout]
        answered = sum(turns.ends_with_answer(value, layout) for value in fitting)
        if count > MOST * len(values) and (answered or named or sample.settings.format != "auto"):
            name: FormatName = "sharegpt" if turns.is_sharegpt(fitting[0]) else "chat"
            found[name][column] = layout
    roles = {"system": sample.named("system", instruct.SYSTEM), "tools": sample.named("tools", instruct.TOOLS)}
    return [
        Match(name, {"messages": tuple(layouts), **roles}, layout=next(iter(layouts.values())))
        for name, layouts in found.items()
        if layouts
    ]


def describe(sample: Sample, matched: Match) -> Recognised:
    """Determine the column of the conversations.

    Raises:
        ConfigError: several columns have conversations, and they differ.
    """
    return Recognised(matched.format, sample.decided(matched.roles), layout=matched.layout)


def convert(found: Recognised, row: Row, section: str) -> Converted:
    """Convert a row to messages. The system column is the first turn if the conversation has none.

    Raises:
        ConfigError: a turn cannot be trained on, or the conversation does not end with an answer.
    """
    columns = found.columns
    column, path = columns["messages"], column_path(columns["messages"])
    messages = turns.messages_in(row.get(column), found.layout or "turns", path, section)
    if not messages or messages[0]["role"] not in ("system", "developer"):
        messages = [*instruct.system_in(row, columns.get("system"), section), *messages]
    turns.check(messages, path, section, turns.remedy(row.get(column), path, section))
    tools = tools_in(row.get(columns["tools"]), column_path(columns["tools"])) if "tools" in columns else None
    return Converted(messages, tools, [instruct.text_of_answer(messages[-1])])
