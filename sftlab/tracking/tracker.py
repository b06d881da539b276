"""Experiment tracking: where a job logs its curves and results besides its own folder, by ``tracking.backend``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from sftlab.config import Config, TrackingConfig
from sftlab.errors import Problem
from sftlab.runtime.job import Job
from sftlab.runtime.store import key_of
from sftlab.tracking import wandb
from sftlab.tracking.base import Place, Result, Tracker, first_line, named

log = logging.getLogger(__name__)

VARIABLE = "SFTLAB_TRACKER"  # passes a Place to the training process


def of_job(cfg: Config, job: Job, folder: Path) -> dict[str, str]:
    """Environment variables for the training process of a job; empty without tracking.

    The job's folder identifies its tracking run.
    """
    tracking, name = cfg.tracking, f"{cfg.name}-{job.number}"
    run_id = key_of({"folder": str(folder.resolve()), "job": job.number})
    if tracking.backend == "wandb":
        return wandb.environment(tracking, folder, name, run_id)
    if tracking.backend == "none":
        return {}
    place = Place(tracking.backend, folder, Path(cfg.runs.outputs), tracking.project, name, run_id)
    return {VARIABLE: json.dumps(asdict(place), default=lambda path: str(path.resolve()))}


def backend(variables: Mapping[str, str]) -> str | None:
    """The backend that environment variables of ``of_job`` name; None without tracking."""
    if VARIABLE in variables:
        return str(json.loads(variables[VARIABLE])["backend"])
    return "wandb" if "WANDB_PROJECT" in variables else None


def announce(cfg: Config, folder: Path) -> None:
    """Log how to look at the curves."""
    match cfg.tracking.backend:
        case "wandb":
            wandb.announce(cfg.tracking, folder)
        case "trackio":
            log.info("trackio: `trackio show --project %s` shows the curves", cfg.tracking.project)
        case "tensorboard":
            log.info("tensorboard: `tensorboard --logdir %s` shows the curves", cfg.runs.outputs)
        case "mlflow":
            from sftlab.tracking.mlflow import SERVER, address

            if os.environ.get(SERVER):  # its value may contain a password
                log.info("mlflow: the server of %s shows the curves", SERVER)
            else:
                uri = address(Path(cfg.runs.outputs).resolve())
                log.info("mlflow: `uvx mlflow ui --backend-store-uri %s` shows the curves", uri)


def missing(cfg: TrackingConfig) -> Problem | None:
    """The problem of a backend whose package is not installed."""
    name = cfg.backend
    if name in ("wandb", "none") or find_spec(name) is not None:
        return None
    remedy = f"pip install 'sftlab[{name}]', or set tracking=wandb or tracking=none"
    return Problem("tracking", name, f"requires the package {name}", remedy)


def start(variables: Mapping[str, str] = os.environ) -> Tracker:
    """Start or continue the tracking run of ``of_job`` in a backend other than wandb."""
    values = json.loads(variables[VARIABLE])
    place = Place(**{**values, "folder": Path(values["folder"]), "outputs": Path(values["outputs"])})
    match place.backend:
        case "trackio":
            from sftlab.tracking.trackio import Trackio

            return Trackio(place)
        case "tensorboard":
            from sftlab.tracking.tensorboard import TensorBoard

            return TensorBoard(place)
        case _:
            from sftlab.tracking.mlflow import MLflow

            return MLflow(place)


def log_result(variables: Mapping[str, str], result: Result) -> None:
    """Add the results to the tracking run that training started. A failure is logged."""
    name = backend(variables)
    if name is None:
        return
    if name == "wandb":
        wandb.log_result(variables, result)
        return
    try:
        tracker = start(variables)
        for row in result.history:
            tracker.log(int(row["step"] or 0), named(row))
        tracker.result(result)
        tracker.close("finished")
    except Exception as error:  # no failure of a tracker may end a run whose results are written
        log.warning("%s: the results could not be logged (%s)", name, first_line(error))
