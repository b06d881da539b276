"""Merge a checkpoint in a child process, load the result again, and compare it with the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sftlab.dataset.token_rows import read_rows
from sftlab.errors import StageError
from sftlab.model.base import Base, stop_tokens
from sftlab.results import MergeCheck
from sftlab.runtime.processes import leave_out, serve
from sftlab.runtime.store import write_json

CHECK = "check.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Enough validation rows and prompts to reveal a broken merge, few enough to take seconds.
CHECK_ROWS, CHECK_PROMPTS, CHECK_TOKENS = 16, 4, 24
# Weights that are summed, and positions whose logits are computed, at once: less than 1 GiB each.
FINGERPRINT_PART, LOGIT_POSITIONS = 2**24, 256

Row = Mapping[str, Sequence[int]]
"""A tokenised row: ``input_ids``, and ``labels`` with -100 at tokens without a loss."""


class MergeTask(BaseModel):
    """A checkpoint, its base model, and the device on which adapter and merged model are compared."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    checkpoint: Path
    """Folder of the checkpoint: an adapter, or all weights."""
    base: Base
    """The base model."""
    tokens: Path
    """Folder of the tokenised rows."""
    device: str
    """cpu or cuda."""


def run(folder: Path, task: MergeTask) -> None:
    """Merge, save, load again and compare; write ``check.json``."""
    leave_out("bitsandbytes", "wandb")
    from peft import PeftModel

    from sftlab.model.base import load

    base, code = task.base, task.base.trust_remote_code
    split = read_rows(task.tokens, "validation")
    rows: list[Row] = [dict(row) for row in split.select(range(min(CHECK_ROWS, len(split))))]
    is_adapter = (task.checkpoint / "adapter_config.json").is_file()
    # Never into quantised weights: the base is loaded again, in the precision that is saved.
    model: Any = load(base.path if is_adapter else task.checkpoint, dtype="bfloat16", trust_remote_code=code)
    model.to(task.device).eval()
    before = _fingerprint(load(base.path, dtype="bfloat16", trust_remote_code=code))
    if is_adapter:
        model = PeftModel.from_pretrained(model, str(task.checkpoint)).eval()
    adapter_loss, adapter_tokens = _loss(model, rows), _greedy(model, rows)
    if is_adapter:
        model = model.merge_and_unload(safe_merge=True)
    counts = json.loads((task.tokens / "counts.json").read_text("utf-8"))
    _save(model, base, counts["turn_ends"], folder)

    merged = load(folder, dtype="bfloat16", trust_remote_code=code).eval()
    after = _fingerprint(merged)  # on the CPU, like the one before: a GPU sums in another order
    merged.to(task.device)
    changed = sum(before[name] != value for name, value in after.items() if name in before)
    if not changed:
        raise StageError(
            f"merge: no weight differs from the base model: the adapter in {task.checkpoint} is empty or was not "
            "applied; train again"
        )
    merged_loss, merged_tokens = _loss(merged, rows), _greedy(merged, rows)
    pairs = [pair for a, b in zip(adapter_tokens, merged_tokens, strict=True) for pair in zip(a, b, strict=False)]
    if not isfinite(merged_loss):
        raise StageError(
            f"merge: the validation loss of the merged model is {merged_loss}: the checkpoint {task.checkpoint} is "
            "broken; train with a lower train.learning_rate"
        )
    check = MergeCheck(
        adapter_loss=adapter_loss,
        merged_loss=merged_loss,
        rows=len(rows),
        agreeing_tokens=sum(a == b for a, b in pairs),
        compared_tokens=len(pairs),
        changed_tensors=changed,
        tensors=len(after),
    )
    write_json(folder / CHECK, check.model_dump())


def _save(model: Any, base: Base, turn_ends: list[int], folder: Path) -> None:
    """Save a model with all that an engine needs: tokenizer, generation config and processor."""
    tokenizer = base.tokenizer()
    model.config.use_cache = True
    model.generation_config = load_generation_config(base)
    # Engines that read this file stop at the token with which the model learned to end its answers.
    model.generation_config.eos_token_id = stop_tokens(base.path, tokenizer, turn_ends)
    model.to("cpu").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in PROCESSOR_FILES:  # engines need them for models that also read images, even for text alone
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)


def load_generation_config(base: Base) -> Any:
    """Load the base model's generation config, or create an empty one."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(base.path, local_files_only=True)
    except OSError:
        return GenerationConfig()
    # Sampling options without sampling are a contradiction, which transformers refuses to save.
    if config.temperature not in (None, 1.0) or config.top_p not in (None, 1.0) or config.top_k not in (None, 50):
        config.do_sample = True
    return config


def _fingerprint(model: Any) -> dict[str, tuple[float, float]]:
    """Sum the values and magnitudes of each tensor in float64, a part at a time to limit memory."""
    sums = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            total = magnitude = 0.0
            for part in tensor.flatten().split(FINGERPRINT_PART):
                exact = part.double()
                total, magnitude = total + float(exact.sum()), magnitude + float(exact.abs().sum())
            sums[name] = (total, magnitude)
    return sums


def _loss(model: Any, rows: Sequence[Row]) -> float:
    """Compute nats per supervised token over the rows. Logits are computed for a few such tokens at a time."""
    import torch
    from torch.nn import functional

    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        labels = torch.tensor(row["labels"], device=model.device)[1:]
        supervised = (labels != -100).nonzero().squeeze(1)
        with torch.no_grad(), _backbone_once(model):
            for positions in supervised.split(LOGIT_POSITIONS):
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0].float()
                total += float(functional.cross_entropy(logits, labels[positions], reduction="sum"))
        count += len(supervised)
    return total / count


@contextmanager
def _backbone_once(model: Any) -> Iterator[None]:
    """Run everything below the output head in the first call only, and reuse its result in further calls."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = whole.base_model
    if backbone is whole:  # a model without a named backbone runs whole each time
        yield
        return
    run = backbone.forward
    results: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(run(*args, **kwargs))
        return results[0]

    backbone.forward = once
    try:
        yield
    finally:
        del backbone.forward


def _greedy(model: Any, rows: Sequence[Row]) -> list[list[int]]:
    """Generate the first greedy tokens after each of a few prompts."""
    import torch

    completions = []
    for row in rows[:CHECK_PROMPTS]:
        prompt = row["input_ids"][: next(at for at, label in enumerate(row["labels"]) if label != -100)]
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=CHECK_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        completions.append(out[0, len(prompt) :].tolist())
    return completions


if __name__ == "__main__":
    serve(MergeTask, run)
