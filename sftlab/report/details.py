"""What a task adds to the numbers, in sentences: the same in terminal, page and model card."""

from __future__ import annotations

from sftlab.report.text import count, level, percent, points, span
from sftlab.results import Evaluation, JudgeRecord


def sentences(evaluation: Evaluation) -> list[str]:
    """How many statements were executed, and what is known about a judge; none for other tasks."""
    result, compared = evaluation.finetuned, evaluation.comparison
    if result.executed is not None:
        decided = f"{count(result.executed)} of {count(result.answers)} answers"
        return [f"{decided} are judged by execution; in the others the formatted texts are compared."]
    return [] if compared is None or compared.judge is None else _about(compared.judge, compared.level, evaluation)


def _about(judge: JudgeRecord, confidence: float, evaluation: Evaluation) -> list[str]:
    first, second = evaluation.labels.values()
    found = [
        f"Judge: {judge.name}. It was asked about {count(judge.asked)} of {count(judge.pairs)} pairs of answers, in "
        "both orders; the others are equal, or one is empty."
    ]
    if judge.asked:
        found.append(
            f"Its verdict is the same in both orders for {percent(judge.consistent / judge.asked)} of these pairs"
            + (f"; {count(judge.no_verdict)} texts have no verdict" if judge.no_verdict else "")
            + "."
        )
    if judge.prefers_first is not None:
        found.append(f"It prefers the answer that is shown first in {percent(judge.prefers_first)} of its verdicts.")
    if judge.prefers_longer is not None:
        found.append(f"It prefers the longer answer in {percent(judge.prefers_longer)} of the decided pairs.")
    found.append(f"Mean length: {judge.words[0]:.0f} words ({first}) and {judge.words[1]:.0f} ({second}).")
    if (equal := judge.at_equal_length) is not None:
        ends = f"{level(confidence)} interval {span(equal.interval)}"
        found.append(f"At equal length the difference in preference is {points(equal.value)} points ({ends}).")
    if (of := judge.calibration) is None:
        found.append("The judge is not calibrated: whether people would decide as it does is not known.")
    else:
        low, high = of.kappa.interval
        found.append(
            f"It agrees with people on {percent(of.agreement.value)} of {count(of.n)} pairs "
            f"({percent(of.agreement.interval[0])} to {percent(of.agreement.interval[1])}), kappa {of.kappa.value:.2f} "
            f"({low:.2f} to {high:.2f}; 0 is chance, 1 full agreement).".replace("-", "−")
        )
    return found
