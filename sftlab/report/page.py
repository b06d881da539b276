"""``report.html``: the results of a run as one page that opens offline and loads nothing from outside."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftlab.eval import scorers
from sftlab.eval.statistics import subgroup
from sftlab.records import Candidate, Prediction, read_jsonl
from sftlab.report import contenders, details, facts, html, sweeps, tables, text
from sftlab.report.caveats import caveats, used_of_all
from sftlab.report.questions import Browser, browser
from sftlab.results import LABELS, Evaluation, RunRecord, Subgroup
from sftlab.runtime.run import Run

FOREST = 20  # subgroups that are drawn
Group = tuple[str, list[tuple[int, int, float, float] | None]]


@dataclass(frozen=True)
class Checkpoint:
    """A row of the table of checkpoints: ``own`` are the overrides that other jobs do not have."""

    row: Candidate
    mark: str
    own: list[str]
    trained_as: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return Path(self.row.checkpoint).name


def write(run: Run, to: Path | None = None) -> None:
    """Write ``report.html`` into the run's folder, or into another."""
    ((to or run.folder) / "report.html").write_text(render(run.folder, run.record), encoding="utf-8")


def render(folder: Path, run: RunRecord) -> str:
    """Render the page of the run in a folder. Files that the folder lacks are left out of the page."""
    answers = {name: _predictions(folder, name) for name in LABELS}
    evaluation, curve = run.evaluation, folder / "loss.png"
    comparison = evaluation.comparison if evaluation is not None else None
    view = scorers.view(evaluation.task) if evaluation is not None else None
    models = tables.models(evaluation) if evaluation is not None else []
    page = html.template("page.html.jinja").render(
        style=html.source("page.css"),
        run=run,
        evaluation=evaluation,
        comparison=comparison,
        verdict=comparison.verdict if comparison is not None else None,
        view=view,
        metric=tables.name_of_metric(evaluation) if evaluation is not None else "",
        models=models,
        results=tables.results(evaluation) if evaluation is not None else None,
        items=tables.items(evaluation) if evaluation is not None else None,
        details=details.sentences(evaluation) if evaluation is not None else [],
        few_groups=tables.few_groups(evaluation) if evaluation is not None else None,
        decision=None if evaluation is None else tables.decision(evaluation),
        guards=tables.guards(evaluation) if evaluation is not None and evaluation.guards else None,
        guard_kinds=[
            (guard.name, tables.subgroups(guard.evaluation))
            for guard in (evaluation.guards if evaluation is not None else [])
            if guard.evaluation.subgroups is not None
        ],
        loss=tables.loss(comparison) if comparison is not None and comparison.verdict.outcome != "better" else None,
        evaluated=tables.evaluations(run.evaluations) if run.evaluations else None,
        caveats=used_of_all(run.evaluations)
        if evaluation is None
        else caveats(evaluation, run.mode, run.seed, run.replication),
        recipes=sweeps.recipes(run.selection) if run.selection is not None and run.selection.recipes else None,
        disagreement=text.disagreement(run.selection) if run.selection is not None else None,
        scored=text.scored,
        learning=sweeps.learning_curve(run.curve) if run.curve is not None else None,
        predictions=sweeps.predictions(run.curve) if run.curve is not None else [],
        learning_figure=_image(folder / "curve.png") if run.curve is not None else None,
        unsure=sweeps.unsure(run.selection) if run.selection is not None else None,
        trainings=sweeps.trainings(run.replication, evaluation)
        if run.replication is not None and evaluation is not None
        else None,
        title=_title(run),
        named=evaluation is not None and evaluation.labels != LABELS,
        forced=_forced(evaluation) if evaluation is not None else [],
        ways=list(dict.fromkeys(way for _, _, result in models for way in result.readings)),
        checkpoints=_checkpoints(run),
        failed=[job for job in run.jobs if job.status not in ("success", "pruned")],
        pruned=[job for job in run.jobs if job.pruned is not None],
        curve=_image(curve),
        losses=_losses(folder / "metrics.jsonl"),
        letters=_letters(evaluation, answers) if evaluation is not None else [],
        groups=_groups(evaluation, answers) if evaluation is not None else [],
        forest=_forest(evaluation) if evaluation is not None else [],
        contenders=contenders.table(evaluation) if evaluation is not None and evaluation.contenders else None,
        against=contenders.against(evaluation) if evaluation is not None else [],
        described=contenders.described(evaluation) if evaluation is not None else [],
        chain=contenders.chain(evaluation) if evaluation is not None else None,
        deployed=contenders.deployed(evaluation) if evaluation is not None else None,
        exports=tables.exports(run),
        prompting=contenders.prompting(evaluation) if evaluation is not None else None,
        questions=_browser(folder, evaluation, answers) if evaluation is not None else None,
        data_facts=facts.data_facts(run.receipt) if run.receipt is not None else [],
        training_facts=facts.training_facts(run.receipt) if run.receipt is not None else [],
    )
    return html.encodable(page)


def _predictions(folder: Path, name: str) -> list[Prediction]:
    file = folder / "predictions" / f"{name}.jsonl"
    return Prediction.read(file) if file.is_file() else []


def _browser(folder: Path, evaluation: Evaluation, answers: dict[str, list[Prediction]]) -> Browser | None:
    """Every question with the answers of all models."""
    names = [one.name for one in evaluation.contenders if re.fullmatch(r"[\w-]+", one.name)]
    others = {name: _predictions(folder, name) for name in names}
    named = {**dict(zip(names, names, strict=True)), **evaluation.labels}
    return browser({**answers, **others}, scorers.view(evaluation.task), named)


def _image(file: Path) -> str | None:
    """A picture as text; None if the folder lacks it."""
    return base64.b64encode(file.read_bytes()).decode() if file.is_file() else None


def _title(run: RunRecord) -> str:
    """The name of the experiment; of compared files their labels."""
    if run.sources and run.evaluation is not None:
        return f"{run.evaluation.labels['finetuned']} against {run.evaluation.labels['baseline']}"
    return run.experiment or "Run"


def _forced(evaluation: Evaluation) -> list[tuple[str, str]]:
    """For each model with forced choices its name, and how often each letter was one."""
    return [
        (name, tables.counted(result.knowledge.forced))
        for _, name, result in tables.models(evaluation)
        if result.knowledge is not None and result.knowledge.forced
    ]


def _checkpoints(run: RunRecord) -> list[Checkpoint]:
    """Every checkpoint, the best first."""
    if (selection := run.selection) is None:
        return []
    kinds = {job.job: job.trained_as for job in run.jobs}
    own = tables.own_overrides([(job.job, job.overrides) for job in run.jobs])
    rows = []
    for row in selection.candidates:
        mark = "within noise" if row.checkpoint in selection.ties else ""
        mark = "selected" if row.checkpoint == selection.checkpoint else mark
        rows.append(Checkpoint(row, mark, own.get(row.job, row.overrides), kinds.get(row.job, "")))

    def order(checkpoint: Checkpoint) -> tuple[float, float]:
        loss = checkpoint.row.eval_loss
        return -(checkpoint.row.score or 0), loss if math.isfinite(loss) else math.inf

    return sorted(rows, key=order)


def _losses(log: Path) -> dict[str, list[float]]:
    """The losses of a single job in the order they were logged: the figure, for readers who cannot see it."""
    rows = list(read_jsonl(log)) if log.is_file() else []
    if any("job" in row for row in rows):
        return {"loss": [], "eval_loss": []}
    return {key: [row[key] for row in rows if row.get(key) is not None] for key in ("loss", "eval_loss")}


def _letters(evaluation: Evaluation, answers: Mapping[str, Sequence[Prediction]]) -> list[tuple[str, list[int]]]:
    """How often each letter is right, and how often each model answers it. Free text has no such table."""
    by_model = [result.letters for _, _, result in tables.models(evaluation)]
    targets = [target for row in answers["baseline"] or answers["finetuned"] for target in row.accepted]
    names = sorted({*targets, *(name for letters in by_model for name in letters)} - {"none"})
    if not targets or not any(by_model) or len(names) > 26 or any(len(name) > 1 for name in names):
        return []
    return [(name, [targets.count(name), *(letters.get(name, 0) for letters in by_model)]) for name in [*names, "none"]]


def _groups(evaluation: Evaluation, answers: Mapping[str, Sequence[Prediction]]) -> list[Group]:
    """Right answers, questions and interval of each group by each model, if there are few enough groups to read."""
    groups = dict.fromkeys(row.group for rows in answers.values() for row in rows if row.group is not None)
    if not scorers.view(evaluation.task).graded or not 2 <= len(groups) <= 20:
        return []
    alpha = 1 - evaluation.finetuned.level
    parts = [
        subgroup([row.correct for row in rows], [row.group for row in rows], alpha) for rows in answers.values() if rows
    ]
    return [(name, [part.get(name) for part in parts]) for name in groups]


def _forest(evaluation: Evaluation) -> list[Subgroup]:
    """The subgroups that were compared, if there are few enough to draw."""
    groups = evaluation.subgroups.groups if evaluation.subgroups is not None else []
    compared = [group for group in groups if group.difference is not None]
    return compared if len(compared) <= FOREST else []
