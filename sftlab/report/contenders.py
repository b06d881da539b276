"""The models of eval.contenders in one table, and whether a prompt would have been enough."""

from __future__ import annotations

from sftlab.eval import scorers
from sftlab.report.tables import Table, loss_result
from sftlab.report.text import DASH, count, level, points, probability, span
from sftlab.results import Comparison, Contender, Cost, Evaluation, ModelResult, Outcome


def table(evaluation: Evaluation) -> Table:
    """All models with their cost, and the fine-tuned model compared with others: its result minus theirs."""
    view, judged = scorers.view(evaluation.task), evaluation.finetuned
    header = ["model", view.name(judged.metric), f"{level(judged.level)} interval", view.no_answer]
    header += ["difference, points", "p, adjusted", "verdict"]

    def row(name: str, result: ModelResult, compared: Comparison | None, p: float | None, outcome: str) -> list[str]:
        own = [name, view.number(result.value), view.interval(result.interval), count(result.unparsed)]
        if compared is None or p is None:
            return [*own, "", "", "", *_cost(result.cost, priced)]
        difference = f"{points(compared.delta)} ({span(compared.interval)})"
        return [*own, difference, probability(p), outcome.replace("_", " "), *_cost(result.cost, priced)]

    results = [judged, *(one.result for one in evaluation.contenders)]
    costs = [one.cost for one in results if one is not None and one.cost is not None]
    priced = any(one.price is not None for one in costs)
    header += ["tokens in + out", "time per answer", *(["price of 1,000"] if priced else [])] if costs else []
    rows = []
    if evaluation.baseline is not None:
        own, p = evaluation.comparison, evaluation.p_adjusted
        rows.append(row(evaluation.labels["baseline"], evaluation.baseline, own, p, _outcome(own, p)))
    for one in evaluation.contenders:
        if one.result is not None:
            outcome = one.verdict.outcome if one.verdict is not None and one.verdict.judged else "not judged"
            rows.append(row(one.name, one.result, one.comparison, one.p_adjusted, outcome))
    rows.append(row(evaluation.labels["finetuned"], judged, None, None, ""))
    return Table(header, [cells[: len(header)] for cells in rows], ("model",))


def _cost(cost: Cost | None, priced: bool) -> list[str]:
    """Mean tokens of prompt and answer, seconds per answer, and the price of 1,000 answers if any has one."""
    if cost is None or not cost.answers:
        return [DASH, DASH, DASH]
    asked = DASH if cost.prompt_tokens is None else count(round(cost.prompt_tokens / cost.answers))
    tokens = f"{asked} + {count(round(cost.completion_tokens / cost.answers))}"
    pace = DASH if cost.seconds_per_answer is None else f"{cost.seconds_per_answer:.3g} s"
    return [tokens, pace, *([DASH if cost.price is None else f"{cost.price:.3g}"] if priced else [])]


def _outcome(comparison: Comparison | None, p: float | None) -> str:
    """The outcome of a comparison by its adjusted p."""
    if comparison is None or p is None or not comparison.verdict.judged:
        return "not judged"
    return comparison.verdict.outcome if p < 1 - comparison.level else "inconclusive"


def chain(evaluation: Evaluation) -> Table | None:
    """The steps of eval.chain, and whether each may have lost more than the margin; None without a chain."""
    if not evaluation.chain:
        return None
    view = scorers.view(evaluation.task)
    header = ["from", "to", f"{view.name(evaluation.finetuned.metric)} before", "after"]
    header += ["difference, points", "lost at most", "margin", "result"]
    rows = []
    for step in evaluation.chain:
        names, compared = [step.first, step.second], step.comparison
        if compared is None or (test := compared.noninferiority) is None:
            rows.append([*names, DASH, DASH, DASH, DASH, DASH, "not compared"])
            continue
        values = [view.number(compared.baseline), view.number(compared.finetuned)]
        lost = points(max(-test.bound, 0)).removeprefix("+")
        numbers = [f"{points(compared.delta)} ({span(compared.interval)})", lost, points(test.margin).removeprefix("+")]
        rows.append([*names, *values, *numbers, loss_result(compared)])
    return Table(header, rows, ("from", "to", "result"))


def deployed(evaluation: Evaluation) -> str | None:
    """Report in one sentence whether the chain passes at every step; None without a chain."""
    if not evaluation.chain:
        return None
    results = [DASH if step.comparison is None else loss_result(step.comparison) for step in evaluation.chain]
    names = " → ".join(dict.fromkeys(name for step in evaluation.chain for name in (step.first, step.second)))
    if all(result == "no worse" for result in results):
        return f"Deployment chain {names}: no step is worse by the margin or more"
    worse = [f"{step.first} → {step.second}" for step, result in zip(evaluation.chain, results, strict=True)
             if result == "worse"]  # fmt: skip
    if worse:
        return f"Deployment chain {names}: more than the margin is lost in {', '.join(worse)}"
    return f"Deployment chain {names}: a loss of the margin is not ruled out in every step"


def against(evaluation: Evaluation) -> list[tuple[str, Comparison]]:
    """The fine-tuned model compared with each other model, by the name of that; empty without contenders."""
    own = [] if evaluation.comparison is None else [(evaluation.labels["baseline"], evaluation.comparison)]
    others = [(one.name, one.comparison) for one in evaluation.contenders if one.comparison is not None]
    return own + others if others else []


def described(evaluation: Evaluation) -> list[str]:
    """What each contender is, or why it was left out."""
    return [
        f"{one.name}: {one.about}" + ("" if one.left_out is None else f"; left out: {one.left_out}")
        for one in evaluation.contenders
    ]


def prompting(evaluation: Evaluation) -> str | None:
    """Whether a prompt would have been enough, in one sentence; None if no prompt was compared.

    Of several prompts the one with the best result is compared. Those in eval.chain have no verdict.
    """
    compared = [one for one in evaluation.contenders if one.prompting and one.verdict is not None]
    tried = [(one.result.value, one) for one in compared if one.result is not None]
    if not tried:
        return None
    best = max(tried, key=lambda pair: pair[0])[1]
    assert best.verdict is not None
    if not best.verdict.judged:
        return f"Whether a prompt would have been enough is not known: {best.verdict.reason}"
    return f"{_SAID[best.verdict.outcome].format(best.about)}: {_numbers(best)}"


_SAID: dict[Outcome, str] = {
    "better": "A prompt would not have been enough, since the fine-tuned model is better than {}",
    "too_small": "A prompt may have been enough, since the gain is too small to matter compared with {}",
    "inconclusive": "A prompt may have been enough, since no difference is shown between the fine-tuned model and {}",
    "worse": "A prompt would have been better, since the fine-tuned model is worse than {}",
}


def _numbers(one: Contender) -> str:
    assert one.verdict is not None
    p = "" if one.p_adjusted is None else f"; p adjusted by Holm's method {probability(one.p_adjusted)}"
    return f"{one.verdict.reason}{p}"
