"""The Jinja environment of dataset templates: sandboxed, strict, and without Python notation in its output."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cache, lru_cache, wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

import regex

from sftlab.dataset.values import NULL, Absent, Dict, List, NotTextError, Null, Texts, Turn, is_null, plain
from sftlab.dataset.wording import short
from sftlab.errors import ConfigError, Problem
from sftlab.model.reasoning import answered, names_mark

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment


SECONDS = 1.0  # time limit of a user's pattern on a single text


def matches_within_limit(find: Any, text: str, pattern: str) -> Iterator[Any]:
    """Yield the matches that ``find`` (the ``finditer`` of a compiled pattern) has in a text, within ``SECONDS``.

    Raises:
        ConfigError: the pattern takes longer.
    """
    try:
        yield from find(text, timeout=SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            Problem(
                "",
                None,
                f"pattern {pattern!r} takes more than {SECONDS:g} s on {text[:30]!r} … ({len(text):,} characters)",
                "remove nested repetitions, such as (a+)+ or (.*,)*",
            )
        ) from error


@lru_cache(maxsize=256)
def compiled(source: str, *, answers: bool = False) -> Template:
    """Compile a dataset template: once, although validation, the dataset stage and every source use it."""
    return environment(answers=answers).from_string(source)


@cache
def environment(*, answers: bool = False) -> ImmutableSandboxedEnvironment:
    """Return the Jinja environment of dataset templates: sandboxed, strict about undefined names and non-text values.

    Null is written as nothing. Any other value that is neither text nor a number is an error, unless a filter
    converts it to text. With ``answers``, for templates that extract an answer, the filter search skips reasoning.
    """
    from jinja2 import StrictUndefined, Undefined, filters, nodes, pass_context, tests
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset("%")

        def getitem(self, obj: Any, argument: Any) -> Any:
            if isinstance(argument, _FromEnd) and isinstance(obj, str | list | tuple):
                raise ValueError(
                    f"the index {int(argument)} of a row would count from the end; "
                    "leave the row out by keep, or write the index as a constant if this is intended"
                )
            return super().getitem(obj, argument)

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, str):
                named = isinstance(right, Mapping) and "%(" in left
                right = _arguments(right) if named or isinstance(right, tuple) else _formatted(right)
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None
            return lambda *args, **kwargs: wrapped(*map(_formatted, args), **_arguments(kwargs))

        def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
            for concat in source.find_all(nodes.Concat):
                concat.nodes = [
                    nodes.Filter(node, "_text", [], [], None, None, lineno=node.lineno) for node in concat.nodes
                ]
            for item in source.find_all(nodes.Getitem):
                varies = isinstance(item.arg, nodes.Name) or any(item.arg.find_all(nodes.Name))
                if varies and not isinstance(item.arg, nodes.Slice):
                    item.arg = nodes.Filter(item.arg, "_index", [], [], None, None, lineno=item.lineno)
            source.set_environment(self)
            return super()._generate(source, *args, **kwargs)

    jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    # Without a context, Jinja would call it while compiling.
    jinja.finalize = pass_context(lambda _, value: _written(value))
    jinja.filters["search"] = _search_answer if answers else _search
    jinja.filters["sql"] = formatted_sql
    for name in _OF_TEXT:
        jinja.filters[name] = _of_text(jinja.filters[name])
    string = jinja.filters["string"]
    jinja.filters["string"] = lambda value: getattr(value, "_sftlab_text", None) or string(value)
    jinja.filters["_text"] = text_of
    jinja.filters["_index"] = lambda value: _FromEnd(value) if type(value) is int and value < 0 else value
    jinja.filters["int"] = lambda value, default=_NONE, base=10: _number(value, default, filters.do_int, base)
    jinja.filters["float"] = lambda value, default=_NONE: _number(value, default, filters.do_float)
    # Jinja's own tojson escapes < and > for HTML; the model has to see the characters themselves.
    jinja.filters["tojson"] = _tojson
    jinja.filters["replace"] = _replace
    jinja.filters["format"] = lambda value, *args, **kwargs: _converted(value) % _arguments(kwargs or args)
    texts = filters.FILTERS["map"]

    @pass_context
    def join(context: Context, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = value if attribute is None else texts(context, value, attribute=attribute)
        return str(text_of(d)).join(str(text_of(item)) for item in items)

    @pass_context
    def mapped(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply Jinja's map. A turn of a conversation counts as read only if its text is read afterwards."""
        items = value if isinstance(value, Texts) else [*value]
        turns = [item if isinstance(item, Turn) else None for item in items] if "attribute" in kwargs else []
        if not any(turns):
            return texts(context, items, *args, **kwargs)
        read = [turn and turn._sftlab_conversation.read[turn._sftlab_number] for turn in turns]
        mapped_items = [*texts(context, items, *args, **kwargs)]
        marks = []
        for turn, before in zip(turns, read, strict=True):
            now = turn and turn._sftlab_conversation.read[turn._sftlab_number]
            marks.append((turn._sftlab_conversation, turn._sftlab_number) if turn and now else None)
            if turn:
                turn._sftlab_mark(read=bool(before))
        return Texts(mapped_items, getattr(value, "_sftlab_path", "a list"), marks)

    @pass_context
    def default(context: Context, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
        missing = isinstance(value, Undefined | Absent) or (boolean and not value)
        return default_value if missing else value

    jinja.filters |= {"join": join, "default": default, "d": default, "map": mapped}
    jinja.filters["list"] = lambda value: value if isinstance(value, Texts) else [*value]
    jinja.tests |= {
        "none": lambda value: value is None or isinstance(value, Null),
        "defined": lambda value: not isinstance(value, Undefined | Absent),
        "undefined": lambda value: isinstance(value, Undefined | Absent),
        **{name: _not_null(getattr(tests, f"test_{name}")) for name in ("string", "sequence", "iterable")},
    }
    return jinja


SIMPLE = (bool, float, Decimal, date, time, timedelta, UUID)
"""Types that the filter string converts to the expected text."""

# Filters that convert any input to text.
_OF_TEXT = (
    *("capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "safe", "search", "sql", "string"),
    *("striptags", "title", "trim", "truncate", "upper", "urlize", "wordcount", "wordwrap"),
)


class Counter:
    """Number of texts that the expressions of a template wrote, and of nulls that it wrote or converted."""

    def __init__(self) -> None:
        self.texts = self.nulls = 0


_counter = Counter()


def count_written() -> Counter:
    """Return a counter of what templates write from now until the next call."""
    global _counter
    _counter = Counter()
    return _counter


def _written(value: Any) -> Any:
    text = text_of(value)
    _counter.texts += not isinstance(text, str) or bool(text.strip())
    return text


def text_of(value: Any) -> Any:
    """Return a value that may be written into a text: text and numbers as they are, an empty text for null.

    Raises:
        NotTextError: the value is of another type.
    """
    if type(value) is str:
        return value
    from jinja2 import Undefined

    _counter.nulls += isinstance(value, Null)
    if isinstance(value, str | Undefined):  # Jinja itself raises when an undefined name is written
        return value
    if is_null(value):
        _counter.nulls += 1
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float) or value in (math.inf, -math.inf):
        raise NotTextError(value)
    return value


def _converted(value: Any) -> Any:
    """Convert the input of a text filter: types with an unambiguous notation, but no lists, objects or bytes."""
    if isinstance(value, SIMPLE) and not is_null(value):
        return str(value)
    return text_of(value)


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    at = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def converting(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:at], _converted(args[at]), *args[at + 1 :], **kwargs)

    return converting


def _not_null(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, Null) and test(value)


def _formatted(value: Any) -> Any:
    return value if isinstance(value, List | Dict) else text_of(value)  # {0[key]} reads an item of it


def _arguments(values: Any) -> Any:
    """Convert the arguments of a format, by position or by name."""
    if isinstance(values, tuple):
        return tuple(map(_formatted, values))
    return {name: _formatted(value) for name, value in values.items()}


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    return str(_converted(text)).replace(str(text_of(old)), str(text_of(new)), -1 if count is None else count)


class _FromEnd(int):
    """A negative index that a template computes."""


_NONE = object()


def _number(value: Any, default: Any, convert: Callable[..., Any], *options: Any) -> Any:
    """Convert a value to a number. Null and blank texts give null unless the template sets a default."""
    number = convert(value, _NONE if default is _NONE or is_null(value) else default, *options)
    if number is not _NONE:
        return number
    if default is not _NONE:
        return default
    if is_null(value) or (isinstance(value, str) and not value.strip()):
        _counter.nulls += 1
        return NULL
    raise ValueError(f"{short(repr(plain(value)))} is not a number; write a default, as in int(0), if one is intended")


def _tojson(value: Any, indent: int | None = None) -> str:
    _counter.nulls += is_null(value)
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _search(text: str, pattern: str) -> str:
    """Return the first group of the first match of a regular expression, or an empty string."""
    if not re.compile(pattern).groups:
        raise ValueError(f"search({pattern!r}) has no group in parentheses")
    match = next(matches_within_limit(regex.compile(pattern).finditer, text, pattern), None)
    return match.group(1) or "" if match else ""


def _search_answer(text: str, pattern: str) -> str:
    """Search like ``_search``, but skip reasoning unless the pattern names a reasoning mark."""
    return _search(text if names_mark(pattern) else answered(str(text)), pattern)


@lru_cache(maxsize=20_000)  # the SQL of a row is both its completion and its target
def formatted_sql(text: str) -> str:
    """Format a SQL statement by sqlparse."""
    import sqlparse

    return str(sqlparse.format(text, reindent=True, keyword_case="upper")).strip()
