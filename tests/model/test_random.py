"""Small random models of each architecture train, merge and answer in the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import whole

pytestmark = pytest.mark.smoke


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    fast = ["dataset.max_rows=24", "train.num_train_epochs=1", "tracking=none", "eval.max_rows=4", "eval.max_tokens=8"]
    done = whole(folder, *fast, "eval.baseline=false", "hydra.run.dir=run", *overrides)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run" / "run.json").read_text("utf-8"))


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3"])
def test_a_merged_model_answers_in_vllm(tmp_path: Path, architecture: str) -> None:
    record = run(tmp_path, f"model.name_or_path=random:{architecture}")
    assert record["merge"]["changed_tensors"] == 14
    assert record["evaluation"]["finetuned"]["n"] == 4
    model = json.loads((tmp_path / "run" / "merged" / "config.json").read_text("utf-8"))
    assert model["model_type"] == {"gemma3": "gemma3_text"}.get(architecture, architecture)


def test_of_a_model_that_reads_images_only_the_text_part_is_trained(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    # vLLM itself wants torchvision for this class, which the CPU lock has not.
    record = run(tmp_path, "model.name_or_path=random:gemma3_vision", "eval.engine=transformers")
    folder = tmp_path / "run"
    assert [
        name for name in load_file(folder / "best" / "adapter_model.safetensors") if "language_model" not in name
    ] == []
    assert record["merge"]["changed_tensors"] == 14
    model = json.loads((folder / "merged" / "config.json").read_text("utf-8"))
    assert model["architectures"] == ["Gemma3ForConditionalGeneration"]
    base = load_file(next(tmp_path.glob("outputs/store/model/*/model.safetensors")))
    merged = load_file(folder / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = [name for name, weight in base.items() if not torch.equal(weight, merged[name])]
    assert len(changed) == 14
    assert [name for name in changed if "language_model" not in name] == []
