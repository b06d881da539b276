"""A learning curve from the jobs of a sweep: which sweeps have one, and what its points are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sftlab.config import Config
from sftlab.eval.checkpoints import Scores
from sftlab.records import Candidate
from sftlab.report import figures, sweeps
from sftlab.results import SplitCounts, TokenCounts
from sftlab.runtime.job import Job
from sftlab.train import learning_curve, select
from sftlab.train.recipes import rank

Compose = Callable[..., Config]


def sweep(config: Compose, folder: Path, *jobs: tuple[str, ...]) -> list[Job]:
    """Jobs whose loss falls with the rows, each with two checkpoints of ten validation rows."""
    made = []
    for number, overrides in enumerate(jobs):
        cfg = config("train.bf16=false", *overrides)
        rows = round(1000 * cfg.train.data_share)
        counts = SplitCounts(rows=rows, tokens=9, supervised=9, truncated=0, left_out=0, longest=9)
        tokens = folder / f"tokens-{number}"
        tokens.mkdir()
        record = TokenCounts(train=counts, validation=counts, prompt_bos=1, turn_ends=[])
        (tokens / "groups.json").write_text(json.dumps([None] * 10), "utf-8")
        (tokens / "counts.json").write_text(record.model_dump_json(), "utf-8")
        candidates = []
        for step, excess in ((1, 0.5), (2, 0.0)):
            checkpoint = folder / f"{number}" / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            loss = 1 + (rows / 1000) ** -0.3 + excess
            rows_of = [[loss * (1 + 0.1 * (place - 4.5)), 1] for place in range(10)]
            (checkpoint / "rows.json").write_text(json.dumps(rows_of), "utf-8")
            candidates.append(Candidate(loss, step, step, str(checkpoint), number, [*overrides], None, 1.0))
        stages = {"tokens": str(tokens), "train": str(folder / f"{number}")}
        values = {"number": number, "overrides": [*overrides], "config": cfg.model_dump(), "status": "success"}
        made.append(Job.model_validate({**values, "candidates": candidates, "stages": stages}))
    return made


SHARES = ("0.12", "0.25", "0.5", "1.0")


def test_the_curve_has_a_point_per_training_and_predicts_twice_the_rows(config: Compose, tmp_path: Path) -> None:
    jobs = sweep(config, tmp_path, *((f"train.data_share={share}",) for share in SHARES))
    scores = [[1.0] * count + [0.0] * (40 - count) for count in (2, 8, 3, 12, 4, 16, 5, 20)]
    record = select.record(rank(jobs, "lowest", scores).selection, "accuracy", [], scored_rows=40)
    curve = learning_curve.of(jobs, record)
    assert curve is not None
    assert [(point.rows, point.score) for point in curve.points] == [(120, 0.2), (250, 0.3), (500, 0.4), (1000, 0.5)]
    assert all(point.loss_interval and point.loss_interval[0] < point.eval_loss for point in curve.points)
    assert curve.loss is not None
    assert curve.loss.rows == 2000
    assert abs(curve.loss.value - (1 + 2**-0.3)) < 0.05
    assert curve.score is not None
    assert curve.score.interval[0] < 0.5 < curve.score.interval[1]
    assert "Twice the rows (2,000) would give eval loss 1.8" in sweeps.predictions(curve)[0]
    figures.learning_curve(tmp_path / "curve.png", curve)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_are_those_of_the_scores_and_groups_of_the_rows(config: Compose, tmp_path: Path) -> None:
    def widths(name: str, scores: list[float], groups: list[str | None]) -> tuple[float, float]:
        (tmp_path / name).mkdir()
        jobs = sweep(config, tmp_path / name, ("train.data_share=0.5",), ("train.data_share=1.0",))
        for job in jobs:
            (Path(job.stages["tokens"]) / "groups.json").write_text(json.dumps(groups), "utf-8")
        made = Scores([scores] * 4, groups, "rouge")
        record = select.record(rank(jobs, "lowest", made.rows).selection, "rouge", [], scored_rows=10)
        curve = learning_curve.of(jobs, record, made)
        assert curve is not None
        point = curve.points[0]
        assert point.loss_interval is not None
        assert point.score_interval is not None
        return point.loss_interval[1] - point.loss_interval[0], point.score_interval[1] - point.score_interval[0]

    binary, alone = [0.0] * 5 + [1.0] * 5, [None] * 10
    loss, score = widths("rows", binary, [*alone])
    assert widths("graded", [0.45] * 5 + [0.55] * 5, [*alone])[1] < score
    by_group = widths("groups", binary, [f"{place // 2}" for place in range(10)])
    assert by_group[0] > loss
    assert by_group[1] > score


def test_a_training_with_the_untrained_model_only_is_left_out(config: Compose, tmp_path: Path) -> None:
    jobs = sweep(config, tmp_path, *((f"train.data_share={share}",) for share in SHARES))
    jobs[0].candidates = [replace(jobs[0].candidates[0], step=0)]
    curve = learning_curve.of(jobs, select.record(rank(jobs, "lowest").selection, "eval_loss", []))
    assert curve is not None
    assert [point.job for point in curve.points] == [1, 2, 3]


def test_other_sweeps_have_no_curve(config: Compose, tmp_path: Path) -> None:
    def curve(name: str, *jobs: tuple[str, ...]) -> object:
        (tmp_path / name).mkdir()
        made = sweep(config, tmp_path / name, *jobs)
        return learning_curve.of(made, select.record(rank(made, "lowest").selection, "eval_loss", []))

    half, whole = "train.data_share=0.5", "train.data_share=1.0"
    assert curve("same", (whole, "train.learning_rate=1e-3"), (whole, "train.learning_rate=1e-4")) is None
    assert curve("other", (half, "train.learning_rate=1e-3"), (whole, "train.learning_rate=1e-4")) is None
    assert curve("seeds", (half, "seed=1"), (whole, "seed=2")) is not None  # two sizes: shown, and not predicted
