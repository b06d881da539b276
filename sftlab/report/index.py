"""``index.html``: all runs of a folder as one page that opens offline and loads nothing from outside."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from urllib.parse import quote

from sftlab.errors import StageError
from sftlab.eval import scorers
from sftlab.eval.reuse import chance_of_better
from sftlab.report import html, pairs, text
from sftlab.report.pairs import Pairs
from sftlab.report.runs import Row
from sftlab.results import Reuse
from sftlab.runtime.ledger import Entry

PAGE = "index.html"
ALPHA = 0.05  # for the chance of a false finding; a run may have judged at another level
ANSWERS = 600_000  # characters of all answers, which decide the size of the page
VALUE, REASON = 300, 160  # characters of the longest value of a configuration, and of the longest reason
ORDERS = {"time": "newest first", "gain": "largest gain first", "cost": "most expensive first", "name": "by name"}
REPORTS = ("report.html", "preview.html")

Judged = tuple[int, str, str, str | None]
"""A model in the ledger: its number, the date, the experiment, and the link to its run if it is known."""


@dataclass(frozen=True)
class TestSet:
    """A test set of the ledger."""

    key: str
    data: str
    questions: int | None
    models: list[Judged]
    chance: float
    first: str
    last: str


def write(rows: Sequence[Row], ledger: Mapping[str, Sequence[Entry]], outputs: Path) -> Path:
    """Write ``index.html`` into the folder of all runs, and return its path.

    Raises:
        StageError: The folder cannot be written.
    """
    path = outputs / PAGE
    content = render(rows, ledger, outputs)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StageError(f"runs.outputs={outputs}: {PAGE} cannot be written: {error.strerror}") from error
    return path


def render(rows: Sequence[Row], ledger: Mapping[str, Sequence[Entry]], outputs: Path) -> str:
    """Render the page of these runs, in their order; ``outputs`` is the folder that the page is for."""
    links = [_link(row) for row in rows]
    judged = pairs.read(rows, outputs, ANSWERS)
    page = html.template("index.html.jinja").render(
        style=html.source("page.css", "index.css"),
        script=html.source("index.js"),
        lines=[(row, link, _reason(row)) for row, link in zip(rows, links, strict=True)],
        states=Counter(row.run.state for row in rows).most_common(),
        verdicts=Counter(row.outcome for row in rows if row.comparison is not None).most_common(),
        orders=ORDERS.items(),
        ledger=_test_sets(rows, links, ledger),
        alpha=ALPHA,
        written=datetime.now(UTC).isoformat(),
        data=_embedded(_data(rows, judged, outputs)),
    )
    return html.encodable(page)


def _link(row: Row) -> str:
    """A link to the report of a run, or else to its folder, relative to the page."""
    page = next((name for name in REPORTS if (row.run.folder / name).is_file()), "")
    return quote(f"{row.place}/{page}")


def _reason(row: Row) -> str:
    reason = " ".join((row.run.error or "").split())
    return reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"


def _embedded(data: Mapping[str, object]) -> str:
    """JSON for a script element: no character of it can end the element."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# ------------------------------------------------------------------- what the script reads


def _data(rows: Sequence[Row], judged: Pairs, outputs: Path) -> dict[str, object]:
    questions = {key: number for number, key in enumerate(judged.questions)}
    reuse = [_reuse(row) for row in rows]
    tests = {of.test_set: None for of in reuse if of is not None}
    numbers = {key: number for number, key in enumerate(tests)}
    answers: list[object] = []
    for row in rows:
        own = judged.answers.get(row.run.folder)
        left_out = row.run.folder in judged.left_out
        answers.append([questions[own.questions], own.bits] if own is not None else int(left_out))
    return {
        # What rows are ordered by: seconds since the epoch, gain and cost.
        "sort": [
            [
                round(row.run.started.timestamp()),
                None if row.comparison is None else round(row.comparison.delta, 4),
                None if row.run.cost is None else round(row.run.cost, 1),
            ]
            for row in rows
        ],
        "places": [row.place for row in rows],
        "tests": [None if of is None else numbers[of.test_set] for of in reuse],
        "questions": [[of.n, of.groups] for of in judged.questions.values()],
        "answers": answers,  # 0: none, 1: left out, otherwise the number of the questions and a bit for each
        "level": _level(1 - ALPHA),
        "judging": {number: values for number, row in enumerate(rows) if (values := _judging(row))},
        "outputs": str(outputs),
        **_configurations([row.run.config for row in rows]),
    }


def _judging(row: Row) -> dict[str, object]:
    """How a run's answers are judged where this differs from the usual: level, repeats, no answers, task."""
    if (evaluation := row.evaluation) is None:
        return {}
    model, values = evaluation.finetuned, dict[str, object]()
    if model.level != 1 - ALPHA:
        values["level"] = _level(model.level)
    if model.repeats is not None:
        values["repeats"] = 1
    if model.unparsed == model.n:
        values["mute"] = 1
    if evaluation.task != "choice":
        values["task"] = evaluation.task
    if not scorers.view(evaluation.task).graded:
        values["scored"] = 1
    return values


def _level(level: float) -> tuple[float, float]:
    """A confidence level with its two-sided critical value, which the script does not compute."""
    return level, -NormalDist().inv_cdf((1 - level) / 2)


def _configurations(configs: Sequence[Mapping[str, str]]) -> dict[str, object]:
    """Configurations as differences from the most common values.

    ``keys`` are all keys, ``values`` the values of each, the most common one first and null if a run lacks the key. A
    row of ``configs`` has pairs (number of a key, number of its value) of the other values; null for an unknown config.
    """
    known = [config for config in configs if config]
    counts: defaultdict[str, Counter[str | None]] = defaultdict(Counter)
    for config in known:
        for key, value in config.items():
            counts[key][_shortened(value)] += 1
    for seen in counts.values():
        if missing := len(known) - seen.total():
            seen[None] = missing
    keys = sorted(counts)
    values = [[value for value, _ in counts[key].most_common()] for key in keys]
    numbers = [{value: number for number, value in enumerate(own)} for own in values]

    def differing(config: Mapping[str, str]) -> list[int]:
        own = (_shortened(config[key]) if key in config else None for key in keys)
        places = ((at, numbers[at][value]) for at, value in enumerate(own))
        return [part for at, place in places if place for part in (at, place)]

    differences = [differing(config) if config else None for config in configs]
    return {"keys": keys, "values": values, "configs": differences}


def _shortened(value: str) -> str:
    return value if len(value) <= VALUE else f"{value[:VALUE]}… ({len(value):,} characters, {text.sha256(value)[:8]})"


# ------------------------------------------------------------------- ledger


def _test_sets(rows: Sequence[Row], links: Sequence[str], ledger: Mapping[str, Sequence[Entry]]) -> list[TestSet]:
    """The test sets of a ledger, the most used first, with the runs that judged each model first."""
    data: defaultdict[str, Counter[str]] = defaultdict(Counter)
    questions, runs = dict[str, int](), dict[tuple[str, int], str]()
    for row, link in zip(reversed(rows), reversed(links), strict=True):  # the first run of a model, not a repetition
        for of in _reuses(row):
            data[of.test_set][row.data.rpartition(" / ")[2]] += 1
            questions[of.test_set] = of.rows
            runs.setdefault((of.test_set, of.number), link)
    sets = []
    for key, entries in ledger.items():
        days = [entry.time[:10] for entry in entries if entry.time]
        name = ", ".join(name for name, _ in data[key].most_common(3) if name)
        models = [(own.number, own.time[:10], own.experiment, runs.get((key, own.number))) for own in entries]
        chance = chance_of_better(len(entries), ALPHA)
        sets.append(
            TestSet(key, name, questions.get(key), models, chance, min(days, default=""), max(days, default=""))
        )
    return sorted(sets, key=lambda of: (-len(of.models), of.key))


def _reuse(row: Row) -> Reuse | None:
    return row.evaluation.reuse if row.evaluation is not None else None


def _reuses(row: Row) -> list[Reuse]:
    """The places in the ledger of all models that a run judged."""
    record = row.run.record
    judged = [] if record is None else [record.evaluation, *(job.evaluation for job in record.evaluations)]
    return [of.reuse for of in judged if of is not None and of.reuse is not None]
