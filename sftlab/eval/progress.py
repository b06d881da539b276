"""Show the progress of generation engines, and detect one that hangs."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sftlab.errors import StageError
from sftlab.eval.answers import ALIVE, FINISHED, FORCED, LETTERS


@contextmanager
def progress(folders: Mapping[Path, Sequence[Path]], total: int, label: str, stall_min: float) -> Iterator[Progress]:
    """Show one progress bar for all engines; ``total`` completions are expected.

    ``folders`` has the folders that an engine fills one after the other, by the first of them.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="prompt") as bar:
        yield Progress(folders, bar, stall_min)


class Progress:
    """Update a progress bar from the files of engines, and raise an error when one stalls.

    An engine that hangs reports nothing, while the others may work for hours.
    """

    def __init__(self, folders: Mapping[Path, Sequence[Path]], bar: Any, stall_min: float) -> None:
        self.bar, self.stall_min = bar, stall_min
        self.engines = {first: _Engine(own) for first, own in folders.items()}
        self.started, self.choices = False, 0

    def __call__(self, running: Collection[Path]) -> None:
        """Show what the engines have written since the last call.

        Raises:
            StageError: a running engine has written no completion, no letters and no sign of life for
                ``stall_min`` minutes.
        """
        for engine in self.engines.values():
            completions, choices = engine.look()
            if engine.started and not self.started:
                self.started = True
                self.bar.reset()  # the rate excludes the time that engines take to start
                self.bar.set_description("generating")
            if completions:
                self.bar.update(completions)
                self.bar.set_description("generating")
            if choices:
                self.choices += choices
                self.bar.set_description("choosing")
                self.bar.set_postfix(letters=self.choices)
        for engine in (self.engines[folder] for folder in running):
            if time.monotonic() - engine.active > 60 * self.stall_min:
                fault = "made no progress" if engine.started else "did not start"
                raise StageError(
                    f"evaluate: an engine {fault} for {self.stall_min:g} minutes and was ended; run the command "
                    "again, or raise eval.stall_min. Completed answers are reused"
                )


class _Engine:
    """What an engine's files have shown so far, and the time of its last sign of life."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.started, self.active = False, time.monotonic()
        self.beat, self.bytes_read = 0, dict[Path, int]()

    def look(self) -> tuple[int, int]:
        """Return the number of new completions and of new choices."""
        with suppress(FileNotFoundError):  # before its first step
            beat = (self.folders[0] / ALIVE).stat().st_mtime_ns
            if beat != self.beat:
                self.beat, self.active = beat, time.monotonic()
        return self._new_lines(FINISHED), self._new_lines(FORCED) + self._new_lines(LETTERS)

    def _new_lines(self, name: str) -> int:
        return sum(self._new_lines_of(folder / name) for folder in self.folders)

    def _new_lines_of(self, path: Path) -> int:
        if not path.is_file():  # the engine is starting, or works in an earlier folder
            return 0
        with path.open("rb") as file:
            file.seek(self.bytes_read.get(path, 0))
            new = file.read()
        self.bytes_read[path] = self.bytes_read.get(path, 0) + len(new)
        if new or not self.started:
            self.started, self.active = True, time.monotonic()
        return new.count(b"\n")
