#!/usr/bin/env python
"""Time the search for leakage between the splits on random rows, beside plain Python dicts on a sample of them."""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections import Counter, defaultdict

import numpy as np

from sftlab.dataset import overlap
from sftlab.records import Example, single_turn

SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}
MAX_OVERLAP = 0.8
SAMPLE = 0.05


def corpus(rows: int, templated: float, planted: int) -> tuple[dict[str, list[Example]], int]:
    """Splits of rows of about 120 words, and how many test rows are copies of a train row."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    words = [f"w{rank}" for rank in range(200_000)]
    odds = 1 / np.arange(1, len(words) + 1)
    stream = iter(numbers.choice(len(words), size=rows * 150, p=odds / odds.sum()).tolist())
    boilerplate = [[words[next(stream)] for _ in range(20)] for _ in range(5)]

    def text() -> str:
        if rng.random() >= templated:
            return " ".join([words[next(stream)] for _ in range(rng.randint(90, 150))])
        parts = []
        for paragraph in boilerplate:  # each paragraph, then a name out of 50 and a number out of 1000
            parts += [*paragraph, f"name{rng.randrange(50)}", "has", f"{rng.randrange(1000)}", "left"]
        return " ".join(parts)

    splits = {
        name: [Example(f"{name}-{row}", single_turn("", text(), ""), "") for row in range(round(rows * share))]
        for name, share in SHARES.items()
    }
    for row in range(planted):
        source = rng.choice(splits["train"]).question
        splits["test"][row] = Example(
            f"test-{row}", single_turn("", source.upper().replace(" ", ",  ", 3) + "?", ""), ""
        )
    return splits, planted


def naive(splits: dict[str, list[Example]], n: int = 8) -> None:
    """The same three comparisons with a dict from each gram to its rows and a counter for each question."""
    grams = {}
    for name, examples in splits.items():
        words = [overlap.normalise_question(example.question).split() for example in examples]
        grams[name] = [{tuple(row[at : at + n]) for at in range(max(len(row) - n, 0) + 1)} for row in words]
    for left, right in overlap.PAIRS:
        holders = defaultdict(list)
        for row, held in enumerate(grams[right]):
            for gram in held:
                holders[gram].append(row)
        for question in grams[left]:
            shared = Counter(row for gram in question for row in holders.get(gram, ()))
            max(shared.values(), default=0)


def main() -> None:
    """Print the seconds, the peak memory and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--templated", type=float, default=0.2, help="share of the rows that are made from a template")
    args = parser.parse_args()
    splits, planted = corpus(args.rows, args.templated, planted=args.rows // 1000)

    start = time.perf_counter()
    report = overlap.find_overlaps(splits, max_overlap=MAX_OVERLAP)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(overlap.describe(report))
    found = next(pair.exact for pair in report.pairs if (pair.left_split, pair.right_split) == ("test", "train"))
    print(f"{found} test rows are exact duplicates of train rows, {planted} were planted")
    print(f"{args.rows} rows, {args.templated:.0%} templated: {seconds:.1f} s, peak {peak:.2f} GiB (the rows included)")

    sample = {name: examples[: round(len(examples) * SAMPLE)] for name, examples in splits.items()}
    start = time.perf_counter()
    naive(sample)
    slow = time.perf_counter() - start
    print(
        f"plain Python dicts on {SAMPLE:.0%} of each split: {slow:.1f} s; extrapolated to all rows linearly "
        f"{slow / SAMPLE:.0f} s ({slow / SAMPLE / seconds:.0f} times as long; too little, since questions × rows that "
        f"share boilerplate grow with the square), by the square {slow / SAMPLE**2:.0f} s (too much)"
    )


if __name__ == "__main__":
    main()
