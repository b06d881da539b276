#!/usr/bin/env python
"""Measure how long it takes to rank checkpoints by their answers: one engine for all, against an engine for each.

    python -m sftlab mode=train train.eval_steps=0.1 train.num_train_epochs=1 hydra.run.dir=RUN
    scripts/bench_select.py RUN

The run needs mode=train and any metric. Each way starts with an empty store, apart from base model, dataset and
trainings. Prints the seconds of both ways, their ratio, and the share of rows with the same answer and the same text.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp

from sftlab.dataset import stage as dataset
from sftlab.eval import checkpoints
from sftlab.eval import stage as evaluate
from sftlab.eval.prompts import tokenize_prompts
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model import merge
from sftlab.records import Generation
from sftlab.runtime.job import Job, jobs
from sftlab.runtime.store import Store

SHARED = ("model", "dataset", "train", "tokens", "precision")


def timed(run: Path, measure: Callable[[Sequence[Job]], None]) -> tuple[float, Path]:
    """Seconds of a way to answer, in a store of its own; and this store."""
    folder = Path(mkdtemp(prefix="sftlab-"))
    records = [job.model_copy(update={"config": {**job.config, "store": str(folder)}}) for job in jobs(run)]
    own = Path(str(jobs(run)[0].config["store"])).resolve()
    for name in SHARED:
        if (own / name).is_dir():
            (folder / name).symlink_to(own / name)
    begin = time.monotonic()
    measure(records)
    return time.monotonic() - begin, folder


def each(records: Sequence[Job]) -> None:
    """Merge every checkpoint, and start an engine with it."""
    for job in records:
        cfg = job.settings()
        store, machine = Store(cfg.store), instance.find(cfg.instance)
        base, data = models.resolve(cfg.model, store, cfg.seed), dataset.make(store, cfg.dataset)
        settings = cfg.eval.model_copy(update={"forced": False, "logprobs": False, "repeats": 1, "max_rows": None})
        examples = dataset.sample(data.split("validation"), None, cfg.dataset.seed)
        prompts = tokenize_prompts(examples, base, settings)
        for candidate in job.candidates:
            merged = merge.make(store, Path(candidate.checkpoint), base, Path(job.stages["tokens"]), machine, cfg.merge)
            model = evaluate.Model(merged.stage.path, merged.stage.key, base.trust_remote_code)
            evaluate.make(store, model, prompts, settings, machine, cfg.seed)
            store.remove(merged.stage)


def together(records: Sequence[Job]) -> None:
    """What select.metric=score does."""
    checkpoints.validation_scores(records)


def main() -> None:
    """Run both ways, and compare their answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    logging.basicConfig(level=logging.WARNING)
    answers: list[dict[str, list[Generation]]] = []
    seconds = []
    for way in (together, each):
        spent, own = timed(run, way)
        found = Store(own).finished("generations")
        answers.append(
            {manifest["inputs"]["model"]: Generation.read(path / "generations.jsonl") for path, manifest in found}
        )
        seconds.append(spent)
        print(f"{way.__name__}: {spent:.0f} s, {len(found)} models", flush=True)
    cfg, store = jobs(run)[0].settings(), Store(jobs(run)[0].settings().store)
    examples = dataset.sample(dataset.make(store, cfg.dataset).split("validation"), None, cfg.dataset.seed)
    score, rows, same, texts = scorer(cfg.eval), 0, 0, 0
    for model in answers[0].keys() & answers[1].keys():
        pair = [score.predictions(way[model], examples) for way in answers]
        rows += len(examples)
        same += sum(one.answer == other.answer for one, other in zip(*pair, strict=True))
        texts += sum(one.completion == other.completion for one, other in zip(*pair, strict=True))
    print(f"ratio: {seconds[0] / seconds[1]:.2f}")
    print(f"{rows} rows in both: {same / rows:.1%} with the same answer, {texts / rows:.1%} with the same text")


if __name__ == "__main__":
    main()
