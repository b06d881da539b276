"""The result for each kind of question apart: ``eval.group_by`` names the column that tells the kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.config import EvalConfig
from sftlab.eval.score import scores_of
from sftlab.eval.statistics import compare, compare_scores, fewest, holm, mean_interval, wilson
from sftlab.records import Prediction


def subgroups(rows: Mapping[str, Sequence[Prediction]], cfg: EvalConfig, seed: int) -> dict[str, Any]:
    """Results of each model and their difference for each subgroup, the largest first.

    ``rows`` has the predictions of ``baseline`` and ``finetuned``, or of one alone, over the same questions.
    ``groups`` has for each subgroup its ``name``, its ``n``, what each model has there, and a ``difference``: that
    of a paired comparison, with ``p_value``, and ``p_adjusted`` by Holm's method for all subgroups that were
    compared. It is None, with a ``reason``, where there is one model, or where there are so few questions that no
    difference could be shown (``fewest``). ``without`` counts the questions without a value in the column.
    """
    names: dict[str, int] = {}
    first = next(iter(rows.values()))
    for row in first:
        if row.subgroup is not None:
            names[row.subgroup] = names.get(row.subgroup, 0) + 1
    groups = [_group(name, rows, cfg, seed) for name in sorted(names, key=lambda name: -names[name])]
    judged = [group["difference"] for group in groups if group["difference"] is not None]
    for difference, p in zip(judged, holm([difference["p_value"] for difference in judged]), strict=True):
        difference["p_adjusted"] = p
    return {
        "column": cfg.group_by,
        "alpha": cfg.alpha,
        "without": len(first) - sum(names.values()),
        "compared": len(judged),
        "note": _note(len(judged), len(groups), cfg.alpha) if len(rows) > 1 else None,
        "groups": groups,
    }


def _group(name: str, rows: Mapping[str, Sequence[Prediction]], cfg: EvalConfig, seed: int) -> dict[str, Any]:
    members = {model: [row for row in found if row.subgroup == name] for model, found in rows.items()}
    first = next(iter(members.values()))
    sources = [row.group for row in first]
    # Questions of one source count as one: they are gained and lost together.
    independent = len({source or number for number, source in enumerate(sources)})
    made: dict[str, Any] = {"name": name, "n": len(first), "difference": None, "reason": None}
    enough = independent >= fewest(cfg.alpha)
    for model, found in members.items():
        made[model] = _side(found, cfg, seed, enough=enough)
    if len(members) < 2:
        made["reason"] = "one model alone"
    elif not enough:
        of = "rows" if independent == len(first) else "sources"
        made["reason"] = f"too few {of} to compare: fewer than {fewest(cfg.alpha)} cannot show a difference"
    else:
        made["difference"] = _difference(members["baseline"], members["finetuned"], cfg, seed)
    return made


def _side(rows: Sequence[Prediction], cfg: EvalConfig, seed: int, *, enough: bool) -> dict[str, Any]:
    if cfg.task == "rouge":
        scores = scores_of(rows)
        interval = mean_interval(scores, [row.group for row in rows], seed=seed) if enough else None
        return {cfg.rouge: sum(scores) / len(scores), "ci95": None if interval is None else list(interval)}
    correct = sum(row.correct for row in rows)
    return {"accuracy": correct / len(rows), "ci95": list(wilson(correct, len(rows))), "correct": correct}


def _difference(a: Sequence[Prediction], b: Sequence[Prediction], cfg: EvalConfig, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"groups": [row.group for row in a], "alpha": cfg.alpha, "seed": seed}
    if cfg.task == "rouge":
        found = compare_scores(scores_of(a), scores_of(b), **settings)
    else:
        found = compare([row.correct for row in a], [row.correct for row in b], **settings)
    return {
        "delta": found.delta,
        "ci95": list(found.interval),
        "p_value": found.p_value,
        "gained": found.gained,
        "lost": found.lost,
    }


def _note(compared: int, groups: int, alpha: float) -> str:
    if not groups:
        return "No test row has a value in this column."
    if not compared:
        return "No subgroup is large enough to show a difference."
    return (
        f"{compared} of {groups} subgroups were compared. Among many, some differ by chance: take a difference for a "
        f"finding only where p is below {alpha:g} after Holm's adjustment for their number, and for an idea elsewhere."
    )
