"""``loss.png``: training and validation loss by epoch, and the score on validation if checkpoints are ranked by it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.records import read_jsonl
from sftlab.report.tables import own_overrides
from sftlab.results import Curve, Selection
from sftlab.runtime.job import Job

logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs how it builds its font cache

SHOWN = 20  # jobs in the legend


def loss_curve(path: Path, title: str, selection: Selection, jobs: Sequence[Job]) -> None:
    """Draw training loss (solid), validation loss (dashed), and the selected checkpoint (a star).

    Scores of the checkpoints, if there are any, are drawn below.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    several, scored = len(jobs) > 1, [row for row in selection.candidates if row.score is not None]
    panels = 2 if scored else 1
    figure, every = pyplot.subplots(
        panels, squeeze=False, sharex=True, figsize=(10 if several else 8, 4.5 * panels), layout="constrained"
    )
    axes = every[0, 0]
    colors = pyplot.get_cmap("tab10").colors
    training_line: dict[str, Any] = {"linewidth": 1.2, "alpha": 0.7}
    validation_line: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4, "linewidth": 1.8}
    if several:  # colours distinguish jobs
        axes.plot([], [], color="gray", label="training loss", **training_line)
        axes.plot([], [], color="gray", label="validation loss", **validation_line)
    own = own_overrides([(job.number, job.overrides) for job in jobs])
    for index, job in enumerate(job for job in jobs if "train" in job.stages):
        history = list(read_jsonl(Path(job.stages["train"]) / "metrics.jsonl"))
        color = colors[index % len(colors)]
        training = [(row["epoch"], row["loss"]) for row in history if row.get("loss") is not None]
        validation = [(row["epoch"], row["eval_loss"]) for row in history if row.get("eval_loss") is not None]
        names: tuple[str | None, str | None] = ("training loss", "validation loss")
        if several:
            # Only the last part of a key: train.num_train_epochs=3 is long for a legend.
            words = (re.sub(r"^[\w.]*\.", "", override) for override in own[job.number])
            names = (None, " ".join([f"job {job.number}", *words]) if index < SHOWN else None)
        axes.plot(*zip(*training, strict=True), color=color, label=names[0], **training_line)
        axes.plot(*zip(*validation, strict=True), color=color, label=names[1], **validation_line)
        points = [(row.epoch, row.score) for row in scored if row.job == job.number]
        if points:
            every[1, 0].plot(*zip(*sorted(points), strict=True), color=color, marker="o", markersize=4)
    axes.plot(
        [selection.epoch],
        [selection.eval_loss],
        linestyle="none",
        marker="*",
        markersize=18,
        color="#d62728",
        markeredgecolor="white",
        zorder=5,
        label=f"selected: {_place(selection)}, {selection.eval_loss:.4f}",
    )
    if selection.score is not None:
        _score(every[1, 0], selection)
    axes.set(xlabel="" if scored else "epoch", ylabel="loss (nats per supervised token)", title=title)
    low, high = axes.get_ylim()
    if high > 10 * max(low, selection.eval_loss):
        axes.set_yscale("log")  # on a linear axis the end of such a curve would lie on the axis
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if several:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small", handlelength=3)
    else:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _score(axes: Any, selection: Selection) -> None:
    """The panel of the scores by which checkpoints are ranked: the selected one, and the one with the lowest loss."""
    star: dict[str, Any] = {
        "linestyle": "none",
        "marker": "*",
        "markersize": 18,
        "markeredgecolor": "white",
        "zorder": 5,
    }
    axes.plot([selection.epoch], [selection.score], color="#d62728", label="selected", **star)
    lowest = min((row for row in selection.candidates if row.score is not None), key=lambda row: row.eval_loss)
    if lowest.checkpoint != selection.checkpoint:
        axes.plot([lowest.epoch], [lowest.score], color="#7f7f7f", label="lowest validation loss", **star)
    axes.set(xlabel="epoch", ylabel=f"{selection.metric} on validation")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def learning_curve(path: Path, curve: Curve) -> None:
    """Draw loss and score over the training rows with intervals, and what is predicted for twice the rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [(one.rows, one.eval_loss, one.loss_interval or (one.eval_loss, one.eval_loss)) for one in curve.points]
    panels = [("validation loss (nats per supervised token)", losses, curve.loss)]
    scores = [
        (point.rows, point.score, point.score_interval)
        for point in curve.points
        if point.score is not None and point.score_interval is not None
    ]
    panels += [(f"{curve.metric} on validation", scores, curve.score)] if scores else []
    figure, every = pyplot.subplots(
        1, len(panels), squeeze=False, figsize=(5.5 * len(panels), 4.2), layout="constrained"
    )
    for axes, (name, points, predicted) in zip(every[0], panels, strict=True):
        rows, values = [point[0] for point in points], [point[1] for point in points]
        errors = [[max(0.0, sign * (point[1] - point[2][end])) for point in points] for end, sign in ((0, 1), (1, -1))]
        axes.errorbar(rows, values, yerr=errors, fmt="o", capsize=3, color="#1f77b4", label="trainings")
        if predicted is not None:
            low, high = predicted.interval
            reach = [[max(0.0, predicted.value - low)], [max(0.0, high - predicted.value)]]
            axes.errorbar([predicted.rows], [predicted.value], yerr=reach, fmt="D", capsize=3, color="#d62728",
                          label="predicted for twice the rows")  # fmt: skip
        axes.set(xscale="log", xlabel="training rows", ylabel=name)
        shown = sorted({*rows, *([] if predicted is None else [predicted.rows])})
        axes.set_xticks(shown, [f"{number:,}" for number in shown])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _place(selection: Selection) -> str:
    """Where training had a checkpoint, with the step if that is within an epoch."""
    if selection.step == 0:
        return "the untrained model"
    within = f" (step {selection.step})" if selection.epoch % 1 else ""
    return f"epoch {selection.epoch:.3g}{within}"
