#!/usr/bin/env python
r"""Replay the rules of sweep.prune on a recorded sweep without pruning: tokens trained, and what would be selected.

    python -m sftlab +experiment=demo_sweep mode=train train.eval_steps=0.25 train.num_train_epochs=3 \
        train.learning_rate=3e-2,1e-2,3e-3,1e-3 train.gradient_accumulation_steps=1,2,4 hydra.sweep.dir=RUN
    scripts/bench_pruning.py RUN

    scripts/bench_pruning.py --simulate          # sweeps with other curves

Each replay runs the jobs one after another, in an order of its own, and with validation rows drawn with replacement
(the first replay of each rule: in the order of the sweep, with its own rows). Jobs are compared as they come, or wait
for each other in rounds. Prints the share of the tokens that is trained (mean, and the largest of all replays), how
often another checkpoint is selected than without pruning, and how much higher its loss on all rows then is on average.

Simulated sweeps have 12 jobs with 12 validations on 48 rows. The loss of a job falls exponentially, at a rate between
1.5 and 15 per training, to a final loss that differs between jobs by 0.1 (standard deviation). Each replay is another
sweep. Rate and final loss are independent, or the slower job ends lower (correlation 0.7): curves cross.
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
        job: [Validation(**{**one.model_dump(), "rows": [one.rows[place] for place in places]}) for one in own]
        for job, own in curves.items()
    }


def simulated(rng: np.random.Generator, correlation: float) -> Curves:
    """The validations of a sweep whose jobs learn at different rates; in rows, noise that checkpoints share in part."""
    jobs, points, rows = 12, 12, 48
    speed, rest = rng.normal(size=(2, jobs))
    final = 1 + 0.1 * (correlation * speed + np.sqrt(1 - correlation**2) * rest)
    rates = np.exp(np.clip(np.log(4.7) + 0.7 * speed, np.log(1.5), np.log(15)))
    level, own = rng.normal(size=rows), rng.normal(size=(jobs, rows))
    curves: dict[int, list[Validation]] = {}
    for job in range(jobs):
        curves[job] = []
        for step in range(1, points + 1):
            loss = final[job] + (3 - final[job]) * np.exp(-rates[job] * step / points)
            nats = loss * (1 + 0.3 * level + 0.05 * own[job] + 0.05 * rng.normal(size=rows))
            pairs = [(float(value), 1.0) for value in nats]
            curves[job].append(Validation(job=job, step=step, epoch=step / 4, planned_steps=points, rows=pairs))
    return curves


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
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--simulate", action="store_true")
    arguments = parser.parse_args()
    print("rule | after | first replay | mean | largest | selects another | by loss")
    if arguments.simulate:
        for correlation in (0.0, 0.7):
            print(f"correlation of rate and final loss: {correlation}")
            rng = np.random.default_rng(0)
            table([simulated(rng, correlation) for _ in range(arguments.replays)])
    else:
        curves, rng = recorded(arguments.run), np.random.default_rng(0)
        rows = len(next(iter(curves.values()))[0].rows)
        draws = rng.integers(0, rows, (arguments.replays - 1, rows))
        table([curves, *(resampled(curves, [int(place) for place in drawn]) for drawn in draws)], curves)


def table(replays: Sequence[Curves], whole: Curves | None = None) -> None:
    """Print what each rule does in each replay; losses are those of ``whole``, or of the replay."""
    for name in ("median", "halving", "halving in rounds"):
        for after in (0.125, 0.2, 0.25):
            rule = Rule(rule="median" if name == "median" else "halving", after=after)
            rng = np.random.default_rng(0)
            shares, excess = [], []
            for number, curves in enumerate(replays):
                order = [*curves] if number == 0 else [int(job) for job in rng.permutation(len(curves))]
                trained = in_rounds(rule, curves) if "rounds" in name else as_they_come(rule, curves, order)
                ends = sum(own[-1].epoch for own in trained.values()), sum(own[-1].epoch for own in curves.values())
                shares.append(ends[0] / ends[1])
                pair = best(trained, curves), best(curves, curves)
                losses = {(one.job, one.step): one.loss for own in (whole or curves).values() for one in own}
                one, other = (losses[each.job, each.step] for each in pair)
                excess.append(None if pair[0] is pair[1] else one - other)
            others = [value for value in excess if value is not None]
            loss = f"{np.mean(others):.4f}" if others else "–"
            first = f"{shares[0]:.0%}{'' if excess[0] is None else ', another'}"
            values = (name, after, first, f"{np.mean(shares):.0%}", f"{max(shares):.0%}")
            print(*values, f"{len(others) / len(excess):.0%}", loss, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
