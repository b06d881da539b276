"""Settings that need less memory, for a training that does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from sftlab.config import Config, Lora, Qlora
from sftlab.dataset.tokenize import Tokenized
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.train.plan import cell_of, estimates


def smaller(cfg: Config, machine: Machine) -> Iterator[tuple[str, Config]]:
    """Changes that need less memory, mildest first: the overrides, and the configuration with them.

    None of them changes which rows are in an optimizer step, and none truncates a row.
    """

    def changed(**keys: bool | int) -> tuple[str, Config]:
        words = [f"train.{name}={str(value).lower()}" for name, value in keys.items()]
        return " ".join(words), cfg.model_copy(update={"train": cfg.train.model_copy(update=keys)})

    size, rows_per_step = cfg.train.per_device_train_batch_size, machine.effective_batch(cfg.train)
    halved = [size // 2**power for power in range(1, size.bit_length())]
    batches = [
        {"per_device_train_batch_size": less, "global_batch_size": rows_per_step}
        for less in halved
        if rows_per_step % (less * machine.world_size) == 0
    ]
    if not cfg.train.gradient_checkpointing:
        yield changed(gradient_checkpointing=True)
    if batches:
        yield changed(**batches[0])
    if len(batches) > 1:
        yield changed(**batches[-1])
    if batches and not cfg.train.gradient_checkpointing:
        yield changed(gradient_checkpointing=True, **batches[-1])
    if isinstance(cfg.peft, Lora):
        values = {**cfg.peft.model_dump(), "method": "qlora"}
        qlora = Qlora(**values, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        yield "peft=qlora", cfg.model_copy(update={"peft": qlora})


def changes(cfg: Config, machine: Machine) -> str:
    """The changes as text, without an estimate."""
    lines = ["to need less memory, mildest first:", *(f"  {words}" for words, _ in smaller(cfg, machine))]
    return "\n".join([*lines, "  a smaller train.max_length, or an instance= with more memory"])


def advice(cfg: Config, base: Base, tokens: Tokenized, machine: Machine) -> str:
    """The changes as text, each with the memory that training would then take."""
    options = list(smaller(cfg, machine))
    cfgs = [cfg, *(changed for _, changed in options)]
    steps = estimates(cfgs, base, tokens, machine)
    now, *others = (cell_of(each, machine, step) for each, step in zip(cfgs, steps, strict=True))
    capacity = "an unknown amount" if now.capacity_gib is None else f"{now.capacity_gib:.1f} GiB"
    lines = [f"training needs about {now.training_gib:.1f} GiB per process, and {capacity} is available; to need less:"]
    for (words, _), other in zip(options, others, strict=True):
        lines.append(f"  {words}: about {other.training_gib:.1f} GiB")
    lines.append(
        f"  a shorter longest row (it has {steps[0].work.longest.length:,} tokens, "
        f"train.max_length={cfg.train.max_length}), or an instance= with more memory"
    )
    return "\n".join(lines)
