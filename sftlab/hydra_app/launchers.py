"""Hydra's launchers: what is checked before one starts its jobs, and the GPUs that a job may use under it.

Nothing of the process that started the sweep is known in a job but its composed configuration.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import DictConfig

from sftlab.errors import ConfigError
from sftlab.instance.machine import gpus_per_job, visible_gpus

log = logging.getLogger(__name__)

PARALLEL = ("joblib", "ray", "submitit_local", "submitit_slurm")
# What makes a Ray that is started for a sweep listen on 127.0.0.1 only: the name is Ray's.
RAY_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def at_once(device: str, num_processes: int | None) -> int:
    """How many jobs run side by side on this machine: one for each set of GPUs, or one per core (-1, joblib's word)."""
    gpus = gpus_per_job(device, num_processes)
    return max(len(visible_gpus()) // gpus, 1) if gpus else -1


def prepare(config: DictConfig, swept: set[str]) -> None:
    """Look at a sweep's launcher before anything is written; ``swept`` are the keys that differ between jobs.

    The sweep's folder becomes absolute: jobs of Ray may start in another folder than the sweep.

    Raises:
        ConfigError: its jobs could never start, or their decision could not be made.
    """
    name = str(config.hydra.runtime.choices["hydra/launcher"])
    if name not in PARALLEL:
        return
    if keys := sorted(key for key in swept if key.partition(".")[0] == "instance"):
        key = keys[0] if len(keys) == 1 else "instance"
        raise ConfigError(
            f"{key}: cannot be swept with hydra/launcher={name}, which reserves the same for every job; "
            "run one sweep for each value"
        )
    if name == "joblib" and config.hydra.launcher.n_jobs == 0:
        raise ConfigError("hydra.launcher.n_jobs=0: no job would run; set it to 1 or more, or to -1 for one per core")
    if config.instance.nnodes > 1:
        raise ConfigError(
            f"instance.nnodes={config.instance.nnodes}: hydra/launcher={name} gives a job one machine; train on "
            "several without a launcher"
        )
    cluster = name == "submitit_slurm" or (name == "ray" and config.hydra.launcher.ray.init.address != "local")
    gpus, shown = gpus_per_job(config.instance.device, config.instance.num_processes), len(visible_gpus())
    if gpus > shown and not cluster:
        raise ConfigError(
            f"hydra/launcher={name}: a job takes {gpus} GPU{'s' if gpus > 1 else ''} (instance={config.instance.name}) "
            f"and this machine shows {shown or 'none'}; choose instance=auto or instance=cpu"
            + (", or name a cluster with hydra.launcher.ray.init.address" if name == "ray" else "")
        )
    if gpus > shown and config.mode == "all":
        raise ConfigError(
            f"hydra/launcher={name}: the models are compared where this command runs, and it shows {shown or 'none'} "
            f"of the {gpus} GPUs of instance={config.instance.name}; set mode=train, and then run the sweep once more "
            "without the launcher on a machine that has them: it finds what was trained"
        )
    if name == "ray" and not cluster:
        os.environ.update(RAY_LOOPBACK)
    config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir).absolute())


@contextmanager
def devices(name: str, device: str, num_processes: int | None) -> Iterator[None]:
    """Show a job of this launcher the GPUs that are its own, for as long as it runs; wait until there are enough."""
    if name == "joblib" and (gpus := gpus_per_job(device, num_processes)):
        with claim(gpus, visible_gpus()) as claimed, _shown(claimed):
            yield
    elif name == "ray":
        with _shown(_reserved_by_ray()):  # a worker to which Ray gave none would see all
            yield
    else:
        yield


@contextmanager
def claim(count: int, gpus: Sequence[str]) -> Iterator[list[str]]:
    """Hold this many of these GPUs, against every other process of this user on this machine that asks here.

    A lock ends with its process, however that ends. Who waits, waits in a line: so two that have half of what they
    need cannot wait for each other.
    """
    from filelock import FileLock, Timeout

    folder = Path(tempfile.gettempdir()) / f"sftlab-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as held:
        claimed: list[str] = []
        with FileLock(folder / "line.lock"):
            while len(claimed) < count:
                for gpu in gpus:
                    if gpu in claimed or len(claimed) == count:
                        continue
                    try:
                        held.enter_context(FileLock(folder / f"{gpu}.lock").acquire(timeout=0))
                    except Timeout:
                        continue
                    claimed.append(gpu)
                if len(claimed) < count:
                    time.sleep(0.5)
        yield sorted(claimed, key=list(gpus).index)


@contextmanager
def _shown(gpus: Sequence[str]) -> Iterator[None]:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    log.info("gpus: %s", ", ".join(gpus) or "none")
    try:
        yield
    finally:  # a worker runs one job after the other
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _reserved_by_ray() -> list[str]:
    import ray

    return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])  # type: ignore[no-any-return]
