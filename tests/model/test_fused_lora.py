"""Fused adapters compute what peft's own adapters compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import composed
from test_cli import whole
from test_receipt import tiny, with_adapters

from sftlab.errors import ConfigError
from sftlab.runtime.run import Run


def step(model: Any, *, bf16: bool) -> tuple[Any, dict[str, Any]]:
    """Loss and gradients of a training step with fixed tokens and dropout."""
    import torch

    torch.manual_seed(1)
    tokens = torch.randint(3, 300, (3, 40))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pair(architecture: str, dropout: float, bf16: bool) -> tuple[Any, Any]:
    import torch

    from sftlab.model.adapters import keep_inputs
    from sftlab.model.fused_lora import fuse

    models = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        base = tiny(architecture)
        model = with_adapters(base.to(torch.bfloat16) if bf16 else base, dropout=dropout)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, where A would have no gradient
                torch.nn.init.normal_(parameter, std=0.05)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if bf16:
            keep_inputs(model)
        if is_fused:
            assert fuse(model) == 14  # seven layers in each of two
        models.append(model.train())
    return models[0], models[1]


@pytest.mark.smoke
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma3_vision", "qwen3"])
def test_loss_and_gradients_are_those_of_peft(architecture: str, dropout: float) -> None:
    """To the last bits of float32, also with the same draws of dropout."""
    import torch

    plain, fused = (step(model, bf16=False) for model in pair(architecture, dropout, bf16=False))
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-6, atol=1e-7)
    assert fused[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(fused[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.smoke
def test_in_bfloat16_the_difference_is_one_of_rounding() -> None:
    import torch

    plain, fused = (step(model, bf16=True) for model in pair("llama", 0.0, bf16=True))
    reference = step(pair("llama", 0.0, bf16=False)[0], bf16=False)
    assert abs(fused[0] - plain[0]) < 0.01

    def error(gradients: dict[str, Any]) -> float:
        both = [(gradients[name].flatten(), gradient.flatten()) for name, gradient in reference[1].items()]
        ours, exact = (torch.cat(parts) for parts in zip(*both, strict=True))
        return float((ours - exact).norm() / exact.norm())

    assert error(fused[1]) < 1.1 * error(plain[1])  # no farther from float32 than peft's own


@pytest.mark.smoke
def test_dora_has_no_fused_form() -> None:
    from sftlab.model.fused_lora import fuse

    with pytest.raises(ConfigError, match=r"peft\.fused=true: .* set peft\.fused=false"):
        fuse(with_adapters(tiny("llama"), dora=True))


def test_a_config_with_both_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"peft\.fused=true: DoRA adapters have no fused form; set it to false"):
        composed("peft=dora", "peft.fused=true")


@pytest.mark.smoke
def test_a_training_with_fused_adapters_has_the_losses_of_one_without(tmp_path: Path) -> None:
    settings = [
        *("model=tiny_random", "instance=cpu", "tracking=none", "mode=train", "instance.bf16=false"),
        *("dataset.split={train: 16, validation: 8, test: 4}", "train.num_train_epochs=1", "peft.lora_dropout=0.1"),
        "peft.top_layers=1.0",
    ]
    runs = {}
    for fused in ("true", "false"):
        done = whole(tmp_path, *settings, f"peft.fused={fused}", f"hydra.run.dir=run-{fused}")
        assert done.returncode == 0, done.stderr
        runs[fused] = Run.read(tmp_path / f"run-{fused}").record
    receipts = {name: run.receipt for name, run in runs.items()}
    assert receipts["true"] is not None
    assert receipts["false"] is not None
    assert (receipts["true"].fused_lora_layers, receipts["false"].fused_lora_layers) == (14, 0)
    assert receipts["true"].trainable_parameters == receipts["false"].trainable_parameters
    ours, peft = ([row.eval_loss for row in run.selection.candidates] for run in runs.values() if run.selection)
    assert ours == pytest.approx(peft, rel=1e-5)
