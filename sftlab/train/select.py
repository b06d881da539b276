"""Select a checkpoint: the best on validation over every checkpoint of every job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sftlab import results
from sftlab.errors import StageError
from sftlab.eval.statistics import ties as tied_with_best
from sftlab.eval.statistics.ties import ROUNDING
from sftlab.records import Candidate


@dataclass(frozen=True)
class Selection:
    """The selected checkpoint, those within the noise of the best one on validation (``ties``), and all."""

    chosen: Candidate
    best: Candidate
    ties: list[Candidate]
    candidates: list[Candidate]


def select(
    candidates: Sequence[Candidate],
    tie: str,
    scores: Sequence[Sequence[float]] | None = None,
    groups: Sequence[str | None] | None = None,
) -> Selection:
    """The lowest validation loss; with ``tie="earliest"`` the earliest of those within its noise.

    With ``scores`` (for each candidate, the score of its answer to each validation question, 0 to 1) the highest mean
    score stands in the place of the loss, and the loss decides between equals.
    Among losses that differ by rounding only, the earliest counts as the lowest.
    The noise is a simultaneous bound for all candidates, over the validation rows or the ``groups`` that they
    belong to. Earliest is by epoch, then by loss: among equals, the one that was trained least.

    Raises:
        StageError: there is no candidate.
    """
    if not candidates:
        raise StageError("select: no job finished with a checkpoint; see the jobs' errors above")
    if scores is None:
        rows = [_rows(candidate) for candidate in candidates]
        costs, weights = [[nll for nll, _ in row] for row in rows], [tokens for _, tokens in rows[0]]
    else:
        candidates = [
            replace(candidate, score=sum(row) / len(row)) for candidate, row in zip(candidates, scores, strict=True)
        ]
        costs, weights = [[1 - score for score in row] for row in scores], [1.0] * len(scores[0])
    lowest = min(candidates, key=lambda candidate: (-(candidate.score or 0), *_order(candidate)))
    equal = lowest.eval_loss * (1 + ROUNDING)
    best = min(
        (each for each in candidates if each.score == lowest.score and each.eval_loss <= equal),
        key=lambda candidate: (candidate.epoch, *_order(candidate)),
    )
    tied = tied_with_best(costs, weights, groups)
    ties = [candidate for candidate, same in zip(candidates, tied, strict=True) if same]
    chosen = best
    if tie == "earliest":
        chosen = min(ties, key=lambda candidate: (candidate.epoch, candidate.eval_loss, candidate.job))
    return Selection(chosen, best, ties, list(candidates))


def record(
    selection: Selection,
    metric: str,
    unranked: Sequence[Candidate],
    sources: Sequence[str] | None = None,
    recipes: Sequence[results.Recipe] = (),
    scored_rows: int | None = None,
) -> results.Selection:
    """The selection for ``run.json``.

    ``unranked`` has the checkpoints that cannot be ranked with the others, ``sources`` the source of each validation
    row if there are several, ``recipes`` the recipes if one of them has several seeds, ``scored_rows`` the number of
    validation rows that were answered.
    """
    return results.Selection(
        **asdict(selection.chosen),
        metric=metric,
        lowest_eval_loss=min(candidate.eval_loss for candidate in selection.candidates),
        best=selection.best.checkpoint,
        ties=[candidate.checkpoint for candidate in selection.ties],
        candidates=[*selection.candidates, *unranked],
        by_source=[] if sources is None else _by_source(_rows(selection.chosen), sources),
        recipes=list(recipes),
        scored_rows=scored_rows,
    )


def _by_source(rows: Sequence[Sequence[float]], sources: Sequence[str]) -> list[results.SourceLoss]:
    """The loss per supervised token of each source, from nats and tokens of each validation row."""
    losses = []
    for source in dict.fromkeys(sources):
        own = [row for row, name in zip(rows, sources, strict=True) if name == source]
        nats, tokens = (sum(column) for column in zip(*own, strict=True))
        losses.append(results.SourceLoss(source=source, rows=len(own), tokens=int(tokens), eval_loss=nats / tokens))
    return losses


def _order(candidate: Candidate) -> tuple[float, float, int]:
    return candidate.eval_loss, candidate.epoch, candidate.job


def _rows(candidate: Candidate) -> list[list[float]]:
    rows: list[list[float]] = json.loads((Path(candidate.checkpoint) / "rows.json").read_text("utf-8"))
    return rows


def untrained(tie: str, step: int = 0) -> str:
    """Return why nothing is merged and evaluated if a checkpoint with the weights of the base model is selected."""
    noise = " beyond the noise" if tie == "earliest" else ""
    name = f"step {step}, which has the weights of" if step else "step 0,"
    return (
        f"{name} the untrained model, is selected: no checkpoint is better on validation{noise}. Nothing is merged or "
        "pushed, and the test set is not read: the comparison would be of the base model with itself. Use the base "
        "model, or change the training"
    )
