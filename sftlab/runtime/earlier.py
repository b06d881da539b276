"""Convert ``run.json`` and ``job.json`` of schema version 1 to the fields of today's records."""

from __future__ import annotations

from typing import Any

SCHEMA_VERSION = 1
LEVEL = 0.95
"""Confidence level of the intervals, which version 1 did not record."""

Values = dict[str, Any]
RECORDS = ("overlap", "precision", "receipt")
OUTCOMES = ("better", "worse", "inconclusive")


def run(values: Values) -> Values:
    """Convert a ``run.json``. Fields that did not change are copied."""
    return {
        **_present(values),
        "schema_version": 2,
        **_converted(values, precision=_precision, evaluation=_evaluation),
        "evaluations": [_row(row) for row in values.get("evaluations") or []],
        "jobs": [_job_summary(row) for row in values.get("jobs") or []],
    }


def job(values: Values) -> Values:
    """Convert a ``job.json``."""
    return {
        **_present(values),
        "schema_version": 2,
        **_converted(values, precision=_precision, evaluation=_evaluation),
    }


def _present(values: Values) -> Values:
    """The values that are not null. Version 1 wrote {} for a missing record."""
    return {name: value for name, value in values.items() if value is not None and (value or name not in RECORDS)}


def _converted(values: Values, **converters: Any) -> Values:
    return {name: convert(values[name]) for name, convert in converters.items() if values.get(name)}


def _precision(values: Values) -> Values:
    return {"bf16": values["train.bf16"], "dtype": values["eval.dtype"], "measured": values["measured"]}


def _job_summary(values: Values) -> Values:
    own = values["trained_as"] == "a job of its own"
    return {**values, "trained_as": "trained separately"} if own else values


def _row(values: Values) -> Values:
    return {
        **_present(values),
        **_converted(values, precision=_precision, evaluation=_evaluation, verdict=_verdict),
    }


def _evaluation(values: Values) -> Values:
    sides = [values[name] for name in ("baseline", "finetuned") if values.get(name)]
    metric = sides[0].get("metric", "accuracy")
    task = "rouge" if metric != "accuracy" else "choice" if any("reading" in side for side in sides) else "exact"
    converters = {"baseline": _side, "finetuned": _side, "comparison": _comparison, "subgroups": _subgroups}
    converted = {name: convert(values[name], metric) for name, convert in converters.items() if values.get(name)}
    return {"task": task, **converted}


def _side(values: Values, metric: str) -> Values:
    kinds = {name: value for name, value in values.items() if name.startswith("rouge")}
    return {
        "finish_reasons": 0 if values["truncated"] is None else values["n"],
        **values,
        "metric": metric,
        "value": values[metric],
        "interval": values["ci95"],
        "level": LEVEL,
        "scores": kinds,
    }


def _comparison(values: Values, metric: str) -> Values:
    name = "accuracy" if metric == "accuracy" else "mean"
    return {
        **values,
        "metric": metric,
        "baseline": values[f"{name}_a"],
        "finetuned": values[f"{name}_b"],
        "interval": values["ci95"],
        "level": LEVEL,
        "verdict": _verdict(values["verdict"]),
        "forced": _comparison(values["forced"], metric) if values.get("forced") else None,
    }


def _verdict(text: str) -> Values:
    outcome, _, reason = text.partition(": ")
    if outcome not in OUTCOMES:
        outcome, reason = "inconclusive", text
    return {"outcome": outcome, "reason": reason, "judged": not reason.startswith("cannot be judged")}


def _subgroups(values: Values, metric: str) -> Values:
    def side(of: Values) -> Values:
        return {**of, "value": of[metric], "interval": of["ci95"]}

    groups = []
    for group in values["groups"]:
        changes = {name: side(group[name]) for name in ("baseline", "finetuned") if group.get(name)}
        if difference := group.get("difference"):
            changes["difference"] = {**difference, "interval": difference["ci95"]}
        groups.append({**group, **changes})
    return {**values, "level": 1 - values["alpha"], "groups": groups}
