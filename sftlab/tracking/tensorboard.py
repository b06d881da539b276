"""TensorBoard: event files in the folder ``tensorboard`` of a run, or of the job of a sweep."""

from __future__ import annotations

from collections.abc import Mapping

from sftlab.results import Scalar
from sftlab.tracking.base import End, Place, Result


class TensorBoard:
    """Event files. Every start adds a file to the folder, and TensorBoard joins them."""

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(place.folder / "tensorboard")

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Log the configuration as a text."""
        self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in values.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at an optimizer step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def result(self, result: Result) -> None:
        """Log the table and the summary as texts, and the figure."""
        for name, value in result.summary.items():
            self._writer.add_scalar(f"summary/{name}", value)
        if result.rows:
            lines = [result.header, ["---"] * len(result.header), *result.rows]
            self._writer.add_text("result", "\n".join(f"| {' | '.join(line)} |" for line in lines))
        if result.figure.is_file():
            from matplotlib.image import imread

            self._writer.add_image("bias_variance", imread(result.figure)[:, :, :3], dataformats="HWC")

    def close(self, end: End) -> None:
        """Write the rest of the events."""
        self._writer.close()
