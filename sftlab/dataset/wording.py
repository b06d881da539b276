"""Names, texts and paths of values as error messages write them."""

from __future__ import annotations

from collections.abc import Iterable


def listing(names: Iterable[object], most: int = 10) -> str:
    """Join the first ``most`` names by commas, and append the number of the others."""
    shown = [short(str(name), 40) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most:,} more" if len(shown) > most else "")


def short(text: str, most: int = 60) -> str:
    """Return a text as a single line of at most ``most`` characters; ``…`` marks what was left out."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else line[:most] + "…"


def item_path(container: str, key: object) -> str:
    """Return the path of an item in a list or an object, in Jinja's notation."""
    if isinstance(key, str) and key.isidentifier():
        return f"{container}.{key}"
    return f"{container}[{key!r}]"


def column_path(column: str) -> str:
    """Return the expression by which a template reads a column."""
    return column if column.isidentifier() else item_path("row", column)
