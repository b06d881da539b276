"""Translate the section peft into peft's own configuration, and adjust its layers."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from sftlab.config import Lora, NoPeft, PeftConfig, Qlora
from sftlab.model.base import beside_text, decoder_layers


def keep_inputs(model: Any) -> None:
    """Keep the number format of an adapter's input; autocast converts it for the computation.

    peft converts the input to float32 first, and autocast back to bfloat16: the same numbers in one more tensor, which
    is retained until the backward pass. (With dropout they are rounded once more.) DoRA computes norms of weights in
    the input's format, and stays unchanged.
    """
    for layer in model.modules():
        if getattr(layer, "cast_input_dtype_enabled", False) and not getattr(layer, "lora_variant", None):
            layer.cast_input_dtype_enabled = False


def lora_config(peft: PeftConfig, model: Any) -> Any:
    """Create a LoraConfig of peft, with adapters in the text part of a model only; None for full fine-tuning."""
    from peft import LoraConfig

    match peft:
        case NoPeft():
            return None
        case Lora() | Qlora():
            excluded = [*map(re.escape, beside_text(model)), *map(re.escape, _lower_layers(peft, model))]
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=peft.r,
                lora_alpha=peft.lora_alpha,
                lora_dropout=peft.lora_dropout,
                target_modules=peft.target_modules,
                use_rslora=peft.use_rslora,
                use_dora=peft.use_dora,
                exclude_modules=rf"(.*\.)?({'|'.join(excluded)})\..*" if excluded else None,
            )


def _lower_layers(peft: Lora | Qlora, model: Any) -> list[str]:
    """Name the decoder layers without adapters; at least one layer has adapters."""
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers[: len(layers) - ceil(peft.top_layers * len(layers))]]
