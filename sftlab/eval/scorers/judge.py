"""``eval.task=judge``: a model decides which of two answers is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sftlab.errors import StageError
from sftlab.eval.pairwise import Judgement, Pair, Pairwise, preferences
from sftlab.eval.scorers.base import Runs, groups_of
from sftlab.eval.scorers.scores import Scores
from sftlab.eval.scorers.view import View
from sftlab.eval.statistics import accuracy, at_equal_length, averages, kappa
from sftlab.records import Prediction
from sftlab.results import Calibration, Comparison, Estimate, JudgeRecord

FEW = 20
"""Questions below which no difference at equal length is estimated."""

POOR = 0.4
"""Kappa below which a judge agrees poorly with people (Landis & Koch 1977 call 0.41 to 0.60 moderate)."""


class Judge(Scores):
    """The share of the questions on which a model's answer is preferred to that of the other; a tie counts half."""

    view = View(
        metrics={"preference": "preference"},
        hub_metric="win_rate",
        graded=False,
        rows="questions",
        no_answer="empty",
        gained="won",
        lost="lost",
        about="Preference: how often the judge prefers the answer of the fine-tuned model to that of the base "
        "model, or that of another model to that of the fine-tuned one, over both orders; ties count half. An empty "
        "answer loses.",
    )

    pairwise: Pairwise | None = None

    @property
    def metric(self) -> str:
        """The preference of the judge."""
        return "preference"

    def scored(self, rows: list[Prediction]) -> list[Prediction]:
        """Return the rows as they are: they are scored in pairs."""
        return rows

    def paired(self, scored: Mapping[str, Runs], pairwise: object = None) -> dict[str, Runs]:
        """Score the answers of every model against those of ``finetuned``, all pairs in one start of the judge.

        ``finetuned`` is scored against ``baseline``, or else against the first of the others.
        """
        if not isinstance(pairwise, Pairwise) or len(scored) < 2:
            raise StageError(
                "eval.task=judge compares the answers of two models, and there is one; set eval.baseline=true"
            )
        self.pairwise = pairwise
        tuned, found = scored["finetuned"], dict[str, Runs]()
        others = {side: runs for side, runs in scored.items() if side != "finetuned"}
        pairwise.decide([pair for runs in others.values() for pair in self._pairs(runs, tuned)])
        for side, runs in others.items():
            found[side], second = self._rescored(runs, tuned)
            if side == "baseline" or "finetuned" not in found:
                found["finetuned"] = second
        return {side: found[side] for side in scored}

    def _pair(self, a: Prediction, b: Prediction) -> Pair:
        assert self.pairwise is not None
        question = self.pairwise.question(a.id, a.prompt or b.prompt)
        return Pair(question, " or ".join(a.accepted), a.answer or "", b.answer or "")

    def _pairs(self, a: Runs, b: Runs) -> list[Pair]:
        return [
            self._pair(one, other) for rows, others in _aligned(a, b) for one, other in zip(rows, others, strict=True)
        ]

    def _judgements(self, a: Runs, b: Runs) -> list[Judgement]:
        assert self.pairwise is not None
        return self.pairwise.decide(self._pairs(a, b))

    def _rescored(self, a: Runs, b: Runs) -> tuple[Runs, Runs]:
        """Both sides with the scores of their pairs."""
        first, second = list[list[Prediction]](), list[list[Prediction]]()
        for rows, others in _aligned(a, b):
            judged = self._judgements([rows], [others])
            first.append(
                [replace(row, score=1 - one.score, note=_note(one, 1)) for row, one in zip(rows, judged, strict=True)]
            )
            second.append(
                [replace(row, score=one.score, note=_note(one, 0)) for row, one in zip(others, judged, strict=True)]
            )
        return first, second

    def comparison(self, a: Runs, b: Runs) -> Comparison:
        """Compare two models by their pairs, with what is known about the judge."""
        a, b = self._rescored(a, b)
        compared = super().comparison(a, b)
        if not compared.n:
            return compared
        record = self._record(a, b)
        notes = [*compared.verdict.notes, *_notes(record, compared)]
        return compared.model_copy(
            update={"judge": record, "verdict": compared.verdict.model_copy(update={"notes": notes})}
        )

    def _record(self, a: Runs, b: Runs) -> JudgeRecord:
        assert self.pairwise is not None
        judged, groups = self._judgements(a, b), groups_of(a)
        asked = [one for one, pair in zip(judged, self._pairs(a, b), strict=True) if _is_asked(pair)]
        lengths = [[[len((row.answer or "").split()) for row in rows] for rows in runs] for runs in (a, b)]
        first, second = averages(lengths[0]), averages(lengths[1])
        scores = averages([[2 * (row.score or 0) - 1 for row in rows] for rows in b])
        ratios = [math.log((y + 1) / (x + 1)) for x, y in zip(first, second, strict=True)]
        decisive = [(score, ratio) for score, ratio in zip(scores, ratios, strict=True) if score and ratio]
        orders = [value for one in asked for value in (one.forward, one.backward)]
        # Shown second: forward prefers the second answer, backward the first one.
        shown_first = [
            1 - value for one in asked for value in (one.forward, _flipped(one.backward)) if value is not None
        ]
        return JudgeRecord(
            name=self.pairwise.name,
            pairs=len(judged),
            asked=len(asked),
            consistent=sum(one.forward == one.backward and one.forward is not None for one in asked),
            no_verdict=sum(value is None for value in orders),
            prefers_first=sum(shown_first) / len(shown_first) if shown_first else None,
            prefers_longer=sum((score > 0) == (ratio > 0) for score, ratio in decisive) / len(decisive)
            if decisive
            else None,
            words=(sum(first) / len(first), sum(second) / len(second)),
            at_equal_length=None if len(scores) < FEW else at_equal_length(scores, ratios, groups, self.cfg.alpha),
            calibration=self._calibration(),
        )

    def _calibration(self) -> Calibration | None:
        assert self.pairwise is not None
        if (path := self.cfg.judge.preferences) is None:
            return None
        people = preferences(path)
        judged = [_side(one.score) for one in self.pairwise.decide([human.pair for human in people])]
        own, groups = [_side(human.preferred) for human in people], [human.group for human in people]
        agreed = [float(x == y) for x, y in zip(judged, own, strict=True)]
        agreement = Estimate(value=sum(agreed) / len(agreed), interval=accuracy(agreed, groups, self.cfg.alpha))
        return Calibration(
            file=path, n=len(people), agreement=agreement, kappa=kappa(own, judged, groups, self.cfg.alpha)
        )


def _aligned(a: Runs, b: Runs) -> list[tuple[Sequence[Prediction], Sequence[Prediction]]]:
    """The repeats of both models; if one has fewer, its repeats are used again."""
    return [(a[number % len(a)], b[number % len(b)]) for number in range(max(len(a), len(b)))]


def _is_asked(pair: Pair) -> bool:
    return bool(pair.first and pair.second) and pair.first != pair.second


def _flipped(value: float | None) -> float | None:
    return None if value is None else 1 - value


def _side(score: float) -> str:
    return "second" if score > 0.5 else "first" if score < 0.5 else "tie"


def _note(one: Judgement, base: int) -> str:
    """What the judge said about an answer, shown second and shown first (``base`` 0), or the other way round."""
    words = {1.0: "preferred", 0.5: "tie", 0.0: "not preferred"}
    orders = [None if value is None else abs(base - value) for value in (one.forward, one.backward)]
    shown = ("second", "first") if base == 0 else ("first", "second")
    texts = [
        f"{'no verdict' if value is None else words[value]} when shown {place}"
        for value, place in zip(orders, shown, strict=True)
    ]
    return f"judge: {', '.join(texts)}"


def _notes(record: JudgeRecord, compared: Comparison) -> list[str]:
    """What limits a verdict of the judge."""
    notes = []
    low, high = (-1.0, 1.0) if record.at_equal_length is None else record.at_equal_length.interval
    length = "better" if low > 0 else "worse" if high < 0 else "inconclusive"
    outcome = compared.verdict.outcome
    if record.at_equal_length is not None and outcome in ("better", "worse") and length != outcome:
        notes.append("at equal length of the answers no such preference is shown, so it may be one for longer answers")
    if (of := record.calibration) is None:
        notes.append("the judge is not calibrated against human preferences (eval.judge.preferences)")
    elif of.kappa.interval[0] < POOR:
        notes.append(
            f"the judge may agree poorly with people: kappa {of.kappa.value:.2f} "
            f"({of.kappa.interval[0]:.2f} to {of.kappa.interval[1]:.2f}) on {of.n} pairs"
        )
    if record.asked and record.no_verdict > 0.1 * 2 * record.asked:
        notes.append(f"the judge gave no verdict {record.no_verdict} times in {2 * record.asked}")
    return notes
