"""TRL's SFTTrainer with a cheaper loss on the CPU, a validation loss by token and checkpoints known to be whole."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.errors import Terminated
from sftlab.model.base import needs_padding_mask
from sftlab.runtime.store import sync, write_json
from sftlab.tracking import wandb as tracking
from sftlab.train.batches import StepSampler, row_lengths

COMPLETE = "checkpoint.json"
IGNORED = -100


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for rows that are tokenised already (``input_ids`` and ``labels``)."""

    evaluated_step: int | None = None
    checkpoints: Checkpoints
    sampler: StepSampler | None = None
    padding_mask: bool
    lengths: list[int]
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.padding_mask = needs_padding_mask(model)
        if not self.padding_mask:
            self.model.register_forward_pre_hook(_without_mask, with_kwargs=True)
        if self.args.train_sampling_strategy != "random":
            return
        rows = self.train_dataset
        self.lengths = row_lengths(rows)
        without_target = {"input_ids": [[self.processing_class.pad_token_id]], "labels": [[IGNORED]]}
        if "seq_lengths" in rows.column_names:  # with packing
            without_target["seq_lengths"] = [[1]]
        # The row that StepSampler fills a step with.
        self.train_dataset = concatenate_datasets([rows, Dataset.from_dict(without_target, features=rows.features)])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The sampler of the setting ``random``, which is the default; others are transformers' own."""
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        self.sampler = StepSampler(
            self.lengths,
            rows_per_step=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            ranks=self.args.world_size,
            micro_batches=self.args.gradient_accumulation_steps,
            seed=self.args.data_seed,
            hidden=self.model.config.get_text_config().hidden_size,
            padded=not self.padding_free,
            rank=self.args.process_index,
        )
        return self.sampler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the target tokens, in nats.

        On the CPU, TRL's chunked loss takes as long as half of the model. There the output head is
        applied to the positions that have a target, all at once; elsewhere TRL's own loss is used.
        """
        if not self.own_head or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs["attention_mask"] if "attention_mask" in inputs else inputs["input_ids"]
        nll, _ = _token_losses(model, inputs)
        self._total_train_tokens += int(self.accelerator.reduce(mask.new_tensor(mask.numel())).item())
        total = num_items_in_batch if num_items_in_batch is not None else nll.numel()
        loss = nll.sum() / torch.as_tensor(total).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is over all ranks, and the ranks' gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return loss

    @property
    def own_head(self) -> bool:
        """Whether training applies the output head by ``_token_losses``: on the CPU, for the plain loss."""
        plain = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        return self.args.device.type == "cpu" and plain

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The batches of a step and their number of target tokens, each row once.

        So that all ranks have equally many batches, accelerate fills the last ones with the first rows again.
        Those get no target. (Packed rows, which are one sequence, are left as they are.)
        """
        return super().get_batch_samples(map(self._without_repetitions, epoch_iterator), num_batches, device)

    def _without_repetitions(self, batch: dict[str, Any]) -> dict[str, Any]:
        state, labels = self.accelerator.gradient_state, batch["labels"]
        if state.end_of_dataloader and state.remainder > 0 and not self.args.packing:
            own = max(0, state.remainder - self.accelerator.process_index * self.args.per_device_train_batch_size)
            if self.padding_free:  # the rows are one sequence, and each begins at position 0
                starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
                labels[:, (starts[own] if own < len(starts) else labels.size(1)) :] = IGNORED
            else:
                labels[own:] = IGNORED
        return batch

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss: all negative log-likelihood over all target tokens, whatever the batches.

        The rows' own sums are kept (``self.row_losses``: nats and tokens of each, in their order), to
        tell later which checkpoints differ by more than chance.

        Raises:
            Terminated: SIGTERM came. The checkpoint is saved, and validated when training resumes from it.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        # Not the training collator: packed rows would lose their borders.
        collator = DataCollatorForLanguageModeling(pad_token_id=self.processing_class.pad_token_id)
        loader = self.accelerator.prepare_data_loader(
            # With a generator of its own: iterating draws a seed, and training's draws must be the same whether a
            # checkpoint is validated before it is saved or after resuming from it.
            DataLoader(
                rows,
                batch_size=self.args.per_device_eval_batch_size,
                collate_fn=collator,
                generator=torch.Generator(),
            )
        )
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        start = time.monotonic()
        training = model.training
        model.eval()
        sums: list[list[float]] = []
        for batch in loader:
            if self.checkpoints.terminating():
                model.train(training)
                self.checkpoints.save_and_end()
            with torch.no_grad(), self.compute_loss_context_manager():
                row_nll, row_tokens = self._row_losses(model, batch)
            gathered = self.accelerator.gather_for_metrics(torch.stack([row_nll.double(), row_tokens.double()], dim=1))
            sums += gathered.tolist()
        model.train(training)
        self.row_losses, self.evaluated_step = sums, self.state.global_step
        tokens = sum(row[1] for row in sums)
        metrics = {
            f"{metric_key_prefix}_loss": sum(row[0] for row in sums) / tokens,
            f"{metric_key_prefix}_tokens": tokens,
            f"{metric_key_prefix}_runtime": round(time.monotonic() - start, 3),
        }
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _row_losses(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
        if self.args.device.type == "cpu":
            nll, rows = _token_losses(model, dict(batch))
            return nll.new_zeros(len(tokens)).index_add(0, rows, nll), tokens
        outputs = model(**batch, fused_lm_head=True)
        return -outputs.log_probs.float().sum(dim=1), tokens

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write a card into every checkpoint; the merged model gets one of its own."""


def _without_mask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leave out a batch's attention mask: padding is at the end of rows, where nothing attends to it."""
    return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}


def _token_losses(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every target token of a batch, and the row that each is in: two flat tensors.

    Only positions at which some row of the batch has a target go through the output head.
    """
    labels = inputs.pop("labels")[:, 1:]
    kept = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    targets = labels[:, kept]
    mask = targets != IGNORED
    nll = functional.cross_entropy(logits[mask].float(), targets[mask], reduction="none")
    return nll, mask.nonzero()[:, 0]


class Progress(ProgressCallback):  # type: ignore[misc]
    """The progress bar, with the last losses beside it instead of lines of raw numbers."""

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


class DivergedError(Exception):
    """The validation that a checkpoint lacked shows that the training before it had diverged."""


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Mark a checkpoint as complete, last of all, with what selection needs to know of it.

    ``keep`` is train.save_total_limit. transformers would delete older checkpoints before a new one is complete.
    """

    trainer: Trainer

    def __init__(self, earlier_seconds: float, decay_steps: int | None, keep: int | None) -> None:
        self.start = time.monotonic() - earlier_seconds
        self.decay_steps = decay_steps
        self.keep = keep
        self.terminated = False
        self.diverged_at_step: int | None = None

    def terminate(self, *_: Any) -> None:
        """Save at the end of the step or before the next batch of a validation, and end: what SIGTERM does."""
        self.terminated = True

    def terminating(self) -> bool:
        """Whether SIGTERM came to any rank: all of them save at the same place."""
        if self.trainer.args.world_size > 1:
            flag = torch.tensor(float(self.terminated), device=self.trainer.args.device)
            self.terminated = bool(self.trainer.accelerator.reduce(flag) > 0)
        return self.terminated

    def save_and_end(self) -> None:
        """Save the last completed step, unless that is done, and raise Terminated."""
        args, state = self.trainer.args, self.trainer.state
        if state.global_step and not (self._folder(args, state) / COMPLETE).is_file():
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            self.on_save(args, state, self.trainer.control)
        raise Terminated

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Validate the checkpoint that training resumes from, where SIGTERM came before or during its validation.

        Its other files stay as they are: resuming from it once more does the same again.

        Raises:
            DivergedError: the loss is not a finite number.
        """
        at_end = state.global_step and state.global_step % (state.max_steps // int(args.num_train_epochs)) == 0
        if not at_end or any(row["step"] == state.global_step for row in state.log_history if "eval_loss" in row):
            return
        metrics = self.trainer._evaluate(trial=None, ignore_keys_for_eval=None)  # may step the schedule too
        if self.diverged_at_step is not None:
            raise DivergedError
        self.trainer._determine_best_metric(metrics, trial=None)
        if state.is_world_process_zero:
            self._mark(args, state)
            self._delete(args)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the sampler its epoch: accelerate does not where several ranks resume within an epoch."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save where a job of fewer or more epochs would part from this one, before its decay, and at SIGTERM."""
        an_epoch = state.max_steps // int(args.num_train_epochs)
        if self.terminating():
            control.should_save = control.should_log = True
        if self.decay_steps and (state.global_step + self.decay_steps) % an_epoch == 0 and state.global_step % an_epoch:
            control.should_save = control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log where a checkpoint is saved: what is logged after it is then the same for one that goes on from it."""
        control.should_log = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """End a training whose loss is no number any more: no step makes one of it again."""
        if metrics and not isfinite(metrics["eval_loss"]):
            self.diverged_at_step = state.global_step
            control.should_save, control.should_training_stop = False, True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write ``checkpoint.json``: a checkpoint without it was interrupted and is not used.

        ``eval_loss`` is null where the checkpoint is only for resuming.

        Raises:
            Terminated: SIGTERM came, and what there is to resume from is saved.
        """
        if state.is_world_process_zero:
            self._mark(args, state)
            self._delete(args)
        if self.terminating():
            raise Terminated

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With a limit of one, retain the best checkpoint: resuming no longer needs the last one."""
        if self.keep is not None and state.is_world_process_zero:
            _delete_all_but(Path(args.output_dir), self.keep)

    def _delete(self, args: TrainingArguments) -> None:
        if self.keep is not None:  # and the newest in any case, to resume from
            _delete_all_but(Path(args.output_dir), max(self.keep, 2))

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _mark(self, args: TrainingArguments, state: TrainerState) -> None:
        history = state.log_history
        evaluated = self.trainer.evaluated_step == state.global_step
        row = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0), 4),
            "eval_loss": _last(history, "eval_loss") if evaluated else None,
            "train_loss": _mean_loss(history, state.global_step - state.max_steps // int(args.num_train_epochs)),
            "seconds": round(time.monotonic() - self.start, 1),
        }
        folder = self._folder(args, state)
        if evaluated:
            write_json(folder / "rows.json", self.trainer.row_losses)
        sync(folder)
        write_json(folder / COMPLETE, row)


def _delete_all_but(folder: Path, count: int) -> None:
    """Delete complete checkpoints but the best and the newest, ``count`` with a validation loss in all.

    What SIGTERM saved, without one, is deleted as soon as there is a newer one, and so changes no choice.
    """
    rows = [(json.loads(file.read_text("utf-8")), file.parent) for file in folder.glob(f"checkpoint-*/{COMPLETE}")]
    rows.sort(key=lambda row: row[0]["step"], reverse=True)
    evaluated = [(row["eval_loss"], path) for row, path in rows if row["eval_loss"] is not None]
    best = min(evaluated, default=None)
    evaluated.sort(key=lambda row: row is not best)
    kept = {path for _, path in evaluated[:count]} | {path for _, path in rows[: count > 1]}
    for _, path in rows:
        if path not in kept:
            (path / COMPLETE).unlink()  # first, so that nobody takes a part of it for a whole one
            shutil.rmtree(path)


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """How long a step takes: from the end of one to the end of the next, for a GPU may lag behind in between."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())

    @property
    def median(self) -> float | None:
        """Seconds, without the first step, which also makes what the others use; None for a single step."""
        steps = [end - begin for begin, end in pairwise(self.ends)]
        return round(median(steps), 4) if steps else None


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Keep ``metrics.jsonl`` up to date with what the trainer logged, also across a resumption."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the whole history again: it is small, and after a resumption it is the truth."""
        if state.is_world_process_zero:
            partial = self.path.with_suffix(".partial")
            lines = (json.dumps({name: _finite(value) for name, value in row.items()}) for row in state.log_history)
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            partial.replace(self.path)


class Curves(WandbCallback):  # type: ignore[misc]
    """wandb's curves. Training goes on without them if wandb fails: offline after the first time, then not at all."""

    _wandb: Any
    failures = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Send the configuration."""
        self._send(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Send a line."""
        self._send(super().on_log, *args, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Send the checkpoint, where WANDB_LOG_MODEL asks for it."""
        self._send(super().on_save, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Send the last model, where WANDB_LOG_MODEL asks for it."""
        self._send(super().on_train_end, *args, **kwargs)

    def _send(self, send: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        while self._wandb is not None:
            try:
                send(*args, **kwargs)
            except Exception as error:  # whatever it is, it is no reason to end a training
                self.failures += 1
                self._initialized = False
                if self.failures > 1 or not tracking.begin_again(error):
                    self._wandb = None
            else:
                return


def _mean_loss(history: list[dict[str, Any]], after: int) -> float | None:
    """The training loss over the steps after one: what was logged, each weighted by the steps that it is a mean of."""
    logged = [(int(row["step"]), float(row["loss"])) for row in history if "loss" in row and row["step"] > after]
    steps = [step - before for (step, _), before in zip(logged, [after, *(step for step, _ in logged)], strict=False)]
    total = sum(loss * of for (_, loss), of in zip(logged, steps, strict=True))
    # Rounded: a run that was stopped between two lines of the log has added up the same in another order.
    return round(total / sum(steps), 6) if logged else None


def _finite(value: Any) -> Any:
    """None for a number that JSON cannot write."""
    return value if not isinstance(value, float) or isfinite(value) else None


def _last(history: list[dict[str, Any]], name: str) -> float | None:
    return next((float(row[name]) for row in reversed(history) if name in row), None)
