"""The state of one command: what Hydra was asked to run, the run's folder and its record."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sftlab.errors import redacted
from sftlab.hydra_app.compose import set_for_jobs

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from sftlab.config import Config
    from sftlab.runtime.modes import Mode
    from sftlab.runtime.run import Run

RUN_ID = "SFTLAB_RUN"  # environment variable of a job with the id of its run


@dataclass
class Study:
    """What the callback, the jobs in this process and ``main`` share.

    Hydra passes only configs between them, so ``main`` creates the study and binds it to the callback and to the task
    function. Launchers pickle both for their workers, where an empty study arrives: a worker depends on nothing but
    its config.
    """

    has_started: bool = False
    """Whether Hydra started a run or sweep, as opposed to printing a config or failing to compose one."""
    mode: Mode | None = None
    folder: Path | None = None
    """The run's folder; None until the config is valid."""
    is_sweep: bool = False
    job_count: int | None = None
    """Jobs of a sweep; None if the sweeper decides while it runs."""
    config: Config | None = None
    """The validated config of a single run."""
    run: Run | None = None
    """The record; None for a dry run and for modes that write none."""
    lock: BaseFileLock | None = None
    """Held on the run's folder until the command ends."""
    scratch: TemporaryDirectory[str] | None = None
    """The folder of a sweep's dry run."""
    starter: str = ""
    """What starts a sweep's jobs, as an override: hydra/launcher=joblib."""
    launch_error: str | None = None
    """Why the launcher or sweeper stopped before the end."""

    def __reduce__(self) -> tuple[type[Study], tuple[()]]:
        return Study, ()

    def start(self, composed: DictConfig, mode: str, seed: int) -> None:
        """Lock the run's folder and write ``run.json``."""
        from sftlab.runtime.run import Run, hold

        assert self.folder is not None
        self.lock = hold(self.folder)
        command = shlex.join(["python", "-m", "sftlab", *sys.argv[1:]])
        self.run = Run.start(self.folder, name=str(composed.name), mode=mode, seed=seed, command=command)
        set_for_jobs(composed, f"hydra.job.env_set.{RUN_ID}", self.run.record.id)

    def fail(self, reason: str) -> None:
        """Record that the run failed, unless the record has a reason already."""
        if self.run is not None and self.run.record.status != "failed":
            with suppress(OSError):  # a failing write must not hide the reason
                self.run.finish("failed", redacted(reason))
