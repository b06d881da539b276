"""Apply a tokenizer's chat template, and determine what it writes around the texts of a conversation."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from sftlab.dataset.tool_calls import NAME, PROBE_CALL, VALUE, call_form, formed
from sftlab.dataset.values import strings_in
from sftlab.dataset.wording import short
from sftlab.errors import ConfigError, Problem
from sftlab.model.reasoning import marks as reasoning_marks
from sftlab.model.reasoning import without_marks
from sftlab.records import Message, Role, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

FIRST_PROBE = 0x100000
"""The first of the characters that stand in place of texts: what a template writes around one, it writes around any."""

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that no text should contain


class Kind(NamedTuple):
    """What decides how a template writes a turn, besides its texts."""

    role: Role
    calls: int = 0
    has_text: bool = True


class Outline(NamedTuple):
    """What a chat template writes around the texts of turns.

    ``prompt`` is a prompt with a probe in place of each text. ``tail`` follows the text, or the last call, of the
    assistant turn after it; None if the template leaves that out.
    """

    prompt: str
    tail: str | None

    @property
    def header(self) -> str:
        """What follows the last text of the prompt."""
        return re.split(f"[{chr(FIRST_PROBE)}-{chr(sys.maxunicode)}]", self.prompt)[-1]

    def has_text_of(self, turn: int) -> bool:
        """Return whether the template writes the text of a turn."""
        return probe(turn) in self.prompt


def probe(turn: int) -> str:
    """Return the character in place of a turn's text."""
    return chr(FIRST_PROBE + turn)


def kinds_of(turns: Sequence[Message]) -> tuple[Kind, ...]:
    """Return the kinds of turns."""
    return tuple(Kind(turn["role"], len(turn.get("tool_calls", ())), bool(turn["content"])) for turn in turns)


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    *,
    generation: bool,
    tools: list[Tool] | None = None,
    row: str = "",
) -> str:
    """Write turns by the chat template; ``generation`` adds the header of an assistant turn.

    Raises:
        ConfigError: the template rejects the turns, of the example ``row``.
    """
    options = {"tools": tools} if tools else {}
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generation, **options)
    except Exception as error:  # a template is code of the model's author, and may raise anything
        message = f"the template of {tokenizer.name_or_path} refuses the messages{row and f' of {row}'}: {error}"
        remedy = "set dataset.system=null if it accepts no system turn, or set model.chat_template to another one"
        raise ConfigError(Problem("model.chat_template", None, message, remedy, ("dataset",))) from error
    assert isinstance(text, str)
    return text


@lru_cache(maxsize=4096)
def outline_of(tokenizer: PreTrainedTokenizerBase, prompt: tuple[Kind, ...], target: Kind) -> Outline:
    """Return what the chat template writes around turns of these kinds and the assistant turn ``target`` after them."""
    turns = [_probe_turn(tokenizer, kind, number) for number, kind in enumerate((*prompt, target))]
    full = render(tokenizer, turns, generation=False)
    before, _, tail = full.rpartition(VALUE if target.calls else probe(len(prompt)))
    return Outline(render(tokenizer, turns[:-1], generation=True), tail if before else None)


def _probe_turn(tokenizer: PreTrainedTokenizerBase, kind: Kind, number: int) -> Message:
    turn: Message = {"role": kind.role, "content": probe(number) if kind.has_text else ""}
    if kind.role == "tool":
        turn |= {"tool_call_id": PROBE_CALL["id"], "name": NAME}
    if form := call_form(tokenizer) if kind.calls else None:
        turn = formed({**turn, "tool_calls": [PROBE_CALL] * kind.calls}, form)
    return turn


@cache
def end_token(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    """Return the first special or added token in what a template writes after the assistant text."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    # In gpt-oss's format <|end|> ends each message of a completion, and generation does not stop there.
    harmony = {"<|channel|>", "<|return|>"} <= set(added.values())
    ends = {number for number, token in added.items() if not harmony or token not in ("<|end|>",)}
    return next((token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in ends), None)


@cache
def end_of_calls(tokenizer: PreTrainedTokenizerBase, tail: str, outline: Outline) -> int | None:
    """Return the token that ends an assistant turn with tool calls, in what a template writes after the last call.

    That is the token that ends a turn of text, or else the last special token before the next turn: marks around calls
    are special tokens too.

    Args:
        tokenizer: the tokenizer with the template.
        tail: what it writes after the last call.
        outline: what it writes around the same turns if the last one is text.
    """
    ids, header = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (tail, outline.header))
    end = None if outline.tail is None else end_token(tokenizer, outline.tail)
    if end in ids:
        return end
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = list(takewhile(lambda token: token not in header or token not in special, ids))
    return next((token for token in reversed(own) if token in special), None)


@lru_cache(maxsize=4096)
def has_tokens_only(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text consists of special tokens and white space."""
    for special in _special_tokens(tokenizer)[0]:
        text = text.replace(special, "")
    return not text.strip()


@cache
def text_of_token(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """Return the text of a special or added token."""
    return str(tokenizer.added_tokens_decoder[number])


def extra_text(tokenizer: PreTrainedTokenizerBase, head: str, tail: str, row: str) -> Problem | None:
    """Return the problem of text that a template adds around the assistant text; None if there is none.

    White space, tokens of the tokenizer with a role or channel after them, and an empty thought are not extra text.

    Args:
        tokenizer: the tokenizer with the template.
        head: what the template writes between the prompt and the assistant text.
        tail: what it writes after the assistant text.
        row: id of the example.
    """
    own = _token_pattern(tokenizer)
    end = own.search(tail)
    before, after = own.sub("", without_marks(head)).strip(), tail[: end.start()].strip() if end else ""
    if not before and not after:
        return None
    in_prompt = "writes it in the generation prompt (add_generation_prompt), or that " if before else ""
    return Problem(
        "model.chat_template",
        None,
        f"the template of {tokenizer.name_or_path} writes {short(before or after)!r} "
        f"{'before' if before else 'after'} the assistant text ({row}), and the model would be trained to write it",
        f"set model.chat_template to a Jinja file that {in_prompt}leaves it out",
    )


@cache
def _token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of the special and added tokens, each with the word after it, such as a role."""
    tokens = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}, key=len)
    return re.compile(f"(?:{'|'.join(re.escape(token) for token in reversed(tokens))})\\w*" if tokens else r"(?!)")


def mark_special_tokens(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: list[Tool] | None = None
) -> tuple[list[Message], list[Tool] | None, dict[str, str]]:
    """Replace text that looks like a special token by a mark; return turns, tools and the text of each mark.

    An end of turn that a question quotes is text, and must not end the turn. Reasoning marks of an assistant turn
    stay: the template looks for them, and the model generates them as tokens.
    """
    specials, first = _special_tokens(tokenizer)
    texts = "".join(strings_in([turns, tools]))
    if not any(char in texts for char in first):
        return list(turns), tools, {}
    free = (char for code in PRIVATE_USE if (char := chr(code)) not in texts)
    marks = {next(free): special for special in specials if special in texts}
    thoughts = reasoning_marks(marks.values())
    marked = list(turns)
    for mark, special in marks.items():
        marked = [
            turn if turn["role"] == "assistant" and special in thoughts else _replaced(turn, special, mark)
            for turn in marked
        ]
        tools = _replaced(tools, special, mark)
    return marked, tools, marks


def _replaced(value: T, old: str, new: str) -> T:
    """Replace a text within turns or tools."""
    result: object = value
    if isinstance(value, str):
        result = value.replace(old, new)
    elif isinstance(value, Mapping):
        result = {name: _replaced(item, old, new) for name, item in value.items()}
    elif isinstance(value, list):
        result = [_replaced(item, old, new) for item in value]
    return cast("T", result)


@cache
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], set[str]]:
    """Return the special tokens of a tokenizer, the longest first, and their first characters."""
    specials = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    return specials[::-1], {special[0] for special in specials}


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, marks: Mapping[str, str]) -> tuple[list[int], str]:
    """Tokenise a rendered text, with the text of each mark as plain text; return ids and text."""
    if not marks and tokenizer.is_fast:  # most rows: the tokenizer's own method has less overhead
        encoded: list[int] = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return encoded, text
    parts = re.split(f"([{''.join(marks)}])", text) if marks else [text]
    ids: list[int] = []
    for part in parts:
        plain = part in marks
        ids += tokenizer(marks.get(part, part), add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return ids, "".join(marks.get(part, part) for part in parts)


def unmark(text: str, marks: Mapping[str, str]) -> str:
    """Replace marks by the text that they stand for."""
    return "".join(marks.get(char, char) for char in text) if marks else text
