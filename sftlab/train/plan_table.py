"""Print the plans of ``mode=plan`` as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sftlab.results import PlanCell

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def print_table(cells: Sequence[tuple[str, PlanCell]]) -> None:
    """Print memory and time of each named configuration, and mark those that cannot fit."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="GiB per process, at the longest batch", title_justify="left")
    table.add_column("job")
    for name in (*PARTS, "training", "generation", "available"):
        table.add_column(name, justify="right")
    table.add_column("checkpointing")
    table.add_column("per epoch", justify="right", no_wrap=True)
    table.add_column("in all", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, cell in cells:
        table.add_row(
            name,
            *(f"{cell.memory[part]:.2f}" for part in PARTS),
            f"{cell.training_gib:.2f}",
            f"{cell.generation_gib:.2f}",
            "?" if cell.capacity_gib is None else f"{cell.capacity_gib:.1f}",
            "on" if cell.gradient_checkpointing else "off",
            _duration(cell, 1.0),
            _duration(cell, cell.epochs),
            {True: "fits", False: "[bold]cannot fit[/]", None: "memory unknown"}[cell.fits],
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for source in sorted({cell.timed_by for _, cell in cells}):
        console.print(f"time: {source}")


def _duration(cell: PlanCell, epochs: float | None) -> str:
    return "?" if cell.seconds_per_epoch is None or epochs is None else duration(cell.seconds_per_epoch * epochs)


def duration(seconds: float) -> str:
    """A readable duration: 41 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
