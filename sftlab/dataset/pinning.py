"""Pin what a run reads from the hub: the commits of its model and datasets."""

from __future__ import annotations

from sftlab.config import Config, DatasetConfig
from sftlab.dataset.stage import revision
from sftlab.model.base import Base
from sftlab.runtime.modes import MODES


def pinned_data(cfg: Config) -> Config:
    """Pin the commits of the datasets: a branch or tag of the hub may move during a run."""

    def pin(data: DatasetConfig, key: str) -> DatasetConfig:
        commits = {part.name: revision(part.cfg, part.key) or part.cfg.revision for part in data.parts(key)}
        if data.sources is None:
            return data.model_copy(update={"revision": commits[None]})
        pinned = {name: one.model_copy(update={"revision": commits[name]}) for name, one in data.sources.items()}
        return data.model_copy(update={"sources": pinned})

    test = cfg.eval.dataset and pin(cfg.eval.dataset, "eval.dataset")
    read = MODES[cfg.mode].reads_training_rows or cfg.eval.dataset is None
    data = pin(cfg.dataset, "dataset") if read else cfg.dataset
    guards = {name: pin(one, f"eval.guards.{name}") for name, one in cfg.eval.guards.items()}
    pinned = {"dataset": test, "guards": guards}
    return cfg.model_copy(update={"dataset": data, "eval": cfg.eval.model_copy(update=pinned)})


def pinned(cfg: Config, base: Base) -> Config:
    """Pin the commits of the model and the datasets, and the time that the chat template prints."""
    model = cfg.model.model_copy(
        update={
            "revision": base.revision or cfg.model.revision,
            "template_time": base.template_time or cfg.model.template_time,
        }
    )
    return pinned_data(cfg).model_copy(update={"model": model})
