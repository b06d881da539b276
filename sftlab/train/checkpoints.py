"""Files of a training: its checkpoints, and the receipt and curves beside them.

Training writes into the folder of its stage: ``checkpoint-STEP`` folders, ``metrics.jsonl`` with the training curves,
``machines.json`` if earlier steps were trained on other machines, and ``receipt.json`` last of all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Self

from sftlab.records import Candidate
from sftlab.results import Receipt, Scalar
from sftlab.runtime.store import sync, write_json
from sftlab.train.stopping import STOPPING

COMPLETE, ROWS = "checkpoint.json", "rows.json"
RECEIPT, METRICS, MACHINES = "receipt.json", "metrics.jsonl", "machines.json"
# Files that a checkpoint needs only for training to resume from it. Two of them are FSDP's.
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin", "pytorch_model_fsdp.bin", STOPPING)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: a folder ``checkpoint-STEP`` with ``checkpoint.json``, which is written last.

    ``eval_loss`` (nats per supervised token) is None if the checkpoint was saved only for resuming. ``train_loss`` is
    the mean since the validation before, ``seconds`` the training time since the start of the job. ``checkpoint-0`` is
    the untrained model: it has validation losses, and no weights besides those of the base model.
    """

    path: Path
    step: int
    epoch: float
    eval_loss: float | None
    train_loss: float | None
    seconds: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a complete checkpoint."""
        return cls(path=path, **json.loads((path / COMPLETE).read_text("utf-8")))

    def write(self, row_losses: Sequence[Sequence[float]] | None) -> None:
        """Mark the files of ``path`` as complete, once they are on the disk.

        ``row_losses`` are nats and tokens of each validation row, in their order.
        """
        if row_losses is not None:
            write_json(self.path / ROWS, row_losses)
        sync(self.path)
        values = asdict(self)
        del values["path"]
        write_json(self.path / COMPLETE, values)

    @property
    def evaluated(self) -> bool:
        """Whether it has a validation loss."""
        return self.eval_loss is not None

    @property
    def resumable(self) -> bool:
        """Whether it has the state of the optimizer."""
        return any((self.path / name).is_file() for name in ("optimizer.pt", "optimizer.bin"))

    def candidate(self, job: int, overrides: list[str]) -> Candidate | None:
        """The checkpoint as a candidate for selection; None without a finite validation loss."""
        if self.eval_loss is None or not isfinite(self.eval_loss):
            return None
        return Candidate(
            eval_loss=self.eval_loss,
            epoch=self.epoch,
            step=self.step,
            checkpoint=str(self.path),
            job=job,
            overrides=overrides,
            train_loss=self.train_loss,
            seconds=self.seconds,
        )

    def forget_loss(self) -> None:
        """Leave the checkpoint only for resuming: the training at hand has no validation at its step."""
        (self.path / ROWS).unlink(missing_ok=True)
        replace(self, eval_loss=None).write(None)

    def forget_optimizer(self) -> None:
        """Delete the files that only resuming needs."""
        for name in [*OPTIMIZER_FILES, *(file.name for file in self.path.glob("rng_state*.pth"))]:
            (self.path / name).unlink(missing_ok=True)

    def copy_into(self, folder: Path, *, resumable: bool, selectable: bool = True) -> None:
        """Copy the checkpoint into the folder of another training; the copy gets its name when it is whole.

        A copy that is not ``selectable`` has no validation loss.

        Training may overwrite files of a ``resumable`` copy. Other copies share their files with the original (hard
        links) and have no optimizer state.
        """
        partial = folder / "copy.partial"
        shutil.copytree(self.path, partial, copy_function=shutil.copy2 if resumable else os.link)
        if not resumable:
            replace(self, path=partial).forget_optimizer()
        if not selectable:
            replace(self, path=partial).forget_loss()
        partial.rename(folder / self.path.name)

    def delete(self) -> None:
        """Delete the checkpoint. If that is interrupted, what is left is incomplete."""
        (self.path / COMPLETE).unlink()
        shutil.rmtree(self.path)


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a training, by step."""
    checkpoints = []
    for file in folder.glob(f"checkpoint-*/{COMPLETE}"):
        with suppress(FileNotFoundError):  # another process has just deleted it
            checkpoints.append(Checkpoint.read(file.parent))
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def incomplete(folder: Path) -> list[Path]:
    """Folders of checkpoints whose writing was interrupted."""
    return [path for path in folder.glob("checkpoint-*") if not (path / COMPLETE).is_file()]


def last_resumable(folder: Path) -> Checkpoint | None:
    """The checkpoint that training resumes from; None to start from the beginning."""
    return next((checkpoint for checkpoint in reversed(complete(folder)) if checkpoint.resumable), None)


def delete_all_but(folder: Path, count: int) -> None:
    """Delete checkpoints until ``count`` evaluated ones are left: the one with the lowest loss and the newest ones.

    With a ``count`` above 1 the newest checkpoint is left in any case. One that was saved at SIGTERM has no validation
    loss; it is deleted as soon as there is a newer one, and does not change which others are left. Step 0, which has no
    weights, is always left and not counted.
    """
    newest_first = [checkpoint for checkpoint in reversed(complete(folder)) if checkpoint.step]
    losses = {checkpoint: checkpoint.eval_loss for checkpoint in newest_first if checkpoint.eval_loss is not None}
    best = min(losses, key=lambda checkpoint: (losses[checkpoint], checkpoint.path), default=None)
    evaluated = sorted(losses, key=lambda checkpoint: checkpoint is not best)
    left = {*evaluated[:count], *(newest_first[:1] if count > 1 else [])}
    for checkpoint in newest_first:
        if checkpoint not in left:
            checkpoint.delete()


def delete_old_optimizers(folder: Path, but: Collection[int]) -> None:
    """Delete what resuming needs from all checkpoints but the newest and the steps in ``but``."""
    for checkpoint in [checkpoint for checkpoint in complete(folder) if checkpoint.resumable][:-1]:
        if checkpoint.step not in but:
            checkpoint.forget_optimizer()


def read_receipt(folder: Path) -> Receipt:
    """The receipt of a training that has ended."""
    return Receipt.model_validate_json((folder / RECEIPT).read_text("utf-8"))


def earlier_machines(folder: Path) -> list[str | dict[str, Scalar]]:
    """The machines that trained earlier steps, each with ``until_step``; [] if there were none."""
    file = folder / MACHINES
    machines: list[str | dict[str, Scalar]] = json.loads(file.read_text("utf-8")) if file.is_file() else []
    return machines
