"""Render the templates of a dataset: a row of its source → an example."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sftlab.config import RowSettings
from sftlab.dataset.row_formats.recognise import convert
from sftlab.dataset.row_formats.record import Converted, Recognised, with_system
from sftlab.dataset.rows import Row, TemplateRow, wrap
from sftlab.dataset.sandbox import compiled, count_written, text_of
from sftlab.dataset.template_errors import (
    KEEP,
    bare_column,
    lone_expression,
    not_text,
    null_safe_comparison,
    template_problems,
)
from sftlab.dataset.values import NULL, Conversation, NotTextError
from sftlab.dataset.wording import listing, short
from sftlab.errors import ConfigError, Problem
from sftlab.records import Example, single_turn

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.runtime import Context

TEMPLATES = ("id", "system", "user", "assistant", "target", "choices", "options", "context", "group_by", "stratify_by")
"""Keys of a dataset that are templates. ``keep`` is an expression."""

MISSING = {"", "nan", "none", "null", "nat", "<na>", "n/a"}
"""Texts that pandas and Python write for a missing value, in lower case."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def packages(cfg: RowSettings) -> list[str]:
    """Return the packages that render a dataset's templates: their versions are inputs of the dataset stage.

    A filter may be named anywhere in a template, for example as ``map('sql')``.
    """
    sources = " ".join(str(getattr(cfg, name)) for name in (*TEMPLATES, "keep"))
    used = {"sqlparse": r"\bsql\b", "regex": r"\bsearch\b"}
    return ["jinja2", *(package for package, word in used.items() if re.search(word, sources))]


class Templates:
    """The templates of a dataset, checked against the columns of its rows."""

    def __init__(
        self, cfg: RowSettings, key: str, columns: Sequence[str], recognised: Recognised | None = None
    ) -> None:
        """Compile all templates.

        Args:
            cfg: the dataset or source.
            key: its section in the configuration, as in "dataset" or "dataset.sources.a".
            columns: the columns of its rows.
            recognised: the format that supplies what no template supplies.

        Raises:
            ConfigError: a template has a syntax error or names a column that does not exist; lists all problems.
        """
        self.key = key
        self._keep = cfg.keep
        self._row_remedy = f"fix the row, or leave it out by {key}.keep"
        problems: list[Problem] = []
        self._sources = {name: source for name in TEMPLATES if (source := getattr(cfg, name)) is not None}
        if cfg.keep is not None:
            self._sources["keep"] = KEEP[0] + cfg.keep + KEEP[1]
        for name, source in self._sources.items():
            problems += template_problems(f"{key}.{name}", source, columns, whole="row")
            if name not in ("choices", "keep"):
                problems += bare_column(f"{key}.{name}", source, columns)
        if problems:
            raise ConfigError(*problems)
        # Reasoning before the answer is neither the target, nor does it decide whether a row is used.
        self._compiled = {
            name: compiled(source, answers=name in ("target", "keep")) for name, source in self._sources.items()
        }
        self._constant = {
            name: self._compiled[name].render() for name, source in self._sources.items() if "{" not in source
        }
        self._recognised = recognised
        lone = lone_expression(cfg.target or "")
        self._target = None if lone is None else compiled("{% set _target = (" + lone + ") %}", answers=True)

    def keeps(self, row: TemplateRow | Row, place: str) -> bool:
        """Return whether ``keep`` is true for a row. ``place`` names the row in messages."""
        row = row if isinstance(row, TemplateRow) else wrap(row)
        try:
            return self._text("keep", row) != ""
        except ConfigError as error:
            raise self._placed(row, place, error.problems) from error

    def example(self, row: TemplateRow | Row, default_id: str, place: str) -> Example:
        """Render a row.

        Raises:
            ConfigError: a problem for each fault: a template cannot be rendered; the prompt, completion or target is
                empty; the target is not one of the choices; no template reads some turns of a conversation.
        """
        row = row if isinstance(row, TemplateRow) else wrap(row)
        row.unread()
        problems: list[Problem] = []
        text: dict[str, str | None] = {}
        for name in ("system", "user", "assistant"):  # a turn has to be read by a template that the model sees
            text[name] = self._checked(name, row, problems)
        if self._recognised is None:
            problems += [self._dropped_turns(*conversation) for conversation in row.dropped()]
            supplied = Converted(
                single_turn(text["system"] or "", text["user"] or "", text["assistant"] or ""), None, []
            )
        else:
            try:
                supplied = with_system(convert(self._recognised, row.raw, self.key), text["system"])
            except ConfigError as error:
                raise self._placed(row, place, [*problems, *error.problems]) from error
        for name in ("id", "choices", "options", "context"):
            text[name] = self._checked(name, row, problems)
        choices = supplied.choices if text["choices"] is None else self._choices(text["choices"], problems)
        targets = self._targets(row, choices, problems) if "target" in self._sources else supplied.targets
        try:
            group, options = self._label("group_by", row), _options(text["options"], f"{self.key}.options")
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise self._placed(row, place, problems)
        return Example(
            id=text["id"] if text["id"] is not None else default_id,
            messages=supplied.messages,
            target=targets[0],
            choices=choices,
            group=group,
            options=supplied.options if text["options"] is None else options,
            targets=targets if len(targets) > 1 else None,
            tools=supplied.tools,
            context=text["context"],
        )

    def place(self, row: TemplateRow, place: str) -> str:
        """Return the place of a row, with its id if it has one."""
        try:
            name = self._text("id", row) if "id" in self._compiled else row.values.get("id")
        except ConfigError:
            name = None
        known = isinstance(name, str | int) and not isinstance(name, bool) and str(name).strip()
        return f"{place} ({short(str(name), 40)})" if known else place

    def _placed(self, row: TemplateRow, place: str, problems: Iterable[Problem]) -> ConfigError:
        """Return the error of a row whose problems name no place yet."""
        key = self.place(row, place)
        return ConfigError(*(replace(problem, key=key) for problem in problems))

    def _problem(self, name: str, message: str, remedy: str) -> Problem:
        """Return a problem of a template in a row."""
        key = f"{self.key}.{name}"
        return Problem("", None, f"{key} {message}", remedy, (key,))

    def _text(self, name: str, row: TemplateRow) -> str | None:
        """Render a template; None if the dataset does not set it."""
        if name in self._constant or name not in self._compiled:
            return self._constant.get(name)
        template = self._compiled[name]
        try:
            return "".join(template.root_render_func(_context(template, row)))
        except Exception as error:  # a template is the user's code, and may raise anything
            raise self._render_error(name, row, error) from error

    def _render_error(self, name: str, row: TemplateRow, error: Exception) -> ConfigError:
        source = self._sources[name]
        if isinstance(error, NotTextError):
            return ConfigError(self._problem(name, *not_text(name, source, row, error.value)))
        if isinstance(error, TypeError) and "'Null'" in str(error) and (hint := null_safe_comparison(name, source)):
            return ConfigError(self._problem(name, "compares a value that is null", f"write `{hint}`"))
        # Jinja names the types of values with their module.
        message = " ".join((str(error) or type(error).__name__).replace(f"{NotTextError.__module__}.", "").split())
        return ConfigError(self._problem(name, f"cannot be rendered: {message}", "fix the row or the template"))

    def _checked(self, name: str, row: TemplateRow, problems: list[Problem]) -> str | None:
        """Render a template; add a problem if it fails, is not Unicode, or is empty where text is required."""
        try:
            text = self._text(name, row)
        except ConfigError as error:
            problems += error.problems
            return None
        if text is None:
            return None
        problems += self._surrogates(name, text)
        if not text.strip() and name in ("user", "assistant"):
            problems.append(self._problem(name, "renders to nothing", self._row_remedy))
        elif not text.strip() and name == "id":
            problems.append(self._problem(name, "renders to nothing", f"fix the row, or set {self.key}.id=null"))
        return text

    def _surrogates(self, name: str, text: str) -> list[Problem]:
        if text.isascii() or not (half := _SURROGATE.search(text)):
            return []
        message = f"has half of a surrogate pair (\\u{ord(half[0]):04x}), which is not a character"
        return [self._problem(name, message, "write the file again as UTF-8")]

    def _choices(self, text: str | None, problems: list[Problem]) -> str:
        choices = "".join(sorted(set(text or "")))
        if choices and not choices.isalnum():
            words = any(len(word) > 1 for word in re.findall(r"\w+", text or ""))
            remedy = "write the letters with nothing between them"
            if words:
                remedy = f"for words set eval.task=exact {self.key}.choices=null"
            problems.append(self._problem("choices", f"renders to {short(text or '')!r}", remedy))
            return ""
        if len(choices) == 1:
            message = f"renders to a single letter, {choices!r}"
            problems.append(self._problem("choices", message, "an answer needs at least two choices"))
            return ""
        return choices

    def _targets(self, row: TemplateRow, choices: str, problems: list[Problem]) -> list[str]:
        """Return the correct answers: a single text, or the items of a list that is the template's only expression."""
        try:
            value = self._answers(row)
        except ConfigError as error:
            problems += error.problems
            return []
        targets: list[str] = []
        for number, target in enumerate(value if isinstance(value, list) else [value]):
            item = f"item {number} " if isinstance(value, list) else ""
            if not target.strip():
                problems.append(self._problem("target", f"{item}renders to nothing", self._row_remedy))
            elif choices and target.strip() not in set(choices):
                message = f"target {short(target.strip())!r} is not one of {', '.join(choices)}"
                remedy = f"fix the row, or set {self.key}.choices"
                if len(target.strip()) > 1:
                    remedy += f", or for words set eval.task=exact {self.key}.choices=null"
                problems.append(Problem("", None, message, remedy, (f"{self.key}.target", f"{self.key}.choices")))
            else:
                problems += self._surrogates("target", target)
                targets.append(target.strip() if choices else target)
        if not targets and isinstance(value, list) and not value:
            problems.append(self._problem("target", "is an empty list", self._row_remedy))
        return list(dict.fromkeys(targets))

    def _answers(self, row: TemplateRow) -> str | list[str]:
        if self._target is None:
            return self._text("target", row) or ""
        try:
            context = _context(self._target, row)
            list(self._target.root_render_func(context))
            value = context.vars["_target"]
            if isinstance(value, list | tuple | Iterator):
                return [str(text_of(item)) for item in value]
            return str(text_of(value))
        except Exception as error:
            raise self._render_error("target", row, error) from error

    def stratum(self, row: TemplateRow, place: str) -> str | None:
        """Return the stratum of a row; None if it has none.

        Raises:
            ConfigError: the template cannot be rendered.
        """
        try:
            return self._label("stratify_by", row)
        except ConfigError as error:
            raise self._placed(row, place, error.problems) from error

    def _label(self, name: str, row: TemplateRow) -> str | None:
        """Render ``group_by`` or ``stratify_by``; None if it writes a null, an undefined value, or literal text only.

        "case {{ number }}" of rows without a number is not a group that these rows share.
        """
        from jinja2 import UndefinedError

        if name not in self._sources:
            return None
        values = {name: NULL if _is_missing(value) else value for name, value in row.values.items()}
        written = count_written()
        try:
            text = self._text(name, TemplateRow(values, row.conversations, row.raw))
        except ConfigError as error:
            if isinstance(error.__cause__, UndefinedError):
                return None
            raise
        return (text or "").strip() or None if written.texts and not written.nulls else None

    def _dropped_turns(self, conversation: Conversation, read: list[int], unread: list[int]) -> Problem:
        path, turns = conversation.path, len(conversation.read)
        only = f"({self._keep}) and " if self._keep else ""
        if not read:
            name, keep = f"{turns} earlier turn{'' if turns == 1 else 's'}", f"{only}not {path} | default([])"
            parts = f"which no template reads: {'it' if turns == 1 else 'they'}"
        else:
            name, keep = f"{turns} turns", f"{only}{path} | length <= {turns - len(unread)}"
            parts = f"and the templates read {_numbers(read)}: {_numbers(unread)}"
        return Problem(
            "",
            None,
            f"{path} has {name}, {parts} would be dropped. Conversations with several turns are not supported",
            f"leave such rows out by \"{self.key}.keep='{keep}'\", or write all turns into {self.key}.user by a loop",
            (self.key,),
        )


def _context(template: Template, row: TemplateRow) -> Context:
    """Return the names that a template may use. They are built once for all templates of a row."""
    if row.names is None:
        row.names = {**template.environment.globals, "row": row.values, **row.values}
    return template.new_context(row.names, shared=True)


def _is_missing(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in MISSING


def _numbers(turns: Sequence[int]) -> str:
    return f"turn {turns[0]}" if len(turns) == 1 else f"turns {listing(turns)}"


def _options(text: str | None, key: str) -> dict[str, str] | None:
    """Parse letter → text of the options, without options that are null.

    ARC's form is accepted too: an object with the lists ``label`` and ``text``.
    """
    if not (text or "").strip():
        return None
    try:
        options = json.loads(text or "")
        if options is None:
            return None
        if isinstance(options, Mapping) and all(isinstance(options.get(name), list) for name in ("label", "text")):
            options = dict(zip(options["label"], options["text"], strict=True))
        return {str(letter): str(text_of(option)) for letter, option in options.items() if option is not None}
    except (ValueError, TypeError, AttributeError) as error:
        message = f"{key} is not a JSON object of letter → text: {error}"
        raise ConfigError(Problem("", None, message, "write {{ column | tojson }}", (key,))) from error
