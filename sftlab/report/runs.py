"""The runs of a folder as rows: what each one trained and found; filters, order, and the table in the terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from math import inf
from pathlib import Path, PurePath
from typing import Literal

from sftlab.config import RunsConfig
from sftlab.report.text import count, decimals, points, seconds, span
from sftlab.results import Comparison, Evaluation, RunRecord
from sftlab.runtime.console import say
from sftlab.runtime.listing import Listed, moment

SUFFIXES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
LONGEST = 60  # characters of a reason in the terminal


@dataclass(frozen=True)
class Row:
    """A run as a row of the table. Texts are "" if the run has no such result."""

    run: Listed
    place: str
    """Its folder relative to the folder of all runs."""
    name: str
    """The experiment; of a damaged run, the outermost folder."""
    data: str
    model: str
    checkpoint: str
    outcome: str
    """The verdict: better, worse, inconclusive or "not judged"; of a sweep of evaluations, how many have which."""
    comparison: Comparison | None
    decision: str = ""
    """ship, keep_base or undecided; of a sweep of evaluations, how many are which."""

    @property
    def time(self) -> str:
        """When it started in UTC, to the minute."""
        return f"{self.run.started:%Y-%m-%d %H:%M}"

    @property
    def gain(self) -> str:
        """The difference to the base model in points."""
        return points(self.comparison.delta) if self.comparison is not None else ""

    @property
    def interval(self) -> str:
        """The interval of the difference, in points."""
        return span(self.comparison.interval) if self.comparison is not None else ""

    @property
    def cost(self) -> str:
        """Seconds of the computed stages as a duration."""
        return "" if self.run.cost is None else seconds(self.run.cost)

    @property
    def evaluation(self) -> Evaluation | None:
        """Its result on the test set."""
        return self.run.record.evaluation if self.run.record is not None else None


def rows(listed: Iterable[Listed], outputs: Path) -> list[Row]:
    """Summarise runs, in their order."""
    root = outputs.resolve()
    return [_row(run, os.path.relpath(run.folder, root)) for run in listed]


def _row(run: Listed, place: str) -> Row:
    record = run.record
    if record is None:
        outermost = next((part for part in PurePath(place).parts if part != ".."), run.folder.name)
        return Row(run, place, outermost, "", "", "", "", None)
    config = run.config
    trained, tested = (short(config.get(f"{key}.name_or_path")) for key in ("dataset", "eval.dataset"))
    base, evaluated = (short(config.get(f"{key}.name_or_path")) for key in ("model", "eval"))
    if record.mode == "compare":
        evaluated = " against ".join(short(record.sources.get(side)) for side in ("finetuned", "baseline"))
    elif record.mode != "evaluate":
        evaluated = ""
    elif record.evaluations:
        evaluated = ", ".join(dict.fromkeys(short(row.model) for row in record.evaluations if row.model))
    data = (tested or trained) if record.mode == "evaluate" else " / ".join(filter(None, (trained, tested)))
    comparison = record.evaluation.comparison if record.evaluation is not None else None
    return Row(
        run=run,
        place=place,
        name=record.experiment,
        data=data,
        model=evaluated or base,
        checkpoint=_checkpoint(record),
        outcome=_outcome(record),
        comparison=comparison,
        decision=_decision(record),
    )


def short(name: str | None) -> str:
    """The last part of a path or hub id, without the suffix of a data file."""
    if name is None or name == "null":
        return ""
    last = PurePath(name).name if name.startswith("random:") else PurePath(name).name.rpartition(":")[2]
    return next((last.removesuffix(suffix) for suffix in SUFFIXES if last.endswith(suffix)), last)


def _checkpoint(record: RunRecord) -> str:
    if (selection := record.selection) is None:
        return ""
    job = f"job {selection.job}, " if len(record.jobs) > 1 else ""
    place = f"epoch {count(selection.epoch)}" if selection.step else "untrained model"
    return f"{job}{place}, loss {decimals(selection.eval_loss)}"


def _outcome(record: RunRecord) -> str:
    if record.evaluations:
        outcomes = Counter(row.verdict.outcome for row in record.evaluations if row.verdict is not None)
        return ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
    if record.evaluation is None or record.evaluation.comparison is None:
        return ""
    verdict = record.evaluation.comparison.verdict
    return verdict.outcome if verdict.judged else "not judged"


def _decision(record: RunRecord) -> str:
    if record.evaluation is not None:
        return record.evaluation.decision.outcome if record.evaluation.decision is not None else ""
    made = [row.evaluation.decision for row in record.evaluations if row.evaluation is not None]
    outcomes = Counter(one.outcome for one in made if one is not None)
    return ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())


# ------------------------------------------------------------------- filters


def selected(rows: Iterable[Row], cfg: RunsConfig) -> list[Row]:
    """Filter and order rows by the keys of ``runs``; ``limit`` is not applied."""
    after = moment(cfg.since, datetime.now(UTC)) if cfg.since is not None else None

    def fits(row: Row) -> bool:
        config = row.run.config
        data = (row.data, *(config.get(f"{key}.name_or_path", "") for key in ("dataset", "eval.dataset")))
        models = (row.model, *(config.get(f"{key}.name_or_path", "") for key in ("model", "eval")))
        return (
            (cfg.name is None or _matches(cfg.name, (row.name, row.place)))
            and (cfg.data is None or _matches(cfg.data, data))
            and (cfg.model is None or _matches(cfg.model, models))
            and cfg.status in (None, row.run.state)
            and (cfg.verdict is None or cfg.verdict in row.outcome)
            and (cfg.decision is None or cfg.decision in row.decision)
            and (after is None or row.run.started >= after)
        )

    def order(row: Row) -> tuple[float, str]:
        if cfg.sort == "name":
            return 0, row.place
        if cfg.sort == "gain":
            return -(row.comparison.delta if row.comparison is not None else -inf), ""
        return -((row.run.cost or 0) if cfg.sort == "cost" else row.run.started.timestamp()), ""

    return sorted(filter(fits, rows), key=order)


def _matches(pattern: str, texts: Iterable[str]) -> bool:
    """Whether a text contains the words, or equals the pattern if there is a ``*`` or ``?``; case is ignored."""
    pattern = pattern.lower()
    if any(sign in pattern for sign in "*?"):
        return any(fnmatch(text.lower(), pattern) for text in texts)
    return any(pattern in text.lower() for text in texts)


# ------------------------------------------------------------------- terminal


def show(rows: Sequence[Row], limit: int | None, total: int) -> None:
    """Print a table of the rows, at most ``limit`` of them, and how many of ``total`` runs there are."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (
        "run",
        "started (UTC)",
        "data",
        "model",
        "checkpoint",
        "verdict",
        "decision",
        "gain, points",
        "cost",
        "status",
    ):
        justify: Literal["left", "right"] = "right" if name in ("gain, points", "cost") else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows[:limit]:
        gain = f"{row.gain}\n{row.interval}" if row.gain else ""
        within = row.place.removeprefix(f"{row.name}/")
        title = f"{row.name}/\n{within}" if within != row.place else "\n".join(dict.fromkeys((row.name, row.place)))
        status = f"{row.run.state}: {_brief(row.run.error)}" if row.run.error else row.run.state
        cells = (
            title,
            row.time,
            row.data,
            row.model,
            row.checkpoint,
            row.outcome,
            row.decision,
            gain,
            row.cost,
            status,
        )
        table.add_row(*(Text(cell) for cell in cells))
    if rows:
        say(table)
    printed = len(rows[:limit])
    of = f"{total:,} runs" if len(rows) == total else f"{len(rows):,} of {total:,} runs match the filters"
    say(of + ("" if printed == len(rows) else f"; the first {printed:,} are shown (runs.limit)"))


def _brief(text: str) -> str:
    line = next(iter(text.splitlines()), "")
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
