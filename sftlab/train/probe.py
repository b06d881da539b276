"""Measure a training (``plan.probe``) by three steps on its longest batch."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from sftlab.config import Config
from sftlab.dataset.token_rows import read_rows, write_rows
from sftlab.dataset.tokenize import Tokenized
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.results import Receipt
from sftlab.train.checkpoints import read_receipt
from sftlab.train.stage import run_ranks
from sftlab.train.worker import TrainTask

STEPS = 3


def measure(cfg: Config, base: Base, tokens: Tokenized, machine: Machine) -> Receipt:
    """Train on the longest batch, validate on the longest, and return the receipt: peak GiB and seconds per step.

    Raises:
        OutOfMemoryError: the training does not fit.
    """
    train = cfg.train.model_copy(
        update={
            "num_train_epochs": 1,
            "max_steps": None,
            "eval_steps": None,
            "eval_on_start": False,
            "early_stopping_patience": None,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "global_batch_size": None,
            "lr_scheduler_type": "constant",
            "lr_scheduler_kwargs": {},
            "extra": {**cfg.train.extra, "save_strategy": "no"},
        }
    )
    with TemporaryDirectory(prefix="sftlab-") as name:
        folder = Path(name)
        _save_longest(tokens, "train", train.per_device_train_batch_size, machine.world_size * STEPS, folder)
        _save_longest(tokens, "validation", train.per_device_eval_batch_size, machine.world_size, folder)
        task = TrainTask(
            checkpoints=folder,
            tokens=folder,
            counts=tokens.counts,
            base=base,
            peft=cfg.peft,
            train=train,
            machine=machine,
            seed=cfg.seed,
        )
        run_ranks(folder, task, {})
        return read_receipt(folder)


def _save_longest(tokens: Tokenized, split: str, size: int, batches: int, folder: Path) -> None:
    """Save the batch of the longest rows of a split, repeated; with too few rows, these are repeated within it."""
    longest = np.argsort(tokens.lengths(split).rows, kind="stable")[-size:]
    rows = read_rows(tokens.stage.path, split).select(np.resize(longest, size * batches))
    write_rows(folder, split, rows.with_format("arrow")[:].to_batches())
