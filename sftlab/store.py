"""Finished stages, found again by what went into them.

A stage is a folder ``<store>/<stage>/<key>``, and its key is a hash of exactly the inputs that it
was built from. Work happens in ``<key>.partial``; the manifest is written and the folder renamed
last, so a folder with its final name is a finished one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sftlab.errors import StageError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, its key, and whether it was there already (``cached``)."""

    name: str
    key: str
    path: Path
    cached: bool
    seconds: float


class Store:
    """A folder of finished stages that many runs, also at once, may share."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Where the stage with these inputs is, or would be."""
        return self.root / name / key_of(inputs)

    def has(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage with these inputs is finished."""
        return _manifest(self.path(name, inputs)) is not None

    def finished(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and manifest of every finished stage of a kind, in the order of their keys."""
        folders = sorted(file.parent for file in (self.root / name).glob(f"*/{MANIFEST}"))
        found = ((folder, _manifest(folder)) for folder in folders if not folder.name.endswith(".partial"))
        return [(folder, manifest) for folder, manifest in found if manifest is not None]

    def stage(
        self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], None], *, resumable: bool = False
    ) -> Stage:
        """The finished stage with these inputs, built in a folder by ``build`` if it is not there yet.

        Another process that builds the same stage is waited for. What a killed build left is
        thrown away, unless it is ``resumable``: then ``build`` gets the folder as it was left.

        Raises:
            StageError: the disk is full or the store cannot be written.
            Exception: whatever ``build`` raises; the stage is not there then, and can be asked for again.
        """
        final = self.path(name, inputs)
        if _manifest(final) is not None:
            return self._found(name, final)
        partial = final.with_name(final.name + ".partial")
        with self.lock(name, final.name):
            if _manifest(final) is not None:  # made while this one waited
                return self._found(name, final)
            try:
                if final.exists():  # a disk that lost its last writes
                    shutil.rmtree(final)
                if partial.exists() and not resumable:
                    shutil.rmtree(partial)
                partial.mkdir(exist_ok=True)
                start = time.monotonic()
                build(partial)
                seconds = time.monotonic() - start
                manifest = {"stage": name, "key": final.name, "seconds": round(seconds, 1), "inputs": inputs}
                sync(partial)
                write_json(partial / MANIFEST, manifest)
                partial.rename(final)
            except BaseException as error:
                if not resumable:  # a full disk must not stay full
                    shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, OSError) and error.errno in FULL:
                    raise StageError(
                        f"{name}: cannot write {error.filename or partial}: {error.strerror}; "
                        "free some space or set store= to another folder. What was finished is kept"
                    ) from error
                raise
        return Stage(name, final.name, final, cached=False, seconds=seconds)

    def remove(self, stage: Stage) -> None:
        """Delete a finished stage; asked for again, it is built again."""
        with self.lock(stage.name, stage.key):
            (stage.path / MANIFEST).unlink()  # first, so that nobody takes half of it for a finished one
            shutil.rmtree(stage.path)

    @contextmanager
    def lock(self, name: str, key: str) -> Iterator[None]:
        """Keep a stage to this process; another one that holds it is waited for, with a line that says so.

        Raises:
            StageError: the store cannot be written.
        """
        from filelock import FileLock, Timeout

        try:
            (self.root / name).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / name / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("%s: waiting for another run that makes this stage (%s)", name, self.root / name / key)
                lock.acquire()
        except OSError as error:
            raise StageError(
                f"store={str(self.root)!r}: cannot be written: {error.filename}: {error.strerror}; "
                "set store= to a folder that you may write to"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def abandoned(self, name: str) -> Iterator[Path]:
        """The folders that killed builds of a kind left, each kept to this process while it is looked at."""
        from filelock import FileLock, Timeout

        for folder in sorted((self.root / name).glob("*.partial")):
            with suppress(Timeout), FileLock(self.root / name / f"{folder.stem}.lock").acquire(timeout=0):
                yield folder

    def _found(self, name: str, final: Path) -> Stage:
        # Tells people when a stage was last of use; a store may be shared by those who only read it.
        with suppress(OSError):
            os.utime(final / MANIFEST)
        return Stage(name, final.name, final, cached=True, seconds=0.0)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What a finished stage was made from; None where there is no finished stage."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "inputs" in manifest else None


def sync(folder: Path) -> None:
    """Have the disk itself hold all of a folder: what is marked as finished after it is so even if the power fails."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def key_of(inputs: Mapping[str, Any]) -> str:
    """A short name for exactly these inputs: the hash of their canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str | None]:
    """The installed versions of the packages whose code decides a stage's result; None for one that is missing.

    They are part of the stage's inputs. Packages that the configuration at hand does not use are left out.
    """

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in packages}


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
