"""Finished stages, found again by what went into them.

A stage is a folder ``<store>/<stage>/<key>``, and its key is a hash of exactly the inputs that it
was built from. Work happens in ``<key>.partial``; the manifest is written and the folder renamed
last, so a folder with its final name is a finished one.

Two more folders are for deleting safely: ``.in-use`` has the keys of the stages that each living process uses, and
``.runs`` the folders of the runs and jobs that have used the store. The stages that are older than ``.runs``, whose
runs are not registered, are listed in ``.unregistered.json``.
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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sftlab.errors import SftlabError, StageError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
IN_USE, RUNS, UNREGISTERED = ".in-use", ".runs", ".unregistered.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# How Python (and Rust), and torch's writer of files, say that the disk is full.
DISK_FULL = (os.strerror(errno.ENOSPC), "inline_container", "iostream error")


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
        use(self.root, final.name)  # before the look at the manifest: see ``withdraw``
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
                if not isinstance(error, SftlabError) and (reason := full(error)):
                    raise StageError(
                        f"{name}: cannot write {getattr(error, 'filename', None) or partial}: {reason}; "
                        "free some space or set store= to another folder. What was finished is kept"
                    ) from error
                raise
        return Stage(name, final.name, final, cached=False, seconds=seconds)

    def remove(self, stage: Stage) -> bool:
        """Delete a finished stage; asked for again, it is built again. False if others use it or have deleted it."""
        with self.lock(stage.name, stage.key):
            if _manifest(stage.path) is None or (trash := withdraw(self.root, stage.path)) is None:
                return False
        shutil.rmtree(trash)
        return True

    def register(self, folder: Path) -> None:
        """Note where a run or job keeps its record, so that ``mode=clean`` knows which stages it refers to.

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
        """Keep a stage to this process; another one that holds it is waited for, with a line that says so.

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
                log.info("%s: waiting for another run that makes this stage (%s)", name, self.root / name / key)
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
                "set store= to a folder that you may write to"
            ) from error

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


class ScratchStore(Store):
    """A store for a dry run: it reads another one's finished stages, and builds the others in a folder of its own."""

    def __init__(self, root: str | Path, other: Store) -> None:
        super().__init__(root)
        self.other = other

    def stage(
        self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], None], *, resumable: bool = False
    ) -> Stage:
        """The finished stage of either store, or one built here."""
        if self.other.has(name, inputs):
            return Stage(name, key_of(inputs), self.other.path(name, inputs), cached=True, seconds=0.0)
        return super().stage(name, inputs, build, resumable=resumable)


class _Use:
    """The keys of the stages of one store that this process uses: a file beside a lock that ends with the process."""

    def __init__(self, root: Path) -> None:
        from filelock import FileLock

        (root / IN_USE).mkdir(parents=True, exist_ok=True)
        self.file = root / IN_USE / f"{uuid.uuid4().hex}.keys"
        self.lock = FileLock(self.file.with_suffix(".lock"))
        self.lock.acquire()
        self.keys: set[str] = set()
        in_use(root, besides=self.file)  # deletes what killed processes have left
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


_USED: dict[tuple[int, Path], _Use] = {}  # by process, since a forked one does not hold the locks of its parent


def use(root: Path, key: str) -> None:
    """Mark a stage as used by this process until it ends. In a store that may not be written nothing is deleted."""
    here = (os.getpid(), root.resolve())
    with suppress(OSError):
        if here not in _USED:
            _USED[here] = _Use(here[1])
        _USED[here].add(key)


def in_use(root: Path, besides: Path | None = None) -> set[str]:
    """The keys of the stages that other living processes use."""
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
        except OSError:  # Timeout is one; and that of another user, which may not be opened, counts as alive
            with suppress(FileNotFoundError):
                keys.update(file.read_text("ascii").split())
    return keys


def withdraw(root: Path, stage: Path) -> Path | None:
    """Move a stage out of the way for deletion, while its lock is held; None if another process uses it.

    A user marks the stage and then looks for the manifest; here the manifest goes and then the marks are looked at.
    So either the user does not find the stage, or its mark is found here and the manifest is put back.
    """
    manifest, hidden = stage / MANIFEST, stage / f".{MANIFEST}"
    trash = root / f".trash-{stage.parent.name}-{stage.name}-{os.getpid()}"
    if not manifest.exists():  # unfinished: its lock is all there is to it
        return stage.rename(trash)
    manifest.rename(hidden)
    try:
        if stage.name not in in_use(root):
            return stage.rename(trash)  # in one step: nobody finds half of it
    except OSError:
        hidden.rename(manifest)
        raise
    hidden.rename(manifest)
    return None


def unregistered(root: Path) -> set[str]:
    """The stages (kind/key) of a version that did not register the runs that use them."""
    if not (root / RUNS).is_dir():
        folders = [*(file.parent for file in root.glob(f"[!.]*/*/{MANIFEST}")), *root.glob("[!.]*/*.partial")]
        return {f"{folder.parent.name}/{folder.stem}" for folder in folders}
    with suppress(FileNotFoundError):
        return set(json.loads((root / UNREGISTERED).read_text("utf-8")))
    return set()


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


def full(error: BaseException | None) -> str | None:
    """Why nothing more can be written, by an error or what it came from; libraries in C++ and Rust word it freely."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error.strerror
        if any(words in str(error) for words in DISK_FULL):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recalled(name: str) -> dict[str, Any]:
    """What ``remember`` wrote under this name on this machine; nothing where it cannot be read."""
    try:
        return dict(json.loads(_memory(name).read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # there is none, or it is broken
        return {}


def remember(name: str, key: str, value: Any) -> None:
    """Add to what this machine remembers for later runs of any store, if the user's cache can be written."""
    memory = _memory(name)
    if memory.is_absolute():  # a relative path means that there is no home folder
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {**recalled(name), key: value})


def _memory(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sftlab", f"{name}.json")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # at Ctrl-C, too, no partial file may stay
        partial.unlink(missing_ok=True)
        raise
