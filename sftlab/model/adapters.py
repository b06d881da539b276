"""What is trained: peft's own configuration for a method of ours."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from sftlab.config import Lora, NoPeft, PeftConfig, Qlora
from sftlab.model.base import beside_text, decoder_layers


def keep_inputs(model: Any) -> None:
    """Let autocast alone choose the number format of what adapters compute with.

    peft makes float32 of an adapter's input first, and autocast bfloat16 of that again: the same numbers in one more
    tensor, which is kept until the backward pass. (With dropout they are rounded once more.) DoRA computes the lengths
    of weights in the input's format, and is left as it is.
    """
    for layer in model.modules():
        if getattr(layer, "cast_input_dtype_enabled", False) and not getattr(layer, "lora_variant", None):
            layer.cast_input_dtype_enabled = False


def lora_config(peft: PeftConfig, model: Any) -> Any:
    """Peft's LoraConfig for a method and a model, without adapters beside its text part; None for full fine-tuning."""
    from peft import LoraConfig

    match peft:
        case NoPeft():
            return None
        case Lora() | Qlora():
            untouched = [*map(re.escape, beside_text(model)), *map(re.escape, _lower_layers(peft, model))]
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=peft.r,
                lora_alpha=peft.lora_alpha,
                lora_dropout=peft.lora_dropout,
                target_modules=peft.target_modules,
                use_rslora=peft.use_rslora,
                use_dora=peft.use_dora,
                exclude_modules=rf"(.*\.)?({'|'.join(untouched)})\..*" if untouched else None,
            )


def _lower_layers(peft: Lora | Qlora, model: Any) -> list[str]:
    """The names of the decoder's layers without adapters; at least one layer has some."""
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers[: len(layers) - ceil(peft.top_layers * len(layers))]]
