#!/usr/bin/env python
"""Time the search for leakage between the splits on random rows, with CPU time and memory, beside plain Python dicts.

The rows lie in files and are read when they are needed, so that the memory is that of the search.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import ParamSpec, TypeVar, overload

import numpy as np

from sftlab.dataset import overlap
from sftlab.records import Example, single_turn

SHARES = {"test": 0.05, "validation": 0.05, "train": 0.9}
MAX_OVERLAP = 0.8


P = ParamSpec("P")
T = TypeVar("T")


class Rows(Sequence[Example]):
    """Rows in a file with a text per line."""

    def __init__(self, path: Path) -> None:
        self.path, self.starts = path, array("q", [0])
        with path.open("rb") as lines:
            for line in lines:
                self.starts.append(self.starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Example]:
        with self.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                yield self._example(number, line.rstrip("\n"))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        with self.path.open("rb") as lines:
            lines.seek(self.starts[index])
            return self._example(index, lines.readline().decode().rstrip("\n"))

    def _example(self, number: int, text: str) -> Example:
        return Example(f"{self.path.stem}-{number}", single_turn("", text, ""), "")


def write(folder: Path, rows: int, words: int, templated: float) -> int:
    """Write the rows of each split; return how many test rows are copies of a train row."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    vocabulary = [f"w{rank}" for rank in range(200_000)]
    odds = (1 / np.arange(1, len(vocabulary) + 1)).cumsum()

    def draws() -> Iterator[str]:
        while True:
            for rank in np.searchsorted(odds, numbers.random(2**16) * odds[-1]).tolist():
                yield vocabulary[rank]

    stream = draws()
    boilerplate = [list(islice(stream, 20)) for _ in range(words // 24)]

    def text() -> str:
        if rng.random() >= templated:
            return " ".join(islice(stream, rng.randint(words * 3 // 4, words * 5 // 4)))
        parts = []
        for paragraph in boilerplate:  # each paragraph, then a name out of 50 and a number out of 1000
            parts += [*paragraph, f"name{rng.randrange(50)}", "has", f"{rng.randrange(1000)}", "left"]
        return " ".join(parts)

    planted = [text() for _ in range(rows // 1000)]
    for name, share in SHARES.items():
        count = round(rows * share)
        with (folder / f"{name}.txt").open("w", encoding="utf-8") as out:
            for row in range(count):
                if name == "test" and row < len(planted):
                    line = planted[row].upper().replace(" ", ",  ", 3) + "?"
                elif name == "train" and row % 500 == 7 and row // 500 < len(planted):
                    line = planted[row // 500]
                else:
                    line = text()
                out.write(line + "\n")
    return len(planted)


def measure(folder: Path, planted: int) -> None:
    """Search the rows of a folder; print seconds and memory, which are those of this process."""
    splits = {name: Rows(folder / f"{name}.txt") for name in SHARES}
    rows, size = sum(map(len, splits.values())), sum(path.stat().st_size for path in folder.glob("*.txt"))
    before, idle = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    report = overlap.find_overlaps(splits, max_overlap=MAX_OVERLAP)
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = next(pair.exact for pair in report.pairs if (pair.left_split, pair.right_split) == ("test", "train"))
    print(
        f"{rows} rows of {size / rows:.0f} bytes: {seconds:.1f} s ({rows / seconds:.0f} rows/s), {cpu:.1f} CPU seconds "
        f"({rows / cpu:.0f} rows/s), peak {peak:.2f} GiB ({idle:.2f} before); {found} of {planted} copies found",
        flush=True,
    )


def dicts(folder: Path, n: int = 8) -> None:
    """The same three comparisons with a dict from each gram to its rows and a counter for each question."""
    grams, start = {}, time.process_time()
    for name in SHARES:
        words = [overlap.normalise_question(overlap.asked(row)[0]).split() for row in Rows(folder / f"{name}.txt")]
        grams[name] = [{tuple(row[at : at + n]) for at in range(max(len(row) - n, 0) + 1)} for row in words]
    for left, right in overlap.PAIRS:
        holders = defaultdict(list)
        for row, held in enumerate(grams[right]):
            for gram in held:
                holders[gram].append(row)
        for question in grams[left]:
            shared = Counter(row for gram in question for row in holders.get(gram, ()))
            max(shared.values(), default=0)
    print(f"plain Python dicts: {time.process_time() - start:.1f} CPU seconds", flush=True)


def in_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def main() -> None:
    """Print a line for each number of rows, and one for plain dicts on the first number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000, 1_000_000])
    parser.add_argument("--words", type=int, nargs="+", default=[120, 370], help="mean words of a row")
    parser.add_argument("--templated", type=float, default=0.2, help="share of the rows that are made from a template")
    args = parser.parse_args()
    for words in args.words:
        for rows in args.rows:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                planted = in_process(write, folder, rows, words, args.templated)
                in_process(measure, folder, planted)
                if rows == args.rows[0]:
                    in_process(dicts, folder)


if __name__ == "__main__":
    main()
