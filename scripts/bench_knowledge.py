#!/usr/bin/env python3
"""Simulate models whose knowledge is known, and print how often its interval covers the true gain.

    python scripts/bench_knowledge.py

Each model either knows an answer or guesses it, with a preference for some letters. A part of the answers is not
stated and gets a forced choice. The table is in docs/claims.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sftlab.eval.knowledge import debiased, split
from sftlab.records import Prediction

PREFERS_C = (0.04, 0.04, 0.84, 0.04, 0.04)


@dataclass(frozen=True)
class Model:
    """A model: the share of questions that it knows, its guesses, and the share of answers that it does not state."""

    knows: float
    guesses: Sequence[float]
    silent: float


def even(letters: int) -> tuple[float, ...]:
    """No preference for a letter."""
    return (1 / letters,) * letters


# The shares of right answers, and the two models.
STUDIES = [
    (even(5), Model(0, PREFERS_C, 1), Model(0, even(5), 0)),
    (even(5), Model(0, PREFERS_C, 1), Model(0, PREFERS_C, 1)),
    ((0.1, 0.1, 0.5, 0.2, 0.1), Model(0, PREFERS_C, 1), Model(0, even(5), 0.1)),
    (even(5), Model(0.1, PREFERS_C, 1), Model(0.5, even(5), 0)),
    ((0.1, 0.1, 0.6, 0.2), Model(0.3, (0.1, 0.1, 0.7, 0.1), 0.5), Model(0.3, even(4), 0.2)),
    (even(2), Model(0.2, (0.2, 0.8), 0.5), Model(0.4, even(2), 0.2)),
]


def answers(rng: np.random.Generator, targets: np.ndarray, model: Model) -> list[Prediction]:
    """Draw the answers of a model."""
    letters, rows = "ABCDE"[: len(model.guesses)], []
    for number, target in enumerate(targets):
        known = rng.random() < model.knows
        guess = rng.choice(len(letters), p=model.guesses)
        row = Prediction(str(number), "", "", "stop", None, letters[target], False, None, {}, choices=letters)
        if rng.random() < model.silent:
            logprobs = {x: np.log(p) + rng.normal(0, 0.3) for x, p in zip(letters, model.guesses, strict=True)}
            logprobs[letters[target]] += 6 * known
            forced = max(logprobs, key=lambda letter: logprobs[letter])
            rows.append(replace(row, readings={"strict": None, "forced": forced}, forced_logprobs=logprobs))
        else:
            answer = letters[target if known else guess]
            right = answer == row.target
            rows.append(replace(row, answer=answer, correct=right, readings={"strict": answer, "forced": answer}))
    found = debiased(rows)
    return [
        replace(row, readings={**row.readings, "debiased": found.get(place, row.readings["forced"])})
        for place, row in enumerate(rows)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=600, help="simulated studies per row")
    runs = parser.parse_args().runs
    rng = np.random.default_rng(0)
    print("| questions | letters | known | not stated | coverage | mean error, points | mean width, points |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for n in (50, 200):
        for shares, a, b in STUDIES:
            covered, gains, widths = 0, [], []
            for _ in range(runs):
                targets = rng.choice(len(shares), p=shares, size=n)
                parts = split([answers(rng, targets, a)], [answers(rng, targets, b)], 0.05)
                assert parts is not None
                low, high = parts.knowledge.interval
                covered += low <= b.knows - a.knows <= high
                gains.append(parts.knowledge.value)
                widths.append(high - low)
            error = 100 * (np.mean(gains) - (b.knows - a.knows))
            models = f"{a.knows:.0%}, {b.knows:.0%} | {a.silent:.0%}, {b.silent:.0%}"
            figures = f"{covered / runs:.3f} | {error:+.1f} | {100 * np.mean(widths):.0f}"
            print(f"| {n} | {len(shares)} | {models} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
