"""One job of a sweep: a composed config, and what its training found. A single run is a sweep of one job."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sftlab.config import Config
from sftlab.records import Candidate
from sftlab.store import write_json

JOB = "job.json"


@dataclass
class Job:
    """What a job leaves in ``job.json`` for the decision, which may run in another process.

    ``comparable`` holds everything that must be equal for two jobs' validation losses to be ranked
    together; ``stages`` the folder of each finished stage.
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
    trained_as: str = "a job of its own"
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


def jobs(folder: Path) -> list[Job]:
    """The jobs of a run: the one in its folder, or those in its numbered subfolders, by number."""
    files = [folder / JOB] if (folder / JOB).is_file() else list(folder.glob(f"*/{JOB}"))
    return sorted((Job.read(file) for file in files), key=lambda job: job.number)
