"""Read the rows of a source and render them: the examples in train, validation and test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np

from sftlab.config import SourceConfig
from sftlab.dataset import recognition, sources
from sftlab.dataset.arrow_examples import Examples, batch_of, reorder, text_of, write
from sftlab.dataset.formats import Chunk
from sftlab.dataset.parallel import in_order
from sftlab.dataset.reading import read
from sftlab.dataset.row_formats.record import Recognised
from sftlab.dataset.rows import wrap
from sftlab.dataset.sources import Source
from sftlab.dataset.splits import SPLITS, Drawn, Labels, Splits, cap, divided_groups, draw
from sftlab.dataset.survey import Place, Survey, restore_whole_numbers, survey, whole_numbers
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
    """The rendered examples: a folder with a file for each split, and by column the subgroups of the test rows."""

    folder: Path
    subgroups: Mapping[str, Subgroups] = field(default_factory=dict)

    @cached_property
    def splits(self) -> Splits:
        """The examples of each split."""
        return {name: Examples(self.folder / f"{name}.arrow") for name in SPLITS}


def render_examples(
    cfg: SourceConfig,
    commit: str | None,
    folder: Path,
    *,
    name: str | None = None,
    mounted: str | None = None,
    column: str | None = None,
) -> Rendered:
    """Read, render and split a source.

    Args:
        cfg: the source.
        commit: the commit to read of a dataset from the hub; None for any other source.
        folder: where the files of the splits are written.
        name: its name in dataset.sources; ids and groups begin with it. Its splits may be empty, and it may lack
            ``column``. None for the only source of a dataset.
        mounted: the section of a dataset that is a test set of another one (``eval.dataset``, or a guard).
        column: a column of the test rows (``eval.group_by``) whose values are returned as subgroups.

    Raises:
        ConfigError: there is nothing to read, rows do not fit (a problem for each), or there are too few.
    """
    key = (mounted or "dataset") + ("" if name is None else f".sources.{name}")
    source = read(cfg, commit, key)
    surveys = {split: survey(chunks) for split, chunks in source.items()}
    _check_rows(cfg, surveys, key)
    if column is not None and column not in (columns := _columns_of_test_rows(surveys)):
        if name is None:
            remedy = f"the test rows have {listing(columns)}"
            raise ConfigError(Problem("eval.group_by", shown(column), "there is no such column", remedy))
        column = None
    files = {split: folder / f"{split}-rows.arrow" for split in source}
    places = whole_numbers(surveys.values())
    recognised = recognition.format_of(cfg, key, source, surveys, places)
    renderers = _renderers(surveys, cfg, key, name, places, column, recognised)
    labels = _render(source, surveys, renderers, cfg, key, files)
    if not any(split.groups for split in labels.values()):
        total = sum(survey.rows for survey in surveys.values())
        raise ConfigError(Problem(f"{key}.keep", shown(cfg.keep), f"is false for all {total:,} rows", "change it"))
    if mounted:
        test = next(iter(labels)) if len(labels) == 1 else "test"
        rows = [*range(len(labels[test].groups))] if test in labels else []
        splits = {"train": Drawn(test, []), "validation": Drawn(test, []), "test": Drawn(test, rows)}
    else:
        splits = draw(labels, cfg, key)
        if problems := divided_groups(splits, labels, key):
            raise ConfigError(*problems)
    splits = cap(splits, cfg.max_rows, cfg.seed, f"{key}.max_rows")
    for split in () if name is not None else ("test",) if mounted else ("train", "validation"):
        if not splits[split].rows:
            raise ConfigError(
                Problem(
                    f"{key}.split",
                    shown(cfg.split),
                    f"the {split} split of {cfg.name_or_path} has no rows",
                    f"change {key}.split{f', {key}.group_by' if cfg.group_by else ''} or {key}.max_rows, or "
                    "give a source that has them",
                )
            )
    for split, drawn in splits.items():
        rows_of = [files[drawn.source]] if drawn.rows else []
        reorder(rows_of, np.array(drawn.rows, dtype=np.int64), folder / f"{split}.arrow")
    for file in files.values():
        file.unlink()
    rendered = Rendered(folder)
    if recognised is not None:
        recognition.write(folder, recognised, next(rows[0] for rows in rendered.splits.values() if rows))
    if column is None:
        return rendered
    values = [labels[splits["test"].source].subgroups[row] for row in splits["test"].rows]
    ids = [example.id for example in rendered.splits["test"]]
    return Rendered(folder, {column: dict(zip(ids, values, strict=True))})


def _check_rows(cfg: SourceConfig, surveys: Mapping[str, Survey], key: str) -> None:
    """Raise an error if a split of a folder, or the whole source, has no rows."""
    for split, found in surveys.items():
        if not found.rows and split != "all" and Path(cfg.name_or_path).exists():
            raise ConfigError(sources.without_rows(Path(cfg.name_or_path), split))
    if not any(found.columns for found in surveys.values()):
        problems = [problem for found in surveys.values() for problem in found.problems]
        message, remedy = "has no rows", "give a source with at least one"
        raise ConfigError(*(problems or [Problem(f"{key}.name_or_path", shown(cfg.name_or_path), message, remedy)]))


class RenderedRow(NamedTuple):
    """A rendered row: its example as JSON, and its labels."""

    example: str
    id: str
    number: int  # of the row in its split, from 1
    group: str | None
    stratum: str | None
    subgroup: str | None


class RenderedChunk(NamedTuple):
    """The rendered rows of a chunk, and a problem for each row that does not fit.

    ``last`` is the number of the last row that was read; ``stopped`` is set if it is not the last one of the chunk.
    """

    rows: list[RenderedRow]
    problems: list[Problem]
    last: int
    stopped: bool


@dataclass
class Renderer:
    """Render the rows of a split."""

    cfg: SourceConfig
    key: str
    source: str | None
    split: str
    columns: list[str]
    whole_numbers: frozenset[Place]
    subgroup: str | None
    recognised: Recognised | None

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "templates"}  # another process compiles

    @cached_property
    def templates(self) -> Templates:
        """The compiled templates."""
        return Templates(self.cfg, self.key, self.columns, self.recognised)

    def __call__(self, numbered: tuple[int, Chunk]) -> RenderedChunk:
        """Render a chunk, given with the number of rows before it."""
        before, chunk = numbered
        rendered, problems, number = list[RenderedRow](), list[Problem](), before
        started = monotonic()
        for number, values in enumerate(chunk.table().rows, start=before + 1):
            if values is None:
                continue
            place = f"{self.cfg.name_or_path}, {at(self.split, number)}"
            try:
                restore_whole_numbers(values, self.whole_numbers)
                row = wrap(values)
                if not self.templates.keeps(row, place):
                    continue
                example = self.templates.example(row, f"{self.split}-{number:06}", place)
                if self.cfg.thinking == "drop":
                    example = without_thinking(example, self.key, self.templates.place(row, place))
                if self.source is not None:
                    example = _of_source(example, self.source)
                stratum = self.templates.stratum(row, place)
            except RecursionError:
                problems.append(Problem(place, None, "has lists or objects nested too deeply", "fix or delete it"))
                continue
            except ConfigError as error:
                problems += error.problems
                if len(problems) >= LISTED and monotonic() - started > PATIENCE:
                    return RenderedChunk(rendered, problems, number, stopped=True)
                continue
            subgroup = None if self.subgroup is None else _subgroup(values.get(self.subgroup))
            text = text_of(example)
            rendered.append(RenderedRow(text, example.id, number, example.group, stratum, subgroup))
        return RenderedChunk(rendered, problems, number, stopped=False)


def _of_source(example: Example, source: str) -> Example:
    group = None if example.group is None else f"{source}/{example.group}"
    return replace(example, id=f"{source}/{example.id}", group=group, source=source)


def at(split: str, number: int) -> str:
    """Return the place of a row within its source."""
    return f"{'' if split == 'all' else split + ' '}row {number}"


def _render(
    source: Source,
    surveys: Mapping[str, Survey],
    renderers: Mapping[str, Renderer],
    cfg: SourceConfig,
    key: str,
    files: Mapping[str, Path],
) -> dict[str, Labels]:
    """Render the rows of every split of a source to files; return the labels of the rendered rows.

    Raises:
        ConfigError: rows cannot be read or do not fit.
    """
    problems = [problem for found in surveys.values() for problem in found.problems]
    first: dict[str, str] = {}  # id → the row that has it
    labels: dict[str, Labels] = {}
    for split, chunks in source.items():
        labels[split] = Labels([], [], [])
        write(files[split], _batches(renderers.get(split), chunks, surveys[split], labels[split], problems, first))
    if problems:
        raise ConfigError(*problems)
    groups = [group for split in labels.values() for group in split.groups]
    if cfg.group_by is not None and groups and not any(groups):
        message, remedy = "renders to nothing for every row", "name a column that has values, or set it to null"
        raise ConfigError(Problem(f"{key}.group_by", shown(cfg.group_by), message, remedy))
    return labels


def _batches(
    renderer: Renderer | None,
    chunks: Iterable[Chunk],
    found: Survey,
    labels: Labels,
    problems: list[Problem],
    first: dict[str, str],
) -> Iterator[Any]:
    """Yield the rendered rows of a split as record batches; collect their labels, and the problems."""
    if renderer is None:
        return
    before = accumulate(found.chunks, initial=0)
    started = monotonic()
    for rendered in in_order(renderer, zip(before, chunks, strict=False)):
        problems += rendered.problems
        for row in rendered.rows:
            labels.groups.append(row.group)
            labels.strata.append(row.stratum)
            labels.subgroups.append(row.subgroup)
            if renderer.cfg.id is None:
                continue  # ids are numbers
            place = at(renderer.split, row.number)
            if (other := first.setdefault(row.id, place)) is not place:
                message = f"two rows have the id {row.id!r}, the other is {other}"
                remedy = f"fix {renderer.key}.id, or set it to null"
                problems.append(Problem(f"{renderer.cfg.name_or_path}, {place}", None, message, remedy))
        if rendered.stopped or (len(problems) >= LISTED and monotonic() - started > PATIENCE):
            message = f"the rows after {at(renderer.split, rendered.last)} were not read"
            unread = Problem(renderer.cfg.name_or_path, None, message, "fix the rows before them")
            raise ConfigError(unread, *problems)
        if rendered.rows:
            yield batch_of(row.example for row in rendered.rows)


def _renderers(
    surveys: Mapping[str, Survey],
    cfg: SourceConfig,
    key: str,
    source: str | None,
    places: frozenset[Place],
    column: str | None,
    recognised: Recognised | None,
) -> dict[str, Renderer]:
    """Compile the templates for every split with rows; splits may have different columns."""
    renderers: dict[str, Renderer] = {}
    problems: list[Problem] = []
    for split, found in surveys.items():
        try:
            if found.columns:
                renderers[split] = Renderer(cfg, key, source, split, list(found.columns), places, column, recognised)
                renderers[split].templates  # noqa: B018
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems, *chain.from_iterable(found.problems for found in surveys.values()))
    return renderers


def _columns_of_test_rows(surveys: Mapping[str, Survey]) -> list[str]:
    return [*next(found for name in ("test", "all", "train", *surveys) if (found := surveys.get(name))).columns]


def _subgroup(value: object) -> str | None:
    if is_null(value) or not str(value).strip():
        return None
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, default=str)
