"""The question browser of the page: every question with its answers, the filters, and the JSON for its script."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from sftlab.eval.scorers import View
from sftlab.records import Prediction
from sftlab.results import LABELS

# The filters in the order of their buttons: for two models, or one; for right and wrong answers, or scores.
FILTERS = {
    (True, True): ("differ", "gained", "lost", "unparsed", "both-wrong", "both-right", "all"),
    (True, False): ("wrong", "right", "unparsed", "all"),
    (False, True): ("differ", "gained", "lost", "same", "unparsed", "all"),
    (False, False): ("scored", "unparsed", "all"),
}


@dataclass(frozen=True)
class Side:
    """One model's answer. ``prompt`` is None if it is the shared one: tokenizers may have different templates."""

    text: str
    answer: str | None
    correct: bool
    readings: dict[str, str | None]
    score: float | None
    truncated: bool
    prompt: str | None
    note: str | None


@dataclass(frozen=True)
class Question:
    """A question with the answer of each model (None if it was not asked); ``kinds`` are the filters that show it."""

    id: str
    question: str
    target: str
    group: str | None
    subgroup: str | None
    kinds: list[str]
    sides: list[Side | None]


@dataclass(frozen=True)
class Browser:
    """The browser: names of the models, buttons (filter, label, count), the first filter, and the JSON block.

    The first ``compared`` models are the base and the fine-tuned model.
    """

    models: list[str]
    compared: int
    buttons: list[tuple[str, str, int]]
    start: str
    json: str

    @property
    def compares(self) -> bool:
        """Whether two models are compared."""
        return self.compared > 1


def browser(answers: dict[str, list[Prediction]], view: View, models: Mapping[str, str]) -> Browser | None:
    """Build the browser from the predictions of ``baseline``, ``finetuned`` and others; None if there are none.

    The filters are those of the first two.
    """
    by_id = {name: {row.id: row for row in rows} for name, rows in answers.items() if rows}
    compared = sum(name in LABELS for name in by_id)
    first = {row.id: row for rows in reversed(answers.values()) for row in rows}
    if not by_id:
        return None
    before, after = _frame([row.prompt for row in first.values()])
    questions = []
    for name in dict.fromkeys(row.id for rows in answers.values() for row in rows):
        pair, row = [rows.get(name) for rows in by_id.values()], first[name]
        questions.append(
            Question(
                id=name,
                question=row.prompt[len(before) : len(row.prompt) - len(after)],
                target=" or ".join(row.accepted),
                group=row.group,
                subgroup=row.subgroup,
                kinds=_kinds([side for side in pair[:compared] if side is not None]),
                sides=[None if side is None else _side(side, row.prompt) for side in pair],
            )
        )
    if not view.graded:  # the largest change first; of one model the lowest score
        questions.sort(key=lambda row: _change(row.sides[:compared]))
    filters, labels = FILTERS[view.graded, compared > 1], _labels(view)
    buttons = [(name, labels[name], sum(name in row.kinds for row in questions)) for name in filters]
    names = [models[name] for name in by_id]
    block = {
        "models": names,
        "compared": compared,
        "graded": view.graded,
        "unit": view.rows,
        "unparsed": view.no_answer,
        "labels": {name: labels[name].lower() for name in labels},
        "before": before,
        "after": after,
        "rows": [asdict(row) for row in questions],
    }
    # Nothing in the block may look like markup to the HTML parser, or end a line in old JavaScript.
    escapes = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
    text = json.dumps(block, ensure_ascii=False).translate(escapes)
    return Browser(names, compared, buttons, filters[0] if buttons[0][2] else "all", text)


def _labels(view: View) -> dict[str, str]:
    return {
        "differ": "Gained or lost" if view.graded else "Changed",
        "gained": view.gained.capitalize(),
        "lost": view.lost.capitalize(),
        "unparsed": view.no_answer[:1].upper() + view.no_answer[1:],
        "both-wrong": "Both wrong",
        "both-right": "Both right",
        "right": "Right",
        "wrong": "Wrong",
        "same": "Same",
        "scored": "Score",
        "all": "All",
    }


def _change(sides: Sequence[Side | None]) -> float:
    scores = [side.score for side in sides if side is not None and side.score is not None]
    return -abs(scores[1] - scores[0]) if len(scores) > 1 else scores[0] if scores else 0


def _frame(prompts: list[str]) -> tuple[str, str]:
    """What all prompts begin and end with (system prompt, chat template), which is shown on demand only."""
    before = _common(prompts)
    before = before[: before.rfind("\n") + 1]  # not within the first words of the question
    after = _common([prompt[len(before) :][::-1] for prompt in prompts])[::-1]
    mark = re.search(r"[<\[\n]", after)
    return (before, after[mark.start() :] if mark else "") if len(prompts) > 1 else ("", "")


def _common(texts: list[str]) -> str:
    low, high = min(texts), max(texts)
    return low[: next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _kinds(sides: list[Prediction]) -> list[str]:
    """The filters that show a question."""
    kinds = ["all"] + ["unparsed"] * any(side.answer is None for side in sides)
    scores = [side.score for side in sides if side.score is not None]
    if scores:
        if len(scores) < 2:
            return [*kinds, "scored"]
        if scores[0] == scores[1]:
            return [*kinds, "same"]
        return [*kinds, "differ", "gained" if scores[1] > scores[0] else "lost"]
    if len(sides) < 2:
        return [*kinds, "right" if sides[0].correct else "wrong"]
    if sides[0].correct == sides[1].correct:
        return [*kinds, "both-right" if sides[0].correct else "both-wrong"]
    return [*kinds, "differ", "gained" if sides[1].correct else "lost"]


def _side(row: Prediction, shared: str) -> Side:
    answer = row.answer
    if row.score is not None and answer == row.completion.strip():
        answer = ""  # the whole text was compared, which is in the block already
    return Side(
        text=row.completion,
        answer=answer,
        correct=row.correct,
        readings=row.readings,
        score=row.score,
        truncated=row.finish_reason == "length",
        prompt=None if row.prompt == shared else row.prompt,
        note=row.note,
    )
