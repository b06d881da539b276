"""Floating-point operations of a training, from the weights of its model."""

from __future__ import annotations

from typing import Any

from sftlab.instance.machine import Machine, peak_flops
from sftlab.model.base import beside_text, decoder_layers

# What configs call the number of experts per layer.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def flops_per_token(model: Any, supervised: float) -> float:
    """Floating-point operations of the model per training token, forward and backward.

    Every weight takes 2 operations forward, 2 backward for the gradient of its input, and 2 for its own gradient if it
    is trained: 6 in full fine-tuning (PaLM, appendix B), 4 for frozen weights beside adapters, and 2 for layers below
    the lowest trained one (without gradient checkpointing). The output head runs on the ``supervised`` share of the
    tokens.

    Not counted: embeddings, which are looked up; the parts of a model that text does not pass through; experts that a
    token is not routed to; normalisations, attention scores, and what checkpointing recomputes.
    """
    from torch import nn

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings().weight
    uncounted = {
        id(weight) for name in beside_text(base) for weight in base.base_model.get_submodule(name).parameters()
    }
    uncounted |= {
        id(part.weight) for part in base.modules() if isinstance(part, nn.Embedding) and part.weight is not head
    }
    routed, forward_only = _routed_share(base.config.get_text_config()), _forward_only(base)
    total = 0.0
    for name, weight in base.named_parameters():
        if id(weight) in uncounted or weight.ndim < 2:
            continue
        share = supervised if weight is head else routed if ".experts." in name else 1.0
        operations = 6 if weight.requires_grad else 2 if id(weight) in forward_only else 4
        total += operations * share * parameter_size(weight)
    return total


def _routed_share(config: Any) -> float:
    """Share of the experts that a token is routed to; 1 for a model without experts."""
    experts = next((size for name in EXPERTS if (size := getattr(config, name, None))), None)
    return (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0


def _forward_only(base: Any) -> set[int]:
    """The ids of weights in the layers below the lowest trained one, which need no backward pass."""
    ids = set[int]()
    for layer in decoder_layers(base):
        # With checkpointing the output of the embeddings requires a gradient.
        if base.is_gradient_checkpointing or any(weight.requires_grad for weight in layer.parameters()):
            break
        ids |= {id(weight) for weight in layer.parameters()}
    return ids


def parameter_size(parameter: Any) -> int:
    """Number of weights in a parameter; a 4-bit one holds two weights in each byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def utilization(flops: float, speed: float | None, devices: int, machine: Machine) -> float | None:
    """Model FLOPs utilisation (MFU): the share of the GPUs' peak that the model's own arithmetic takes.

    ``flops`` are per token, ``speed`` is tokens per second over all devices. None on a CPU and for an unknown GPU. A
    lower bound, because attention scores are not counted.
    """
    if machine.device != "cuda" or speed is None:
        return None
    import torch

    peak = peak_flops(torch.cuda.get_device_name())
    return None if peak is None else round(speed * flops / (devices * peak), 4)
