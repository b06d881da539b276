#!/usr/bin/env python
"""Time the search for leakage between the splits on random rows, with CPU time and memory, beside plain Python dicts.

    scripts/bench_overlap.py                              10,000, 200,000 and 1,000,000 rows of 0.6 and 1.9 kB
    scripts/bench_overlap.py --rows 1000000 --words 120   one size (2 minutes; 1.9 kB: 10 minutes)

The rows are stored as those of a dataset, and read when they are needed, so that the memory is that of the search. The
search runs in a process of its own. Its memory is the largest resident set, which includes Python and its libraries.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from sftlab.dataset import arrow_examples, overlap
from sftlab.dataset.arrow_examples import Examples
from sftlab.records import Example, single_turn

SHARES = {"test": 0.05, "validation": 0.05, "train": 0.9}
MAX_OVERLAP = 0.8
SECONDS = {200_000: 60}  # by the number of rows, at most
MEMORY = {1_000_000: 4}  # GiB, at most
PLAIN = 10_000  # rows at most that are compared by plain dicts, which need minutes for more

P = ParamSpec("P")
T = TypeVar("T")


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

    def line_of(name: str, row: int) -> str:
        if name == "test" and row < len(planted):
            return planted[row].upper().replace(" ", ",  ", 3) + "?"
        if name == "train" and row % 500 == 7 and row // 500 < len(planted):
            return planted[row // 500]
        return text()

    for name, share in SHARES.items():
        count = round(rows * share)
        lines = (line_of(name, row) for row in range(count))
        rows_of = (Example(f"{name}-{row}", single_turn("", line, ""), "") for row, line in enumerate(lines))
        arrow_examples.write(folder / f"{name}.arrow", batches(map(arrow_examples.text_of, rows_of)))
    return len(planted)


def batches(stored: Iterator[str]) -> Iterator[Any]:
    """Yield stored examples as the record batches of a dataset."""
    while batch := list(islice(stored, arrow_examples.BATCH)):
        yield arrow_examples.batch_of(batch)


def measure(folder: Path, planted: int) -> None:
    """Search the rows of a folder; print seconds and memory, which are those of this process."""
    splits = {name: Examples(folder / f"{name}.arrow") for name in SHARES}
    rows = sum(map(len, splits.values()))
    size = sum(len(row.question.encode()) for row in splits["test"]) / len(splits["test"])
    before, idle = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    report = overlap.find_overlaps(splits, max_overlap=MAX_OVERLAP)
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = next(pair.exact for pair in report.pairs if (pair.left_split, pair.right_split) == ("test", "train"))
    print(
        f"{rows} rows of {size:.0f} bytes: {seconds:.1f} s ({rows / seconds:.0f} rows/s), {cpu:.1f} CPU seconds "
        f"({rows / cpu:.0f} rows/s), peak {peak:.2f} GiB ({idle:.2f} before); {found} of {planted} copies found",
        flush=True,
    )
    for figure, unit, limits in ((seconds, "s", SECONDS), (peak, "GiB", MEMORY)):
        if (limit := limits.get(rows)) is not None:
            print(f"    {'as' if figure <= limit else 'NOT as'} required: {limit} {unit} or less", flush=True)


def dicts(folder: Path, n: int = 8) -> None:
    """The same three comparisons with a dict from each gram to its rows and a counter for each question."""
    grams, start = {}, time.process_time()
    for name in SHARES:
        words = [
            overlap.normalise_question(overlap.asked(row)[0]).split() for row in Examples(folder / f"{name}.arrow")
        ]
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
    """Print a line for each number of rows, and one for plain dicts if the rows are few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
                if rows <= PLAIN:
                    in_process(dicts, folder)


if __name__ == "__main__":
    main()
