"""A checkpoint compared with its base model, and merged into it: its content decides, not its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftlab.runtime.store import digest

ADAPTER = "adapter_config.json"


def content(checkpoint: Path) -> str:
    """Hash the weights of a checkpoint: equal for checkpoints that answer alike."""
    files = sorted(checkpoint.glob("*.safetensors"))
    config = checkpoint / ADAPTER
    text = [f"{file.name} {digest(file)}" for file in files]
    text += [config.read_text("utf-8")] if config.is_file() else []
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def equals_base(checkpoint: Path, base: Path) -> bool:
    """Whether a checkpoint has the weights of its base model, as after the first step of a warm-up, or at step 0.

    An adapter equals the base if one factor of each product is 0. DoRA's magnitudes are trained too, so its adapters
    are taken to differ.
    """
    import torch

    own = _handles(checkpoint)
    if not own:  # checkpoint-0 has no weights
        return True
    if (checkpoint / ADAPTER).is_file():
        factors = [name for name in own if "lora_B" in name or "embedding_B" in name]
        magnitudes = any("lora_magnitude" in name for name in own)
        return not magnitudes and not any(bool(own[name].get_tensor(name).any()) for name in factors)
    before = _handles(base)
    for name, file in own.items():
        if name not in before:
            return False
        old, new = before[name].get_tensor(name), file.get_tensor(name)
        if old.shape != new.shape or not torch.equal(old.to(torch.bfloat16), new.to(torch.bfloat16)):
            return False
    return True


def _handles(folder: Path) -> Mapping[str, Any]:
    """The open file of each tensor in a folder: tensors are read one at a time."""
    from safetensors import safe_open

    files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - a file is not a mapping


def save_merged(base: Path, checkpoint: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """Save the weights of a checkpoint as those of a model in bfloat16, with the adapter merged if it is one.

    Adapters are merged in the same way as for the final model, so that the weights are the same.
    """
    from sftlab.model.base import load

    is_adapter = (checkpoint / ADAPTER).is_file()
    model: Any = load(base if is_adapter else checkpoint, dtype="bfloat16", trust_remote_code=trust_remote_code)
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload(safe_merge=True)
    model.generation_config.do_sample = True  # sampling options without sampling are refused
    model.save_pretrained(folder)
