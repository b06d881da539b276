"""The ledger of test sets: which models were judged on which rows.

``<store>/.ledger/<hash of the rows>/<number>.json`` is one file per model, numbered in the order in which the models
were first judged. Files are written atomically and never changed, and ``mode=clean`` does not delete them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sftlab.errors import StageError
from sftlab.runtime.store import MANIFEST, sync, write_json

LEDGER = ".ledger"


@dataclass(frozen=True)
class Place:
    """The ``number`` of a model among the ``models`` that were judged on a test set, counted from 1."""

    number: int
    models: int


def record(store: Path, test_set: str, model: str, experiment: str) -> Place:
    """Record that a model was judged on a test set, and return its place. A model counts once.

    Raises:
        StageError: The store cannot be written.
    """
    from filelock import FileLock

    folder = store / LEDGER / test_set
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # two runs must not take the same number
            numbers = judged(store, test_set)
            if model not in numbers.values():
                number = max(numbers, default=0) + 1
                now = datetime.now(UTC).isoformat(timespec="seconds")
                entry = {"model": model, "experiment": experiment, "host": os.uname().nodename, "time": now}
                write_json(folder / f"{number}.json", entry)
                sync(folder)
                numbers[number] = model
    except OSError as error:
        raise StageError(
            f"store={str(store)!r}: its ledger of test sets cannot be written: {error.filename}: {error.strerror}; "
            "free some space, or set store= to a writable folder. Completed stages are reused"
        ) from error
    place = next(number for number, other in sorted(numbers.items()) if other == model)
    return Place(place, max(numbers))


def judged(store: Path, test_set: str) -> dict[int, str]:
    """Read the models that were judged on a test set, by number. A damaged entry counts as a model without a name."""
    return {int(file.stem): _model(file) for file in (store / LEDGER / test_set).glob("[0-9]*.json")}


@dataclass(frozen=True)
class Entry:
    """A model in the ledger: its ``number`` on its test set, and when and by which experiment it was first judged.

    Texts are "" in a damaged entry.
    """

    number: int
    model: str
    experiment: str
    time: str


def entries(store: Path) -> dict[str, list[Entry]]:
    """Read the whole ledger: the models of each test set by number."""
    ledger: dict[str, list[Entry]] = {}
    files = [file for file in (store / LEDGER).glob("*/*.json") if file.stem.isdecimal()]
    for file in sorted(files, key=lambda file: int(file.stem)):
        try:
            values = json.loads(file.read_text("utf-8"))
            texts = [str(values[name]) for name in ("model", "experiment", "time")]
        except (OSError, ValueError, TypeError, LookupError):
            texts = ["", "", ""]
        ledger.setdefault(file.parent.name, []).append(Entry(int(file.stem), *texts))
    return ledger


def _model(file: Path) -> str:
    try:
        return str(json.loads(file.read_text("utf-8"))["model"])
    except (ValueError, TypeError, LookupError):
        return ""


def name_of(path: Path, identity: str) -> str:
    """Return how the ledger names a model: by its stage if its folder is a stage of a store, else by its content.

    So a merged model counts once, whether the run that merged it judges it or a later mode=evaluate.
    """
    folder = path.resolve()
    try:
        key = json.loads((folder / MANIFEST).read_text("utf-8"))["key"]
    except (OSError, ValueError, TypeError, LookupError):
        return identity
    return folder.name if key == folder.name else identity
