"""Validation answers of checkpoints, by which select.metric=exact_match ranks them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sftlab.dataset import stage as dataset
from sftlab.eval import stage as evaluate
from sftlab.eval.prompts import tokenize_prompts
from sftlab.eval.scorers import scorer
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model import merge
from sftlab.runtime.job import Job
from sftlab.runtime.store import Store

log = logging.getLogger(__name__)


def validation_answers(jobs: Sequence[Job]) -> tuple[list[list[bool]], list[str | None]]:
    """For each checkpoint of the jobs, in order, list which validation questions it answers rightly; and their groups.

    Answers are scored as on the test set.

    Each checkpoint is merged for this, and its merged model deleted afterwards: those of a long sweep would fill a
    disk. Step 0 is the base model itself.
    """
    right: list[list[bool]] = []
    groups: list[str | None] = []
    for job in jobs:
        cfg = job.settings()
        store, machine = Store(cfg.store), instance.find(cfg.instance)
        base = models.resolve(cfg.model, store, cfg.seed)
        data = dataset.make(store, cfg.dataset)
        settings = cfg.eval.model_copy(update={"forced": False, "logprobs": False, "max_rows": None})
        examples = data.split("validation")
        groups = [example.group for example in examples]
        prompts = tokenize_prompts(examples, base, f"{data.stage.key}/validation", settings)
        for candidate in job.candidates:
            checkpoint, total = Path(candidate.checkpoint), sum(len(job.candidates) for job in jobs)
            log.info("select: validation answers of checkpoint %d of %d", len(right) + 1, total)
            folder = store.path("merged", merge.inputs(checkpoint, base))
            model = evaluate.Model(folder, folder.name, base.trust_remote_code)
            if candidate.step == 0:
                model = evaluate.Model(base.path, base.identity, base.trust_remote_code)
            stage = None
            if candidate.step and not evaluate.cached(store, model, prompts, settings, machine, cfg.seed):
                tokens = Path(job.stages["tokens"])
                stage = merge.make(store, checkpoint, base, tokens, machine, cfg.merge).stage
            generated = evaluate.make(store, model, prompts, settings, machine, cfg.seed)
            if stage is not None and not stage.cached:
                store.remove(stage)
            score = scorer(settings)
            right.append([row.correct for row in score.scored(score.predictions(generated.rows(), examples))])
    return right, groups
