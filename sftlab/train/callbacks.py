"""Callbacks of the trainer: checkpoints, progress bar, step times, training curves."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback
from transformers.trainer_utils import SaveStrategy

from sftlab.errors import PausedError, PrunedError, Terminated
from sftlab.results import EarlyStop, Scalar
from sftlab.tracking import tracker, wandb
from sftlab.tracking.base import Tracker, first_line, named
from sftlab.train.checkpoints import COMPLETE, Checkpoint, delete_all_but, delete_old_optimizers
from sftlab.train.pruning import Peers
from sftlab.train.stopping import Patience
from sftlab.train.trainer import Trainer

log = logging.getLogger(__name__)


class DivergedError(Exception):
    """A checkpoint without a validation loss, from which training resumed, had diverged."""


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Validate and save at the steps of the timeline, save at SIGTERM, and stop a training that diverges.

    Early stopping is decided here too. ``earlier_seconds`` is the training time before this process. ``limit`` is
    train.save_total_limit: transformers would delete an old checkpoint before the new one is complete.
    """

    trainer: Trainer

    def __init__(
        self, earlier_seconds: float, limit: int | None, patience: Patience | None, peers: Peers | None = None
    ) -> None:
        self.peers = peers
        self.stop: PrunedError | PausedError | None = None
        self.start = time.monotonic() - earlier_seconds
        self.limit = limit
        self.patience = patience
        self.terminated = False
        self.diverged_at_step: int | None = None

    def terminate(self, *_: Any) -> None:
        """Handle SIGTERM: save at the end of the step or before the next validation batch, and stop."""
        self.terminated = True

    def terminating(self) -> bool:
        """Whether any rank has received SIGTERM; all ranks save at the same step."""
        if self.trainer.args.world_size > 1:
            flag = torch.tensor(float(self.terminated), device=self.trainer.args.device)
            self.terminated = bool(self.trainer.accelerator.reduce(flag) > 0)
        return self.terminated

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Validate the step that training starts from, if it should have a validation and has none.

        That is step 0 with train.eval_on_start, and a checkpoint if SIGTERM was received before or in its validation.
        Other files of the checkpoint stay as they are, so that resuming from it once more does the same.

        Raises:
            DivergedError: the loss is not finite.
            PrunedError: the peers of the job are better.
            PausedError: the job waits for its peers.
        """
        if self.patience is not None and self.patience.exhausted:  # killed after the last checkpoint
            control.should_training_stop = True
        is_validated = any(row["step"] == state.global_step for row in state.log_history if "eval_loss" in row)
        if is_validated or not self.trainer.timeline.evaluates(state.global_step):
            return
        untrained = state.global_step == 0
        # May also step the schedule.
        metrics = self.trainer._evaluate(trial=None, ignore_keys_for_eval=None, skip_scheduler=untrained)
        if self.diverged_at_step is not None:
            raise DivergedError
        if not untrained:
            self.trainer._determine_best_metric(metrics, trial=None)
        if state.is_world_process_zero:
            _folder(args, state).mkdir(exist_ok=True)
            self._mark(args, state)
            self._delete(args)
        if self.stop is not None:
            raise self.stop

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of the sampler; accelerate does not if several ranks resume within an epoch."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Validate and save as planned, and save at SIGTERM and where jobs of another length may resume.

        The loss is logged before every checkpoint, so that the curve is the same if training resumes from it.
        """
        timeline, saves = self.trainer.timeline, args.save_strategy != SaveStrategy.NO
        control.should_evaluate = timeline.evaluates(state.global_step)
        control.should_save = saves and (control.should_evaluate or state.global_step in timeline.forks)
        if self.terminating():
            control.should_save = True
        if control.should_evaluate or control.should_save:
            control.should_log = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At SIGTERM save the last step before the next validation batch. The validation is done after resuming.

        Raises:
            Terminated: SIGTERM was received.
        """
        if self.terminating():
            if state.global_step and not (_folder(args, state) / COMPLETE).is_file():
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
                self.on_save(args, state, control)
            raise Terminated

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop a training that gains no more, or whose loss is not finite: no further step makes it finite again."""
        if metrics and not isfinite(metrics["eval_loss"]):
            self.diverged_at_step = state.global_step
            control.should_save, control.should_training_stop = False, True
            return
        if self.patience is not None:
            self.patience.observe(state.global_step, self.trainer.row_losses)
            control.should_training_stop |= self.patience.exhausted
        if self.peers is not None and not control.should_training_stop:
            epoch, total = round(float(state.epoch or 0), 4), self.trainer.timeline.total
            rows, is_first = self.trainer.row_losses, state.is_world_process_zero
            self.stop = self.peers.observe(state.global_step, epoch, total, rows, args.world_size, is_first=is_first)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as complete: one without ``checkpoint.json`` was interrupted and is not used.

        Raises:
            Terminated: SIGTERM was received, and the checkpoint to resume from is saved.
            PrunedError: the peers of the job are better.
            PausedError: the job waits for its peers.
        """
        if state.is_world_process_zero:
            if self.patience is not None:
                self.patience.write(_folder(args, state))
            self._mark(args, state)
            self._delete(args)
        if self.terminating():
            raise Terminated
        if self.stop is not None:
            raise self.stop

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With a limit of one, leave only the best checkpoint: the last one is no longer needed for resuming."""
        if self.limit is not None and state.is_world_process_zero:
            delete_all_but(Path(args.output_dir), self.limit)

    def early_stop(self) -> EarlyStop | None:
        """What early stopping did to a training that has ended."""
        state = self.trainer.state
        rate = _last(state.log_history, "learning_rate")
        if self.patience is None or self.diverged_at_step is not None or rate is None:
            return None
        return self.patience.record(self.trainer.timeline, state.global_step, rate, time.monotonic() - self.start)

    def _delete(self, args: TrainingArguments) -> None:
        delete_old_optimizers(Path(args.output_dir), but=self.trainer.timeline.forks)
        if self.limit is not None:  # the newest is needed for resuming
            delete_all_but(Path(args.output_dir), max(self.limit, 2))

    def _mark(self, args: TrainingArguments, state: TrainerState) -> None:
        history = state.log_history
        evaluated = self.trainer.evaluated_step == state.global_step
        Checkpoint(
            path=_folder(args, state),
            step=state.global_step,
            epoch=round(float(state.epoch or 0), 4),
            eval_loss=_last(history, "eval_loss") if evaluated else None,
            train_loss=_mean_loss(history, self.trainer.timeline.previous(state.global_step)),
            seconds=round(time.monotonic() - self.start, 1),
        ).write(self.trainer.row_losses if evaluated else None)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _mean_loss(history: list[dict[str, float]], after: int) -> float | None:
    """The mean training loss of the steps after a step. Each logged value is the mean since the value before."""
    logged = [(int(row["step"]), float(row["loss"])) for row in history if "loss" in row and row["step"] > after]
    steps = [step - before for (step, _), before in zip(logged, [after, *(step for step, _ in logged)], strict=False)]
    total = sum(loss * weight for (_, loss), weight in zip(logged, steps, strict=True))
    # Rounded: a run that was interrupted between two logged values has summed them in another order.
    return round(total / sum(steps), 6) if logged else None


def _last(history: list[dict[str, float]], name: str) -> float | None:
    return next((float(row[name]) for row in reversed(history) if name in row), None)


class Progress(ProgressCallback):  # type: ignore[misc]
    """The progress bar, which shows the last losses instead of printing raw logs."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show training and validation loss at the end of the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
            self.training_bar.set_postfix(shown, refresh=False)


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Seconds per step, between the ends of steps: within a step, a GPU may lag behind the CPU."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    @property
    def median(self) -> float | None:
        """Median without the first step, which also allocates and compiles; None for a single step."""
        steps = [end - begin for begin, end in pairwise(self.ends)]
        return round(median(steps), 4) if steps else None


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Write everything that the trainer logs to ``metrics.jsonl``, also after resuming."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Replace the file by the whole history: it is small, and right after resuming too."""
        if state.is_world_process_zero:
            partial = self.path.with_suffix(".partial")
            lines = (json.dumps({name: _finite(value) for name, value in row.items()}) for row in state.log_history)
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            partial.replace(self.path)


def _finite(value: Any) -> Any:
    """The value, or None instead of a number that JSON does not have."""
    return value if not isinstance(value, float) or isfinite(value) else None


class Curves(WandbCallback):  # type: ignore[misc]
    """Curves in wandb. If wandb fails, they continue offline; if it fails again, training continues without them."""

    _wandb: Any
    failures = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Send the configuration."""
        self._send(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Send the logged values."""
        self._send(super().on_log, *args, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Send the checkpoint, if WANDB_LOG_MODEL is set to it."""
        self._send(super().on_save, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Send the last model, if WANDB_LOG_MODEL is set to it."""
        self._send(super().on_train_end, *args, **kwargs)

    def _send(self, send: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        while self._wandb is not None:
            try:
                send(*args, **kwargs)
            except Exception as error:  # no failure of wandb may end a training
                self.failures += 1
                self._initialized = False
                if self.failures > 1 or not wandb.begin_again(error):
                    self._wandb = None
            else:
                return


class Tracking(TrainerCallback):  # type: ignore[misc]
    """Curves in another tracker than wandb. If the tracker fails, training continues without it."""

    def __init__(self, backend: str, settings: Mapping[str, Scalar]) -> None:
        self.backend = backend
        self.tracker: Tracker | None = None
        with self._warning():
            self.tracker = tracker.start()
            self.tracker.settings(settings)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Send the logged values."""
        if self.tracker is not None and logs:
            with self._warning():
                self.tracker.log(state.global_step, named(logs))

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the tracker with how the training ended. The results start it again."""
        if self.tracker is None:
            return
        stopped = isinstance(error, PrunedError | KeyboardInterrupt)
        with self._warning():
            self.tracker.close("finished" if error is None else "killed" if stopped else "failed")
        self.tracker = None

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of a tracker may end a training
            self.tracker = None
            log.warning("%s: failed (%s); the curves are in metrics.jsonl", self.backend, first_line(error))
