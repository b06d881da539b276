import json
from pathlib import Path

import pytest

from sftlab.errors import StageError
from sftlab.records import Candidate
from sftlab.train.select import record, select


def candidate(folder: Path, job: int, epoch: float, losses: list[float], tokens: int = 10) -> Candidate:
    checkpoint = folder / f"job-{job}" / f"checkpoint-{int(epoch)}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rows.json").write_text(json.dumps([[loss * tokens, tokens] for loss in losses]))
    mean = sum(losses) / len(losses)
    return Candidate(mean, epoch, int(epoch), str(checkpoint), job, [f"job={job}"], None, 1.0)


def test_the_lowest_loss_over_all_jobs_is_selected(tmp_path: Path) -> None:
    made = [
        candidate(tmp_path, 0, 1, [1.0] * 40),
        candidate(tmp_path, 0, 2, [0.9] * 40),
        candidate(tmp_path, 1, 1, [0.5] * 40),
        candidate(tmp_path, 1, 2, [0.7] * 40),
    ]
    chosen = select(made, "lowest")
    assert chosen.chosen == chosen.best == made[2]
    assert chosen.ties == [made[2]]
    assert chosen.candidates == made
    assert select(made, "earliest").chosen == made[2]


def test_ties_are_named_and_earliest_takes_the_least_trained(tmp_path: Path) -> None:
    # Rows that disagree: half got better, half got worse, by about as much.
    first = [1.0, 2.0] * 20
    second = [1.5, 1.48] * 20
    made = [
        candidate(tmp_path, 0, 3, second),
        candidate(tmp_path, 0, 1, first),
        candidate(tmp_path, 1, 2, [9.0] * 40),
    ]
    lowest = select(made, "lowest")
    assert lowest.chosen == made[0]
    assert lowest.ties == made[:2]
    assert select(made, "earliest").chosen == made[1]


def test_among_losses_that_differ_by_rounding_the_earliest_is_the_lowest(tmp_path: Path) -> None:
    made = [candidate(tmp_path, 0, epoch, [7.0 * (1 - epoch * 6e-8)] * 40) for epoch in (2, 0, 1)]
    assert select(made, "lowest").chosen == made[1]
    assert select(made, "lowest").ties == made


def test_groups_of_validation_rows_vary_together(tmp_path: Path) -> None:
    made = [
        candidate(tmp_path, 0, 1, [1.0] * 40),
        candidate(tmp_path, 0, 2, [0.8] * 10 + [1.05] * 10 + [0.9] * 10 + [1.0] * 10),
    ]
    assert select(made, "lowest").ties == [made[1]]
    groups = [str(row // 10) for row in range(40)]
    assert select(made, "lowest", groups=groups).ties == made


def test_without_a_candidate_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no job finished with a checkpoint"):
        select([], "lowest")


def test_the_loss_of_the_selected_checkpoint_by_source_is_weighted_by_tokens(tmp_path: Path) -> None:
    made = [candidate(tmp_path, 0, 1, [2.0, 2.0, 2.0]), candidate(tmp_path, 0, 2, [1.0, 0.5, 0.9])]
    (Path(made[1].checkpoint) / "rows.json").write_text(json.dumps([[10.0, 10], [1.0, 2], [27.0, 30]]))
    found = record(select(made, "lowest"), "eval_loss", [], ["a", "b", "a"]).by_source
    assert [(one.source, one.rows, one.tokens, one.eval_loss) for one in found] == [
        ("a", 2, 40, pytest.approx(37 / 40)),
        ("b", 1, 2, 0.5),
    ]
    assert record(select(made, "lowest"), "eval_loss", []).by_source == []
