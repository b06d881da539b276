"""Trackio: a database on this machine, in TRACKIO_DIR or the cache of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from sftlab.results import Scalar
from sftlab.tracking.base import End, Place, Result


class Trackio:
    """A run in Trackio. It is on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

    def __init__(self, place: Place) -> None:
        import trackio
        import trackio.run

        self._trackio: Any = trackio
        trackio.run._get_default_namespace = lambda: None  # it asks the hub for the user's name
        # Names are unique in a project, and the one of the job is not.
        name = f"{place.name}-{place.id[:6]}"
        with redirect_stdout(StringIO()):  # it prints how to open its dashboard
            self._run = trackio.init(
                project=place.project, name=name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        self._last = 0

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Log the configuration."""
        self._run.config.update(dict(values))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at an optimizer step."""
        self._run.log(dict(values), step=step)
        self._last = max(self._last, step)

    def result(self, result: Result) -> None:
        """Log table, figure and summary."""
        from pandas import DataFrame

        values: dict[str, object] = {f"summary/{name}": value for name, value in result.summary.items()}
        if result.rows:
            values["result"] = self._trackio.Table(dataframe=DataFrame(result.rows, columns=list(result.header)))
        if result.figure.is_file():
            values["bias_variance"] = self._trackio.Image(str(result.figure))
        self._run.log(values)

    def close(self, end: End) -> None:
        """Write what is not written yet."""
        with redirect_stdout(StringIO()):
            self._run.finish()
