"""Refuse to train on questions of the test set: the stage that examines the overlap of the splits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sftlab.config import Config
from sftlab.dataset import overlap
from sftlab.dataset.stage import Dataset
from sftlab.errors import ConfigError, Problem, shown
from sftlab.records import Example
from sftlab.results import OverlapRecord, OverlapReport
from sftlab.runtime.store import Stage, Store, write_json

log = logging.getLogger(__name__)

OVERLAP = "overlap.json"


def gate(
    cfg: Config, store: Store, data: Dataset, test: Sequence[Example], test_key: str
) -> tuple[OverlapRecord, Stage]:
    """Find questions that an earlier split already has, and stop before training if there are any.

    Args:
        cfg: The configuration.
        store: The store; jobs of a sweep share the stage.
        data: The dataset.
        test: The test rows.
        test_key: Key of the dataset that the test rows come from.

    Raises:
        ConfigError: Exact duplicates or overlaps over dataset.max_overlap, with the largest ones.
    """

    def build(folder: Path) -> None:
        splits = {**data.for_training(), "test": test}
        report = overlap.find_overlaps(splits, max_overlap=cfg.dataset.max_overlap)
        write_json(folder / OVERLAP, report.model_dump())

    inputs = {"version": 2, "dataset": data.stage.key, "test": [test_key, cfg.eval.max_rows]}
    stage = store.stage("overlap", {**inputs, "max_overlap": cfg.dataset.max_overlap}, build)
    report = OverlapReport.model_validate_json((stage.path / OVERLAP).read_bytes())
    for pair in report.pairs:
        log.info(
            "overlap: %s in %s: %d exact, %d over %.0f %%, largest share %.0f %%, median %.0f %%",
            pair.left_split,
            pair.right_split,
            pair.exact,
            pair.near,
            100 * report.max_overlap,
            100 * pair.max,
            100 * pair.p50,
        )
    if report.leaking and not cfg.dataset.allow_overlap:
        raise ConfigError(
            Problem(
                "dataset.max_overlap",
                shown(cfg.dataset.max_overlap),
                f"{report.leaking} questions of one split are in another",
                "delete them, raise the limit, or set dataset.allow_overlap=true (the report will state the overlap)\n"
                + overlap.describe(report),
            )
        )
    return OverlapRecord(**dict(report), allow_overlap=cfg.dataset.allow_overlap), stage
