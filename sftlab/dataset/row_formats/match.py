"""A format whose columns a source has, before its details are determined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftlab.dataset.row_formats.record import FormatName, Layout


@dataclass(frozen=True)
class Match:
    """The columns that a source has for each role of a format.

    Attributes:
        format: the format.
        roles: the columns that may have each role.
        layout: how the conversations are stored.
        option_columns: the columns of the options, if each has its own.
        wrong: whether these have the wrong options only.
    """

    format: FormatName
    roles: Mapping[str, Sequence[str]]
    layout: Layout | None = None
    option_columns: Sequence[str] = ()
    wrong: bool = False

    @property
    def columns(self) -> list[str]:
        """All columns of the format."""
        return list(
            dict.fromkeys([*(column for names in self.roles.values() for column in names), *self.option_columns])
        )
