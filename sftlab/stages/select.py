"""Which checkpoint is kept: the lowest validation loss over every checkpoint of every job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sftlab.errors import StageError
from sftlab.records import Candidate
from sftlab.statistics import bootstrap_ties


@dataclass(frozen=True)
class Selection:
    """The checkpoint that is kept, those that validation cannot tell from the lowest (``ties``), and all."""

    chosen: Candidate
    lowest: Candidate
    ties: list[Candidate]
    candidates: list[Candidate]


def select(candidates: Sequence[Candidate], tie: Literal["earliest", "lowest"], seed: int) -> Selection:
    """The lowest validation loss; with ``tie="earliest"`` the earliest of those within its noise.

    The noise is a bootstrap over the validation rows. Earliest is by epoch, then by loss: among
    equals, the one that was trained least.

    Raises:
        StageError: there is no candidate.
    """
    if not candidates:
        raise StageError("select: no job finished with a checkpoint; see the jobs' errors above")
    lowest = min(candidates, key=lambda candidate: (candidate.eval_loss, candidate.epoch, candidate.job))
    rows = [_rows(candidate) for candidate in candidates]
    tokens = [count for _, count in rows[0]]
    tied = bootstrap_ties([[nll for nll, _ in row] for row in rows], tokens, seed=seed)
    ties = [candidate for candidate, same in zip(candidates, tied, strict=True) if same]
    chosen = lowest
    if tie == "earliest":
        chosen = min(ties, key=lambda candidate: (candidate.epoch, candidate.eval_loss, candidate.job))
    return Selection(chosen, lowest, ties, list(candidates))


def _rows(candidate: Candidate) -> list[list[float]]:
    rows: list[list[float]] = json.loads((Path(candidate.checkpoint) / "rows.json").read_text("utf-8"))
    return rows
