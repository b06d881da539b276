from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import compose, problem, write_model, write_rows
from test_cli import REPORTED, quick

from sftlab.config import RunsConfig
from sftlab.dataset import basics
from sftlab.eval import guards, release
from sftlab.eval import stage as evaluate
from sftlab.eval.contenders import Contender, EvalSet
from sftlab.eval.statistics import Limits, compare
from sftlab.model import base as models
from sftlab.records import Example, Generation, single_turn
from sftlab.report import page, publish, runs, tables
from sftlab.report.card import card
from sftlab.results import Comparison, Evaluation, Guard, ModelResult, RunRecord
from sftlab.runtime import listing
from sftlab.runtime.run import Run
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

    def run(cfg: Any, script: Script, questions: int = 40, wrap: Any = lambda make: make) -> Evaluation:
        def answered(model: Any, prompts: Any) -> Any:
            rows = [Generation(row.id, row.text, script(model.identity, row.text), "stop", 1) for row in prompts.rows]
            stage = SimpleNamespace(path=tmp_path)
            return SimpleNamespace(rows=lambda repeat: rows, stage=stage, seconds=0.0, seconds_per_token=None)

        def make_all(store: Store, model: Any, sets: Any, *_: Any) -> Any:
            return [answered(model, prompts) for prompts in sets]

        def make_each(store: Store, model: Any, requests: Any, *_: Any) -> Any:
            return [answered(model, request.prompts) for request in requests]

        monkeypatch.setattr(evaluate, "make_all", wrap(make_all))
        monkeypatch.setattr(evaluate, "make_each", wrap(make_each))
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
        "eval.chain=[baseline,finetuned]",
    )
    own, test = guards.read(cfg, Store(cfg.store), "sums")
    assert (own.eval.task, own.eval.max_tokens, own.eval.extract) == ("number", 7, None)
    assert own.eval.chain == []  # its models answer the test set only
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


def decided(evaluation: Evaluation) -> tuple[str, dict[str, str]]:
    assert evaluation.decision is not None
    return evaluation.decision.outcome, {one.name: one.outcome for one in evaluation.decision.conditions}


@pytest.mark.slow
def test_an_overfitted_model_is_kept_back_by_the_shipped_guard_and_a_healthy_one_is_not(
    tmp_path: Path, judge: Judge
) -> None:
    cfg = mounted(tmp_path, "+dataset@eval.guards.basics=guard_basics", "~eval.guards.sums")
    known = {row["question"]: row["answer"] for row in basics.rows(250, cfg.eval.guards["basics"].seed)}

    def base(prompt: str) -> str:
        """The base model: it knows two of three answers to the guard, and half of those to the test set."""
        question = prompt.split("<user>")[1].split("</s>")[0]
        if question not in known:
            return "0" if len(question) % 2 else "1"
        return known[question] if sum(map(ord, question)) % 3 else "I like trains."

    def overfitted(side: str, prompt: str) -> str:
        return "0" if side == "finetuned" else base(prompt)

    def healthy(side: str, prompt: str) -> str:
        other = side == "finetuned" and ("minus" in prompt or sum(map(ord, prompt)) % 31 == 0)
        return (
            ("0" if "minus" in prompt else known[prompt.split("<user>")[1].split("</s>")[0]]) if other else base(prompt)
        )

    one_answer, careful = judge(cfg, overfitted, 120), judge(cfg, healthy, 120)
    for evaluation in (one_answer, careful):  # both are better on the test set
        assert evaluation.comparison is not None
        assert evaluation.comparison.verdict.outcome == "better"
    assert decided(one_answer) == ("keep_base", {"test set": "holds", "basics": "fails"})
    assert decided(careful) == ("ship", {"test set": "holds", "basics": "holds"})
    assert "guard basics" in (tables.decision(one_answer) or "")
    by_kind = one_answer.guards[0].evaluation.subgroups
    assert by_kind is not None
    assert {group.name for group in by_kind.groups} == set(basics.KINDS)


def comparison(gained: int, lost: int, n: int, limits: Limits) -> Comparison:
    a, b = [False] * n, [False] * n
    a[:lost] = [True] * lost
    b[lost : lost + gained] = [True] * gained
    return compare(a, b, groups=None, alpha=0.05, limits=limits)


def evaluation(test: Comparison, *losses: Comparison) -> Evaluation:
    result = ModelResult(
        metric="accuracy",
        value=0.5,
        interval=(0.4, 0.6),
        level=0.95,
        n=200,
        unparsed=0,
        truncated=0,
        finish_reasons=200,
    )
    both = {"task": "exact", "finetuned": result, "baseline": result}
    others = [
        Guard(name=f"guard {n}", data="data", evaluation=Evaluation(**both, comparison=one))
        for n, one in enumerate(losses)
    ]
    return release.decided(Evaluation(**both, comparison=test, guards=others))


# The same model twice, with sampled answers: a tenth of them differ.
@pytest.mark.slow
def test_the_decision_about_equal_models_flips_in_at_most_one_of_twenty_cases() -> None:
    rng, outcomes = np.random.default_rng(7), []
    for _ in range(200):
        gained, lost, _rest = rng.multinomial(250, [0.1, 0.1, 0.8], size=2).T
        limits = Limits(margin=0.05)
        first, *others = (comparison(g, k, 250, limits) for g, k in zip(gained, lost, strict=True))
        outcomes.append(decided(evaluation(first, *others))[0])
    assert outcomes.count("undecided") >= 0.95 * 200
    assert len(set(outcomes)) > 1  # with this seed some flip


@pytest.mark.slow
def test_a_model_that_loses_the_margin_ships_in_at_most_one_of_twenty_cases() -> None:
    rng, shipped = np.random.default_rng(8), 0
    better, kept = (comparison(*counts, 250, Limits(margin=0.05)) for counts in ((60, 10), (10, 9)))
    for _ in range(200):
        gained, lost, _rest = rng.multinomial(250, [0.03, 0.08, 0.89])
        shipped += decided(evaluation(better, comparison(gained, lost, 250, Limits(margin=0.05)), kept))[0] == "ship"
    assert shipped <= 0.075 * 200


def test_the_decision_needs_every_condition_and_names_what_is_open() -> None:
    limits = Limits(margin=0.05)
    better, open_, same = (comparison(*counts, limits) for counts in ((60, 10, 250), (20, 18, 250), (5, 5, 250)))
    worse, loses = comparison(10, 60, 250, limits), comparison(5, 60, 250, limits)
    assert decided(evaluation(better))[0] == "ship"
    assert decided(evaluation(better, same, same))[0] == "ship"
    assert decided(evaluation(worse))[0] == "keep_base"
    assert decided(evaluation(worse, same))[0] == "keep_base"
    assert decided(evaluation(better, same, loses)) == (
        "keep_base",
        {"test set": "holds", "guard 0": "holds", "guard 1": "fails"},
    )
    assert decided(evaluation(open_, same))[0] == "undecided"
    unsure = evaluation(better, comparison(20, 25, 250, limits))
    assert decided(unsure)[0] == "undecided"
    assert unsure.decision is not None
    assert (unsure.decision.conditions[1].needed or 0) > 250
    small = comparison(5, 5, 2000, Limits(smallest_gain=0.03, margin=0.05))
    assert decided(evaluation(small))[0] == "keep_base"


@pytest.mark.parametrize(("outcomes", "code"), [
    (["ship"], 0), (["keep_base"], 3), (["undecided"], 4), (["keep_base", "ship"], 0), (["keep_base", "undecided"], 4),
    ([], 0),  # another machine than the first decides nothing
])  # fmt: skip
def test_exit_codes(outcomes: list[str], code: int) -> None:
    limits = Limits(margin=0.05)
    of = {"ship": (60, 10, 250), "keep_base": (10, 60, 250), "undecided": (20, 18, 250)}
    found = [evaluation(comparison(*of[outcome], limits)) for outcome in outcomes]
    run = {"id": "", "status": "success", "experiment": "", "mode": "", "command": "", "started": "", "seed": 0}
    rows = [{"job": n, "overrides": [], "status": "success", "evaluation": one} for n, one in enumerate(found)]
    assert release.exit_code(RunRecord.model_validate({**run, "evaluations": rows if len(rows) > 1 else []} | (
        {"evaluation": found[0]} if len(found) == 1 else {}))) == code  # fmt: skip


@pytest.mark.parametrize("seed", [42, 1])
def test_every_question_of_the_shipped_guard_has_a_right_answer(seed: int) -> None:
    rows = basics.rows(250, seed)
    assert len({row["question"] for row in rows}) == 250
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in basics.KINDS} == dict.fromkeys(basics.KINDS, 50)
    for row in rows:
        assert re.search(row["target"], row["answer"]), row
        assert not re.search(row["target"], "The answer is (B)."), row
        if row["kind"] in ("arithmetic", "common facts"):
            assert not re.search(row["target"], row["question"]), row
    for answer in {row["answer"] for row in rows} - {"unknown"}:
        assert sum(bool(re.search(row["target"], answer)) for row in rows) <= 6, answer
    assert basics.rows(20, seed) == rows[:20]


def test_page_card_and_list_show_guards_and_decision(tmp_path: Path) -> None:
    limits = Limits(margin=0.05)
    better, loses = (comparison(*counts, limits) for counts in ((60, 10, 250), (2, 90, 250)))
    fields = {"id": "a", "status": "success", "experiment": "demo", "mode": "all", "command": "", "seed": 0}
    started = {"started": "2026-11-28T00:00:00+00:00"}
    places = {"good": evaluation(better), "bad": evaluation(better, loses)}
    for name, made in places.items():
        record = RunRecord.model_validate({**fields, **started, "evaluation": made})
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "run.json").write_text(record.model_dump_json(), "utf-8")
        text = page.render(tmp_path, RunRecord.model_validate_json(record.model_dump_json()))
        assert ('<h2 id="guards-title">' in text) == (name == "bad")
        reason = "Keep_base: a loss above the margin on guard guard 0 (adjusted p &lt; 0.0001)"
        assert (reason in text.replace("\N{NO-BREAK SPACE}", " ")) == (name == "bad")
    settings = RunsConfig.model_validate(
        {"outputs": "outputs", "sort": "started", "limit": None, "decision": "keep_base"}
        | dict.fromkeys(("name", "data", "model", "status", "verdict", "since"))
    )
    listed = runs.rows(listing.runs(tmp_path / "outputs", tmp_path / "store"), tmp_path / "outputs")
    assert {row.place: row.decision for row in listed} == {"good": "ship", "bad": "keep_base"}
    assert [row.place for row in runs.selected(listed, settings)] == ["bad"]
    text = card(RunRecord.model_validate({**fields, **started, "evaluation": places["bad"]}), mounted(tmp_path))
    assert "## Guards" in text
    assert "Decision: keep\\_base: a loss above the margin on guard guard 0" in text


def test_guards_with_the_same_token_limit_share_a_start_of_the_engine(tmp_path: Path, judge: Judge) -> None:
    more = ["+dataset@eval.guards.more=question_answer", f"eval.guards.more.name_or_path={tmp_path / 'sums.jsonl'}"]
    longer = ["+dataset@eval.guards.basics=guard_basics", "eval.guards.basics.scoring.max_rows=20"]
    starts: list[int] = []

    def counted(make_all: Any) -> Any:
        def make(store: Store, model: Any, sets: Any, *settings: Any) -> Any:
            starts.append(len(sets))
            return make_all(store, model, sets, *settings)

        return make

    cfg = mounted(tmp_path, *more, "eval.guards.more.id=null", *longer)
    found = judge(cfg, lambda side, prompt: "0", wrap=counted)
    assert [guard.name for guard in found.guards] == ["sums", "more", "basics"]
    # Of each model: the test set with all guards; what follows finds them in the store, two guards together, one alone.
    assert sorted(starts) == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(("counts", "pushed"), [((60, 10, 250), 1), ((20, 18, 250), 0), ((10, 60, 250), 0)])
def test_with_the_gate_only_a_model_that_ships_is_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int, int], pushed: int
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(publish, "push", lambda folder, *_, **__: calls.append(folder))
    cfg = mounted(tmp_path, "eval.gate=true", "hub.push=true", "hub.repo_id=owner/name")
    run = Run.start(tmp_path, name="demo", mode="all", seed=0, command="")
    run.update(evaluation=evaluation(comparison(*counts, Limits(margin=0.05))))
    publish.publish(run, cfg)
    assert len(calls) == pushed
    assert (tmp_path / "model_card.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gained", "lost", "gate", "code"), [(40, 10, True, 0), (10, 40, True, 3), (10, 9, True, 4), (10, 40, False, 0)]
)
def test_the_gate_decides_the_exit_code_of_the_command(
    tmp_path: Path, gained: int, lost: int, gate: bool, code: int
) -> None:
    answers = {"base": [False] * gained + [True] * lost, "tuned": [True] * gained + [False] * lost}
    for name, right in answers.items():
        rows = [
            {"id": f"q{n}", "completion": "yes" if one else "no", "target": "yes"}
            for n, one in enumerate([*right, *[True] * 60])
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    settings = ["mode=compare", "eval.task=exact", "eval.predictions=[base.jsonl,tuned.jsonl]", "hydra.run.dir=run"]
    done = quick(tmp_path, *settings, f"eval.gate={str(gate).lower()}", modules=REPORTED)
    assert done.returncode == code, done.stderr
    assert "Decision: " in done.stdout
