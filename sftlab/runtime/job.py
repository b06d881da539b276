"""One job of a sweep: a composed config, and the results of its work. A single run is a sweep of one job."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import ConfigDict, PrivateAttr, ValidationError

from sftlab.config import Config
from sftlab.errors import StageError
from sftlab.results import JobRecord, JobSummary
from sftlab.runtime import earlier
from sftlab.runtime.store import write_json

JOB, RUN = "job.json", "run.json"
OWN = "trained separately"


class Job(JobRecord):
    """A job while it works, which sets the fields of its record, and afterwards, read from its ``job.json``."""

    model_config = ConfigDict(frozen=False, validate_assignment=True)

    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """The folder of its ``job.json``."""
        return self._folder

    def settings(self) -> Config:
        """Its configuration, validated again from the file."""
        return Config.model_validate(self.config)

    def origin(self) -> dict[str, object]:
        """The fields of a run's record that say what the job's result was made from."""
        cfg = self.settings()
        return {
            "revisions": revisions(cfg),
            "template_time": cfg.model.template_time,
            "precision": self.precision,
            "row_format": self.row_format,
            "data_sources": self.data_sources,
            "stages": self.stages,
            "times": self.times,
        }

    def write(self, folder: Path) -> None:
        """Replace ``job.json`` in the job's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        write_json(folder / JOB, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a job from its file, also one with an earlier ``schema_version``.

        Raises:
            StageError: It is not the record of a job.
        """
        values = json.loads(path.read_text("utf-8"))
        try:
            job = cls.model_validate(values if "schema_version" in values else earlier.job(values))
        except (ValidationError, AttributeError, LookupError, TypeError) as error:
            raise StageError(
                f"{path}: is not the record of a job: {first_problem(error)}; run the command again"
            ) from error
        job._folder = path.parent
        return job


def revisions(cfg: Config) -> dict[str, str]:
    """The commits of a pinned configuration, by the keys that reproduce them on the command line."""
    commits = {"model.revision": cfg.model.revision}
    guards = {f"eval.guards.{name}": one for name, one in cfg.eval.guards.items()}
    for section, data in {"dataset": cfg.dataset, "eval.dataset": cfg.eval.dataset, **guards}.items():
        if data is not None and (data.sources or data.name_or_path):
            commits |= {f"{part.key}.revision": part.cfg.revision for part in data.parts(section)}
    return {key: commit for key, commit in commits.items() if commit}


def summary(job: Job, *, ranked: bool, among: Sequence[Job]) -> JobSummary:
    """A job as an entry of ``run.json``; ``among`` has the jobs that it may share steps with."""
    return JobSummary(
        job=job.number,
        overrides=job.overrides,
        status=job.status,
        error=job.error,
        ranked=ranked,
        trained_as=trained_as(job, among),
        early_stop=job.receipt.early_stop if job.receipt is not None else None,
        pruned=job.pruned,
    )


def first_problem(error: Exception) -> str:
    """The first problem of an error in reading a record, with the field that has it."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return f"{type(error).__name__}: {error}"


def trained_as(job: Job, among: Sequence[Job]) -> str:
    """How a job's checkpoints were trained: separately, or in the steps of another job of the sweep."""
    alike = [other for other in among if other.family is not None and other.family == job.family]
    if not alike:
        return OWN
    longest = max(alike, key=lambda other: (_length(other), -other.number))
    train = job.settings().train
    if longest is job:
        return OWN
    if _length(job) == _length(longest):
        return f"the same as job {longest.number}"
    if train.lr_scheduler_type == "warmup_stable_decay":
        return f"a decay of {train.lr_scheduler_kwargs['num_decay_steps']} steps from job {longest.number}"
    return f"the first {'epochs' if train.max_steps is None else 'steps'} of job {longest.number}"


def _length(job: Job) -> int:
    """Planned optimizer steps, by which jobs with the same steps per epoch are ordered."""
    steps = job.receipt.planned_steps if job.receipt is not None else None
    return job.settings().train.num_train_epochs if steps is None else steps


def jobs(folder: Path) -> list[Job]:
    """The jobs of the run whose ``run.json`` is in this folder, by number; not those of other runs below it."""
    return sorted((Job.read(file) for file in job_files(folder, owner(folder / RUN))), key=lambda job: job.number)


def job_files(folder: Path, run: str | None) -> list[Path]:
    """The ``job.json`` of each job of a run: the file in its folder, or the files at any depth below it.

    The folder of another run below is skipped: it may be a copy of this one, with jobs of the same run.
    """
    if (single := folder / JOB).is_file() and owner(single) == run:
        return [single]
    files = []
    for inside, below, names in os.walk(folder):
        below[:] = [name for name in below if not Path(inside, name, RUN).exists()]
        files += [Path(inside, JOB)] if JOB in names else []
    return [file for file in files if owner(file) == run]


def conflict(folder: Path, below: Path, runs: tuple[str | None, ...]) -> str | None:
    """Return which record of another run a sweep's job in ``folder`` would replace or be hidden by.

    ``below`` is the sweep's folder, and ``runs`` has the ids whose jobs may be replaced. None without a conflict.
    """
    between = [folder, *(path for path in folder.parents if path.is_relative_to(below))]
    for path in between:
        if path != below and (path / RUN).exists():
            return f"{path} is the folder of another run ({owner(path / RUN)})"
    other = owner(folder / JOB)
    return f"{folder} has a job of another run ({other})" if other and other not in runs else None


def owner(file: Path) -> str | None:
    """The id of the run that a ``run.json`` or ``job.json`` belongs to; None if the file is missing or has no id.

    "" for a file that cannot be read: it belongs to no run.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
        return values.get("id" if file.name == RUN else "run")  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, AttributeError):
        return ""
