"""Generations → predictions → accuracies or scores: what was read out of each answer, and how good it is."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from sftlab.config import EvalConfig
from sftlab.dataset.sandbox import environment
from sftlab.errors import ConfigError
from sftlab.eval.extract import can_read, compile_pattern, last, normalise_answer, read, strict, unfenced, with_group
from sftlab.eval.statistics import (
    Comparison,
    changed,
    compare,
    compare_scores,
    detectable_mean_difference,
    mean_interval,
    noise,
    spread_of_differences,
    wilson,
)
from sftlab.model.reasoning import answered
from sftlab.records import Example, Generation, Prediction

METRICS = {
    "accuracy": "accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
"""What people call a result, by its key in ``run.json``."""

LOOKED_AT = 1000  # training completions that are read before training; laying out SQL takes milliseconds each
READINGS = ("strict", "last", "lenient")


def predictions(generations: Sequence[Generation], examples: Sequence[Example], cfg: EvalConfig) -> list[Prediction]:
    """Read an answer out of every completion, without its reasoning. One that cannot be read is never correct."""
    by_id = {example.id: example for example in examples}
    words = {folded(target): target for example in examples for target in example.accepted}
    made = []
    for generation in generations:
        example = by_id[generation.id]
        truncated = generation.finish_reason == "length"
        text = answered(generation.completion, generation.prompt, truncated=truncated)
        if cfg.task == "choice":
            found = read(text, compile_pattern(cfg.pattern), example.choices, example.options)
            readings = {name: _spelled(answer, example, words) for name, answer in found.items()}
            answer = readings[cfg.reading]
            readings["forced"] = answer or readings["strict"] or generation.forced
        else:
            readings = {}
            answer = compared(text, cfg) or None
        made.append(
            Prediction(
                id=generation.id,
                prompt=generation.prompt,
                completion=generation.completion,
                finish_reason=generation.finish_reason,
                answer=answer,
                target=example.target,
                correct=answer is not None and answer in references(example, cfg),
                group=example.group,
                readings=readings,
                subgroup=example.subgroup,
                targets=example.targets,
            )
        )
    return made


def folded(answer: str) -> str:
    """An answer of a choice as it is compared: case counts in a letter ("A" and "a" may be options), not in words."""
    return answer.casefold() if len(answer) > 1 else answer


def _spelled(answer: str | None, row: Example, words: Mapping[str, str]) -> str | None:
    """An answer that is a word, spelled as the target of its row, or else of any row, that it equals."""
    if answer is None or len(answer) == 1:
        return answer
    own = (target for target in row.accepted if folded(target) == folded(answer))
    return next(own, words.get(folded(answer), answer))


def references(row: Example | Prediction, cfg: EvalConfig) -> list[str]:
    """What an answer is compared with: every correct answer, for tasks other than choice treated as the answer is."""
    if cfg.task == "choice":
        return row.accepted
    return [compared(answered(target), cfg) for target in row.accepted]


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
    return normalise_answer(text) if cfg.task == "exact" else text.strip()


@cache
def _template(source: str) -> Any:
    return environment().from_string(source)


def check(examples: Sequence[Example], cfg: EvalConfig, split: str = "test") -> None:
    """See whether answers to these examples could be judged at all, before a model is loaded.

    Raises:
        ConfigError: a line for each kind of problem with its first rows: no letters to choose from, or a target that
            no answer can equal.
    """
    problems = []
    if cfg.task == "choice" and (silent := [row for row in examples if not row.choices]):
        problems.append(
            f"eval.task=choice: {split} row {silent[0].id!r}{_more(len(silent) - 1)} has no letters to choose from; "
            "let dataset.choices give at least two, or set eval.task=exact"
        )
    problems += unmatched(examples, cfg, lambda row: f"{split} row {row.id!r}")
    if problems:
        raise ConfigError(*problems)


def unmatched(examples: Sequence[Example], cfg: EvalConfig, name: Callable[[Example], str]) -> Iterator[str]:
    """Problems with targets that no answer can equal, each with the first of its rows by ``name``."""

    def listed(rows: Sequence[tuple[Example, str]]) -> str:
        shown = ", ".join(f"{name(row)} has target {target[:60]!r}" for row, target in rows[:3])
        return shown + _more(len(rows) - 3)

    targets = [(row, target) for row in examples for target in row.accepted]
    if cfg.task == "choice":
        if lost := [(row, target) for row, target in targets if not can_read(cfg.pattern, target)]:
            wider = [with_group(cfg.pattern, "[A-Z0-9]")]
            if any(row.assistant for row in examples):  # which show whether another pattern fits
                wider.append(r"(?i)the answer is\s*\(([A-Z0-9])\)")
            able = [pattern for pattern in wider if pattern and _reads(pattern, examples, cfg)]
            remedy = f"set {_override('eval.pattern', able[0])}" if able else "let its group match such targets"
            letters = all(len(target) == 1 for _, target in lost)
            yield (
                f"eval.pattern={cfg.pattern!r}: its group cannot match {'all targets' if letters else 'every target'}: "
                f"{listed(lost)}; {remedy}{'' if letters else ', or set eval.task=exact to compare texts'}"
            )
        return
    if empty := [(row, target) for row, target in targets if not compared(answered(target), cfg)]:
        by = "" if cfg.extract is None else f" eval.extract={cfg.extract!r} makes nothing of it;"
        yield (
            f"eval.task={cfg.task}: nothing is left to compare of the target:{by} {listed(empty)}; change "
            f"{'eval.extract or ' if by else ''}the row"
        )
    elif cfg.task == "rouge" and targets and not any(re.search(r"[a-zA-Z0-9]", target) for _, target in targets):
        yield (
            "eval.task=rouge: cannot be judged by this score: no target has a word of ASCII letters or digits, and "
            f"ROUGE counts no other words: {listed(targets)}; set eval.task=exact"
        )


def check_completions(examples: Sequence[Example], cfg: EvalConfig, split: str = "train") -> str | None:
    """Read the completions of a split as answers are read: what they write must be counted as right.

    Returns a warning where some of them (of the first ``LOOKED_AT``) are not read as their target, and None where all
    are, or the task has no right and wrong. Those of a mounted test set, to which no model was trained, are only
    warned about.

    Raises:
        ConfigError: none of them is.
    """
    # Of another dataset's test set the training rows may have nothing but the form of a choice in common.
    mounted = split == "test" and cfg.dataset is not None
    alike = cfg.task == "exact" and (split == "test" or cfg.dataset is None)
    rows = [row for row in examples if row.assistant and (alike or (cfg.task == "choice" and row.choices))][:LOOKED_AT]
    if not rows:
        return None

    def wrong(cfg: EvalConfig) -> list[tuple[Example, str | None]]:
        found = [(row, _answer(row, cfg)) for row in rows]
        return [(row, answer) for row, answer in found if answer not in references(row, cfg)]

    if not (lost := wrong(cfg)):
        return None
    first, read_as = lost[0]
    key = f"eval.pattern={cfg.pattern!r}" if cfg.task == "choice" else f"eval.task=exact, eval.extract={cfg.extract!r}"
    place = (
        f"{split} row {first.id!r} has target {' or '.join(first.accepted)[:60]!r}, its completion ends in "
        f"{first.assistant.strip()[-80:]!r} and is read as {repr(read_as[:60]) if read_as else 'nothing'}"
    )
    named = "training" if split == "train" else split
    if len(lost) < len(rows) or mounted:
        return f"{key}: {len(lost)} of {len(rows)} {named} completions are not read as their target; {place}"
    remedy = "change dataset.assistant, or "
    if cfg.task == "choice":
        tries = {"pattern": [f"(?i){cfg.pattern}", r"(?i)answer(?: is)?:?[\s*]*\(?([A-Z0-9])\b"]}
        remedy += "set eval.pattern to what they say"
    else:
        tries = {"extract": ["{{ text | search('(?i)answer(?: is)?:?[ (*]*([^().,;*]+)') or text }}"]}
        remedy += "set eval.extract to take the target out of them"
    for name, values in tries.items():
        for value in values:
            if not wrong(cfg.model_copy(update={name: value})):
                remedy = f"set {_override(f'eval.{name}', value)}"
                break
    raise ConfigError(f"{key}: none of {len(rows)} {named} completions is read as its target: {place}; {remedy}")


def _reads(pattern: str, examples: Sequence[Example], cfg: EvalConfig) -> bool:
    """Whether a pattern can match every target, and finds some of them where the rows have completions."""
    if not all(can_read(pattern, target) for row in examples for target in row.accepted):
        return False
    tried, written = cfg.model_copy(update={"pattern": pattern}), [row for row in examples if row.assistant]
    return not written or any(_answer(row, tried) in row.accepted for row in written[:LOOKED_AT])


def _answer(row: Example, cfg: EvalConfig) -> str | None:
    """What is read out of a training completion."""
    text = answered(row.assistant)
    if cfg.task != "choice":
        return compared(text, cfg) or None
    pattern = compile_pattern(cfg.pattern)
    if cfg.reading == "lenient":
        return read(text, pattern, row.choices, row.options)["lenient"]
    return _spelled((strict if cfg.reading == "strict" else last)(text, pattern, row.choices), row, {})


def _override(key: str, value: str) -> str:
    """A setting as it is written on the command line."""
    quoted = value.replace('"', r"\"")
    return shlex.quote(f'{key}="{quoted}"')


def _more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""


def summary(rows: Sequence[Prediction], cfg: EvalConfig, seed: int) -> dict[str, Any]:
    """The accuracy with its Wilson interval, or the mean score with its bootstrap interval, and the counts behind it.

    ``accuracy`` is ``exact_match`` of the ``evaluate`` library over answers and targets, where an
    answer that could not be read is an empty string, which no target is. Of ``rouge`` there are the means of
    all four kinds; ``metric`` names the one that is judged, and whose interval ``ci95`` is.
    """
    counts = {
        "n": len(rows),
        "unparsed": sum(row.answer is None for row in rows),
        **truncation(rows),
    }
    if cfg.task == "rouge":
        means = {kind: sum(scores) / len(scores) for kind, scores in rouge(rows, cfg).items()}
        interval = mean_interval(scores_of(rows), [row.group for row in rows], seed=seed)
        return {**means, "metric": cfg.rouge, "ci95": list(interval), **counts}
    correct = sum(row.correct for row in rows)
    answers = [row.answer or "" for row in rows]
    accepted = [references(row, cfg) for row in rows]
    # The library compares pairs: of several correct answers it gets the one that was given.
    targets = [answer if answer in right else right[0] for answer, right in zip(answers, accepted, strict=True)]
    return {
        "accuracy": exact_match(answers, targets),
        "ci95": list(wilson(correct, len(rows))),
        "correct": correct,
        **counts,
        **({"reading": cfg.reading} if cfg.task == "choice" else {}),
    }


def truncation(rows: Sequence[Prediction]) -> dict[str, int | None]:
    """How many answers were truncated, and of how many this is known; None where it is known of none."""
    reasons = [row.finish_reason for row in rows if row.finish_reason != "unknown"]
    return {"truncated": reasons.count("length") if reasons else None, "finish_reasons": len(reasons)}


def truncated(row: Mapping[str, Any]) -> str:
    """The count of truncated answers as it is printed: a dash where it is unknown."""
    count, known = row.get("truncated"), row.get("finish_reasons")
    if not isinstance(count, int):
        return "–"
    partly = isinstance(known, int) and known != row.get("n")
    return f"{count:,} of {known:,} known" if partly else f"{count:,}"


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
    forced = [[float(row.readings.get("forced", row.answer) in row.accepted) for row in rows] for rows in runs]
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
    """For each kind of ROUGE the F-measure of every row; of an answer that is missing it is 0.

    Where a row has several correct answers, the one that the answer is most like counts.
    """
    pairs = [(place, target) for place, row in enumerate(rows) for target in references(row, cfg)]
    found = _metric("rouge").compute(
        predictions=[rows[place].answer or "" for place, _ in pairs],
        references=[target for _, target in pairs],
        rouge_types=list(kinds),
        use_aggregator=False,
    )
    best = {kind: [0.0] * len(rows) for kind in kinds}
    for kind, scores in best.items():
        for (place, _), score in zip(pairs, found[kind], strict=True):
            scores[place] = max(scores[place], score)
    return best


@cache
def _metric(name: str) -> Any:
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / f"{name}.py"), keep_in_memory=True)


def readings_table(rows: Sequence[Prediction]) -> dict[str, dict[str, int]]:
    """For each way of reading: how many answers are right by it, and how many it cannot read."""
    names = dict.fromkeys(name for row in rows for name in row.readings)
    return {
        name: {
            "correct": sum(row.readings.get(name) in row.accepted for row in rows),
            "unparsed": sum(row.readings.get(name) is None for row in rows),
        }
        for name in names
    }


def by_reading(
    baseline: Sequence[Prediction], finetuned: Sequence[Prediction], **settings: Any
) -> dict[str, Comparison]:
    """The comparison of two models by each way of reading that finds an answer at all."""
    pairs = [*baseline, *finetuned]
    names = [name for name in READINGS if any(row.readings.get(name) is not None for row in pairs)]
    right = {
        name: [[row.readings.get(name) in row.accepted for row in rows] for rows in (baseline, finetuned)]
        for name in names
    }
    return {name: compare(*sides, **settings) for name, sides in right.items()}


def disagreement(readings: Mapping[str, Comparison]) -> str:
    """What a verdict adds where it would be another one by another reading; "" where all lead to the same."""
    words = {name: found.verdict.partition(":")[0] for name, found in readings.items()}
    if len(set(words.values())) < 2:
        return ""
    each = [
        f"{name} {found.both_right + found.gained} of {found.n} against {found.both_right + found.lost} ({words[name]})"
        for name, found in readings.items()
    ]
    return f"; the verdict depends on how answers are read (eval.reading): {', '.join(each)}"


def mostly_truncated(named: Mapping[str, Sequence[Prediction]]) -> str:
    """What a verdict adds where nearly all answers of a model are truncated; "" elsewhere."""
    counts = {name: truncation(rows) for name, rows in named.items()}
    return "".join(
        f"; {count['truncated']} of {count['finish_reasons']} answers of {name} are truncated"
        for name, count in counts.items()
        if count["truncated"] and count["truncated"] >= 0.9 * (count["finish_reasons"] or 0)
    )


def letters(rows: Sequence[Prediction]) -> dict[str, int]:
    """How often each answer was given; a model that always says B shows here. Texts with scores are not counted."""
    return dict(sorted(Counter(row.answer or "none" for row in rows if row.score is None).items()))
