"""A child process for test_launch.py: does what its inputs say."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sftlab.errors import ConfigError, StageError
from sftlab.runtime.processes import serve


def run(folder: Path, given: dict[str, Any]) -> None:
    (folder / "pid").write_text(str(os.getpid()), "utf-8")
    if os.environ.get("RANK") == "0":  # of several: another one has the fault, and this one waits for it as gloo does
        import torch.distributed

        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        torch.distributed.barrier()
    elif "RANK" in os.environ:
        import torch.distributed

        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
    match given["do"]:
        case "environment":
            (folder / "environment").write_text("\n".join(f"{name}={os.environ[name]}" for name in os.environ), "utf-8")
        case "config":
            raise ConfigError("dataset.user: a reason\nof two lines – é")
        case "stage":
            raise StageError("the loss is not a number")
        case "bug":
            {}["key"]
        case "full":
            raise RuntimeError("Error: No space left on device (os error 28)")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(given["code"])
        case "sleep":
            time.sleep(3600)


if __name__ == "__main__":
    if json.loads(Path(sys.argv[1], "inputs.json").read_text("utf-8"))["do"] == "sleep early":  # as imports do
        Path(sys.argv[1], "pid").write_text(str(os.getpid()), "utf-8")
        time.sleep(3600)
    serve(run)
