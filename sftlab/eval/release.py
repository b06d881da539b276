"""The decision over the test set and the guards together: ship the fine-tuned model, keep its base, or neither yet.

``ship`` needs a gain on the test set and an acceptable loss on every guard. Each condition is tested at its full level:
if one does not hold, all tests must err together to ship, which happens at most as often as the one errs (the
intersection–union test of Berger 1982). ``keep_base`` needs one condition that is shown not to hold; there one error is
enough, so that its p-values are adjusted by Holm's method for the number of conditions.
"""

from __future__ import annotations

from typing import Literal

from sftlab.eval.statistics import holm
from sftlab.results import Condition, Decision, Evaluation, Guard, RunRecord, Verdict

TEST = "test set"
EXIT = {"ship": 0, "keep_base": 3, "undecided": 4}
"""Exit codes with eval.gate=true."""


def decided(evaluation: Evaluation, verdict: Verdict | None = None) -> Evaluation:
    """Add the decision to an evaluation; ``verdict`` replaces that of its comparison, as for several models."""
    return evaluation.model_copy(update={"decision": _decision(evaluation, verdict)})


def _decision(evaluation: Evaluation, verdict: Verdict | None) -> Decision | None:
    comparison = evaluation.comparison
    if comparison is None:
        return None
    alpha = 1 - comparison.level
    conditions = [_gain(evaluation, verdict or comparison.verdict), *map(_loss, evaluation.guards)]
    adjusted = holm([one.p_fails for one in conditions])
    conditions = [
        one.model_copy(update={"p_fails_adjusted": p, "outcome": _outcome(one, fails=p < alpha)})
        for one, p in zip(conditions, adjusted, strict=True)
    ]
    outcomes = [one.outcome for one in conditions]
    outcome: Literal["ship", "keep_base", "undecided"] = "undecided"
    if "fails" in outcomes:
        outcome = "keep_base"
    elif set(outcomes) == {"holds"}:
        outcome = "ship"
    return Decision(outcome=outcome, alpha=round(alpha, 12), conditions=conditions, notes=list(_notes(evaluation)))


def _outcome(one: Condition, *, fails: bool) -> Literal["holds", "fails", "undecided"]:
    return "holds" if one.outcome == "holds" else "fails" if fails else "undecided"


def _gain(evaluation: Evaluation, verdict: Verdict) -> Condition:
    """The gain on the test set. Whether it holds is the verdict's, also if that is adjusted for other models."""
    compared = evaluation.comparison
    assert compared is not None
    below = compared.delta < compared.smallest_gain or (compared.smallest_gain == 0 and compared.delta < 0)
    p = compared.p_value if compared.p_gain is None else compared.p_gain
    if compared.p_adjusted is not None:
        p = max(p, compared.p_adjusted)
    return Condition(
        name=TEST,
        outcome="holds" if verdict.judged and verdict.outcome == "better" else "undecided",
        p_fails=p if below and verdict.judged else 1.0,
        needed=compared.needed if verdict.judged else None,
    )


def _loss(guard: Guard) -> Condition:
    """The loss on a guard."""
    compared = guard.evaluation.comparison
    if compared is None or compared.noninferiority is None or not compared.verdict.judged:
        return Condition(name=guard.name, outcome="undecided", p_fails=1.0)
    test = compared.noninferiority
    return Condition(
        name=guard.name,
        outcome="holds" if test.outcome == "no_worse" else "undecided",
        p_fails=test.p_worse,
        needed=test.needed,
    )


def _notes(evaluation: Evaluation) -> list[str]:
    """Guards on which nothing could be lost."""
    return [
        f"on guard {guard.name} the base model has {100 * base.value:.1f} %, less than the margin: nothing can be lost "
        "there, so it proves nothing"
        for guard in evaluation.guards
        if (base := guard.evaluation.baseline) is not None
        and (compared := guard.evaluation.comparison) is not None
        and compared.noninferiority is not None
        and base.value < compared.noninferiority.margin
    ]


def exit_code(record: RunRecord) -> int:
    """The exit code of a run with eval.gate=true.

    Of several evaluated models, 0 if one of them ships, and 3 if none may. If the untrained model is selected, the base
    model is kept. A run without a result decides nothing and has 0: in a training on several machines, only the first
    one evaluates.
    """
    if not (record.evaluation or record.evaluations or record.skipped):
        return 0
    evaluations = [row.evaluation for row in record.evaluations] or [record.evaluation]
    outcomes = {one.decision.outcome for one in evaluations if one is not None and one.decision is not None}
    if not outcomes:
        outcomes = {"keep_base" if record.skipped else "undecided"}
    return EXIT["ship" if "ship" in outcomes else "keep_base" if outcomes == {"keep_base"} else "undecided"]
