"""The dataset stage: the examples of train, validation and test, rendered once and reused from the store."""

from __future__ import annotations

import atexit
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sftlab.config import DatasetConfig, RowSettings, SourceConfig
from sftlab.dataset import mixing, recognition, sources
from sftlab.dataset.arrow_examples import Examples
from sftlab.dataset.examples import Rendered, Subgroups, render_examples
from sftlab.dataset.splits import SPLITS, Splits, counts_of
from sftlab.dataset.templates import packages
from sftlab.errors import StageError
from sftlab.records import Example
from sftlab.results import RowFormat, SourceRecord
from sftlab.runtime.store import Stage, Store, digest, full, key_of, versions

log = logging.getLogger(__name__)

RETAINED = 6  # rendered datasets that a process retains: a run has one, and perhaps a mounted test set and guards
CHANGE_NO_ROW = ("max_overlap", "allow_overlap", "train_on", "scoring")


@dataclass(frozen=True)
class Dataset:
    """A finished dataset stage. A split may be empty."""

    stage: Stage

    def split(self, name: str) -> Examples:
        """Return the examples of a split, in the order in which they were drawn."""
        return Examples(self.stage.path / f"{name}.arrow")

    def for_training(self) -> dict[str, Examples]:
        """Return the examples of train and validation."""
        return {name: self.split(name) for name in ("train", "validation")}

    def row_format(self) -> RowFormat | None:
        """Return the recognised format of the rows; None if templates converted them, or of several sources."""
        return recognition.read(self.stage.path)

    def sources(self) -> list[SourceRecord]:
        """Return the sources that the dataset mixes; none without ``dataset.sources``."""
        return mixing.read(self.stage.path)

    def announce(self) -> None:
        """Log the recognised format, and a row as the model sees it; of each source if there are several."""
        mixing.announce(self.sources())
        if (found := self.row_format()) is not None:
            recognition.announce(found)

    def counts(self) -> str:
        """Return the numbers of rows as they are logged: "320 train, 48 validation, 200 test"."""
        return counts_of({name: self.split(name) for name in SPLITS})


def inputs(cfg: DatasetConfig, *, mounted: str | None = None) -> Mapping[str, object]:
    """Return the inputs of a dataset: its settings, the content of its source and library versions.

    ``mounted`` is the section of a test set of another dataset: ``eval.dataset``, or a guard. Messages name it.
    """
    parts = cfg.parts(mounted or "dataset")
    settings: object
    if cfg.sources is None:  # the key of a dataset with a single source is as before there were several
        settings = _settings(cfg, *CHANGE_NO_ROW, "sources")
    else:
        settings = [cfg.seed, *([part.name, _settings(part.cfg, "train_on")] for part in parts)]
    identities = {part.name: _identity(part.cfg, part.key) for part in parts}
    return {
        "version": 8,
        "dataset": settings,
        "mounted": mounted is not None,
        "source": identities[None] if cfg.sources is None else identities,
        "libraries": versions(*dict.fromkeys(package for part in parts for package in packages(part.cfg))),
    }


def _settings(cfg: RowSettings, *left_out: str) -> dict[str, object]:
    """The settings of a dataset or source. A new key without a value does not change the key of the stage."""
    values = cfg.model_dump(exclude=set(left_out))
    return {name: value for name, value in values.items() if name != "context" or value is not None}


def revision(cfg: SourceConfig, key: str) -> str | None:
    """Return the commit that a source from the hub has now; None for any other source. ``key`` is its section."""
    return None if _is_on_this_machine(cfg.name_or_path) else str(_identity(cfg, key))


def make(store: Store, cfg: DatasetConfig, *, mounted: str | None = None) -> Dataset:
    """Return the dataset stage, from the store or rendered now.

    A dataset that is ``mounted`` at a section is a test set of another one (``eval.dataset``, or a guard): if its
    source has a single split, all rows are test rows.

    Raises:
        ConfigError: there is nothing to read, a row does not fit, or a split has no rows.
    """
    stage_inputs = inputs(cfg, mounted=mounted)

    def build(folder: Path) -> None:
        if (known := _rendered.get(key_of(stage_inputs))) is not None:  # validation has rendered it
            for file in known.folder.iterdir():
                _copy(file, folder / file.name)
        else:
            _rendered_to(folder, cfg, stage_inputs, mounted, None)
        log.info("dataset: %s", counts_of({name: Examples(folder / f"{name}.arrow") for name in SPLITS}))

    return Dataset(store.stage("dataset", stage_inputs, build))


def load(store: Store, cfg: DatasetConfig, *, mounted: str | None = None, column: str | None = None) -> Splits:
    """Return all splits without writing to the store: from the finished stage, or rendered to a temporary folder.

    ``make`` reuses what was rendered here. ``column`` (eval.group_by) also reads the subgroups of the test rows, which
    are not part of the stage.

    Raises:
        ConfigError: there is nothing to read, rows do not fit, or a split has no rows.
    """
    stage_inputs = inputs(cfg, mounted=mounted)
    if column is None and store.has("dataset", stage_inputs):
        return Rendered(store.path("dataset", stage_inputs)).splits
    return _render(stage_inputs, cfg, mounted, column).splits


def subgroups(cfg: DatasetConfig, column: str, *, mounted: str | None = None) -> Subgroups:
    """Return the value of each test row in a column, by the row's id.

    The values are read from the source, since the stage does not contain them: training does not depend on them, and
    every later stage depends on the key of this one.

    Raises:
        ConfigError: there is no such column.
    """
    return _render(inputs(cfg, mounted=mounted), cfg, mounted, column).subgroups[column]


def test_rows(dataset: Dataset, max_rows: int | None, seed: int) -> list[Example]:
    """Return the test set, or a sample of it drawn by seed, in the order of the dataset."""
    return sample(dataset.split("test"), max_rows, seed)


def sample(rows: Sequence[Example], max_rows: int | None, seed: int) -> list[Example]:
    """Return all rows, or a sample of them drawn by seed, in their order."""
    if max_rows is None or max_rows >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), max_rows))]


# Datasets that this process has rendered to temporary folders, by the key of the stage, which hashes the content of
# the source: a changed file has another key.
_rendered: dict[str, Rendered] = {}


def _render(
    stage_inputs: Mapping[str, object], cfg: DatasetConfig, mounted: str | None, column: str | None
) -> Rendered:
    """Return the rendered examples. They are rendered again for a column whose subgroups are not known."""
    key = key_of(stage_inputs)
    known = _rendered.pop(key, None)
    if known is None or (column is not None and column not in known.subgroups):
        folder = Path(tempfile.mkdtemp(dir=_temporary()))
        try:
            known = _rendered_to(folder, cfg, stage_inputs, mounted, column)
        except OSError as error:
            if (reason := full(error)) is None:
                raise
            message = f"{folder}: cannot write the rendered rows: {reason}. Free some space, or set TMPDIR"
            raise StageError(message) from error
    _rendered[key] = known
    for oldest in list(_rendered)[:-RETAINED]:
        shutil.rmtree(_rendered.pop(oldest).folder)
    return known


def _rendered_to(
    folder: Path, cfg: DatasetConfig, stage_inputs: Mapping[str, Any], mounted: str | None, column: str | None
) -> Rendered:
    """Render a dataset, or mix its sources, at the commits of the stage's inputs."""
    parts, identities = cfg.parts(), stage_inputs["source"]
    if cfg.sources is None:
        commit = None if _is_on_this_machine(parts[0].cfg.name_or_path) else str(identities)
        return render_examples(parts[0].cfg, commit, folder, mounted=mounted, column=column)
    commits = {
        part.name: None if _is_on_this_machine(part.cfg.name_or_path) else str(identities[part.name]) for part in parts
    }
    return mixing.render_mix(cfg, commits, folder, mounted=mounted, column=column)


@cache
def _temporary() -> str:
    folder, process = tempfile.mkdtemp(prefix="sftlab-rows-"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # and not in a process that this one forked
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _copy(file: Path, target: Path) -> None:
    """Copy a file that is never changed: link it where the file system allows that."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)


def _is_on_this_machine(name: str) -> bool:
    return name.startswith("generate:") or Path(name).exists()


def _identity(cfg: SourceConfig, key: str) -> dict[str, str] | str:
    """Return what identifies the content of a source: hashes of its files, or a commit of the hub."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        package = Path(__file__).parent / name.removeprefix("generate:")
        return {file.name: digest(file) for file in sorted(package.glob("*.py"))}
    if Path(name).exists():
        return {file.name: digest(file) for shards in sources.files(Path(name)).values() for file in shards}
    from sftlab.model.hub import dataset_commit

    return dataset_commit(name, cfg.revision, f"{key}.name_or_path")
