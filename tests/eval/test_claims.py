"""What the comparison of two files may claim: about knowledge, truncation and the names of the models."""

from __future__ import annotations

import json
import random
from math import log
from pathlib import Path
from typing import Any

import pytest

from sftlab.config import EvalConfig
from sftlab.eval.decision import decide
from sftlab.eval.predictions import labels, load_pair
from sftlab.report import tables, terminal
from sftlab.results import Evaluation

CFG = EvalConfig.model_construct(
    smallest_gain=0.0,
    margin=None,
    task="choice",
    pattern=r"(?i)the answer is\s*\(([A-Z])\)",
    reading="strict",
    extract=None,
    group_by=None,
    alpha=0.05,
    forced=True,
    labels=[],
)
Rows = list[dict[str, Any]]


def compared(folder: Path, a: Rows, b: Rows) -> Evaluation:
    """The evaluation of two files."""
    paths = folder / "base.jsonl", folder / "tuned.jsonl"
    for path, rows in zip(paths, (a, b), strict=True):
        path.write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    left, right = load_pair(*paths, CFG)
    names = labels(*paths, CFG)
    runs = {"baseline": left, "finetuned": right}
    return decide(runs, names, CFG, folder, both_mute=False, labels=names)


def written(letters: str, form: str, **more: Any) -> Rows:
    return [
        {"id": at, "completion": form.format(letter), "target": "ABCD"[at % 4], "choices": "ABCD", **more}
        for at, letter in enumerate(letters)
    ]


SAYS = "The answer is ({})."


def test_the_same_answers_in_another_form_are_no_gain_in_knowledge(tmp_path: Path, capsys: Any) -> None:
    draw = random.Random(0)
    answers = "".join("ABCD"[at % 4] if draw.random() < 0.4 else "D" for at in range(100))
    evaluation = compared(tmp_path, written(answers, "Answer: {}") + written_one(), written(answers + "A", SAYS))
    result = evaluation.comparison
    assert result is not None
    assert result.verdict.outcome == "better"  # by the strict reading, which requires the form
    assert (result.forced, result.split) == (None, None)
    assert result.unsplit == "100 of 101 questions have neither an answer nor a forced choice of base"
    terminal.evaluation(evaluation, "compare", 0)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Not split into knowledge, guessing and form: {result.unsplit}" in printed
    assert "points =" not in printed


def written_one() -> Rows:
    """A row that the pattern reads: a file without any cannot be judged."""
    return [{"id": 100, "completion": "The answer is (A).", "target": "A", "choices": "ABCD"}]


def test_a_perfect_model_in_another_form_is_not_beaten(tmp_path: Path) -> None:
    right, worse = "ABCD" * 25, "ABCD" * 18 + "DDDD" * 7
    result = compared(tmp_path, written(right, "Answer: {}") + written_one(), written(worse + "A", SAYS)).comparison
    assert result is not None
    assert result.split is None


def test_forced_choices_of_a_model_that_prefers_c(tmp_path: Path, capsys: Any) -> None:
    """From recorded log-probabilities: nothing is known, and the gain by stating guesses is guessing."""
    draw = random.Random(1)
    a = written("-" * 200, "Hm.", finish_reason="length")
    for one in a:
        values = {letter: log(0.85 if letter == "C" else 0.05) + draw.gauss(0, 0.8) for letter in "ABCD"}
        one["forced_logprobs"] = values
        one["readings"] = {"forced": max(values, key=lambda letter: values[letter])}
    b = written("".join(draw.choice("ABCD") for _ in range(200)), SAYS, finish_reason="stop")
    a[0] |= {"completion": "The answer is (B)."}
    evaluation = compared(tmp_path, a, b)
    result, base = evaluation.comparison, evaluation.baseline
    assert result is not None
    assert result.split is not None
    assert base is not None
    assert base.knowledge is not None
    assert base.knowledge.interval[0] < 0 < base.knowledge.interval[1]
    assert base.knowledge.forced["C"] > 150
    assert base.knowledge.prior["C"] > 0.8
    assert result.verdict.outcome == "better"
    assert result.split.outcome == "inconclusive"
    assert result.split.guessing.value > 0.15
    assert abs(result.split.form.value) < 0.15
    assert evaluation.constant is not None
    assert evaluation.constant.correct == 50
    terminal.evaluation(evaluation, "compare", 0)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Forced choices, base: C {base.knowledge.forced['C']}, " in printed
    assert "(always A is right in 50 of 200)" in printed
    assert tables.parts(evaluation) in printed
    assert "the token limit affects the models differently: 200 of 200 answers of base are truncated, and 0" in printed


@pytest.mark.parametrize(("cut", "noted"), [((20, 2), True), ((20, 18), False), ((3, 0), False), ((0, 0), False)])
def test_truncation_that_differs_is_noted(tmp_path: Path, cut: tuple[int, int], noted: bool) -> None:
    files = []
    for number in cut:
        rows = written("ABCD" * 25, SAYS)
        files.append([{**one, "finish_reason": "length" if at < number else "stop"} for at, one in enumerate(rows)])
    result = compared(tmp_path, *files).comparison
    assert result is not None
    assert any("token limit" in note for note in result.verdict.notes) == noted


def test_repeats_of_truncated_answers_are_no_evidence_of_their_own(tmp_path: Path) -> None:
    """Of 5 truncated questions (p = 0.03) three copies of each answer make no 15."""
    rows = [load_pair(*files(tmp_path, number), CFG)[0][0] for number in (5, 0)]
    for repeats in (1, 3):
        runs = {"baseline": [rows[0]] * repeats, "finetuned": [rows[1]]}
        result = decide(runs, {"baseline": "a", "finetuned": "b"}, CFG, tmp_path, both_mute=False).comparison
        assert result is not None
        assert not any("token limit" in note for note in result.verdict.notes)


def files(folder: Path, cut: int) -> tuple[Path, Path]:
    """Two files with the same answers, of which so many are truncated."""
    rows = written("ABCD" * 25, SAYS)
    path = folder / "cut.jsonl"
    path.write_text(
        "".join(
            json.dumps({**one, "finish_reason": "length" if at < cut else "stop"}) + "\n" for at, one in enumerate(rows)
        ),
        "utf-8",
    )
    return path, path


@pytest.mark.parametrize(
    ("a", "b", "given", "expected"),
    [
        ("base.jsonl", "tuned.jsonl", [], ("base", "tuned")),
        ("one/answers.jsonl", "two/answers.jsonl", [], ("one/answers", "two/answers")),
        ("x/1/predictions/a.jsonl", "x/2/predictions/a.jsonl", [], ("1/a", "2/a")),
        (
            "m__base/samples_arc_2026-11-02T10-11-12.3456.jsonl",
            "m__tuned/samples_arc_2026-11-03T09-00-00.1234.jsonl",
            [],
            ("m__base/samples_arc", "m__tuned/samples_arc"),
        ),
        ("a.jsonl", "a.jsonl", [], ("a (first)", "a (second)")),
        ("a.jsonl", "b.jsonl", ["Llama", "Ours"], ("Llama", "Ours")),
    ],
)
def test_models_are_named_by_their_files(a: str, b: str, given: list[str], expected: tuple[str, str]) -> None:
    cfg = CFG.model_copy(update={"labels": given})
    assert tuple(labels(Path(a), Path(b), cfg).values()) == expected
