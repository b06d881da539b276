"""One job of a sweep: a composed config, and what its training found. A single run is a sweep of one job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sftlab.config import Config
from sftlab.records import Candidate
from sftlab.store import write_json

JOB = "job.json"
OWN = "a job of its own"


@dataclass
class Job:
    """What a job leaves in ``job.json`` for the decision, which may run in another process.

    ``comparable`` holds everything that must be equal for two jobs' validation losses to be ranked
    together; ``family`` is the same for jobs that share their first steps; ``stages`` has the folder of
    each finished stage; ``plan`` is what ``mode=plan`` found out.
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
    receipt: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    family: str | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def settings(self) -> Config:
        """Its configuration, validated again from the file."""
        return Config.model_validate(self.config)

    def write(self, folder: Path) -> None:
        """Replace ``job.json`` in the job's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / JOB, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """A job from its file."""
        values = json.loads(path.read_text("utf-8"))
        values["candidates"] = [Candidate(**row) for row in values["candidates"]]
        return cls(**values)


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
    """The jobs of a run: the one in its folder, or those in its numbered subfolders, by number."""
    files = [folder / JOB] if (folder / JOB).is_file() else list(folder.glob(f"*/{JOB}"))
    return sorted((Job.read(file) for file in files), key=lambda job: job.number)
