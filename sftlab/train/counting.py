"""Count the memory and the floating-point operations of a model's forward and backward pass.

The model is on fake tensors, which have a shape and no content, or on real ones. What is counted is what autograd
retains, whatever the architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

# What TRL's loss holds of the logits on a GPU: a tile of 4,096 tokens and this many words, in bfloat16 and in float32.
TILE_TOKENS, TILE_WORDS, TILE_BYTES = 4096, 8192, 6


@dataclass(frozen=True)
class Batch:
    """Sizes of a batch of one process.

    ``length`` is the number of tokens of the longest row, ``positions`` the number of positions at which any row has a
    target, and ``targets`` the number of targets in all rows.
    """

    rows: int
    length: int
    positions: int
    targets: int


@dataclass
class Counted:
    """Bytes besides the weights, at the peak and when the output head starts, and floating-point operations."""

    peak: float = 0.0
    retained: float = 0.0
    flops: float = 0.0


def count(model: Any, batch: Batch, *, cpu: bool, bf16: bool, backward: bool, masked: bool) -> Counted:
    """Run a batch through a model with the loss of ``sftlab.train.trainer``, and count.

    ``cpu`` is whether the training is on a CPU; the count itself always is. ``bf16`` is autocast. ``masked`` is whether
    attention has a mask for each row.
    """
    import torch
    from torch.nn import functional

    counted = Counted()
    with (
        _rows_as_one_sequence_each(),
        _counting(model, counted),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        torch.set_grad_enabled(backward),
    ):
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        # On a GPU TRL's loss computes logits in tiles, which are added below.
        positions = torch.arange(batch.positions if cpu else 1)
        mask = torch.ones_like(ids) if masked else None
        run = partial(model, input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=positions)
        logits = run().logits.flatten(0, 1)
        logits = logits[torch.arange(min(batch.targets, len(logits)))].float()
        loss = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
        del logits
        if backward:
            loss.backward()
    if not cpu:
        text = model.config.get_text_config()
        counted.peak += min(batch.targets, TILE_TOKENS) * min(text.vocab_size, TILE_WORDS) * TILE_BYTES
        counted.peak += batch.targets * text.hidden_size * 4  # their gradient, accumulated in float32
        # Forward once; backward forward again, and the gradient of the hidden states.
        counted.flops += 2.0 * batch.targets * text.hidden_size * text.vocab_size * (3 if backward else 1)
    return counted


@contextmanager
def _rows_as_one_sequence_each() -> Iterator[None]:
    """Have transformers take each row as one sequence; fake tensors do not show that, and it would add a mask."""
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, size = query.shape
    return int(2 * batch * heads * length * key.shape[2] * (size + value.shape[3]))


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """The scores once more, and two gradients of each product."""
    batch, heads, length, size = query.shape
    return int(2 * batch * heads * length * key.shape[2] * (3 * size + 2 * value.shape[3]))


@contextmanager
def _counting(model: Any, counted: Counted) -> Iterator[None]:
    """Count what is allocated and computed inside, besides the weights of the model."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter
    from torch.utils.flop_counter import flop_registry

    # torch's registry has attention only on GPUs, and in torch 2.11 none with fewer key heads than query heads.
    aten = torch.ops.aten
    formulas = {
        **flop_registry,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }

    class Count(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.now = 0
            self.known = {id(parameter.untyped_storage()) for parameter in model.parameters()}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if (formula := formulas.get(func._overloadpacket)) is not None:
                counted.flops += formula(*args, **(kwargs or {}), out_val=out)
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor.untyped_storage())
            return out

        def add(self, storage: Any) -> None:
            number = id(storage)
            if number not in self.known:
                self.known.add(number)
                self.now += storage.nbytes()
                counted.peak = max(counted.peak, self.now)
                weakref.finalize(storage, self.free, number, storage.nbytes())

        def free(self, number: int, size: int) -> None:
            self.known.discard(number)
            self.now -= size

    counter = Count()

    def at_head(*_: Any) -> None:
        counted.retained = float(counter.now)

    weights = [parameter.untyped_storage() for parameter in model.parameters()]  # so that their ids are not reused
    hook = model.get_output_embeddings().register_forward_pre_hook(at_head)
    try:
        with counter:
            yield
    finally:
        hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
        del weights
