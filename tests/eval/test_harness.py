from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import compose, problem, write_model
from omegaconf import OmegaConf

from sftlab.config import Config
from sftlab.errors import StageError
from sftlab.eval import harness, harness_worker
from sftlab.eval.contenders import Contender
from sftlab.eval.harness_tasks import Folder
from sftlab.model import base as models
from sftlab.report import tables
from sftlab.runtime.processes import Child
from sftlab.runtime.store import Store, key_of

TASK = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def counting(folder: Path) -> Path:
    """A local folder with a task of 24 questions."""
    (folder / "tasks").mkdir()
    rows = [{"question": f"After {n} comes", "options": [f" {n + 1}", " a cat"], "answer": n % 2} for n in range(24)]
    file = folder / "counting.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "tasks" / "counting.yaml").write_text(TASK.format(file=file), "utf-8")
    return folder / "tasks"


def unchecked(folder: Path, *overrides: str) -> Config:
    settings = ["model=tiny_random", f"store={folder / 'store'}", "eval.engine=transformers", "eval.dtype=float32"]
    return Config.model_validate(OmegaConf.to_container(compose(*settings, *overrides), resolve=True))


def test_a_task_is_a_guard_beside_those_with_rows(tmp_path: Path) -> None:
    cfg = unchecked(tmp_path, "+eval.guards.arc=lm_eval:arc_easy", "+dataset@eval.guards.basics=guard_basics")
    assert (cfg.eval.guard_tasks, list(cfg.eval.guards)) == ({"arc": "lm_eval:arc_easy"}, ["basics"])
    assert Config.model_validate(cfg.model_dump()) == cfg
    message = problem(["model=tiny_random", "+eval.guards.arc=lm_eval:nowhere/arc"])
    assert message is not None
    assert "eval.guards.arc=lm_eval:nowhere/arc: no such folder of tasks" in message
    if find_spec("lm_eval") is None:
        assert (
            "eval.guards.arc=lm_eval:nowhere/arc: needs the package lm-eval; pip install 'sftlab[lm-eval]'" in message
        )


def test_models_are_compared_question_by_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = counting(tmp_path)
    cfg = unchecked(tmp_path, f"+eval.guards.counting=lm_eval:{folder}/counting")
    base = models.resolve(
        cfg.model.model_copy(update={"name_or_path": str(write_model(tmp_path / "model"))}), Store(cfg.store), 0
    )
    both = {side: Contender(harness.Model(base.path, side, False), base) for side in ("baseline", "finetuned")}
    asked: list[str] = []

    def evaluate(module: str, tasks: list[Child], **_: Any) -> None:
        (child,) = tasks
        task: Any = child.task
        asked.append(task.name)
        forgets = len(asked) > 1
        rows = [{"id": f"counting/{n}", "value": float(not forgets or n < 5)} for n in range(24)]
        (child.folder / harness.SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (child.folder / harness.METRIC).write_text('{"metric": "acc"}', "utf-8")

    monkeypatch.setattr(harness, "children", evaluate)
    guard, _ = harness.judge(cfg, Store(cfg.store), "counting", both)
    assert (guard.evaluation.finetuned.n, guard.evaluation.finetuned.correct) == (24, 5)
    assert tables.guard_result(guard) == "worse"
    again, _ = harness.judge(cfg, Store(cfg.store), "counting", both)
    assert again == guard
    assert asked == ["counting", "counting"]  # the second time, both are in the store


BROKEN = "task: [x\n"
FEW = "include: counting.yaml\ntask: counting_few\ntag: numbers\ndoc_to_text: !function helpers.text\n"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("counting", None),
        ("counting_few", None),  # its rows are those of the file that it includes
        ("numbers", None),
        ("countin", "no YAML file of the folder has this task; did you mean lm_eval:{folder}/counting?"),
        (
            "broken",
            "no other file of the folder has this task, and {folder}/broken.yaml: is not valid YAML (line 2): ",
        ),
        ("lost", "no such file of rows: nowhere.jsonl (seen from "),
    ],
)
def test_a_task_that_a_folder_lacks_is_refused_before_anything_runs(
    tmp_path: Path, task: str, expected: str | None
) -> None:
    folder = counting(tmp_path)
    (folder / "few.yaml").write_text(FEW, "utf-8")
    (folder / "lost.yaml").write_text(TASK.replace("counting", "lost").format(file="nowhere.jsonl"), "utf-8")
    if task == "broken":
        (folder / "broken.yaml").write_text(BROKEN, "utf-8")
    found = [
        str(one)
        for one in harness.problems(unchecked(tmp_path, f"+eval.guards.a=lm_eval:{folder}/{task}"))
        if "needs the package" not in one.message
    ]
    assert len(found) == (expected is not None)
    assert all((expected or "").format(folder=folder) in one for one in found), found


def test_rows_and_functions_outside_of_the_folder_are_in_the_key(tmp_path: Path) -> None:
    folder = counting(tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "base.yaml").write_text(TASK.format(file=tmp_path / "*.jsonl"), "utf-8")
    (shared / "helpers.py").write_text("def text(row): return row", "utf-8")
    (folder / "few.yaml").write_text(
        "include: ../shared/base.yaml\ntask: few\ndoc_to_text: !function ../shared/helpers.text\n"
        "generation_kwargs: {until: ['.', '/']}\n",
        "utf-8",
    )

    def key() -> str:
        return key_of(Folder.read(folder).digests())

    keys = [key()]
    for file in ("counting.jsonl", "shared/base.yaml", "shared/helpers.py", "tasks/few.yaml", "more.jsonl"):
        with (tmp_path / file).open("a", encoding="utf-8") as out:
            out.write("\n")
        keys.append(key())
    assert len(set(keys)) == len(keys)
    (tmp_path / "shared" / "unread.txt").write_text("x", "utf-8")
    assert key() == keys[-1]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (locks/lm-eval.lock)")
def test_a_task_that_the_harness_lacks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    found = {
        task: [str(one) for one in harness.problems(unchecked(tmp_path, f"+eval.guards.a=lm_eval:{task}"))]
        for task in ("arc_easy", "ai2_arc", "mmlu_astronomy", "arc_eazy")
    }
    assert found.pop("arc_eazy")[0].startswith(
        "eval.guards.a=lm_eval:arc_eazy: lm-evaluation-harness has no such task; did you mean lm_eval:arc_easy"
    )
    assert found == {"arc_easy": [], "ai2_arc": [], "mmlu_astronomy": []}


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_task_whose_lower_values_are_better_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, higher_is_better: bool
) -> None:
    results = {
        "configs": {"t": {"metric_list": [{"metric": "wer"}]}},
        "higher_is_better": {"t": {"wer": higher_is_better}},
        "samples": {"t": [{"filter": "none", "doc_id": 0, "wer": 0.5}]},
    }
    fake = SimpleNamespace(simple_evaluate=lambda **_: results)
    manager = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["t"]))
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", manager)
    task = harness_worker.HarnessTask(
        name="t", include=None, engine="transformers", model="m", trust_remote_code=False, device="cpu",
        dtype="float32", batch_size=1, tensor_parallel_size=1, gpu_memory_utilization=0.5, kv_cache_gib=1,
    )  # fmt: skip
    if higher_is_better:
        harness_worker.run(tmp_path, task)
        assert json.loads((tmp_path / harness.SAMPLES).read_text("utf-8")) == {"id": "t/0", "value": 0.5}
    else:
        with pytest.raises(StageError, match=r"lm_eval:t: lower values of its metric wer are better.*another task"):
            harness_worker.run(tmp_path, task)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (locks/lm-eval.lock)")
def test_the_harness_evaluates_a_task_of_a_local_folder(tmp_path: Path, config: Callable[..., Any]) -> None:
    folder = counting(tmp_path)
    settings = ["model=tiny_random", f"store={tmp_path / 'store'}", "eval.engine=transformers", "eval.dtype=float32"]
    cfg = config(*settings, f"+eval.guards.counting=lm_eval:{folder}/counting")
    base = models.resolve(cfg.model, Store(cfg.store), 0)
    guard, stages = harness.judge(
        cfg, Store(cfg.store), "counting", dict.fromkeys(("baseline", "finetuned"), Contender.of(base))
    )
    assert guard.evaluation.finetuned.n == 24
    assert guard.evaluation.finetuned.metric == "acc"
    assert 0 < (guard.evaluation.finetuned.correct or 0) < 24
    assert stages["finetuned"].cached
