"""List and delete the stages that no run refers to.

A run refers to a stage if its ``run.json`` or ``job.json`` contains the stage's key anywhere, or if the stage is an
input of another one that a run refers to. Keys are hashes, and any text that contains one counts: records of other
versions, of a store that was moved, and truncated records protect their stages too. Records are read from the folders
that the store has registered and from all folders below ``clean.outputs``. Stages in use by a process are retained.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sftlab.errors import ConfigError, Problem, StageError, shown
from sftlab.runtime.console import say
from sftlab.runtime.job import JOB, RUN
from sftlab.runtime.processes import INPUTS
from sftlab.runtime.store import MANIFEST, RUNS, in_use, unregistered, withdraw

log = logging.getLogger(__name__)

PARTIAL, KEY = ".partial", re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")
KIND, STAGE = re.compile(r"\w+"), re.compile(r"[0-9a-f]{16}(\.partial)?")
TRASH, RUNNING = re.compile(r"\.trash-\w+-[0-9a-f]{16}(\.partial)?-\d+"), re.compile(r'"status":\s*"running"')
# A job records its stages when it ends, and holds no lock between two stages. So while a run is running, any stage that
# was used recently may belong to it. The limit is for runs that were killed: their record says "running" forever.
RECENT = 24 * 3600


@dataclass(frozen=True)
class Unused:
    """A folder of the store that no run refers to."""

    path: Path
    kind: str
    bytes: int  # hard links count in the first folder of a list only
    last_used: float  # seconds since the epoch


def unreferenced(store: Path, outputs: Path) -> list[Unused]:
    """List the stages that no run refers to, the longest unused first. Nothing is changed.

    Unfinished stages (``.partial``) are included unless a process works on them.

    Args:
        store: folder of the stages.
        outputs: folder that contains runs, besides those that the store has registered.

    Raises:
        ConfigError: a folder or record cannot be read, and may refer to stages.
    """
    root = store.resolve()
    stages = dict(_stages(root))  # before the records: a run that starts in between is younger than this list
    records = _records(root, outputs)
    held = {path for path in stages if path.suffix == PARTIAL and not _with_lock(path, lambda: True)}
    keys = ({path.stem for path in held} | in_use(root)).union(*(KEY.findall(text) for text in records.values()))
    recent = {path.name for path, used in stages.items() if used > time.time() - RECENT}
    running = [path.parent for path, text in records.items() if RUNNING.search(text)]
    if running and recent - keys:
        keys |= recent
        log.info("clean: %s is running (or was killed), so stages used within a day are retained", running[0])
    made_from: defaultdict[str, set[str]] = defaultdict(set)
    for file in [path / name for path in stages for name in (MANIFEST, INPUTS)]:
        with suppress(FileNotFoundError):
            made_from[file.parent.stem].update(KEY.findall(file.read_text("utf-8", errors="replace")))
    todo = list(keys)
    while todo:
        new = made_from[todo.pop()] - keys
        keys |= new
        todo += new
    # A key refers to the finished stage. An unfinished one that no process works on is not needed.
    left = [(used, path) for path, used in stages.items() if path not in held and path.name not in keys]
    seen: set[tuple[int, int]] = set()
    return [Unused(path, path.parent.name, _bytes(path, seen), used) for used, path in sorted(left)]


def clean(store: Path, outputs: Path, *, delete: bool, dry_run: bool = False) -> None:
    """Print the stages that no run refers to, and delete them if ``delete`` is true and this is not a dry run.

    Raises:
        ConfigError: not all runs may be known, so that stages in use could be deleted.
        StageError: the store cannot be written.
    """
    from rich.filesize import decimal
    from rich.table import Table

    if not store.is_dir():
        raise ConfigError(
            Problem("store", shown(str(store)), f"no such folder in {Path.cwd()}", "set it to the store of your runs")
        )
    unused, root = unreferenced(store, outputs), store.resolve()
    table = Table("kind", "key", "size", "last used", title="Stages that no run refers to", title_justify="left")
    for item in unused:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.last_used))
        table.add_row(item.kind, item.path.name, decimal(item.bytes), used)
    say(table if unused else f"{store}: runs refer to all stages")
    total = f"{store}: {len(unused)} folders, {decimal(sum(item.bytes for item in unused))}"
    refusal = _refusal(store, outputs, unused)
    if delete and refusal:
        raise ConfigError(refusal)
    if delete and not dry_run:
        deleted = sum(_delete(root, item) for item in unused)
        _delete_remains(root)
        in_use = len(unused) - deleted
        say(f"{total}: {deleted} deleted" + f", {in_use} retained, which are in use" * bool(in_use))
    elif delete:
        say(f"{total}: would be deleted")
    elif refusal:
        say(f"{total}: nothing was deleted, and deleting them would be refused: {refusal}")
    elif unused:
        say(f"{total}: nothing was deleted; add clean.delete=true to delete them")


def _refusal(store: Path, outputs: Path, unused: list[Unused]) -> Problem | None:
    """Return why unused stages must not be deleted: unknown runs may refer to them. None if they may be deleted."""
    root = store.resolve()
    if unused and not outputs.is_dir():
        remedy = "set it to the folder that contains your runs"
        return Problem("clean.outputs", shown(str(outputs)), "no such folder", remedy)
    if unused and not _records(root, outputs):
        return Problem(
            "clean.delete",
            "true",
            f"there is no run below {outputs} and none is registered in the store, so all of {store} would be deleted",
            "set store= to the store of your runs, clean.outputs= to their folder, or delete the store yourself",
            ("store", "clean.outputs"),
        )
    if any(path.is_relative_to(outputs.absolute()) for path in (root, store.absolute())):
        return None
    old = unregistered(root)
    count = sum(f"{item.kind}/{item.path.stem}" in old for item in unused)
    if not count:
        return None
    return Problem(
        "clean.delete",
        "true",
        f"{count} of {len(unused)} folders of {store} were written by a version that did not register the runs that "
        "use them",
        "set clean.outputs= to a folder that contains both the store and all of these runs",
        ("store", "clean.outputs"),
    )


def _folders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The folders in a folder whose names match, without symbolic links."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _stages(root: Path) -> Iterator[tuple[Path, float]]:
    """Every stage of the store, finished or not, and when it was last used."""
    for path in [path for kind in _folders(root, KIND) for path in _folders(kind, STAGE)]:
        with suppress(FileNotFoundError):  # no manifest, so not a stage; or finished or deleted just now
            yield path, _last_used(path)


def _last_used(path: Path) -> float:
    return (path if path.suffix == PARTIAL else path / MANIFEST).stat().st_mtime


def _records(root: Path, outputs: Path) -> dict[Path, str]:
    """The records of all runs and jobs: below ``outputs``, and in the folders that the store has registered."""

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # deleted just now
            remedy = "make it readable, or clean as a user who may read it"
            raise ConfigError(
                Problem(error.filename, None, f"cannot be read ({error.strerror}), and may belong to a run", remedy)
            ) from error

    files: set[Path] = set()
    for folder, below, names in os.walk(outputs.resolve(), onerror=unreadable):
        below[:] = [name for name in below if Path(folder, name) != root]
        files.update(Path(folder, name) for name in (RUN, JOB) if name in names)
    records = {}
    try:
        for entry in (root / RUNS).glob("*.json"):
            inside = _registered(entry)
            if not inside and (host := json.loads(entry.read_text("utf-8"))["host"]) != os.uname().nodename:
                raise ConfigError(
                    Problem(
                        str(entry),
                        None,
                        f"names a run on {host} that this machine cannot see",
                        "clean there, or delete this file if the run was deleted",
                    )
                )
            files.update(inside)
        for path in sorted(files):
            with suppress(FileNotFoundError):  # deleted just now
                records[path] = path.read_text("utf-8", errors="replace")
    except OSError as error:
        unreadable(error)
    return records


def _registered(entry: Path) -> list[Path]:
    """The records in a folder that the store has registered; empty if the run was deleted."""
    try:
        folder = Path(json.loads(entry.read_text("utf-8"))["folder"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            Problem(str(entry), None, f"does not name the folder of a run ({error})", "delete this file")
        ) from error
    return [folder / name for name in (RUN, JOB) if (folder / name).is_file()]


def _bytes(path: Path, seen: set[tuple[int, int]]) -> int:
    total = 0
    for name in [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]:
        with suppress(FileNotFoundError):
            file = os.lstat(name)
            total += 0 if (file.st_dev, file.st_ino) in seen else file.st_size
            seen.add((file.st_dev, file.st_ino))
    return total


def _with_lock(path: Path, act: Callable[[], object]) -> bool:
    """Act while the lock of a stage is held here; False if another process holds it."""
    from filelock import FileLock, Timeout

    try:
        held = FileLock(path.with_suffix(".lock")).acquire(timeout=0)
    except (Timeout, OSError):  # no permission to lock means no permission to delete
        return False
    with held:
        act()
    return True


def _delete(root: Path, item: Unused) -> bool:
    """Delete a folder, unless a process works on it or has used it since it was listed."""
    trash: list[Path] = []

    def move_to_trash() -> None:
        with suppress(FileNotFoundError):  # finished or deleted since it was listed
            if not item.path.is_symlink() and _last_used(item.path) == item.last_used:
                trash.extend(filter(None, [withdraw(root, item.path)]))

    try:
        if not _with_lock(item.path, move_to_trash) or not trash:
            return False
        with suppress(FileNotFoundError):  # another process deletes it
            shutil.rmtree(trash[0])
    except OSError as error:
        raise StageError(f"clean: cannot delete {error.filename}: {error.strerror}") from error
    return True


def _delete_remains(root: Path) -> None:
    """Delete what an interrupted deletion left, registrations of deleted runs, and locks of deleted stages."""
    for path in _folders(root, TRASH):
        shutil.rmtree(path, ignore_errors=True)  # another process may delete it too
    for entry in (root / RUNS).glob("*.json"):
        if not _registered(entry):
            entry.unlink(missing_ok=True)
    for path in [path for kind in _folders(root, KIND) for path in kind.glob("*.lock")]:
        if STAGE.fullmatch(path.stem) and not any(path.with_suffix(suffix).exists() for suffix in ("", PARTIAL)):
            with suppress(OSError):
                _with_lock(path, path.unlink)  # a process that waits for this lock notices, and makes a new one
