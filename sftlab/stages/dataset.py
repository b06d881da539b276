"""Rows from a file, a folder, the hub or the embedded generator → examples in train, validation and test."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.config import DatasetConfig
from sftlab.errors import ConfigError
from sftlab.prompt import Templates
from sftlab.records import Example
from sftlab.store import Stage, Store, digest

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Names that sources give to their splits.
ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train",), "test": ("test",)}

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Dataset:
    """The finished stage and its examples: ``train``, ``validation`` and ``test``, each perhaps empty."""

    stage: Stage

    def split(self, name: str) -> list[Example]:
        """The examples of a split, in the order in which it was drawn."""
        return Example.read(self.stage.path / f"{name}.jsonl")


def inputs(cfg: DatasetConfig, seed: int, *, mounted: bool = False) -> dict[str, Any]:
    """What a dataset is made of: its settings, the seed and the content of its source."""
    return {"version": 1, "dataset": cfg.model_dump(), "seed": seed, "mounted": mounted, "source": _identity(cfg)}


def make(store: Store, cfg: DatasetConfig, seed: int, *, mounted: bool = False) -> Dataset:
    """The dataset's examples, from the store or made now.

    A ``mounted`` dataset is another one's test set (``eval.dataset``): of a source with only one
    split all rows are the test set.

    Raises:
        ConfigError: nothing to read, a row that does not fit, or a split without rows.
    """

    def build(folder: Path) -> None:
        splits = examples(cfg, seed, mounted=mounted)
        for name in SPLITS:
            Example.write(folder / f"{name}.jsonl", splits[name])
        log.info("dataset: %s", ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS))

    return Dataset(store.stage("dataset", inputs(cfg, seed, mounted=mounted), build))


def examples(cfg: DatasetConfig, seed: int, *, mounted: bool = False) -> dict[str, list[Example]]:
    """All three splits, made in memory."""
    key = "eval.dataset" if mounted else "dataset"
    sources = _read(cfg, seed, key)
    if not any(sources.values()):
        raise ConfigError(f"{key}.name_or_path={cfg.name_or_path!r}: has no rows; give a source with at least one")
    made = {name: _examples(rows, cfg, key, name) for name, rows in sources.items()}
    if not any(made.values()):
        raise ConfigError(f"{key}.keep={cfg.keep!r}: lets none of {sum(map(len, sources.values())):,} rows through")
    _unique_ids(made, cfg, key)
    if mounted:
        splits = {"train": [], "validation": [], "test": made.get("test") or made.get("all", [])}
    else:
        splits = _split(made, cfg, seed)
    splits = _cap(splits, cfg.max_rows, seed)
    for name in ("test",) if mounted else ("train", "validation"):
        if not splits[name]:
            raise ConfigError(
                f"{key}.split={cfg.split}: the {name} split of {cfg.name_or_path} has no rows; "
                f"change {key}.split or {key}.max_rows, or give a source that has them"
            )
    return splits


def test_rows(dataset: Dataset, max_rows: int | None, seed: int) -> list[Example]:
    """The test set, or a sample of it drawn by seed, in the order of the dataset."""
    rows = dataset.split("test")
    if max_rows is not None and max_rows < len(rows):
        drawn = sorted(random.Random(seed).sample(range(len(rows)), max_rows))
        rows = [rows[index] for index in drawn]
    return rows


def _identity(cfg: DatasetConfig) -> Any:
    """What tells one content of a source from another: hashes of files, or a hub commit."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        package = Path(__file__).parent.parent / "vignettes"
        return {file.name: digest(file) for file in sorted(package.glob("*.py"))}
    if Path(name).exists():
        return {file.name: digest(file) for files in _files(Path(name)).values() for file in files}
    from sftlab.hub import dataset_commit

    return dataset_commit(name, cfg.revision)


def _read(cfg: DatasetConfig, seed: int, key: str) -> dict[str, Rows]:
    """The rows of a source by its own splits; a source with one split calls it ``all``."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        from sftlab import vignettes

        count = sum(int(size) for size in cfg.split.values())
        return {"all": vignettes.rows(count, seed)}
    if Path(name).exists():
        files = _files(Path(name))
        if not files:
            raise ConfigError(f"{key}.name_or_path={name!r}: holds no {', '.join(SUFFIXES)} file")
        return {split: [row for file in group for row in _rows(file)] for split, group in files.items()}
    from sftlab.hub import dataset_rows

    return _named({str(split): rows for split, rows in dataset_rows(name, cfg.subset, cfg.revision).items()})


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of a source by split: a file is one split, a folder has one for each name it knows."""
    if path.is_file():
        return {"all": [path]}
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    return _named({file.stem: [file] for file in found})


def _named(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Own split names → ours; a source whose only split is ``train`` (or has no known name) is cut by seed."""
    known = {
        split: sources[name]
        for split, names in ALIASES.items()
        for name in sources
        if name.split("-")[0].lower() in names
    }
    if set(known) - {"train"}:
        return known
    merged: list[Any] = []
    for rows in (known or sources).values():
        merged += rows
    return {"all": merged} if merged else {}


def _rows(file: Path) -> Rows:
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _table,
        ".parquet": _table,
    }
    if file.suffix not in readers:
        raise ConfigError(f"{file}: is none of {', '.join(SUFFIXES)}; convert it, or rename it if it is one")
    if file.stat().st_size == 0:
        raise ConfigError(f"{file}: is empty; give a file with rows")
    return readers[file.suffix](file)


def _jsonl(file: Path) -> Rows:
    rows: Rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: is not JSON: {error}; mend or delete the line") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{file}:{number}: is JSON but no object of column → value; mend or delete the line")
            rows.append(row)
    return rows


def _json(file: Path) -> Rows:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines under another name
            return _jsonl(file)
        raise ConfigError(f"{file}: is not JSON: {error}; mend the file") from error
    if isinstance(rows, dict):  # one object: perhaps a wrapper around the list of rows
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file}: is no list of objects; write a JSON array of rows, or one object a line (.jsonl)")
    return rows


def _table(file: Path) -> Rows:
    from datasets import Dataset as Table
    from datasets.exceptions import DatasetGenerationError

    read = Table.from_csv if file.suffix == ".csv" else Table.from_parquet
    try:
        # Not cached by datasets: the store is this project's cache, and knows a file by its content.
        table = read(str(file), keep_in_memory=True)
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{file}: cannot be read as {file.suffix[1:]}: {cause}; mend the file") from error
    return [dict(row) for row in table]


def _examples(rows: Rows, cfg: DatasetConfig, key: str, split: str) -> list[Example]:
    if not rows:
        return []
    columns = list(dict.fromkeys(column for row in rows for column in row))
    templates = Templates(cfg, key, columns)
    made = []
    for number, row in enumerate(rows, start=1):
        place = f"{cfg.name_or_path}, {'' if split == 'all' else split + ' '}row {number}"
        if templates.keeps(row, place):
            made.append(templates.example(row, f"{split}-{number:06}", place))
    return made


def _unique_ids(made: Mapping[str, list[Example]], cfg: DatasetConfig, key: str) -> None:
    seen: set[str] = set()
    for rows in made.values():
        for example in rows:
            if example.id in seen:
                raise ConfigError(
                    f"{cfg.name_or_path}: two rows have the id {example.id!r}; mend {key}.id, or set it to null"
                )
            seen.add(example.id)


def _split(made: Mapping[str, list[Example]], cfg: DatasetConfig, seed: int) -> dict[str, list[Example]]:
    """The three splits: the source's own, and what it lacks cut from its rows by seed.

    Rows that share a group stay together, so a split may miss its size by a group.
    """
    if "all" not in made:
        splits = {name: list(made.get(name, [])) for name in SPLITS}
        lacking = {name: size for name, size in cfg.split.items() if size and not splits[name] and name != "train"}
        if lacking and splits["train"]:
            splits |= _cut(splits["train"], lacking, seed)
        return splits
    wanted = {name: size for name, size in cfg.split.items() if size and name != "train"}
    return {name: [] for name in SPLITS} | _cut(made["all"], wanted, seed)


def _cut(rows: list[Example], wanted: Mapping[str, float], seed: int) -> dict[str, list[Example]]:
    """Draw the wanted splits (shares or counts) from rows; what is left is ``train``."""
    groups: dict[str, list[Example]] = {}
    for example in rows:
        groups.setdefault(f"group {example.group}" if example.group else f"row {example.id}", []).append(example)
    order = list(groups)
    random.Random(seed).shuffle(order)
    splits: dict[str, list[Example]] = {}
    for name, size in wanted.items():
        count = round(size * len(rows)) if size < 1 else int(size)
        drawn: list[Example] = []
        while order and len(drawn) < max(count, 1):
            drawn += groups[order.pop()]
        splits[name] = drawn
    splits["train"] = [example for key in order for example in groups[key]]
    return splits


def _cap(splits: dict[str, list[Example]], max_rows: int | None, seed: int) -> dict[str, list[Example]]:
    """At most ``max_rows`` rows over all splits, each keeping its share (and at least one row)."""
    total = sum(map(len, splits.values()))
    if max_rows is None or total <= max_rows:
        return splits
    capped = {}
    for name, rows in splits.items():
        count = min(len(rows), max(1, round(len(rows) * max_rows / total)))
        drawn = sorted(random.Random(f"{seed} {name}").sample(range(len(rows)), count)) if rows else []
        capped[name] = [rows[index] for index in drawn]
    return capped
