"""Merge a selected checkpoint into one bf16 model with tokenizer, chat template and generation config."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from sftlab.config import MergeConfig
from sftlab.errors import StageError
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.model.merge_worker import CHECK, MergeTask
from sftlab.results import MergeCheck
from sftlab.runtime.processes import child
from sftlab.runtime.store import Stage, Store, versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """The finished stage: a model folder, and ``check.json`` with the comparison to the adapter."""

    stage: Stage

    @property
    def check(self) -> MergeCheck:
        """The merged model compared with the adapter on its base."""
        return MergeCheck.model_validate_json((self.stage.path / CHECK).read_bytes())


def inputs(checkpoint: Path, base: Base) -> dict[str, object]:
    """List what the merged model depends on: a checkpoint of a finished training, and its base model."""
    step = int(checkpoint.name.split("-")[1])
    return {
        "version": 2,
        "train": checkpoint.parent.name,
        "step": step,
        "base": base.identity,
        "libraries": versions("torch", "transformers", "peft"),
    }


def make(store: Store, checkpoint: Path, base: Base, tokens: Path, machine: Machine, cfg: MergeConfig) -> Merged:
    """Merge a checkpoint of the store into its base, and compare the result with the adapter.

    ``tokens`` is the folder of tokenised rows, of which the check uses the validation split.

    Raises:
        StageError: no weight changed, the model does not load again, or merging raises the validation loss by more
            than ``merge.max_loss_gap``.
    """

    def build(folder: Path) -> None:
        task = MergeTask(
            checkpoint=checkpoint.resolve(),
            base=replace(base, path=base.path.resolve()),
            tokens=tokens.resolve(),
            device=machine.device,
        )
        child("sftlab.model.merge_worker", folder, task, environment=machine.environment())

    merged = Merged(store.stage("merged", inputs(checkpoint, base), build))
    check = merged.check
    gap = check.merged_loss - check.adapter_loss
    if gap > cfg.max_loss_gap:
        raise StageError(
            f"merge.max_loss_gap={cfg.max_loss_gap}: merging raises the validation loss by {gap:.4f} nats per token "
            f"(adapter {check.adapter_loss:.4f}, merged {check.merged_loss:.4f}); set a larger merge.max_loss_gap, or "
            "train in bf16"
        )
    log.info(
        "merge: validation loss %.4f with the adapter, %.4f merged; %d of %d greedy tokens agree",
        check.adapter_loss,
        check.merged_loss,
        check.agreeing_tokens,
        check.compared_tokens,
    )
    return merged
