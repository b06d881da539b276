"""Generations → predictions → accuracies: what was read out of each answer, and whether it is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sftlab.config import EvalConfig
from sftlab.extract import compile_pattern, normalise, read
from sftlab.records import Example, Generation, Prediction
from sftlab.statistics import wilson


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
            answer = normalise(generation.completion) or None
            correct = answer is not None and answer == normalise(example.target)
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
            )
        )
    return made


def summary(rows: Sequence[Prediction], cfg: EvalConfig) -> dict[str, Any]:
    """Accuracy with its Wilson interval, and the counts behind it.

    ``accuracy`` is ``exact_match`` of the ``evaluate`` library over answers and targets, where an
    answer that could not be read is an empty string, which no target is.
    """
    correct = sum(row.correct for row in rows)
    if cfg.task == "choice":
        answers, targets = [row.answer or "" for row in rows], [row.target for row in rows]
    else:
        answers, targets = [row.answer or "" for row in rows], [normalise(row.target) for row in rows]
    return {
        "accuracy": exact_match(answers, targets),
        "ci95": list(wilson(correct, len(rows))),
        "correct": correct,
        "n": len(rows),
        "unparsed": sum(row.answer is None for row in rows),
        "truncated": sum(row.finish_reason == "length" for row in rows),
    }


def exact_match(answers: list[str], targets: list[str]) -> float:
    """``exact_match`` of the ``evaluate`` library, a fraction."""
    return float(_metric().compute(predictions=answers, references=targets)["exact_match"])


@cache
def _metric() -> Any:
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / "exact_match.py"), keep_in_memory=True)


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
    """How often each answer was given; a model that always says B shows here."""
    return dict(sorted(Counter(row.answer or "none" for row in rows).items()))
