"""Fields of TRL's SFTConfig in ``train.extra``, checked before a model is loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from sftlab.config import TrainConfig
from sftlab.errors import Problem, shown
from sftlab.runtime.processes import RANK_VARIABLES
from sftlab.validation.libraries import SFT_FIELDS
from sftlab.validation.overrides import type_message

# Fields that the pipeline sets, each with the key to use instead, if there is one.
MANAGED = {
    "output_dir": "hydra.run.dir",
    "seed": "seed",
    "data_seed": "seed",
    "eval_strategy": None,
    "save_strategy": None,
    "save_steps": "train.eval_steps",
    "eval_delay": "train.eval_steps",
    "report_to": "tracking",
    "run_name": "name",
    "completion_only_loss": None,
    "dataset_kwargs": None,
    "load_best_model_at_end": None,
    "use_cpu": "instance.device",
    "do_train": None,
    "do_eval": None,
    "push_to_hub": None,
    "hub_token": None,
    "resume_from_checkpoint": None,
    "fp16": "instance.bf16",
    "model_init_kwargs": "model",
    "chat_template_path": "model.chat_template",
    "disable_tqdm": None,
    "fsdp": "instance.strategy",
    "auto_find_batch_size": "mode=plan",
    # Settings of TRL's own preparation of rows: they are tokenised before training here.
    "assistant_only_loss": "dataset.train_on",
    "dataset_text_field": "dataset.assistant",
    "truncation_mode": "train.allow_truncated_completion",
    "eos_token": "model.chat_template",
    "pad_token": None,
    "eval_packing": None,
    "shuffle_dataset": None,
    "dataset_num_proc": None,
}


def extra_problems(extra: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problems of ``train.extra``: fields that are set elsewhere, unknown fields, invalid values."""
    for name in extra:
        if name in TrainConfig.model_fields:
            yield Problem(f"train.extra.{name}", None, "has a key outside train.extra", f"set train.{name}")
        elif name in MANAGED:
            remedy = f"use {MANAGED[name]}" if MANAGED[name] else "leave it out"
            yield Problem(f"train.extra.{name}", None, "is set by sftlab", remedy)
    own = MANAGED.keys() | TrainConfig.model_fields.keys()
    if free := {name: value for name, value in extra.items() if name not in own}:
        yield from _values(free)


def unknown_field(name: str) -> Problem | None:
    """Return the problem of a key of ``train.extra`` that SFTConfig does not have; None if it has it."""
    if name in MANAGED or name in TrainConfig.model_fields or name in SFT_FIELDS:
        return None
    close = difflib.get_close_matches(name, SFT_FIELDS, n=1)
    remedy = f"did you mean {close[0]}?" if close else "see the fields of trl.SFTConfig"
    return Problem(f"train.extra.{name}", None, "SFTConfig has no such field", remedy)


def _values(extra: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the values by type, then by creating an SFTConfig, which checks combinations itself."""
    if unknown := [problem for problem in map(unknown_field, extra) if problem]:
        yield from unknown
        return
    from trl.trainer.sft_config import SFTConfig

    hints = get_type_hints(SFTConfig)
    for name, value in extra.items():
        with suppress(PydanticUserError):  # a type that pydantic cannot check
            try:
                TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            except ValidationError as error:
                yield Problem(f"train.extra.{name}", shown(value), type_message(error))
    # SFTConfig would wait for other ranks if a launcher around this process left its variables.
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if RANK_VARIABLES.fullmatch(name)}
    try:
        SFTConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **extra})
    except (TypeError, ValueError) as error:
        yield Problem(
            "train.extra", shown(extra), f"SFTConfig refuses it: {error}", "change or leave out the field that it names"
        )
    finally:
        os.environ.update(hidden)
