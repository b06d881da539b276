"""Five commands give the numbers that they gave before: tests/golden has the ``run.json`` of schema version 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import REPORTED, quick, whole

from sftlab.results import Comparison, Evaluation, ModelResult, RunRecord, Selection
from sftlab.runtime.run import Run, read_record

GOLDEN = Path(__file__).parent / "golden"
TINY = ["model=tiny_random", "instance=cpu", "instance.bf16=false", "tracking=none", "train.max_length=768"]
GENERATION = ["eval.engine=transformers", "eval.dtype=float32", "eval.max_tokens=8"]
CONSTANT = ["train.lr_scheduler_type=constant", "train.warmup_steps=0", "select.tie=lowest"]
# The prompts of slds when the file was recorded.
SYSTEM = (
    "You summarise decisions of the Swiss Federal Supreme Court. Write the headnote of the decision in German: the "
    "questions of law that it decides, and nothing else."
)
PROMPTS = [f"dataset.system='{SYSTEM}'", "dataset.user='{{ decision }}'"]
COMPARED = ["mode=compare", "hydra.run.dir=run", "tracking=none"]
COMMANDS = {
    "demo": [*TINY, *GENERATION, "dataset.max_rows=32", "hydra.run.dir=run"],
    "sweep": [
        *("-m", *TINY, *CONSTANT, "mode=train", "dataset.max_rows=24", "hydra.sweep.dir=run"),
        *("train.learning_rate=1e-3,5e-3", "train.num_train_epochs=1,2"),
    ],
    "rouge": [
        *("+experiment=slds", *TINY, *GENERATION, "dataset.name_or_path=decisions", "dataset.allow_overlap=true"),
        *PROMPTS,
        *("train.warmup_steps=0", "mode=evaluate", "eval.name_or_path=random:qwen3", "hydra.run.dir=run"),
    ],
    "plan": [*TINY, "mode=plan", "dataset.max_rows=32", "hydra.run.dir=run"],
    "compare": [*COMPARED, "eval.predictions=[choice_baseline.jsonl,choice_finetuned.jsonl]", "eval.group_by=topic"],
    "compare_rouge": [
        *(*COMPARED, "eval.predictions=[rouge_baseline.jsonl,rouge_finetuned.jsonl]", "eval.task=rouge"),
        "eval.group_by=law_area",
    ],
}
LOSS = 2e-3  # relative: float32 sums differ in their last bits from CPU to CPU, and training amplifies them
EXACT = 1e-9


def before_and_after(folder: Path, name: str) -> tuple[RunRecord, RunRecord]:
    """The record of a command before, and now."""
    path = GOLDEN / f"{name}.json"
    before = read_record(path, json.loads(path.read_text("utf-8")))
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    done = quick(folder, *COMMANDS[name], modules=REPORTED) if "compare" in name else whole(folder, *COMMANDS[name])
    assert done.returncode == 0, done.stderr
    return before, Run.read(folder / "run").record


def same_selection(before: Selection | None, after: Selection | None) -> None:
    assert before is not None
    assert after is not None
    for field in ("metric", "step", "epoch", "job"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.eval_loss == pytest.approx(before.eval_loss, rel=LOSS)
    assert after.lowest_eval_loss == pytest.approx(before.lowest_eval_loss, rel=LOSS)
    for new, old in zip(after.candidates, before.candidates, strict=True):
        assert (new.job, new.epoch, new.step, new.overrides) == (old.job, old.epoch, old.step, old.overrides)
        assert new.eval_loss == pytest.approx(old.eval_loss, rel=LOSS)
        assert new.train_loss == pytest.approx(old.train_loss, rel=LOSS)


def same_result(before: ModelResult | None, after: ModelResult | None) -> None:
    assert before is not None
    assert after is not None
    exact = {"value", "interval", "scores", "readings"}
    added = {"answers", "groups", "knowledge", "cost"}
    assert after.model_dump(exclude=exact | added) == before.model_dump(exclude=exact | added)
    assert {name: after.readings[name] for name in before.readings} == before.readings  # there may be more by now
    assert after.value == pytest.approx(before.value, abs=EXACT)
    assert after.interval == pytest.approx(before.interval, abs=EXACT)
    assert after.scores == pytest.approx(before.scores, abs=EXACT)


def same_comparison(before: Comparison | None, after: Comparison | None) -> None:
    assert before is not None
    assert after is not None
    assert str(after.verdict).startswith(str(before.verdict))  # notes may follow
    assert (after.verdict.outcome, after.verdict.judged) == (before.verdict.outcome, before.verdict.judged)
    for field in ("metric", "n", "gained", "lost", "both_right", "both_wrong", "groups", "level"):
        assert getattr(after, field) == getattr(before, field), field
    for field in ("baseline", "finetuned", "delta", "interval", "p_value", "smallest_visible_difference"):
        assert getattr(after, field) == pytest.approx(getattr(before, field), abs=EXACT), field
    assert (after.forced is None) == (before.forced is None)
    if before.forced is not None:
        same_comparison(before.forced, after.forced)


def same_evaluation(before: Evaluation | None, after: Evaluation | None) -> None:
    assert before is not None
    assert after is not None
    assert after.task == before.task
    same_result(before.baseline, after.baseline)
    same_result(before.finetuned, after.finetuned)
    same_comparison(before.comparison, after.comparison)
    assert (after.subgroups is None) == (before.subgroups is None)
    if before.subgroups is not None and after.subgroups is not None:
        texts: dict[str, Any] = {"groups": {"__all__": {"baseline", "finetuned", "difference"}}, "note": True}
        assert after.subgroups.model_dump(exclude=texts) == before.subgroups.model_dump(exclude=texts)
        for new, old in zip(after.subgroups.groups, before.subgroups.groups, strict=True):
            for side in ("baseline", "finetuned", "difference"):
                assert flat(getattr(new, side)) == pytest.approx(flat(getattr(old, side)), abs=EXACT)


def flat(record: Any) -> dict[str, float]:
    """The numbers of a record, each end of an interval by its own name."""
    values = {} if record is None else record.model_dump()
    ends = values.pop("interval", None) or ()
    return {**{name: value for name, value in values.items() if value is not None}, **dict(enumerate(ends))}


@pytest.mark.smoke
def test_a_demo_run(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path, "demo")
    same_selection(before.selection, after.selection)
    assert before.receipt is not None
    assert after.receipt is not None
    for field in (
        *("parameters", "trainable_parameters", "effective_batch", "optimizer_steps", "supervised_tokens"),
        *("supervised_share", "truncated_rows", "left_out_rows", "prompt_bos", "base_dtype", "autocast", "loss"),
    ):
        assert getattr(after.receipt, field) == getattr(before.receipt, field), field
    assert after.overlap == before.overlap
    assert before.merge is not None
    assert after.merge is not None
    assert after.merge.adapter_loss == pytest.approx(before.merge.adapter_loss, rel=LOSS)
    assert (after.merge.rows, after.merge.tensors) == (before.merge.rows, before.merge.tensors)
    assert {**after.stages}.keys() == before.stages.keys()
    same_evaluation(before.evaluation, after.evaluation)


@pytest.mark.smoke
def test_a_sweep(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path, "sweep")
    same_selection(before.selection, after.selection)
    assert [(job.job, job.overrides, job.status, job.ranked) for job in after.jobs] == [
        (job.job, job.overrides, job.status, job.ranked) for job in before.jobs
    ]


@pytest.mark.smoke
def test_a_rouge_evaluation(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path, "rouge")
    same_evaluation(before.evaluation, after.evaluation)


@pytest.mark.smoke
def test_a_plan(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path, "plan")
    machine = {"capacity_gib", "seconds_per_epoch", "timed_by", "epochs"}  # the last one is newer than the file
    for new, old in zip(after.plan, before.plan, strict=True):
        assert new.model_dump(exclude={*machine, "memory", "training_gib", "generation_gib"}) == old.model_dump(
            exclude={*machine, "memory", "training_gib", "generation_gib"}
        )
        # The memory of loaded libraries is measured.
        assert {**new.memory, "libraries": 0} == pytest.approx({**old.memory, "libraries": 0}, rel=1e-6)
        for part in ("training_gib", "generation_gib"):
            assert getattr(new, part) == pytest.approx(getattr(old, part), abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "compare_rouge"])
def test_a_comparison_of_two_files(tmp_path: Path, name: str) -> None:
    before, after = before_and_after(tmp_path, name)
    same_evaluation(before.evaluation, after.evaluation)
    assert after.sources == before.sources
