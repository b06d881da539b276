"""MLflow: the server of MLFLOW_TRACKING_URI, or else a database beside the runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sftlab.results import Scalar
from sftlab.tracking.base import End, Place, Result

SERVER = "MLFLOW_TRACKING_URI"
TAG = "sftlab.run"  # MLflow gives its runs ids of its own


def address(outputs: Path) -> str:
    """The URI of the server, or of the database in the folder of all runs."""
    return os.environ.get(SERVER) or f"sqlite:///{outputs}/mlflow.db"


class MLflow:
    """A run in MLflow. The experiment is the project."""

    def __init__(self, place: Place) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=address(place.outputs))
        experiment = self._client.get_experiment_by_name(place.project)
        if experiment is None:
            is_local = not os.environ.get(SERVER)
            artifacts = (place.outputs / "mlartifacts").as_uri() if is_local else None
            try:
                number = self._client.create_experiment(place.project, artifact_location=artifacts)
            except MlflowException:  # another job has just made it
                number = self._client.get_experiment_by_name(place.project).experiment_id
        else:
            number = experiment.experiment_id
        found = self._client.search_runs([number], f"tags.`{TAG}` = '{place.id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            run = self._client.create_run(number, run_name=place.name, tags={TAG: place.id})
            self._run = run.info.run_id

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Log the configuration. A value that was logged before stays: MLflow does not change it."""
        known = self._client.get_run(self._run).data.params
        for name, value in values.items():
            if name not in known:
                self._client.log_param(self._run, name, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at an optimizer step."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def result(self, result: Result) -> None:
        """Log table, figure and summary."""
        self.log(0, result.summary)
        if result.rows:
            columns = {name: [row[place] for row in result.rows] for place, name in enumerate(result.header)}
            self._client.log_table(self._run, columns, "result.json")
        if result.figure.is_file():
            self._client.log_artifact(self._run, str(result.figure))

    def close(self, end: End) -> None:
        """Set the status of the run: FINISHED, KILLED or FAILED."""
        self._client.set_terminated(self._run, end.upper())
