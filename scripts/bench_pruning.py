#!/usr/bin/env python
r"""Replay the rules of sweep.prune on a recorded sweep without pruning: tokens trained, and what would be selected.

    python -m sftlab +experiment=demo_sweep mode=train train.eval_steps=0.25 train.num_train_epochs=3 \
        train.learning_rate=3e-2,1e-2,3e-3,1e-3 train.gradient_accumulation_steps=1,2,4 hydra.sweep.dir=RUN
    scripts/bench_pruning.py RUN

Each replay runs the jobs one after another, in an order of its own, and with validation rows drawn with replacement
(the first replay of each rule: in the order of the sweep, with its own rows). Jobs are compared as they come, or wait
for each other in rounds. Prints the share of the tokens that is trained (mean, and the largest of all replays), how
often another checkpoint is selected than without pruning, and how much higher its loss on all rows then is on average.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sftlab.runtime.job import jobs
from sftlab.train.checkpoints import ROWS, complete, read_receipt
from sftlab.train.pruning import Rule, Validation

Curves = Mapping[int, Sequence[Validation]]


def recorded(run: Path) -> Curves:
    """The validations of each job of a sweep."""
    curves = {}
    for job in jobs(run):
        training = Path(job.stages["train"])
        planned = read_receipt(training).planned_steps
        assert planned is not None
        curves[job.number] = [
            Validation(
                job=job.number,
                step=one.step,
                epoch=one.epoch,
                planned_steps=planned,
                rows=json.loads((one.path / ROWS).read_text("utf-8")),
            )
            for one in complete(training)
            if one.evaluated
        ]
    return curves


def resampled(curves: Curves, places: Sequence[int]) -> Curves:
    """The same validations on other rows."""
    return {
        job: [one.model_copy(update={"rows": [one.rows[place] for place in places]}) for one in own]
        for job, own in curves.items()
    }


def as_they_come(rule: Rule, curves: Curves, order: Sequence[int]) -> Curves:
    """What is trained of each job if one runs after another."""
    trained: dict[int, Sequence[Validation]] = {}
    for job in order:
        ends = range(1, len(curves[job]))
        end = next((end for end in ends if rule.judge(curves[job][:end], trained.values())), len(curves[job]))
        trained[job] = curves[job][:end]
    return trained


def in_rounds(rule: Rule, curves: Curves) -> Curves:
    """What is trained of each job if all wait for each other."""
    trained: dict[int, Sequence[Validation]] = {job: [] for job in curves}
    running = set(curves)
    for number in range(len(rule.rungs) + 1):
        now = rule.model_copy(update={"round": number})
        before = dict(trained)
        running -= {job for job in running if now.judge(before[job], [before[one] for one in before if one != job])}
        for job in running:
            count = next((end for end in range(1, len(curves[job])) if now.waits(curves[job][:end])), len(curves[job]))
            trained[job] = curves[job][:count]
    return trained


def best(curves: Curves, planned: Curves) -> Validation:
    """The checkpoint with the lowest loss; jobs that were pruned are not ranked."""
    whole = [one for job, own in curves.items() if len(own) == len(planned[job]) for one in own]
    return min(whole, key=lambda one: one.loss)


def main() -> None:
    """Replay all rules, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--replays", type=int, default=100)
    arguments = parser.parse_args()
    curves = recorded(arguments.run)
    on_all = {(one.job, one.step): one.loss for own in curves.values() for one in own}
    rows = len(next(iter(curves.values()))[0].rows)
    print("rule | after | order of the sweep | mean | largest | selects another | by loss")
    for name in ("median", "halving", "halving in rounds"):
        for after in (0.125, 0.25):
            rule = Rule(rule="median" if name == "median" else "halving", after=after)
            rng = np.random.default_rng(0)
            shares, excess = [], []
            for replay in range(arguments.replays):
                order, drawn = [*curves], curves
                if replay:
                    order = [order[place] for place in rng.permutation(len(order))]
                    drawn = resampled(curves, [int(place) for place in rng.integers(0, rows, rows)])
                trained = in_rounds(rule, drawn) if "rounds" in name else as_they_come(rule, drawn, order)
                ends = sum(own[-1].epoch for own in trained.values()), sum(own[-1].epoch for own in drawn.values())
                shares.append(ends[0] / ends[1])
                pair = best(trained, drawn), best(drawn, drawn)
                one, other = (on_all[each.job, each.step] for each in pair)
                excess.append(None if pair[0] is pair[1] else one - other)
            others = [value for value in excess if value is not None]
            loss = f"{np.mean(others):.4f}" if others else "–"
            first = f"{shares[0]:.0%}{'' if excess[0] is None else ', another'}"
            values = (name, after, first, f"{np.mean(shares):.0%}", f"{max(shares):.0%}")
            print(*values, f"{len(others) / len(excess):.0%}", loss, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
