"""Tables and verdicts in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sftlab import results
from sftlab.eval import scorers
from sftlab.report import caveats, contenders, details, sweeps, tables
from sftlab.report.text import disagreement, early_stop, level, plural, pruning, scored
from sftlab.results import Evaluation, EvaluationRow, Export, Replication
from sftlab.runtime.console import say
from sftlab.runtime.job import OWN, Job, trained_as
from sftlab.train.select import Selection

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 20  # checkpoints and subgroups


def ranking(selection: Selection, jobs: Sequence[Job], recorded: results.Selection | None = None) -> None:
    """Print every checkpoint, best first, with the selected one marked, and the jobs that failed.

    ``recorded`` is the selection of ``run.json``, with recipes and with losses by source if there are several.
    """
    from rich.table import Table
    from rich.text import Text

    several = len(jobs) > 1
    own = tables.own_overrides([(job.number, job.overrides) for job in jobs])
    kinds = {job.number: trained_as(job, jobs) for job in jobs}
    metric = recorded.metric if recorded is not None else "score"
    by_score = selection.chosen.score is not None
    columns = ["", *(("job", "overrides") if several else ()), "epoch", "step", "train loss", "eval loss"]
    columns += [metric] if by_score else []
    columns += ["trained as"] if set(kinds.values()) != {OWN} else []
    title = f"Checkpoints by {metric} on validation" if by_score else "Checkpoints by validation loss"
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "overrides", "trained as") else "right")
    ordered = sorted(selection.candidates, key=lambda row: (-(row.score or 0), row.eval_loss))
    for candidate in ordered[:SHOWN]:
        mark = "→" if candidate == selection.chosen else "=" if candidate in selection.ties else ""
        table.add_row(
            mark,
            *((str(candidate.job), Text(" ".join(own[candidate.job]))) if several else ()),
            f"{candidate.epoch:g}",
            f"{candidate.step}{f' (average of {len(candidate.average_of)})' if candidate.average_of else ''}",
            "" if candidate.train_loss is None else f"{candidate.train_loss:.4f}",
            f"{candidate.eval_loss:.4f}",
            *([scored(metric, candidate.score)] if candidate.score is not None else []),
            *([kinds[candidate.job]] if columns[-1] == "trained as" else []),
        )
    for job in jobs:
        if job.status != "success":
            mark, style = ("–", "dim") if job.status == "pruned" else ("✗", "red")
            table.add_row(mark, str(job.number), Text(f"{' '.join(own[job.number])}\n{job.error}", style=style))
    say(table)
    for job in jobs:
        if job.receipt is not None and job.receipt.early_stop is not None:
            name = f"Job {job.number}" if several else "Training"
            say(f"{name} {early_stop(job.receipt.early_stop)}")
    if saving := pruning(jobs):
        say(saving)
    if len(ordered) > SHOWN:
        say(f"… and {len(ordered) - SHOWN} more in run.json")
    if len(selection.ties) > 1:
        say(
            f"{len(selection.ties)} checkpoints (→ and =) are within the noise of the best one on validation; → is "
            "selected. select.tie=earliest selects the one that was trained least"
        )
    if recorded is not None and (difference := disagreement(recorded)):
        say(difference)
    if recorded is not None and recorded.recipes:
        say(_printed("Recipes by their mean over seeds; the selected one is the first", sweeps.recipes(recorded)))
        if warning := sweeps.unsure(recorded):
            say(warning)
    if recorded is not None and recorded.by_source:
        say(_printed("The selected checkpoint by source", tables.losses_by_source(recorded.by_source)))


def learning_curve(curve: results.Curve) -> None:
    """Print the trainings of a learning curve, and what twice the rows would give."""
    say(_printed("Learning curve: the selected checkpoint of each training", sweeps.learning_curve(curve)))
    for sentence in sweeps.predictions(curve):
        say(sentence)


def skipped(reason: str) -> None:
    """Print why nothing was merged and evaluated."""
    say(reason[:1].upper() + reason[1:])


def evaluation(judged: Evaluation, mode: str, seed: int, replication: Replication | None = None) -> None:
    """Print the models, their difference, the verdict with what limits it, and the same by subgroup."""
    view = scorers.view(judged.task)
    reading = judged.finetuned.reading
    title = "On the test set" + (f", by eval.reading={reading}" if reading not in (None, "strict") else "")
    say(_printed(title, tables.results(judged)))
    for _, name, result in tables.models(judged):
        if repeats := result.repeats:
            say(
                f"Run-to-run noise, {name}: {', '.join(map(view.number, repeats.values))} in "
                f"{len(repeats.values)} generations, each in another order; {plural(repeats.changed, 'answer')} changed"
            )
            if repeats.majority is not None:
                passed = ", ".join(f"pass@{k} {view.number(value)}" for k, value in repeats.pass_at.items())
                say(f"{name}: {passed}, majority@{len(repeats.values)} {view.number(repeats.majority)}")
    if warning := tables.few_groups(judged):
        say(warning)
    if compared := judged.comparison:
        say(f"Verdict: {compared.verdict}")
        if compared.verdict.outcome != "better" and (loss := tables.loss(compared)):
            say(f"{loss[:1].upper()}{loss[1:]}")
        if compared.smallest_visible_difference is not None:
            visible = f"{100 * compared.smallest_visible_difference:.1f} points or more"
            say(f"This test set shows a difference of {visible} {compared.smallest_visible_assumes}")
        elif compared.smallest_visible_assumes:
            say("This test set is too small to show any difference")
        if compared.forced is not None:
            say(f"With forced choices where no answer was extracted: {compared.forced.verdict}")
        if of := tables.parts(judged):
            say(of)
    if any(one.result is not None for one in judged.contenders):
        title = f"All contenders on the same questions; difference: {judged.labels['finetuned']} minus the model"
        say(_printed(title, contenders.table(judged)))
    if (steps := contenders.chain(judged)) is not None:
        say(_printed("Deployment chain: what each step may not lose", steps))
    for sentence in [*contenders.described(judged), contenders.prompting(judged), contenders.deployed(judged)]:
        if sentence is not None:
            say(sentence)
    for _, name, result in tables.models(judged):
        if result.knowledge is not None and result.knowledge.forced and judged.constant is not None:
            always = f"always {judged.constant.answer} is right in {judged.constant.correct} of {result.n}"
            say(f"Forced choices, {name}: {tables.counted(result.knowledge.forced)} ({always})")
    if replication is not None:
        say(_printed("The selected recipe, by training", sweeps.trainings(replication, judged)))
    for caveat in caveats.caveats(judged, mode, seed, replication):
        say(caveat)
    for sentence in details.sentences(judged):
        say(sentence)
    if (by_item := tables.items(judged)) is not None:
        _first(f"By {view.items}", by_item)
    if by := judged.subgroups:
        _first(f"By subgroup, with {level(by.level)} intervals", tables.subgroups(judged))
        if by.without:
            say(f"{plural(by.without, 'test row')} without a value in this column")
        if by.note:
            say(by.note)
    guards(judged)
    if made := tables.decision(judged):
        say(f"Decision: {made}")


def guards(judged: Evaluation) -> None:
    """Print the models on every guard, and by subgroup if a guard has them."""
    if not judged.guards:
        return
    say(_printed("Guards: what the fine-tuned model may not lose, in points", tables.guards(judged)))
    for guard in judged.guards:
        if (by := guard.evaluation.subgroups) is not None:
            table = tables.subgroups(guard.evaluation)
            title = f"Guard {guard.name} by {by.column}, with {level(by.level)} intervals"
            say(_printed(title, tables.Table(table.header, table.rows[:SHOWN], table.text)))
        verdict = None if guard.evaluation.comparison is None else guard.evaluation.comparison.verdict
        if verdict is not None and not verdict.judged:
            say(f"Guard {guard.name}: {verdict.reason}")


def evaluations(rows: Sequence[EvaluationRow]) -> None:
    """Print one table of all models that a sweep evaluated."""
    say(_printed("All evaluations on the test set", tables.evaluations(rows)))
    if sum(row.p_adjusted is not None for row in rows) > 1:
        say("p is adjusted by Holm's method for the number of comparisons; the verdicts follow the adjusted p")
    for caveat in caveats.used_of_all(rows):
        say(caveat)


def _first(title: str, table: tables.Table) -> None:
    """Print the first rows of a table."""
    say(_printed(title, tables.Table(table.header, table.rows[:SHOWN], table.text)))
    if len(table.rows) > SHOWN:
        say(f"… and {len(table.rows) - SHOWN} more in run.json")


def _printed(title: str, table: tables.Table) -> Table:
    from rich.table import Table
    from rich.text import Text

    printed = Table(title=title, title_justify="left")
    for name in table.header:
        printed.add_column(Text(name), justify="left" if name in table.text else "right")
    for row in table.rows:
        printed.add_row(*map(Text, row))
    return printed


def exported(result: Export, place: Path) -> None:
    """Print the size of an exported model, and what its test says."""
    compared = result.comparison
    size, merged = (f"{number / 2**20:,.1f} MiB" for number in (result.weight_bytes, result.merged_bytes))
    say(f"Export: {result.name}, {size} (merged model: {merged}), in {place}")
    say(
        f"On the {compared.n} test questions, by {result.engine}: merged model {compared.baseline:.4g}, exported model "
        f"{compared.finetuned:.4g} ({compared.metric})"
    )
    say(f"Verdict on the exported model: {compared.verdict}")
    if loss := tables.loss(compared):
        say(f"{loss[:1].upper()}{loss[1:]}")
