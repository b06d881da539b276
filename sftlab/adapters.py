"""What is trained: peft's own configuration for a method of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftlab.config import Lora, NoPeft, PeftConfig, Qlora


def peft_of(values: dict[str, Any]) -> PeftConfig:
    """The method that a child process was given as plain values."""
    from pydantic import TypeAdapter

    made: PeftConfig = TypeAdapter(PeftConfig).validate_python(values)
    return made


def keep_inputs(model: Any) -> None:
    """Let autocast alone choose the number format of what adapters compute with.

    peft makes float32 of an adapter's input first, and autocast bfloat16 of that again: the same numbers in one more
    tensor, which is kept until the backward pass. (With dropout they are rounded once more.) DoRA computes the lengths
    of weights in the input's format, and is left as it is.
    """
    for layer in model.modules():
        if getattr(layer, "cast_input_dtype_enabled", False) and not getattr(layer, "lora_variant", None):
            layer.cast_input_dtype_enabled = False


def lora_config(peft: PeftConfig, untouched: Sequence[str] = ()) -> Any:
    """Peft's LoraConfig for a method, without adapters in the ``untouched`` parts, or None for full fine-tuning."""
    from peft import LoraConfig

    match peft:
        case NoPeft():
            return None
        case Lora() | Qlora():
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
