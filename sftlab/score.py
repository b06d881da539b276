"""Generations → predictions → accuracies or scores: what was read out of each answer, and how good it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError
from sftlab.extract import compile_pattern, normalise, read, unfenced
from sftlab.records import Example, Generation, Prediction
from sftlab.sandbox import environment
from sftlab.statistics import (
    changed,
    compare_scores,
    detectable_mean_difference,
    mean_interval,
    noise,
    spread_of_differences,
    wilson,
)

METRICS = {
    "accuracy": "accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
"""What people call a result, by its key in ``run.json``."""


def predictions(generations: Sequence[Generation], examples: Sequence[Example], cfg: EvalConfig) -> list[Prediction]:
    """Read an answer out of every completion. One that cannot be read is never correct."""
    by_id = {example.id: example for example in examples}
    made = []
    for generation in generations:
        example = by_id[generation.id]
        if cfg.task == "choice":
            readings = read(generation.completion, compile_pattern(cfg.pattern), example.choices, example.options)
            readings["forced"] = readings["strict"] or generation.forced
            answer = readings["strict"]
            correct = answer is not None and answer == example.target
        else:
            readings = {}
            answer = compared(generation.completion, cfg) or None
            correct = answer is not None and answer == compared(example.target, cfg)
        made.append(
            Prediction(
                id=generation.id,
                prompt=generation.prompt,
                completion=generation.completion,
                finish_reason=generation.finish_reason,
                answer=answer,
                target=example.target,
                correct=correct,
                group=example.group,
                readings=readings,
                subgroup=example.subgroup,
            )
        )
    return made


def scored(rows: list[Prediction], cfg: EvalConfig) -> list[Prediction]:
    """The predictions with their scores, where the task has any. An answer that could not be read scores 0."""
    if cfg.task != "rouge":
        return rows
    scores = rouge(rows, cfg, [cfg.rouge])[cfg.rouge]
    return [replace(row, score=score) for row, score in zip(rows, scores, strict=True)]


def compared(text: str, cfg: EvalConfig) -> str:
    """What of a completion or a target is compared where the task is no choice; "" where there is nothing.

    That is the text out of its code fence, through the template ``eval.extract``, and for ``exact`` normalised.
    A completion that the template cannot take is nothing: models write what no parser has seen.
    """
    text = unfenced(text)
    if cfg.extract is not None:
        try:
            text = _template(cfg.extract).render(text=text)
        except ConfigError:  # a pattern in it takes too long
            raise
        except Exception:  # a filter may raise anything
            return ""
    return normalise(text) if cfg.task == "exact" else text.strip()


@cache
def _template(source: str) -> Any:
    return environment().from_string(source)


def check(examples: Sequence[Example], cfg: EvalConfig) -> None:
    """See whether answers to these examples could be judged at all.

    Raises:
        ConfigError: a choice without letters to choose from, or a target of which nothing is left to compare with.
    """
    for example in examples:
        if cfg.task == "choice" and not example.choices:
            raise ConfigError(
                f"eval.task=choice: test row {example.id!r} has no letters to choose from; let dataset.choices give at "
                "least two, or set eval.task=exact"
            )
        if cfg.task != "choice" and cfg.extract is not None and not compared(example.target, cfg):
            raise ConfigError(
                f"eval.extract={cfg.extract!r}: makes nothing of the target of test row {example.id!r}, "
                f"{example.target[:60]!r}; mend the template or the row"
            )


def summary(rows: Sequence[Prediction], cfg: EvalConfig, seed: int) -> dict[str, Any]:
    """The accuracy with its Wilson interval, or the mean score with its bootstrap interval, and the counts behind it.

    ``accuracy`` is ``exact_match`` of the ``evaluate`` library over answers and targets, where an
    answer that could not be read is an empty string, which no target is. Of ``rouge`` there are the means of
    all four kinds; ``metric`` names the one that is judged, and whose interval ``ci95`` is.
    """
    counts = {
        "n": len(rows),
        "unparsed": sum(row.answer is None for row in rows),
        "truncated": sum(row.finish_reason == "length" for row in rows),
    }
    if cfg.task == "rouge":
        means = {kind: sum(scores) / len(scores) for kind, scores in rouge(rows, cfg).items()}
        interval = mean_interval(scores_of(rows), [row.group for row in rows], seed=seed)
        return {**means, "metric": cfg.rouge, "ci95": list(interval), **counts}
    correct = sum(row.correct for row in rows)
    answers = [row.answer or "" for row in rows]
    targets = [row.target if cfg.task == "choice" else compared(row.target, cfg) for row in rows]
    return {
        "accuracy": exact_match(answers, targets),
        "ci95": list(wilson(correct, len(rows))),
        "correct": correct,
        **counts,
    }


def metric(evaluation: Mapping[str, Any]) -> str:
    """The key of the result that an evaluation judges by: ``accuracy``, or a score such as ``rougeL``."""
    sides = [evaluation.get(name) or {} for name in ("baseline", "finetuned")]
    return next((side["metric"] for side in sides if side.get("metric") in METRICS), "accuracy")


def scores_of(rows: Sequence[Prediction]) -> list[float]:
    """The scores of rows that all have one."""
    return [row.score for row in rows if row.score is not None]


def comparison(
    baseline: Sequence[Prediction],
    finetuned: Sequence[Prediction],
    cfg: EvalConfig,
    seed: int,
    run_noise: float | None = None,
) -> dict[str, Any]:
    """The verdict by mean score: ``gained`` and ``lost`` count answers that score higher and lower, ``same`` others."""
    a, b, groups = scores_of(baseline), scores_of(finetuned), [row.group for row in baseline]
    name = f"mean {METRICS[cfg.rouge]}"
    found = compare_scores(a, b, groups=groups, alpha=cfg.alpha, seed=seed, noise=run_noise, name=name)
    values = asdict(found)
    values["ci95"] = list(values.pop("interval"))
    values["same"] = values.pop("both_right") + values.pop("both_wrong")
    for side in "ab":
        values[f"mean_{side}"] = values.pop(f"accuracy_{side}")
    visible = detectable_mean_difference(spread_of_differences(a, b, groups), found.n, cfg.alpha)
    # Without any difference there is no spread to tell it from.
    values["smallest_visible_difference"] = visible if isfinite(visible) and visible > 0 else None
    return values


def repeats(runs: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    """How much a model's answers differ between generations of one test set, each in another order.

    ``values`` has the accuracy or mean score of each; ``changed`` counts the questions that are right in one and
    wrong in another, or whose scores differ; ``noise`` is the largest difference of two values, and
    ``forced_noise`` the same where an answer without a letter was made to have one.
    """
    found = [[float(row.correct) if row.score is None else row.score for row in rows] for rows in runs]
    forced = [[float(row.readings.get("forced", row.answer) == row.target) for row in rows] for rows in runs]
    return {
        "values": [sum(row) / len(row) for row in found],
        "changed": changed(found),
        "noise": noise(found),
        "forced_noise": noise(forced),
    }


def exact_match(answers: list[str], targets: list[str]) -> float:
    """``exact_match`` of the ``evaluate`` library, a fraction."""
    return float(_metric("exact_match").compute(predictions=answers, references=targets)["exact_match"])


def rouge(
    rows: Sequence[Prediction], cfg: EvalConfig, kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
) -> dict[str, list[float]]:
    """For each kind of ROUGE the F-measure of every row; of an answer that is missing it is 0."""
    answers, targets = [row.answer or "" for row in rows], [compared(row.target, cfg) for row in rows]
    found = _metric("rouge").compute(
        predictions=answers, references=targets, rouge_types=list(kinds), use_aggregator=False
    )
    return {kind: found[kind] for kind in kinds}


@cache
def _metric(name: str) -> Any:
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / f"{name}.py"), keep_in_memory=True)


def readings_table(rows: Sequence[Prediction]) -> dict[str, dict[str, int]]:
    """For each way of reading: how many answers are right by it, and how many it cannot read."""
    names = dict.fromkeys(name for row in rows for name in row.readings)
    return {
        name: {
            "correct": sum(row.readings.get(name) == row.target for row in rows),
            "unparsed": sum(row.readings.get(name) is None for row in rows),
        }
        for name in names
    }


def letters(rows: Sequence[Prediction]) -> dict[str, int]:
    """How often each answer was given; a model that always says B shows here. Texts with scores are not counted."""
    return dict(sorted(Counter(row.answer or "none" for row in rows if row.score is None).items()))
