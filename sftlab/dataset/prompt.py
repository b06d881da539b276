"""A row → an example → messages → tokens: one way, used for training and for evaluation alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sftlab.config import DatasetConfig
from sftlab.dataset.rows import (
    NULL,
    Dict,
    List,
    NotTextError,
    Row,
    Talk,
    column_path,
    is_null,
    listing,
    path,
    plain,
    short,
    wrap,
)
from sftlab.dataset.sandbox import SIMPLE, environment, text_of, watch
from sftlab.errors import ConfigError
from sftlab.model.reasoning import begun, laid_out, unclosed, without_marks
from sftlab.model.reasoning import marks as reasoning_marks
from sftlab.records import Example

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.runtime import Context
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_SURROGATE = re.compile("[\ud800-\udfff]")
# Of the first line that is not empty: one space is a separator, as after "Answer:", and not indentation.
_INDENTATION = re.compile(r"(?:\s*\n)?( {2,}| *\t[ \t]*)(?=\S)")
TEMPLATES = ("id", "system", "user", "assistant", "target", "choices", "options", "group_by")


class Templates:
    """The templates of a dataset, checked against the columns that its rows have."""

    def __init__(self, cfg: DatasetConfig, key: str, columns: Sequence[str]) -> None:
        """Compile every template.

        Raises:
            ConfigError: a template that Jinja cannot read, or that names a column which does not exist.
        """
        self.key = key
        self._keep = cfg.keep
        problems: list[str] = []
        self._sources = {name: source for name in TEMPLATES if (source := getattr(cfg, name)) is not None}
        if cfg.keep is not None:
            self._sources["keep"] = "{{ 1 if (" + cfg.keep + ") else '' }}"
        for name, source in self._sources.items():
            problems += check(f"{key}.{name}", source, columns, whole="row")
            if name not in ("choices", "keep") and len(column := source.strip()) > 1 and column in columns:
                problems.append(
                    f"{key}.{name}={source!r}: is a fixed text, the name of a column; write "
                    + f"{{{{ {column_path(column)} }}}} for its values"
                )
        if problems:
            raise ConfigError(*problems)
        jinja = environment()
        # What a model thinks before it answers is not the right answer, nor does it decide whether a row has one.
        of_answers = environment(answers=True)
        self._compiled = {
            name: (of_answers if name in ("target", "keep") else jinja).from_string(source)
            for name, source in self._sources.items()
        }
        self._constant = {
            name: self._compiled[name].render() for name, source in self._sources.items() if "{" not in source
        }
        lone = _lone(cfg.target)
        self._target = None if lone is None else of_answers.from_string("{% set _target = (" + lone + ") %}")

    def keeps(self, row: Row | Mapping[str, Any], place: str) -> bool:
        """Whether ``keep`` lets a row in."""
        row = row if isinstance(row, Row) else wrap(row)
        try:
            return self._text("keep", row) != ""
        except ConfigError as error:
            raise ConfigError(f"{self.place(row, place)}: {error}") from error

    def example(self, row: Row | Mapping[str, Any], default_id: str, place: str) -> Example:
        """The example that a row becomes.

        Raises:
            ConfigError: a line for each problem: a template that cannot be rendered, an empty prompt, completion or
                target, a target that is none of the choices, or turns of a conversation that no template reads.
        """
        row = row if isinstance(row, Row) else wrap(row)
        row.unread()
        problems: list[str] = []
        text: dict[str, str | None] = {}
        for name in ("system", "user", "assistant"):  # what the model sees; other templates use up no turn
            text[name] = self._checked(name, row, problems)
        problems += [self._dropped(*conversation) for conversation in row.dropped()]
        for name in ("id", "choices", "options"):
            text[name] = self._checked(name, row, problems)
        choices = self._choices(text["choices"], problems)
        targets = self._targets(row, choices, problems)
        try:
            group, options = self._group_of(row), _options(text["options"], f"{self.key}.options")
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            place = self.place(row, place)
            raise ConfigError(*(f"{place}: {problem}" for problem in dict.fromkeys(problems)))
        return Example(
            id=text["id"] if text["id"] is not None else default_id,
            system=text["system"] or "",
            user=text["user"] or "",
            assistant=text["assistant"] or "",
            target=targets[0],
            choices=choices,
            group=group,
            options=options,
            targets=targets if len(targets) > 1 else None,
        )

    def place(self, row: Row, place: str) -> str:
        """The place of a row with its id, where it has one."""
        try:
            name = self._text("id", row) if "id" in self._compiled else row.values.get("id")
        except ConfigError:
            name = None
        known = isinstance(name, str | int) and not isinstance(name, bool) and str(name).strip()
        return f"{place} ({short(str(name), 40)})" if known else place

    def _text(self, name: str, row: Row) -> str | None:
        """The text that a template makes of a row, or None where the dataset has no such template."""
        if name in self._constant or name not in self._compiled:
            return self._constant.get(name)
        template = self._compiled[name]
        try:
            return "".join(template.root_render_func(_context(template, row)))
        except Exception as error:  # a template is the user's code, and may raise anything
            raise self._failed(name, row, error) from error

    def _failed(self, name: str, row: Row, error: Exception) -> ConfigError:
        if isinstance(error, NotTextError):
            return ConfigError(f"{self.key}.{name} {_not_text(name, self._sources[name], row, error.value)}")
        if isinstance(error, TypeError) and "'Null'" in str(error) and (hint := _comparison(name, self._sources[name])):
            return ConfigError(f"{self.key}.{name} compares a value that is null; write `{hint}`")
        message = " ".join((str(error) or type(error).__name__).replace("sftlab.dataset.rows.", "").split())
        return ConfigError(f"{self.key}.{name} cannot be rendered: {message}; fix the row or the template")

    def _checked(self, name: str, row: Row, problems: list[str]) -> str | None:
        """Render a template; add a problem if it fails, is not Unicode, or is empty where text is required."""
        try:
            text = self._text(name, row)
        except ConfigError as error:
            problems.append(str(error))
            return None
        if text is None:
            return None
        problems += self._half(name, text)
        if not text.strip() and name in ("user", "assistant"):
            problems.append(f"{self.key}.{name} renders to nothing; fix the row, or leave it out by {self.key}.keep")
        elif not text.strip() and name == "id":
            problems.append(f"{self.key}.id renders to nothing; fix the row, or set {self.key}.id=null")
        return text

    def _half(self, name: str, text: str) -> list[str]:
        if text.isascii() or not (half := _SURROGATE.search(text)):
            return []
        return [
            f"{self.key}.{name} holds half of a surrogate pair (\\u{ord(half[0]):04x}), which is no "
            "character; write the file again as UTF-8"
        ]

    def _choices(self, text: str | None, problems: list[str]) -> str:
        choices = "".join(sorted(set(text or "")))
        if choices and not choices.isalnum():
            words = any(len(word) > 1 for word in re.findall(r"\w+", text or ""))
            problems.append(
                f"{self.key}.choices gives {short(text or '')!r}; "
                + (
                    f"for words set eval.task=exact {self.key}.choices=null"
                    if words
                    else "write the letters with nothing between them"
                )
            )
            return ""
        if len(choices) == 1:
            problems.append(f"{self.key}.choices gives one letter, {choices!r}; an answer needs at least two")
            return ""
        return choices

    def _targets(self, row: Row, choices: str, problems: list[str]) -> list[str]:
        """The correct answers: one text, or the texts of a list that is the template's only expression."""
        try:
            value = self._answers(row)
        except ConfigError as error:
            problems.append(str(error))
            return []
        targets: list[str] = []
        for number, target in enumerate(value if isinstance(value, list) else [value]):
            item = f" item {number}" if isinstance(value, list) else ""
            if not target.strip():
                problems.append(
                    f"{self.key}.target{item} renders to nothing; fix the row, or leave it out by {self.key}.keep"
                )
            elif choices and target.strip() not in set(choices):
                problems.append(
                    f"target {short(target.strip())!r} is not one of {', '.join(choices)}; "
                    f"fix the row, or set {self.key}.choices"
                    + (f", or for words set eval.task=exact {self.key}.choices=null" if len(target.strip()) > 1 else "")
                )
            else:
                problems += self._half("target", target)
                targets.append(target.strip() if choices else target)
        if not targets and isinstance(value, list) and not value:
            problems.append(
                f"{self.key}.target is a list without an answer; fix the row, or leave it out by {self.key}.keep"
            )
        return list(dict.fromkeys(targets))

    def _answers(self, row: Row) -> str | list[str]:
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
            raise self._failed("target", row, error) from error

    def _group_of(self, row: Row) -> str | None:
        """The group of a row. None where the template writes a null, nothing but literal text, or what is not there.

        "case {{ number }}" of rows without a number is not a group that they share.
        """
        from jinja2 import UndefinedError

        if "group_by" not in self._sources:
            return None
        values = {name: NULL if _is_missing(value) else value for name, value in row.values.items()}
        written = watch()
        try:
            text = self._text("group_by", Row(values, row.conversations))
        except ConfigError as error:
            if isinstance(error.__cause__, UndefinedError):
                return None
            raise
        return (text or "").strip() or None if written.texts and not written.nulls else None

    def _dropped(self, talk: Talk, read: list[int], unread: list[int]) -> str:
        where, turns = talk.path, len(talk.read)
        only = f"({self._keep}) and " if self._keep else ""
        if not read:
            name, keep = f"{turns} earlier turn{'' if turns == 1 else 's'}", f"{only}not {where} | default([])"
            parts = f"which no template reads: {'it' if turns == 1 else 'they'}"
        else:
            name, keep = f"{turns} turns", f"{only}{where} | length <= {turns - len(unread)}"
            parts = f"and the templates read {_numbers(read)}: {_numbers(unread)}"
        return (
            f"{where} has {name}, {parts} would be dropped, and conversations with several turns are not supported; "
            f"leave such rows out by \"{self.key}.keep='{keep}'\", or write all turns into {self.key}.user by a loop"
        )


def messages(example: Example) -> list[dict[str, str]]:
    """The prompt as chat messages. Without a system text there is no system turn."""
    system = [{"role": "system", "content": example.system}] if example.system else []
    return [*system, {"role": "user", "content": example.user}]


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt (up to and with the assistant's header) and of the completion after it.

    ``text`` is the prompt as text, and ``dedented`` whether the template leaves out the indentation of the
    completion's first line.
    """

    prompt: list[int]
    completion: list[int]
    text: str
    dedented: bool = False


class ChangedTextError(ConfigError):
    """A chat template does not write a text of a row as it is."""


def tokenize_all(tokenize_one: Callable[[Example], T], examples: Sequence[Example], split: str) -> Iterator[T]:
    """Apply ``tokenize`` or ``prompt_tokens`` to every example of a split.

    Raises:
        ConfigError: the chat template changes texts; all such rows are reported at once.
    """
    from tqdm.auto import tqdm

    changed = []
    for example in tqdm(examples, desc=f"tokenizing {split}", leave=False, delay=3):
        try:
            made = tokenize_one(example)
        except ChangedTextError as error:
            changed.append(str(error))
            continue
        yield made
    if changed:
        more = [f"… and {len(changed) - REPORTED} more"] if len(changed) > REPORTED else []
        raise ConfigError(
            "\n".join(
                [
                    f"model.chat_template: the template changes the text of {len(changed)} of {len(examples)} {split} "
                    "rows. Set model.chat_template to a Jinja file that writes it unchanged, or change the text in "
                    "dataset.assistant, dataset.user or dataset.system",
                    *changed[:REPORTED],
                    *more,
                ]
            )
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, example: Example) -> Tokens:
    """Prompt and completion as the chat template writes them: one BOS, and the completion's own end mark.

    The prompt is rendered and tokenised alone, so that training sees exactly the tokens that
    evaluation will give; what the template writes after it is the completion.

    Raises:
        ConfigError: the template writes the prompt differently when an answer follows, or ends a turn without a
            special token.
        ChangedTextError: the template leaves out or rewrites a part of a text.
    """
    turns, marks = _marked(tokenizer, [*messages(example), {"role": "assistant", "content": example.assistant}])
    prompt_text = _prompt(tokenizer, turns[:-1], example.id)
    full_text = _template(tokenizer, turns, generation=False)
    if not full_text.startswith(prompt_text):
        raise ConfigError(
            f"{example.id}: the chat template of {tokenizer.name_or_path} does not begin a conversation with its "
            "prompt (it may strip or move text); give another one by model.chat_template"
            + (", or set dataset.system=null if it moves the system text" if example.system else "")
        )
    written, said = full_text[len(prompt_text) :], turns[-1]["content"].strip()
    body = _body(written, said, _outline(tokenizer, tuple(turn["role"] for turn in turns[:-1])).tail)
    # The prompt may begin the thought that the text begins with ("<think>\n").
    whole = (begun(prompt_text) + body).rstrip()
    if not whole.endswith(said):
        lost, instead = (_unmarked(part, marks) for part in _difference(said, whole.strip()))
        raise ChangedTextError(
            f"{example.id}: instead of {lost} in the assistant text the template writes {instead}"
            + (_layout(whole) if "".join(whole.split()) == "".join(said.split()) else "")
        )
    if _end(tokenizer, tail := written[len(body) :]) is None:
        raise ConfigError(
            f"model.chat_template: the template of {tokenizer.name_or_path} writes {tail!r} after an assistant turn. "
            "It holds no special token of the tokenizer that ends a completion, and generation could not stop there; "
            f"set model.chat_template to a Jinja file that writes {{{{ eos_token }}}} ({tokenizer.eos_token}) after "
            "the assistant's text"
        )
    _check_added(tokenizer, whole[: -len(said)], tail, example.id)
    if not unclosed(said) and (mark := unclosed(body, prompt_text)):
        raise ConfigError(
            f"{example.id}: the chat template of {tokenizer.name_or_path} opens a reasoning block before the assistant "
            f"text, and the text does not close it: it would be trained as reasoning without an answer. Write {mark} "
            "before the answer in dataset.assistant, or set model.chat_template to a Jinja file that opens no block"
        )
    prompt, text = _ids(tokenizer, prompt_text, marks)
    completion, _ = _ids(tokenizer, written, marks)
    indentation = _INDENTATION.match(turns[-1]["content"])
    dedented = indentation is not None and not whole[: -len(said)].endswith(indentation[1])
    return Tokens(prompt=prompt, completion=completion, text=text, dedented=dedented)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], str]:
    """Token ids and text of the prompt alone, as ``tokenize`` makes them.

    Raises:
        ChangedTextError: the template leaves out or rewrites a part of a text.
    """
    turns, marks = _marked(tokenizer, messages(example))
    return _ids(tokenizer, _prompt(tokenizer, turns, example.id), marks)


def turn_end(tokenizer: PreTrainedTokenizerBase, example: Example) -> int | None:
    """The token that the chat template ends an assistant turn with; None if it writes no special token there."""
    tail = _outline(tokenizer, tuple(turn["role"] for turn in messages(example))).tail
    return None if tail is None else _end(tokenizer, tail)


def _prompt(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], row: str) -> str:
    """The prompt as text, checked to hold every turn's text."""
    text = _template(tokenizer, turns, generation=True)
    outline = _outline(tokenizer, tuple(turn["role"] for turn in turns))
    for turn in turns:
        if PROBES[turn["role"]] not in outline.prompt or turn["content"].strip() not in text:
            raise ChangedTextError(f"{row}: the prompt does not hold the {turn['role']} text as it is")
    return text


# One character for each turn's text: what a template writes around it is what it writes around any text.
PROBES = {"system": "\U000ffff0", "user": "\U000ffff1", "assistant": "\U000ffff2"}
REPORTED = 20  # rows that a message names


class Outline(NamedTuple):
    """What a chat template writes around texts: a prompt of probes, and what follows an assistant's text.

    ``tail`` is None where the template leaves the assistant's text out.
    """

    prompt: str
    tail: str | None


@cache
def _outline(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> Outline:
    turns = [{"role": role, "content": PROBES[role]} for role in (*roles, "assistant")]
    full = _template(tokenizer, turns, generation=False)
    before, _, tail = full.rpartition(PROBES["assistant"])
    return Outline(_template(tokenizer, turns[:-1], generation=True), tail if before else None)


@cache
def _end(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    """The first token of its own kind, special or added, in what a template writes after an assistant's text."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    # In gpt-oss's format this token ends each message of a completion, and generation does not stop there.
    harmony = {"<|channel|>", "<|return|>"} <= set(added.values())
    own = {number for number, token in added.items() if not harmony or token not in ("<|end|>",)}
    return next((token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in own), None)


def _body(written: str, said: str, tail: str | None) -> str:
    """A completion without what the template writes after the assistant's text."""
    if tail is not None and written.endswith(tail):
        return written[: len(written) - len(tail)]
    return written[: at + len(said)] if tail is not None and (at := written.rfind(said)) >= 0 else written


def _check_added(tokenizer: PreTrainedTokenizerBase, head: str, tail: str, row: str) -> None:
    """Refuse text that a template adds to an assistant's.

    It may write white space, tokens of the tokenizer with a role or channel after them, and an empty thought.
    """
    own = _own(tokenizer)
    end = own.search(tail)
    before, after = own.sub("", without_marks(head)).strip(), tail[: end.start()].strip() if end else ""
    if not before and not after:
        return
    instead = (
        "Set model.chat_template to a Jinja file that writes it in the generation prompt (add_generation_prompt), or "
        "that leaves it out"
        if before
        else "Set model.chat_template to a Jinja file that leaves it out"
    )
    raise ConfigError(
        f"model.chat_template: the template of {tokenizer.name_or_path} writes {short(before or after)!r} "
        f"{'before' if before else 'after'} the assistant text ({row}), and the model would be trained to write it. "
        f"{instead}"
    )


@cache
def _own(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds special and added tokens, each with the word after it, such as a role."""
    tokens = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}, key=len)
    return re.compile(f"(?:{'|'.join(re.escape(token) for token in reversed(tokens))})\\w*" if tokens else r"(?!)")


def _difference(text: str, written: str) -> tuple[str, str]:
    """The middle parts in which two texts differ, shortened."""
    first = _agreeing(text, written)
    last = _agreeing(text[first:][::-1], written[first:][::-1])
    parts = (part[first : len(part) - last] for part in (text, written))
    lost, instead = (
        repr(part if len(part) <= 80 else f"{part[:60]}…{part[-19:]}") if part else "nothing" for part in parts
    )
    return lost, instead


def _layout(written: str) -> str:
    """How to write a text from which a template's differs in white space only."""
    around = [f"{text.strip()} as {text!r}" for text in laid_out(written)]
    return "; only white space differs" + (f": write {' and '.join(around)} in dataset.assistant" if around else "")


def _agreeing(text: str, other: str) -> int:
    """Characters at the beginning of two texts that are the same."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), min(len(text), len(other)))


def _marked(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Turns in which a mark stands for what looks like a special token, and what each mark stands for.

    An end of turn that a question quotes is a piece of text, and must not end the turn. Reasoning marks of an
    assistant turn stay: the template looks for them, and the model generates them as tokens.
    """
    specials, first = _specials(tokenizer)
    said = "".join(turn["content"] for turn in turns)
    if first.isdisjoint(said):
        return turns, {}
    free = (char for code in range(0xF0000, 0xFFFFE) if (char := chr(code)) not in said)  # private use
    marks = {next(free): special for special in specials if special in said}
    thoughts = reasoning_marks(marks.values())
    for mark, special in marks.items():
        turns = [
            turn
            if turn["role"] == "assistant" and special in thoughts
            else {**turn, "content": turn["content"].replace(special, mark)}
            for turn in turns
        ]
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


def _unmarked(text: str, marks: Mapping[str, str]) -> str:
    return "".join(marks.get(char, char) for char in text)


def _template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, generation: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template is somebody's code, and may raise anything
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} refuses the messages: {error}; "
            "set dataset.system=null if it takes no system turn, or give another one by model.chat_template"
        ) from error
    assert isinstance(text, str)
    return text


def packages(cfg: DatasetConfig) -> list[str]:
    """The packages that render a dataset's templates. A filter may be named anywhere in one, also as ``map('sql')``."""
    sources = " ".join(str(getattr(cfg, name)) for name in (*TEMPLATES, "keep"))
    used = {"sqlparse": r"\bsql\b", "regex": r"\bsearch\b"}
    return ["jinja2", *(package for package, word in used.items() if re.search(word, sources))]


def check(key: str, source: str, columns: Sequence[str], whole: str = "", noun: str = "column") -> list[str]:
    """What is wrong with a template over these columns; nothing where it can be rendered.

    ``whole`` is the name of the object that holds all of them, if there is one; ``noun`` is what messages call them.
    """
    from jinja2 import TemplateSyntaxError, meta

    named = [column for column in columns if len(column) > 1 and not column.isidentifier() and column in source]
    odd = f"; write {path('row', max(named, key=len))} for the column of that name" if named else ""
    try:
        tree = environment().parse(source)
        environment().from_string(source)  # finds unknown filters too
    except TemplateSyntaxError as error:
        if key.endswith(".keep") and "{{" in source.removeprefix("{{ 1 if ("):
            return [f"{key}: is an expression and not a template; write it without {{{{ and }}}}"]
        hint = "; besides Jinja's own filters there are search and sql" if "filter" in str(error.message) else ""
        hint = hint or odd or "; fix the template"
        return [f"{key}: is not a Jinja template: {error.message} (line {error.lineno}){hint}"]
    unknown = sorted(meta.find_undeclared_variables(tree) - {*columns, whole})
    there = "the rows have" if noun == "column" else "there is only"
    return [f"{key}: there is no {noun} {name!r}; {there} {listing(columns)}{odd}" for name in unknown]


def _lone(source: str) -> str | None:
    """The expression of a template that is nothing but one expression."""
    from jinja2 import nodes

    body = environment().parse(source.strip()).body
    if len(body) != 1 or not isinstance(body[0], nodes.Output) or len(body[0].nodes) != 1:
        return None
    found = re.fullmatch(r"\{\{[-+]?(.*?)-?\}\}", source.strip(), re.DOTALL)
    return None if found is None or isinstance(body[0].nodes[0], nodes.TemplateData) else found[1]


MISSING = {"", "nan", "none", "null", "nat", "<na>", "n/a"}
"""What pandas and Python write for a value that is missing, in lower case."""


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in MISSING


def _comparison(name: str, source: str) -> str:
    """How to write the first comparison of sizes in a template, or all of ``keep``, where a value may be null."""
    from jinja2 import nodes

    for compare in environment().parse(source).find_all(nodes.Compare):
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        columns = [chain for side in sides if (chain := _chain(_unfiltered(side)))]
        if columns and any(operand.op in ("gt", "gteq", "lt", "lteq") for operand in compare.ops):
            tested = " and ".join(f"{column} is not none" for column in columns)
            if name != "keep":
                return f"{tested} and …"
            keep = source.removeprefix("{{ 1 if (").removesuffix(") else '' }}")
            whole = environment().parse("{{ " + keep + " }}").body[0]
            alone = isinstance(whole, nodes.Output) and isinstance(whole.nodes[0], nodes.Compare | nodes.And)
            return f"{tested} and {keep if alone else f'({keep})'}"
    return ""


def _unfiltered(node: Any) -> Any:
    from jinja2 import nodes

    return _unfiltered(node.node) if isinstance(node, nodes.Filter) else node


def _context(template: Template, row: Row) -> Context:
    """What a template sees: the columns, and Jinja's own functions. Jinja would copy them for each template."""
    if row.names is None:
        row.names = {**template.environment.globals, "row": row.values, **row.values}
    return template.new_context(row.names, shared=True)


def _numbers(turns: Sequence[int]) -> str:
    return f"turn {turns[0]}" if len(turns) == 1 else f"turns {listing(turns)}"


def _not_text(key: str, source: str, row: Row, value: Any) -> str:
    """What is wrong with a value that a template writes: where it stands, what it is, and how to make text of it."""
    where = _where(source, row, value)
    column = f"column {where}" if where else "an expression"
    kind = {"List": "list", "Dict": "dict", "Turn": "dict", "Texts": "list"}.get(
        type(value).__name__, type(value).__name__
    )
    article = "an" if kind[0] in "aeiou" else "a"
    return (
        f"writes {column}, which is {article} {kind} and not text: {short(repr(plain(value)))}; "
        f"{_remedy(key, where, value)}"
    )


def _remedy(key: str, where: str, value: Any) -> str:
    """How to make a text of a value. Other rows may have a text in its place, which stays as it is."""
    name = where.split(" or ")[0] or "x"
    if isinstance(value, bool):
        return f"write {{{{ 'yes' if {name} else 'no' }}}}"
    if isinstance(value, bytes):
        return f"write {{{{ {name}.decode('utf-8') }}}}"
    if isinstance(value, Iterator):
        return "write {{ … | join(', ') }}"
    if isinstance(value, SIMPLE):
        return f"write {{{{ {name} | string }}}}"
    if not isinstance(value, list | tuple | dict):
        return "write a text or a number"
    text, exact = f"{name} | tojson", getattr(value, "_sftlab_text", None) is not None
    if key == "choices" and isinstance(value, list | tuple | dict):
        return f"write {{{{ {name} | join }}}}"
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        # SQuAD's answers, of which each is right.
        text = path(name, "text") if key == "target" else f"{path(name, 'text')}[0]"
    if value and not isinstance(value, dict):
        if all(isinstance(item, dict) and not is_null(item.get("text")) for item in value):
            text = f"{name} | map(attribute='text') | join"
        elif all(isinstance(item, str | int | None) and not isinstance(item, bool) for item in value):
            text = f"{name} | join(', ')"
    remedy = f"{{{{ {name} if {name} is string else {text} }}}}"
    if not exact:
        return f"write {remedy}"
    # Another filter may write other white space and numbers than the cell has.
    whole = f"{{{{ {name} | string }}}} for the text of the cell"
    texts = all(isinstance(item, str | dict) for item in value) and "join" in text
    return f"write {remedy}, or {whole}" if texts else f"write {whole}, or {remedy}"


def _where(source: str, row: Row, value: Any) -> str:
    """The path of a value that a template writes: its own, that of an expression, or the columns that hold it."""
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
    found = [place for name in sorted(read) for place in _holding(row.values[name], name, value)]
    return " or ".join(found[:3])


def _chain(node: Any) -> str | None:
    """``messages[2].content`` as a template has it; None for any other expression."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr) and (left := _chain(node.node)):
        return f"{left}.{node.attr}"
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and (left := _chain(node.node)):
        return path(left, node.arg.value)
    return None


def _holding(held: Any, where: str, value: Any) -> Iterator[str]:
    """The paths of a value within a column."""
    if held is value:
        yield where
    elif isinstance(held, dict):
        for key, item in held.items():
            yield from _holding(item, path(where, key), value)
    elif isinstance(held, list):
        for number, item in enumerate(held):
            yield from _holding(item, f"{where}[{number}]", value)


def _options(text: str | None, key: str) -> dict[str, str] | None:
    """Letter → text of the options. One that is null is left out."""
    if not (text or "").strip():
        return None
    try:
        options = json.loads(text or "")
        if options is None:
            return None
        if (
            isinstance(options, dict)
            and isinstance(options.get("label"), list)
            and isinstance(options.get("text"), list)
        ):
            options = dict(zip(options["label"], options["text"], strict=True))  # ARC's two lists
        return {str(letter): str(text_of(option)) for letter, option in options.items() if option is not None}
    except (ValueError, TypeError, AttributeError) as error:
        remedy = "write {{ column | tojson }}"
        raise ConfigError(f"{key} is not a JSON object of letter → text: {error}; {remedy}") from error
