"""Paths and times of the configuration: which names are local, folders that cannot be written to, the age of runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sftlab.dataset.sources import is_data
from sftlab.errors import Problem, shown
from sftlab.runtime.listing import moment


def is_local(name: str) -> bool:
    """Whether a name is meant as a path: it exists, or it is not a hub id (owner/name)."""
    return Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or is_data(name)


def store_problems(store: str) -> Iterator[Problem]:
    """Yield the problem of a store that could not be created or written to."""
    folder = next(path for path in (Path(store).absolute(), *Path(store).absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        message = f"{folder} is not a folder that you can write to"
        yield Problem("store", shown(store), message, "set it to a folder that you can write to")


def since_problems(since: str | None) -> Iterator[Problem]:
    """Yield the problem of a value of ``runs.since`` that is not a time."""
    if since is None:
        return
    try:
        moment(since, datetime.now(UTC))
    except (ValueError, OverflowError):
        remedy = "write it as 2026-11-30 or '2026-11-30T09:00:00', or as 12h, 7d or 2w"
        yield Problem("runs.since", shown(since), "is not an ISO time or an age", remedy)
