"""Start the ranks of a training on this machine through ``torch.distributed.run``, and word its failures.

``python -m sftlab.runtime.ranks ARGUMENTS -m MODULE FOLDER``. The first rank that fails ends the others.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from sftlab.runtime.processes import Failure, die_with_parent, ended_by, write_failure


def main(arguments: list[str]) -> None:
    """Run the ranks. If one fails the exit code is 1, and ``error.json`` names a rank that a signal has ended."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    die_with_parent()
    # The rank itself or the lines below report a failure.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    module, folder = arguments[-2], Path(arguments[-1])
    try:
        run.main(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        if all(code == 128 + signal.SIGTERM for code in codes.values()):
            sys.exit(128 + signal.SIGTERM)  # they have saved their state
        if os.EX_IOERR in codes.values():
            sys.exit(os.EX_IOERR)
        for rank, code in codes.items():
            if code < 0 and code != -signal.SIGTERM:  # SIGTERM is how the launcher ends the other ranks
                write_failure(folder, Failure(type="StageError", message=f"{module}: rank {rank}: {ended_by(-code)}"))
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except DistError as error:
        first = str(error).partition("\n")[0]
        message = (
            f"{module}: the machines could not connect: {first}. Run the same command on each again; completed work is "
            "reused"
        )
        write_failure(folder, Failure(type="StageError", message=message))
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
