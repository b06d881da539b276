"""Answers of several checkpoints by one engine: each model once, whatever is killed, and scored as on the test set."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_evaluate import CPU, PROMPTS, answer, line, settings

from sftlab.config import Config
from sftlab.errors import StageError
from sftlab.eval import launch
from sftlab.eval import stage as evaluate
from sftlab.eval.answers import FINISHED, Question
from sftlab.eval.checkpoints import _lora_rank
from sftlab.eval.stage import Model, Request
from sftlab.eval.worker import GenerateTask
from sftlab.model.base import Base
from sftlab.model.variants import content, equals_base, save_merged
from sftlab.runtime.processes import Child
from sftlab.runtime.store import Store

Make = Callable[..., Config]
BASE = Request("base", PROMPTS)


class Engines:
    """Stands in for child processes. Answers name the checkpoint; may die in the second model."""

    def __init__(self) -> None:
        self.loaded: list[list[str | None]] = []
        self.dies = False

    def __call__(self, module: str, tasks: list[Child], **_: Any) -> None:
        for child in tasks:
            task = child.task
            assert isinstance(task, GenerateTask)
            names = [path and path.name for path in task.checkpoints]
            self.loaded.append(names)
            for number, (folder, name) in enumerate(zip((child.folder, *task.also), names, strict=True)):
                rows = Question.read(folder / "prompts.jsonl")
                lines = [line(answer(0, row.row, f"{name} {row.row}")) for row in rows]
                if self.dies and number == 1:
                    (folder / FINISHED).write_text("".join(lines[:2]), "utf-8")
                    raise StageError("ended by SIGKILL")
                (folder / FINISHED).write_text("".join(lines), "utf-8")
                speed = {"start_seconds": 1.0, "generate_seconds": 2.0, "tokens": 5, "seconds": 2.0}
                (folder / "speed.json").write_text(json.dumps(speed), "utf-8")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    engines = Engines()
    monkeypatch.setattr(launch, "children", engines)
    return engines


@pytest.fixture
def base(tmp_path: Path) -> Model:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}', "utf-8")
    return Model(tmp_path / "model", "base", False)


def checkpoints(tmp_path: Path, count: int) -> list[Request]:
    return [Request(f"merged-{number}", PROMPTS, tmp_path / f"checkpoint-{number}") for number in range(count)]


def test_one_engine_answers_for_all_checkpoints_and_equal_ones_once(
    tmp_path: Path, config: Make, base: Model, engines: Engines
) -> None:
    one, two = checkpoints(tmp_path, 2)
    store, cfg = Store(tmp_path / "store"), settings(config, "eval.forced=false")
    made = evaluate.make_each(store, base, [one, BASE, two, one, BASE], cfg, CPU, 0)
    assert len(engines.loaded) == 1
    assert engines.loaded[0][0] is None  # the weights that the engine starts with
    assert sorted(name for name in engines.loaded[0] if name) == ["checkpoint-0", "checkpoint-1"]
    texts = [stage.rows()[3].completion for stage in made]
    assert texts == ["checkpoint-0 3", "None 3", "checkpoint-1 3", "checkpoint-0 3", "None 3"]
    # A model that is merged later has the same answers, and a longer sweep answers for its new checkpoint only.
    again = evaluate.make(store, Model(base.path, "merged-0", False), PROMPTS, cfg, CPU, 0)
    assert again.stage.cached
    evaluate.make_each(store, base, checkpoints(tmp_path, 3), cfg, CPU, 0)
    assert engines.loaded[1:] == [["checkpoint-2"]]


def test_several_engines_share_the_checkpoints(tmp_path: Path, config: Make, base: Model, engines: Engines) -> None:
    machine = replace(CPU, num_processes=2)
    evaluate.make_each(
        Store(tmp_path / "store"), base, checkpoints(tmp_path, 5), settings(config, "eval.forced=false"), machine, 0
    )
    assert sorted(map(len, engines.loaded)) == [2, 3]


@pytest.mark.slow
def test_any_number_of_checkpoints_is_locked_and_finished(
    tmp_path: Path, config: Make, base: Model, engines: Engines
) -> None:
    store, count = Store(tmp_path / "store"), 60
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        made = evaluate.make_each(
            store, base, checkpoints(tmp_path, count), settings(config, "eval.forced=false"), CPU, 0
        )
    finally:
        sys.setrecursionlimit(limit)
    assert [stage.rows()[3].completion for stage in made] == [f"checkpoint-{number} 3" for number in range(count)]
    assert not [*tmp_path.glob("store/generations/*.partial")]


@pytest.mark.parametrize(("device", "config_json", "rank"), [("cuda", "{}", 32), ("cpu", "{}", None),
                                                             ("cuda", '{"vision_config": {}}', None)])  # fmt: skip
def test_the_reserved_rank_is_that_of_the_largest_adapter(
    tmp_path: Path, device: str, config_json: str, rank: int | None
) -> None:
    """An average has the ranks of its members together."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(config_json, "utf-8")
    folders = [tmp_path / "checkpoint-0", adapter(tmp_path / "one", 1.0), adapter(tmp_path / "average", 1.0)]
    folders[0].mkdir()
    for folder, own in zip(folders[1:], (8, 24), strict=True):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": own}), "utf-8")
    machine = replace(CPU, device=device)
    of = Base("base", tmp_path / "base", "identity", False, None)
    assert _lora_rank(folders, "vllm", of, machine) == rank
    (folders[2] / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "use_dora": True}), "utf-8"
    )
    assert _lora_rank(folders, "vllm", of, machine) is None


def test_answers_survive_a_kill(tmp_path: Path, config: Make, base: Model, engines: Engines) -> None:
    store, cfg, every = Store(tmp_path / "store"), settings(config, "eval.forced=false"), checkpoints(tmp_path, 3)
    engines.dies = True
    with pytest.raises(StageError):
        evaluate.make_each(store, base, every, cfg, CPU, 0)
    engines.dies = False
    made = evaluate.make_each(store, base, every, cfg, CPU, 0)
    assert [stage.rows()[6].completion for stage in made] == [f"checkpoint-{number} 6" for number in range(3)]
    assert len(engines.loaded[1]) == 2  # the first model had all of its answers
    assert not [*tmp_path.glob("store/generations/*/engine-*")]


# ------------------------------------------------------------------- weights


def adapter(folder: Path, factor: float) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", "utf-8")
    tensors = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": factor * torch.ones(4, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_checkpoint_that_equals_its_base_is_found_by_its_weights(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "base" / "model.safetensors")
    assert equals_base(adapter(tmp_path / "zero", 0.0), tmp_path / "base")
    assert not equals_base(adapter(tmp_path / "small", 1e-6), tmp_path / "base")
    (tmp_path / "checkpoint-0").mkdir()
    assert equals_base(tmp_path / "checkpoint-0", tmp_path / "base")
    for name, value in (("same", 1.0), ("other", 1.1)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
    assert equals_base(tmp_path / "same", tmp_path / "base")
    assert not equals_base(tmp_path / "other", tmp_path / "base")


def test_equal_checkpoints_have_equal_content(tmp_path: Path) -> None:
    one, two, other = (adapter(tmp_path / name, value) for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)))
    assert content(one) == content(two) != content(other)


def test_merged_weights_are_those_of_the_final_merge(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    save_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", trust_remote_code=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    expected = tuned.merge_and_unload(safe_merge=True)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
