"""Command lines in processes of their own that start fast: each is forked off one that has the light modules.

The names of heavier ones, which only whole runs need, are this process's arguments.

A line of the input is a JSON object with ``folder``, ``arguments``, ``environment``, ``code``, ``names`` and
``output``. The fork runs the code, which may put a fault somewhere, and ``sftlab.cli.main``; in ``output`` it leaves
out, err, and which of the modules ``names`` it has loaded.
Answered are its exit code and the seconds that it took of a processor.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any


def serve() -> None:
    import httpx  # noqa: F401 – for the hub's library
    import jinja2.sandbox  # noqa: F401
    from hydra.core.override_parser.overrides_parser import OverridesParser

    import sftlab.command_line
    import sftlab.pipeline
    import sftlab.sweep
    import sftlab.validate
    import sftlab.vignettes  # noqa: F401

    for name in sys.argv[1:]:
        import_module(name)
    OverridesParser.create().parse_override("a=1")  # builds its tables
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(case))
        _, status, used = os.wait4(child, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)


def run(case: dict[str, Any]) -> int:
    from sftlab.cli import main

    output = Path(case["output"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(case["environment"])
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
