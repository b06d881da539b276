"""The tables of results: one form for the terminal, the page, the model card and tracking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sftlab.eval import scorers
from sftlab.eval.statistics import FEW
from sftlab.report.text import DASH, count, decimals, level, points, probability, span, stated_p
from sftlab.results import (
    Comparison,
    Condition,
    Evaluation,
    EvaluationRow,
    Guard,
    ModelResult,
    RunRecord,
    SourceLoss,
    Subgroup,
    SubgroupSide,
)


@dataclass(frozen=True)
class Table:
    """Cells as text. Columns in ``text`` are words and aligned to the left, the others are numbers."""

    header: list[str]
    rows: list[list[str]]
    text: tuple[str, ...] = ()


def models(evaluation: Evaluation) -> list[tuple[str, str, ModelResult]]:
    """The evaluated models: key, name and result."""
    results = {"baseline": evaluation.baseline, "finetuned": evaluation.finetuned}
    return [(key, evaluation.labels[key], result) for key, result in results.items() if result is not None]


def name_of_metric(evaluation: Evaluation) -> str:
    """The name of the metric that is judged."""
    return scorers.view(evaluation.task).name(evaluation.finetuned.metric)


def results(evaluation: Evaluation) -> Table:
    """The models, and their difference."""
    view, judged, compared = scorers.view(evaluation.task), evaluation.finetuned.metric, evaluation.comparison
    others = [key for key in evaluation.finetuned.scores if key != judged]
    header = ["model", view.name(judged), f"{level(evaluation.finetuned.level)} interval"]
    header += [view.name(key) for key in others]
    header += ["correct" if view.graded else f"{view.gained}, {view.lost}", view.rows, view.no_answer, "truncated"]
    rows = []
    for _, name, result in models(evaluation):
        row = [name, view.number(result.value), view.interval(result.interval)]
        row += [_other(view, result, key) for key in others]
        row += ["" if result.correct is None else count(result.correct)]
        rows.append([*row, questions(result), count(result.unparsed), truncated(result)])
    if compared is not None:
        difference = ["Difference", f"{points(compared.delta)} points", span(compared.interval)]
        known = [compared.scores.get(key) for key in others]
        difference += ["" if other is None else f"{points(other.value)} ({span(other.interval)})" for other in known]
        rows.append([*difference, f"+{compared.gained} −{compared.lost}", count(compared.n), "", ""])
        header.append("p")
        rows = [[*row, ""] for row in rows[:-1]] + [[*rows[-1], probability(compared.p_value)]]
    return Table(header, rows, ("model",))


def _other(view: scorers.View, result: ModelResult, key: str) -> str:
    """Another metric of a model, with its interval if it has one."""
    interval = result.score_intervals.get(key)
    return view.number(result.scores[key]) + (f" ({view.interval(interval)})" if interval is not None else "")


def items(evaluation: Evaluation) -> Table | None:
    """Precision, recall and F1 of each model by label or field; None if the task has neither."""
    view, every = scorers.view(evaluation.task), models(evaluation)
    names = dict.fromkeys(name for _, _, result in every for name in result.items)
    if not names:
        return None
    header = [view.items, "in targets"]
    header += [f"{part}, {name}" for _, name, _ in every for part in ("right of given", "F1")]
    table = Table(header, [], (view.items,))
    for name in names:
        own = [result.items.get(name) for _, _, result in every]
        row = [name, count(max(counts.expected for counts in own if counts is not None))]
        for counts in own:
            row += [DASH, DASH] if counts is None else [f"{counts.right:,} of {counts.given:,}", f"{counts.f1:.3f}"]
        table.rows.append(row)
    return table


def questions(result: ModelResult) -> str:
    """The number of questions, and of answers to each if there are several, over which the other columns count."""
    several = result.answers // result.n if result.n else 0
    return f"{count(result.n)} × {several}" if several > 1 else count(result.n)


def few_groups(evaluation: Evaluation) -> str | None:
    """A warning if the intervals rest on few groups of rows."""
    groups = evaluation.finetuned.groups
    if groups is None or groups >= FEW:
        return None
    return (
        f"The {scorers.view(evaluation.task).rows} are of {groups} groups only. Intervals take into account that those "
        f"of one group resemble each other, but with fewer than {FEW} groups they may still be too narrow."
    )


def truncated(result: ModelResult) -> str:
    """The count of truncated answers; a dash if it is unknown for all."""
    if result.truncated is None:
        return DASH
    known = result.finish_reasons
    return (
        f"{result.truncated:,}" if known == (result.answers or result.n) else f"{result.truncated:,} of {known:,} known"
    )


def counted(letters: dict[str, int]) -> str:
    """How often each letter occurs, the most frequent first."""
    return ", ".join(f"{letter} {number:,}" for letter, number in sorted(letters.items(), key=lambda item: -item[1]))


def parts(evaluation: Evaluation) -> str | None:
    """The difference as the sum of knowledge, guessing and form, or why it is not split; None without a comparison."""
    compared = evaluation.comparison
    if compared is None or (compared.split is None and compared.unsplit is None):
        return None
    if compared.split is None:
        return f"Not split into knowledge, guessing and form: {compared.unsplit}"
    by = compared.split
    shown = "" if by.p_adjusted is None else f", adjusted {stated_p(by.p_adjusted)}"
    shown += ", so no difference in knowledge is shown" if by.outcome == "inconclusive" else ""
    return (
        f"{points(compared.delta)} points = {points(by.knowledge.value)} knowledge ({level(by.level)} interval "
        f"{span(by.knowledge.interval)}{shown}), {points(by.guessing.value)} guessing, {points(by.form.value)} form"
    )


def loss(compared: Comparison) -> str | None:
    """Whether a loss is acceptable (eval.margin), in words; None without a margin, or if nothing is judged."""
    if (test := compared.noninferiority) is None or not compared.verdict.judged:
        return None
    margin, by = points(test.margin).removeprefix("+"), f"one-sided {stated_p(test.p_value)}"
    if test.outcome == "worse":
        return f"the loss exceeds the largest acceptable one of {margin} points (one-sided test, eval.margin)"
    if test.outcome == "no_worse":
        most = f"at most {points(-test.bound)[1:]} points are lost" if test.bound < 0 else "nothing is lost"
        return f"no worse: a loss of {margin} points is ruled out ({by}; at {level(test.level)} {most})"
    return (
        f"a loss of {margin} points (eval.margin) is not ruled out ({by}); at {level(test.level)} the loss is at most "
        f"{points(-test.bound)[1:]} points"
    )


def losses_by_source(losses: Sequence[SourceLoss]) -> Table:
    """The validation loss of the selected checkpoint by source."""
    header = ["source", "eval loss", "validation rows", "supervised tokens"]
    rows = [[loss.source, decimals(loss.eval_loss), count(loss.rows), count(loss.tokens)] for loss in losses]
    return Table(header, rows, ("source",))


def subgroups(evaluation: Evaluation) -> Table:
    """The models on every subgroup, and their difference."""
    view, of = scorers.view(evaluation.task), evaluation.subgroups
    assert of is not None
    several = len(models(evaluation)) > 1

    def side(result: SubgroupSide | None) -> str:
        if result is None:
            return DASH
        ends = f" ({view.interval(result.interval)})" if result.interval is not None else ""
        return view.number(result.value) + ends

    def difference(group: Subgroup) -> list[str]:
        change = group.difference
        if change is None:
            return [group.reason or DASH, "", ""]
        text = f"{points(change.delta)} ({span(change.interval)})"
        return [text, probability(change.p_value), probability(change.p_adjusted)]

    header = [of.column, view.rows, *(name for _, name, _ in models(evaluation))]
    rows = []
    for group in of.groups:
        sides = {"baseline": group.baseline, "finetuned": group.finetuned}
        row = [group.name, count(group.n), *(side(sides[key]) for key, _, _ in models(evaluation))]
        rows.append(row + (difference(group) if several else []))
    return Table(header + (["difference, points", "p", "p, adjusted"] if several else []), rows, (of.column,))


def guards(evaluation: Evaluation) -> Table:
    """The models on every guard, and whether a loss is acceptable."""
    header = ["guard", "questions", *(name for _, name, _ in models(evaluation)), "difference", "lost at most"]
    table = Table([*header, "margin", "result"], [], ("guard", "result"))
    for guard in evaluation.guards:
        view, compared = scorers.view(guard.evaluation.task), guard.evaluation.comparison
        row = [guard.name, count(guard.evaluation.finetuned.n)]
        row += [view.number(result.value) for _, _, result in models(guard.evaluation)]
        if compared is None or (test := compared.noninferiority) is None:
            table.rows.append([*row, "", "", "", "not compared"])
            continue
        row += [f"{points(compared.delta)} ({span(compared.interval)})", points(max(-test.bound, 0)).removeprefix("+")]
        table.rows.append([*row, points(test.margin).removeprefix("+"), guard_result(guard)])
    return table


def decision(evaluation: Evaluation) -> str | None:
    """The decision over test set and guards, its reason and its error rate; None without one."""
    if (made := evaluation.decision) is None:
        return None
    first, *others = made.conditions
    names = {one.name: f"the {one.name}" if one is first else f"guard {one.name}" for one in made.conditions}
    risk = f"{100 * made.alpha:g} %"
    if made.outcome == "ship":
        held = f"better on {names[first.name]}"
        held += f", and no worse on {' and '.join(names[one.name] for one in others)}" if others else ""
        lost = ", or loses a margin on a guard," if others else ""
        reason = f"{held}; a model that is not better{lost} ships with a probability of at most {risk}"
    elif made.outcome == "keep_base":
        each = [
            f"{'no gain' if one is first else 'a loss above the margin'} on {names[one.name]} "
            f"(adjusted {stated_p(one.p_fails_adjusted or 0)})"
            for one in made.conditions
            if one.outcome == "fails"
        ]
        reason = f"{', '.join(each)}; a model that meets all conditions is refused with a probability of at most {risk}"
    else:
        reason = "; ".join(_open(one, names[one.name]) for one in made.conditions if one.outcome == "undecided")
    return "; ".join([f"{made.outcome}: {reason}", *made.notes])


def _open(one: Condition, name: str) -> str:
    if one.needed is None:
        return f"{name} does not decide"
    return f"{name} does not decide; about {needed(one.needed)} questions would, if the difference stays as it is"


def guard_result(guard: Guard) -> str:
    """Whether a loss on a guard is acceptable, in a few words."""
    compared = guard.evaluation.comparison
    return "not judged" if compared is None else loss_result(compared)


def loss_result(compared: Comparison) -> str:
    """Whether a loss is acceptable, in a few words."""
    if compared.noninferiority is None or not compared.verdict.judged:
        return "not judged"
    test = compared.noninferiority
    if test.outcome != "inconclusive":
        return {"no_worse": "no worse", "worse": "worse"}[test.outcome]
    return "undecided" + (f" (about {needed(test.needed)} questions decide)" if test.needed is not None else "")


def exports(run: RunRecord) -> Table | None:
    """The merged model in other formats, and whether each may have lost more than the margin; None without exports."""
    if not run.exports or run.evaluation is None:
        return None
    view = scorers.view(run.evaluation.task)
    header = ["format", "size of merged", "answers by", f"{name_of_metric(run.evaluation)} before", "after"]
    header += ["difference, points", "lost at most", "result"]
    rows = []
    for one in run.exports:
        compared = one.comparison
        test = compared.noninferiority
        size, merged = (f"{number / 2**20:,.0f}" for number in (one.weight_bytes, one.merged_bytes))
        values = [view.number(compared.baseline), view.number(compared.finetuned)]
        lost = DASH if test is None else points(max(-test.bound, 0)).removeprefix("+")
        difference = f"{points(compared.delta)} ({span(compared.interval)})"
        rows.append([one.name, f"{size} of {merged} MiB", one.engine, *values, difference, lost, loss_result(compared)])
    return Table(header, rows, ("format", "result"))


def needed(questions: int) -> str:
    """A number of questions that was extrapolated: two digits, rounded up."""
    scale = 10 ** max(len(str(questions)) - 2, 0)
    return f"{-(-questions // scale) * scale:,}"


def evaluations(rows: Sequence[EvaluationRow]) -> Table:
    """The models or settings of a sweep with mode=evaluate."""
    shared = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    levels = {row.evaluation.finetuned.level for row in rows if row.evaluation is not None}
    interval = f"{level(levels.pop())} interval" if len(levels) == 1 else "interval"
    header = [
        "job",
        "model",
        "overrides",
        "base",
        "score",
        interval,
        "difference",
        "p",
        "p, adjusted",
        "verdict",
        "decision",
    ]
    table = Table(header, [], ("model", "overrides", "verdict", "decision"))
    for row in rows:
        own = [word for word in row.overrides if word not in shared and not word.startswith("eval.name_or_path=")]
        start = [str(row.job), row.model or "", " ".join(own)]
        if row.evaluation is None:
            table.rows.append([*start, *[""] * 6, f"failed: {row.error}", ""])
            continue
        view, baseline, model = scorers.view(row.evaluation.task), row.evaluation.baseline, row.evaluation.finetuned
        start += ["" if baseline is None else view.number(baseline.value)]
        start += [view.number(model.value), view.interval(model.interval)]
        compared = row.evaluation.comparison
        if compared is None or row.p_adjusted is None or row.verdict is None:
            table.rows.append([*start, "", "", "", "", ""])
            continue
        numbers = [f"{points(compared.delta)} points", probability(compared.p_value), probability(row.p_adjusted)]
        made = row.evaluation.decision
        table.rows.append([*start, *numbers, row.verdict.outcome, "" if made is None else made.outcome])
    return table


def own_overrides(jobs: Sequence[tuple[int, Sequence[str]]]) -> dict[int, list[str]]:
    """For each job's number its overrides without those that all jobs share."""
    shared = set.intersection(*(set(overrides) for _, overrides in jobs)) if len(jobs) > 1 else set()
    return {number: [text for text in overrides if text not in shared] for number, overrides in jobs}
