"""Rows from a file, a folder, the hub or the embedded generator → examples in train, validation and test."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from sftlab.config import DatasetConfig
from sftlab.dataset import sources
from sftlab.dataset.formats import Rows
from sftlab.dataset.prompt import Templates, packages
from sftlab.dataset.rows import is_null, listing, plain, wrap
from sftlab.dataset.sources import Source
from sftlab.errors import ConfigError
from sftlab.records import Example
from sftlab.runtime.store import Stage, Store, digest, key_of, versions

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SHOWN = 20  # problems of rows that are put in words
PATIENCE = 20  # seconds after which reading ends where so many rows have problems: a slow pattern is slow in each


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
        "version": 5,
        "dataset": settings,
        "seed": seed,
        "mounted": mounted,
        "source": _identity(cfg),
        "libraries": versions(*packages(cfg)),
    }


def revision(cfg: DatasetConfig) -> str | None:
    """The commit that a dataset from the hub has now; None for any other."""
    return None if _is_here(cfg.name_or_path) else _identity(cfg)


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


def read(store: Store, inputs: dict[str, Any]) -> dict[str, list[Example]]:
    """All three splits of a finished stage."""
    folder = store.path("dataset", inputs)
    return {name: Example.read(folder / f"{name}.jsonl") for name in SPLITS}


def examples(
    cfg: DatasetConfig, seed: int, *, mounted: bool = False, column: str | None = None
) -> dict[str, list[Example]]:
    """All three splits, made in memory. ``column`` (eval.group_by) gives test rows their subgroup.

    A source is read and rendered once per process as long as its content and settings are the same.

    Raises:
        ConfigError: nothing to read, rows that do not fit (all of them, the first 20 in words), or too few rows.
    """
    name = key_of(inputs(cfg, seed, mounted=mounted))
    known, splits = _last.get(name, ("", {}))
    if not splits or column not in (None, known):
        splits = _made(cfg, seed, mounted=mounted, column=column)
        _last.pop(name, None)
        _last[name] = column, splits
        for oldest in list(_last)[:-2]:  # a run has a dataset, and perhaps a mounted one
            del _last[oldest]
    elif known is not None and column is None:
        splits = {split: [replace(example, subgroup=None) for example in rows] for split, rows in splits.items()}
    return {split: list(rows) for split, rows in splits.items()}


_last: dict[str, tuple[str | None, dict[str, list[Example]]]] = {}


def _made(cfg: DatasetConfig, seed: int, *, mounted: bool, column: str | None) -> dict[str, list[Example]]:
    key = "eval.dataset" if mounted else "dataset"
    source = _read(cfg, seed, key)
    if not any(map(any, source.splits.values())):
        _refuse(source.problems)
        raise ConfigError(f"{key}.name_or_path={cfg.name_or_path!r}: has no rows; give a source with at least one")
    sources.whole_numbers(source.splits)
    if column is not None:
        _check_column(column, source.splits)
    made = _examples(source, cfg, key, column)
    if not any(made.values()):
        raise ConfigError(
            f"{key}.keep={cfg.keep!r}: lets none of {sum(map(len, source.splits.values())):,} rows through; change it"
        )
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
                f"change {key}.split{f', {key}.group_by' if cfg.group_by else ''} or {key}.max_rows, or give a source "
                "that has them"
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


def _is_here(name: str) -> bool:
    return name.startswith("generate:") or Path(name).exists()


def _identity(cfg: DatasetConfig) -> Any:
    """What tells one content of a source from another: hashes of files, or a hub commit."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        package = Path(__file__).parent / "vignettes"
        return {file.name: digest(file) for file in sorted(package.glob("*.py"))}
    if Path(name).exists():
        return {file.name: digest(file) for shards in sources.files(Path(name)).values() for file in shards}
    from sftlab.model.hub import dataset_commit

    return dataset_commit(name, cfg.revision)


def _read(cfg: DatasetConfig, seed: int, key: str) -> Source:
    """The rows of a source by its own splits; a source with one split calls it ``all``."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        return Source({"all": _generated(cfg, seed, key)}, [])
    if Path(name).exists():
        return sources.read(Path(name))
    from sftlab.model.hub import dataset_commit, dataset_rows

    # Not what a branch is a moment later.
    return sources.read_hub(name, dataset_rows(name, cfg.subset, dataset_commit(name, cfg.revision)))


def _generated(cfg: DatasetConfig, seed: int, key: str) -> Rows:
    """As many rows as the splits ask for; where ``keep`` leaves rows out, more are generated."""
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
        raise ConfigError(f"{key}.split={cfg.split}: {error}") from error
    return [*rows]


def _check_column(column: str, splits: Mapping[str, Rows]) -> None:
    home = next(rows for name in ("test", "all", "train", *splits) if (rows := splits.get(name)))
    columns = _columns(home)
    if column not in columns:
        raise ConfigError(f"eval.group_by={column!r}: there is no such column; the test rows have {listing(columns)}")


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(column for row in rows if row for column in row))


def _subgroup(value: Any) -> str | None:
    if is_null(value) or not str(value).strip():
        return None
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, default=str)


def _examples(source: Source, cfg: DatasetConfig, key: str, column: str | None) -> dict[str, list[Example]]:
    """The examples of every split.

    Raises:
        ConfigError: rows that cannot be read or do not fit, all of them.
    """
    compiled = _templates(source, cfg, key)
    made: dict[str, list[Example]] = {}
    problems, started = list(source.problems), monotonic()
    first: dict[str, str] = {}
    for split, rows in source.splits.items():
        made[split] = []
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
            except RecursionError:
                problems.append(f"{place}: has lists or objects nested too deeply; fix or delete it")
                continue
            except ConfigError as error:
                problems += map(str, error.problems)
                if len(problems) >= SHOWN and monotonic() - started > PATIENCE:
                    _refuse(problems, f"; the rows after {at} were not read")
                continue
            if (other := first.setdefault(example.id, at)) is not at:
                problems.append(
                    f"{place}: two rows have the id {example.id!r}, the other is {other}; fix {key}.id, or set it to "
                    "null"
                )
            made[split].append(replace(example, subgroup=_subgroup(values.get(column))) if column else example)
    _refuse(problems)
    rows_made = [example for rows in made.values() for example in rows]
    if cfg.group_by is not None and rows_made and not any(example.group for example in rows_made):
        raise ConfigError(
            f"{key}.group_by={cfg.group_by!r}: gives no row a group; name a column that has values, or set it to null"
        )
    return made


def _templates(source: Source, cfg: DatasetConfig, key: str) -> dict[str, Templates]:
    """The templates for every split with rows; splits may have different columns."""
    found: dict[str, Templates] = {}
    problems: list[str] = []
    for split, rows in source.splits.items():
        try:
            if any(rows):
                found[split] = Templates(cfg, key, _columns(rows))
        except ConfigError as error:
            problems += map(str, error.problems)
    if problems:
        try:
            _refuse(source.problems)
        except ConfigError as error:
            problems += map(str, error.problems)
        raise ConfigError(*problems)
    return found


def _refuse(problems: list[str], end: str = "") -> None:
    """Raise one error for all problems, the first of them in words."""
    if not problems:
        return
    if len(problems) == 1:
        raise ConfigError(problems[0])
    more = f"\n    … and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
    raise ConfigError(
        f"{len(problems):,} problems in the rows{end}:" + "".join(f"\n    {line}" for line in problems[:SHOWN]) + more
    )


def _unique_groups(splits: Mapping[str, list[Example]], key: str) -> None:
    """A source's own splits may break what a cut keeps: that rows of a group are in one split."""
    home: dict[str, str] = {}
    problems = []
    for name, rows in splits.items():
        for group in dict.fromkeys(example.group for example in rows if example.group):
            if home.setdefault(group, name) != name:
                problems.append(  # noqa: PERF401
                    f"{key}.group_by: the source has rows of group {group!r} in {home[group]} and in {name}; "
                    f"move them into one split, or set {key}.group_by=null"
                )
    _refuse(problems)


def _split(made: Mapping[str, list[Example]], cfg: DatasetConfig, seed: int) -> dict[str, list[Example]]:
    """The three splits: the source's own, and what it lacks cut from its rows by seed.

    The source's own splits are used whole: a share of one does not count, a count must not be larger.
    Rows that share a group stay together, so a share may miss its size by a group.

    Raises:
        ConfigError: splits ask for more rows than there are.
    """
    if "all" in made:
        wanted = {str(name): size for name, size in cfg.split.items() if size}
        return {name: [] for name in SPLITS} | _cut(made["all"], wanted, cfg, seed)
    own = {name: list(made.get(name, [])) for name in SPLITS}
    lacking = {str(name): size for name, size in cfg.split.items() if size and not own[name] and name != "train"}
    asked = {str(name): int(size) for name, size in cfg.split.items() if size >= 1}
    needed = asked | {"train": sum(count for name, count in asked.items() if name == "train" or name in lacking)}
    if any(len(own[name]) < needed.get(name, 0) for name in SPLITS if name not in lacking):
        raise _too_few(asked, own, cfg)
    splits = own | (_cut(own["train"], lacking, cfg, seed) if lacking and own["train"] else {})
    if any(len(splits[name]) < count for name, count in asked.items()):
        raise _too_few(asked, splits, cfg)
    if any(len(splits[name]) > count for name, count in asked.items()):
        log.info(
            "dataset.split={%s}: %s has splits of its own, which are used whole: %s",
            _asked(cfg), cfg.name_or_path, ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS),
        )  # fmt: skip
    return splits


def _too_few(asked: Mapping[str, int], splits: Mapping[str, list[Example]], cfg: DatasetConfig) -> ConfigError:
    counts = ", ".join(f"{count:,} {name}" for name, count in asked.items())
    there = ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS)
    return ConfigError(
        f"dataset.split={{{_asked(cfg)}}}: asks for {counts} rows, and {cfg.name_or_path} has splits of its own with "
        f"{there}{' after keep' if cfg.keep else ''}; set dataset.split={{train: 0.8, validation: 0.1, test: 0.1}}: "
        "splits that the source has are then used whole, and others are cut from train"
    )


def _asked(cfg: DatasetConfig) -> str:
    return ", ".join(f"{name}: {size:g}" for name, size in cfg.split.items())


def _cut(rows: list[Example], wanted: Mapping[str, float], cfg: DatasetConfig, seed: int) -> dict[str, list[Example]]:
    """Draw the wanted splits (shares or counts) from rows; ``train`` is what is left, or as much of it as is wanted."""
    groups: dict[str, list[Example]] = {}
    for example in rows:
        groups.setdefault(f"group {example.group}" if example.group else f"row {example.id}", []).append(example)
    shuffled = list(groups)
    random.Random(seed).shuffle(shuffled)
    order = deque(shuffled)
    counts = {name: max(round(size * len(rows)) if size < 1 else int(size), 1) for name, size in wanted.items()}

    def draw(count: int, take: Callable[[], str]) -> list[Example]:
        drawn: list[Example] = []
        while order and len(drawn) < count:
            drawn += groups[take()]
        return drawn

    splits = {name: draw(count, order.pop) for name, count in counts.items() if name != "train"}
    for name, drawn in splits.items():
        sizes = Counter(example.group for example in drawn if example.group)
        group, size = max(sizes.items(), key=lambda item: item[1], default=("", 0))
        if len(drawn) > 1.5 * counts[name] and size > 1:
            log.warning(
                "dataset.group_by: rows of a group stay together, and %s of %s rows are of group %r: %s has %s rows in "
                "place of %s. If %r stands for no group, write none for it: {{ none if COLUMN == %r else COLUMN }}",
                f"{size:,}", f"{len(rows):,}", group, name, f"{len(drawn):,}", f"{counts[name]:,}", group, group,
            )  # fmt: skip
    shares = all(size < 1 for size in wanted.values())
    rest = shares and sum(wanted.values()) > 1 - 1e-9  # then rounding is train's
    splits["train"] = draw(len(rows) if rest else counts.get("train", len(rows)), order.popleft)
    if not shares:
        _enough(counts, splits, rows, cfg)
    return splits


def _enough(
    counts: Mapping[str, int], splits: Mapping[str, list[Example]], rows: list[Example], cfg: DatasetConfig
) -> None:
    """See whether every split has the rows that it asks for, and train has one where it asks for the rest."""
    counts = {name: count for name in SPLITS if (count := counts.get(name, int(name == "train")))}
    short = [name for name, count in counts.items() if len(splits[name]) < count]
    if not short:
        return
    split = _asked(cfg)
    asked = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    there = f"{cfg.name_or_path} has {len(rows):,} of them" + (" after keep" if cfg.keep else "")
    total = sum(counts.values())
    if total > len(rows):
        remedy = f"ask for at most {len(rows):,} together, or for shares (below 1)"
        if cfg.keep and cfg.name_or_path.startswith("generate:"):
            remedy = "let keep pass more of what is generated, or set it to null"
        raise ConfigError(f"dataset.split={{{split}}}: asks for {total:,} rows ({asked}), and {there}; {remedy}")
    drawn = ", ".join(f"{len(splits[name]):,} {name}" for name in counts)
    raise ConfigError(
        f"dataset.split={{{split}}}: asks for {total:,} rows ({asked}), and rows of a group stay together, so "
        f"that {there}, in {drawn}; ask for at most {len(splits[short[0]]):,} {short[0]} rows, or for shares (below 1)"
    )


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
