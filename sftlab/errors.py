"""The errors that a user can act on. Anything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

# Names of environment variables that hold what nobody else may read.
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_HF_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def redacted(text: str) -> str:
    """A text without secrets: values of such environment variables become their names, hub tokens ``hf_…``."""
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and SECRET_NAME.search(name):
            text = text.replace(value, f"${name}")
    return _HF_TOKEN.sub("hf_…", text)


class SftlabError(Exception):
    """A failure with a message that names place, value and remedy, and no secret; the run ends with ``exit_code``."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


class ConfigError(SftlabError):
    """Bad input (configuration, data, files), found before a model was loaded."""

    exit_code = 2


class StageError(SftlabError):
    """A stage that was started and could not be finished."""


class OutOfMemoryError(StageError):
    """A stage needed more memory than there is."""


def advised(error: Exception, advice: Callable[[], str], otherwise: str) -> StageError:
    """An error with what to do about it: by ``advice``, or ``otherwise`` where that fails itself."""
    try:
        return StageError(f"{error}\n{advice()}")
    except Exception as failed:  # whatever it is, the error itself must not be lost for it
        reason = f"{type(failed).__name__}: {next(iter(str(failed).splitlines()), '')}"
        return StageError(f"{error}\n{otherwise}\n(how much memory each takes could not be estimated: {reason})")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as SLURM sends it some time before SIGKILL: the run ends as by Ctrl-C, with exit code 143.

    There is time for a training to save a checkpoint first.
    """
