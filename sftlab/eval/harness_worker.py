"""Evaluate a model on a task of lm-evaluation-harness, in a child process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sftlab.errors import StageError
from sftlab.runtime.processes import serve
from sftlab.runtime.store import write_json

SAMPLES, METRIC = "samples.jsonl", "metric.json"


class HarnessTask(BaseModel):
    """A task, and how its model is loaded."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: str
    """Name of the task."""
    include: str | None
    """Folder with tasks; null: only those of the harness."""
    engine: Literal["vllm", "transformers"]
    """eval.engine."""
    model: str
    """Folder of the model."""
    trust_remote_code: bool
    """model.trust_remote_code."""
    device: str
    """cpu or cuda."""
    dtype: str
    """Number format."""
    batch_size: int
    """eval.batch_size, for transformers."""
    tensor_parallel_size: int
    """eval.tensor_parallel_size, for vLLM."""
    gpu_memory_utilization: float
    """eval.gpu_memory_utilization, for vLLM."""
    kv_cache_gib: float
    """eval.kv_cache_gib, for vLLM on the CPU."""


def run(folder: Path, task: HarnessTask) -> None:
    """Evaluate the task with the seeds of the harness, and write the value of its first metric for each question.

    Raises:
        StageError: the harness has no such task, the metric has no value between 0 and 1 for each question, or
            lower values of it are better.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task.include)
    if task.name not in manager.all_tasks:
        raise StageError(f"lm_eval:{task.name}: lm-evaluation-harness has no such task; `lm_eval ls tasks` lists them")
    arguments = {"pretrained": task.model, "dtype": task.dtype, "trust_remote_code": task.trust_remote_code}
    if task.engine == "vllm":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(task.kv_cache_gib))))
        _name_vllm()
        on_cpu = {"enforce_eager": True} if task.device == "cpu" else {}
        share = {} if on_cpu else {"gpu_memory_utilization": task.gpu_memory_utilization}
        arguments |= {"tensor_parallel_size": task.tensor_parallel_size, **share, **on_cpu}
    results = lm_eval.simple_evaluate(
        model="vllm" if task.engine == "vllm" else "hf",
        model_args=arguments,
        tasks=[task.name],
        task_manager=manager,
        batch_size="auto" if task.engine == "vllm" else task.batch_size,
        device=None if task.engine == "vllm" else task.device,
        bootstrap_iters=0,
        log_samples=True,
    )
    metrics = set()
    with (folder / SAMPLES).open("w", encoding="utf-8") as out:
        for name, samples in sorted(results["samples"].items()):
            metric = str(results["configs"][name]["metric_list"][0]["metric"])
            metrics.add(metric)
            if results["higher_is_better"][name].get(metric) is False:
                reason = f"lower values of its metric {metric} are better, and a guard needs the opposite"
                raise StageError(f"lm_eval:{task.name}: {reason}; use another task as a guard")
            for sample in samples:
                if sample["filter"] != samples[0]["filter"]:  # the same answers, extracted in another way
                    continue
                value = sample.get(metric)
                if not isinstance(value, int | float) or not 0 <= value <= 1:
                    reason = f"its metric {metric} has the value {value!r} for a question, and not one between 0 and 1"
                    raise StageError(f"lm_eval:{task.name}: {reason}; use another task as a guard")
                out.write(json.dumps({"id": f"{name}/{sample['doc_id']}", "value": float(value)}) + "\n")
    write_json(folder / METRIC, {"metric": ", ".join(sorted(metrics))})


def _name_vllm() -> None:
    """Let the harness read vLLM's version where the package is vllm-cpu."""
    from importlib import metadata

    version = metadata.version

    def of(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{version('vllm-cpu')}+cpu"  # by which vLLM recognises its platform

    metadata.version = of


if __name__ == "__main__":
    serve(HarnessTask, run)
