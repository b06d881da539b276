"""Terminal output: tables, and warnings that are shown only once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def say(content: RenderableType) -> None:
    """Print a table or a sentence, 140 columns wide if the output is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(content, highlight=False, markup=False)


class RepeatedWarnings(logging.Filter):
    """Drop a warning whose text was logged before: the jobs of a sweep often cause the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every record except a warning that was seen before."""
        if record.levelno != logging.WARNING:
            return True
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


_ON_TERMINAL = RepeatedWarnings()


def drop_repeated_warnings() -> None:
    """Filter the handlers of the root logger: each log file separately, the terminal over the whole process.

    Hydra replaces all handlers before each job, so this is called again in each job.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(RepeatedWarnings() if isinstance(handler, logging.FileHandler) else _ON_TERMINAL)
