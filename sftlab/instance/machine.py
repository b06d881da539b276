"""The machine of a run: devices, ranks and environment variables, resolved from ``instance=``."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sftlab.config import InstanceConfig, PeftConfig, Qlora, TrainConfig
from sftlab.errors import ConfigError, Problem, shown

# OpenMP threads wait for each other by spinning. If another process needs one of the cores, each of the thousands of
# small operations of a step then costs a time slice (measured on 2 cores, one of them busy: 53 tokens/s without these
# settings, 395 with them). torch uses GOMP, vLLM uses KMP.
BRIEF_SPIN = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}

# oneDNN caches the kernels of the last 1,024 shapes, and every training batch has another length. A step needs a few
# dozen (measured on the demo's rows after 24 steps: 3.5 GiB by default, 3.0 GiB and as fast with a capacity of 16).
FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}

# Batches of different lengths fragment a GPU's memory; expandable segments avoid it. The driver of WSL2 refuses them
# (pytorch#192330). torch reads either name; the second is the older one.
GROWING_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
OLDER_NAME = "PYTORCH_CUDA_ALLOC_CONF"

# vLLM profiles its memory by top-k sampling, for which FlashInfer compiles kernels: without a complete CUDA toolkit
# vLLM fails at its start. Its own sampler needs no toolkit.
NO_FLASHINFER_SAMPLER = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}

# On a CPU vLLM compiles the function that ranks the log-probabilities of given tokens even with enforce_eager=True.
# That needs g++, which a CPU machine may not have.
NO_COMPILATION = {"TORCH_COMPILE_DISABLE": "1"}

# Where the NVIDIA driver lists its GPUs and its version, and where WSL2 mounts the driver of Windows.
PROC = Path("/proc/driver/nvidia")
WSL = Path("/usr/lib/wsl/lib")

# Optimizers of transformers that need a package: prefixes of their names, the module, and the package to install.
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

# Dense bfloat16 TFLOP/s (accumulated in float32, without sparsity) by a part of torch's name of the GPU, the more
# specific first. Source: NVIDIA's data sheets; for GeForce cards and the RTX A6000 the architecture white papers (GA102
# v2.0 and AD102). The data sheet of the RTX A5000 has 222.2 with sparsity, which is twice the dense value.
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
    """A fully resolved machine: ``auto`` and null of InstanceConfig are replaced by values.

    ``num_processes`` counts the ranks on this machine. ``attn_implementation`` is that of the model in training.
    """

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
        """Ranks on all machines."""
        return self.num_processes * self.nnodes

    def numerics(self) -> dict[str, object]:
        """Return the settings that the weights depend on, for stage keys."""
        return {
            "device": self.device,
            "num_processes": self.world_size,
            "attn_implementation": self.attn_implementation,
            **({} if self.strategy == "ddp" else {"strategy": self.strategy, "reduced_in": "float32"}),
        }

    def environment(self) -> dict[str, str]:
        """Return the environment variables that restrict a process to this machine's devices."""
        threads = {}
        if self.num_processes > 1:
            threads = _defaults({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.num_processes))})
        if self.device == "cpu":
            return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", **_defaults(BRIEF_SPIN), **threads}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.num_processes)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": ",".join(shown[: self.num_processes]), **threads}

    def training_environment(self) -> dict[str, str]:
        """Return the environment variables of a process that trains."""
        if self.device == "cpu":
            return {**self.environment(), **_defaults(FEW_SHAPES)}
        is_wsl = "microsoft" in os.uname().release.lower()
        segments = {} if is_wsl or OLDER_NAME in os.environ else _defaults(GROWING_SEGMENTS)
        return {**self.environment(), **segments}

    def launcher(self) -> list[str]:
        """Return the arguments of ``torch.distributed.run`` that start a process per rank; [] for a single process."""
        if self.world_size == 1:
            return []
        rendezvous = ["--standalone"]
        if self.nnodes > 1:
            # Static: ranks are in the order of the machines, so that rank 0 is on the machine that uses checkpoints.
            rendezvous = [
                f"--nnodes={self.nnodes}",
                f"--node-rank={self.node_rank}",
                "--rdzv-backend=static",
                f"--rdzv-endpoint={self.rdzv_endpoint}",
                f"--rdzv-conf=timeout={max(1, round(60 * self.rdzv_timeout_min))}",
            ]
        return [*rendezvous, f"--nproc-per-node={self.num_processes}", f"--shutdown-timeout={self.grace_seconds}"]

    def engines(self, tensor_parallel_size: int) -> list[dict[str, str]]:
        """Return the environment variables of each generation engine, which restrict it to its own devices.

        As many engines as fit on this machine, each with ``tensor_parallel_size`` GPUs.
        """
        shown = self.environment()
        if self.device == "cpu":
            return [{**shown, **_defaults(NO_COMPILATION)}] * self.num_processes
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
        """Return batches per optimizer step: as set, or derived from the global batch size.

        Raises:
            ConfigError: the global batch size is not a multiple of the rows that all devices process at once.
        """
        if train.global_batch_size is None:
            return train.gradient_accumulation_steps
        at_once = train.per_device_train_batch_size * self.world_size
        if train.global_batch_size % at_once:
            nearest = at_once * max(1, round(train.global_batch_size / at_once))
            raise ConfigError(
                Problem(
                    "train.global_batch_size",
                    shown(train.global_batch_size),
                    f"is not a multiple of {at_once} "
                    f"(train.per_device_train_batch_size={train.per_device_train_batch_size} × "
                    f"{self.world_size} devices of instance={self.name})",
                    f"set train.global_batch_size={nearest}, or change train.per_device_train_batch_size",
                )
            )
        return train.global_batch_size // at_once

    def effective_batch(self, train: TrainConfig) -> int:
        """Return rows per optimizer step over all devices."""
        return train.per_device_train_batch_size * self.world_size * self.accumulation(train)


def find(cfg: InstanceConfig, *, elsewhere: bool = False) -> Machine:
    """Resolve an instance config: ``auto`` and null become what this machine has.

    With ``elsewhere`` the config describes another machine, as in mode=plan, and its GPUs need not be here.

    Raises:
        ConfigError: the config asks for GPUs that this machine does not have, or shards a model on a single device.
    """
    gpus = len(visible_gpus())
    wanted = gpus_per_job(cfg.device, cfg.num_processes)
    if gpus < wanted and not elsewhere:
        remedy = "set instance.device=cpu" if cfg.name in ("auto", "cpu") else "choose instance=auto or instance=cpu"
        raise ConfigError(
            Problem(
                "instance",
                cfg.name,
                f"needs {wanted} GPU{'s' if wanted > 1 else ''}, and this machine shows {gpus or 'none'}",
                f"set instance.num_processes={gpus}" if gpus else remedy,
            )
        )
    attention = cfg.attn_implementation if cfg.attn_implementation != "auto" else "sdpa"
    device, processes = "cuda" if wanted else "cpu", wanted or cfg.num_processes or 1
    machine = Machine(
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
    if machine.strategy == "fsdp" and (machine.world_size == 1 or device == "cpu"):
        raise ConfigError(
            Problem(
                "instance.strategy",
                "fsdp",
                f"shards a model over several GPUs, and instance={cfg.name} trains on "
                f"{'the CPU' if device == 'cpu' else 'one GPU'}",
                "set instance.strategy=ddp",
            )
        )
    return machine


def gpus_per_job(device: str, num_processes: int | None) -> int:
    """Return the number of GPUs that a job takes; ``auto`` and null stand for what this machine has."""
    gpus = len(visible_gpus())
    if device == "cpu" or (device == "auto" and not gpus):
        return 0
    return num_processes or max(gpus, 1)


def unsupported(machine: Machine, train: TrainConfig, peft: PeftConfig) -> Iterator[Problem]:
    """Yield the problems of settings that cannot take effect on this machine: a package or a GPU is missing.

    Training would otherwise start without them.
    """
    if train.use_liger_kernel and machine.device == "cpu":
        message = "Liger needs a GPU, and this trains on the CPU"
        yield Problem("train.use_liger_kernel", "true", message, "set it to false", ("instance",))
    elif train.use_liger_kernel and not _installed("liger_kernel"):
        remedy = "pip install liger-kernel, or set it to false"
        yield Problem("train.use_liger_kernel", "true", "requires the package liger-kernel", remedy)
    if machine.attn_implementation == "flash_attention_2":
        key, other = "instance.attn_implementation", "instance.attn_implementation=sdpa"
        if machine.device == "cpu":
            message = "needs a GPU, and this trains on the CPU"
            yield Problem(key, machine.attn_implementation, message, f"set {other}", ("instance",))
        elif not _installed("flash_attn"):
            message, remedy = "requires the package flash-attn", f"pip install flash-attn, or set {other}"
            yield Problem(key, machine.attn_implementation, message, remedy)
        elif not train.bf16:
            message, remedy = "does not support float32", f"set train.bf16=true, or {other}"
            yield Problem(key, machine.attn_implementation, message, remedy, ("train.bf16",))
    if isinstance(peft, Qlora) and not _installed("bitsandbytes"):
        remedy = "pip install bitsandbytes, or set peft=lora"
        yield Problem("peft.method", "qlora", "requires the package bitsandbytes", remedy, ("peft",))
    for names, module, package in OPTIMIZERS:
        if train.optim.startswith(tuple(names.split())) and not _installed(module):
            remedy = f"pip install {package}, or set train.optim=adamw_torch"
            yield Problem("train.optim", train.optim, f"requires the package {package}", remedy)
    if train.optim.startswith("paged_") and machine.device == "cpu":
        message = "pages its state between GPU and CPU memory and needs a GPU"
        yield Problem("train.optim", train.optim, message, "set train.optim=adamw_torch", ("instance",))


def optimizer_package(optim: str) -> str | None:
    """Return the package that an optimizer of transformers needs; None for one of torch's or transformers' own."""
    return next((package for names, _, package in OPTIMIZERS if optim.startswith(tuple(names.split()))), None)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _defaults(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the user has not set."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU; None if unknown."""
    words = f" {device_name.replace('-', ' ')} "
    if " Laptop " in words:  # laptop GPUs have the name of a faster one
        return None
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if f" {name} " in words), None)


def visible_gpus() -> list[str]:
    """List the NVIDIA GPUs that a process here may use, as CUDA_VISIBLE_DEVICES names them, without torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in names if name not in ("", "-1")]
    if (PROC / "gpus").is_dir():
        return [str(index) for index, _ in enumerate((PROC / "gpus").glob("*"))]
    return nvidia_smi("index")  # WSL2 and some containers lack that folder


def nvidia_smi(field: str) -> list[str]:
    """Return a field of ``nvidia-smi --query-gpu`` for each GPU; [] if the command is missing or fails."""
    path = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(WSL))
    return list(_query(path, field)) if path else []


@cache
def _query(path: str, field: str) -> tuple[str, ...]:
    try:
        process = subprocess.run(
            [path, f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in process.stdout.splitlines() if line.strip())
