"""The average of several checkpoints of one training, as a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from sftlab.model.variants import ADAPTER

# Files of a checkpoint that describe its model; others belong to the training.
DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja", "*.model")


def average(checkpoints: Sequence[Path], folder: Path) -> None:
    """Write the average of checkpoints into a folder.

    The average of adapters is that of their products B·A, which is not the product of the averages of B and A. It is
    exact as one adapter of n times the rank: the A of all adapters below each other, and the B beside each other,
    divided by n. All weights of a full fine-tuning are averaged one by one.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    first, count = checkpoints[0], len(checkpoints)
    is_adapter = (first / ADAPTER).is_file()
    for file in sorted(first.glob("*.safetensors")):
        parts = [load_file(checkpoint / file.name) for checkpoint in checkpoints]
        averaged = {}
        for name, tensor in parts[0].items():
            every = [part[name] for part in parts]
            if "lora_A" in name or "embedding_A" in name:
                averaged[name] = torch.cat(every, dim=0)
            elif "lora_B" in name or "embedding_B" in name:
                averaged[name] = torch.cat(every, dim=1) / count
            else:
                averaged[name] = torch.stack([one.double() for one in every]).mean(0).to(tensor.dtype)
        save_file({name: one.contiguous() for name, one in averaged.items()}, folder / file.name, {"format": "pt"})
    for pattern in (*DESCRIPTIONS, "*.index.json"):
        for file in first.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if is_adapter:
        config = json.loads((first / ADAPTER).read_text("utf-8"))
        # The factor of an adapter is alpha / r, or alpha / √r with rank stabilisation; it stays as it is.
        factor = sqrt(count) if config.get("use_rslora") else count
        config |= {"r": count * config["r"], "lora_alpha": factor * config["lora_alpha"]}
        (folder / ADAPTER).write_text(json.dumps(config, indent=2), encoding="utf-8")
