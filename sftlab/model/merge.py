"""The chosen checkpoint → one model in bf16 with tokenizer, chat template and generation config, checked."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.config import MergeConfig
from sftlab.errors import StageError
from sftlab.instance.machine import Machine
from sftlab.model.base import Base, stop_tokens
from sftlab.runtime.processes import child, leave_out, serve
from sftlab.runtime.store import Stage, Store, versions, write_json

log = logging.getLogger(__name__)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Enough validation rows and prompts to see a broken merge, few enough to cost seconds.
CHECK_ROWS, CHECK_PROMPTS, CHECK_TOKENS = 16, 4, 24
# Weights that are added up, and positions whose logits are computed, at once: less than 1 GiB each.
FINGERPRINT_PART, LOGIT_POSITIONS = 2**24, 256


@dataclass(frozen=True)
class Merged:
    """The finished stage: a model folder, and ``check.json`` with what the check measured."""

    stage: Stage

    @property
    def check(self) -> dict[str, Any]:
        """Validation loss of adapter and merged model, greedy agreement, changed weights."""
        check: dict[str, Any] = json.loads((self.stage.path / "check.json").read_text("utf-8"))
        return check


def inputs(checkpoint: Path, base: Base) -> dict[str, Any]:
    """What the merged model is made of: a checkpoint of a finished training, and its base."""
    step = int(checkpoint.name.split("-")[1])
    return {
        "version": 2,
        "train": checkpoint.parent.name,
        "step": step,
        "base": base.identity,
        "libraries": versions("torch", "transformers", "peft"),
    }


def make(store: Store, checkpoint: Path, base: Base, tokens: Path, machine: Machine, cfg: MergeConfig) -> Merged:
    """Merge a checkpoint of the store into its base, and compare the result with the adapter.

    Raises:
        StageError: no weight changed, the model does not load again, or merging costs more validation
            loss than ``merge.max_loss_gap``.
    """

    def build(folder: Path) -> None:
        given = {
            "checkpoint": str(checkpoint.resolve()),
            "base": str(base.path.resolve()),
            "trust_remote_code": base.trust_remote_code,
            "chat_template": base.chat_template,
            "tokens": str(tokens.resolve()),
            "device": machine.device,
        }
        child("sftlab.model.merge", folder, given, environment=machine.environment())

    merged = Merged(store.stage("merged", inputs(checkpoint, base), build))
    check = merged.check
    gap = check["merged_loss"] - check["adapter_loss"]
    if gap > cfg.max_loss_gap:
        raise StageError(
            f"merge: costs {gap:.4f} nats per token on validation rows (adapter {check['adapter_loss']:.4f}, merged "
            f"{check['merged_loss']:.4f}), more than merge.max_loss_gap={cfg.max_loss_gap}; raise it, or train in bf16"
        )
    log.info(
        "merge: validation loss %.4f with the adapter, %.4f merged; %d of %d greedy tokens agree",
        check["adapter_loss"],
        check["merged_loss"],
        check["agreeing_tokens"],
        check["compared_tokens"],
    )
    return merged


# ------------------------------------------------------------------- in the child process


def run(folder: Path, given: dict[str, Any]) -> None:
    """Merge, save, load again and compare."""
    leave_out("bitsandbytes", "wandb")
    import torch
    from datasets import load_from_disk
    from peft import PeftModel

    from sftlab.model.base import load

    checkpoint = Path(given["checkpoint"])
    base = Base("base", Path(given["base"]), "", given["trust_remote_code"], given["chat_template"])
    rows = load_from_disk(str(Path(given["tokens"]) / "validation"))
    rows = [dict(row) for row in rows.select(range(min(CHECK_ROWS, len(rows))))]
    code = base.trust_remote_code
    adapter = (checkpoint / "adapter_config.json").is_file()
    # Never into quantised weights: the base is loaded again, in the precision that is saved.
    model: Any = load(base.path if adapter else checkpoint, dtype="bfloat16", trust_remote_code=code)
    model.to(given["device"]).eval()
    before = _fingerprint(load(base.path, dtype="bfloat16", trust_remote_code=code))
    if adapter:
        model = PeftModel.from_pretrained(model, str(checkpoint)).eval()
    adapter_loss, adapter_tokens = _loss(model, rows), _greedy(model, rows)
    if adapter:
        model = model.merge_and_unload(safe_merge=True)
    model.config.use_cache = True
    tokenizer = base.tokenizer()
    # Settings of sampling do not go with greedy decoding, and saving refuses contradictions.
    model.generation_config = load_generation_config(base)
    counts = json.loads((Path(given["tokens"]) / "counts.json").read_text("utf-8"))
    # Wherever the model is served, it stops at the token that it learned to end its answers with.
    model.generation_config.eos_token_id = stop_tokens(base.path, tokenizer, counts["turn_ends"])
    model.to("cpu").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in PROCESSOR_FILES:  # of models that read images too, which engines ask for before any text
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)

    again = load(folder, dtype="bfloat16", trust_remote_code=code).eval()
    after = _fingerprint(again)  # on the CPU, as before: a GPU adds up in another order
    again.to(given["device"])
    changed = sum(before[name] != value for name, value in after.items() if name in before)
    if not changed:
        raise StageError("merge: no weight differs from the base model; the adapter is empty or was not applied")
    merged_loss, merged_tokens = _loss(again, rows), _greedy(again, rows)
    pairs = [pair for a, b in zip(adapter_tokens, merged_tokens, strict=True) for pair in zip(a, b, strict=False)]
    check = {
        "adapter_loss": adapter_loss,
        "merged_loss": merged_loss,
        "rows": len(rows),
        "agreeing_tokens": sum(a == b for a, b in pairs),
        "compared_tokens": len(pairs),
        "changed_tensors": changed,
        "tensors": len(after),
    }
    if not torch.isfinite(torch.tensor(merged_loss)):
        raise StageError(f"merge: the merged model's validation loss is {merged_loss}; the checkpoint is broken")
    write_json(folder / "check.json", check)


def load_generation_config(base: Base) -> Any:
    """The base model's generation config, or an empty one."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(base.path, local_files_only=True)
    except OSError:
        return GenerationConfig()
    if config.temperature not in (None, 1.0) or config.top_p not in (None, 1.0) or config.top_k not in (None, 50):
        config.do_sample = True
    return config


def _fingerprint(model: Any) -> dict[str, tuple[float, float]]:
    """Sums over each tensor, in float64, a part at a time: of an embedding's copy a GPU might run out of memory."""
    sums = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            total = magnitude = 0.0
            for part in tensor.flatten().split(FINGERPRINT_PART):
                exact = part.double()
                total, magnitude = total + float(exact.sum()), magnitude + float(exact.abs().sum())
            sums[name] = (total, magnitude)
    return sums


def _loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Nats per target token over the rows. Logits are computed for the targets only, a few positions at a time."""
    import torch
    from torch.nn import functional

    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        labels = torch.tensor(row["labels"], device=model.device)[1:]
        targets = (labels != -100).nonzero().squeeze(1)
        with torch.no_grad(), _backbone_once(model):
            for positions in targets.split(LOGIT_POSITIONS):
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0].float()
                total += float(functional.cross_entropy(logits, labels[positions], reduction="sum"))
        count += len(targets)
    return total / count


@contextmanager
def _backbone_once(model: Any) -> Iterator[None]:
    """Run what is below the output head in the first call only; further calls get its first result."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = whole.base_model
    if backbone is whole:  # a model that does not name its backbone is run as a whole each time
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


def _greedy(model: Any, rows: list[dict[str, Any]]) -> list[list[int]]:
    """The first greedy tokens after each of a few prompts."""
    import torch

    made = []
    for row in rows[:CHECK_PROMPTS]:
        prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=CHECK_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        made.append(out[0, len(prompt) :].tolist())
    return made


if __name__ == "__main__":
    serve(run)
