"""Keys of the selection and of sweeps that cannot have an effect together with others."""

from __future__ import annotations

from collections.abc import Iterator

from sftlab.config import Config, NoPeft
from sftlab.errors import Problem, shown


def selection_problems(cfg: Config) -> Iterator[Problem]:
    """Yield settings of ``select`` and ``sweep`` that would have no effect, or not the intended one."""
    if cfg.select.max_rows is not None and cfg.select.metric == "eval_loss":
        message = "has an effect only with select.metric=score: the validation loss is over all validation rows"
        yield Problem("select.max_rows", shown(cfg.select.max_rows), message, "set it to null", ("select.metric",))
    if cfg.select.average is not None and not isinstance(cfg.peft, NoPeft) and cfg.peft.use_dora:
        message = "the average of DoRA adapters is not an adapter: their magnitudes are not linear"
        yield Problem("select.average", "ties", message, "set it to null", ("peft.use_dora",))
    if cfg.sweep.prune is not None and cfg.instance.nnodes > 1:
        message = "stops a job in one process, and instance.nnodes trains it in several commands"
        yield Problem("sweep.prune", cfg.sweep.prune, message, "set it to null", ("instance.nnodes",))
