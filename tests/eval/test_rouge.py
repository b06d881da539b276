"""ROUGE-L against values worked out by hand: F = 2 · common / (words of prediction + words of reference)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sftlab

pytest.importorskip("rouge_score")

BY_HAND = [
    # Lin 2004: "police the gunman" is common, 2 · 3 / (4 + 4); then "the gunman", with the same words as before.
    ("police kill the gunman", "police killed the gunman", 3 / 4),
    ("the gunman kill police", "police killed the gunman", 2 / 4),
    # a c d: not adjacent, and still in order. 2 · 3 / (5 + 3)
    ("a b c x d", "a c d", 6 / 8),
    # select id from users: 4 of 8 and 4 words. 2 · 4 / (8 + 4)
    ("SELECT id, name FROM users WHERE age > 30;", "select id from users", 8 / 12),
    # Order counts: of b a either one is common. 2 · 1 / (2 + 2)
    ("b a", "a b", 1 / 2),
    # A word that is there twice counts twice only if it is twice in both. 2 · 1 / (3 + 1)
    ("the the the", "the", 2 / 4),
    # Case and punctuation do not count, and nothing is stemmed.
    ("The answer is (B).", "the answer is b", 1.0),
    ("cells", "cell", 0.0),
    ("no words in common", "nothing shared", 0.0),
    ("", "a reference", 0.0),
    ("", "", 0.0),
    ("日本語", "日本語", 0.0),
]


@pytest.fixture(scope="module")
def metric() -> Any:
    import evaluate

    return evaluate.load(str(Path(sftlab.__file__).parent / "eval" / "metrics" / "rouge.py"), keep_in_memory=True)


def test_every_row_has_the_score_worked_out_by_hand(metric: Any) -> None:
    predictions, references, scores = map(list, zip(*BY_HAND, strict=True))
    rows = {"predictions": predictions, "references": references}
    assert metric.compute(**rows, rouge_types=["rougeL"], use_aggregator=False) == {"rougeL": pytest.approx(scores)}
    assert metric.compute(**rows)["rougeL"] == pytest.approx(sum(scores) / len(scores))


def test_the_other_kinds(metric: Any) -> None:
    # Words in common: a b c d of 4 and 5; pairs: ab, cd of 3 and 4; in order over all: c d; line by line: a b, c d.
    result = metric.compute(predictions=["c d\na b"], references=["a b\nc d x"])
    assert result == pytest.approx({"rouge1": 8 / 9, "rouge2": 4 / 7, "rougeL": 4 / 9, "rougeLsum": 8 / 9})


def test_the_mean_is_over_rows_and_not_over_words(metric: Any) -> None:
    result = metric.compute(predictions=["a", "x " * 100], references=["a", "y " * 100], rouge_types=["rougeL"])
    assert result == {"rougeL": 0.5}


def test_rows_that_do_not_pair_up_are_refused(metric: Any) -> None:
    with pytest.raises(ValueError, match="Mismatch"):
        metric.compute(predictions=["a"], references=["a", "b"])
