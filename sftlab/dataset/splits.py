"""Divide examples into train, validation and test by seed, without separating the rows of a group."""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from sftlab.config import DatasetConfig
from sftlab.errors import ConfigError, Problem, shown
from sftlab.records import Example

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

Splits = dict[str, list[Example]]
"""The examples of each split, in the order in which they were drawn."""


def split_examples(source: Mapping[str, list[Example]], cfg: DatasetConfig, seed: int) -> Splits:
    """Return the three splits: those that the source has, and the missing ones cut from its training rows by seed.

    Splits of the source are used whole: a share has no effect on them, and a count is the least number of rows that
    they must have. Rows of a group stay together, so a share may miss its size by a group.

    Args:
        source: the examples by split of the source; ``all`` if it has a single split.
        cfg: the dataset, with the shares or counts of ``split``.
        seed: seed of the drawing.

    Raises:
        ConfigError: ``split`` asks for more rows than there are.
    """
    if "all" in source:
        wanted = {str(name): size for name, size in cfg.split.items() if size}
        return {name: [] for name in SPLITS} | _cut(source["all"], wanted, cfg, seed)
    own = {name: list(source.get(name, [])) for name in SPLITS}
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
            "dataset.split={%s}: %s has its own splits, which are used whole: %s",
            _sizes(cfg),
            cfg.name_or_path,
            counts_of(splits),
        )
    return splits


def cap(splits: Splits, max_rows: int | None, seed: int, key: str) -> Splits:
    """Draw at most ``max_rows`` rows over all splits. Each split keeps its share, and at least one row.

    Raises:
        ConfigError: there are more splits than ``max_rows``.
    """
    total = sum(map(len, splits.values()))
    if max_rows is None or total <= max_rows:
        return splits
    shares = {name: len(rows) * max_rows / total for name, rows in splits.items() if rows}
    if max_rows < len(shares):
        raise ConfigError(
            Problem(
                key,
                shown(max_rows),
                f"is less than one row for each of {', '.join(shares)}",
                f"set at least {len(shares)}",
            )
        )
    counts = {name: max(1, int(share)) for name, share in shares.items()}
    # Rows left by rounding down go to the largest remainders; a split that got a row above its share gives one back.
    for name in sorted(shares, key=lambda name: int(shares[name]) - shares[name]):
        counts[name] += sum(counts.values()) < max_rows
    while sum(counts.values()) > max_rows:
        counts[max(counts, key=lambda name: counts[name])] -= 1
    capped: Splits = {name: [] for name in splits}
    for name, count in counts.items():
        drawn = sorted(random.Random(f"{seed} {name}").sample(range(len(splits[name])), count))
        capped[name] = [splits[name][index] for index in drawn]
    return capped


def divided_groups(splits: Mapping[str, Sequence[Example]], key: str) -> list[Problem]:
    """Return a problem for each group with rows in two splits, which is possible in splits of the source only."""
    home: dict[str, str] = {}
    problems = []
    for name, rows in splits.items():
        for group in dict.fromkeys(example.group for example in rows if example.group):
            if home.setdefault(group, name) != name:
                problems.append(  # noqa: PERF401
                    Problem(
                        f"{key}.group_by",
                        None,
                        f"the source has rows of group {group!r} in {home[group]} and in {name}",
                        f"move them into one split, or set {key}.group_by=null",
                    )
                )
    return problems


def counts_of(splits: Mapping[str, Sequence[Example]]) -> str:
    """Return the numbers of rows as they are logged: "320 train, 48 validation, 200 test"."""
    return ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS)


def _cut(rows: list[Example], wanted: Mapping[str, float], cfg: DatasetConfig, seed: int) -> Splits:
    """Draw splits (shares or counts) from rows. ``train`` gets the remaining rows, or as many of them as asked for."""
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
    _warn_of_large_groups(splits, counts, len(rows))
    shares = all(size < 1 for size in wanted.values())
    rest = shares and sum(wanted.values()) > 1 - 1e-9  # then train absorbs the rounding
    splits["train"] = draw(len(rows) if rest else counts.get("train", len(rows)), order.popleft)
    if not shares:
        _check_counts(counts, splits, rows, cfg)
    return splits


def _warn_of_large_groups(splits: Splits, counts: Mapping[str, int], total: int) -> None:
    for name, drawn in splits.items():
        sizes = Counter(example.group for example in drawn if example.group)
        group, size = max(sizes.items(), key=lambda item: item[1], default=("", 0))
        if len(drawn) > 1.5 * counts[name] and size > 1:
            log.warning(
                "dataset.group_by: rows of a group stay together, and %s of %s rows are of group %r: %s has %s rows in "
                "place of %s. If %r means that a row has no group, render nothing for it: {{ none if COLUMN == %r else "
                "COLUMN }}",
                f"{size:,}",
                f"{total:,}",
                group,
                name,
                f"{len(drawn):,}",
                f"{counts[name]:,}",
                group,
                group,
            )


def _check_counts(counts: Mapping[str, int], splits: Splits, rows: list[Example], cfg: DatasetConfig) -> None:
    """Raise an error if a split has fewer rows than asked for, or if train, which gets the rest, has none."""
    counts = {name: count for name in SPLITS if (count := counts.get(name, int(name == "train")))}
    short = [name for name, count in counts.items() if len(splits[name]) < count]
    if not short:
        return
    asked = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    there = f"{cfg.name_or_path} has {len(rows):,} of them" + (" after keep" if cfg.keep else "")
    total = sum(counts.values())
    value, message = f"{{{_sizes(cfg)}}}", f"asks for {total:,} rows ({asked}), and"
    if total > len(rows):
        remedy = f"ask for at most {len(rows):,} in total, or for shares (below 1)"
        if cfg.keep and cfg.name_or_path.startswith("generate:"):
            remedy = "change dataset.keep so that it is true for more generated rows, or set it to null"
        raise ConfigError(Problem("dataset.split", value, f"{message} {there}", remedy))
    drawn = ", ".join(f"{len(splits[name]):,} {name}" for name in counts)
    raise ConfigError(
        Problem(
            "dataset.split",
            value,
            f"{message} rows of a group stay together, so that {there}, in {drawn}",
            f"ask for at most {len(splits[short[0]]):,} {short[0]} rows, or for shares (below 1)",
        )
    )


def _too_few(asked: Mapping[str, int], splits: Mapping[str, list[Example]], cfg: DatasetConfig) -> ConfigError:
    counts = ", ".join(f"{count:,} {name}" for name, count in asked.items())
    return ConfigError(
        Problem(
            "dataset.split",
            f"{{{_sizes(cfg)}}}",
            f"asks for {counts} rows, and {cfg.name_or_path} has its own splits with "
            f"{counts_of(splits)}{' after keep' if cfg.keep else ''}",
            "set dataset.split={train: 0.8, validation: 0.1, test: 0.1}: splits of the source are "
            "then used whole, and the others are cut from train",
        )
    )


def _sizes(cfg: DatasetConfig) -> str:
    return ", ".join(f"{name}: {size:g}" for name, size in cfg.split.items())
