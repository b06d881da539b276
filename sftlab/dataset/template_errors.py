"""Explain what is wrong with a template, or with a value that it writes, and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from sftlab.dataset.rows import TemplateRow
from sftlab.dataset.sandbox import SIMPLE, compiled, environment
from sftlab.dataset.values import Dict, List, is_null, plain
from sftlab.dataset.wording import column_path, item_path, listing, short
from sftlab.errors import Problem, shown

KEEP = ("{{ 1 if (", ") else '' }}")
"""The template around the expression ``keep``: it renders to nothing where the expression is false."""


def template_problems(
    key: str, source: str, columns: Sequence[str], whole: str = "", noun: str = "column"
) -> list[Problem]:
    """Return what is wrong with a template over these columns; an empty list if it can be rendered.

    Args:
        key: dotted key of the template in the configuration.
        source: the template.
        columns: names of the columns that a template may read.
        whole: name of the object that holds all columns, if there is one.
        noun: what messages call a column.
    """
    from jinja2 import TemplateSyntaxError, meta

    named = [column for column in columns if len(column) > 1 and not column.isidentifier() and column in source]
    odd = f"write {item_path('row', max(named, key=len))} for the column of that name" if named else ""
    try:
        tree = environment().parse(source)
        compiled(source)  # compiling detects unknown filters
    except TemplateSyntaxError as error:
        if key.endswith(".keep") and "{{" in source.removeprefix(KEEP[0]):
            return [Problem(key, None, "is an expression, not a template", "write it without {{ and }}")]
        hint = "besides Jinja's own filters there are search and sql" if "filter" in str(error.message) else ""
        message = f"is not a Jinja template: {error.message} (line {error.lineno})"
        return [Problem(key, None, message, hint or odd or "fix the template")]
    unknown = sorted(meta.find_undeclared_variables(tree) - {*columns, whole})
    there = f"{'the rows have' if noun == 'column' else 'there is only'} {listing(columns)}"
    remedy = f"{there}; {odd}" if odd else there
    return [Problem(key, None, f"there is no {noun} {name!r}", remedy) for name in unknown]


def bare_column(key: str, source: str, columns: Sequence[str]) -> list[Problem]:
    """Return a problem if a template is only the name of a column, which would be rendered as that name."""
    column = source.strip()
    if len(column) < 2 or column not in columns:
        return []
    remedy = f"write {{{{ {column_path(column)} }}}} for its values"
    return [Problem(key, shown(source), "is a fixed text, the name of a column", remedy)]


def lone_expression(source: str) -> str | None:
    """Return the expression of a template that consists of a single expression; None for any other template."""
    from jinja2 import nodes

    body = environment().parse(source.strip()).body
    if len(body) != 1 or not isinstance(body[0], nodes.Output) or len(body[0].nodes) != 1:
        return None
    match = re.fullmatch(r"\{\{[-+]?(.*?)-?\}\}", source.strip(), re.DOTALL)
    return None if match is None or isinstance(body[0].nodes[0], nodes.TemplateData) else match[1]


def null_safe_comparison(name: str, source: str) -> str:
    """Rewrite a comparison of sizes so that it accepts null: the first one in a template, or all of ``keep``.

    Returns "" if the template compares no column by size.
    """
    from jinja2 import nodes

    for compare in environment().parse(source).find_all(nodes.Compare):
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        columns = [chain for side in sides if (chain := _chain(_unfiltered(side)))]
        if columns and any(operand.op in ("gt", "gteq", "lt", "lteq") for operand in compare.ops):
            tested = " and ".join(f"{column} is not none" for column in columns)
            if name != "keep":
                return f"{tested} and …"
            keep = source.removeprefix(KEEP[0]).removesuffix(KEEP[1])
            whole = environment().parse("{{ " + keep + " }}").body[0]
            alone = isinstance(whole, nodes.Output) and isinstance(whole.nodes[0], nodes.Compare | nodes.And)
            return f"{tested} and {keep if alone else f'({keep})'}"
    return ""


def not_text(name: str, source: str, row: TemplateRow, value: Any) -> tuple[str, str]:
    """Describe a value that a template writes although it is not text: its path and its type, and the remedy."""
    path = _path_of(source, row, value)
    column = f"column {path}" if path else "an expression"
    kind = {"List": "list", "Dict": "dict", "Turn": "dict", "Texts": "list"}.get(
        type(value).__name__, type(value).__name__
    )
    article = "an" if kind[0] in "aeiou" else "a"
    message = f"writes {column}, which is {article} {kind} and not text: {short(repr(plain(value)))}"
    return message, _remedy(name, path, value)


def _remedy(name: str, path: str, value: Any) -> str:
    """Return how to convert a value to text. Text that other rows have in the same place must stay unchanged."""
    column = path.split(" or ")[0] or "x"
    if isinstance(value, bool):
        return f"write {{{{ 'yes' if {column} else 'no' }}}}"
    if isinstance(value, bytes):
        return f"write {{{{ {column}.decode('utf-8') }}}}"
    if isinstance(value, Iterator):
        return "write {{ … | join(', ') }}"
    if isinstance(value, SIMPLE):
        return f"write {{{{ {column} | string }}}}"
    if not isinstance(value, list | tuple | dict):
        return "write a text or a number"
    text, exact = f"{column} | tojson", getattr(value, "_sftlab_text", None) is not None
    if name == "choices" and isinstance(value, list | tuple | dict):
        return f"write {{{{ {column} | join }}}}"
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        # SQuAD stores several correct answers like this.
        text = item_path(column, "text") if name == "target" else f"{item_path(column, 'text')}[0]"
    if value and not isinstance(value, dict):
        if all(isinstance(item, dict) and not is_null(item.get("text")) for item in value):
            text = f"{column} | map(attribute='text') | join"
        elif all(isinstance(item, str | int | None) and not isinstance(item, bool) for item in value):
            text = f"{column} | join(', ')"
    remedy = f"{{{{ {column} if {column} is string else {text} }}}}"
    if not exact:
        return f"write {remedy}"
    # Another filter may change the white space and the numbers of the cell.
    whole = f"{{{{ {column} | string }}}} for the text of the cell"
    texts = all(isinstance(item, str | dict) for item in value) and "join" in text
    return f"write {remedy}, or {whole}" if texts else f"write {whole}, or {remedy}"


def _path_of(source: str, row: TemplateRow, value: Any) -> str:
    """Return the path of a value that a template writes, or the paths of the columns that hold it."""
    from jinja2 import meta, nodes

    if isinstance(value, List | Dict):
        return value._sftlab_path
    tree = environment().parse(source)
    for output in tree.find_all(nodes.Output):
        for chain in filter(None, map(_chain, output.nodes)):
            with suppress(Exception):
                if environment().compile_expression(chain)(row.values) is value:
                    return chain
    read = meta.find_undeclared_variables(tree) & row.values.keys()
    paths = [path for name in sorted(read) for path in _paths_within(row.values[name], name, value)]
    return " or ".join(paths[:3])


def _chain(node: Any) -> str | None:
    """Return an expression such as ``messages[2].content`` as it is written; None for any other expression."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr) and (left := _chain(node.node)):
        return f"{left}.{node.attr}"
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and (left := _chain(node.node)):
        return item_path(left, node.arg.value)
    return None


def _unfiltered(node: Any) -> Any:
    from jinja2 import nodes

    return _unfiltered(node.node) if isinstance(node, nodes.Filter) else node


def _paths_within(container: object, path: str, value: object) -> Iterator[str]:
    """Yield the paths at which a value occurs in a column."""
    if container is value:
        yield path
    elif isinstance(container, dict):
        for key, item in container.items():
            yield from _paths_within(item, item_path(path, key), value)
    elif isinstance(container, list):
        for number, item in enumerate(container):
            yield from _paths_within(item, f"{path}[{number}]", value)
