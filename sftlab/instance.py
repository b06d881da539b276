"""The machine that a config names or ``auto`` finds: devices, ranks and precision."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftlab.config import InstanceConfig, TrainConfig
from sftlab.errors import ConfigError

# OpenMP threads wait for each other by spinning. Where another process wants one of the cores, each of the thousands
# of small operations of a step then costs a time slice (measured on 2 cores, one of them busy: 53 tokens/s, and with
# these 395). GOMP is torch's, KMP is vLLM's.
BRIEF_SPIN = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}


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
            **({} if self.strategy == "ddp" else {"strategy": self.strategy}),
        }

    def as_dict(self) -> dict[str, Any]:
        """All fields, for a child process."""
        return asdict(self)

    def environment(self) -> dict[str, str]:
        """Variables that show a training process its devices and no others."""
        threads = {}
        if self.num_processes > 1:
            threads["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.num_processes))
        if self.device == "cpu":
            return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", **BRIEF_SPIN, **threads}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.num_processes)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": ",".join(shown[: self.num_processes]), **threads}

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
            ]
        return [*meeting, f"--nproc-per-node={self.num_processes}"]

    def accumulation(self, train: TrainConfig) -> int:
        """Batches per optimizer step: as set, or derived from the global batch size.

        Raises:
            ConfigError: the global batch size is no multiple of what the devices take at once.
        """
        if train.global_batch_size is None:
            return train.gradient_accumulation_steps
        at_once = train.per_device_train_batch_size * self.world_size
        if train.global_batch_size % at_once:
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size}: is no multiple of {at_once} "
                f"(train.per_device_train_batch_size={train.per_device_train_batch_size} on {self.world_size} "
                f"devices of instance={self.name}); change one of them"
            )
        return train.global_batch_size // at_once

    def effective_batch(self, train: TrainConfig) -> int:
        """Rows per optimizer step over all devices."""
        return train.per_device_train_batch_size * self.world_size * self.accumulation(train)


def find(cfg: InstanceConfig) -> Machine:
    """The machine for a config; ``auto`` and null become what is there.

    Raises:
        ConfigError: the config wants GPUs that this machine does not have.
    """
    gpus = visible_gpus()
    device = cfg.device if cfg.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cpu":
        processes = cfg.num_processes or 1
    else:
        processes = cfg.num_processes or max(gpus, 1)
        if gpus < processes:
            raise ConfigError(
                f"instance={cfg.name}: wants {processes} GPU{'s' if processes > 1 else ''} and this machine shows "
                f"{gpus or 'none'}; choose instance=auto or instance=cpu, or set instance.num_processes"
            )
    attention = cfg.attn_implementation if cfg.attn_implementation != "auto" else "sdpa"
    found = Machine(cfg.name, device, processes, attention, cfg.strategy, cfg.nnodes, cfg.node_rank, cfg.rdzv_endpoint)
    if found.strategy == "fsdp" and (found.world_size == 1 or device == "cpu"):
        raise ConfigError(
            f"instance.strategy=fsdp: shares a model among several GPUs, and instance={cfg.name} trains on "
            f"{'the CPU' if device == 'cpu' else 'one'} here; set instance.strategy=ddp"
        )
    return found


def visible_gpus() -> int:
    """How many NVIDIA GPUs a process started here may use, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([part for part in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
