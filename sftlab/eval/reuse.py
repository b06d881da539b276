"""How often a test set was used, and what this does to chance findings.

Each model that is judged on the same questions is another chance of a difference that is none. The ledger of the store
counts the models; this module derives the probability of a chance finding, and adjusts p.

A test set is the set of its questions: user messages and right answers. File names, ids, the order of rows and the
system message do not matter. A sample of a test set (eval.max_rows) is another test set. A model is its weights: the
same weights judged again, also with other generation settings, count once. The base model does not count, because it
is what the others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

from sftlab.config import Config
from sftlab.eval.statistics import deciding_p
from sftlab.records import Example
from sftlab.results import Comparison, Contender, Evaluation, Reuse, Subgroups, Verdict
from sftlab.runtime import ledger
from sftlab.runtime.store import key_of


def rows_key(examples: Sequence[Example]) -> str:
    """Hash the rows of a test set."""
    return key_of({"rows": sorted([row.question, *sorted(row.accepted)] for row in examples)})


def chance_of_better(models: int, alpha: float) -> float:
    """Probability that at least one of ``models`` that change nothing is called better than the base model.

    Each model and the base have independent answers with the same probabilities of being right, so all standardised
    differences z_j = (x_j − x_0) / √2 share the answers of the base, and any two of them have the correlation 1/2 (as
    in Dunnett's test). Given x_0 they are independent: 1 − E[Φ(√2 z(1 − alpha/2) + x_0)^models], x_0 standard normal.
    An exact test on few questions rejects less often, and then this is an upper bound.
    """
    import numpy as np

    normal = NormalDist()  # of the standard library: scipy.stats takes a second to import
    shared, weights = np.polynomial.hermite_e.hermegauss(101)
    limit = math.sqrt(2) * normal.inv_cdf(1 - alpha / 2)
    none = np.array([normal.cdf(limit + value) for value in shared]) ** models
    return float(1 - weights @ none / weights.sum())


def adjusted(p: float, number: int) -> float:
    """Adjust the p-value of the model with this number: p · number · (number + 1), at most 1.

    Σ 1 / (k (k + 1)) over all k is 1. So the probability that any of the models that change nothing is called better
    or worse stays below alpha, however many are judged, whenever one stops, and however their answers depend on each
    other (alpha spending). Multiplying p by the number alone would not hold it: Σ 1 / k has no limit. The factor
    depends on the number only, so a run that is repeated later has the same result.
    """
    return min(1.0, p * number * (number + 1))


def counted(cfg: Config, store: Path, evaluation: Evaluation, examples: Sequence[Example], model: str) -> Evaluation:
    """Record the model in the ledger of its test set; with eval.correct_for_reuse, adjust p-values and verdicts."""
    name, alpha, correct = rows_key(examples), cfg.eval.alpha, cfg.eval.correct_for_reuse
    place = ledger.record(store, name, model, cfg.name)
    reuse = Reuse(
        test_set=name,
        number=place.number,
        models=place.models,
        rows=len(examples),
        alpha=alpha,
        chance=chance_of_better(place.models, alpha),
        corrected=correct,
    )
    changes: dict[str, object] = {"reuse": reuse}
    if correct and evaluation.comparison is not None:
        changes["comparison"] = corrected(evaluation.comparison, place.number, alpha)
    if correct:
        changes["contenders"] = [_contender(one, place.number, alpha) for one in evaluation.contenders]
        if evaluation.p_adjusted is not None:
            changes["p_adjusted"] = adjusted(evaluation.p_adjusted, place.number)
    if correct and evaluation.subgroups is not None:
        changes["subgroups"] = _subgroups(evaluation.subgroups, place.number)
    return evaluation.model_copy(update=changes)


def corrected(comparison: Comparison, number: int, alpha: float) -> Comparison:
    """Adjust p and the verdict of a comparison, with forced choices and in knowledge too, for earlier models."""
    p = adjusted(deciding_p(comparison), number)
    verdict = _weakened(comparison.verdict, p, number, alpha)
    forced = None if comparison.forced is None else corrected(comparison.forced, number, alpha)
    changes: dict[str, object] = {"p_adjusted": p, "verdict": verdict, "forced": forced}
    if (split := comparison.split) is not None:
        p = adjusted(split.p_value, number)
        outcome = split.outcome if p < alpha else "inconclusive"
        changes["split"] = split.model_copy(update={"p_adjusted": p, "outcome": outcome})
    return comparison.model_copy(update=changes)


def _contender(one: Contender, number: int, alpha: float) -> Contender:
    if one.p_adjusted is None or one.verdict is None:
        return one
    p = adjusted(one.p_adjusted, number)
    return one.model_copy(update={"p_adjusted": p, "verdict": _weakened(one.verdict, p, number, alpha)})


def _weakened(verdict: Verdict, p: float, number: int, alpha: float) -> Verdict:
    """The verdict by the adjusted p, with a note on it."""
    if not verdict.judged:
        return verdict
    note = f"adjusted for model {number} on this test set, p is {p:.2g} (eval.correct_for_reuse=true)"
    outcome = verdict.outcome if p < alpha else "inconclusive"
    return verdict.model_copy(update={"outcome": outcome, "notes": [*verdict.notes, note]})


def _subgroups(subgroups: Subgroups, number: int) -> Subgroups:
    groups = []
    for group in subgroups.groups:
        if (change := group.difference) is not None:
            change = change.model_copy(update={"p_adjusted": adjusted(change.p_adjusted, number)})
        groups.append(group.model_copy(update={"difference": change}))
    note = f"{subgroups.note or ''} The adjusted p also counts model {number} on this test set.".strip()
    return subgroups.model_copy(update={"groups": groups, "note": note if subgroups.compared else subgroups.note})
