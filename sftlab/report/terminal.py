"""What people look at: the ranking and the table in the terminal, the curve, and the page."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.eval.score import METRICS, metric, truncated
from sftlab.records import read_jsonl, write_jsonl
from sftlab.runtime.console import say
from sftlab.runtime.job import OWN, Job, trained_as
from sftlab.runtime.run import Run
from sftlab.train.select import Selection

logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its cache of fonts

SHOWN = 20  # checkpoints in the terminal's ranking, and subgroups


def ranking(selection: Selection, jobs: Sequence[Job]) -> None:
    """Print every checkpoint, best first, with the chosen one marked, and the jobs that failed."""
    from rich.table import Table
    from rich.text import Text

    several = len(jobs) > 1
    differing = _differing(jobs)
    kinds = {job.number: trained_as(job, jobs) for job in jobs}
    by_answers = selection.chosen.exact_match is not None
    columns = ["", *(("job", "overrides") if several else ()), "epoch", "step", "train loss", "eval loss"]
    columns += ["exact match"] if by_answers else []
    columns += ["trained as"] if set(kinds.values()) != {OWN} else []
    title = "Checkpoints by right answers on validation" if by_answers else "Checkpoints by validation loss"
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "overrides", "trained as") else "right")
    ordered = sorted(selection.candidates, key=lambda row: (-(row.exact_match or 0), row.eval_loss))
    for candidate in ordered[:SHOWN]:
        mark = "→" if candidate == selection.chosen else "=" if candidate in selection.ties else ""
        table.add_row(
            mark,
            *((str(candidate.job), Text(" ".join(differing[candidate.job]))) if several else ()),
            f"{candidate.epoch:g}",
            str(candidate.step),
            "" if candidate.train_loss is None else f"{candidate.train_loss:.4f}",
            f"{candidate.eval_loss:.4f}",
            *([f"{candidate.exact_match:.2%}"] if candidate.exact_match is not None else []),
            *([kinds[candidate.job]] if columns[-1] == "trained as" else []),
        )
    for job in jobs:
        if job.status != "success":
            table.add_row("✗", str(job.number), Text(f"{' '.join(differing[job.number])}\n{job.error}", style="red"))
    say(table)
    if len(ordered) > SHOWN:
        say(f"… and {len(ordered) - SHOWN} more in run.json")
    if len(selection.ties) > 1:
        say(
            f"{len(selection.ties)} checkpoints (→ and =) lie within the noise of the best one on validation; → is "
            "kept, and select.tie=earliest would keep the one that was trained least"
        )


def _differing(jobs: Sequence[Job]) -> dict[int, list[str]]:
    """Of each job's overrides those that not all jobs have."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return {job.number: [override for override in job.overrides if override not in shared] for job in jobs}


def sweep_csv(path: Path, selection: Selection, jobs: Sequence[Job]) -> None:
    """A row for every checkpoint of every job, in the order of jobs and steps."""
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                *("job", "overrides", "epoch", "step", "train_loss", "eval_loss", "seconds"),
                *("exact_match", "trained_as", "selected"),
            ]
        )
        ranked = {(row.job, row.checkpoint): row for row in selection.candidates}
        for job in jobs:
            for candidate in job.candidates:
                row = ranked.get((job.number, candidate.checkpoint), candidate)
                found = [row.epoch, row.step, row.train_loss, row.eval_loss, row.seconds, row.exact_match]
                kind = trained_as(job, jobs)
                out.writerow([row.job, " ".join(row.overrides), *found, kind, row == selection.chosen])


def metrics(run: Run, jobs: Sequence[Job]) -> None:
    """Copy what the trainer logged into the run's folder, with the job's number where there are several."""
    rows = []
    for job in jobs:
        if "train" not in job.stages:
            continue
        mark = {"job": job.number} if len(jobs) > 1 else {}
        rows += [mark | row for row in read_jsonl(Path(job.stages["train"]) / "metrics.jsonl")]
    write_jsonl(run.folder / "metrics.jsonl", rows)


def loss_curve(path: Path, run: dict[str, Any], jobs: Sequence[Job]) -> None:
    """The bias–variance curve: training loss solid, validation loss dashed, the chosen checkpoint marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    several = len(jobs) > 1
    figure, axes = pyplot.subplots(figsize=(10 if several else 8, 4.5), layout="constrained")
    chosen = run["selection"]
    colors = pyplot.get_cmap("tab10").colors
    training_line: dict[str, Any] = {"linewidth": 1.2, "alpha": 0.7}
    validation_line: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4, "linewidth": 1.8}
    if several:  # the colours are the jobs
        axes.plot([], [], color="gray", label="training loss", **training_line)
        axes.plot([], [], color="gray", label="validation loss", **validation_line)
    differing = _differing(jobs)
    for index, job in enumerate(job for job in jobs if "train" in job.stages):
        history = list(read_jsonl(Path(job.stages["train"]) / "metrics.jsonl"))
        color = colors[index % len(colors)]
        training = [(row["epoch"], row["loss"]) for row in history if row.get("loss") is not None]
        validation = [(row["epoch"], row["eval_loss"]) for row in history if row.get("eval_loss") is not None]
        names: tuple[str | None, str | None] = ("training loss", "validation loss")
        if several:
            # Of a key its last part: train.num_train_epochs=3 is long for a legend.
            words = (re.sub(r"^[\w.]*\.", "", override) for override in differing[job.number])
            names = (None, " ".join([f"job {job.number}", *words]) if index < SHOWN else None)
        axes.plot(*zip(*training, strict=True), color=color, label=names[0], **training_line)
        axes.plot(*zip(*validation, strict=True), color=color, label=names[1], **validation_line)
    axes.plot(
        [chosen["epoch"]],
        [chosen["eval_loss"]],
        linestyle="none",
        marker="*",
        markersize=18,
        color="#d62728",
        markeredgecolor="white",
        zorder=5,
        label=f"kept: epoch {chosen['epoch']:g}, {chosen['eval_loss']:.4f}",
    )
    axes.set(xlabel="epoch", ylabel="loss (nats per target token)", title=run["experiment"])
    low, high = axes.get_ylim()
    if high > 10 * max(low, chosen["eval_loss"]):
        axes.set_yscale("log")  # the end of a curve that falls this far would lie on the axis
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if several:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small", handlelength=3)
    else:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def table_rows(evaluation: dict[str, Any]) -> list[list[Any]]:
    """The final table, its header first."""
    if metric(evaluation) != "accuracy":
        return _score_rows(evaluation)
    header = ["model", "accuracy", "95 % interval", "correct", "n", "unparsed", "truncated"]
    rows: list[list[Any]] = [header]
    for name in ("baseline", "finetuned"):
        if name in evaluation:
            row = evaluation[name]
            low, high = row["ci95"]
            rows.append(
                [
                    name,
                    f"{row['accuracy']:.2%}",
                    f"{low:.1%} – {high:.1%}",
                    row["correct"],
                    row["n"],
                    row["unparsed"],
                    truncated(row),
                ]
            )
    if "comparison" in evaluation:
        row = evaluation["comparison"]
        low, high = row["ci95"]
        rows.append(
            [
                "difference",
                f"{100 * row['delta']:+.2f} points",
                f"{100 * low:+.1f} – {100 * high:+.1f}",
                f"+{row['gained']} −{row['lost']}",
                row["n"],
                "",
                "",
            ]
        )
    return rows


def _score_rows(evaluation: dict[str, Any]) -> list[list[Any]]:
    """The final table of a task with scores: the one that is judged, and then the others."""
    judged = metric(evaluation)
    others = [name for name in METRICS if name not in ("accuracy", judged)]
    header = ["model", METRICS[judged], "95 % interval", *(METRICS[name] for name in others)]
    rows: list[list[Any]] = [[*header, "higher, lower", "n", "empty", "truncated"]]
    for name in ("baseline", "finetuned"):
        if name in evaluation:
            row = evaluation[name]
            low, high = row["ci95"]
            means = [f"{row[other]:.3f}" for other in others]
            interval = f"{low:.3f} – {high:.3f}"
            rows.append([name, f"{row[judged]:.3f}", interval, *means, "", row["n"], row["unparsed"], truncated(row)])
    if "comparison" in evaluation:
        row = evaluation["comparison"]
        low, high = row["ci95"]
        change = [f"{100 * row['delta']:+.2f} points", f"{100 * low:+.1f} – {100 * high:+.1f}"]
        rows.append(["difference", *change, *[""] * len(others), f"+{row['gained']} −{row['lost']}", row["n"], "", ""])
    return rows


def subgroup_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """The table of subgroups, its header first."""
    found, judged = evaluation["subgroups"], metric(evaluation)
    models = [name for name in ("baseline", "finetuned") if name in evaluation]

    def side(row: dict[str, Any]) -> str:
        value, interval = row[judged], row["ci95"]
        if judged == "accuracy":
            return f"{value:.1%} ({interval[0]:.1%} – {interval[1]:.1%})"
        return f"{value:.3f}" + (f" ({interval[0]:.3f} – {interval[1]:.3f})" if interval else "")

    rows = [[found["column"], "n", *models, *(("difference", "p, adjusted") if len(models) > 1 else ())]]
    for group in found["groups"]:
        row = [group["name"], str(group["n"]), *(side(group[name]) for name in models)]
        if len(models) > 1:
            change = group["difference"]
            if change is None:
                row += [group["reason"], ""]
            else:
                low, high = (100 * end for end in change["ci95"])
                row += [f"{100 * change['delta']:+.1f} ({low:+.1f} – {high:+.1f})", f"{change['p_adjusted']:.2g}"]
        rows.append(row)
    return rows


def table(evaluation: dict[str, Any]) -> None:
    """Print baseline, fine-tuned and difference, the verdict, and the same by subgroup."""
    from rich.table import Table
    from rich.text import Text

    header, *rows = table_rows(evaluation)
    reading = next((side["reading"] for side in evaluation.values() if "reading" in side), "strict")
    title = "On the test set" + (f", by eval.reading={reading}" if reading != "strict" else "")
    printed = Table(title=title, title_justify="left")
    for name in header:
        printed.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        printed.add_row(*map(str, row))
    say(printed)
    for name in ("baseline", "finetuned"):
        if found := evaluation.get(name, {}).get("repeats"):
            shown = "{:.2%}" if metric(evaluation) == "accuracy" else "{:.3f}"
            say(
                f"Run-to-run noise, {name}: {', '.join(map(shown.format, found['values']))} in {len(found['values'])} "
                f"generations, each in another order; {found['changed']} answers are judged otherwise in another one"
            )
    if "comparison" in evaluation:
        say(f"Verdict: {evaluation['comparison']['verdict']}")
        if "forced" in evaluation["comparison"]:
            say(f"With an answer forced where there was none: {evaluation['comparison']['forced']['verdict']}")
    if "subgroups" in evaluation:
        found = evaluation["subgroups"]
        header, *rows = subgroup_rows(evaluation)
        printed = Table(title="By subgroup, with 95 % intervals", title_justify="left")
        for name in header:
            printed.add_column(Text(name), justify="left" if name == header[0] else "right")
        for row in rows[:SHOWN]:
            printed.add_row(*map(Text, row))
        say(printed)
        if len(rows) > SHOWN:
            say(f"… and {len(rows) - SHOWN} more in run.json")
        if found["without"]:
            say(f"{found['without']} test rows have no value in this column")
        if found["note"]:
            say(found["note"])


def evaluations(rows: Sequence[dict[str, Any]]) -> None:
    """Print one table over all models that a sweep evaluated."""
    from rich.table import Table
    from rich.text import Text

    from sftlab.report.page import evaluation_rows

    header, *lines = evaluation_rows(rows)
    printed = Table(title="All evaluations on the test set", title_justify="left")
    for name in header:
        printed.add_column(name, justify="left" if name in ("model", "overrides", "verdict") else "right")
    for line in lines:
        printed.add_row(*map(Text, line))
    say(printed)
    if sum("p_adjusted" in row for row in rows) > 1:
        say("Adjusted by Holm's method for the number of comparisons; the verdicts follow the adjusted p")


def page(run: Run, to: Path | None = None) -> None:
    """Write ``report.html``, one file that opens offline, into the run's folder or another."""
    from sftlab.report.page import render

    ((to or run.folder) / "report.html").write_text(render(run.folder, run.values), encoding="utf-8")
