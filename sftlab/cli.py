"""The command line: Hydra composes a config and runs its jobs, signals and errors become exit codes.

Exit codes: 0 success, 1 failure, 2 bad input, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM). With eval.gate=true 3
means to keep the base model, and 4 that nothing is decided.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from functools import partial
from types import FrameType
from typing import NoReturn

import hydra
from hydra._internal import hydra as hydra_engine
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sftlab.errors import ConfigError, Problem, SftlabError, StageError, Terminated, discreet, redacted
from sftlab.hydra_app.callback import StudyCallbacks
from sftlab.hydra_app.compose import COMPOSITION_ERRORS, CONF, ComposeOnce
from sftlab.hydra_app.study import Study
from sftlab.hydra_app.task import run_task, set_environment

log = logging.getLogger(__name__)

RESUME = "; completed stages are reused, run the same command again to resume"


def main() -> None:
    """Run a command: the entry of ``python -m sftlab`` and of ``sftlab``."""
    from sftlab.hydra_app.arguments import options_first
    from sftlab.hydra_app.finish import finish
    from sftlab.hydra_app.wording import explain

    tracebacks = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its exceptions instead of printing them
    study = Study()
    hydra_engine.Callbacks = partial(StudyCallbacks, study)  # type: ignore[attr-defined, assignment]
    hydra_engine.ConfigLoaderImpl = ComposeOnce  # type: ignore[attr-defined]
    set_environment()
    signal.signal(signal.SIGTERM, _on_sigterm)
    logging.raiseExceptions = False  # no traceback per line if a log file cannot be written
    try:
        for argument in sys.argv[1:]:
            if redacted(argument) != argument:
                raise ConfigError(
                    Problem(
                        redacted(argument),
                        None,
                        "holds a secret, and the command line is written to files",
                        "log in, or set HF_TOKEN or WANDB_API_KEY in the environment, and leave it out here",
                    )
                )
        sys.argv[1:] = options_first(sys.argv[1:])
        _run_jobs(study)
        code = _check_only_printed(sys.argv[1:]) if study.folder is None else finish(study)
    except HydraException as error:
        study.fail(str(error))
        _exit_with(explain(error, sys.argv[1:]), tracebacks=tracebacks)
    except SftlabError as error:
        study.fail(str(error))
        _exit_with(error, tracebacks=tracebacks)
    except Terminated:
        study.fail("terminated by SIGTERM")
        print(f"sftlab: terminated{_resume(study)}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        study.fail("interrupted")
        print(f"sftlab: interrupted{_resume(study)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        if not study.has_started and isinstance(error, COMPOSITION_ERRORS):
            # Hydra raises these about an override such as model=null or train=[1].
            _exit_with(explain(error, sys.argv[1:]), tracebacks=tracebacks)
        if study.folder is None and isinstance(error, OmegaConfBaseException):
            # A key of Hydra's, such as hydra.run.dir. Validation reports the keys of sftlab.
            problem = Problem(str(error.full_key), None, str(error).splitlines()[0], "set it to a value")
            _exit_with(ConfigError(problem), tracebacks=tracebacks)
        file_reason = _file_reason(error, study)
        study.fail(file_reason or f"{type(error).__name__}: {error}")
        if file_reason:
            _exit_with(StageError(file_reason), tracebacks=tracebacks)
        raise  # a bug keeps its traceback
    sys.exit(code)


def _resume(study: Study) -> str:
    """How to continue after a signal; "" for a mode that computes no stages."""
    return RESUME if study.mode is None or study.mode.has_record else ""


def _run_jobs(study: Study) -> None:
    """Let Hydra compose and run the jobs.

    Jobs record their errors. If a launcher fails (a worker was killed, or a cluster is unreachable), the jobs that have
    ended are still evaluated.

    Raises:
        StageError: the launcher could not start any job.
    """
    task = partial(run_task, study)
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except (HydraException, SftlabError):
        raise
    except Exception as error:
        from sftlab.runtime.job import jobs

        if not study.is_sweep or (study.run is None and study.scratch is None):  # no job has started
            raise
        assert study.folder is not None
        reason = _file_reason(error, study) or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        reason = f"{study.starter}: {reason}"
        if not jobs(study.folder):
            raise StageError(reason) from error
        log.error("%s", reason)
        study.launch_error = reason


def _check_only_printed(arguments: list[str]) -> int:
    """The exit code of a command that started no run: 0 if it asked to print something.

    Raises:
        StageError: it asked for a run.
    """
    from hydra._internal.utils import get_args_parser

    options = get_args_parser().parse_args(arguments)
    if options.help or options.hydra_help or options.cfg or options.info or options.shell_completion:
        return 0
    raise StageError("Hydra started no run; leave out --experimental-rerun, and run the original command")


def _file_reason(error: BaseException, study: Study) -> str | None:
    """The message for an error of files or folders, also one that a library wraps; None for any other error."""
    from sftlab.runtime.store import full

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    path = getattr(cause, "filename", None) or study.folder or "a file"
    if reason := full(error):
        return f"cannot write {path}: {reason}; free some space and run the same command again"
    if cause is None or cause.errno is None:
        return None
    return f"cannot read or write {path}: {cause.strerror}; check its permissions, or set another folder"


def _exit_with(error: SftlabError, *, tracebacks: bool) -> NoReturn:
    if tracebacks and sys.exc_info()[0]:
        print(discreet(traceback.format_exc()), file=sys.stderr)
    print(f"sftlab: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt saving
    raise Terminated
