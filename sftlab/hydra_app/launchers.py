"""Hydra's launchers: checks before one starts its jobs, and the GPUs that a job may use under it.

A job under a launcher depends on nothing but its composed config: its process may be on another machine.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from sftlab.errors import ConfigError, Problem, shown
from sftlab.instance.machine import gpus_per_job, visible_gpus
from sftlab.runtime.modes import Mode

log = logging.getLogger(__name__)

PARALLEL = ("joblib", "ray", "submitit_local", "submitit_slurm")
# Ray's own variable. A Ray started for one sweep then listens on 127.0.0.1 only.
RAY_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def parallel_jobs(device: str, num_processes: int | None) -> int:
    """How many jobs joblib runs in parallel: one per set of GPUs; -1, which is one per core, on a CPU."""
    gpus = gpus_per_job(device, num_processes)
    return max(len(visible_gpus()) // gpus, 1) if gpus else -1


def starter(config: DictConfig) -> str:
    """The launcher, or else the sweeper, that starts a sweep's jobs, as an override."""
    choices = config.hydra.runtime.choices
    group = "hydra/launcher" if choices["hydra/launcher"] in PARALLEL else "hydra/sweeper"
    return f"{group}={choices[group]}"


def prepare(config: DictConfig, varied: set[str], mode: Mode) -> None:
    """Check a sweep's launcher before anything is written, and make the sweep's folder absolute.

    Jobs under Ray may start in another folder than the command.

    Args:
        config: of the sweep.
        varied: keys that differ between jobs.
        mode: of all jobs.

    Raises:
        ConfigError: a job could never start, or the models could not be evaluated after the jobs.
    """
    name = str(config.hydra.runtime.choices["hydra/launcher"])
    if name not in PARALLEL:
        return
    if keys := sorted(key for key in varied if key.partition(".")[0] == "instance"):
        key = keys[0] if len(keys) == 1 else "instance"
        raise ConfigError(
            Problem(
                key,
                None,
                f"cannot be swept with hydra/launcher={name}, which reserves the same resources for every job",
                "run one sweep for each value",
            )
        )
    if name == "joblib" and config.hydra.launcher.n_jobs == 0:
        raise ConfigError(
            Problem("hydra.launcher.n_jobs", "0", "no job would run", "set it to 1 or more, or to -1 for one per core")
        )
    if config.instance.nnodes > 1:
        raise ConfigError(
            Problem(
                "instance.nnodes",
                shown(config.instance.nnodes),
                f"hydra/launcher={name} runs a job on one machine",
                "leave out the launcher to train on several machines",
            )
        )
    cluster = name == "submitit_slurm" or (name == "ray" and config.hydra.launcher.ray.init.address != "local")
    gpus, visible = gpus_per_job(config.instance.device, config.instance.num_processes), len(visible_gpus())
    if gpus > visible and not cluster:
        raise ConfigError(
            Problem(
                "hydra/launcher",
                name,
                f"a job needs {gpus} GPU{'s' if gpus > 1 else ''} (instance={config.instance.name}) and "
                f"this machine shows {visible or 'none'}",
                "set instance=auto or instance=cpu"
                + (", or name a cluster with hydra.launcher.ray.init.address" if name == "ray" else ""),
            )
        )
    if gpus > visible and mode.evaluates_after_jobs:
        raise ConfigError(
            Problem(
                "hydra/launcher",
                name,
                "this command evaluates the models itself after the jobs, and this machine shows "
                f"{visible or 'none'} of the {gpus} GPUs of instance={config.instance.name}",
                "set mode=train. Then run the same sweep without the launcher and without mode=train on "
                "a machine with these GPUs: it reuses the trained models",
            )
        )
    if name == "ray" and not cluster:
        os.environ.update(RAY_LOOPBACK)
    config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir).absolute())


def in_rounds(begin: Callable[[int], None], count: int) -> None:
    """Let Hydra launch the jobs of a sweep ``count`` times, each after ``begin`` with the number of the round."""
    plugins = Plugins.instance()

    def with_rounds(**arguments: Any) -> Launcher:
        del plugins.instantiate_launcher  # launchers pickle the plugins for their workers
        launcher = plugins.instantiate_launcher(**arguments)
        launch = launcher.launch

        def each(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            for number in range(count):
                log.info("sweep.prune: round %d of %d", number + 1, count)
                begin(number)
                returned = launch(job_overrides, initial_job_idx)
            return returned

        launcher.launch = each  # type: ignore[method-assign]
        return launcher

    plugins.instantiate_launcher = with_rounds  # type: ignore[method-assign, assignment]


@contextmanager
def devices(launcher: str, device: str, num_processes: int | None) -> Iterator[None]:
    """Restrict a job to its own GPUs while it runs. Under joblib, wait until enough of them are free."""
    if launcher == "joblib" and (gpus := gpus_per_job(device, num_processes)):
        with claim(gpus, visible_gpus()) as claimed, _visible(claimed):
            yield
    elif launcher == "ray":
        with _visible(_reserved_by_ray()):  # a worker without reserved GPUs would see all of them
            yield
    else:
        yield


@contextmanager
def claim(count: int, gpus: Sequence[str]) -> Iterator[list[str]]:
    """Lock ``count`` of these GPUs against other processes of this user on this machine that call this function.

    A lock ends with its process, however that ends. Processes wait in a queue, so that two that hold half of what they
    need cannot wait for each other.
    """
    from filelock import FileLock, Timeout

    folder = Path(tempfile.gettempdir()) / f"sftlab-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as locks:
        claimed: list[str] = []
        with FileLock(folder / "line.lock"):
            while len(claimed) < count:
                for gpu in gpus:
                    if gpu in claimed or len(claimed) == count:
                        continue
                    try:
                        locks.enter_context(FileLock(folder / f"{gpu}.lock").acquire(timeout=0))
                    except Timeout:
                        continue
                    claimed.append(gpu)
                if len(claimed) < count:
                    time.sleep(0.5)
        yield sorted(claimed, key=list(gpus).index)


@contextmanager
def _visible(gpus: Sequence[str]) -> Iterator[None]:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    log.info("gpus: %s", ", ".join(gpus) or "none")
    try:
        yield
    finally:  # a worker runs several jobs, one after the other
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _reserved_by_ray() -> list[str]:
    import ray

    return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])  # type: ignore[no-any-return]
