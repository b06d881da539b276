from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import compose, problem, write_model, write_rows

from sftlab.eval import guards
from sftlab.eval import stage as evaluate
from sftlab.eval.contenders import Contender, EvalSet
from sftlab.model import base as models
from sftlab.records import Example, Generation, single_turn
from sftlab.report import tables
from sftlab.results import Evaluation
from sftlab.runtime.store import Store
from sftlab.validation.validate import validate

Script = Callable[[str, str], str]
"""The answer of a model (baseline, finetuned) to a prompt."""
Judge = Callable[..., Evaluation]


def mounted(folder: Path, *overrides: str, count: int = 40) -> Any:
    """A configuration with a guard of sums, and the model of this folder."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n), "kind": "even"} for n in range(count)]
    guard = f"eval.guards.sums.name_or_path={write_rows(folder / 'sums.jsonl', rows)}"
    model = f"model.name_or_path={write_model(folder / 'model')}"
    settings = [model, f"store={folder / 'store'}", "eval.dtype=float32", "eval.max_tokens=32"]
    return validate(compose(*settings, "+dataset@eval.guards.sums=question_answer", guard, *overrides))


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """A function that evaluates scripted models on a test set of differences, and on the guards."""

    def run(cfg: Any, script: Script, questions: int = 40) -> Evaluation:
        def answered(model: Any, prompts: Any) -> Any:
            rows = [Generation(row.id, row.text, script(model.identity, row.text), "stop", 1) for row in prompts.rows]
            stage = SimpleNamespace(path=tmp_path)
            return SimpleNamespace(rows=lambda repeat: rows, stage=stage, seconds=0.0, seconds_per_token=None)

        def make_all(store: Store, model: Any, sets: Any, *_: Any) -> Any:
            return [answered(model, prompts) for prompts in sets]

        monkeypatch.setattr(evaluate, "make_all", make_all)
        cfg = cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"task": "exact"})})
        base = models.resolve(cfg.model, Store(cfg.store), 0)
        both = {side: Contender(evaluate.Model(base.path, side, False), base) for side in ("baseline", "finetuned")}
        rows = [Example(f"row-{n}", single_turn("", f"What is {n} minus {n}?", ""), "0") for n in range(questions)]
        (tmp_path / "run").mkdir(exist_ok=True)
        return guards.judge(cfg, Store(cfg.store), both, EvalSet(rows, "key"), tmp_path / "run").evaluation

    return run


def truth(side: str, prompt: str) -> str:
    """What both models know."""
    first = int(prompt.split("What is ")[1].split()[0])
    return "0" if "minus" in prompt else str(2 * first)


def test_a_loss_on_a_guard_is_found_and_none_is_not(tmp_path: Path, judge: Judge) -> None:
    cfg = mounted(tmp_path, "eval.guards.sums.scoring.margin=0.1")
    same = judge(cfg, truth)
    (guard,) = same.guards
    assert (guard.name, guard.evaluation.task, guard.evaluation.finetuned.n) == ("sums", "number", 40)
    assert tables.guard_result(guard) == "no worse"
    forgets = judge(cfg, lambda side, prompt: "0" if side == "finetuned" else truth(side, prompt))
    assert forgets.comparison is not None
    assert forgets.comparison.delta == 0
    assert tables.guard_result(forgets.guards[0]) == "worse"
    assert forgets.guards[0].evaluation.finetuned.correct == 1
    assert (tmp_path / "run" / "guards" / "sums" / "predictions" / "finetuned.jsonl").is_file()


def test_a_guard_has_its_own_scoring(tmp_path: Path) -> None:
    cfg = mounted(
        tmp_path,
        "eval.reading=last",
        "eval.smallest_gain=0.03",
        "eval.guards.sums.scoring.task=number",
        "eval.guards.sums.scoring.max_tokens=7",
        "eval.guards.sums.scoring.max_rows=9",
        "eval.guards.sums.scoring.group_by=kind",
    )
    own, test = guards.read(cfg, Store(cfg.store), "sums")
    assert (own.eval.task, own.eval.max_tokens, own.eval.extract) == ("number", 7, None)
    assert (own.eval.smallest_gain, own.eval.margin, own.eval.reading) == (0, 0.05, "strict")
    assert (len(test.examples), {row.subgroup for row in test.examples}) == (9, {"even"})


def test_problems_of_a_guard_name_its_keys(tmp_path: Path) -> None:
    rows = [{"question": "Why?", "answer": "Because."}]
    guard = f"eval.guards.why.name_or_path={write_rows(tmp_path / 'why.jsonl', rows)}"
    command = ["model=tiny_random", "+dataset@eval.guards.why=question_answer", guard]
    assert problem(command) is None
    message = problem([*command, "eval.guards.why.scoring.task=choice"])
    assert message is not None
    assert "eval.guards.why.scoring.task=choice: test row 'all-000001' has no letters" in message
    message = problem([*command, "eval.guards.why.scoring.group_by=kind"])
    assert message is not None
    assert message.startswith("eval.guards.why.scoring.group_by='kind': there is no such column")
    message = problem(["model=tiny_random", command[1].lstrip("+"), guard])
    assert message is not None
    assert message.endswith("is not set yet; write +dataset@eval.guards.why=question_answer")
    assert str(problem([*command, "eval.baseline=false"])).startswith("eval.baseline=false: eval.guards compares")
