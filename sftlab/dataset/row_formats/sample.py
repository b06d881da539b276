"""The columns and first rows of a source, by which its format is recognised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sftlab.dataset.row_formats.cells import opened
from sftlab.dataset.row_formats.record import Settings
from sftlab.dataset.rows import Row
from sftlab.dataset.values import is_null
from sftlab.errors import ConfigError, Problem, shown

MOST = 0.5
"""Share of the sampled values that has to have a form. The others are problems of their rows."""


REQUIRED = {"messages", "instruction", "output", "prompt", "completion", "question", "options", "answer"}
"""Roles without which a format cannot be used."""


@dataclass(frozen=True)
class Sample:
    """Columns, first rows, and what the configuration says about the format."""

    columns: Sequence[str]
    rows: Sequence[Row]
    settings: Settings

    def named(self, role: str, names: Iterable[str]) -> tuple[str, ...]:
        """Return the columns that have a name of a role, in the order of ``names``, without those that are empty.

        The configuration may name the column of the role, or null for none.
        """
        columns = self.settings.columns or {}
        if role in columns:
            column = columns[role]
            return () if column is None else (column,)
        by_name: dict[str, list[str]] = {}
        for column in self.columns:
            by_name.setdefault(simple(column), []).append(column)
        found = [column for name in names for column in by_name.get(simple(name), ())]
        filled = [column for column in found if self.values(column)]
        return tuple(filled or found[:1])

    def values(self, column: str) -> list[object]:
        """Return the sampled values of a column, without those that are null or empty."""
        values = (row.get(column) for row in self.rows)
        return [value for value in values if not is_null(value) and not (isinstance(value, str) and not value.strip())]

    def opened(self, column: str) -> list[object]:
        """Return the sampled values of a column in plain JSON types."""
        return [opened(value) for value in self.values(column)]

    def has_text(self, column: str) -> bool:
        """Return whether most values of a column are text or numbers."""
        values = self.values(column)
        return sum(isinstance(value, str | int | float) for value in values) > MOST * len(values)

    def decide(self, role: str, columns: Sequence[str]) -> str | None:
        """Return the column of a role.

        Raises:
            ConfigError: several columns could have the role, and their values differ.
        """
        if not columns:
            return None
        first, *others = columns
        for other in others:
            if any(opened(row.get(first)) != opened(row.get(other)) for row in self.rows):
                key = f"{self.settings.section}.columns.{role}"
                none = "" if role in REQUIRED else ", or null for none of them"
                raise ConfigError(
                    Problem(
                        key,
                        None,
                        f"the columns {', '.join(columns)} could each be the {role}, and their values differ",
                        f"set {' or '.join(f'{key}={column}' for column in columns)}{none}",
                    )
                )
        return first

    def decided(self, roles: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Return the column of each role that has one.

        Raises:
            ConfigError: as ``decide``, with a problem for each role.
        """
        columns: dict[str, str] = {}
        problems: list[Problem] = []
        for role, names in roles.items():
            try:
                column = self.decide(role, names)
            except ConfigError as error:
                problems += error.problems
                continue
            if column is not None:
                columns[role] = column
        if problems:
            raise ConfigError(*problems)
        return columns

    def problem(self, message: str, remedy: str) -> ConfigError:
        """Return an error about the format of the source."""
        return ConfigError(
            Problem(f"{self.settings.section}.format", shown(self.settings.format).strip("'"), message, remedy)
        )


def simple(name: str) -> str:
    """Return the lower-case letters and digits of a name: ``Correct Answer`` → ``correctanswer``."""
    return re.sub(r"[\W_]+", "", str(name).lower())
