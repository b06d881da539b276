"""TRL's SFTTrainer with a cheaper loss on the CPU, a validation loss per token and batches with little padding."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn import functional
from torch.utils.data import DataLoader
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.config import TrainConfig
from sftlab.model.base import needs_padding_mask
from sftlab.records import IGNORED
from sftlab.train.batches import StepSampler, row_lengths
from sftlab.train.schedule import Timeline

Batch = dict[str, torch.Tensor]
"""``input_ids``, ``labels`` and what else the model takes, of shape (rows, tokens)."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for tokenised rows (``input_ids`` and ``labels``)."""

    # Step of the last validation, and its sums for each row in order: nats and tokens.
    evaluated_step: int | None = None
    row_losses: list[list[float]]
    sampler: StepSampler | None = None
    padding_mask: bool
    lengths: list[int]
    train_dataset: Any
    # Known when training begins: with packing, the rows per epoch are counted by TRL.
    timeline: Timeline

    def __init__(self, *args: Any, settings: TrainConfig, **kwargs: Any) -> None:
        self.settings = settings
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
        # The row with which StepSampler fills a step.
        self.train_dataset = concatenate_datasets([rows, Dataset.from_dict(without_target, features=rows.features)])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """StepSampler for the default train_sampling_strategy, ``random``; otherwise the sampler of transformers."""
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        self.sampler = StepSampler(
            self.lengths,
            rows_per_step=self.rows_per_step,
            ranks=self.args.world_size,
            micro_batches=self.args.gradient_accumulation_steps,
            seed=self.args.data_seed,
            hidden=self.model.config.get_text_config().hidden_size,
            padded=not self.padding_free,
            rank=self.args.process_index,
        )
        return self.sampler

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Number of steps and epochs, from which the timeline follows."""
        values = super().set_initial_training_values(*args, **kwargs)
        self.timeline = Timeline(self.settings, steps_per_epoch=values[1])
        return values

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, or nothing if training resumes from its last step; transformers would train one more."""
        if self.control.should_training_stop or self.state.global_step >= self.timeline.total:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step over all ranks."""
        return int(self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the target tokens, in nats.

        On a CPU, TRL's chunked loss takes half as long as the model itself. There the output head is applied only to
        positions that have a target, all at once; on other devices TRL's own loss is used.
        """
        if not self.own_head or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs["attention_mask"] if "attention_mask" in inputs else inputs["input_ids"]
        nll, _ = token_losses(model, inputs)
        self._total_train_tokens += int(self.accelerator.reduce(mask.new_tensor(mask.numel())).item())
        total = num_items_in_batch if num_items_in_batch is not None else nll.numel()
        loss = nll.sum() / torch.as_tensor(total).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count covers all ranks, and the gradients of the ranks are averaged.
            loss = loss * self.accelerator.num_processes
        return loss

    @property
    def own_head(self) -> bool:
        """Whether training applies the output head by ``token_losses``: on a CPU, for the plain loss."""
        plain = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        return self.args.device.type == "cpu" and plain

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The batches of a step, and their number of target tokens, in which each row counts once.

        accelerate repeats the first rows in the last batches, so that all ranks have the same number of batches. The
        repeated rows get no target. (Packed rows are one sequence, and are left as they are.)
        """
        return super().get_batch_samples(map(self._without_repetitions, epoch_iterator), num_batches, device)

    def _without_repetitions(self, batch: Batch) -> Batch:
        state, labels = self.accelerator.gradient_state, batch["labels"]
        if state.end_of_dataloader and state.remainder > 0 and not self.args.packing:
            own = max(0, state.remainder - self.accelerator.process_index * self.args.per_device_train_batch_size)
            if self.padding_free:  # the rows are one sequence; each starts at position 0
                starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
                labels[:, (starts[own] if own < len(starts) else labels.size(1)) :] = IGNORED
            else:
                labels[own:] = IGNORED
        return batch

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss: total negative log-likelihood over total target tokens, independent of the batches.

        ``row_losses`` retains nats and tokens of each row; selection uses them to find checkpoints whose difference is
        within the noise.

        Raises:
            Terminated: SIGTERM was received, and a callback has saved a checkpoint.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        # The training collator would drop the borders of packed rows.
        collator = DataCollatorForLanguageModeling(pad_token_id=self.processing_class.pad_token_id)
        loader = self.accelerator.prepare_data_loader(
            # With its own generator: iterating draws a seed, and the draws of training must be the same whether a
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
        try:
            for batch in loader:
                self.control: Any = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                with torch.no_grad(), self.compute_loss_context_manager():
                    row_nll, row_tokens = self._row_losses(model, batch)
                both = torch.stack([row_nll.double(), row_tokens.double()], dim=1)
                sums += self.accelerator.gather_for_metrics(both).tolist()
        finally:
            model.train(training)
        self.row_losses, self.evaluated_step = sums, self.state.global_step
        tokens = sum(row[1] for row in sums)
        metrics = {
            f"{metric_key_prefix}_loss": sum(row[0] for row in sums) / tokens,
            f"{metric_key_prefix}_tokens": tokens,
            f"{metric_key_prefix}_runtime": round(time.monotonic() - start, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _row_losses(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood and number of target tokens of each row of a batch."""
        tokens = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
        if self.args.device.type == "cpu":
            nll, rows = token_losses(model, dict(batch))
            return nll.new_zeros(len(tokens)).index_add(0, rows, nll), tokens
        outputs = model(**batch, fused_lm_head=True)
        return -outputs.log_probs.float().sum(dim=1), tokens

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL would add one to every checkpoint, and the merged model gets its own."""


def _without_mask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Drop a batch's attention mask: padding is at the end of a row, where no token of the row attends to it."""
    return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}


def token_losses(model: Any, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every target token of a batch, and the row of each: two flat tensors.

    Only positions at which a row of the batch has a target go through the output head.
    """
    labels = inputs.pop("labels")[:, 1:]
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    targets = labels[:, positions]
    mask = targets != IGNORED
    nll = functional.cross_entropy(logits[mask].float(), targets[mask], reduction="none")
    return nll, mask.nonzero()[:, 0]
