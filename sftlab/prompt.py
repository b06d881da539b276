"""A row → an example → messages → tokens: one way, used for training and for evaluation alike."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import regex

from sftlab.config import DatasetConfig
from sftlab.errors import ConfigError
from sftlab.extract import limited
from sftlab.records import Example

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers import PreTrainedTokenizerBase

_SURROGATE = re.compile("[\ud800-\udfff]")
TEMPLATES = ("id", "system", "user", "assistant", "target", "choices", "options", "group_by")


class Templates:
    """The templates of a dataset, checked against the columns that its rows have."""

    def __init__(self, cfg: DatasetConfig, key: str, columns: Sequence[str]) -> None:
        """Compile every template.

        Raises:
            ConfigError: a template that Jinja cannot read, or that names a column which does not exist.
        """
        self.key = key
        problems: list[str] = []
        sources = {name: source for name in TEMPLATES if (source := getattr(cfg, name)) is not None}
        if cfg.keep is not None:
            sources["keep"] = "{{ true if (" + cfg.keep + ") else '' }}"
        for name, source in sources.items():
            problems += check(f"{key}.{name}", source, columns)
        if problems:
            raise ConfigError("\n".join(problems))
        self._compiled = {name: environment().from_string(source) for name, source in sources.items()}

    def render(self, name: str, row: Mapping[str, Any], place: str) -> str | None:
        """The text that a template makes of a row, or None where the dataset has no such template."""
        if name not in self._compiled:
            return None
        try:
            return self._compiled[name].render(row)
        except Exception as error:  # a template is the user's code, and may raise anything
            message = str(error) or type(error).__name__
            raise ConfigError(
                f"{place}: {self.key}.{name} cannot be rendered: {message}; mend the row or the template"
            ) from error

    def keeps(self, row: Mapping[str, Any], place: str) -> bool:
        """Whether ``keep`` lets a row in."""
        return self.render("keep", row, place) != ""

    def example(self, row: Mapping[str, Any], default_id: str, place: str) -> Example:
        """The example that a row becomes.

        Raises:
            ConfigError: an empty prompt, completion or target, or a target that is none of the choices.
        """
        text = {name: self.render(name, row, place) for name in TEMPLATES}
        for name, made in text.items():
            if made is not None and not made.isascii() and (half := _SURROGATE.search(made)):
                raise ConfigError(
                    f"{place}: {self.key}.{name} holds half of a surrogate pair (\\u{ord(half[0]):04x}), which is no "
                    "character; write the file again as UTF-8"
                )
        user, assistant, target = (text[name] or "" for name in ("user", "assistant", "target"))
        for name in ("user", "assistant", "target"):
            if not (text[name] or "").strip():
                raise ConfigError(
                    f"{place}: {self.key}.{name} renders to nothing; mend the row, or leave it out by {self.key}.keep"
                )
        choices = "".join(sorted(set(text["choices"] or "")))
        if choices and not choices.isalnum():
            raise ConfigError(
                f"{place}: {self.key}.choices gives {text['choices']!r}; write the letters with nothing between them"
            )
        if choices and target.strip() not in set(choices):
            raise ConfigError(
                f"{place}: target {target.strip()!r} is not one of {', '.join(choices)}; "
                f"mend the row, or set {self.key}.choices"
            )
        if choices and len(choices) < 2:
            raise ConfigError(
                f"{place}: {self.key}.choices gives one letter, {choices!r}; an answer needs at least two"
            )
        return Example(
            id=text["id"] if text["id"] is not None else default_id,
            system=text["system"] or "",
            user=user,
            assistant=assistant,
            target=target.strip() if choices else target,
            choices=choices,
            group=text["group_by"] or None,
            options=_options(text["options"], f"{place}: {self.key}.options"),
        )


def messages(example: Example) -> list[dict[str, str]]:
    """The prompt as chat messages. Without a system text there is no system turn."""
    system = [{"role": "system", "content": example.system}] if example.system else []
    return [*system, {"role": "user", "content": example.user}]


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt (up to and with the assistant's header) and of the completion after it."""

    prompt: list[int]
    completion: list[int]
    text: str


def tokenize(tokenizer: PreTrainedTokenizerBase, example: Example) -> Tokens:
    """Prompt and completion as the chat template writes them: one BOS, and the completion's own end mark.

    The prompt is rendered and tokenised alone, so that training sees exactly the tokens that
    evaluation will give; what the template writes after it is the completion.

    Raises:
        ConfigError: the template writes the prompt differently when an answer follows.
    """
    turns, marks = _marked(tokenizer, [*messages(example), {"role": "assistant", "content": example.assistant}])
    prompt_text = _template(tokenizer, turns[:-1], generation=True)
    full_text = _template(tokenizer, turns, generation=False)
    if not full_text.startswith(prompt_text):
        raise ConfigError(
            f"{example.id}: the chat template of {tokenizer.name_or_path} does not begin a conversation with its "
            "prompt (it may strip or move text); give another one by model.chat_template"
        )
    prompt, text = _ids(tokenizer, prompt_text, marks)
    completion, _ = _ids(tokenizer, full_text[len(prompt_text) :], marks)
    return Tokens(prompt=prompt, completion=completion, text=text)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], str]:
    """Token ids and text of the prompt alone, as ``tokenize`` makes them."""
    turns, marks = _marked(tokenizer, messages(example))
    return _ids(tokenizer, _template(tokenizer, turns, generation=True), marks)


def _marked(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Turns in which a mark stands for what looks like a special token, and what each mark stands for.

    An end of turn that a question quotes is a piece of text, and must not end the turn.
    """
    specials, first = _specials(tokenizer)
    said = "".join(turn["content"] for turn in turns)
    if first.isdisjoint(said):
        return turns, {}
    free = (char for code in range(0xF0000, 0xFFFFE) if (char := chr(code)) not in said)  # private use
    marks = {next(free): special for special in specials if special in said}
    for mark, special in marks.items():
        turns = [{**turn, "content": turn["content"].replace(special, mark)} for turn in turns]
    return turns, marks


@cache
def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], set[str]]:
    """The special tokens of a tokenizer, the longest first, and the characters that they begin with."""
    found = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    return found[::-1], {special[0] for special in found}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, marks: Mapping[str, str]) -> tuple[list[int], str]:
    """Token ids of a text that a template wrote, and the text; what a mark stands for is read as plain text."""
    parts = re.split(f"([{''.join(marks)}])", text) if marks else [text]
    ids: list[int] = []
    for part in parts:
        plain = part in marks
        ids += tokenizer(marks.get(part, part), add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return ids, "".join(marks.get(part, part) for part in parts)


def _template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, generation: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} refuses the messages: {error}; "
            "set dataset.system=null if it takes no system turn, or give another one by model.chat_template"
        ) from error
    assert isinstance(text, str)
    return text


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as the templates of datasets see it: sandboxed, and strict about what does not exist."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    jinja.filters["search"] = _search
    jinja.filters["sql"] = _sql
    # Model input keeps < and > as they are; Jinja's own tojson writes them for HTML.
    jinja.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return jinja


def _search(text: str, pattern: str) -> str:
    """The first group of the first match of a regular expression, or an empty string."""
    if not re.compile(pattern).groups:
        raise ValueError(f"search({pattern!r}) has no group in parentheses")
    found = next(limited(regex.compile(pattern).finditer, text, pattern), None)
    return found.group(1) or "" if found else ""


@lru_cache(maxsize=20_000)  # a row's SQL is its completion and its target
def _sql(text: str) -> str:
    """A SQL statement laid out by sqlparse."""
    import sqlparse

    return str(sqlparse.format(text, reindent=True, keyword_case="upper")).strip()


def packages(cfg: DatasetConfig) -> list[str]:
    """The packages that render a dataset's templates. A filter may be named anywhere in one, also as ``map('sql')``."""
    sources = " ".join(str(getattr(cfg, name)) for name in (*TEMPLATES, "keep"))
    used = {"sqlparse": r"\bsql\b", "regex": r"\bsearch\b"}
    return ["jinja2", *(package for package, word in used.items() if re.search(word, sources))]


def check(key: str, source: str, columns: Sequence[str]) -> list[str]:
    """What is wrong with a template over these columns; nothing where it can be rendered."""
    from jinja2 import TemplateSyntaxError, meta

    try:
        tree = environment().parse(source)
        environment().from_string(source)  # finds unknown filters too
    except TemplateSyntaxError as error:
        hint = "; besides Jinja's own filters there are search and sql" if "filter" in str(error.message) else ""
        return [f"{key}: is no Jinja template: {error.message} (line {error.lineno}){hint or '; mend the template'}"]
    unknown = sorted(meta.find_undeclared_variables(tree) - set(columns))
    return [f"{key}: there is no column {name!r}; the rows have {', '.join(columns)}" for name in unknown]


def _options(text: str | None, place: str) -> dict[str, str] | None:
    if not text:
        return None
    try:
        options = json.loads(text)
        return {str(letter): str(option) for letter, option in options.items()}
    except (ValueError, AttributeError) as error:
        remedy = "write {{ column | tojson }}"
        raise ConfigError(f"{place} is no JSON object of letter → text: {error}; {remedy}") from error
