from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError
from sftlab.eval.decision import decide, unjudgeable
from sftlab.eval.predictions import load_others, load_pair
from sftlab.eval.scorers import scorer
from sftlab.records import Prediction
from sftlab.report import terminal

PATTERN = r"(?i)the answer is\s*\(([A-Z])\)"
CHOICE = EvalConfig.model_construct(
    task="choice",
    pattern=PATTERN,
    reading="strict",
    extract=None,
    rouge="rougeL",
    group_by=None,
    smallest_gain=0.0,
    margin=None,
)
EXACT = CHOICE.model_copy(update={"task": "exact"})

Rows = list[dict[str, Any]]


def says(answer: str) -> str:
    return f"The answer is ({answer})."


def row(name: Any, answer: str, target: Any, **more: Any) -> dict[str, Any]:
    return {"id": name, "completion": says(answer), "target": target, **more}


def harness_row(doc_id: int, text: str, target: Any, choices: Any = None, **doc: Any) -> dict[str, Any]:
    """A row of lm-evaluation-harness with its own document."""
    return {"doc_id": doc_id, "resps": [[text]], "target": target, "doc": {"choices": choices, **doc}}


TWO = [row("x", "A", "A"), row("y", "B", "C")]


def write(path: Path, rows: Rows | bytes) -> Path:
    path.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(one) + "\n" for one in rows).encode())
    return path


def files(a: list[Prediction], b: list[Prediction]) -> dict[str, list[Prediction]]:
    return {"the first file": a, "the second file": b}


def load(
    folder: Path, a: Rows | bytes, b: Rows | bytes, cfg: EvalConfig = CHOICE
) -> tuple[list[Prediction], list[Prediction]]:
    """The first answers of two files."""
    left, right = load_pair(write(folder / "a.jsonl", a), write(folder / "b.jsonl", b), cfg)
    return left[0], right[0]


def generated(doc_id: int, text: str, target: str, name: str = "strict-match", **more: Any) -> dict[str, Any]:
    """A row as lm-evaluation-harness writes it for output_type generate_until."""
    return {
        "doc_id": doc_id,
        "doc": {"question": "Which vitamin lacks in scurvy?", "choices": ["Vitamin A", "Vitamin B", "Vitamin C"]},
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": f"Question {doc_id}\nAnswer:", "arg_1": {"until": ["Q:"]}}},
        "resps": [[text]],
        "filtered_resps": ["[invalid]"],
        "filter": name,
        "metrics": ["exact_match"],
        "doc_hash": f"{doc_id:064}",
        "prompt_hash": "7" * 64,
        "target_hash": "8" * 64,
        "exact_match": 0.0,
        **more,
    }


OPTIONS = ("no", "yes", "maybe", "never")


def ranked(
    doc_id: int, likelihoods: list[Any], target: str, options: Sequence[str] = OPTIONS, **more: Any
) -> dict[str, Any]:
    """A row as lm-evaluation-harness writes it for output_type multiple_choice."""
    texts = options[: len(likelihoods)]
    return {
        "doc_id": doc_id,
        "doc": {"id": 21645374, "question": "Do mitochondria play a role?", "choices": texts},
        "target": target,
        "arguments": {
            f"gen_args_{number}": {"arg_0": "Do mitochondria play a role?\nAnswer:", "arg_1": f" {text}"}
            for number, text in enumerate(texts)
        },
        "resps": [[[str(one), "False"]] for one in likelihoods],
        "filtered_resps": [[str(one), "False"] for one in likelihoods],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": f"{doc_id:064}",
        "prompt_hash": "7" * 64,
        "target_hash": "8" * 64,
        "acc": 1.0,
        "acc_norm": 0.0,
        **more,
    }


def test_own_predictions_are_read_again_by_the_pattern(tmp_path: Path) -> None:
    old = {"strict": "D", "last": "D", "lenient": "D"}
    a = [
        # Both rows claim another answer than their text gives; only the second was made to choose.
        Prediction("q1", "Q1?", says("B"), "stop", "D", "B", False, "g", old | {"forced": "D"}),
        Prediction("q2", "Q2?", "It depends.", "length", None, "C", True, None, old | {"forced": "C"}),
    ]
    Prediction.write(tmp_path / "a.jsonl", a)
    (left,), (right,) = load_pair(
        tmp_path / "a.jsonl", write(tmp_path / "b.jsonl", [row("q2", "C", "C"), row("q1", "A", "B")]), CHOICE
    )
    assert [replace(one, choices="") for one in left] == [
        Prediction("q1", "Q1?", says("B"), "stop", "B", "B", True, "g", dict.fromkeys(old, "B") | {"forced": "B"}),
        Prediction("q2", "Q2?", "It depends.", "length", None, "C", False, None, dict.fromkeys(old) | {"forced": "C"}),
    ]
    assert {one.choices for one in left} == {"BC"}
    assert [(one.id, one.answer, one.correct, one.group) for one in right] == [
        ("q1", "A", False, "g"),
        ("q2", "C", True, None),
    ]
    assert right[0].readings["forced"] == "A"


def test_the_same_predictions_come_back(tmp_path: Path) -> None:
    first, _ = load(tmp_path, TWO, TWO)
    Prediction.write(tmp_path / "again.jsonl", first)
    assert load_pair(tmp_path / "again.jsonl", tmp_path / "b.jsonl", CHOICE)[0] == [first]


@pytest.mark.parametrize(
    ("forced", "completion", "expected"),
    [("B", "?", "B"), ("Bee", "?", None), (None, "?", None), (7, "?", None), ("B", says("A"), "A")],
)
def test_forced(tmp_path: Path, forced: Any, completion: str, expected: str | None) -> None:
    rows = [TWO[0], {"id": "y", "completion": completion, "target": "C", "readings": {"forced": forced}}]
    assert load(tmp_path, rows, TWO)[0][1].readings["forced"] == expected


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("B", "B"),
        ("(B)", "B"),
        (" b. ", "B"),
        ("**B**", "B"),
        ("So the answer is (B).", "B"),
    ],
)
def test_targets_of_a_choice(tmp_path: Path, written: str, target: str) -> None:
    left, _ = load(tmp_path, [row(1, "B", written), row(2, "B", "C")], [row(1, "B", "B"), row(2, "B", "C")])
    assert [(one.target, one.correct) for one in left] == [(target, True), ("C", False)]


def test_longer_answers_are_read_out_of_completion_and_target(tmp_path: Path) -> None:
    cfg = CHOICE.model_copy(update={"pattern": r"#### *(\S+)"})
    a = [{"id": 1, "completion": "9 + 9 #### 18", "target": "9 + 9 = 18\n#### 18"}]
    b = [{"id": 1, "completion": "9 + 8 #### 17", "target": 18}]
    left, right = load(tmp_path, a, b, cfg)
    assert [(one.answer, one.target, one.correct) for one in (*left, *right)] == [
        ("18", "18", True),
        ("17", "18", False),
    ]


def test_exact_compares_normalised_text(tmp_path: Path) -> None:
    a = [{"id": 1, "completion": " **Paris**.", "target": "Paris"}, {"id": 2, "completion": "", "target": "B"}]
    b = [{"id": 1, "completion": "Rome", "target": "paris."}, {"id": 2, "completion": "b", "target": "B"}]
    left, right = load(tmp_path, a, b, EXACT)
    assert [(one.answer, one.correct, one.readings) for one in left] == [("paris", True, {}), (None, False, {})]
    assert [one.correct for one in right] == [False, True]


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, "1"), (1, 1.0), ("é", "é"), (-3, "-3")])
def test_ids_may_be_numbers(tmp_path: Path, a: Any, b: Any) -> None:
    left, right = load(tmp_path, [row(a, "A", "A"), row("z", "A", "B")], [row("z", "A", "B"), row(b, "A", "A")])
    assert [one.id for one in left] == [one.id for one in right] == [str(a), "z"]


@pytest.mark.parametrize(
    "more",
    [
        {"options": {"A": "Scurvy", "B": "Rickets"}},
        {"options": ["Scurvy", "Rickets"]},
        {"choices": ["Scurvy", "Rickets"]},
        {"choices": "AB", "options": {"A": "Scurvy", "B": "Rickets"}},
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_options_and_group_of_either_file_are_used_for_both(tmp_path: Path, more: dict[str, Any], side: int) -> None:
    bare = {"id": 1, "completion": "The answer is rickets.", "target": "B"}
    sides = [[bare], [bare]]
    sides[side] = [bare | more | {"group": 7}]
    made = load(tmp_path, sides[0], sides[1])
    assert [(rows[0].readings["lenient"], rows[0].group) for rows in made] == [("B", "7")] * 2


def test_a_third_file_has_the_options_group_subgroup_and_context_of_the_first(tmp_path: Path) -> None:
    bare = {"id": 1, "completion": "The answer is rickets.", "target": "B"}
    more = {"options": ["Scurvy", "Rickets"], "group": 7, "subgroup": "rare", "context": "C"}
    paths = [write(tmp_path / f"{n}.jsonl", [bare | more if n == 0 else bare]) for n in range(3)]
    cfg = CHOICE.model_copy(update={"predictions": list(map(str, paths)), "group_by": "subgroup", "labels": []})
    (first, *_), _ = load_pair(paths[0], paths[1], cfg)
    runs, _ = load_others(cfg, first)
    (third,) = runs["2"][0]
    assert (third.readings["lenient"], third.group, third.subgroup) == ("B", "7", "rare")


@pytest.mark.parametrize("choices", ["ABC", ["A", "B", "C"]])
def test_choices_bound_the_lenient_reading(tmp_path: Path, choices: Any) -> None:
    rows = [{"id": n, "completion": f"Answer: {letter}", "target": "B"} for n, letter in enumerate("CD")]
    left, _ = load(tmp_path, [one | {"choices": choices} for one in rows], rows)
    assert [one.readings["lenient"] for one in left] == ["C", None]


def test_without_choices_all_targets_of_both_files_are_the_choices(tmp_path: Path) -> None:
    rows = [
        {"id": n, "completion": f"Answer: {letter}", "target": target}
        for n, letter, target in [(1, "B", "A"), (2, "C", "B")]
    ]
    assert [one.readings["lenient"] for one in load(tmp_path, rows, rows)[0]] == ["B", None]


def test_windows_files_and_blank_lines(tmp_path: Path) -> None:
    text = "\ufeff" + "\r\n".join(["", json.dumps(TWO[0]), "  ", json.dumps(TWO[1]), ""])
    assert load(tmp_path, text.encode(), TWO)[0] == load(tmp_path, TWO, TWO)[0]


def test_half_a_surrogate_pair_can_be_written_again(tmp_path: Path) -> None:
    left, _ = load(tmp_path, [{**TWO[0], "completion": "\ud83d " + says("A")}, TWO[1]], TWO)
    Prediction.write(tmp_path / "out.jsonl", left)
    assert Prediction.read(tmp_path / "out.jsonl")[0].correct


def test_harness_generations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a = [
        generated(0, says("C"), "(C)"),
        generated(1, "Vitamin C is the answer.", "C"),
        # The same two under the other filter of the task.
        generated(0, says("C"), "(C)", "flexible-extract", filtered_resps=["B"], exact_match=float("nan")),
        generated(1, "Vitamin C is the answer.", "C", "flexible-extract", filtered_resps=["C"], exact_match=1.0),
    ]
    b = [row(1, "B", "C"), row(0, "C", "C")]
    left, right = load(tmp_path, a, b)
    assert [(one.id, one.prompt, one.answer, one.correct) for one in left] == [
        ("0", "Question 0\nAnswer:", "C", True),
        ("1", "Question 1\nAnswer:", None, False),
    ]
    assert left[1].readings == {"strict": None, "last": None, "lenient": "C", "forced": None}
    assert [one.correct for one in right] == [True, False]
    assert not caplog.records


def test_older_harness_rows(tmp_path: Path) -> None:
    """Before filters had a name in the row, and arguments were lists."""
    old = {"doc_id": 3, "target": "B", "arguments": [["Q?", {}]], "resps": [[says("B")]], "filtered_resps": ["B"]}
    left, _ = load(
        tmp_path,
        [old, old | {"filtered_resps": ["[invalid]"]}, generated(4, "", "A")],
        [row(3, "A", "B"), row(4, "A", "A")],
    )
    assert [(one.id, one.prompt, one.correct) for one in left] == [
        ("3", "Q?", True),
        ("4", "Question 4\nAnswer:", False),
    ]


@pytest.mark.parametrize(
    ("sample", "answer", "target"),
    [
        (ranked(0, [-3.5, -1.25, -9], "1"), "B", "B"),
        (ranked(0, [-3.5, -1.25, -9], "0"), "B", "A"),
        (ranked(0, [-3.5, -1.25, -0.5], "maybe"), "C", "C"),
        (ranked(0, [-3.5, -1.25], "(B)"), "B", "B"),
        (ranked(0, ["-inf", -1.25], 0), "B", "A"),
        (ranked(0, [-2, -2], "0"), "A", "A"),  # as the harness breaks ties
        (ranked(0, ["nan", -1.25], "1"), None, "B"),
        (ranked(0, [-3.5, -1.25], "1", resps=[[[-3.5, False]], [[-1.25, True]]]), "B", "B"),
        (ranked(0, [-3.5, -1.25], "1", arguments=[["Q", " no"], ["Q", " yes"]]), "B", "B"),
        (ranked(0, [-3.5, -1.25], "1", arguments="?", doc=None), "B", "B"),
    ],
)
def test_harness_log_likelihoods(tmp_path: Path, sample: dict[str, Any], answer: str | None, target: str) -> None:
    left, right = load(tmp_path, [sample], [row(0, "B", target)])
    expected = (answer, target, answer == target, "")
    assert [(one.answer, one.target, one.correct, one.completion) for one in left] == [expected]
    named = ("strict", "last", "lenient", "forced", *(["logprob"] if answer else []))
    assert {name: left[0].readings[name] for name in named} == dict.fromkeys(named, answer)
    assert right[0].answer == "B"


def test_the_accuracies_of_the_harness_are_readings(tmp_path: Path) -> None:
    """``acc`` takes the most likely option, ``acc_norm`` the most likely one per character of the option."""
    texts = ["yes", "it cannot be determined", "no"]
    likelihoods = [[-3, -12, -6], [-5, -9, -2], [-1, -30, -8]]
    rows = [ranked(number, values, "1", texts) for number, values in enumerate(likelihoods)]
    left, _ = load(tmp_path, rows, [row(number, "B", "B") for number in range(3)])
    divided = [[value / len(text) for value, text in zip(values, texts, strict=True)] for values in likelihoods]
    assert [one.readings["logprob"] for one in left] == ["ABC"[values.index(max(values))] for values in likelihoods]
    assert [one.readings["logprob_norm"] for one in left] == ["ABC"[values.index(max(values))] for values in divided]
    assert [one.readings["logprob_norm"] for one in left] == ["B", "B", "A"]
    assert left[0].logprobs == {"A": -3, "B": -12, "C": -6}
    counts = scorer(CHOICE.model_copy(update={"alpha": 0.05})).result([left]).readings
    assert (counts["logprob"].correct, counts["logprob_norm"].correct) == (0, 2)
    Prediction.write(tmp_path / "again.jsonl", left)
    assert [one.logprobs for one in Prediction.read(tmp_path / "again.jsonl")] == [one.logprobs for one in left]


def test_options_asked_for_without_a_prompt_do_not_compete(tmp_path: Path) -> None:
    asked = {
        f"gen_args_{n}": {"arg_0": prompt, "arg_1": text}
        for n, (prompt, text) in enumerate([("Q", " a"), ("Q", " b"), ("", " a"), ("", " b")])
    }
    sample = ranked(0, [-5, -4, -1, -2], "1", arguments=asked)
    assert load(tmp_path, [sample], [row(0, "A", "B")])[0][0].answer == "B"


def test_several_answers_to_a_question_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``repeats: 3`` of a task of lm-evaluation-harness, as its take_first filter leaves it in ``resps``."""
    a = [generated(number, "", "B", resps=[[says("B"), says("A"), "It depends."]]) for number in range(2)]
    left, right = load_pair(
        write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", [row(0, "B", "B"), row(1, "A", "B")]), CHOICE
    )
    assert [[one.answer for one in rows] for rows in left] == [["B", "B"], ["A", "A"], [None, None]]
    assert [[one.correct for one in rows] for rows in right] == [[True, False]]
    (tmp_path / "run").mkdir()
    runs = {"baseline": left, "finetuned": right}
    cfg = CHOICE.model_copy(update={"alpha": 0.1, "forced": False, "labels": []})
    judged = decide(runs, {"baseline": "a", "finetuned": "b"}, cfg, tmp_path / "run", both_mute=False)
    assert judged.baseline is not None
    assert judged.baseline.repeats is not None
    assert judged.comparison is not None
    assert judged.baseline.repeats.pass_at == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1})
    assert judged.baseline.repeats.majority == 1 / 2  # one vote for each of two answers
    assert judged.finetuned.repeats is None
    assert (judged.comparison.baseline, judged.comparison.finetuned) == pytest.approx((1 / 3, 1 / 2))
    assert judged.comparison.unsplit == "2 of 2 questions have neither an answer nor a forced choice of a"
    terminal.evaluation(judged, "compare", 0)
    printed = capsys.readouterr().out
    assert "pass@1 33.3%, pass@2 66.7%, pass@3 100.0%, majority@3 50.0%" in printed
    assert "2 × 3" in printed
    assert "90 % interval" in printed
    assert "95 %" not in printed


def test_questions_with_too_few_repeats_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a = [
        generated(0, "", "C"),
        generated(1, "", "B", resps=[[says("B"), says("A")]]),
        generated(2, "", "A", resps=[[says("B")] * 3]),
    ]
    with caplog.at_level(logging.WARNING):
        left, _ = load(tmp_path, a, [row(0, "A", "C"), row(1, "A", "B"), row(2, "A", "A")])
    assert [one.answer for one in left] == [None, "B", "B"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.jsonl'}:2: 2 answers, but line 1 has 1: only as many of each question are scored"
    ]


def test_other_documents_under_the_same_number_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (
        [ranked(0, [-1, -2], "0"), ranked(1, [-1, -2], "0")],
        [ranked(0, [-1, -2], "0"), ranked(1, [-1, -2], "0", doc_hash="f")],
    )
    load(tmp_path, a, b)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.jsonl'}:2: 1 questions have another doc_hash in {tmp_path / 'b.jsonl'}"
    ]


FAULTS: list[tuple[str, Rows | bytes, Rows | bytes, EvalConfig, list[str]]] = [
    ("empty", b"", TWO, CHOICE, ["a.jsonl: is empty"]),
    ("blank", b"\xef\xbb\xbf\n \r\n", TWO, CHOICE, ["a.jsonl: is empty or has no rows"]),
    (
        "no JSON",
        TWO,
        b'{"id": 1, "completion": "", "target": "A"}\nid,answer\n',
        CHOICE,
        ["b.jsonl:2: is not", "one object per line"],
    ),
    ("cut off", TWO, b'{"id": 1, "compl', CHOICE, ["b.jsonl:1: is not"]),
    ("not UTF-8", TWO, '{"id": "é"}'.encode("latin-1"), CHOICE, ["b.jsonl:1: is not", "utf-8"]),
    ("UTF-16", TWO, '{"id": 1}'.encode("utf-16"), CHOICE, ["b.jsonl:1: is not"]),
    ("nested too deep", TWO, b"[" * 200_000, CHOICE, ["b.jsonl:1: is not"]),
    ("list", TWO, b'["x", "y"]', CHOICE, ["b.jsonl:1: is not", "x"]),
    ("null", TWO, b"null", CHOICE, ["b.jsonl:1: is not"]),
    (
        "fields",
        [{"id": 1, "answer": "B", "gold": "C"}],
        TWO,
        CHOICE,
        ["a.jsonl:1: has no completion and no target, but id, answer, gold;"],
    ),
    ("null field", [row(None, "A", "A")], TWO, CHOICE, ["a.jsonl:1: has no id, but id, completion, target;"]),
    ("no fields", [{}], TWO, CHOICE, ["a.jsonl:1: has no id and no completion and no target, but no fields"]),
    ("empty target", [row(1, "A", "")], TWO, EXACT, ["a.jsonl:1: has no target"]),
    (
        "no resps",
        [{"doc_id": 1, "filtered_resps": ["B"]}],
        TWO,
        CHOICE,
        ["a.jsonl:1: has no resps and no target, but doc_id, filtered_resps;"],
    ),
    ("id", [row([1], "A", "A")], TWO, CHOICE, ["a.jsonl:1: id [1] is neither"]),
    ("id NaN", [row(float("nan"), "A", "A")], TWO, CHOICE, ["a.jsonl:1: id NaN is neither"]),
    ("id bool", [{**generated(1, "", "A"), "doc_id": True}], TWO, CHOICE, ["a.jsonl:1: doc_id true is neither"]),
    ("completion", [{**TWO[0], "completion": ["a"]}], TWO, CHOICE, ['a.jsonl:1: completion ["a"] is not text']),
    ("twice", TWO, [*TWO, row("x", "A", "A")], CHOICE, ["b.jsonl:3: id 'x' is in line 1 already"]),
    (
        "two tasks",
        [generated(0, "", "A"), generated(0, "", "B")],
        TWO,
        CHOICE,
        ["a.jsonl:2: id '0' is in line 1", "one task"],
    ),
    (
        "two filters, two tasks",
        [generated(0, "", "A"), generated(0, "", "B", "other")],
        TWO,
        CHOICE,
        ["a.jsonl:2: id '0' is in line 1"],
    ),
    ("same filter", [generated(0, "", "A"), generated(0, "", "A")], TWO, CHOICE, ["a.jsonl:2: id '0' is in line 1"]),
    (
        "target",
        TWO,
        [row("y", "B", "(D)"), row("x", "A", "A")],
        CHOICE,
        ["a.jsonl:2: id 'y' has target 'C', but 'D' in", "b.jsonl:1;"],
    ),
    (
        "target text",
        [row(1, "A", "Paris")],
        [row(1, "A", "Rome")],
        EXACT,
        ["'Paris'", "'Rome'", "a.jsonl:1", "b.jsonl:1"],
    ),
    (
        "one letter",
        [row(1, "A", "B"), row(2, "B", "B")],
        [row(2, "A", "B"), row(1, "B", "B")],
        CHOICE,
        ["a.jsonl: an answer set of one letter, 'B'", '"choices"'],
    ),
    (
        "texts for letters",
        [row(1, "A", "Scurvy"), row(2, "A", "A")],
        [row(1, "A", "Scurvy"), row(2, "A", "A")],
        CHOICE,
        ["a.jsonl:1: id '1' has target 'Scurvy'", "eval.pattern", "set eval.task=exact"],
    ),
    ("pattern", TWO, TWO, CHOICE.model_copy(update={"pattern": "("}), ["answer pattern '('"]),
    ("exact likelihoods", [ranked(0, [-1, -2], "0")], TWO, EXACT, ["a.jsonl:1: resps has 2", "eval.task=choice"]),
    ("one likelihood", [ranked(0, [-1], "0")], TWO, CHOICE, ["a.jsonl:1: resps has 1 log-likelihoods", "2 to 26"]),
    ("gold", [ranked(0, [-1, -2], "2")], TWO, CHOICE, ["a.jsonl:1: target '2' is none of 2 options"]),
    ("gold letter", [ranked(0, [-1, -2], "C")], TWO, CHOICE, ["a.jsonl:1: target 'C' is none of 2"]),
    ("several golds", [ranked(0, [-1, -2], "[0, 2]")], TWO, CHOICE, ["a.jsonl:1: target '2' is none of 2"]),
    *(
        (f"target {target}", [row(1, "A", target)], TWO, EXACT, ["a.jsonl:1: target", said])
        for target, said in [
            ([], "[] has no answer"),
            (["a", None], "'nothing'"),
            (["a", ""], "'nothing'"),
            (["a", ["b"]], '["b"]'),
            ({"value": "a"}, '{"value": "a"}'),
            (float("nan"), "'NaN'"),
        ]
    ),
    ("sides", [row(1, "A", ["a", "b"])], [row(1, "A", ["a", "c"])], EXACT, ["a.jsonl:1", "'a or b', but 'a or c'"]),
    ("index or text", [harness_row(1, "2", 1, ["1", "2"])], TWO, EXACT, ["a.jsonl:1: target 1 may be the index"]),
    (
        "digits",
        [row(1, "A", "A"), row(2, "2", "2")],
        [row(1, "A", "A"), row(2, "2", "2")],
        CHOICE,
        ["a.jsonl:2: id '2' has target '2'", "eval.pattern=", "([A-Z0-9])"],
    ),
    *(
        (f"resps {resps}", [generated(0, "", "A", resps=resps)], TWO, CHOICE, ["a.jsonl:1: resps", "log"])
        for resps in ([], [[]], {}, "text", ["text"], [[7]], [[{}]], [[["x", "False"]]], [["text"], [["-1", "False"]]])
    ),
]


@pytest.mark.parametrize(("a", "b", "cfg", "parts"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_faults(tmp_path: Path, a: Rows | bytes, b: Rows | bytes, cfg: EvalConfig, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, a, b, cfg)
    assert raised.value.exit_code == 2
    assert [part for part in parts if part not in str(raised.value)] == []
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*; name a JSONL file") as raised:
        load_pair(write(tmp_path / "a.jsonl", TWO), tmp_path / name, CHOICE)
    assert str(raised.value).startswith(f"{tmp_path / name}: ")


def test_ids_that_one_side_lacks(tmp_path: Path) -> None:
    a = [row(n, "A", "A") for n in range(5)]
    b = [row(n, "A", "B") for n in (4, 9)]
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, a, b)
    assert str(raised.value) == (
        f"{tmp_path / 'b.jsonl'}: lacks 4 of the 5 ids of {tmp_path / 'a.jsonl'}: "
        "'0' (line 1), '1' (line 2), '2' (line 3); "
        f"{tmp_path / 'a.jsonl'}: lacks 1 of the 2 ids of {tmp_path / 'b.jsonl'}: '9' (line 2); "
        "let both models answer the same questions, or delete the other rows"
    )


def test_unreadable_answers_are_no_error_but_cannot_be_judged(tmp_path: Path) -> None:
    mute = [{**one, "completion": "x" * 100 + "\nthe answer is **A**"} for one in TWO]
    left, right = load(tmp_path, mute, TWO)
    assert [(one.answer, one.correct) for one in left] == [(None, False)] * 2
    why = unjudgeable(files(left, right))
    assert why is not None
    assert "no answer of the first file could be read; see id 'x'" in why
    assert r"xx\nthe answer is **A**'" in why
    assert "set eval.pattern" in why
    assert "the second file" in (unjudgeable(files(right, left)) or "")
    assert "the first file or the second file" in (unjudgeable(files(left, left)) or "")
    assert unjudgeable(files(right, right)) is None
    assert unjudgeable(files([left[0], right[1]], right)) is None
    assert unjudgeable(files([], [])) is None


def test_empty_completions_are_not_the_patterns_fault(tmp_path: Path) -> None:
    left, right = load(
        tmp_path, [{"id": 1, "completion": "", "target": "x"}], [{"id": 1, "completion": "x", "target": "x"}], EXACT
    )
    assert (
        unjudgeable(files(left, right))
        == "cannot be judged: every completion of the first file is empty; generate them again"
    )


@pytest.mark.slow
def test_many_rows(tmp_path: Path) -> None:
    rows = [row(n, "AB"[n % 2], "B") for n in range(5_000)]
    rows[0]["choices"] = "AB"
    begin = time.process_time()
    left, right = load(tmp_path, rows, rows[::-1])
    assert time.process_time() - begin < 30
    assert left == right
    assert sum(one.correct for one in left) == 2_500


def test_a_column_tells_subgroups_apart(tmp_path: Path) -> None:
    cfg = CHOICE.model_copy(update={"group_by": "step"})
    a = [row("x", "A", "A", step=1), row("y", "B", "C")]
    b = [row("x", "A", "A"), row("y", "B", "C", step="two")]
    left, right = load(tmp_path, a, b, cfg)
    assert [one.subgroup for one in left] == [one.subgroup for one in right] == ["1", "two"]
    asked = generated(0, says("A"), "A", doc={"step": "s1", "choices": "AB"})
    assert load(tmp_path, [asked], [asked], cfg)[0][0].subgroup == "s1"
    Prediction.write(tmp_path / "a.jsonl", left)
    own = CHOICE.model_copy(update={"group_by": "subgroup"})
    again = load_pair(tmp_path / "a.jsonl", write(tmp_path / "b.jsonl", b), own)
    assert [one.subgroup for one in again[0][0]] == ["1", "two"]


@pytest.mark.parametrize("group", [None, "", " ", float("nan")])
def test_rows_without_a_group_share_none(tmp_path: Path, group: Any) -> None:
    rows = [row("x", "A", "A", group=group), row("y", "B", "C", group=group), row("z", "B", "C", group="g")]
    assert [one.group for one in load(tmp_path, rows, rows)[0]] == [None, None, "g"]


@pytest.mark.smoke  # libraries that take seconds to import
def test_predictions_have_a_score_and_a_subgroup_only_where_there_is_one(tmp_path: Path) -> None:
    Prediction.write(tmp_path / "plain.jsonl", load(tmp_path, TWO, TWO)[0])
    assert set(json.loads((tmp_path / "plain.jsonl").read_text("utf-8").splitlines()[0])) == {
        *("id", "prompt", "completion", "finish_reason", "answer", "target", "correct", "group", "readings", "choices"),
    }
    cfg = CHOICE.model_copy(update={"task": "rouge"})
    Prediction.write(tmp_path / "scored.jsonl", scorer(cfg).scored(load(tmp_path, TWO, TWO, cfg)[0]))
    assert json.loads((tmp_path / "scored.jsonl").read_text("utf-8").splitlines()[0])["score"] == pytest.approx(2 / 5)


# — several right answers —


@pytest.mark.parametrize(
    ("sample", "targets"),
    [
        (row(1, "", ["Berne", "Bern"]), ["Berne", "Bern"]),
        (row(1, "", '["Berne", "Bern"]'), ["Berne", "Bern"]),
        (row(1, "", [3, "three", 3]), ["3", "three"]),
        (row(1, "", {"text": ["Berne", "Bern"], "answer_start": [1, 1]}), ["Berne", "Bern"]),
        (row(1, "", "[1, 2]"), ["[1, 2]"]),  # a vector, perhaps
        (row(1, "", 18.0), ["18", "18.0"]),
        (row(1, "", 0.5), ["0.5"]),
        (row(1, "", "[Berne"), ["[Berne"]),
        (row(1, "", "Berne", targets=["Berne", "Bern"]), ["Berne", "Bern"]),  # as own predictions have them
        (row(1, "", '["a", "b"]', correct=True), ['["a", "b"]']),
        (harness_row(1, "", ["Berne", "Bern"]), ["Berne", "Bern"]),
        (harness_row(1, "", "Berne", answers=["Bern", "Berne"]), ["Berne", "Bern"]),
        (harness_row(1, "", "Berne", answers={"text": ["Berne", "Bern"]}), ["Berne", "Bern"]),
        (harness_row(1, "", "Thun", answers=["Bern", "Berne"]), ["Thun"]),
        (harness_row(1, "", 1, ["Thun", "Bern"]), ["Bern"]),
        (harness_row(1, "", [0, 1], ["Thun", "Bern", "Chur"]), ["Thun", "Bern"]),
        (harness_row(1, "", 18, ["Thun", "Bern"]), ["18"]),
    ],
)
def test_any_of_several_targets_counts(tmp_path: Path, sample: dict[str, Any], targets: list[str]) -> None:
    text = "resps" if "resps" in sample else "completion"

    def answering(answer: str) -> list[dict[str, Any]]:
        return [sample | {text: [[answer]] if text == "resps" else answer}]

    for target in targets:
        left, right = load(tmp_path, answering(f" {target.upper()}. "), answering("Zug"), EXACT)
        assert (left[0].accepted, left[0].target) == (targets, targets[0])
        assert [left[0].correct, right[0].correct] == [True, False]
    assert [one.targets for one in left] == [targets if len(targets) > 1 else None]


def test_the_files_of_a_pair_may_order_targets_otherwise(tmp_path: Path) -> None:
    left, right = load(tmp_path, [row(1, "A", ["A", "(b)"])], [row(1, "B", ["B", "A", "A"])])
    assert [(one.targets, one.correct) for one in (*left, *right)] == [(["A", "B"], True)] * 2
    Prediction.write(tmp_path / "again.jsonl", left)
    assert load_pair(tmp_path / "again.jsonl", tmp_path / "b.jsonl", CHOICE)[0] == [left]


@pytest.mark.parametrize(
    ("target", "choices", "letter"),
    [
        (2, ["Thun", "Bern", "Chur"], "C"),
        ("2", ["Thun", "Bern", "Chur"], "C"),
        ("bern", ["Thun", "Bern", "Chur"], "B"),
        ("C", {"label": ["A", "B", "C"], "text": ["Thun", "Bern", "Chur"]}, "C"),
    ],
)
def test_a_target_may_be_an_index_or_the_text_of_an_option(
    tmp_path: Path, target: Any, choices: Any, letter: str
) -> None:
    sample = harness_row(0, says(letter), target, choices)
    left, right = load(tmp_path, [sample], [row(0, "A", letter)])
    assert [(one.target, one.correct) for one in (*left, *right)] == [(letter, True), (letter, False)]
    by_words = sample | {"resps": [["The answer is " + ["Thun", "Bern", "Chur"]["ABC".index(letter)] + "."]]}
    assert load(tmp_path, [by_words], [row(0, "A", letter)])[0][0].readings["lenient"] == letter


def test_several_golds_of_log_likelihoods(tmp_path: Path) -> None:
    left, right = load(tmp_path, [ranked(0, [-1, -2, -3], "[2, 0]")], [ranked(0, [-3, -2, -3], [0, 2])])
    assert [(one.targets, one.answer, one.correct) for one in (*left, *right)] == [
        (["C", "A"], "A", True),
        (["C", "A"], "B", False),
    ]


# — reasoning, case, truncation —


def test_reasoning_is_no_answer(tmp_path: Path) -> None:
    thought = "<think>\nAt first sight the answer is (C).\n</think>\n\nThe answer is (D)."
    a = [row("x", "", "D", completion=thought), row("y", "", "C", completion=thought[:40], finish_reason="max_tokens")]
    b = [row("x", "D", "D"), row("y", "", "C", completion="the answer is (C)?</think> It is (C).", prompt="<think>\n")]
    left, right = load(tmp_path, a, b)
    assert [(one.answer, one.correct, one.finish_reason) for one in left] == [
        ("D", True, "unknown"),
        (None, False, "length"),
    ]
    assert left[0].completion == thought
    assert [one.readings for one in right] == [
        dict.fromkeys(("strict", "last", "lenient", "forced"), "D"),
        {"strict": None, "last": None, "lenient": "C", "forced": None},
    ]
    whole = [a[0] | {"target": "the answer is (d)"}]
    assert load(tmp_path, whole, whole, EXACT)[0][0].correct


def test_a_model_that_never_ends_its_reasoning_cannot_be_judged(tmp_path: Path) -> None:
    left, right = load(tmp_path, [one | {"completion": f"<think>{one['completion']}"} for one in TWO], TWO)
    why = unjudgeable(files(left, right)) or ""
    assert "the first file ends within its reasoning" in why
    assert "eval.max_tokens" in why


def test_case_counts_as_the_pattern_says(tmp_path: Path) -> None:
    rows = [row(1, "", "B", completion="The answer is a drug, so the answer is B", choices="ABCD")]
    exactly = CHOICE.model_copy(update={"pattern": r"answer is ([A-D])"})
    either = CHOICE.model_copy(update={"pattern": r"(?i)answer is ([A-D])"})
    assert [load(tmp_path, rows, rows, cfg)[0][0].answer for cfg in (exactly, either)] == ["B", "A"]


@pytest.mark.parametrize("reading", ["strict", "last", "lenient"])
def test_the_headline_is_read_as_the_config_says(tmp_path: Path, reading: Any) -> None:
    rows = [row(1, "", "B", completion="The answer is (A). No: the answer is (B). Sorry, it is (C).", choices="ABC")]
    one = load(tmp_path, rows, rows, CHOICE.model_copy(update={"reading": reading}))[0][0]
    expected = {"strict": "A", "last": "B", "lenient": "C"}
    assert (one.answer, one.correct) == (expected[reading], reading == "last")
    assert one.readings == expected | {"forced": expected[reading]}


def test_unfinished_reasoning_behind_other_words_is_no_answer(tmp_path: Path) -> None:
    thought = [
        {"id": n, "completion": f"Sure, <think> {says('A')} but", "target": "AB"[n], "finish_reason": "length"}
        for n in range(2)
    ]
    a, b = load(tmp_path, TWO_LETTERS, thought)
    assert [one.answer for one in a + b] == ["A", "B", None, None]
    assert "ends within its reasoning" in str(unjudgeable(files(a, b)))


TWO_LETTERS = [row(0, "A", "A"), row(1, "B", "B")]


@pytest.mark.parametrize(
    ("reason", "bare", "answers"),
    [
        ("length", 3, ["B", None, None, None]),  # the prompt of one row began its reasoning, as those of all did
        (None, 1, ["B", "B", "B", None]),  # nearly all rows end reasoning that they do not begin
        (None, 3, ["B", "A", "A", "A"]),
        ("stop", 1, ["B", "B", "B", "A"]),
    ],
)
def test_rows_without_marks_where_others_only_end_reasoning(
    tmp_path: Path, reason: str | None, bare: int, answers: list[str | None]
) -> None:
    ended = [row(n, "A", "B") | {"completion": f"Perhaps {says('A')}</think>{says('B')}"} for n in range(4 - bare)]
    cut = [row(n, "A", "B", finish_reason=reason) for n in range(4 - bare, 4)]
    plain = [row(n, "B", "B", choices="AB") for n in range(4)]
    a, b = load(tmp_path, plain, [*ended, *cut])
    assert [one.answer for one in a] == ["B"] * 4
    assert [one.answer for one in b] == answers


@pytest.mark.parametrize(
    ("pattern", "said", "target"),
    [
        ("(?i)the answer is (yes|no)", "Yes", "yes"),
        ("the answer is (Yes|No)", "Yes", "yes"),
        ("(?i)the answer is (yes|no)", "YES", ["Yes", "no"]),
        ("(?i)the answer is (true|false)", "True", True),
        ("(?i)the answer is (true|false)", "true", "True"),
    ],
)
def test_words_are_compared_without_their_case(tmp_path: Path, pattern: str, said: str, target: Any) -> None:
    other = {"id": 1, "completion": "no answer", "target": target}
    rows = [{"id": 0, "completion": f"the answer is {said}", "target": target}, other]
    for reading in ("strict", "last", "lenient"):
        a, b = load(tmp_path, rows, rows, CHOICE.model_copy(update={"pattern": pattern, "reading": reading}))
        assert [one.correct for one in a + b] == [True, False] * 2
        assert a[0].readings["forced"] in a[0].accepted


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("more", [{}, {"choices": ["w", "x", "y", "z"]}, {"choices": "ABCD"}])
@pytest.mark.parametrize("pattern", [PATTERN, r"(?i)the answer is\s*\(([A-Z0-9])\)"])
def test_numbers_as_targets_of_letters_are_refused_with_a_remedy_that_works(
    tmp_path: Path, first: int, more: dict[str, Any], pattern: str
) -> None:
    cfg = CHOICE.model_copy(update={"pattern": pattern})
    rows = [row(n, "ABCD"[n], n + first, **more) for n in range(4)]
    with pytest.raises(ConfigError, match="write the letter of the right option as target") as raised:
        load(tmp_path, rows, rows, cfg)
    assert "a.jsonl:1: target" in str(raised.value)
    assert "A-Z0-9" not in str(raised.value).replace(repr(pattern), "")
    mended = [one | {"target": "ABCD"[one["target"] - first]} for one in rows]
    assert all(one.correct for side in load(tmp_path, mended, mended, cfg) for one in side)


@pytest.mark.parametrize(
    ("written", "targets"),
    [
        ("['Berne', 'Bern']", ["Berne", "Bern"]),
        ("['Berne' 'Bern']", ["Berne", "Bern"]),  # as NumPy prints it
        ("""["It's", 'Bern']""", ["It's", "Bern"]),
        ("['Berne', 'Bern'", ["['Berne', 'Bern'"]),
        ("[Berne, Bern]", ["[Berne, Bern]"]),
    ],
)
def test_lists_that_are_printed_as_text(tmp_path: Path, written: str, targets: list[str]) -> None:
    rows = [harness_row(0, targets[-1], written)]
    a, b = load(tmp_path, rows, rows, EXACT)
    assert [one.accepted for one in a + b] == [targets, targets]
    assert all(one.correct for one in a + b)


def test_all_broken_rows_are_reported_at_once(tmp_path: Path) -> None:
    good = [row(n, "A", "A", choices="AB") for n in range(60)]
    broken = b"".join(
        {0: b'{"id": 0}', 1: b"not json", 2: b"[]"}[n % 3] + b"\n" if n < 25 else json.dumps(good[n]).encode() + b"\n"
        for n in range(60)
    )
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, broken, [*good[:-1], good[-1] | {"completion": 7}])
    problems = raised.value.problems
    assert [problem.key.rpartition(":")[2] for problem in problems] == [*(str(n) for n in range(1, 26)), "60"]
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, good, [one | {"target": "B"} if one["id"] % 2 else one for one in good])
    assert len(raised.value.problems) == 30
    assert "a.jsonl:2: id '1' has target 'A', but 'B'" in str(raised.value.problems[0])
