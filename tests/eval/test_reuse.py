"""The ledger of test sets counts every judged model once, and the correction holds its error rate."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sftlab.config import Config
from sftlab.errors import StageError
from sftlab.eval import contenders, judging, reuse
from sftlab.eval import stage as evaluate
from sftlab.eval.contenders import Contender, EvalSet
from sftlab.eval.prompts import Prompts
from sftlab.eval.statistics import compare
from sftlab.model.base import Base
from sftlab.records import Example, Generation, single_turn
from sftlab.report.caveats import caveats
from sftlab.results import Comparison, Evaluation, Part, Split
from sftlab.runtime import ledger
from sftlab.runtime.clean import clean
from sftlab.runtime.ledger import Place
from sftlab.runtime.run import Run
from sftlab.runtime.store import Stage, Store

Make = Callable[..., Config]
ROWS = [Example(f"q{number}", single_turn("Be brief.", f"Question {number}", ""), "A", "AB") for number in range(12)]


def recorded(store: Path, model: str) -> Place:
    return ledger.record(store, "0" * 16, model, "study")


def test_models_are_numbered_once_in_their_order(tmp_path: Path) -> None:
    places = [recorded(tmp_path, model) for model in ("a", "b", "a", "c", "b")]
    assert [(place.number, place.models) for place in places] == [(1, 1), (2, 2), (1, 2), (3, 3), (2, 3)]
    assert ledger.record(tmp_path, "1" * 16, "a", "study") == Place(1, 1)


def test_runs_at_the_same_time_take_different_numbers(tmp_path: Path) -> None:
    models = [f"model {number % 12}" for number in range(48)]
    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda model: recorded(tmp_path, model), models))
    numbers = {(model, place.number) for model, place in zip(models, places, strict=True)}
    assert sorted(number for _, number in numbers) == list(range(1, 13))
    assert sorted(ledger.judged(tmp_path, "0" * 16)) == list(range(1, 13))


def test_a_kill_while_an_entry_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, "a")
    if (child := os.fork()) == 0:
        monkeypatch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        recorded(tmp_path, "b")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert recorded(tmp_path, "c") == Place(2, 2)
    assert recorded(tmp_path, "b") == Place(3, 3)


def test_a_damaged_or_deleted_entry_is_not_given_to_another_model(tmp_path: Path) -> None:
    for model in "abcd":
        recorded(tmp_path, model)
    folder = tmp_path / ledger.LEDGER / ("0" * 16)
    (folder / "2.json").write_text("{", "utf-8")
    (folder / "3.json").unlink()
    assert recorded(tmp_path, "e") == Place(5, 5)
    assert recorded(tmp_path, "d") == Place(4, 5)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("", "utf-8")
    with pytest.raises(StageError, match="ledger of test sets cannot be written"):
        recorded(tmp_path / "store", "a")


def test_clean_retains_the_ledger(tmp_path: Path) -> None:
    store = tmp_path / "outputs" / "store"
    unused = Store(store).stage("model", {"seed": 1}, lambda folder: (folder / "x").write_text("x") and None)
    Run.start(tmp_path / "outputs" / "run", name="x", mode="train", seed=1, command="").finish("success")
    recorded(store, "a")
    os.utime(unused.path / "manifest.json", (0, 0))
    clean(store, tmp_path / "outputs", delete=True)
    assert not unused.path.exists()
    assert recorded(store, "b") == Place(2, 2)


def test_a_test_set_is_its_questions_and_right_answers() -> None:
    key = reuse.rows_key(ROWS)
    renamed = [
        replace(row, id=f"other {row.id}", messages=single_turn("Think.", row.question, ""), group="g")
        for row in reversed(ROWS)
    ]
    assert reuse.rows_key(renamed) == key
    for changed in (replace(ROWS[0], messages=single_turn("", "Another?", "")), replace(ROWS[0], target="B")):
        assert reuse.rows_key([changed, *ROWS[1:]]) != key
    assert reuse.rows_key(ROWS[1:]) != key


class Judge:
    """``judging.judge`` without a tokenizer and an engine: the base is wrong on every row, the others are right."""

    def __init__(self, store: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.cfg = Store(store), cfg
        monkeypatch.setattr(contenders, "prompts", lambda *_: Prompts([], {}))
        monkeypatch.setattr(evaluate, "make_all", lambda *arguments: [self.generated(*arguments)])

    def generated(self, store: Store, model: evaluate.Model, *_: object) -> evaluate.Generated:
        letter = "B" if model.identity == "base" else "A"
        rows = [Generation(row.id, row.question, f"The answer is ({letter}).", "stop", 5) for row in ROWS]
        folder = self.store.root / f"answers-{model.identity}"
        folder.mkdir(parents=True, exist_ok=True)
        Generation.write(folder / "generations.jsonl", rows)
        return evaluate.Generated(Stage("generations", "0" * 16, folder, cached=False, seconds=0.0))

    def __call__(self, identity: str, path: Path | None = None, **changes: object) -> Evaluation:
        cfg = self.cfg.model_copy(update={"eval": self.cfg.eval.model_copy(update=changes)})
        both = {
            name: Contender.of(Base(name, path or self.store.root / name, identity, False, None))
            for name, identity in (("baseline", "base"), ("finetuned", identity))
        }
        (self.store.root / "run").mkdir(exist_ok=True)
        return judging.judge(cfg, self.store, both, EvalSet(ROWS, "0"), self.store.root / "run").evaluation


@pytest.fixture
def judge(tmp_path: Path, config: Make, monkeypatch: pytest.MonkeyPatch) -> Judge:
    return Judge(tmp_path, config("instance=cpu", "eval.forced=false"), monkeypatch)


def test_evaluation_counts_models_and_not_commands(judge: Judge) -> None:
    for identity, number, models in (("one", 1, 1), ("two", 2, 2), ("one", 1, 2)):
        judged = judge(identity)
        assert judged.reuse is not None
        assert (judged.reuse.number, judged.reuse.models, judged.reuse.rows) == (number, models, 12)
        assert f"Model {number if number == models else '1 of 2'} judged on these 12 questions" in " ".join(
            caveats(judged, "all", 1)
        )
    assert judge("two", max_tokens=7, reading="lenient", baseline=False).reuse is not None
    assert judge("base").reuse is None  # compared with itself
    assert len(ledger.judged(judge.store.root, reuse.rows_key(ROWS))) == 2


def test_a_merged_model_counts_once_by_its_stage_or_its_folder(judge: Judge) -> None:
    stage = judge.store.stage("merged", {"step": 1}, lambda folder: (folder / "x").write_text("x") and None)
    link = judge.store.root / "merged-model"
    link.symlink_to(stage.path)
    assert [ledger.name_of(path, "content") for path in (stage.path, link)] == [stage.key] * 2
    assert ledger.name_of(judge.store.root, "content") == "content"


@pytest.mark.slow
def test_the_correction_adjusts_p_and_the_verdict(judge: Judge) -> None:
    raw = judge("one").comparison
    assert raw is not None
    assert raw.verdict.outcome == "better"
    assert raw.p_adjusted is None
    outcomes = []
    for number in range(1, 12):
        compared = judge(f"{number}" if number > 1 else "one", correct_for_reuse=True).comparison
        assert compared is not None
        assert compared.p_adjusted == pytest.approx(min(1, raw.p_value * number * (number + 1)))
        assert compared.p_value == raw.p_value
        outcomes.append(compared.verdict.outcome)
    assert outcomes == ["better"] * outcomes.count("better") + ["inconclusive"] * outcomes.count("inconclusive")
    assert set(outcomes) == {"better", "inconclusive"}


def test_the_correction_adjusts_the_difference_in_knowledge() -> None:
    part = Part(value=0.1, interval=(0.02, 0.18))
    split = Split(knowledge=part, guessing=part, form=part, level=0.95, p_value=0.02, outcome="better")
    raw = compared(20, 0).model_copy(update={"split": split})
    for number, outcome in ((1, "better"), (2, "inconclusive")):
        adjusted = reuse.corrected(raw, number, 0.05).split
        assert adjusted is not None
        assert (adjusted.p_adjusted, adjusted.outcome) == (pytest.approx(0.02 * number * (number + 1)), outcome)
        assert adjusted.p_value == 0.02


@cache
def compared(gained: int, lost: int, n: int = 200) -> Comparison:
    """The comparison of two models with so many changes. Rows that do not change, change nothing."""
    second = np.arange(n) < gained
    first = (np.arange(n) >= gained) & (np.arange(n) < gained + lost)
    return compare(first.tolist(), second.tolist(), groups=None, alpha=0.05)


@pytest.fixture(scope="module")
def studies() -> NDArray[np.int_]:
    """In each of 1,000 studies the answers gained and lost by 20 models that are no better than their base."""
    draw = np.random.default_rng(16)
    studies = []
    for _ in range(1000):
        sure = draw.random(200) < 0.5
        right = np.where(sure, draw.random(200) < 0.5, draw.beta(0.8, 0.8, 200))
        base, models = draw.random(200) < right, draw.random((20, 200)) < right
        studies.append(np.stack([(models & ~base).sum(1), (~models & base).sum(1)], axis=1))
    return np.stack(studies)


def share(studies: NDArray[np.int_], *outcomes: str, correct: bool) -> float:
    """The share of studies in which at least one model has one of these verdicts."""

    def called(row: NDArray[np.int_], number: int) -> bool:
        result = compared(int(row[0]), int(row[1]))
        return (reuse.corrected(result, number, 0.05) if correct else result).verdict.outcome in outcomes

    return sum(any(called(row, at + 1) for at, row in enumerate(study)) for study in studies) / len(studies)


@pytest.mark.slow
def test_twenty_models_that_change_nothing(studies: NDArray[np.int_]) -> None:
    stated = reuse.chance_of_better(20, 0.05)
    assert stated == pytest.approx(0.21, abs=0.005)
    # Tests on few questions reject less often than alpha: by exact McNemar 13 to 15 %, by mid-p about 19 %.
    assert stated - 0.09 < share(studies, "better", correct=False) < stated + 0.03
    assert share(studies, "better", "worse", correct=False) > 0.2
    assert share(studies, "better", "worse", correct=True) <= 0.05


def test_chance_of_one_model_is_half_of_alpha_and_grows() -> None:
    chances = [reuse.chance_of_better(models, 0.05) for models in (1, 2, 10, 100)]
    assert chances[0] == pytest.approx(0.025)
    assert chances == sorted(chances)
    assert chances[1] < 0.05  # less than of two tests that share nothing
