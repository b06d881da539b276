"""The machine that a config names or ``auto`` finds: devices, ranks and precision."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sftlab.config import InstanceConfig, PeftConfig, Qlora, TrainConfig
from sftlab.errors import ConfigError

# OpenMP threads wait for each other by spinning. Where another process wants one of the cores, each of the thousands
# of small operations of a step then costs a time slice (measured on 2 cores, one of them busy: 53 tokens/s, and with
# these 395). GOMP is torch's, KMP is vLLM's.
BRIEF_SPIN = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}

# oneDNN keeps what it compiled for the last 1,024 shapes, and every batch of a training has another length. A step has
# some dozens (measured on the demo's rows after 24 steps: 3.5 GiB, and with as few as 16 kept 3.0, no slower).
FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}

# Batches of many lengths leave gaps between blocks of a GPU's memory that no later batch fits into; segments that grow
# have none. Under WSL2 the driver refuses them (pytorch#192330). torch reads either name; the second is the older one.
GROWING_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
OLDER_NAME = "PYTORCH_CUDA_ALLOC_CONF"

# vLLM profiles its memory by sampling with top-k, for which FlashInfer compiles kernels: without a whole CUDA toolkit
# vLLM dies at start. Its own sampler needs no toolkit.
NO_FLASHINFER_SAMPLER = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}

# Where the NVIDIA driver lists its GPUs and its version, and where Windows puts its part of the driver under WSL2.
PROC = Path("/proc/driver/nvidia")
WSL = Path("/usr/lib/wsl/lib")

# The optimizers of transformers that a package brings: the beginning of their names, its module, and what to install.
OPTIMIZERS = (
    ("adamw_torch_4bit adamw_torch_8bit", "torchao", "torchao"),
    ("adamw_8bit adamw_bnb ademamix lion paged_ rmsprop_bnb", "bitsandbytes", "bitsandbytes"),
    ("galore_", "galore_torch", "galore-torch"),
    ("apollo_", "apollo_torch", "apollo-torch"),
    ("lomo adalomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free_", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("adamw_anyprecision", "torchdistx", "torchdistx"),
)

# Dense bfloat16 TFLOP/s (accumulated in float32, without sparsity) by a part of the name that torch gives a GPU, the
# more special first. From NVIDIA's data sheets; of GeForce cards and the RTX A6000 from the architecture white papers
# (GA102 v2.0 and AD102). The data sheet of the RTX A5000 has 222.2 with sparsity, which is twice the dense value.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


@dataclass(frozen=True)
class Machine:
    """An instance with nothing left to choose."""

    name: str
    device: str
    num_processes: int
    attn_implementation: str
    strategy: str = "ddp"
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    rdzv_timeout_min: float = 15
    grace_seconds: int = 25

    @property
    def world_size(self) -> int:
        """Processes that train together, on all machines."""
        return self.num_processes * self.nnodes

    def numerics(self) -> dict[str, Any]:
        """The part that the weights depend on."""
        return {
            "device": self.device,
            "num_processes": self.world_size,
            "attn_implementation": self.attn_implementation,
            **({} if self.strategy == "ddp" else {"strategy": self.strategy, "reduced_in": "float32"}),
        }

    def environment(self) -> dict[str, str]:
        """Variables that show a training process its devices and no others."""
        threads = {}
        if self.num_processes > 1:
            threads = _defaults({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.num_processes))})
        if self.device == "cpu":
            return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", **_defaults(BRIEF_SPIN), **threads}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.num_processes)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": ",".join(shown[: self.num_processes]), **threads}

    def training_environment(self) -> dict[str, str]:
        """Variables of a process that trains."""
        if self.device == "cpu":
            return {**self.environment(), **_defaults(FEW_SHAPES)}
        leave = OLDER_NAME in os.environ or "microsoft" in os.uname().release.lower()  # the kernel of WSL2
        return {**self.environment(), **({} if leave else _defaults(GROWING_SEGMENTS))}

    def launcher(self) -> list[str]:
        """Arguments of ``torch.distributed.run`` for a training process of each rank; [] for a single one."""
        if self.world_size == 1:
            return []
        meeting = ["--standalone"]
        if self.nnodes > 1:
            # Static: the ranks are in the order of the machines, so that rank 0 is where its checkpoints are used.
            meeting = [
                f"--nnodes={self.nnodes}",
                f"--node-rank={self.node_rank}",
                "--rdzv-backend=static",
                f"--rdzv-endpoint={self.rdzv_endpoint}",
                f"--rdzv-conf=timeout={max(1, round(60 * self.rdzv_timeout_min))}",
            ]
        return [*meeting, f"--nproc-per-node={self.num_processes}", f"--shutdown-timeout={self.grace_seconds}"]

    def engines(self, tensor_parallel_size: int) -> list[dict[str, str]]:
        """For each generation engine that fits on this machine, the variables that show it its own devices."""
        shown = self.environment()
        if self.device == "cpu":
            return [shown] * self.num_processes
        gpus = shown["CUDA_VISIBLE_DEVICES"].split(",")
        firsts = range(0, len(gpus) - tensor_parallel_size + 1, tensor_parallel_size)
        return [
            {
                "CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + tensor_parallel_size]),
                **_defaults(NO_FLASHINFER_SAMPLER),
            }
            for first in firsts
        ]

    def accumulation(self, train: TrainConfig) -> int:
        """Batches per optimizer step: as set, or derived from the global batch size.

        Raises:
            ConfigError: the global batch size is no multiple of what the devices take at once.
        """
        if train.global_batch_size is None:
            return train.gradient_accumulation_steps
        at_once = train.per_device_train_batch_size * self.world_size
        if train.global_batch_size % at_once:
            nearest = at_once * max(1, round(train.global_batch_size / at_once))
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size}: is not a multiple of {at_once} "
                f"(train.per_device_train_batch_size={train.per_device_train_batch_size} × {self.world_size} "
                f"devices of instance={self.name}); set train.global_batch_size={nearest}, or change the batch size of "
                "a device"
            )
        return train.global_batch_size // at_once

    def effective_batch(self, train: TrainConfig) -> int:
        """Rows per optimizer step over all devices."""
        return train.per_device_train_batch_size * self.world_size * self.accumulation(train)


def find(cfg: InstanceConfig, *, elsewhere: bool = False) -> Machine:
    """The machine for a config; ``auto`` and null become what is there.

    Raises:
        ConfigError: the config wants GPUs that this machine does not have, and it is not meant for one ``elsewhere``.
    """
    gpus = len(visible_gpus())
    wanted = gpus_per_job(cfg.device, cfg.num_processes)
    if gpus < wanted and not elsewhere:
        remedy = "set instance.device=cpu" if cfg.name in ("auto", "cpu") else "choose instance=auto or instance=cpu"
        raise ConfigError(
            f"instance={cfg.name}: wants {wanted} GPU{'s' if wanted > 1 else ''} and this machine shows "
            f"{gpus or 'none'}; {f'set instance.num_processes={gpus}' if gpus else remedy}"
        )
    attention = cfg.attn_implementation if cfg.attn_implementation != "auto" else "sdpa"
    device, processes = "cuda" if wanted else "cpu", wanted or cfg.num_processes or 1
    found = Machine(
        name=cfg.name,
        device=device,
        num_processes=processes,
        attn_implementation=attention,
        strategy=cfg.strategy,
        nnodes=cfg.nnodes,
        node_rank=cfg.node_rank,
        rdzv_endpoint=cfg.rdzv_endpoint,
        rdzv_timeout_min=cfg.rdzv_timeout_min,
        grace_seconds=cfg.grace_seconds,
    )
    if found.strategy == "fsdp" and (found.world_size == 1 or device == "cpu"):
        raise ConfigError(
            f"instance.strategy=fsdp: shares a model among several GPUs, and instance={cfg.name} trains on "
            f"{'the CPU' if device == 'cpu' else 'one'} here; set instance.strategy=ddp"
        )
    return found


def gpus_per_job(device: str, num_processes: int | None) -> int:
    """How many GPUs a job on such an instance takes; ``auto`` and null are what this machine has."""
    gpus = len(visible_gpus())
    if device == "cpu" or (device == "auto" and not gpus):
        return 0
    return num_processes or max(gpus, 1)


def check(machine: Machine, train: TrainConfig, peft: PeftConfig) -> None:
    """Refuse settings that this machine cannot let take effect, instead of training without them.

    Raises:
        ConfigError: a package or a GPU is missing, with a line for each setting that needs it.
    """
    problems = []
    if train.use_liger_kernel and machine.device == "cpu":
        problems.append("train.use_liger_kernel=true: Liger needs a GPU, and this trains on the CPU; set it to false")
    elif train.use_liger_kernel and not _installed("liger_kernel"):
        problems.append("train.use_liger_kernel=true: is not installed; pip install liger-kernel, or set it to false")
    if machine.attn_implementation == "flash_attention_2":
        key = "instance.attn_implementation=flash_attention_2"
        if machine.device == "cpu":
            problems.append(f"{key}: needs a GPU, and this trains on the CPU; set instance.attn_implementation=sdpa")
        elif not _installed("flash_attn"):
            problems.append(
                f"{key}: is not installed; pip install flash-attn, or set instance.attn_implementation=sdpa"
            )
        elif not train.bf16:
            problems.append(f"{key}: has no float32; set train.bf16=true, or instance.attn_implementation=sdpa")
    if isinstance(peft, Qlora) and not _installed("bitsandbytes"):
        problems.append("peft.method=qlora: quantises by bitsandbytes; pip install bitsandbytes, or choose peft=lora")
    for names, module, package in OPTIMIZERS:
        if train.optim.startswith(tuple(names.split())) and not _installed(module):
            problems.append(
                f"train.optim={train.optim}: comes with {package}; pip install {package}, or set "
                "train.optim=adamw_torch"
            )
    if train.optim.startswith("paged_") and machine.device == "cpu":
        problems.append(f"train.optim={train.optim}: pages between GPU and CPU memory; set train.optim=adamw_torch")
    if problems:
        raise ConfigError("\n".join(problems))


def optimizer_package(optim: str) -> str | None:
    """The package that brings an optimizer of transformers; None for one of torch's or transformers' own."""
    return next((package for names, _, package in OPTIMIZERS if optim.startswith(tuple(names.split()))), None)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _defaults(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of these variables that the user has not set."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU, None if it is not known."""
    words = f" {device_name.replace('-', ' ')} "
    if " Laptop " in words:  # the same name, at a fraction of the power
        return None
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if f" {name} " in words), None)


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that a process started here may use, as CUDA_VISIBLE_DEVICES names them, without torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in names if name not in ("", "-1")]
    if (PROC / "gpus").is_dir():
        return [str(index) for index, _ in enumerate((PROC / "gpus").glob("*"))]
    return nvidia_smi("index")  # WSL2 and some containers do not have that folder


def nvidia_smi(field: str) -> list[str]:
    """A field of ``nvidia-smi --query-gpu`` for each GPU; [] where the command is missing or fails."""
    path = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(WSL))
    return list(_query(path, field)) if path else []


@cache
def _query(path: str, field: str) -> tuple[str, ...]:
    try:
        done = subprocess.run(
            [path, f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
