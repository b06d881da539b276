"""Mix the sources of a dataset (dataset.sources): each is rendered and split, then their splits are joined."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sftlab.config import DatasetConfig, NamedSource
from sftlab.dataset import recognition
from sftlab.dataset.arrow_examples import reorder
from sftlab.dataset.examples import Rendered, render_examples
from sftlab.dataset.splits import SPLITS, counts_of
from sftlab.errors import ConfigError, Problem, shown
from sftlab.results import SourceRecord

log = logging.getLogger(__name__)

FILE = "sources.json"
"""The file of a dataset stage with the records of its sources."""


def render_mix(
    cfg: DatasetConfig,
    commits: Mapping[str | None, str | None],
    folder: Path,
    *,
    mounted: str | None = None,
    column: str | None = None,
) -> Rendered:
    """Read, render and split every source, and join their splits.

    Training rows are shuffled by ``dataset.seed``. Validation and test rows are in the order of the sources.

    Args:
        cfg: the dataset.
        commits: the commit to read of each source from the hub, by its name; None for any other source.
        folder: where the files of the splits are written.
        mounted: the section of a dataset that is a test set of another one (``eval.dataset``, or a guard).
        column: a column of the test rows (``eval.group_by``); test rows of a source that lacks it have no subgroup.

    Raises:
        ConfigError: there is nothing to read, rows do not fit (the problems of all sources), or a split has no rows.
    """
    key = mounted or "dataset"
    parts, problems = cfg.parts(key), list[Problem]()
    rendered: list[Rendered] = []
    for part in parts:
        own = folder / f"source-{part.name}"
        own.mkdir()
        try:
            rendered.append(
                render_examples(part.cfg, commits[part.name], own, name=part.name, mounted=mounted, column=column)
            )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    if column is not None and not any(column in one.subgroups for one in rendered):
        remedy = "name a column of the test rows, or set it to null to report results by source"
        raise ConfigError(Problem("eval.group_by", shown(column), "no source has such a column", remedy))
    rows = {
        split: [_used(split, part, len(one.splits[split])) for part, one in zip(parts, rendered, strict=True)]
        for split in SPLITS
    }
    for split in ("test",) if mounted else ("train", "validation"):
        if not any(map(len, rows[split])):
            message, remedy = f"no source has {split} rows", f"change the key split of a source, or {key}.split"
            raise ConfigError(Problem(f"{key}.sources", shown(list(cfg.sources or {})), message, remedy))
    for split in SPLITS:
        files = [one.folder / f"{split}.arrow" for one in rendered]
        before = _before(rendered, split)
        joined = np.concatenate([own + number for own, number in zip(rows[split], before, strict=True)])
        if split == "train":
            np.random.default_rng(cfg.seed).shuffle(joined)
        reorder(files, joined, folder / f"{split}.arrow")
    records = [
        SourceRecord(
            name=str(part.name),
            weight=part.cfg.weight,
            rows={split: len(rows[split][number]) for split in SPLITS},
            row_format=recognition.read(one.folder),
        )
        for number, (part, one) in enumerate(zip(parts, rendered, strict=True))
    ]
    (folder / FILE).write_text(json.dumps([record.model_dump(mode="json") for record in records]), "utf-8")
    for one in rendered:
        shutil.rmtree(one.folder)
    if column is None:
        return Rendered(folder)
    values: dict[str, str | None] = dict.fromkeys(example.id for example in Rendered(folder).splits["test"])
    for one in rendered:
        values |= one.subgroups.get(column, {})
    return Rendered(folder, {column: values})


def read(folder: Path) -> list[SourceRecord]:
    """Return the records of the sources of a dataset stage; none without ``dataset.sources``."""
    file = folder / FILE
    return [SourceRecord(**record) for record in json.loads(file.read_text("utf-8"))] if file.exists() else []


def announce(records: list[SourceRecord]) -> None:
    """Log the rows of each source, its format, and a row as the model sees it."""
    for record in records:
        key = f"dataset.sources.{record.name}"
        weight = "" if record.weight == 1 else f" (weight {record.weight:g})"
        log.info("%s: %s%s", key, counts_of({split: range(rows) for split, rows in record.rows.items()}), weight)
        if record.row_format is not None:
            recognition.announce(record.row_format, key)


def _used(split: str, part: NamedSource, count: int) -> NDArray[np.int64]:
    """Return the rows of a source that a split uses: those of train ``weight`` times, a fraction drawn by seed."""
    if split != "train" or not count:
        return np.arange(count)
    whole, rest = divmod(part.cfg.weight, 1)
    drawn = round(rest * count) if whole else max(round(rest * count), 1)
    sample = random.Random(f"{part.cfg.seed} {part.name}").sample(range(count), drawn)
    return np.concatenate([np.tile(np.arange(count), int(whole)), np.array(sorted(sample), dtype=np.int64)])


def _before(rendered: list[Rendered], split: str) -> list[int]:
    """Return the number of rows of the sources before each."""
    counts = [len(one.splits[split]) for one in rendered]
    return [sum(counts[:number]) for number in range(len(counts))]
