"""The evaluation of one model, or of two models on the same test rows: summaries, comparison, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from sftlab.config import EvalConfig
from sftlab.eval import release
from sftlab.eval.knowledge import constant, unknown
from sftlab.eval.pairwise import Pairwise
from sftlab.eval.scorers import Scorer, scorer
from sftlab.eval.scorers.base import Runs
from sftlab.eval.statistics import answers_per_question, averages, compare, deciding_p, holm
from sftlab.eval.subgroups import subgroups
from sftlab.model.reasoning import answered, unclosed
from sftlab.records import Prediction
from sftlab.results import LABELS, ChainStep, Comparison, Contender, Cost, Evaluation, EvaluationRow, Verdict
from sftlab.runtime.job import Job

UNEQUAL = 0.01
"""p-value below which truncation differs between two models."""


def decide(
    runs: Mapping[str, Sequence[list[Prediction]]],
    names: Mapping[str, str],
    cfg: EvalConfig,
    folder: Path,
    *,
    both_mute: bool,
    labels: Mapping[str, str] | None = None,
    contenders: Sequence[Contender] = (),
    costs: Mapping[str, Cost] | None = None,
    pairwise: Pairwise | None = None,
) -> Evaluation:
    """Summarise the models, compare the fine-tuned one with the others, and write predictions into the run's folder.

    Args:
        runs: Predictions of ``baseline`` and ``finetuned``, or of the latter only, and of contenders by their names:
            one list per repeated generation. All are judged; the first is written.
        names: What a verdict calls the models.
        cfg: The scorer's settings.
        folder: The run's folder.
        both_mute: Whether the models can be compared as long as one of them has answers. A base model that never
            answers in the expected form is a result; a file without any answer is an error in eval.pattern.
        labels: What tables and figures call the models; None: eval.labels, or Baseline and Fine-tuned.
        contenders: The records of further models, without their results.
        costs: What the answers cost, by the name of the model.
        pairwise: What compares two answers (eval.task=judge).
    """
    score = scorer(cfg)
    scored = score.paired({side: [score.scored(rows) for rows in own] for side, own in runs.items()}, pairwise)
    repeats = {side: score.repeats(repeated) for side, repeated in scored.items() if len(repeated) > 1}
    (folder / "predictions").mkdir(exist_ok=True)
    for side, repeated in scored.items():
        Prediction.write(folder / "predictions" / f"{side}.jsonl", repeated[0])
    results = {
        side: score.result(own).model_copy(update={"repeats": repeats.get(side), "cost": (costs or {}).get(side)})
        for side, own in scored.items()
    }
    pair = {side: scored[side] for side in LABELS if side in scored}
    comparison = None
    if "baseline" in pair:
        comparison = against(score, {names[side]: own for side, own in pair.items()}, both_mute=both_mute)
    finished = []
    for one in contenders:
        if one.name in scored:
            named = {one.about: scored[one.name], names["finetuned"]: scored["finetuned"]}
            compared = None if one.name in cfg.chain else against(score, named, both_mute=both_mute)
            change: dict[str, object] = {"result": results[one.name], "comparison": compared}
            one = one.model_copy(update=change)
        finished.append(one)
    about = {**names, **{one.name: one.about for one in contenders}}
    chain = [_step(score, first, second, scored, about) for first, second in steps(cfg.chain)]
    evaluation = Evaluation(
        task=cfg.task,
        chain=chain,
        baseline=results.get("baseline"),
        finetuned=results["finetuned"],
        comparison=comparison,
        contenders=finished,
        subgroups=subgroups(pair, score) if cfg.group_by is not None or _by_source(pair) else None,
        constant=constant(scored["finetuned"][0]) if score.lettered else None,
        scorer=score.source,
        labels=dict(labels or dict(zip(LABELS, cfg.labels or LABELS.values(), strict=True))),
    )
    return by_holm(evaluation)


def steps(chain: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of models to test: each with the one before, and of three or more the last with the first."""
    pairs = list(pairwise(chain))
    return pairs + ([(chain[0], chain[-1])] if len(chain) > 2 else [])


def _step(score: Scorer, first: str, second: str, scored: Mapping[str, Runs], about: Mapping[str, str]) -> ChainStep:
    """Compare two models of a chain, the later minus the earlier; nothing if one was left out."""
    if first not in scored or second not in scored:
        return ChainStep(first=first, second=second)
    named = {about[first]: scored[first], about[second]: scored[second]}
    return ChainStep(first=first, second=second, comparison=against(score, named, both_mute=False))


def against(score: Scorer, named: Mapping[str, Runs], *, both_mute: bool) -> Comparison:
    """Compare two models, the second minus the first; ``named`` has their predictions by what a verdict calls them."""
    first, second = named.values()
    comparison = score.comparison(first, second)
    verdict = comparison.verdict
    rows = {name: [row for repeat in repeated for row in repeat] for name, repeated in named.items()}
    if reason := unjudgeable(rows, every=both_mute or score.mute_is_wrong):
        verdict = Verdict(outcome="inconclusive", reason=reason, judged=False)
    notes = [*verdict.notes, *_truncated(named)]
    changes = {"verdict": verdict.model_copy(update={"notes": notes})}
    unsplit = unknown(named) if score.lettered else None
    return comparison.model_copy(update={**changes, "unsplit": unsplit})


def by_holm(evaluation: Evaluation) -> Evaluation:
    """Adjust the p-values of all contenders, the base model included, by Holm's method; verdicts follow."""
    own = evaluation.comparison
    compared = [one for one in evaluation.contenders if one.comparison is not None]
    if not compared:
        return evaluation
    comparisons = [one.comparison for one in compared if one.comparison is not None]
    first = [] if own is None else [own]
    family = [*first, *comparisons]
    p_values = holm([deciding_p(one) for one in family])
    p_of = dict(zip((one.name for one in compared), p_values[len(first) :], strict=True))
    finished = [
        one.model_copy(update={"p_adjusted": p, "verdict": _by(one.comparison, p, len(family))})
        if (p := p_of.get(one.name)) is not None and one.comparison is not None
        else one
        for one in evaluation.contenders
    ]
    return evaluation.model_copy(update={"contenders": finished, "p_adjusted": p_values[0] if first else None})


def _by(comparison: Comparison, p: float, comparisons: int) -> Verdict:
    """The verdict of a comparison by its adjusted p."""
    verdict = comparison.verdict
    if verdict.outcome == "inconclusive" or p < 1 - comparison.level:
        return verdict
    note = f"among {comparisons} comparisons p is {p:.2g} by Holm's method"
    return verdict.model_copy(update={"outcome": "inconclusive", "notes": [*verdict.notes, note]})


def _by_source(scored: Mapping[str, Sequence[Sequence[Prediction]]]) -> bool:
    """Whether rows have subgroups without ``eval.group_by``: the sources of a dataset."""
    return any(row.subgroup is not None for row in next(iter(scored.values()))[0])


def adjusted(jobs: Sequence[Job]) -> list[EvaluationRow]:
    """The evaluations of a sweep, with p-values adjusted by Holm's method; verdicts follow the adjusted p."""
    compared = [job for job in jobs if _comparison(job) is not None]
    p_values = [deciding_p(result) for job in compared if (result := _comparison(job)) is not None]
    p_of = dict(zip((job.number for job in compared), holm(p_values), strict=True))
    return [_row(job, p_of.get(job.number), len(compared)) for job in jobs]


def _comparison(job: Job) -> Comparison | None:
    return job.evaluation.comparison if job.status == "success" and job.evaluation is not None else None


def _row(job: Job, p: float | None, comparisons: int) -> EvaluationRow:
    values = {"job": job.number, "overrides": job.overrides, "status": job.status, "error": job.error}
    if job.status != "success":
        return EvaluationRow.model_validate(values)
    cfg, result, verdict = job.settings(), _comparison(job), None
    if result is not None and p is not None:
        verdict = _by(result, p, comparisons)
    evaluation = None if job.evaluation is None else release.decided(job.evaluation, verdict)
    models = {"model": cfg.eval.name_or_path, "base": cfg.model.name_or_path, "evaluation": evaluation}
    return EvaluationRow.model_validate({**values, **models, **job.origin(), "p_adjusted": p, "verdict": verdict})


def unjudgeable(named: Mapping[str, list[Prediction]], *, every: bool = False) -> str | None:
    """Return why models cannot be judged: one of them, or with ``every`` each of them, has no extracted answer.

    ``named`` has the predictions of each model by the name that a message uses. None if they can be judged.
    """
    mute = {name: rows for name, rows in named.items() if rows and all(row.answer is None for row in rows)}
    if not mute or (every and len(mute) < len(named)):
        return None
    names, row = " or ".join(mute), next(iter(mute.values()))[0]
    silent = [row for rows in mute.values() for row in rows if row.completion.strip()]
    if silent and all(map(_unfinished, silent)):
        return (
            f"cannot be judged: every answer of {names} ends within its reasoning, see id {silent[0].id!r}; generate "
            "them again with more tokens (eval.max_tokens)"
        )
    if not row.readings and silent:
        return f"cannot be judged: eval.extract makes nothing of any answer of {names}; see id {row.id!r}"
    if not row.readings:
        return f"cannot be judged: every completion of {names} is empty; generate them again"
    return (
        f"cannot be judged by this pattern: no answer of {names} could be read; see id {row.id!r}, "
        f"which ends in {row.completion.strip()[-80:]!r}, and set eval.pattern to match what is written there"
    )


def _unfinished(row: Prediction) -> bool:
    """Whether a completion ends within its reasoning, or directly after it."""
    truncated = row.finish_reason == "length"
    if unclosed(row.completion, row.prompt, truncated=truncated):
        return True
    return not answered(row.completion, row.prompt, truncated=truncated).strip()


def _truncated(named: Mapping[str, Runs]) -> list[str]:
    """The notes of a verdict about the token limit: it truncates nearly all answers of a model, or of one model more.

    The second is the paired test of right and wrong answers, on the questions whose finish reasons are known for both
    models.
    """
    (a, first), (b, second) = named.items()
    known = [
        place
        for place, of in enumerate(zip(*first, *second, strict=True))
        if all(row.finish_reason != "unknown" for row in of)
    ]
    cut = [[[rows[place].finish_reason == "length" for place in known] for rows in runs] for runs in (first, second)]
    shares, answers = [averages(runs) for runs in cut], answers_per_question(len(first), len(second))
    groups = [first[0][place].group for place in known]
    if compare(shares[0], shares[1], groups=groups, alpha=UNEQUAL, answers=answers).verdict.outcome != "inconclusive":
        counts = [f"{sum(map(sum, runs))} of {len(known) * len(runs)} answers of" for runs in cut]
        return [
            f"the token limit affects the models differently: {counts[0]} {a} are truncated, and {counts[1]} {b}; a "
            "larger limit (eval.max_tokens) may change the verdict"
        ]
    notes = []
    for name, runs in named.items():
        reasons = [row.finish_reason for rows in runs for row in rows if row.finish_reason != "unknown"]
        if (truncated := reasons.count("length")) and truncated >= 0.9 * len(reasons):
            notes.append(f"{truncated} of {len(reasons)} answers of {name} are truncated")
    return notes
