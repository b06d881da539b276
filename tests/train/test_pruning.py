"""Pruning: which jobs of a sweep are stopped, from files that any launcher may have written."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from sftlab.config import Config
from sftlab.errors import PrunedError
from sftlab.results import SplitCounts, TokenCounts
from sftlab.train.pruning import Peers, folder_of, forget, peers

Compose = Callable[..., Config]
Rule = Literal["median", "halving"]


def peer(folder: Path, job: int, rule: Rule = "median", after: float = 0.25) -> Peers:
    return Peers(folder=folder, job=job, comparable="a", rule=rule, after=after)


def trained(one: Peers, losses: list[float], *, steps: int = 8, noise: float = 0.0) -> list[int]:
    """Publish validations until the job is stopped, and return the steps at which it was."""
    rng, stopped = np.random.default_rng(one.job), []
    for step, loss in enumerate(losses, start=1):
        rows = [[loss + noise * float(value), 1.0] for value in rng.normal(size=40)]
        one.publish(step, step / 4, steps, rows)
        if one.verdict() is not None:
            stopped.append(step)
    return stopped


COUNTS = TokenCounts.model_construct(validation=SplitCounts.model_construct(content="rows"))
FALLS = [2.0, 1.8, 1.6, 1.4, 1.2, 1.1, 1.05, 1.0]
WORSE = [loss + 0.3 for loss in FALLS]


def test_the_first_job_has_no_peers_and_a_worse_one_is_stopped_after_its_grace(tmp_path: Path) -> None:
    assert trained(peer(tmp_path, 0), FALLS, noise=0.1) == []
    assert trained(peer(tmp_path, 1, after=0.5), WORSE, noise=0.1) == [4, 5, 6, 7]  # not at its last step
    verdict = peer(tmp_path, 1).verdict()
    assert verdict is None
    assert trained(peer(tmp_path, 2), [2.4, 2.3], noise=0.1) == [2]
    reason = str(peer(tmp_path, 2).verdict())
    assert "pruned at step 2 of 8: its validation loss 2.3" in reason
    assert "of job 0, in the middle of 2 peers at epoch 0.5" in reason


def test_the_decision_of_the_training_is_recorded_whatever_peers_publish_later(tmp_path: Path) -> None:
    rows = [[2.0, 1.0]] * 40
    trained(peer(tmp_path, 0), FALLS)
    one = peer(tmp_path, 1)
    reason = one.observe(4, 1.0, 8, rows, 1, is_first=True)
    for job in (2, 3):  # as bad as the job itself
        peer(tmp_path, job).publish(4, 1.0, 8, rows)
    assert one.verdict() is None
    assert str(reason) == str(peer(tmp_path, 1).decision())


def test_a_difference_within_the_noise_stops_no_job(tmp_path: Path) -> None:
    trained(peer(tmp_path, 0), FALLS, noise=1.0)
    assert trained(peer(tmp_path, 1), [loss + 0.02 for loss in FALLS], noise=1.0) == []


def test_only_peers_that_reached_the_epoch_count_and_only_until_then(tmp_path: Path) -> None:
    trained(peer(tmp_path, 0), [3.0, 2.9, 0.1])  # becomes good after the epoch at which others are compared
    assert trained(peer(tmp_path, 1), [2.5, 2.4]) == []
    assert trained(peer(tmp_path, 2), [2.5, 2.4, 2.3, 2.2]) == [3]  # step 4: no peer has reached it
    other = Peers(folder=tmp_path, job=3, comparable="b", rule="median", after=0.25)
    assert trained(other, [9.0, 9.0, 9.0]) == []  # other validation rows


def test_halving_decides_at_rungs_only(tmp_path: Path) -> None:
    trained(peer(tmp_path, 0), FALLS)
    one = peer(tmp_path, 1, "halving", after=0.25)
    assert trained(one, WORSE) == [2, 4]  # 0.25 and 0.5 of eight steps


@pytest.mark.parametrize("rule", ["median", "halving"])
def test_the_best_of_many_jobs_is_never_stopped_and_half_of_the_steps_are_saved(tmp_path: Path, rule: Rule) -> None:
    """Jobs whose curves do not cross, in any order, as a launcher with one worker runs them."""
    rng, shares = np.random.default_rng(7), []
    for sweep in range(4):
        order, steps, best_done = rng.permutation(12), 0, False
        for job, rank in enumerate(order):
            own = peer(tmp_path / str(sweep), job, rule, after=0.125)
            for step, loss in enumerate(FALLS, start=1):
                rows = [[loss + 0.05 * rank + 0.05 * float(value), 1.0] for value in rng.normal(size=20)]
                own.publish(step, step / 4, 8, rows)
                steps += 1
                if own.verdict() is not None:
                    break
            else:
                best_done |= rank == 0
        assert best_done
        shares.append(steps / 96)
    assert np.mean(shares) <= 0.5


def in_rounds(folder: Path, curves: dict[int, list[float]], order: list[int], after: float) -> dict[int, str]:
    """Train jobs in rounds, each round in this order; where each job has ended: its last step, and why."""
    steps, ends = dict.fromkeys(order, 0), dict[int, str]()
    for number in range(4):
        for job in order:
            one = Peers(folder=folder, job=job, comparable="a", rule="halving", after=after, round=number)
            stop = one.check() if job not in ends else None
            if isinstance(stop, PrunedError):
                ends[job] = str(stop)
            while job not in ends and one.pause() is None:
                steps[job] += 1
                rng = np.random.default_rng([job, steps[job]])
                rows = [[curves[job][steps[job] - 1] + 0.05 * float(value), 1.0] for value in rng.normal(size=20)]
                one.publish(steps[job], steps[job] / 4, 8, rows)
                if steps[job] == 8:
                    ends[job] = "all steps"
    return ends


def test_in_rounds_the_order_of_jobs_does_not_matter(tmp_path: Path) -> None:
    curves = {job: [loss + 0.05 * job for loss in FALLS] for job in range(12)}
    orders = [[*range(12)], [*reversed(range(12))], [int(job) for job in np.random.default_rng(3).permutation(12)]]
    first, *others = (in_rounds(tmp_path / str(place), curves, one, 0.125) for place, one in enumerate(orders))
    assert [*others] == [first, first]
    assert first[0] == "all steps"
    ended = [8 if why == "all steps" else int(why.split()[3]) for why in first.values()]
    assert sum(ended) <= 0.4 * 8 * 12
    assert set(ended) == {1, 2, 4, 8}  # some at each rung


def test_a_validation_after_two_rungs_decides_once(tmp_path: Path) -> None:
    """Twelve jobs that are validated at half of their steps only: half of them, and not three, are trained further."""
    for job in range(12):
        peer(tmp_path, job, "halving").publish(4, 1.0, 8, [[2.0 + 0.1 * job, 1.0]] * 40)
    rounds = [
        [Peers(folder=tmp_path, job=job, comparable="a", rule="halving", after=0.25, round=number).verdict() is None
         for job in range(12)]
        for number in range(3)
    ]  # fmt: skip
    assert [sum(remaining) for remaining in rounds] == [12, 12, 6]


def test_jobs_of_another_length_are_peers_only_with_a_schedule_without_end(config: Compose, tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        found = peers(config("sweep.prune=median", "train.bf16=false", *overrides), tmp_path, "run", 0, COUNTS)
        assert found is not None
        return found.comparable

    lengths = ["train.num_train_epochs=1", "train.num_train_epochs=3"]
    for schedule, same in (("constant", True), ("cosine", False)):
        keys = [key(f"train.lr_scheduler_type={schedule}", length) for length in lengths]
        assert [one == other for one, other in pairwise(keys)] == [same]
    assert key("seed=1") == key("seed=2", "train.learning_rate=1")
    assert peers(config(), tmp_path, "run", 0, COUNTS) is None
    forget(tmp_path, "run")
    assert not folder_of(tmp_path, "run").exists()
