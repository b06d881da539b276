"""Seeds as replicates: a recipe is ranked by its mean, and judged by all of its trainings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import stdev

import pytest

from sftlab.config import Config
from sftlab.eval import replication
from sftlab.eval.replication import judged
from sftlab.eval.scorers import scorer
from sftlab.eval.statistics import over_trainings
from sftlab.records import Candidate, Prediction
from sftlab.report import sweeps, terminal, text
from sftlab.results import Evaluation, Recipe
from sftlab.runtime.job import Job
from sftlab.train import select
from sftlab.train.recipes import rank

Compose = Callable[..., Config]
RATES = ("1e-3", "3e-3")


@pytest.fixture
def sweep(config: Compose, tmp_path: Path) -> Callable[..., list[Job]]:
    """Jobs of learning rates and seeds, whose only checkpoints have these losses on each of ten rows."""

    def made(*losses: tuple[str, int, float]) -> list[Job]:
        jobs = []
        for number, (rate, seed, loss) in enumerate(losses):
            folder = tmp_path / f"{number}" / "checkpoint-5"
            folder.mkdir(parents=True)
            (folder / "rows.json").write_text(json.dumps([[loss, 1]] * 10))
            own = [f"train.learning_rate={rate}", f"seed={seed}"]
            row = Candidate(loss, 1, 5, str(folder), number, own, None, 1.0)
            cfg = config(*own).model_dump()
            jobs.append(Job(number=number, overrides=own, config=cfg, status="success", candidates=[row]))
        return jobs

    return made


def test_the_recipe_with_the_best_mean_wins_over_the_luckiest_training(sweep: Callable[..., list[Job]]) -> None:
    jobs = sweep(("1e-3", 1, 0.2), ("1e-3", 2, 0.9), ("3e-3", 1, 0.4), ("3e-3", 2, 0.3))
    order = rank(jobs, "lowest")
    assert [recipe.jobs for recipe in order.recipes] == [[2, 3], [0, 1]]
    assert order.recipes[0].overrides == ["train.learning_rate=3e-3"]
    assert order.recipes[0].seeds == [1, 2]
    assert order.recipes[0].mean == pytest.approx(0.35)
    assert order.recipes[1].sd == pytest.approx(stdev([0.2, 0.9]))
    assert order.selection.chosen.job == 3  # the best training of the best recipe
    assert len(order.selection.candidates) == 4
    record = select.record(order.selection, "eval_loss", [], None, order.recipes)
    assert "other seeds may rank them otherwise" in str(sweeps.unsure(record))


def test_right_answers_rank_recipes_the_other_way_round(sweep: Callable[..., list[Job]]) -> None:
    jobs = sweep(("1e-3", 1, 0.2), ("1e-3", 2, 0.3), ("3e-3", 1, 0.9), ("3e-3", 2, 0.9))
    right = [[1.0] * count + [0.0] * (10 - count) for count in (3, 4, 9, 6)]
    order = rank(jobs, "lowest", right)
    assert order.recipes[0].values == [0.9, 0.6]
    assert order.selection.chosen.job == 2


def test_one_seed_per_recipe_is_ranked_as_before(sweep: Callable[..., list[Job]]) -> None:
    order = rank(sweep(("1e-3", 1, 0.2), ("3e-3", 1, 0.4), ("1e-3", 1, 0.2)), "lowest")
    assert order.recipes == []
    assert order.selection.chosen.job == 0


def predictions(right: str) -> list[list[Prediction]]:
    """The answers of a model, once: a 1 is right."""
    return [
        [
            Prediction(str(place), "?", "A", "stop", "A", "A" if mark == "1" else "B", mark == "1", None, {})
            for place, mark in enumerate(right)
        ]
    ]


RECIPE = Recipe(
    overrides=[], jobs=[0, 1, 2], seeds=[1, 2, 3], checkpoints=["a", "b", "c"], steps=[5, 5, 0], values=[1, 2, 3],
    mean=2, sd=1,
)  # fmt: skip


def test_the_verdict_on_a_recipe_counts_trainings_and_states_their_spread(
    config: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config("eval.task=choice")
    base = predictions("0" * 100)
    tuned = [predictions("1" * gained + "0" * (100 - gained)) for gained in (20, 24, 28)]
    evaluation = Evaluation(task="choice", finetuned=scorer(cfg.eval).result(tuned[0]))
    result = judged(cfg, RECIPE, [(base, one) for one in tuned], evaluation, 60.0)
    assert result.verdict is not None
    assert result.verdict.outcome == "better"
    assert "better in 3 of 3 trainings, +24.0 points on average, SD 4.0" in result.verdict.reason
    assert result.p_value == over_trainings(
        [[float(mark < gained) for mark in range(100)] for gained in (20, 24, 28)]
    ).p_value()  # fmt: skip
    terminal.evaluation(evaluation, "all", 1, result)
    printed = " ".join(capsys.readouterr().out.split())
    assert "better in 3 of 3 trainings" in printed
    assert "2 more models were merged and evaluated for this (1 min 0 s)" in printed
    assert "is one draw" not in printed


def test_without_a_base_model_the_recipe_has_a_spread_and_no_verdict(config: Compose) -> None:
    cfg = config("eval.task=choice", "eval.baseline=false")
    tuned = [predictions("1" * right + "0" * (10 - right)) for right in (4, 6, 8)]
    evaluation = Evaluation(task="choice", finetuned=scorer(cfg.eval).result(tuned[0]))
    result = judged(cfg, RECIPE, [(None, one) for one in tuned], evaluation, 60.0)
    assert (result.verdict, result.delta, result.better) == (None, None, None)
    assert result.mean == pytest.approx(0.6)
    assert result.sd == pytest.approx(0.2)


def test_two_trainings_are_few_and_a_gain_may_be_too_small() -> None:
    gain = over_trainings([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert replication.worded(gain, 0.05).notes
    small = over_trainings([[1.0] * 3 + [0.0] * 97] * 3)
    assert replication.worded(small, 0.2).outcome == "better"
    assert replication.worded(small, 0.2, smallest=0.1).outcome == "too_small"
    assert replication.worded(small, 0.2, number=5).outcome == "inconclusive"


def test_loss_and_score_may_disagree_and_each_setting_decides_by_its_own(sweep: Callable[..., list[Job]]) -> None:
    """The loss falls and then rises while more answers are right."""
    jobs = sweep(("1e-3", 1, 0.5), ("2e-3", 1, 0.3), ("3e-3", 1, 0.6))
    scores = [[1.0] * count + [0.0] * (40 - count) for count in (4, 8, 36)]
    by_loss, by_score = rank(jobs, "lowest").selection, rank(jobs, "lowest", scores).selection
    assert (by_loss.chosen.job, by_score.chosen.job) == (1, 2)
    assert rank(jobs, "earliest", scores).selection.chosen.job == 2  # the others are beyond the noise
    recorded = select.record(by_score, "accuracy", [], scored_rows=40)
    words = text.disagreement(recorded)
    assert words is not None
    assert "step 5 of job 1 (loss 0.3000, accuracy 20.0%) has the lowest loss" in words
    assert "step 5 of job 2 (loss 0.6000, accuracy 90.0%) the best accuracy" in words
    assert "beyond the noise" in words
    assert text.disagreement(select.record(by_loss, "eval_loss", [])) is None
    same = rank(jobs, "lowest", [scores[0]] * 3).selection
    assert "the loss decides" in str(text.disagreement(select.record(same, "accuracy", [])))
