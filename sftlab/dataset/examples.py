"""Read the rows of a source and render them: the examples in train, validation and test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from sftlab.config import DatasetConfig
from sftlab.dataset import sources
from sftlab.dataset.rows import Rows, wrap
from sftlab.dataset.sources import Source
from sftlab.dataset.splits import Splits, cap, divided_groups, split_examples
from sftlab.dataset.templates import Templates
from sftlab.dataset.thinking import without_thinking
from sftlab.dataset.values import is_null, plain
from sftlab.dataset.wording import listing
from sftlab.errors import LISTED, ConfigError, Problem, shown
from sftlab.records import Example

# Seconds after which reading stops if an error would list LISTED problems: a slow pattern is slow in every row.
PATIENCE = 20

Subgroups = dict[str, str | None]
"""The value of each test row in a column, by the row's id."""


@dataclass(frozen=True)
class Rendered:
    """The examples of a dataset, and by column the subgroups of its test rows."""

    splits: Splits
    subgroups: Mapping[str, Subgroups]


def render_examples(
    cfg: DatasetConfig, seed: int, commit: str | None, *, mounted: bool = False, column: str | None = None
) -> Rendered:
    """Read, render and split a dataset.

    Args:
        cfg: the dataset.
        seed: seed of the splits and of generated rows.
        commit: the commit to read of a dataset from the hub; None for any other source.
        mounted: whether the dataset is the test set of another one (``eval.dataset``).
        column: a column of the test rows (``eval.group_by``) whose values are returned as subgroups.

    Raises:
        ConfigError: there is nothing to read, rows do not fit (a problem for each), or there are too few.
    """
    key = "eval.dataset" if mounted else "dataset"
    source = _read(cfg, seed, commit, key)
    if not any(map(any, source.splits.values())):
        empty = Problem(
            f"{key}.name_or_path", shown(cfg.name_or_path), "has no rows", "give a source with at least one"
        )
        raise ConfigError(*(source.problems or [empty]))
    sources.restore_whole_numbers(source.splits)
    if column is not None:
        _check_column(column, source.splits)
    examples, subgroups = _render(source, cfg, key, column)
    if not any(examples.values()):
        total = sum(map(len, source.splits.values()))
        raise ConfigError(Problem(f"{key}.keep", shown(cfg.keep), f"is false for all {total:,} rows", "change it"))
    if mounted:
        test = next(iter(examples.values())) if len(examples) == 1 else examples.get("test", [])
        splits: Splits = {"train": [], "validation": [], "test": test}
    else:
        splits = split_examples(examples, cfg, seed)
        if problems := divided_groups(splits, key):
            raise ConfigError(*problems)
    splits = cap(splits, cfg.max_rows, seed, f"{key}.max_rows")
    for name in ("test",) if mounted else ("train", "validation"):
        if not splits[name]:
            raise ConfigError(
                Problem(
                    f"{key}.split",
                    shown(cfg.split),
                    f"the {name} split of {cfg.name_or_path} has no rows",
                    f"change {key}.split{f', {key}.group_by' if cfg.group_by else ''} or {key}.max_rows, or "
                    "give a source that has them",
                )
            )
    if column is None:
        return Rendered(splits, {})
    return Rendered(splits, {column: {example.id: subgroups[example.id] for example in splits["test"]}})


def _read(cfg: DatasetConfig, seed: int, commit: str | None, key: str) -> Source:
    """Read the rows of a source by its own splits; a source with a single split calls it ``all``."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        return Source({"all": _generate(cfg, seed, key)}, [])
    if Path(name).exists():
        return sources.read(Path(name))
    from sftlab.model.hub import dataset_rows

    return sources.read_hub(name, dataset_rows(name, cfg.subset, commit))


def _generate(cfg: DatasetConfig, seed: int, key: str) -> Rows:
    """Generate as many rows as the splits ask for, and more if ``keep`` leaves rows out."""
    from sftlab.dataset import vignettes

    wanted = sum(int(size) for size in cfg.split.values())
    try:
        rows = vignettes.rows(wanted, seed)
        if cfg.keep is None or not rows:
            return [*rows]
        templates = Templates(cfg, key, list(rows[0]))
        for factor in (2, 4, 8, 16):
            kept = sum(templates.keeps(row, f"{cfg.name_or_path}, row {n}") for n, row in enumerate(rows, start=1))
            if not 0 < kept < wanted:
                break
            rows = vignettes.rows(factor * wanted, seed)
    except ValueError as error:
        raise ConfigError(Problem(f"{key}.split", shown(cfg.split), str(error))) from error
    return [*rows]


def _render(
    source: Source, cfg: DatasetConfig, key: str, column: str | None
) -> tuple[dict[str, list[Example]], Subgroups]:
    """Render the rows of every split of a source; return the examples, and the subgroup of each if there is a column.

    Raises:
        ConfigError: rows cannot be read or do not fit.
    """
    compiled = _templates(source, cfg, key)
    examples: dict[str, list[Example]] = {}
    subgroups: Subgroups = {}
    problems, started = list(source.problems), monotonic()
    first: dict[str, str] = {}  # id → the row that has it
    for split, rows in source.splits.items():
        examples[split] = []
        templates = compiled.get(split)
        for number, values in enumerate(rows, start=1):
            if values is None or templates is None:
                continue
            at = f"{'' if split == 'all' else split + ' '}row {number}"
            place = f"{cfg.name_or_path}, {at}"
            try:
                row = wrap(values)
                if not templates.keeps(row, place):
                    continue
                example = templates.example(row, f"{split}-{number:06}", place)
                if cfg.thinking == "drop":
                    example = without_thinking(example, key, templates.place(row, place))
            except RecursionError:
                problems.append(Problem(place, None, "has lists or objects nested too deeply", "fix or delete it"))
                continue
            except ConfigError as error:
                problems += error.problems
                if len(problems) >= LISTED and monotonic() - started > PATIENCE:
                    unread = Problem(
                        cfg.name_or_path, None, f"the rows after {at} were not read", "fix the rows before them"
                    )
                    raise ConfigError(unread, *problems) from error
                continue
            if (other := first.setdefault(example.id, at)) is not at:
                problems.append(
                    Problem(
                        place,
                        None,
                        f"two rows have the id {example.id!r}, the other is {other}",
                        f"fix {key}.id, or set it to null",
                    )
                )
            if column is not None:
                subgroups[example.id] = _subgroup(values.get(column))
            examples[split].append(example)
    if problems:
        raise ConfigError(*problems)
    rendered = [example for rows in examples.values() for example in rows]
    if cfg.group_by is not None and rendered and not any(example.group for example in rendered):
        raise ConfigError(
            Problem(
                f"{key}.group_by",
                shown(cfg.group_by),
                "renders to nothing for every row",
                "name a column that has values, or set it to null",
            )
        )
    return examples, subgroups


def _templates(source: Source, cfg: DatasetConfig, key: str) -> dict[str, Templates]:
    """Compile the templates for every split with rows; splits may have different columns."""
    compiled: dict[str, Templates] = {}
    problems: list[Problem] = []
    for split, rows in source.splits.items():
        try:
            if any(rows):
                compiled[split] = Templates(cfg, key, _columns(rows))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems, *source.problems)
    return compiled


def _check_column(column: str, splits: Mapping[str, Rows]) -> None:
    rows = next(rows for name in ("test", "all", "train", *splits) if (rows := splits.get(name)))
    columns = _columns(rows)
    if column not in columns:
        raise ConfigError(
            Problem("eval.group_by", shown(column), "there is no such column", f"the test rows have {listing(columns)}")
        )


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(column for row in rows if row for column in row))


def _subgroup(value: object) -> str | None:
    if is_null(value) or not str(value).strip():
        return None
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, default=str)
