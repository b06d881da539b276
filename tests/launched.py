"""A child process for test_processes.py: does what its task says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from sftlab.errors import ConfigError, Problem, StageError
from sftlab.runtime.processes import serve


class Task(BaseModel):
    do: str
    code: int = 0
    text: str = ""


def run(folder: Path, task: Task) -> None:
    (folder / "pid").write_text(str(os.getpid()), "utf-8")
    if os.environ.get("RANK") == "0":  # rank 1 has the fault, and rank 0 waits for it in gloo
        import torch.distributed

        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        torch.distributed.barrier()
    elif "RANK" in os.environ:
        import torch.distributed

        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
    match task.do:
        case "environment":
            (folder / "environment").write_text("\n".join(f"{name}={os.environ[name]}" for name in os.environ), "utf-8")
        case "config":
            raise ConfigError(Problem("dataset.user", None, "a reason\nof two lines – é"))
        case "stage":
            raise StageError("the loss is not a number")
        case "bug":
            {}["key"]
        case "full":
            raise RuntimeError("Error: No space left on device (os error 28)")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(task.code)
        case "sleep":
            time.sleep(3600)


if __name__ == "__main__":
    if json.loads(Path(sys.argv[1], "inputs.json").read_text("utf-8"))["do"] == "sleep early":  # during imports
        Path(sys.argv[1], "pid").write_text(str(os.getpid()), "utf-8")
        time.sleep(3600)
    serve(Task, run)
