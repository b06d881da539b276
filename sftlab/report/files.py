"""Machine-readable files of a run: ``sweep.csv`` and ``metrics.jsonl``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from sftlab.records import read_jsonl, write_jsonl
from sftlab.runtime.job import Job, trained_as
from sftlab.train.select import Selection


def sweep_csv(path: Path, selection: Selection, jobs: Sequence[Job]) -> None:
    """Write a row for every checkpoint of every job, in the order of jobs and steps."""
    header = ("job", "overrides", "epoch", "step", "train_loss", "eval_loss", "seconds", "score")
    ranked = {(row.job, row.checkpoint): row for row in selection.candidates}
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow([*header, "trained_as", "selected"])
        for job in jobs:
            for candidate in job.candidates:
                row = ranked.get((job.number, candidate.checkpoint), candidate)
                numbers = [row.epoch, row.step, row.train_loss, row.eval_loss, row.seconds, row.score]
                kind = trained_as(job, jobs)
                out.writerow([row.job, " ".join(row.overrides), *numbers, kind, row == selection.chosen])


def metrics(folder: Path, jobs: Sequence[Job]) -> None:
    """Copy everything that the trainers logged into a run's folder, with the job's number if there are several."""
    rows = []
    for job in jobs:
        if "train" not in job.stages:
            continue
        number = {"job": job.number} if len(jobs) > 1 else {}
        rows += [number | row for row in read_jsonl(Path(job.stages["train"]) / "metrics.jsonl")]
    write_jsonl(folder / "metrics.jsonl", rows)
