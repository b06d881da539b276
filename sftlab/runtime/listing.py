"""List the runs in a folder and in the store's register, with the state of each. Nothing is written."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sftlab.errors import ConfigError, shown
from sftlab.results import RunRecord
from sftlab.runtime.job import JOB, RUN
from sftlab.runtime.run import read_record
from sftlab.runtime.store import RUNS

log = logging.getLogger(__name__)

State = Literal["success", "running", "killed", "failed", "damaged"]
"""``killed``: the record says that the run is running, and no process holds the lock of its folder.
``damaged``: there is no readable record."""

SKIPPED = (".hydra", "predictions")  # folders in a run's folder that contain no run
DEEPEST = 20  # levels of a configuration
Values = Mapping[str, object]


@dataclass(frozen=True)
class Listed:
    """A run or sweep in its folder."""

    folder: Path
    state: State
    started: datetime
    """When it started; of a damaged run, when its ``run.json`` was last written."""
    record: RunRecord | None = None
    """None if the run is damaged."""
    error: str | None = None
    """Why it failed, or why its record cannot be read."""
    jobs: int = 0
    """Its jobs with a readable ``job.json``."""
    config: dict[str, str] = field(default_factory=dict)
    """Configuration of the job that was selected, or else of the first one: values by dotted key, as on the command
    line. Empty if no job has recorded it."""
    cost: float | None = None
    """Seconds of the stages that its jobs computed, times devices for a training; null if none is recorded."""


def runs(outputs: Path, store: Path) -> list[Listed]:
    """List the runs below ``outputs`` and in the folders that the store has registered, the newest first.

    Links are not followed. Folders that cannot be read, and registered ones that this machine cannot see, are logged.
    Of a folder of runs that was copied, only the copy below ``outputs`` is listed.
    """
    hosts, elsewhere = _registered(store)
    files = _files(outputs, store.resolve())
    for folder in hosts:
        if folder.is_dir() and not any(folder.is_relative_to(known) for known in (outputs.resolve(), *files)):
            files |= _files(folder, store.resolve())
    if elsewhere:
        log.warning("%d runs of other machines are not listed: this machine cannot see their folders", elsewhere)
    listed = [_listed(folder, jobs, hosts.get(folder)) for folder, jobs in files.items()]
    here = outputs.resolve()
    below = {one.record.id for one in listed if one.record is not None and one.folder.is_relative_to(here)}
    listed = [
        one for one in listed if one.folder.is_relative_to(here) or one.record is None or one.record.id not in below
    ]
    return sorted(listed, key=lambda run: (run.started, str(run.folder)), reverse=True)


def moment(text: str, now: datetime) -> datetime:
    """Parse an ISO time (UTC unless it has a zone), or an age such as ``12h``, ``7d`` or ``2w``.

    Raises:
        ValueError: It is neither.
    """
    if age := re.fullmatch(r"(\d{1,6})([hdw])", text):
        return now - int(age[1]) * {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}[age[2]]
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _files(root: Path, store: Path) -> dict[Path, list[Path]]:
    """The folders of all runs below a folder, with the ``job.json`` files of each."""

    def unreadable(error: OSError) -> None:
        log.warning("%s: cannot be read (%s); its runs are not listed", error.filename, error.strerror)

    jobs: defaultdict[Path, list[Path]] = defaultdict(list)
    owner: dict[str, Path] = {}  # of each folder below a run
    for folder, below, names in os.walk(root.resolve(), onerror=unreadable):
        below[:] = [name for name in below if name not in SKIPPED and Path(folder, name) != store]
        if RUN in names:
            owner[folder] = Path(folder)
            jobs[owner[folder]] = []
        elif (parent := owner.get(os.path.dirname(folder))) is not None:
            owner[folder] = parent
        if JOB in names and folder in owner:
            jobs[owner[folder]].append(Path(folder, JOB))
    return jobs


def _registered(store: Path) -> tuple[dict[Path, str], int]:
    """The registered folders that exist with their machine, and how many are on machines that this one cannot see."""
    hosts, elsewhere = dict[Path, str](), 0
    for entry in (store / RUNS).glob("*.json"):
        values = _json(entry)
        folder, host = values.get("folder"), values.get("host")
        if isinstance(folder, str) and isinstance(host, str):
            if Path(folder).is_dir():
                hosts[Path(folder)] = host
            else:  # a folder of this machine that is missing was moved or deleted
                elsewhere += host != os.uname().nodename
    return hosts, elsewhere


def _listed(folder: Path, files: list[Path], host: str | None) -> Listed:
    path = folder / RUN
    try:
        record = read_record(path, json.loads(path.read_text("utf-8")))
        started = datetime.fromisoformat(record.started).astimezone(UTC)
    except (ConfigError, OSError, ValueError, RecursionError) as error:
        reason = error.problems[0].message if isinstance(error, ConfigError) else f"cannot be read: {error}"
        return Listed(folder, "damaged", _modified(path), error=f"{RUN}: {reason}")
    jobs = [job for job in map(_json, files) if job.get("run") in (record.id, None)]
    number = record.selection.job if record.selection is not None else None
    jobs.sort(key=lambda job: (job.get("number") != number, str(job.get("number")).rjust(9)))
    config = next((dict(_flat(job["config"])) for job in jobs if isinstance(job.get("config"), dict)), {})
    return Listed(
        folder=folder,
        state=_killed_or_running(folder, host) if record.status == "running" else record.status,
        started=started,
        record=record,
        error=record.error,
        jobs=len(jobs),
        config=config,
        cost=_cost(record, jobs),
    )


def _killed_or_running(folder: Path, host: str | None) -> State:
    """Whether a process holds the lock of the folder; a run of another machine counts as running."""
    from filelock import FileLock, Timeout

    if host not in (None, os.uname().nodename):
        return "running"
    if not (lock := folder / ".lock").is_file():
        return "killed"
    try:
        with FileLock(lock).acquire(timeout=0):
            return "killed"
    except (Timeout, OSError):  # a lock of another user cannot be opened, and counts as held
        return "running"


def _cost(record: RunRecord, jobs: list[Values]) -> float | None:
    """Seconds of the computed stages of all jobs, and of those that follow the jobs."""
    if not jobs:
        return sum(record.times.values()) if record.times else None
    total, known = 0.0, False
    for job in jobs:
        times, receipt = job.get("times"), job.get("receipt")
        processes = receipt.get("num_processes") if isinstance(receipt, dict) else None
        for stage, seconds in times.items() if isinstance(times, dict) else ():
            if isinstance(seconds, int | float):
                total += seconds * (processes if stage == "train" and isinstance(processes, int) else 1)
                known = True
    if record.selection is not None:  # the stages of the whole run are evaluated after the jobs
        evaluated = ("baseline", "finetuned", "contenders.")
        total += sum(seconds for stage, seconds in record.times.items() if stage.startswith(evaluated))
    return total if known else None


def _modified(path: Path) -> datetime:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return datetime.fromtimestamp(0, UTC)


def _json(path: Path) -> Values:
    """The object in a JSON file; {} if it cannot be read."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _flat(value: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """The values of a configuration by dotted key."""
    if isinstance(value, dict) and value and depth < DEEPEST:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name), depth + 1)
    else:
        yield prefix, value if isinstance(value, str) else shown(value)
