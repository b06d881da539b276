"""Scores by code that the configuration names: a metric of the evaluate library, a function of the user."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import composed, problem, write_rows
from test_score_tasks import compared, page, settings

from sftlab.errors import ConfigError, StageError
from sftlab.eval import guards
from sftlab.eval.scorers import scorer
from sftlab.records import Example, single_turn
from sftlab.train.ranking import requirements

METRICS = Path(__file__).parent.parent.parent / "sftlab" / "eval" / "metrics"
FUNCTION = '''
def score(prediction, example):
    """The share of the target's words that the answer has, in the units of the row."""
    words = example.target.split()
    assert prediction and example.accepted and example.group is None
    if prediction == "fail":
        raise KeyError("fail")
    if prediction == "two":
        return 2
    unit = example.context or ""
    return sum(word + unit in prediction.split() for word in words) / len(words)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a function of the user, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTION, "utf-8")
    return tmp_path


def test_a_function_scores_answers(own: Path) -> None:
    cfg = settings("function", "eval.scorer=mine.py:score")
    b = [("am bm", "a b"), ("am b", "a b"), ("", "a b")] * 8
    evaluation = compared(own, cfg, [("x", "a b")] * 24, b, context=["m"] * 24)
    assert evaluation.finetuned.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert evaluation.finetuned.metric == "score"
    assert evaluation.finetuned.unparsed == 8
    assert evaluation.comparison is not None
    assert evaluation.comparison.verdict.outcome == "better"
    assert evaluation.scorer is not None
    assert evaluation.scorer.name == "mine.py:score"
    assert evaluation.scorer.sha256 == hashlib.sha256(FUNCTION.encode()).hexdigest()
    assert evaluation.scorer.sha256[:12] in page(own, evaluation)


@pytest.mark.parametrize(("answer", "said"), [("fail", "raises KeyError: 'fail'"), ("two", "returns 2, which is not")])
def test_a_function_that_fails_names_the_row(own: Path, answer: str, said: str) -> None:
    cfg = settings("function", "eval.scorer=mine.py:score")
    with pytest.raises(StageError, match=f"{said}.* for row '1' with the answer '{answer}'"):
        compared(own, cfg, [("a", "a")] * 2, [("a", "a"), (answer, "a")])
    with pytest.raises(
        ConfigError, match=f"{said}.* for the target of test row 'q' as the answer; correct the function"
    ):
        scorer(cfg).check([Example("q", single_turn("", "", ""), answer)])


def test_the_file_of_a_function_is_checked_before_it_is_executed(own: Path) -> None:
    (own / "bad.py").write_text("raise SystemError('executed')\ndef other(): pass", "utf-8")
    (own / "broken.py").write_text("def score(:", "utf-8")
    common = ["model=tiny_random", "eval.task=function"]
    assert "does not name a file and a function" in str(problem(common))
    assert "has no function score; there are other" in str(problem([*common, "eval.scorer=bad.py:score"]))
    assert "is not Python" in str(problem([*common, "eval.scorer=broken.py:score"]))
    assert "cannot be read: No such file" in str(problem([*common, "eval.scorer=none.py:score"]))
    assert "cannot be loaded: SystemError: executed" in str(problem([*common, "eval.scorer=bad.py:other"]))
    assert "set eval.task=function" in str(
        problem(["model=tiny_random", "eval.task=exact", "eval.scorer=bad.py:other"])
    )


def test_jobs_with_another_function_are_not_ranked_together(own: Path) -> None:
    from types import SimpleNamespace
    from typing import Any

    def key() -> Any:
        cfg = composed("mode=runs", "eval.task=function", "eval.scorer=mine.py:score", "select.metric=score")
        nothing: Any = SimpleNamespace()
        return requirements(cfg, [], nothing, nothing)["scoring"]

    from sftlab.eval import own_code

    first = key()
    assert key() == first
    (own / "mine.py").write_text(FUNCTION.replace("in prediction", "in prediction "), "utf-8")
    own_code.hash_of.cache_clear()
    assert key() != first


@pytest.mark.smoke  # libraries that take seconds to import
def test_a_metric_of_a_local_file_scores_answers(tmp_path: Path) -> None:
    rows = [("the court", "the court held so"), ("a b", "c d"), ("", "x")]
    cfg = settings("metric", f"eval.metric={METRICS / 'rouge.py'}", "eval.metric_value=rouge1")
    evaluation = compared(tmp_path, cfg, rows, rows)
    assert evaluation.finetuned.value == pytest.approx((2 * 2 / 6 + 0 + 0) / 3)
    assert evaluation.finetuned.metric == "rouge rouge1"
    assert evaluation.scorer is not None
    assert evaluation.scorer.sha256 == hashlib.sha256((METRICS / "rouge.py").read_bytes()).hexdigest()
    assert "Rouge rouge1 with its 95 % interval" in page(tmp_path, evaluation)

    several = settings("metric", f"eval.metric={METRICS / 'rouge.py'}")
    row = Example("q", single_turn("", "", ""), "a")
    with pytest.raises(ConfigError, match=r"returns rouge1, rouge2, rougeL, rougeLsum; set eval.metric_value"):
        scorer(several).check([row])
    error_rate = settings("metric", f"eval.metric={METRICS / 'exact_match.py'}", "eval.metric_range=[1,0]")
    assert compared(tmp_path, error_rate, [("a", "a")], [("b", "a")]).finetuned.value == 1
    percent = settings("metric", f"eval.metric={METRICS / 'exact_match.py'}", "eval.metric_range=[0,0.5]")
    with pytest.raises(ConfigError, match=r"has the value 1 .* beyond the best end of eval.metric_range"):
        scorer(percent).check([row])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        scorer(settings("metric", "eval.metric=no/such_metric")).check([row])


def test_a_function_scores_the_test_set_or_a_guard(own: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"{n} things"} for n in range(40)]
    guard = [
        "+dataset@eval.guards.why=question_answer",
        f"eval.guards.why.name_or_path={write_rows(own / 'g.jsonl', rows)}",
    ]
    common = ["model=tiny_random", "eval.scorer=mine.py:score", *guard]
    assert problem([*common, "eval.task=function"]) is None
    assert problem([*common, "eval.guards.why.scoring.task=function"]) is None
    assert "set eval.task=function" in str(problem(common))
    cfg = composed("mode=runs", "eval.task=function", *common)
    assert guards.settings(cfg, "why").eval.scorer is None
