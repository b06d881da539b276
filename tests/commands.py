"""Command lines in processes of their own that start fast: each is forked off one that has the light modules.

The names of heavier ones, which only whole runs need, are this process's arguments.

A line of the input is a JSON object with ``folder``, ``arguments``, ``environment``, ``code``, ``names`` and
``output``. The fork runs the code, which may put a fault somewhere, and ``sftlab.cli.main``; in ``output`` it leaves
out, err, and which of the modules ``names`` it has loaded.
Answered are its exit code and the seconds that it took of a processor.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LEFT_OUT = ("bitsandbytes", "wandb")


def serve() -> None:
    import httpx  # noqa: F401 – for the hub's library
    import jinja2.sandbox  # noqa: F401
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # As a training process that quantises nothing and reports nothing leaves them out.
    sys.modules.update(dict.fromkeys(LEFT_OUT))
    for name in sys.argv[1:]:
        import_module(name)
    for name in LEFT_OUT:
        del sys.modules[name]
    OverridesParser.create().parse_override("a=1")  # builds its tables
    gc.freeze()  # what is imported by now is not looked through again in each fork
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(case))
        _, status, used = os.wait4(child, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)


class Forked(subprocess.Popen[bytes]):
    """A stage's process as a fork of the command's, which has imported its libraries already."""

    def __init__(self, command: list[str], env: dict[str, str], prepare: Callable[[], None]) -> None:
        self.args, self.returncode = command, None  # type: ignore[assignment]
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._sigint_wait_secs, self._waitpid_lock = True, 0.25, threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            prepare()
            os._exit(stage(command[2:], env))


def stage(arguments: list[str], env: dict[str, str]) -> int:
    """What ``python -m`` does with these arguments in a process without warnings, handlers and locks of its parent."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    logging.root.handlers.clear()
    warnings.simplefilter("ignore")
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(arguments)
    code = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def start(command: list[str], env: dict[str, str], preexec_fn: Callable[[], None]) -> subprocess.Popen[bytes]:
    """Fork a stage's process if all libraries that it needs are imported; otherwise start it."""
    task = json.loads(Path(command[-1], "inputs.json").read_text("utf-8"))
    plain = command[2] in ("sftlab.train.worker", "sftlab.model.merge_worker", "sftlab.eval.worker")
    method, optim = task.get("peft", {}).get("method"), task.get("train", {}).get("optim", "")
    quantised = method == "qlora" or any(word in optim for word in ("bit", "bnb", "paged", "ademamix"))
    if plain and not quantised and not task.get("report_to") and task.get("engine") != "vllm":
        return Forked(command, env, preexec_fn)
    return subprocess.Popen(command, env=env, preexec_fn=preexec_fn)


def run(case: dict[str, Any]) -> int:
    from sftlab.cli import main
    from sftlab.runtime import processes

    if "sftlab.train.trainer" in sys.modules:
        processes.subprocess = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore

    output = Path(case["output"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update({"OMP_NUM_THREADS": "1", **case["environment"]})
    os.chdir(case["folder"])
    sys.argv = ["sftlab", *case["arguments"]]
    code = 1
    try:
        exec(case["code"], {"__name__": "fault"})
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    (output / "loaded").write_text(" ".join(sorted(set(case["names"]) & set(sys.modules))), "utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
