"""Divide rows into train, validation and test by seed, without separating the rows of a group."""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sftlab.config import SourceConfig
from sftlab.errors import ConfigError, Problem, shown
from sftlab.records import Example

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

Splits = Mapping[str, Sequence[Example]]
"""The examples of each split, in the order in which they were drawn."""


class Labels(NamedTuple):
    """The group and the stratum of each row, which decide about its split, and its subgroup. None: it has none."""

    groups: list[str | None]
    strata: list[str | None]
    subgroups: list[str | None]


class Drawn(NamedTuple):
    """The rows of a split: the split of the source that they come from, and their numbers in it, from 0."""

    source: str
    rows: list[int]


def draw(source: Mapping[str, Labels], cfg: SourceConfig, key: str = "dataset") -> dict[str, Drawn]:
    """Return the three splits: those that the source has, and the missing ones cut from its training rows by seed.

    Splits of the source are used whole: a share has no effect on them, and a count is the least number of rows that
    they must have. Rows of a group stay together, so a share may miss its size by a group.

    Args:
        source: the labels of the rows by split of the source; ``all`` if it has a single split.
        cfg: the source, with the shares or counts of ``split``, and the seed.
        key: its section in the configuration.

    Raises:
        ConfigError: ``split`` asks for more rows than there are.
    """
    if "all" in source:
        wanted = {str(name): size for name, size in cfg.split.items() if size}
        return {name: Drawn("all", []) for name in SPLITS} | _cut("all", source["all"], wanted, cfg, key)
    own = {name: Drawn(name, [*range(len(source[name].groups))] if name in source else []) for name in SPLITS}
    lacking = {str(name): size for name, size in cfg.split.items() if size and not own[name].rows and name != "train"}
    asked = {str(name): int(size) for name, size in cfg.split.items() if size >= 1}
    needed = asked | {"train": sum(count for name, count in asked.items() if name == "train" or name in lacking)}
    if any(len(own[name].rows) < needed.get(name, 0) for name in SPLITS if name not in lacking):
        raise _too_few(asked, own, cfg, key)
    splits = own | (_cut("train", source["train"], lacking, cfg, key) if lacking and own["train"].rows else {})
    if any(len(splits[name].rows) < count for name, count in asked.items()):
        raise _too_few(asked, splits, cfg, key)
    if any(len(splits[name].rows) > count for name, count in asked.items()):
        log.info(
            "%s.split={%s}: %s has its own splits, which are used whole: %s",
            key,
            _sizes(cfg),
            cfg.name_or_path,
            counts_of({name: drawn.rows for name, drawn in splits.items()}),
        )
    return splits


def cap(splits: Mapping[str, Drawn], max_rows: int | None, seed: int, key: str) -> dict[str, Drawn]:
    """Draw at most ``max_rows`` rows over all splits. Each split keeps its share, and at least one row.

    Raises:
        ConfigError: there are more splits than ``max_rows``.
    """
    total = sum(len(drawn.rows) for drawn in splits.values())
    if max_rows is None or total <= max_rows:
        return dict(splits)
    shares = {name: len(drawn.rows) * max_rows / total for name, drawn in splits.items() if drawn.rows}
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
    capped = {name: Drawn(drawn.source, []) for name, drawn in splits.items()}
    for name, count in counts.items():
        source, rows = splits[name]
        sample = sorted(random.Random(f"{seed} {name}").sample(range(len(rows)), count))
        capped[name] = Drawn(source, [rows[index] for index in sample])
    return capped


def divided_groups(splits: Mapping[str, Drawn], source: Mapping[str, Labels], key: str) -> list[Problem]:
    """Return a problem for each group with rows in two splits, which is possible in splits of the source only."""
    home: dict[str, str] = {}
    problems = []
    for name, drawn in splits.items():
        groups = source[drawn.source].groups if drawn.rows else []
        for group in dict.fromkeys(group for row in drawn.rows if (group := groups[row])):
            if home.setdefault(group, name) != name:
                problems.append(
                    Problem(
                        f"{key}.group_by",
                        None,
                        f"the source has rows of group {group!r} in {home[group]} and in {name}",
                        f"move them into one split, or set {key}.group_by=null",
                    )
                )
    return problems


def counts_of(splits: Mapping[str, Sequence[object]]) -> str:
    """Return the numbers of rows as they are logged: "320 train, 48 validation, 200 test"."""
    return ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS)


def _cut(source: str, labels: Labels, wanted: Mapping[str, float], cfg: SourceConfig, key: str) -> dict[str, Drawn]:
    """Draw splits (shares or counts) from rows. ``train`` gets the remaining rows, or as many of them as asked for."""
    total = len(labels.groups)
    members: dict[str | int, list[int]] = {}
    for row, group in enumerate(labels.groups):
        members.setdefault(group or row, []).append(row)
    strata = _strata(members, labels.strata)
    random.Random(cfg.seed).shuffle(order := list(members))
    queues = {stratum: deque[str | int]() for stratum in dict.fromkeys(strata.values())}
    for name in order:
        queues[strata[name]].append(name)
    counts = {name: max(round(size * total) if size < 1 else int(size), 1) for name, size in wanted.items()}

    def draw(count: int, *, last: bool) -> list[int]:
        sizes = {stratum: sum(len(members[group]) for group in queue) for stratum, queue in queues.items()}
        drawn: list[int] = []
        for stratum, share in _shares_of(count, sizes).items():
            queue, rows = queues[stratum], list[int]()
            while queue and len(rows) < share:
                rows += members[queue.pop() if last else queue.popleft()]
            drawn += rows
        return drawn

    rows = {name: draw(count, last=True) for name, count in counts.items() if name != "train"}
    _warn_of_large_groups(rows, labels.groups, counts, total, key)
    shares = all(size < 1 for size in wanted.values())
    rest = shares and sum(wanted.values()) > 1 - 1e-9  # then train absorbs the rounding
    rows["train"] = draw(total if rest else counts.get("train", total), last=False)
    if len(queues) > 1:  # one stratum after the other was drawn
        for name, numbers in rows.items():
            random.Random(f"{cfg.seed} {name}").shuffle(numbers)
    if not shares:
        _check_counts(counts, rows, total, cfg, key)
    return {name: Drawn(source, numbers) for name, numbers in rows.items()}


def _strata(members: Mapping[str | int, list[int]], strata: Sequence[str | None]) -> dict[str | int, str | None]:
    """Return the stratum of each group: the one that most of its rows are in, and of several the first."""
    if not any(strata):
        return dict.fromkeys(members)
    return {group: Counter(strata[row] for row in rows).most_common(1)[0][0] for group, rows in members.items()}


def _shares_of(count: int, sizes: Mapping[str | None, int]) -> dict[str | None, int]:
    """Divide a number of rows among strata in proportion to their sizes; the largest remainders are rounded up."""
    total = sum(sizes.values())
    if count >= total:
        return dict(sizes)
    exact = {stratum: count * size / total for stratum, size in sizes.items()}
    shares = {stratum: int(share) for stratum, share in exact.items()}
    for stratum in sorted(exact, key=lambda stratum: shares[stratum] - exact[stratum])[: count - sum(shares.values())]:
        shares[stratum] += 1
    return shares


def _warn_of_large_groups(
    splits: Mapping[str, list[int]], groups: Sequence[str | None], counts: Mapping[str, int], total: int, key: str
) -> None:
    for name, drawn in splits.items():
        sizes = Counter(group for row in drawn if (group := groups[row]))
        group, size = max(sizes.items(), key=lambda item: item[1], default=("", 0))
        if len(drawn) > 1.5 * counts[name] and size > 1:
            log.warning(
                "%s.group_by: rows of a group stay together, and %s of %s rows are of group %r: %s has %s rows in "
                "place of %s. If %r means that a row has no group, render nothing for it: {{ none if COLUMN == %r else "
                "COLUMN }}",
                key,
                f"{size:,}",
                f"{total:,}",
                group,
                name,
                f"{len(drawn):,}",
                f"{counts[name]:,}",
                group,
                group,
            )


def _check_counts(
    counts: Mapping[str, int], splits: Mapping[str, list[int]], rows: int, cfg: SourceConfig, key: str
) -> None:
    """Raise an error if a split has fewer rows than asked for, or if train, which gets the rest, has none."""
    counts = {name: count for name in SPLITS if (count := counts.get(name, int(name == "train")))}
    short = [name for name, count in counts.items() if len(splits[name]) < count]
    if not short:
        return
    asked = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    there = f"{cfg.name_or_path} has {rows:,} of them" + (" after keep" if cfg.keep else "")
    total = sum(counts.values())
    value, message = f"{{{_sizes(cfg)}}}", f"asks for {total:,} rows ({asked}), and"
    if total > rows:
        remedy = f"ask for at most {rows:,} in total, or for shares (below 1)"
        if cfg.keep and cfg.name_or_path.startswith("generate:"):
            remedy = f"change {key}.keep so that it is true for more generated rows, or set it to null"
        raise ConfigError(Problem(f"{key}.split", value, f"{message} {there}", remedy))
    drawn = ", ".join(f"{len(splits[name]):,} {name}" for name in counts)
    raise ConfigError(
        Problem(
            f"{key}.split",
            value,
            f"{message} rows of a group stay together, so that {there}, in {drawn}",
            f"ask for at most {len(splits[short[0]]):,} {short[0]} rows, or for shares (below 1)",
        )
    )


def _too_few(asked: Mapping[str, int], splits: Mapping[str, Drawn], cfg: SourceConfig, key: str) -> ConfigError:
    counts = ", ".join(f"{count:,} {name}" for name, count in asked.items())
    return ConfigError(
        Problem(
            f"{key}.split",
            f"{{{_sizes(cfg)}}}",
            f"asks for {counts} rows, and {cfg.name_or_path} has its own splits with "
            f"{counts_of({name: drawn.rows for name, drawn in splits.items()})}{' after keep' if cfg.keep else ''}",
            f"set {key}.split={{train: 0.8, validation: 0.1, test: 0.1}}: splits of the source are "
            "then used whole, and the others are cut from train",
        )
    )


def _sizes(cfg: SourceConfig) -> str:
    return ", ".join(f"{name}: {size:g}" for name, size in cfg.split.items())
