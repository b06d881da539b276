"""Parse the lists and objects that are written as text in the cells of a table."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from sftlab.dataset.values import Cell
from sftlab.dataset.wording import short
from sftlab.errors import ConfigError, Problem


@dataclass
class NestedColumns:
    """Which columns of a table hold only lists and objects, after the cells that were added.

    Of each of these columns, ``arrays`` has the first cell with a NumPy array, whose items cannot be separated, or
    None.
    """

    width: int
    arrays: dict[int, str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = dict.fromkeys(range(self.width))

    def add(self, cells: Sequence[str]) -> None:
        """Add a row with a cell for each column."""
        for column in list(self.arrays):
            cell = cells[column].strip()
            if not cell:
                continue
            found = _nested(cell)
            if found is None:
                del self.arrays[column]
            elif self.arrays[column] is None and not found[1] and _is_array(cell):
                self.arrays[column] = cells[column]

    def checked(self, file: Path, header: Sequence[str]) -> frozenset[int]:
        """Return the columns.

        Raises:
            ConfigError: a column holds NumPy arrays.
        """
        for column, cell in self.arrays.items():
            if cell is not None:
                raise ConfigError(
                    Problem(
                        str(file),
                        None,
                        f"column {header[column]!r} has NumPy arrays as text: {short(cell, 40)}",
                        f"write lists: table[{header[column]!r}].map(list), or the table as JSON lines or Parquet",
                    )
                )
        return frozenset(self.arrays)


def value_of(cell: str) -> object:
    """Return the list or object in a cell of such a column. One that is JSON keeps its text.

    JSON is read, and Python's notation, which pandas writes.
    """
    found = _nested(cell.strip()) if cell.strip() else None
    if found is None:
        return cell
    value, is_json = found
    return Cell(cell, value) if is_json else value


def _is_array(cell: str) -> bool:
    """Return whether a text that Python reads as a list has strings without a comma between them, as NumPy writes."""
    with suppress(tokenize.TokenError, SyntaxError):
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline)]
        kinds = [kind for kind in tokens if kind != tokenize.NL]
        return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)
    return False


def _nested(cell: str) -> tuple[list[Any] | dict[str, object], bool] | None:
    """Parse the list or object in a cell; return it, and whether it is JSON. None if the cell is neither."""
    if (cell[0], cell[-1]) not in {("[", "]"), ("{", "}")}:
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError), catch_warnings():
            simplefilter("ignore")  # warnings about backslashes
            value = parse(cell)
            if isinstance(value, list) or (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
                return value, parse is json.loads
    return None
