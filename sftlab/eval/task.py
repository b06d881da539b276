"""``eval.task=auto``: choose the task that fits the answers of the rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sftlab.config import Config
from sftlab.dataset.row_formats.fitting import Answered, fitting
from sftlab.dataset.row_formats.recognise import SAMPLED
from sftlab.records import Example
from sftlab.runtime.modes import MODES

log = logging.getLogger(__name__)


def settled(cfg: Config) -> Config:
    """Replace ``auto`` by ``choice`` where the configuration alone decides.

    Templates with ``choices`` are multiple choice; modes without rows compare letters.
    """
    data = cfg.eval.dataset or cfg.dataset
    sections = list(data.sources.values()) if data.sources else [data]
    lettered = all(one.format == "template" and one.choices is not None for one in sections)
    if cfg.eval.task != "auto" or not (lettered or not MODES[cfg.mode].reads_data):
        return cfg
    return _with(cfg, {"task": "choice"})


def fitted(cfg: Config, test: Sequence[Example], train: Sequence[Example] = ()) -> Config:
    """Replace ``auto`` by the task that fits the test rows, or training rows if there are no test rows.

    The first rows decide; of several sources, rows of each.
    ``eval.extract`` is set with it, if it is not set and the compared text is a part of the answers.
    """
    if cfg.eval.task != "auto":
        return cfg
    rows = _sampled(test or train)
    task, extract = fitting([Answered(row.target, row.assistant, row.choices, row.context) for row in rows])
    changed = {"task": task, "extract": cfg.eval.extract or extract}
    return _with(cfg, changed)


def _sampled(rows: Sequence[Example]) -> Sequence[Example]:
    """Return the first rows, or rows at equal distances if they have sources, which follow each other."""
    if not rows or rows[0].source is None:
        return rows[:SAMPLED]
    return rows[:: max(len(rows) // SAMPLED, 1)]


def announce(cfg: Config, fitted_to: Config) -> None:
    """Log a task that ``fitted`` has chosen."""
    if cfg.eval.task == "auto":
        extract = fitted_to.eval.extract
        part = f' with eval.extract="{extract}"' if extract and extract != cfg.eval.extract else ""
        log.info("eval.task=auto: %s%s fits the answers", fitted_to.eval.task, part)


def _with(cfg: Config, changed: dict[str, str | None]) -> Config:
    return cfg.model_copy(update={"eval": cfg.eval.model_copy(update=changed)})
