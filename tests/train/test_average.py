"""The average of adapters is that of their products, and of full fine-tunings that of their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftlab import selection
from sftlab.config import Config
from sftlab.model.averages import average
from sftlab.model.base import Base
from sftlab.records import Candidate
from sftlab.runtime.job import Job


def adapter(folder: Path, *, rslora: bool) -> Path:
    folder.mkdir()
    config = {"r": 2, "lora_alpha": 8, "use_rslora": rslora, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    tensors = {"q.lora_A.weight": torch.randn(2, 6), "q.lora_B.weight": torch.randn(5, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def product(folder: Path) -> torch.Tensor:
    """What an adapter adds to the weights of its layer, as PEFT scales it."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    assert tensors["q.lora_A.weight"].shape[0] == config["r"]
    return scale * tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_average_of_adapters_is_exact(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(1)
    members = [adapter(tmp_path / str(number), rslora=rslora) for number in range(3)]
    average(members, tmp_path / "average")
    expected = torch.stack([product(one) for one in members]).mean(0)
    assert torch.allclose(product(tmp_path / "average"), expected, atol=1e-5)
    factors = [load_file(one / "adapter_model.safetensors") for one in members]
    naive = torch.stack([one["q.lora_B.weight"] for one in factors]).mean(0) @ torch.stack(
        [one["q.lora_A.weight"] for one in factors]
    ).mean(0)
    assert not torch.allclose(4 * naive, expected, atol=0.1)


def test_the_winner_may_be_another_job_than_the_one_whose_checkpoints_were_averaged(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average has the lowest loss; only job 1 is tied with it, and is earlier."""

    def candidate(job: int, epoch: int, losses: tuple[float, float]) -> Candidate:
        folder = tmp_path / f"{job}" / f"checkpoint-{epoch}"
        folder.mkdir(parents=True)
        (folder / "rows.json").write_text(json.dumps([[loss, 1] for loss in losses * 20]), "utf-8")
        return Candidate(sum(losses) / 2, epoch, epoch, str(folder), job, [], None, 1.0)

    (tmp_path / "groups.json").write_text(json.dumps([None] * 40), "utf-8")
    jobs = []
    for number, one in enumerate((candidate(0, 1, (1.1, 1.3)), candidate(1, 2, (0.1, 2.1)))):
        cfg = config(f"train.learning_rate=1e-{3 + number}", "select.tie=earliest", "select.average=ties")
        values = {"number": number, "overrides": [], "config": cfg.model_dump(), "stages": {"tokens": str(tmp_path)}}
        jobs.append(Job.model_validate({**values, "candidates": [one]}))
    averaged = candidate(0, 3, (1.0, 1.0))
    monkeypatch.setattr(selection.average, "make", lambda *_: averaged)
    monkeypatch.setattr(selection.models, "resolve", lambda cfg, *_: Base("m", tmp_path, "key", False, None))
    monkeypatch.setattr(selection.variants, "equals_base", lambda *_: False)
    decision = selection._selection(jobs, jobs)
    assert (decision.record.job, decision.winner.number) == (1, 1)
    assert decision.cfg.train.learning_rate == 1e-4
    assert decision.winner.stages["average"] == str(Path(averaged.checkpoint).parent)


def test_all_weights_are_averaged(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 4.0)):
        (tmp_path / str(number)).mkdir()
        save_file({"w": torch.full((2,), value)}, tmp_path / str(number) / "model.safetensors")
        (tmp_path / str(number) / "config.json").write_text("{}", "utf-8")
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "average")
    assert load_file(tmp_path / "average" / "model.safetensors")["w"].tolist() == [2.5, 2.5]
    assert (tmp_path / "average" / "config.json").is_file()
