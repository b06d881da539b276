#!/usr/bin/env python
r"""Measure how long it takes to rank checkpoints by their answers: one engine for all, against an engine for each.

    python -m sftlab mode=train train.eval_steps=0.1 train.num_train_epochs=1 hydra.run.dir=RUN \
        "dataset.split={train: 96, validation: 48, test: 40}"
    scripts/bench_select.py RUN

The run needs mode=train and any metric. Each way starts with an empty store, apart from base model, dataset and
trainings. Prints the seconds of both ways, their ratio, and the share of rows with the same answer and the same text.
``--each 4`` measures the second way with four of the checkpoints, and scales its seconds to all.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from tempfile import mkdtemp

from sftlab.dataset import stage as dataset
from sftlab.eval import checkpoints
from sftlab.eval import stage as evaluate
from sftlab.eval.prompts import tokenize_prompts
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model import merge
from sftlab.records import Candidate, Generation
from sftlab.runtime.job import Job, jobs
from sftlab.runtime.store import Store

SHARED = ("model", "dataset", "train", "tokens", "precision")


def timed(run: Path, measure: Callable[[Sequence[Job]], None]) -> tuple[float, float, Path]:
    """Wall-clock and CPU seconds of a way to answer, in a store of its own; and this store."""
    folder = Path(mkdtemp(prefix="sftlab-"))
    records = [job.model_copy(update={"config": {**job.config, "store": str(folder)}}) for job in jobs(run)]
    own = Path(str(jobs(run)[0].config["store"])).resolve()
    for name in SHARED:
        if (own / name).is_dir():
            (folder / name).symlink_to(own / name)
    begin, cpu = time.monotonic(), cpu_seconds()
    measure(records)
    return time.monotonic() - begin, cpu_seconds() - cpu, folder


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended: less noisy on a machine with other work."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def each(records: Sequence[Job], count: int) -> None:
    """Merge ``count`` checkpoints of each job, spread over its training, and start an engine with each."""
    for job in records:
        cfg = job.settings()
        store, machine = Store(cfg.store), instance.find(cfg.instance)
        base, data = models.resolve(cfg.model, store, cfg.seed), dataset.make(store, cfg.dataset)
        limit = cfg.select.max_rows
        settings = cfg.eval.model_copy(update={"forced": False, "logprobs": False, "repeats": 1, "max_rows": limit})
        examples = dataset.sample(data.split("validation"), limit, cfg.dataset.seed)
        prompts = tokenize_prompts(examples, base, settings)
        for candidate in spread(job.candidates, count):
            merged = merge.make(store, Path(candidate.checkpoint), base, Path(job.stages["tokens"]), machine, cfg.merge)
            model = evaluate.Model(merged.stage.path, merged.stage.key, base.trust_remote_code)
            evaluate.make(store, model, prompts, settings, machine, cfg.seed)
            store.remove(merged.stage)


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The last one, and others at equal distances before it."""
    return [candidates[len(candidates) * (place + 1) // count - 1] for place in range(min(count, len(candidates)))]


def together(records: Sequence[Job]) -> None:
    """What select.metric=score does."""
    checkpoints.validation_scores(records)


def main() -> None:
    """Run both ways, and compare their answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--each", type=int, default=4, help="checkpoints of the second way")
    arguments = parser.parse_args()
    run = arguments.run
    logging.basicConfig(level=logging.WARNING)
    total = sum(len(job.candidates) for job in jobs(run))
    measured = sum(len(spread(job.candidates, arguments.each)) for job in jobs(run))
    answers: list[dict[str, list[Generation]]] = []
    seconds = []
    for name, way, scale in (
        ("together", together, 1.0),
        ("each", partial(each, count=arguments.each), total / measured),
    ):
        wall, cpu, own = timed(run, way)
        found = Store(own).finished("generations")
        answers.append(
            {manifest["inputs"]["model"]: Generation.read(path / "generations.jsonl") for path, manifest in found}
        )
        seconds.append((wall * scale, cpu * scale))
        print(f"{name}: {wall:.0f} s, {cpu:.0f} CPU s, {len(found)} models", flush=True)
    cfg, store = jobs(run)[0].settings(), Store(jobs(run)[0].settings().store)
    rows_of = dataset.make(store, cfg.dataset).split("validation")
    examples = dataset.sample(rows_of, cfg.select.max_rows, cfg.dataset.seed)
    score, rows, same, texts = scorer(cfg.eval), 0, 0, 0
    for model in answers[0].keys() & answers[1].keys():
        pair = [score.predictions(way[model], examples) for way in answers]
        rows += len(examples)
        same += sum(one.answer == other.answer for one, other in zip(*pair, strict=True))
        texts += sum(one.completion == other.completion for one, other in zip(*pair, strict=True))
    for name, one, other in zip(("wall-clock", "CPU seconds"), *seconds, strict=True):
        print(f"{name} for {total} checkpoints: {one:.0f} against {other:.0f}, ratio {one / other:.2f}")
    print(f"{rows} rows in both: {same / rows:.1%} with the same answer, {texts / rows:.1%} with the same text")


if __name__ == "__main__":
    main()
