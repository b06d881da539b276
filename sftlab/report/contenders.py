"""The models of eval.contenders in one table, and whether a prompt would have been enough."""

from __future__ import annotations

from sftlab.eval import scorers
from sftlab.report.tables import Table
from sftlab.report.text import count, level, points, probability, span
from sftlab.results import Comparison, Contender, Evaluation, ModelResult, Outcome


def table(evaluation: Evaluation) -> Table:
    """All models, and the fine-tuned model compared with each of the others."""
    view, judged = scorers.view(evaluation.task), evaluation.finetuned
    interval = f"{level(judged.level)} interval"
    minus = f"{evaluation.labels['finetuned']} minus it, points"
    header = ["model", view.name(judged.metric), interval, view.no_answer, minus, "p, adjusted", "verdict"]

    def row(name: str, result: ModelResult, compared: Comparison | None, p: float | None, outcome: str) -> list[str]:
        own = [name, view.number(result.value), view.interval(result.interval), count(result.unparsed)]
        if compared is None or p is None:
            return [*own, "", "", ""]
        return [
            *own,
            f"{points(compared.delta)} ({span(compared.interval)})",
            probability(p),
            outcome.replace("_", " "),
        ]

    rows = []
    if evaluation.baseline is not None:
        own, p = evaluation.comparison, evaluation.p_adjusted
        rows.append(row(evaluation.labels["baseline"], evaluation.baseline, own, p, _outcome(own, p)))
    for one in evaluation.contenders:
        if one.result is not None:
            outcome = one.verdict.outcome if one.verdict is not None and one.verdict.judged else "not judged"
            rows.append(row(one.name, one.result, one.comparison, one.p_adjusted, outcome))
    rows.append(row(evaluation.labels["finetuned"], judged, None, None, ""))
    return Table(header, rows, ("model", "verdict"))


def _outcome(comparison: Comparison | None, p: float | None) -> str:
    """The outcome of a comparison by its adjusted p."""
    if comparison is None or p is None or not comparison.verdict.judged:
        return "not judged"
    return comparison.verdict.outcome if p < 1 - comparison.level else "inconclusive"


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
    """Whether a prompt would have been enough, in one sentence; None if no prompt was tried.

    Of several prompts the one with the best result is compared.
    """
    tried = [(one.result.value, one) for one in evaluation.contenders if one.prompting and one.result is not None]
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
