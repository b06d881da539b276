"""Time one layer of a model in float32 and in bfloat16, in a child process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sftlab.results import LayerSeconds
from sftlab.runtime.processes import leave_out, serve
from sftlab.runtime.store import write_json

SECONDS = "seconds.json"
# A measurement repeats each number format in turn, at least this often and for about this long.
ROUNDS, BUDGET_SECONDS = 3, 0.2
# Limits of a timed pass: short on any CPU, and long enough to use all of its cores.
FLOPS, TOKENS = 1e10, 512
# Passes over few tokens decide if one format takes this many times as long as the other.
FEW, CLEAR = 32, 4


class PrecisionTask(BaseModel):
    """The model of which a layer is timed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    base: Path
    """Folder of the base model, of which only the config is read."""
    trust_remote_code: bool
    """model.trust_remote_code."""
    cpu: str
    """Model of the CPU, for the record."""


def run(folder: Path, task: PrecisionTask) -> None:
    """Time training steps and a forward pass of one layer, and write ``seconds.json``."""
    leave_out("bitsandbytes", "wandb")
    from transformers import AutoConfig

    code = task.trust_remote_code
    config = AutoConfig.from_pretrained(task.base, trust_remote_code=code, local_files_only=True)
    single = one_layer(config, "float32", code=code)
    half = copy.deepcopy(single).bfloat16()
    size = sum(parameter.numel() for parameter in single.parameters())
    tokens = int(min(TOKENS, max(FEW, FLOPS / (4 * size))))
    trained = copy.deepcopy(single).requires_grad_()
    for layer in (single, half):
        layer.requires_grad_(requires_grad=False)
        layer.enable_input_require_grads()  # as with adapters: a gradient of the input, none of the weights
    seconds = LayerSeconds(
        cpu=task.cpu,
        adapters=_compare(tokens, {"float32": partial(_step, single), "bfloat16": partial(_step, half, autocast=True)}),
        all_weights=_compare(
            tokens, {"float32": partial(_step, trained), "bfloat16": partial(_step, trained, autocast=True)}
        ),
        generation=_compare(64, {"float32": partial(_forward, single), "bfloat16": partial(_forward, half)}),
    )
    write_json(folder / SECONDS, seconds.model_dump())


def one_layer(config: Any, dtype: str, *, attention: str = "sdpa", code: bool = False) -> Any:
    """Create a model's text part with one layer, a vocabulary of 64 words and random weights, from its config."""
    import torch
    from transformers import AutoModelForCausalLM

    text = copy.deepcopy(config.get_text_config())
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 64, 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return AutoModelForCausalLM.from_config(
        text, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=code
    )


def _step(layer: Any, tokens: int, *, autocast: bool = False) -> None:
    """Run forward and backward over rows of at most 256 tokens."""
    import torch

    length = min(tokens, 256)
    ids = torch.zeros(tokens // length, length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = layer(input_ids=ids, use_cache=False).logits
    logits.float().sum().backward()
    layer.zero_grad()


def _forward(layer: Any, tokens: int) -> None:
    """Run forward over single tokens of different answers, as a step of generation does."""
    import torch

    with torch.inference_mode():
        layer(input_ids=torch.zeros(min(tokens, 64), 1, dtype=torch.long), use_cache=False)


def _compare(tokens: int, passes: Mapping[str, Callable[[int], None]]) -> dict[str, float]:
    """Return the best time of each pass in seconds. They are timed in turn, so that other load slows down both.

    On a CPU without instructions for bfloat16 a pass takes 20 times as long as in float32: a few tokens show it.
    """
    best: dict[str, float] = {}
    for count in (FEW, tokens):
        best, begin, rounds = dict.fromkeys(passes, inf), time.perf_counter(), 0
        for work in passes.values():
            work(count)  # the first pass compiles and allocates
        while rounds < ROUNDS or time.perf_counter() - begin < BUDGET_SECONDS:
            for name, work in passes.items():
                start = time.perf_counter()
                work(count)
                best[name] = min(best[name], time.perf_counter() - start)
            rounds += 1
        if max(best.values()) > CLEAR * min(best.values()):
            break
    return {name: round(seconds, 6) for name, seconds in best.items()}


if __name__ == "__main__":
    serve(PrecisionTask, run)
