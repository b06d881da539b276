"""Store finished stages under a hash of their inputs, and reuse them.

A stage is a folder ``<store>/<stage>/<key>``, and its key is a hash of exactly the inputs that it was built from. Work
happens in ``<key>.partial``. The manifest is written and the folder renamed last, so a folder with its final name is a
finished stage.

Two more folders make deletion safe: ``.in-use`` has the keys of the stages that each living process uses, and ``.runs``
the folders of the runs and jobs that have used the store. Stages that are older than ``.runs``, whose runs are not
registered, are listed in ``.unregistered.json``.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from sftlab.errors import SftlabError, StageError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
IN_USE, RUNS, UNREGISTERED = ".in-use", ".runs", ".unregistered.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Phrases in messages of Python (and Rust) and of torch's file writer when the disk is full.
DISK_FULL = (os.strerror(errno.ENOSPC), "inline_container", "iostream error")


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder and key, whether it was ``cached``, and the seconds that it took otherwise."""

    name: str
    key: str
    path: Path
    cached: bool
    seconds: float

    @property
    def partial(self) -> Path:
        """The folder in which it is built."""
        return self.path.with_name(f"{self.path.name}.partial")


class Store:
    """A folder of finished stages, which many runs may share, also at the same time."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Return the folder of the stage with these inputs, whether it exists or not."""
        return self.root / name / key_of(inputs)

    def has(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Return whether the stage with these inputs is finished."""
        return _manifest(self.path(name, inputs)) is not None

    def finished(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        """List folder and manifest of every finished stage of a kind, ordered by key."""
        folders = sorted(file.parent for file in (self.root / name).glob(f"*/{MANIFEST}"))
        found = ((folder, _manifest(folder)) for folder in folders if not folder.name.endswith(".partial"))
        return [(folder, manifest) for folder, manifest in found if manifest is not None]

    def stage(
        self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], None], *, resumable: bool = False
    ) -> Stage:
        """Return the finished stage with these inputs. If it does not exist, ``build`` builds it in a folder.

        Raises:
            StageError: the disk is full or the store cannot be written.
            Exception: any error of ``build``; the stage does not exist then, and a later call builds it.
        """
        with self.building(name, inputs, resumable=resumable) as stage:
            if stage.cached:
                return stage
            start = time.monotonic()
            build(stage.partial)
        return replace(stage, seconds=time.monotonic() - start)

    @contextmanager
    def building(self, name: str, inputs: Mapping[str, Any], *, resumable: bool = False) -> Iterator[Stage]:
        """Yield the finished stage with these inputs; if it is not ``cached``, the block builds it in ``partial``.

        If another process builds the same stage, wait for it. The folder of a killed build is deleted, unless the
        stage is ``resumable``: then the block gets it unchanged.

        Raises:
            StageError: the disk is full or the store cannot be written.
            Exception: any error of the block; the stage does not exist then, and a later call builds it.
        """
        final = self.path(name, inputs)
        use(self.root, final.name)  # before the manifest is read: see ``withdraw``
        if _manifest(final) is not None:
            yield self._found(name, final)
            return
        new = Stage(name, final.name, final, cached=False, seconds=0.0)
        partial = new.partial
        with self.lock(name, final.name):
            if _manifest(final) is not None:  # another process built it meanwhile
                yield self._found(name, final)
                return
            try:
                if final.exists():  # without a manifest: a disk that lost its last writes
                    shutil.rmtree(final)
                if partial.exists() and not resumable:
                    shutil.rmtree(partial)
                partial.mkdir(exist_ok=True)
                start = time.monotonic()
                yield new
                seconds = time.monotonic() - start
                manifest = {"stage": name, "key": final.name, "seconds": round(seconds, 1), "inputs": inputs}
                sync(partial)
                write_json(partial / MANIFEST, manifest)
                partial.rename(final)
            except BaseException as error:
                if not resumable:  # frees a full disk
                    shutil.rmtree(partial, ignore_errors=True)
                if not isinstance(error, SftlabError) and (reason := full(error)):
                    raise StageError(
                        f"{name}: cannot write {getattr(error, 'filename', None) or partial}: {reason}; free some "
                        "space, or set store= to a folder on another disk. Completed stages are reused"
                    ) from error
                raise

    def remove(self, stage: Stage) -> bool:
        """Delete a finished stage. Return False if other processes use it or have deleted it."""
        with self.lock(stage.name, stage.key):
            if _manifest(stage.path) is None or (trash := withdraw(self.root, stage.path)) is None:
                return False
        shutil.rmtree(trash)
        return True

    def register(self, folder: Path) -> None:
        """Register the folder of a run or job, so that ``mode=clean`` retains the stages that its record names.

        Raises:
            StageError: the store cannot be written.
        """
        path = str(folder.resolve())
        with self._writing():
            if not (self.root / RUNS).is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                if old := unregistered(self.root):
                    write_json(self.root / UNREGISTERED, sorted(old))
                (self.root / RUNS).mkdir(exist_ok=True)
            entry = {"folder": path, "host": os.uname().nodename}
            write_json(self.root / RUNS / f"{key_of(entry)}.json", entry)

    @contextmanager
    def lock(self, name: str, key: str) -> Iterator[None]:
        """Lock a stage for this process. If another process holds the lock, log it and wait.

        Raises:
            StageError: the store cannot be written.
        """
        from filelock import FileLock, Timeout

        with self._writing():
            (self.root / name).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / name / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("%s: waiting for another run that builds this stage (%s)", name, self.root / name / key)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StageError(
                f"store={str(self.root)!r}: cannot be written: {error.filename}: {error.strerror}; "
                "set store= to a writable folder"
            ) from error

    def abandoned(self, name: str) -> Iterator[Path]:
        """Yield the folders of killed builds of a kind, each locked for this process while the caller reads it."""
        from filelock import FileLock, Timeout

        for folder in sorted((self.root / name).glob("*.partial")):
            with suppress(Timeout), FileLock(self.root / name / f"{folder.stem}.lock").acquire(timeout=0):
                yield folder

    def _found(self, name: str, final: Path) -> Stage:
        # Shows when a stage was last used. A store may be read-only for this user.
        with suppress(OSError):
            os.utime(final / MANIFEST)
        return Stage(name, final.name, final, cached=True, seconds=0.0)


class ScratchStore(Store):
    """A store for a dry run: it reads the finished stages of another store, and builds all others in its own folder."""

    def __init__(self, root: str | Path, other: Store) -> None:
        super().__init__(root)
        self.other = other

    @contextmanager
    def building(self, name: str, inputs: Mapping[str, Any], *, resumable: bool = False) -> Iterator[Stage]:
        """Yield the finished stage of either store, or else one to build here."""
        if self.other.has(name, inputs):
            yield Stage(name, key_of(inputs), self.other.path(name, inputs), cached=True, seconds=0.0)
            return
        with super().building(name, inputs, resumable=resumable) as stage:
            yield stage


class _Use:
    """The stages of one store that this process uses: a file with their keys, and a lock that ends with the process."""

    def __init__(self, root: Path) -> None:
        from filelock import FileLock

        (root / IN_USE).mkdir(parents=True, exist_ok=True)
        self.file = root / IN_USE / f"{uuid.uuid4().hex}.keys"
        self.lock = FileLock(self.file.with_suffix(".lock"))
        self.lock.acquire()
        self.keys: set[str] = set()
        in_use(root, besides=self.file)  # deletes the files of killed processes
        atexit.register(self.end)

    def add(self, key: str) -> None:
        if key not in self.keys:
            with self.file.open("a", encoding="ascii") as file:
                file.write(key + "\n")
            self.keys.add(key)

    def end(self) -> None:
        for path in (self.file, self.file.with_suffix(".lock")):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self.lock.release()


_USED: dict[tuple[int, Path], _Use] = {}  # by process, since a forked process does not hold the locks of its parent


def use(root: Path, key: str) -> None:
    """Mark a stage as used until this process ends. In a read-only store no mark is needed: nothing is deleted."""
    here = (os.getpid(), root.resolve())
    with suppress(OSError):
        if here not in _USED:
            _USED[here] = _Use(here[1])
        _USED[here].add(key)


def in_use(root: Path, besides: Path | None = None) -> set[str]:
    """Return the keys of the stages that other living processes use."""
    from filelock import FileLock

    own = _USED.get((os.getpid(), root.resolve()))
    keys: set[str] = set()
    for lock in sorted((root / IN_USE).glob("*.lock")):
        file = lock.with_suffix(".keys")
        if file.name in {path.name for path in (besides, own and own.file) if path}:
            continue
        try:
            with FileLock(lock).acquire(timeout=0):  # its process has ended
                file.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        except OSError:  # Timeout is an OSError. A lock of another user cannot be opened, and counts as alive
            with suppress(FileNotFoundError):
                keys.update(file.read_text("ascii").split())
    return keys


def withdraw(root: Path, stage: Path) -> Path | None:
    """Move a stage away for deletion, while the caller holds its lock. Return None if another process uses it.

    A process that uses a stage marks it and then reads the manifest. This function hides the manifest and then reads
    the marks. So either the process does not see the stage, or this function sees the mark and restores the manifest.
    """
    manifest, hidden = stage / MANIFEST, stage / f".{MANIFEST}"
    trash = root / f".trash-{stage.parent.name}-{stage.name}-{os.getpid()}"
    if not manifest.exists():  # unfinished: its lock suffices
        return stage.rename(trash)
    manifest.rename(hidden)
    try:
        if stage.name not in in_use(root):
            return stage.rename(trash)  # atomic: no process sees a part of it
    except OSError:
        hidden.rename(manifest)
        raise
    hidden.rename(manifest)
    return None


def unregistered(root: Path) -> set[str]:
    """Return the stages (kind/key) that were built by a version without registered runs."""
    if not (root / RUNS).is_dir():
        folders = [*(file.parent for file in root.glob(f"[!.]*/*/{MANIFEST}")), *root.glob("[!.]*/*.partial")]
        return {f"{folder.parent.name}/{folder.stem}" for folder in folders}
    with suppress(FileNotFoundError):
        return set(json.loads((root / UNREGISTERED).read_text("utf-8")))
    return set()


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a finished stage; None if there is no finished stage."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "inputs" in manifest else None


def sync(folder: Path) -> None:
    """Flush a folder to the disk, so that a stage marked as finished is complete even after a power failure."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def key_of(inputs: Mapping[str, Any]) -> str:
    """Hash the canonical JSON of inputs to a key of 16 hexadecimal digits."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str | None]:
    """Return the installed versions of packages whose code decides a stage's result; None for a missing package.

    They are part of the stage's inputs. List only packages that the configuration uses.
    """

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in packages}


def full(error: BaseException | None) -> str | None:
    """Return why the disk cannot be written, from an error or its causes; None if the error is another one.

    Libraries in C++ and Rust raise errors of other types, so their text is searched.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error.strerror
        if any(words in str(error) for words in DISK_FULL):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recalled(name: str) -> dict[str, Any]:
    """Return what ``remember`` stored under this name on this machine; {} if it cannot be read."""
    try:
        return dict(json.loads(_memory(name).read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # missing or broken
        return {}


def remember(name: str, key: str, value: Any) -> None:
    """Store a value on this machine for later runs with any store, if the user's cache folder is writable."""
    memory = _memory(name)
    if memory.is_absolute():  # a relative path means that the user has no home folder
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {**recalled(name), key: value})


def _memory(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sftlab", f"{name}.json")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # no partial file may stay, also after Ctrl-C
        partial.unlink(missing_ok=True)
        raise
