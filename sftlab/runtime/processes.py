"""Child processes: whatever takes the GPU, or much memory, runs in one and gives all of it back.

The parent writes the child's inputs to ``inputs.json`` in the folder that the child fills, and
starts ``python -m sftlab.stages.X FOLDER``, through ``sftlab.runtime.ranks`` when there are several ranks.
A child that cannot go on leaves its reason in ``error.json``.
"""

from __future__ import annotations

import ctypes
import json
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
from typing import Any, TypeVar, overload

from pydantic import BaseModel

from sftlab import errors
from sftlab.errors import SftlabError, StageError, Terminated
from sftlab.runtime.store import full, write_json

# transformers, trl, peft and accelerate each ask for this as they are imported. Where it is remembered a child starts
# in 4.6 s of CPU time, and where it is not in 4.9 s.
metadata.packages_distributions = cache(metadata.packages_distributions)

INPUTS, ERROR = "inputs.json", "error.json"

# What a launcher of an outer process left behind would make a child believe that it is a rank of it: variables that
# torchrun sets for its processes, those from which it takes arguments, and those of accelerate.
RANK_VARIABLES = re.compile(
    r"(LOCAL_|ROLE_|GROUP_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE)_.*"
    r"|PET_(NNODES|NPROC_PER_NODE|RDZV_(BACKEND|ENDPOINT|ID|CONF)|STANDALONE|MAX_RESTARTS|MONITOR_INTERVAL|START_METHOD"
    r"|EVENT_LOG_HANDLER|ROLE|MODULE|NO_PYTHON|RUN_PATH|LOG_DIR|REDIRECTS|TEE|LOCAL_RANKS_FILTER"
    r"|DUPLICATE_STD(OUT|ERR)_FILTERS|NODE_RANK|MASTER_(ADDR|PORT)|LOCAL_ADDR|SIGNALS_TO_HANDLE|SHUTDOWN_TIMEOUT"
    r"|VIRTUAL_LOCAL_RANK)"
)

# How gloo and NCCL say that the process at the other end has ended.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")

# How torch, its CPU allocator and vLLM say that there is not enough memory.
TOO_LARGE = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "No available memory for the cache blocks",
    "is less than desired GPU memory utilization",
    "larger than the available KV cache memory",
    "less than requested memory for kv",
)

# Defaults: variables set by the user take precedence.
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
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' too: no bar for the loading of weights
    "PYTHONWARNINGS": "ignore",  # of libraries about libraries; sftlab's own messages are log lines
    "TRITON_CACHE_AUTOTUNING": "0",
}
NEEDED = {"HF_HUB_OFFLINE": "1"}  # whatever comes from the hub was fetched by the parent


@dataclass(frozen=True)
class Task:
    """What a child is given: the folder that it fills, its inputs, and variables of its own."""

    folder: Path
    inputs: Mapping[str, Any] | BaseModel
    environment: Mapping[str, str] = field(default_factory=dict)


def child(
    module: str,
    folder: Path,
    inputs: Mapping[str, Any] | BaseModel,
    *,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    grace_seconds: int = 25,
) -> None:
    """Run ``python -m MODULE FOLDER`` with these inputs, and wait for it.

    With a ``launcher`` (arguments of ``torch.distributed.run``) it runs once in each rank. At SIGTERM it has
    ``grace_seconds`` to save what it can.

    Raises:
        SftlabError: the child's own error, with its message.
        StageError: the child died: by a signal, or without saying why.
        KeyboardInterrupt: Ctrl-C; the child got it too and has ended.
    """
    children(module, [Task(folder, inputs, environment or {})], launcher=launcher, grace_seconds=grace_seconds)


def children(
    module: str,
    tasks: Sequence[Task],
    *,
    launcher: Sequence[str] = (),
    watch: Callable[[Collection[Path]], None] | None = None,
    grace_seconds: int = 25,
) -> None:
    """Run a child for each task, all at once, and wait for them.

    While they run, ``watch`` is called with the folders of those that do.

    If one fails the others are ended, and its error is raised: what ``child`` raises.
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


def _start(module: str, task: Task, launcher: Sequence[str]) -> subprocess.Popen[bytes]:
    inputs = task.inputs.model_dump(mode="json") if isinstance(task.inputs, BaseModel) else task.inputs
    write_json(task.folder / INPUTS, inputs)
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
    """Raise why a child ended, unless all was well."""
    if code == 0:
        return
    if (folder / ERROR).is_file():
        error = json.loads((folder / ERROR).read_text("utf-8"))
        raise getattr(errors, error["type"], StageError)(error["message"])
    if code == os.EX_IOERR:
        raise StageError(
            f"{module}: the disk is full ({folder}); free some space or set store= to another folder. What was "
            "finished is kept"
        )
    # Shells and launchers say 128 + signal for what Python says as a negative number.
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        hint = "; usually there was not enough memory" if name == "SIGKILL" else ""
        raise StageError(f"{module}: was ended by {name}{hint}. What was finished is kept; run the command again")
    raise StageError(f"{module}: ended with exit code {code} and gave no reason; see its output above")


def leave_out(*libraries: str) -> None:
    """Make libraries that this process has no use for look as if they were not installed.

    peft imports bitsandbytes wherever it is installed, and with it torch's compiler; trl imports wandb. On two
    cores a child starts in 4.5 s of CPU time without the two and in 5.8 s with them.
    """
    for name in libraries:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what Python itself takes for « not there »


Task_ = TypeVar("Task_", bound=BaseModel)


@overload
def serve(task: type[Task_], run: Callable[[Path, Task_], None]) -> None: ...
@overload
def serve(task: Callable[[Path, dict[str, Any]], None]) -> None: ...
def serve(task: Any, run: Any = None) -> None:
    """A child's main: ``run(folder, task)``, and the reason in ``error.json`` if it fails."""
    die_with_parent()
    _quiet()
    folder = Path(sys.argv[1])
    try:
        text = (folder / INPUTS).read_text("utf-8")
        if run is None:
            task(folder, json.loads(text))
        else:
            run(folder, task.model_validate_json(text))
    except Terminated:
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(130)
    except SftlabError as error:
        report(folder, type(error).__name__, str(error))
    except Exception as error:
        if any(words in str(error) for words in LOST):
            report(folder, "StageError", f"another rank has ended, see its output: {error}", lost=True)
            sys.exit(1)
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, MemoryError) or any(words in str(error) for words in TOO_LARGE):
            report(folder, "OutOfMemoryError", f"{Path(sys.argv[0]).stem}: out of memory: {first}")
            sys.exit(1)
        if _disk_is_full(error, folder):
            sys.exit(os.EX_IOERR)  # there may be no room for a message
        traceback.print_exc()
        # The last frame tells a bug report more than the message alone.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        report(folder, "StageError", message)
    else:
        if os.environ.get("RANK", "0") != "0":
            # Its work is done and rank 0 has written it. The destructors of a rank whose peers have ended may abort.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return
    sys.exit(1)


def _disk_is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error is that of a full disk, or the disk is full whatever the error says."""
    if full(error):
        return True
    try:
        return shutil.disk_usage(folder).free < 64 * 2**10
    except OSError:  # somebody has deleted the folder
        return False


def _quiet() -> None:
    """Leave the terminal to what takes long: no advice to developers."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("httpx", "filelock", "datasets", "accelerate", "torch", "torch._library.triton", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def report(folder: Path, kind: str, message: str, *, lost: bool = False) -> None:
    """Leave the reason in ``error.json``: of several ranks' the first that is not the loss of another rank."""
    path = folder / ERROR
    try:
        if not path.exists() or (not lost and json.loads(path.read_text("utf-8"))["lost"]):
            write_json(path, {"type": kind, "message": message, "lost": lost})
    except OSError:  # a full disk must not take the place of the reason
        print(message, file=sys.stderr)


# How children are ended: the signals, each with the seconds that it is given.
STOP = ((None, 1), (signal.SIGINT, 10), (signal.SIGTERM, 10), (signal.SIGKILL, 60))


def _end(processes: Sequence[subprocess.Popen[bytes]], how: Sequence[tuple[signal.Signals | None, int]]) -> None:
    """Ask children to end, and make them end."""
    for ask, patience in how:
        running = [process for process in processes if process.poll() is None]
        deadline = time.monotonic() + patience
        for process in running:
            if ask is not None:
                process.send_signal(ask)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0, deadline - time.monotonic()))


def die_with_parent() -> None:
    """End this process when its parent ends, even when that one was killed (Linux only)."""
    pr_set_pdeathsig = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (AttributeError, OSError):
        return
