"""The resolved machine, and settings that cannot take effect on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
from pydantic import BaseModel

from sftlab.config import Config
from sftlab.errors import ConfigError
from sftlab.instance.machine import Machine, find, peak_flops, unsupported
from sftlab.results import Receipt
from sftlab.runtime.job import Job
from sftlab.train import memory
from sftlab.train.ranking import warn_of_batches

CPU, GPU = Machine("cpu", "cpu", 1, "sdpa"), Machine("small", "cuda", 1, "sdpa")
FLASH = Machine("small", "cuda", 1, "flash_attention_2")


@pytest.mark.parametrize(
    ("machine", "overrides", "missing", "message"),
    [
        (CPU, ["train.use_liger_kernel=true"], None, "train.use_liger_kernel=true: Liger needs a GPU"),
        (GPU, ["train.use_liger_kernel=true"], "liger_kernel", "pip install liger-kernel, or set it to false"),
        (FLASH, [], "flash_attn", "pip install flash-attn, or set instance.attn_implementation=sdpa"),
        (Machine("auto", "cpu", 1, "flash_attention_2"), [], None, "needs a GPU, and this trains on the CPU"),
        (CPU, ["train.optim=adamw_torch_4bit"], "torchao", "pip install torchao, or set train.optim=adamw_torch"),
        (CPU, ["train.optim=galore_adamw"], "galore_torch", "package galore-torch; pip install galore-torch"),
        (CPU, ["train.optim=paged_adamw_8bit"], None, "and needs a GPU; set train.optim=adamw_torch"),
    ],
)  # fmt: skip
def test_settings_without_an_effect_are_refused(
    config: Callable[..., Any], machine: Machine, overrides: list[str], missing: str | None, message: str
) -> None:
    if missing is not None and find_spec(missing) is not None:
        pytest.skip("is installed")
    cfg = config("model=tiny_random", "instance=auto", *overrides)
    assert any(message in str(problem) for problem in unsupported(machine, cfg.train, cfg.peft))


def test_supported_optimizers_are_accepted(config: Callable[..., Any]) -> None:
    for optim in ("adamw_torch", "adafactor", "adamw_torch_fused", "sgd"):
        cfg = config("model=tiny_random", "instance=cpu", f"train.optim={optim}")
        assert list(unsupported(CPU, cfg.train, cfg.peft)) == []


def test_a_model_is_not_sharded_on_the_cpu(config: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="shards a model over several GPUs, and instance=cpu trains on the CPU"):
        config("model=tiny_random", "instance=cpu", "instance.strategy=fsdp", "instance.num_processes=2")


@pytest.mark.parametrize(
    ("overrides", "shown", "multiple"),
    [
        (["instance=auto"], "0,1,2", 12),
        (["instance=auto"], "", 4),
        (["instance=small"], "0,1,2", 4),
        (["instance=large"], "", 16),  # GPUs of another machine, as in mode=plan
        (["instance=auto", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"], "0,1", 16),
    ],
)
def test_the_global_batch_size_is_checked_on_the_actual_machine(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, overrides: list[str], shown: str, multiple: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    size = "train.per_device_train_batch_size=4"
    for mode in ("all", "train", "plan"):
        config(*overrides, size, f"mode={mode}", f"train.global_batch_size={2 * multiple}")
        with pytest.raises(
            ConfigError, match=f"is not a multiple of {multiple} .*set train.global_batch_size="
        ) as caught:
            config(*overrides, size, f"mode={mode}", f"train.global_batch_size={2 * multiple - 1}")
        remedy = str(caught.value).partition("; set ")[2].partition(",")[0]
        config(*overrides, size, f"mode={mode}", remedy)
    config(*overrides, size, "mode=evaluate", "eval.name_or_path=random:llama", "train.global_batch_size=3")


def test_the_default_strategy_and_a_single_machine_are_not_in_the_key(config: Callable[..., Any]) -> None:
    numerics = find(config("model=tiny_random", "instance=cpu").instance).numerics()
    assert numerics == {"device": "cpu", "num_processes": 1, "attn_implementation": "sdpa"}


def test_a_machine_passes_unchanged_through_the_task_of_a_child() -> None:
    class Task(BaseModel):
        machine: Machine

    machine = Machine("large", "cuda", 4, "sdpa", "fsdp", 2, 1, "host:29500", rdzv_timeout_min=0.5, grace_seconds=9)
    text = json.dumps(Task(machine=machine).model_dump(mode="json"))
    assert Task.model_validate_json(text).machine == machine


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0),
     ("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.0), ("NVIDIA A10", 125.0), ("NVIDIA A10G", None), ("Tesla T4", None),
     ("NVIDIA RTX A5000", 111.1), ("NVIDIA RTX A6000", 154.8), ("NVIDIA A40", 149.7),
     ("NVIDIA RTX A5000 Laptop GPU", None), ("NVIDIA RTX A5500", None)],
)  # fmt: skip
def test_the_peak_of_known_gpus(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize(
    ("jobs", "warned"),
    [([(1, 8), (2, 8)], False), ([(1, 8), (1, 16)], False), ([(1, 8), (2, 16)], True)],
)  # fmt: skip
def test_machines_that_change_the_effective_batch_are_warned_about(
    caplog: pytest.LogCaptureFixture, jobs: list[tuple[int, int]], warned: bool
) -> None:
    """Not about a batch size that is swept."""
    receipts: list[Any] = [
        {"device": "cuda", "num_processes": devices, "effective_batch": batch} for devices, batch in jobs
    ]
    warn_of_batches(
        [
            Job(number=number, overrides=[], config={}, receipt=Receipt.model_construct(**receipt))
            for number, receipt in enumerate(receipts)
        ]
    )
    assert ("(job 0: 8, job 1: 16), which changes their results too; set train.global_batch" in caplog.text) is warned


@pytest.mark.parametrize(("name", "gpus"), [("small", 1), ("medium", 2), ("large", 4)])
def test_the_presets_match_the_workshop_machines(config: Callable[..., Config], name: str, gpus: int) -> None:
    cfg = config(f"instance={name}", "mode=train").instance
    assert (cfg.num_processes, cfg.memory_gib) == (gpus, 24)
    assert memory.device(cfg, find(cfg, elsewhere=True))[1] == 24
