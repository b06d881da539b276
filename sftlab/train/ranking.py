"""Which jobs of a sweep can be ranked together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sftlab.config import Config
from sftlab.dataset.stage import sample
from sftlab.eval.scorers import scorer
from sftlab.records import Example
from sftlab.results import Receipt, Scalar, TokenCounts
from sftlab.runtime.job import Job
from sftlab.runtime.store import key_of

log = logging.getLogger(__name__)


def requirements(
    cfg: Config, validation: Sequence[Example], counts: TokenCounts, receipt: Receipt
) -> dict[str, Scalar]:
    """What must be equal in two jobs for their checkpoints to be ranked together."""
    if cfg.select.metric == "score":
        answered = sample(validation, cfg.select.max_rows, cfg.dataset.seed)
        questions = key_of({"rows": [[row.id, row.accepted] for row in answered]})
        keys = {"engine", "max_tokens", "temperature", "task", "rouge", "pattern", "reading", "extract", "dtype"}
        source = scorer(cfg.eval).source
        code = {"sha256": source.sha256} if source is not None else {}
        own = {"tolerance", "sql", "metric", "metric_value", "metric_range", "scorer"}
        scoring = key_of({**cfg.eval.model_dump(include=own), **code})
        return {"validation questions": questions, "scoring": scoring, **cfg.eval.model_dump(include=keys)}
    return {
        # Rows, their order, tokenizer, template, truncation and loss mask all show in the token ids and labels.
        "validation tokens": counts.validation.content,
        "base precision": receipt.base_dtype,
        "quantised layers": receipt.quantized_layers,
        "autocast": receipt.autocast,
    }


def comparable(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group the jobs whose checkpoints can be ranked together. Several groups are logged with the difference."""
    groups: list[list[Job]] = []
    for job in jobs:
        same = next((group for group in groups if group[0].comparable == job.comparable), None)
        if same is None:
            groups.append([job])
        else:
            same.append(job)
    for other in groups[1:]:
        first = groups[0][0]
        names = dict.fromkeys([*first.comparable, *other[0].comparable])
        differs = [name for name in names if other[0].comparable.get(name) != first.comparable.get(name)]
        log.warning(
            "select: jobs %s and jobs %s cannot be ranked together: %s differ. Only the largest group is ranked; %s",
            ", ".join(str(job.number) for job in groups[0]),
            ", ".join(str(job.number) for job in other),
            " and ".join(differs),
            "make them equal, or compare the best model of each group by mode=evaluate on one test set"
            if first.settings().select.metric == "score"
            else "select.metric=score ranks by answers on validation instead",
        )
    return groups


def warn_of_batches(jobs: Sequence[Job]) -> None:
    """Warn if jobs on different machines trained with different effective batches."""
    trained = [(job.number, job.receipt) for job in jobs if job.receipt is not None]
    batches = {receipt.effective_batch for _, receipt in trained}
    machines = {(receipt.device, receipt.num_processes) for _, receipt in trained}
    if len(batches) > 1 and len(machines) > 1:
        log.warning(
            "select: the jobs ran on different machines with different effective batches (%s), which changes their "
            "results too; set train.global_batch_size to have the same on each",
            ", ".join(f"job {number}: {receipt.effective_batch}" for number, receipt in trained),
        )
