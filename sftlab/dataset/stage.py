"""The dataset stage: the examples of train, validation and test, rendered once and reused from the store."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sftlab.config import DatasetConfig
from sftlab.dataset import sources
from sftlab.dataset.examples import Rendered, Subgroups, render_examples
from sftlab.dataset.splits import SPLITS, Splits, counts_of
from sftlab.dataset.templates import packages
from sftlab.records import Example
from sftlab.runtime.store import Stage, Store, digest, key_of, versions

log = logging.getLogger(__name__)

REMEMBERED = 2  # datasets that a process retains in memory: a run has one, and perhaps a mounted test set


@dataclass(frozen=True)
class Dataset:
    """A finished dataset stage. A split may be empty."""

    stage: Stage

    def split(self, name: str) -> list[Example]:
        """Return the examples of a split, in the order in which they were drawn."""
        known = _memory.get(self.stage.key) or _remember(self.stage.key, Rendered(_read(self.stage.path), {}))
        return list(known.splits[name])

    def for_training(self) -> Splits:
        """Return the examples of train and validation."""
        return {name: self.split(name) for name in ("train", "validation")}

    def counts(self) -> str:
        """Return the numbers of rows as they are logged: "320 train, 48 validation, 200 test"."""
        return counts_of({name: self.split(name) for name in SPLITS})


def inputs(cfg: DatasetConfig, seed: int, *, mounted: bool = False) -> Mapping[str, object]:
    """Return the inputs of a dataset: its settings, the seed, the content of its source and library versions."""
    settings = cfg.model_dump(exclude={"max_overlap", "allow_overlap", "train_on"})  # these change no row
    return {
        "version": 6,
        "dataset": settings,
        "seed": seed,
        "mounted": mounted,
        "source": _identity(cfg),
        "libraries": versions(*packages(cfg)),
    }


def revision(cfg: DatasetConfig) -> str | None:
    """Return the commit that a dataset from the hub has now; None for any other source."""
    return None if _is_on_this_machine(cfg.name_or_path) else str(_identity(cfg))


def make(store: Store, cfg: DatasetConfig, seed: int, *, mounted: bool = False) -> Dataset:
    """Return the dataset stage, from the store or rendered now.

    A ``mounted`` dataset is the test set of another one (``eval.dataset``): if its source has a single split, all rows
    are test rows.

    Raises:
        ConfigError: there is nothing to read, a row does not fit, or a split has no rows.
    """
    stage_inputs = inputs(cfg, seed, mounted=mounted)

    def build(folder: Path) -> None:
        splits = _rendered(stage_inputs, cfg, seed, mounted).splits
        for name in SPLITS:
            Example.write(folder / f"{name}.jsonl", splits[name])
        log.info("dataset: %s", counts_of(splits))

    return Dataset(store.stage("dataset", stage_inputs, build))


def load(store: Store, cfg: DatasetConfig, seed: int, *, mounted: bool = False, column: str | None = None) -> Splits:
    """Return all splits without writing to the store: from memory, from the finished stage, or rendered now.

    ``make`` reuses what was rendered here. ``column`` (eval.group_by) also reads the subgroups of the test rows, which
    are not part of the stage, so that ``subgroups`` finds them in memory.

    Raises:
        ConfigError: there is nothing to read, rows do not fit, or a split has no rows.
    """
    stage_inputs = inputs(cfg, seed, mounted=mounted)
    key = key_of(stage_inputs)
    if column is None and key not in _memory and store.has("dataset", stage_inputs):
        return _remember(key, Rendered(_read(store.path("dataset", stage_inputs)), {})).splits
    return _rendered(stage_inputs, cfg, seed, mounted, column).splits


def subgroups(cfg: DatasetConfig, seed: int, column: str, *, mounted: bool = False) -> Subgroups:
    """Return the value of each test row in a column, by the row's id.

    The values are read from the source, since the stage does not contain them: training does not depend on them, and
    every later stage depends on the key of this one.

    Raises:
        ConfigError: there is no such column.
    """
    return _rendered(inputs(cfg, seed, mounted=mounted), cfg, seed, mounted, column).subgroups[column]


def test_rows(dataset: Dataset, max_rows: int | None, seed: int) -> list[Example]:
    """Return the test set, or a sample of it drawn by seed, in the order of the dataset."""
    rows = dataset.split("test")
    if max_rows is not None and max_rows < len(rows):
        drawn = sorted(random.Random(seed).sample(range(len(rows)), max_rows))
        rows = [rows[index] for index in drawn]
    return rows


# By the key of the stage, which hashes the content of the source: a changed file has another key.
_memory: dict[str, Rendered] = {}


def _remember(key: str, rendered: Rendered) -> Rendered:
    _memory.pop(key, None)
    _memory[key] = rendered
    for oldest in list(_memory)[:-REMEMBERED]:
        del _memory[oldest]
    return rendered


def _rendered(
    stage_inputs: Mapping[str, object], cfg: DatasetConfig, seed: int, mounted: bool, column: str | None = None
) -> Rendered:
    """Return the examples from memory, or render them. They are rendered again for a column that is not in memory."""
    key = key_of(stage_inputs)
    known = _memory.get(key)
    if known is None or (column is not None and column not in known.subgroups):
        commit = None if _is_on_this_machine(cfg.name_or_path) else str(stage_inputs["source"])
        known = render_examples(cfg, seed, commit, mounted=mounted, column=column)
    return _remember(key, known)


def _read(folder: Path) -> Splits:
    return {name: Example.read(folder / f"{name}.jsonl") for name in SPLITS}


def _is_on_this_machine(name: str) -> bool:
    return name.startswith("generate:") or Path(name).exists()


def _identity(cfg: DatasetConfig) -> dict[str, str] | str:
    """Return what identifies the content of a source: hashes of its files, or a commit of the hub."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        package = Path(__file__).parent / "vignettes"
        return {file.name: digest(file) for file in sorted(package.glob("*.py"))}
    if Path(name).exists():
        return {file.name: digest(file) for shards in sources.files(Path(name)).values() for file in shards}
    from sftlab.model.hub import dataset_commit

    return dataset_commit(name, cfg.revision)
