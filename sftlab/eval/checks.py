"""Check before training that answers to the rows of a run can be judged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from sftlab.config import Config
from sftlab.eval.scorers import scorer
from sftlab.records import Example
from sftlab.runtime.modes import MODES

log = logging.getLogger(__name__)


def check_answers(cfg: Config, splits: Mapping[str, Sequence[Example]]) -> None:
    """Check the rows to which the mode needs answers, and warn of completions that are not read as their targets.

    Validation calls it for rows on this machine, before anything is written. The job calls it again for the rows that
    it uses, which may be a sample or come from the hub, and so that its warnings are in the log file of the run; that
    takes 25 ms for 6,000 rows. A split that is not in ``splits`` is not checked.

    Raises:
        ConfigError: targets that no answer can equal, or completions of which none is read as its target.
    """
    score, mode = scorer(cfg.eval), MODES[cfg.mode]
    targets = {"test": mode.reads_test, "validation": mode.trains and cfg.select.metric == "score"}
    completions = {"train": mode.trains and mode.evaluates, "test": mode.reads_test}
    for split, is_judged in targets.items():
        if is_judged and split in splits:
            score.check(splits[split], split)
    judged = [split for split, is_judged in completions.items() if is_judged and split in splits]
    for warning in [score.check_completions(splits[split], split) for split in judged]:
        if warning:
            log.warning(warning)
