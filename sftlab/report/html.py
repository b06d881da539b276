"""Templates, style and text of pages that open offline and load nothing from outside."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sftlab.report import text

if TYPE_CHECKING:
    from jinja2 import Template

FILTERS = (
    text.percent,
    text.points,
    text.span,
    text.decimals,
    text.count,
    text.probability,
    text.stated_p,
    text.level,
    text.seconds,
    text.date,
    text.plural,
    text.sha256,
    text.sentence,
    text.titled,
    text.early_stop,
)


@cache
def template(name: str) -> Template:
    """Load a template of this folder, with the filters that write numbers; everything is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {function.__name__: function for function in FILTERS}
    return environment.from_string(_read(name))


@cache
def source(*names: str) -> str:
    """Join style sheets or scripts of this folder."""
    return "".join(map(_read, names))


def encodable(page: str) -> str:
    """Return a page without the lone surrogates that broken input can leave in it, which UTF-8 cannot encode."""
    return page.lstrip().encode("utf-8", "replace").decode("utf-8")


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")
