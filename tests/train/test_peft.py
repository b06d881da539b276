"""Each training method takes effect, and its checkpoint merges into a model that answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import whole

TINY = [
    "model=tiny_random",
    "dataset.max_rows=24",
    "train.num_train_epochs=1",
    "tracking=none",
    "eval=transformers",
    "eval.baseline=false",
    "eval.max_rows=2",
    "eval.max_tokens=4",
]
LINEAR_LAYERS = 14  # in two layers: q, k, v, o, gate, up and down


# Other settings that must take effect are tested in the same runs: each costs half a minute.
MORE = {
    "qlora": ["train.optim=adamw_8bit", "peft.fused=true"],
    "dora": ["peft.use_rslora=true", "train.packing=true", "train.max_length=512"],
}


def test_rslora_is_a_choice_of_peft(config: Callable[..., Any]) -> None:
    assert config("model=tiny_random", "peft=rslora").peft.use_rslora


@pytest.mark.smoke
@pytest.mark.parametrize("method", ["none", "qlora", "dora"])
def test_method(tmp_path: Path, method: str) -> None:
    done = whole(tmp_path, *TINY, f"peft={method}", *MORE.get(method, []), "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    receipt = run["receipt"]
    if method == "none":
        assert receipt["trainable_parameters"] == receipt["parameters"]
        assert receipt["quantized_layers"] == 0
        assert receipt["base_dtype"] == "torch.float32"
        assert receipt["optimizer_state"] == ["float32"]
    else:
        adapter = json.loads((tmp_path / "run" / "best" / "adapter_config.json").read_text("utf-8"))
        assert (adapter["use_dora"], adapter["use_rslora"]) == (method == "dora", method == "dora")
        assert receipt["quantized_layers"] == (LINEAR_LAYERS if method == "qlora" else 0)
        assert ("uint8" in receipt["optimizer_state"]) == (method == "qlora")
        assert receipt["fused_lora_layers"] == (LINEAR_LAYERS if method == "qlora" else 0)
        assert 0 < receipt["trainable_parameters"] < receipt["parameters"]
    assert run["merge"]["changed_tensors"] > 0
    assert run["merge"]["merged_loss"] == pytest.approx(run["merge"]["adapter_loss"], abs=0.01)
    assert receipt["tokens_per_second_per_device"] == receipt["tokens_per_second"] > 0
    assert receipt["mfu"] is None  # on a CPU
    assert run["evaluation"]["finetuned"]["n"] == 2
    assert run["evaluation"]["baseline"] is None
