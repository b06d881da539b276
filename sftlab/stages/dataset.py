"""Rows from a file, a folder, the hub or the embedded generator → examples in train, validation and test."""

from __future__ import annotations

import csv
import json
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftlab.config import DatasetConfig
from sftlab.errors import ConfigError
from sftlab.prompt import Templates, packages
from sftlab.records import Example
from sftlab.store import Stage, Store, digest, versions

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
    settings = cfg.model_dump(exclude={"max_overlap", "allow_overlap"})  # these judge the rows and choose none
    return {
        "version": 2,
        "dataset": settings,
        "seed": seed,
        "mounted": mounted,
        "source": _identity(cfg),
        "libraries": versions(*packages(cfg)),
    }


def revision(cfg: DatasetConfig) -> str | None:
    """The commit that a dataset from the hub has now; None for any other."""
    found = _identity(cfg)
    return found if isinstance(found, str) else None


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


def examples(
    cfg: DatasetConfig, seed: int, *, mounted: bool = False, column: str | None = None
) -> dict[str, list[Example]]:
    """All three splits, made in memory. ``column`` (eval.group_by) gives test rows their subgroup."""
    key = "eval.dataset" if mounted else "dataset"
    sources = _read(cfg, seed, key)
    if not any(sources.values()):
        raise ConfigError(f"{key}.name_or_path={cfg.name_or_path!r}: has no rows; give a source with at least one")
    if column is not None:
        _check_column(column, sources)
    made = {name: _examples(rows, cfg, key, name, column) for name, rows in sources.items()}
    if not any(made.values()):
        raise ConfigError(f"{key}.keep={cfg.keep!r}: lets none of {sum(map(len, sources.values())):,} rows through")
    _unique_ids(made, cfg, key)
    if mounted:
        test = next(iter(made.values())) if len(made) == 1 else made.get("test", [])
        splits = {"train": [], "validation": [], "test": test}
    else:
        splits = _split(made, cfg, seed)
        _unique_groups(splits, key)
    splits = _cap(splits, cfg.max_rows, seed, f"{key}.max_rows")
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


def subgroups(cfg: DatasetConfig, seed: int, column: str, *, mounted: bool = False) -> dict[str, str | None]:
    """The value in a column of each test row, by its id.

    Read from the source again: a column of the test rows changes nothing of what is trained on, and is no part
    of the dataset's stage, whose key every later one depends on.

    Raises:
        ConfigError: there is no such column.
    """
    rows = examples(cfg, seed, mounted=mounted, column=column)["test"]
    return {row.id: row.subgroup for row in rows}


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
        try:
            return {"all": vignettes.rows(count, seed)}
        except ValueError as error:
            raise ConfigError(f"{key}.split={cfg.split}: {error}") from error
    if Path(name).exists():
        files = _files(Path(name))
        if not files:
            raise ConfigError(f"{key}.name_or_path={name!r}: holds no {', '.join(SUFFIXES)} file; check the path")
        return {split: [row for file in group for row in _rows(file)] for split, group in files.items()}
    from sftlab.hub import dataset_commit, dataset_rows

    splits = dataset_rows(name, cfg.subset, dataset_commit(name, cfg.revision))  # not what a branch is a moment later
    return _named({split: _dense_rows(rows) for split, rows in splits.items()})


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of a source by split: a file is one split, a folder has one for each name it knows.

    A split may come in shards, as on the hub (``train-00000-of-00002.parquet``).
    """
    if path.is_file():
        return {"all": [path]}
    shards: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if file.suffix in SUFFIXES:
            shards.setdefault(f"{_split_name(file.stem)}{file.suffix}", []).append(file)
    sources: dict[str, list[Path]] = {}
    for name, files in shards.items():
        if (stem := Path(name).stem) in sources:
            raise ConfigError(f"{path}: holds both {sources[stem][0].name} and {files[0].name}; keep one of them")
        sources[stem] = files
    return _named(sources)


def _split_name(name: str) -> str:
    """Our name of a split that a source calls ``name``; other names stay as they are."""
    start = name.split("-")[0].lower()
    return next((split for split, names in ALIASES.items() if start in names), name)


def _named(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Own split names → ours; a source whose only split is ``train`` (or has no known name) is cut by seed."""
    known = {_split_name(name): rows for name, rows in sources.items() if _split_name(name) in SPLITS}
    if set(known) - {"train"}:
        return known
    merged: list[Any] = []
    for rows in (known or sources).values():
        merged += rows
    return {"all": merged} if merged else {}


def _dense(value: Any) -> Any:
    """A cell of an Arrow table as it was before: a key that only other rows' objects have is null in this one's."""
    if isinstance(value, list):
        return [_dense(item) for item in value]
    if isinstance(value, dict):
        return {name: _dense(item) for name, item in value.items() if item is not None}
    return value


def _dense_rows(rows: Rows) -> Rows:
    return [{column: _dense(value) for column, value in row.items()} for row in rows]


def _rows(file: Path) -> Rows:
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
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
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{file}:{number}: is not JSON: {error}; mend or delete the line") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{file}:{number}: is JSON but no object of column → value; mend or delete the line")
            rows.append(row)
    return rows


def _json(file: Path) -> Rows:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # JSON lines under another name
            return _jsonl(file)
        raise ConfigError(f"{file}: is not JSON: {error}; mend the file") from error
    if isinstance(rows, dict):  # one object: perhaps a wrapper around the list of rows
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file}: is no list of objects; write a JSON array of rows, or one object a line (.jsonl)")
    return rows


def _csv(file: Path) -> Rows:
    """Rows of a CSV file with a header. Cells stay the text that they are."""
    csv.field_size_limit(2**31 - 1)  # rationales are long
    rows: Rows = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            header = list(reader.fieldnames or [])
            if len(set(header)) < len(header):
                raise ConfigError(f"{file}:1: two columns have the same name ({', '.join(header)}); rename one")
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(
                        f"{file}:{reader.line_num}: has not the {len(header)} cells of the header "
                        f"({', '.join(header)}); quote cells that hold a comma"
                    )
                rows.append(dict(row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as CSV in UTF-8: {error}; mend the file") from error
    return rows


def _parquet(file: Path) -> Rows:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        return _dense_rows(parquet.ParquetFile(file).read().to_pylist())
    except ArrowException as error:
        raise ConfigError(f"{file}: cannot be read as Parquet: {error}; mend the file") from error


def _check_column(column: str, sources: Mapping[str, Rows]) -> None:
    home = next(rows for name in ("test", "all", "train", *sources) if (rows := sources.get(name)))
    columns = list(dict.fromkeys(name for row in home for name in row))
    if column not in columns:
        raise ConfigError(f"eval.group_by={column!r}: there is no such column; the test rows have {', '.join(columns)}")


def _subgroup(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _examples(rows: Rows, cfg: DatasetConfig, key: str, split: str, column: str | None) -> list[Example]:
    if not rows:
        return []
    columns = list(dict.fromkeys(column for row in rows for column in row))
    templates = Templates(cfg, key, columns)
    made = []
    for number, row in enumerate(rows, start=1):
        place = f"{cfg.name_or_path}, {'' if split == 'all' else split + ' '}row {number}"
        if templates.keeps(row, place):
            example = templates.example(row, f"{split}-{number:06}", place)
            made.append(replace(example, subgroup=_subgroup(row.get(column))) if column is not None else example)
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


def _unique_groups(splits: Mapping[str, list[Example]], key: str) -> None:
    """A source's own splits may break what a cut keeps: that rows of a group are in one split."""
    home: dict[str, str] = {}
    for name, rows in splits.items():
        for group in {example.group for example in rows if example.group}:
            if home.setdefault(group, name) != name:
                raise ConfigError(
                    f"{key}.group_by: the source has rows of group {group!r} in {home[group]} and in {name}; "
                    f"move them into one split, or set {key}.group_by=null"
                )


def _split(made: Mapping[str, list[Example]], cfg: DatasetConfig, seed: int) -> dict[str, list[Example]]:
    """The three splits: the source's own, and what it lacks cut from its rows by seed.

    Rows that share a group stay together, so a split may miss its size by a group.
    """
    if "all" not in made:
        splits = {name: list(made.get(name, [])) for name in SPLITS}
        lacking = {str(name): size for name, size in cfg.split.items() if size and not splits[name] and name != "train"}
        if lacking and splits["train"]:
            splits |= _cut(splits["train"], lacking, seed)
        return splits
    wanted = {str(name): size for name, size in cfg.split.items() if size}
    return {name: [] for name in SPLITS} | _cut(made["all"], wanted, seed)


def _cut(rows: list[Example], wanted: Mapping[str, float], seed: int) -> dict[str, list[Example]]:
    """Draw the wanted splits (shares or counts) from rows; ``train`` is what is left, or as much of it as is wanted."""
    groups: dict[str, list[Example]] = {}
    for example in rows:
        groups.setdefault(f"group {example.group}" if example.group else f"row {example.id}", []).append(example)
    shuffled = list(groups)
    random.Random(seed).shuffle(shuffled)
    order = deque(shuffled)

    def draw(size: float, take: Callable[[], str]) -> list[Example]:
        count = max(round(size * len(rows)) if size < 1 else int(size), 1)
        drawn: list[Example] = []
        while order and len(drawn) < count:
            drawn += groups[take()]
        return drawn

    splits = {name: draw(size, order.pop) for name, size in wanted.items() if name != "train"}
    shares = all(size < 1 for size in wanted.values()) and sum(wanted.values()) > 1 - 1e-9  # then rounding is train's
    splits["train"] = draw(len(rows) if shares else wanted.get("train", len(rows)), order.popleft)
    return splits


def _cap(splits: dict[str, list[Example]], max_rows: int | None, seed: int, key: str) -> dict[str, list[Example]]:
    """At most ``max_rows`` rows over all splits, each keeping its share (and at least one row)."""
    total = sum(map(len, splits.values()))
    if max_rows is None or total <= max_rows:
        return splits
    shares = {name: len(rows) * max_rows / total for name, rows in splits.items() if rows}
    if max_rows < len(shares):
        raise ConfigError(
            f"{key}={max_rows}: is not even one row for each of {', '.join(shares)}; set at least {len(shares)}"
        )
    counts = {name: max(1, int(share)) for name, share in shares.items()}
    # What rounding down has left goes to the largest remainders; a split that got its one row for nothing repays.
    for name in sorted(shares, key=lambda name: int(shares[name]) - shares[name]):
        counts[name] += sum(counts.values()) < max_rows
    while sum(counts.values()) > max_rows:
        counts[max(counts, key=lambda name: counts[name])] -= 1
    capped: dict[str, list[Example]] = {name: [] for name in splits}
    for name, count in counts.items():
        drawn = sorted(random.Random(f"{seed} {name}").sample(range(len(splits[name])), count))
        capped[name] = [splits[name][index] for index in drawn]
    return capped
