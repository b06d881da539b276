"""One job of a sweep: a composed config, and what its training found. A single run is a sweep of one job."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sftlab.config import Config
from sftlab.records import Candidate
from sftlab.runtime.store import write_json

JOB, RUN = "job.json", "run.json"
OWN = "a job of its own"


@dataclass
class Job:
    """What a job leaves in ``job.json`` for the decision, which may run in another process.

    ``comparable`` holds everything that must be equal for two jobs' validation losses to be ranked
    together; ``family`` is the same for jobs that share their first steps; ``stages`` has the folder of
    each finished stage; ``plan`` and ``evaluation`` are the results of these
    modes. ``run`` is the id of the run that the job belongs
    to: a run's folder may contain other runs. ``folder`` is where its file was read or written, and not in the file.
    """

    number: int
    overrides: list[str]
    config: dict[str, Any]
    status: str = "running"
    error: str | None = None
    exit_code: int = 0
    stages: dict[str, str] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    comparable: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    family: str | None = None
    candidates: list[Candidate] = field(default_factory=list)
    run: str | None = None
    folder: Path = field(default=Path(), compare=False)

    def settings(self) -> Config:
        """Its configuration, validated again from the file."""
        return Config.model_validate(self.config)

    def write(self, folder: Path) -> None:
        """Replace ``job.json`` in the job's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        write_json(folder / JOB, {name: value for name, value in asdict(self).items() if name != "folder"})

    @classmethod
    def read(cls, path: Path) -> Self:
        """A job from its file."""
        values = json.loads(path.read_text("utf-8"))
        values["candidates"] = [Candidate(**row) for row in values["candidates"]]
        return cls(**values, folder=path.parent)


def trained_as(job: Job, among: Sequence[Job]) -> str:
    """What kind of training stands behind a job's checkpoints: its own, or steps of another job of the sweep."""
    alike = [other for other in among if other.family is not None and other.family == job.family]
    if not alike:
        return OWN
    longest = max(alike, key=lambda other: (other.settings().train.num_train_epochs, -other.number))
    train, most = job.settings().train, longest.settings().train.num_train_epochs
    if longest is job:
        return OWN
    if train.num_train_epochs == most:
        return f"the same as job {longest.number}"
    if train.lr_scheduler_type == "warmup_stable_decay":
        return f"a decay of {train.lr_scheduler_kwargs['num_decay_steps']} steps from job {longest.number}"
    return f"the first epochs of job {longest.number}"


def jobs(folder: Path) -> list[Job]:
    """The jobs of the run whose ``run.json`` is in this folder, by number; not those of other runs below it."""
    return sorted((Job.read(file) for file in job_files(folder, owner(folder / RUN))), key=lambda job: job.number)


def job_files(folder: Path, run: str | None) -> list[Path]:
    """The ``job.json`` of each job of a run: the one in its folder, or those at any depth below it.

    Another run's folder below may be a copy of this one, with jobs of the same run: it is not looked into.
    """
    if (single := folder / JOB).is_file() and owner(single) == run:
        return [single]
    files = []
    for inside, below, names in os.walk(folder):
        below[:] = [name for name in below if not Path(inside, name, RUN).exists()]
        files += [Path(inside, JOB)] if JOB in names else []
    return [file for file in files if owner(file) == run]


def conflict(folder: Path, below: Path, runs: tuple[str | None, ...]) -> str | None:
    """Which record of another run a sweep's job in ``folder`` would replace or be hidden by; None if there is none.

    ``below`` is the sweep's folder, and ``runs`` has the ids whose jobs may be replaced.
    """
    between = [folder, *(path for path in folder.parents if path.is_relative_to(below))]
    for path in between:
        if path != below and (path / RUN).exists():
            return f"{path} is the folder of another run ({owner(path / RUN)})"
    other = owner(folder / JOB)
    return f"{folder} has a job of another run ({other})" if other and other not in runs else None


def owner(file: Path) -> str | None:
    """The id of the run that a ``run.json`` or ``job.json`` belongs to; None if it was written without one.

    A file that cannot be read belongs to no run: "".
    """
    try:
        values = json.loads(file.read_text("utf-8"))
        return values.get("id" if file.name == RUN else "run")  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, AttributeError):
        return ""
