"""Run work that takes a GPU or much memory in child processes, which free all of it when they end.

The parent writes a task, a pydantic model, to ``inputs.json`` in the folder that the child fills, and starts
``python -m MODULE FOLDER``, through ``sftlab.runtime.ranks`` if there are several ranks. A child that fails writes
``error.json``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from sftlab.errors import Problem, SftlabError, StageError, Terminated, from_json, to_json
from sftlab.runtime.store import full, write_json

# transformers, trl, peft and accelerate each call this on import. With a cache a child starts in 4.6 s of CPU time,
# without one in 4.9 s.
metadata.packages_distributions = cache(metadata.packages_distributions)

INPUTS, ERROR = "inputs.json", "error.json"

# Variables of an outer launcher, with which a child would join its process group: those that torchrun sets for its
# processes, those that it reads arguments from, and those of accelerate.
RANK_VARIABLES = re.compile(
    r"(LOCAL_|ROLE_|GROUP_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE)_.*"
    r"|PET_(NNODES|NPROC_PER_NODE|RDZV_(BACKEND|ENDPOINT|ID|CONF)|STANDALONE|MAX_RESTARTS|MONITOR_INTERVAL|START_METHOD"
    r"|EVENT_LOG_HANDLER|ROLE|MODULE|NO_PYTHON|RUN_PATH|LOG_DIR|REDIRECTS|TEE|LOCAL_RANKS_FILTER"
    r"|DUPLICATE_STD(OUT|ERR)_FILTERS|NODE_RANK|MASTER_(ADDR|PORT)|LOCAL_ADDR|SIGNALS_TO_HANDLE|SHUTDOWN_TIMEOUT"
    r"|VIRTUAL_LOCAL_RANK)"
)

# Phrases in messages of gloo and NCCL when the peer process has ended.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")

# Phrases in messages of torch, its CPU allocator and vLLM when memory is too small.
TOO_LARGE = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "No available memory for the cache blocks",
    "is less than desired GPU memory utilization",
    "larger than the available KV cache memory",
    "less than requested memory for kv",
)

# Defaults: variables that the user has set take precedence.
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # also disables the bar with which transformers loads weights
    "PYTHONWARNINGS": "ignore",  # from libraries about libraries; sftlab logs its own messages
    "TRITON_CACHE_AUTOTUNING": "0",
}
NEEDED = {"HF_HUB_OFFLINE": "1"}  # the parent has downloaded everything

# Signals that end a child, each with the seconds to wait for it: after a failure of a sibling or Ctrl-C.
STOP = ((None, 1), (signal.SIGINT, 10), (signal.SIGTERM, 10), (signal.SIGKILL, 60))

Task = TypeVar("Task", bound=BaseModel)


@dataclass(frozen=True)
class Child:
    """A child process: the folder that it fills, its task, and environment variables of its own."""

    folder: Path
    task: BaseModel
    environment: Mapping[str, str] = field(default_factory=dict)


class Failure(BaseModel):
    """``error.json``: why a child failed.

    ``type`` is the class of ``sftlab.errors`` that the parent raises, ``problems`` are the records of a ConfigError.
    ``lost`` is true if only the connection to another rank failed: that rank has the cause.
    """

    type: str
    message: str
    problems: tuple[Problem, ...] = ()
    lost: bool = False


def child(
    module: str,
    folder: Path,
    task: BaseModel,
    *,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    grace_seconds: int = 25,
) -> None:
    """Run ``python -m MODULE FOLDER`` with a task, and wait until it ends.

    With a ``launcher`` (arguments of ``torch.distributed.run``) the module runs once per rank. After SIGTERM the
    child has ``grace_seconds`` to save its state.

    Raises:
        SftlabError: the child's own error, with its message.
        StageError: the child was ended by a signal, or left no message.
        KeyboardInterrupt: Ctrl-C, which the child received too; it has ended.
    """
    children(module, [Child(folder, task, environment or {})], launcher=launcher, grace_seconds=grace_seconds)


def children(
    module: str,
    tasks: Sequence[Child],
    *,
    launcher: Sequence[str] = (),
    watch: Callable[[Collection[Path]], None] | None = None,
    grace_seconds: int = 25,
) -> None:
    """Run a child for each task, all at once, and wait until they end.

    ``watch`` is called a few times per second with the folders of the running children. If one child fails, or
    ``watch`` raises, the others are ended.

    Raises:
        SftlabError: the error of the first child that failed; see ``child``.
    """
    running: dict[subprocess.Popen[bytes], Path] = {}
    try:
        for task in tasks:
            running[_start(module, task, launcher)] = task.folder
        while running:
            with suppress(subprocess.TimeoutExpired):
                next(iter(running)).wait(timeout=0.2)
            if watch is not None:
                watch(running.values())
            for process in [process for process in running if process.poll() is not None]:
                _check(module, process.returncode, running.pop(process))
    except BaseException as error:
        save = ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 60))
        _end(list(running), save if isinstance(error, Terminated) else STOP)
        raise


def _start(module: str, task: Child, launcher: Sequence[str]) -> subprocess.Popen[bytes]:
    write_json(task.folder / INPUTS, task.task.model_dump(mode="json"))
    (task.folder / ERROR).unlink(missing_ok=True)
    command = [sys.executable, "-m"]
    if launcher:
        command += ["sftlab.runtime.ranks", *launcher, "-m"]
    inherited = {name: value for name, value in os.environ.items() if not RANK_VARIABLES.fullmatch(name)}
    return subprocess.Popen(
        [*command, module, str(task.folder)],
        env={**QUIET, **inherited, **NEEDED, **task.environment},
        preexec_fn=die_with_parent,
    )


def _check(module: str, code: int, folder: Path) -> None:
    """Raise the error of a child that ended with a non-zero exit code."""
    if code == 0:
        return
    if (folder / ERROR).is_file():
        failure = Failure.model_validate_json((folder / ERROR).read_bytes())
        raise from_json(failure.model_dump())
    if code == os.EX_IOERR:
        raise StageError(
            f"{module}: the disk is full ({folder}); free some space, or set store= to a folder on another disk. "
            "Completed stages are reused"
        )
    # Shells and launchers report 128 + signal where Python reports -signal.
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        raise StageError(f"{module}: {ended_by(number)}")
    raise StageError(f"{module}: ended with exit code {code} and no message; see its output above")


def ended_by(number: int) -> str:
    """Describe a process that a signal has ended, and what to do."""
    name = signal.Signals(number).name
    cause = ", usually because memory ran out" if name == "SIGKILL" else ""
    return f"ended by {name}{cause}. Completed work is reused; run the command again"


def _end(processes: Sequence[subprocess.Popen[bytes]], steps: Sequence[tuple[signal.Signals | None, int]]) -> None:
    """End processes by a sequence of signals, each with the seconds to wait before the next one."""
    for number, patience in steps:
        running = [process for process in processes if process.poll() is None]
        deadline = time.monotonic() + patience
        for process in running:
            if number is not None:
                process.send_signal(number)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0, deadline - time.monotonic()))


# ------------------------------------------------------------------- in the child process


def serve(task_class: type[Task], run: Callable[[Path, Task], None]) -> None:
    """Run a child's program: ``run(folder, task)``. A failure is written to ``error.json``; the exit code is 1."""
    die_with_parent()
    _quiet()
    folder = Path(sys.argv[1])
    try:
        run(folder, task_class.model_validate_json((folder / INPUTS).read_bytes()))
    except Terminated:
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(130)
    except SftlabError as error:
        write_failure(folder, Failure.model_validate(to_json(error)))
    except Exception as error:
        if any(words in str(error) for words in LOST):
            message = f"another rank has ended, see its output: {error}"
            write_failure(folder, Failure(type="StageError", message=message, lost=True))
            sys.exit(1)
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, MemoryError) or any(words in str(error) for words in TOO_LARGE):
            message = f"{_program()}: out of memory: {first}"
            write_failure(folder, Failure(type="OutOfMemoryError", message=message))
            sys.exit(1)
        if _disk_is_full(error, folder):
            sys.exit(os.EX_IOERR)  # there may be no space for error.json
        traceback.print_exc()
        # A bug report needs the last frame beside the message.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        write_failure(folder, Failure(type="StageError", message=message))
    else:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 has written the results. Destructors of a rank whose peers have ended may abort.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return
    sys.exit(1)


def write_failure(folder: Path, failure: Failure) -> None:
    """Write ``error.json``. Of several ranks the first failure that is not a lost connection is kept."""
    path = folder / ERROR
    try:
        if not path.exists() or (not failure.lost and Failure.model_validate_json(path.read_bytes()).lost):
            write_json(path, failure.model_dump())
    except OSError:  # on a full disk the message must not be lost
        print(failure.message, file=sys.stderr)


def leave_out(*libraries: str) -> None:
    """Make libraries that this process does not use look as if they were not installed.

    peft imports bitsandbytes if it is installed, and with it torch's compiler; trl imports wandb. On two cores a child
    starts in 4.5 s of CPU time without the two and in 5.8 s with them.
    """
    for name in libraries:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own mark of a missing module


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, even by SIGKILL (Linux only)."""
    pr_set_pdeathsig = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)
    except (AttributeError, OSError):
        return


def _program() -> str:
    """Name the stage of this process for messages: ``train`` for ``…/sftlab/train/worker.py``."""
    path = Path(sys.argv[0])
    return path.parent.name if path.stem in ("stage", "worker") else path.stem.removesuffix("_worker")


def _disk_is_full(error: BaseException, folder: Path) -> bool:
    """Return whether an error was caused by a full disk: by its text, or because the disk is full now."""
    if full(error):
        return True
    try:
        return shutil.disk_usage(folder).free < 64 * 2**10
    except OSError:  # the folder was deleted
        return False


def _quiet() -> None:
    """Set the log format of a child, and silence libraries whose messages address developers."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("httpx", "filelock", "datasets", "accelerate", "torch", "torch._library.triton", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
