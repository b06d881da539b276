"""Starts the ranks of a training on this machine: ``torch.distributed.run``, with its failures told in our words.

``python -m sftlab.runtime.ranks ARGUMENTS -m MODULE FOLDER``. The first rank to fail ends the others.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from sftlab.runtime.processes import die_with_parent, report


def main(arguments: list[str]) -> None:
    """Run the ranks; the exit code is 1 if one of them failed, and a killed one is told in ``error.json``."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    die_with_parent()
    # What it logs about a failure is told by the rank itself, or below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    folder = Path(arguments[-1])
    try:
        run.main(arguments)
    except ChildFailedError as error:
        if all(failure.exitcode == 128 + signal.SIGTERM for failure in error.failures.values()):
            sys.exit(128 + signal.SIGTERM)  # they have saved what there was
        if any(failure.exitcode == os.EX_IOERR for failure in error.failures.values()):
            sys.exit(os.EX_IOERR)
        for rank, failure in sorted(error.failures.items()):
            # SIGTERM is how the others are ended.
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                hint = "; usually there was not enough memory" if name == "SIGKILL" else ""
                report(folder, "StageError", f"{arguments[-2]}: rank {rank} was ended by {name}{hint}. What was "
                       "finished is kept; run the command again")  # fmt: skip
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except DistError as error:
        first = str(error).partition("\n")[0]
        report(folder, "StageError", f"{arguments[-2]}: the machines did not meet: {first}. What was finished is "
               "kept; run the same command on each again")  # fmt: skip
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
