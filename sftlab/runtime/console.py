"""Printing to the terminal."""

from __future__ import annotations

from typing import Any


def say(what: Any) -> None:
    """Print a table or a sentence, wide enough for a table also where the output is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(what, highlight=False, markup=False)
