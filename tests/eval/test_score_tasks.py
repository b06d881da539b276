"""Numbers, labels and JSON: what counts as equal, the numbers of a result, and mode=compare with its page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, write_rows

from sftlab.config import EvalConfig
from sftlab.dataset.row_formats.fitting import Answered, fitting
from sftlab.errors import ConfigError
from sftlab.eval.decision import decide
from sftlab.eval.predictions import load_pair
from sftlab.eval.scorers import scorer
from sftlab.records import Example, single_turn
from sftlab.report import terminal
from sftlab.report.page import render
from sftlab.results import Evaluation, RunRecord

Pairs = list[tuple[str, Any]]


@cache
def settings(task: str, *overrides: str) -> EvalConfig:
    cfg: EvalConfig = composed("mode=runs", f"eval.task={task}", *overrides).eval
    return cfg


def compared(folder: Path, cfg: EvalConfig, a: Pairs, b: Pairs, **more: list[Any]) -> Evaluation:
    """The evaluation of two files of (completion, target), and its page and lines in the terminal."""
    for name, pairs in (("a", a), ("b", b)):
        rows = [
            {"id": at, "completion": text, "target": target, **{key: values[at] for key, values in more.items()}}
            for at, (text, target) in enumerate(pairs)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    left, right = load_pair(folder / "a.jsonl", folder / "b.jsonl", cfg)
    names = {"baseline": "a", "finetuned": "b"}
    return decide({"baseline": left, "finetuned": right}, names, cfg, folder, both_mute=False, labels=names)


def page(folder: Path, evaluation: Evaluation) -> str:
    fields = {
        "id": "x",
        "status": "success",
        "experiment": "x",
        "mode": "compare",
        "seed": 0,
        "command": "",
        "started": "",
    }
    return render(folder, RunRecord.model_validate({**fields, "evaluation": evaluation}))


@pytest.mark.parametrize(
    ("text", "target", "absolute", "relative", "right"),
    [
        ("So 9 + 9 = 18.", "18", 0, 0, True),
        ("18 or 19", "18", 0, 0, False),  # the last number counts
        ("1,234.50 CHF", "1'234.5", 0, 0, True),
        ("3,5", "3.5", 0, 0, True),
        ("-$5", "-5", 0, 0, True),
        ("5-3", "-3", 0, 0, False),
        ("1/3", "0.333", 0, 0.01, True),
        ("0.3", "0.2", 0.1, 0, True),  # exactly at the limit, which binary fractions would miss
        ("0.301", "0.2", 0.1, 0, False),
        ("9007199254740993", "9007199254740992", 0, 0, False),
        ("2.5 × 10^-3", "0.0025", 0, 0, True),
        ("-101", "-100", 0, 0.01, True),
    ],
)
def test_numbers_are_equal_within_the_tolerance(
    tmp_path: Path, text: str, target: str, absolute: float, relative: float, right: bool
) -> None:
    cfg = settings("number", f"eval.tolerance={{absolute: {absolute}, relative: {relative}}}")
    evaluation = compared(tmp_path, cfg, [(text, target)], [(text, target)])
    assert evaluation.finetuned.correct == int(right)


def test_a_text_without_a_number_is_no_answer_and_no_target(tmp_path: Path) -> None:
    cfg = settings("number")
    evaluation = compared(tmp_path, cfg, [("none", "1"), ("1", "1")], [("1e999", "1"), ("one of 1", "1")])
    assert (evaluation.finetuned.unparsed, evaluation.finetuned.correct) == (1, 1)
    with pytest.raises(ConfigError, match=r"no number is in the target: test row 'q' has target 'five'"):
        scorer(cfg).check([Example("q", single_turn("", "", ""), "five")])


def test_labels_have_accuracy_and_macro_f1(tmp_path: Path) -> None:
    targets = ["yes"] * 30 + ["no"] * 10
    always, better = ["Yes."] * 40, ["yes"] * 28 + ["no"] * 12
    better[0] = "I think so"
    evaluation = compared(
        tmp_path, settings("labels"), list(zip(always, targets, strict=True)), list(zip(better, targets, strict=True))
    )
    base, tuned, comparison = evaluation.baseline, evaluation.finetuned, evaluation.comparison
    assert base is not None
    assert comparison is not None
    assert (base.value, base.scores["macro_f1"]) == pytest.approx((0.75, (2 * 30 / 70) / 2))
    f1 = (2 * 27 / (27 + 30) + 2 * 10 / (12 + 10)) / 2
    assert (tuned.correct, tuned.unparsed, tuned.scores["macro_f1"]) == (37, 1, pytest.approx(f1))
    low, high = tuned.score_intervals["macro_f1"]
    assert low < f1 < high
    assert comparison.scores["macro_f1"].value == pytest.approx(f1 - base.scores["macro_f1"])
    assert comparison.scores["macro_f1"].interval[0] > 0
    assert tuned.items["no"].model_dump() == {"expected": 10, "given": 12, "right": 10}
    shown = page(tmp_path, evaluation)
    assert "Macro-F1" in shown
    assert ">By label<" in shown


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": 1, "b": {"c": [1, 2]}}', 1),
        ('```json\n{"b": {"c": [1, 2.0]}, "a": 1}\n```', 1),
        ('{"a": 1}', 2 * 1 / (1 + 3)),
        ('{"a": 1, "b": {"c": [2, 1]}}', 2 * 1 / (3 + 3)),
        ('{"a": 1, "b": {"c": [1, 2]}, "d": null}', 2 * 3 / (4 + 3)),
        ('{"a": true, "b": {"c": [1, 2]}}', 2 * 2 / (3 + 3)),
        ('{"a": "1", "b.c[0]": 1}', 0),
        ("{}", 0),
        ('{"a": 1', None),
        ('{"a": NaN}', None),
        ('The answer: {"a": 1}', None),
        ("[" * 100_000, None),
        ("9" * 5000, None),  # more digits than Python converts
    ],
)
def test_json_is_scored_field_by_field(tmp_path: Path, text: str, score: float | None) -> None:
    target = {"a": 1, "b": {"c": [1, 2]}}
    evaluation = compared(tmp_path, settings("json"), [("{}", target)], [(text, target)])
    assert evaluation.finetuned.value == pytest.approx(score or 0)
    assert evaluation.finetuned.scores == {"json_equal": score == 1, "json_valid": score is not None}


def test_json_by_field(tmp_path: Path, capsys: Any) -> None:
    target = '["a", "b"]'  # one target, not two
    rows = [('["a", "b"]', target), ('["a", "c", "d"]', target), ("[", target), ('{"x": 1}', target)] * 5
    evaluation = compared(tmp_path, settings("json"), [("null", target)] * 20, rows)
    assert evaluation.finetuned.value == pytest.approx((1 + 2 / 5 + 0 + 0) / 4)
    assert evaluation.finetuned.items["[]"].model_dump() == {"expected": 40, "given": 25, "right": 15}
    assert evaluation.finetuned.items["x"].model_dump() == {"expected": 0, "given": 5, "right": 0}
    comparison = evaluation.comparison
    assert comparison is not None
    assert comparison.verdict.outcome == "better"
    assert (comparison.scores["json_valid"].value, comparison.scores["json_equal"].value) == (-0.25, 0.25)
    terminal.evaluation(evaluation, "compare", 0)
    printed = capsys.readouterr().out
    assert "mean field F1 0.350 against 0.000" in printed
    assert "By field" in printed
    assert ">By field<" in page(tmp_path, evaluation)
    with pytest.raises(ConfigError, match=r"the target is not valid JSON: test row 'q' has target '\{a: 1\}'"):
        scorer(settings("json")).check([Example("q", single_turn("", "", ""), "{a: 1}")])


@pytest.mark.parametrize(("task", "good"), [("json", '{"a": 1}'), ("labels", "yes")])
def test_a_model_that_never_answers_in_the_form_is_worse(tmp_path: Path, task: str, good: str) -> None:
    evaluation = compared(tmp_path, settings(task), [("I do not know", good)] * 20, [(good, good)] * 20)
    assert evaluation.comparison is not None
    assert evaluation.comparison.verdict.outcome == "better"
    mute = compared(tmp_path, settings(task), [("I do not know", good)] * 20, [("Nor do I", good)] * 20)
    assert mute.comparison is not None
    assert not mute.comparison.verdict.judged


@pytest.mark.parametrize(
    ("targets", "task"),
    [
        ([f"{n}.5" for n in range(40)], "number"),
        ([str(n % 3) for n in range(40)], "exact"),  # numbers or labels
        ([f"{n}.5" for n in range(10)], "exact"),  # too few to know
        ([*(f"{n}" for n in range(40)), "none"], "exact"),
        (["yes", "no", "maybe", "no"] * 10, "labels"),
        ([f"town {n}" for n in range(40)], "exact"),
        (['{"a": 1}', "[1, 2]"], "json"),
        (['{"a": 1}', "{a}"], "exact"),
    ],
)
def test_auto_chooses_a_task_only_where_it_is_clear(targets: list[str], task: str) -> None:
    assert fitting([Answered(target, target, "") for target in targets]) == (task, None)
