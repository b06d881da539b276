#!/usr/bin/env python
"""Simulate how often models that change nothing are called better when a test set is reused.

    scripts/bench_reuse.py                  the table of docs/test-set-reuse.md (about half a minute)
    scripts/bench_reuse.py --studies 500    faster

In a study, base and models have the same probability of answering each question rightly, so every verdict other than
"inconclusive" is wrong. Models are judged one after another, as the ledger numbers them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sftlab.eval.reuse import adjusted, chance_of_better, corrected
from sftlab.eval.statistics import compare
from sftlab.results import Comparison

ALPHA = 0.05
MODELS = (1, 5, 10, 15, 20, 50)
QUESTIONS = (200, 466, 1273)


@cache
def comparison(gained: int, lost: int, n: int) -> Comparison:
    """The comparison of two models with so many changes. Rows that do not change, change nothing."""
    second = np.arange(n) < gained
    first = (np.arange(n) >= gained) & (np.arange(n) < gained + lost)
    return compare(first.tolist(), second.tolist(), groups=None, alpha=ALPHA)


def studies(n: int, count: int, seed: int) -> NDArray[np.int_]:
    """The answers gained and lost by each model of each study: (studies, models, 2)."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        # Half of the questions always have the same answer; about 15 % of the answers change from model to model.
        right = np.where(draw.random(n) < 0.5, draw.random(n) < 0.5, draw.beta(0.8, 0.8, n))
        base, models = draw.random(n) < right, draw.random((max(MODELS), n)) < right
        rows.append(np.stack([(models & ~base).sum(1), (~models & base).sum(1)], axis=1))
    return np.stack(rows)


def by_number(result: Comparison, number: int) -> bool:
    """Whether p times the number of the model is below alpha: Bonferroni for the models so far."""
    return result.verdict.outcome != "inconclusive" and result.p_value * number < ALPHA


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", type=int, default=2000)
    count = parser.parse_args().studies
    rules: dict[str, Callable[[Comparison, int], bool]] = {
        "better": lambda result, number: result.verdict.outcome == "better",
        "better or worse": lambda result, number: result.verdict.outcome != "inconclusive",
        "with p × number": by_number,
        "corrected": lambda result, number: corrected(result, number, ALPHA).verdict.outcome != "inconclusive",
    }
    print(f"| questions | models | stated | {' | '.join(rules)} | factor of p |\n|{'---:|' * (4 + len(rules))}")
    for n in QUESTIONS:
        drawn = studies(n, count, seed=n)
        for models in MODELS:
            cells = []
            for rule in rules.values():
                called = [
                    any(rule(comparison(int(row[0]), int(row[1]), n), at + 1) for at, row in enumerate(study[:models]))
                    for study in drawn
                ]
                cells.append(f"{100 * np.mean(called):.1f} %")
            stated, factor = f"{100 * chance_of_better(models, ALPHA):.1f} %", adjusted(1e-9, models) * 1e9
            print(f"| {n:,} | {models} | {stated} | {' | '.join(cells)} | {factor:.0f} |", flush=True)


if __name__ == "__main__":
    main()
