"""Recognise the format of a source whose rows no templates convert, and report it with one row."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from sftlab.config import RowSettings
from sftlab.dataset.formats import Chunk
from sftlab.dataset.row_formats.recognise import SAMPLED, recognise, summary
from sftlab.dataset.row_formats.record import Recognised, Settings
from sftlab.dataset.rows import Row
from sftlab.dataset.sources import Source
from sftlab.dataset.survey import Place, Survey, restore_whole_numbers
from sftlab.dataset.wording import short
from sftlab.records import Example
from sftlab.results import RowFormat

log = logging.getLogger(__name__)

FILE = "format.json"
"""The file of a dataset stage with the recognised format."""


def format_of(
    cfg: RowSettings, key: str, source: Source, surveys: Mapping[str, Survey], places: frozenset[Place]
) -> Recognised | None:
    """Recognise the format of a source by all of its columns and the first rows of each split; None for templates.

    Raises:
        ConfigError: the rows fit no format, or several.
    """
    if cfg.format == "template":
        return None
    columns = list(dict.fromkeys(column for found in surveys.values() for column in found.columns))
    rows = [row for chunks in source.values() for row in _first(chunks, places)]
    return recognise(columns, rows, Settings(key, cfg.format, cfg.columns, cfg.answer_kind))


def _first(chunks: Iterable[Chunk], places: frozenset[Place]) -> list[Row]:
    rows: list[Row] = []
    for chunk in chunks:
        for row in chunk.table().rows:
            if row is not None:
                restore_whole_numbers(row, places)
                rows.append(row)
            if len(rows) == SAMPLED:
                return rows
    return rows


def write(folder: Path, recognised: Recognised, example: Example) -> None:
    """Write a format, with one row as the model sees it, into the folder of a dataset."""
    record = RowFormat(
        format=recognised.format,
        columns=dict(recognised.columns),
        option_columns=list(recognised.option_columns),
        answer=recognised.answer,
        facts=list(recognised.facts),
        summary=summary(recognised),
        messages=json.loads(json.dumps(example.messages)),
        target=example.target,
    )
    (folder / FILE).write_text(record.model_dump_json(), "utf-8")


def read(folder: Path) -> RowFormat | None:
    """Return the format of a dataset; None if templates converted its rows."""
    file = folder / FILE
    return RowFormat.model_validate_json(file.read_text("utf-8")) if file.exists() else None


def announce(found: RowFormat, key: str = "dataset") -> None:
    """Log the format of a dataset or source, and a row as the model sees it."""
    log.info("%s: %s", key, found.summary)
    for message in found.messages:
        text = message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False)
        log.info("  %-9s %s", message["role"], short(str(text), 300))
    log.info("  %-9s %s", "target", short(found.target, 100))
