"""LoRA's two products and their sum as one autograd function: fewer kernels and fewer passes over a layer's output.

The numbers are those of peft's own layer: bit-equal in float32 on a CPU. In bfloat16 the scale is applied to the
product before it is rounded, and gradients of the adapters are rounded once instead of twice.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from sftlab.errors import ConfigError, Problem


class LoraProduct(torch.autograd.Function):  # type: ignore[misc]
    """``result + scale · (x Aᵀ) Bᵀ`` (Hu et al. 2021, arXiv 2106.09685), written into ``result``.

    Shapes: x (…, in), A (r, in), B (out, r), result (…, out). The backward pass needs x and x Aᵀ only.
    """

    @staticmethod
    def forward(ctx: Any, result: Any, x: Any, a: Any, b: Any, scale: float) -> Any:
        """Compute the sum in the number format of ``result``."""
        ctx.formats = a.dtype, b.dtype
        x, a, b = x.to(result.dtype), a.to(result.dtype), b.to(result.dtype)
        hidden = x.flatten(0, -2) @ a.T
        ctx.mark_dirty(result)
        result.view(-1, result.shape[-1]).addmm_(hidden, b.T, alpha=scale)
        ctx.save_for_backward(x, a, b, hidden)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """Gradients of result, x, A and B."""
        x, a, b, hidden = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        inner = (flat @ b).mul_(ctx.scale)
        for_a = (inner.T @ x.flatten(0, -2)).to(ctx.formats[0])
        for_b = (flat.T @ hidden).mul_(ctx.scale).to(ctx.formats[1])
        for_x = (inner @ a).view_as(x) if ctx.needs_input_grad[1] else None
        return gradient, for_x, for_a, for_b, None


class Fused(LoraVariant):  # type: ignore[misc]
    """The part of a LoRA layer's forward pass that peft leaves to a variant."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Any, result: Any, **_: Any) -> Any:
        """Add the adapter's product to the base layer's output."""
        x = module.lora_dropout[active_adapter](x)
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        return LoraProduct.apply(result, x, a, b, module.scaling[active_adapter])


def fuse(model: Any) -> int:
    """Give every plain adapter of a linear layer, quantised or not, the fused product; return how many there are.

    Raises:
        ConfigError: there is none, because the adapters are of another kind.
    """
    adapters = [
        (layer, name)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for name, down in layer.lora_A.items()
        if isinstance(down, nn.Linear) and name not in layer.lora_variant
    ]
    for layer, name in adapters:
        layer.lora_variant[name] = Fused()
    if not adapters:
        raise ConfigError(Problem("peft.fused", "true", "no layer has a plain LoRA adapter", "set peft.fused=false"))
    return len(adapters)
