"""``run.json`` and ``job.json``: what is written, and which files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sftlab.errors import ConfigError, StageError
from sftlab.results import RunRecord, Verdict
from sftlab.runtime.job import Job
from sftlab.runtime.run import Run

GOLDEN = Path(__file__).parents[1] / "golden"


def written(folder: Path, values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(values), "utf-8")
    return folder


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = Run.start(tmp_path, name="x", mode="train", seed=1, command="sftlab")
    run.update(stages={"train": "store/train/1"})
    run.finish("failed", "the disk is full")
    again = Run.read(tmp_path).record
    assert again == run.record
    assert (again.status, again.error, again.stages) == ("failed", "the disk is full", {"train": "store/train/1"})
    values = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert values["schema_version"] == 2
    assert values.keys() == RunRecord.model_fields.keys()
    with pytest.raises(AssertionError):
        run.update(stage={})
    with pytest.raises(ValidationError):
        run.update(stages=3)


def test_a_record_of_a_newer_version_with_more_fields_is_read(tmp_path: Path) -> None:
    run = Run.start(tmp_path, name="x", mode="train", seed=1, command="sftlab")
    written(tmp_path, {**json.loads((tmp_path / "run.json").read_text("utf-8")), "new": 1})
    assert Run.read(tmp_path).record == run.record


@pytest.mark.parametrize("name", ["demo", "sweep", "rouge", "plan", "compare", "compare_rouge"])
def test_records_of_version_1_are_read(tmp_path: Path, name: str) -> None:
    old: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
    assert old["schema_version"] == 1
    record = Run.read(written(tmp_path, old)).record
    assert record.schema_version == 2
    assert (record.experiment, record.seed, record.mode) == (old["experiment"], old["seed"], old["mode"])
    if "evaluation" in old:
        assert record.evaluation is not None
        assert record.evaluation.comparison is not None
        compared, side = old["evaluation"]["comparison"], old["evaluation"]["finetuned"]
        assert str(record.evaluation.comparison.verdict) == compared["verdict"]
        assert list(record.evaluation.comparison.interval) == compared["ci95"]
        assert record.evaluation.finetuned.value == side[side.get("metric", "accuracy")]
        assert record.evaluation.task == ("rouge" if "metric" in side else "choice")
    if "selection" in old:
        assert record.selection is not None
        assert record.receipt is not None
        assert [row.eval_loss for row in record.selection.candidates] == [
            row["eval_loss"] for row in old["selection"]["candidates"]
        ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "schema_version=None is not supported"),
        ({"schema_version": 3}, "schema_version=3 is not supported"),
        ({"schema_version": 2}, "is not the record of a run: id: Field required"),
        ({"schema_version": 1, "evaluation": {"finetuned": 1}}, "is not the record of a run: AttributeError"),
        ({"schema_version": 1, "evaluation": {"finetuned": {"n": 3}}}, "is not the record of a run: KeyError"),
        ({"schema_version": 1, "precision": "fp16"}, "is not the record of a run"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Run.read(written(tmp_path, values))
    assert "run the command again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_verdict_is_one_sentence_of_its_parts() -> None:
    verdict = Verdict(outcome="better", reason="8 of 8 against 0", notes=["one", "two"])
    assert str(verdict) == "better: 8 of 8 against 0; one; two"


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = Job(number=3, overrides=["seed=1"], config={"seed": 1}, run="7")
    job.stages = {"train": "store/train/1"}
    job.write(tmp_path / "3")
    again = Job.read(tmp_path / "3" / "job.json")
    assert again.model_dump() == job.model_dump()
    assert again.folder == job.folder == tmp_path / "3"
    with pytest.raises(ValidationError):
        job.stages = 3  # type: ignore[assignment]


def test_a_job_of_version_1_is_read_and_anything_else_refused(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"overlap": {}, "precision": {}, "receipt": {}, "plan": None, "evaluation": None}
    old = {"number": 0, "overrides": [], "config": {}, "status": "success", "error": None, "exit_code": 0, "run": None}
    (tmp_path / "job.json").write_text(json.dumps({**old, **empty, "candidates": []}), "utf-8")
    job = Job.read(tmp_path / "job.json")
    assert (job.status, job.receipt, job.overlap) == ("success", None, None)
    (tmp_path / "job.json").write_text("{}", "utf-8")
    with pytest.raises(StageError, match="is not the record of a job"):
        Job.read(tmp_path / "job.json")
