"""Apply a tokenizer's chat template, and determine what it writes around the texts of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from sftlab.dataset.wording import short
from sftlab.errors import ConfigError, Problem
from sftlab.model.reasoning import marks as reasoning_marks
from sftlab.model.reasoning import without_marks
from sftlab.records import Message, Role, text_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES: dict[Role, str] = {"system": "\U000ffff0", "user": "\U000ffff1", "assistant": "\U000ffff2"}
"""A single character in place of each turn's text: what a template writes around it, it writes around any text."""

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that no text should contain


class Outline(NamedTuple):
    """What a chat template writes around the texts of turns.

    ``prompt`` is a prompt with a probe in place of each text. ``tail`` follows the assistant text; None if the
    template leaves that text out.
    """

    prompt: str
    tail: str | None

    def has_text_of(self, role: Role) -> bool:
        """Return whether the template writes the text of a role."""
        return PROBES[role] in self.prompt


def render(tokenizer: PreTrainedTokenizerBase, turns: list[Message], *, generation: bool) -> str:
    """Write turns by the chat template; ``generation`` adds the header of an assistant turn.

    Raises:
        ConfigError: the template rejects the turns.
    """
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template is code of the model's author, and may raise anything
        message = f"the template of {tokenizer.name_or_path} refuses the messages: {error}"
        remedy = "set dataset.system=null if it accepts no system turn, or set model.chat_template to another one"
        raise ConfigError(Problem("model.chat_template", None, message, remedy, ("dataset.system",))) from error
    assert isinstance(text, str)
    return text


@cache
def outline_of(tokenizer: PreTrainedTokenizerBase, roles: tuple[Role, ...]) -> Outline:
    """Return what the chat template writes around turns of these roles and the assistant turn after them."""
    turns: list[Message] = [{"role": role, "content": PROBES[role]} for role in (*roles, "assistant")]
    full = render(tokenizer, turns, generation=False)
    before, _, tail = full.rpartition(PROBES["assistant"])
    return Outline(render(tokenizer, turns[:-1], generation=True), tail if before else None)


@cache
def end_token(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    """Return the first special or added token in what a template writes after the assistant text."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    # In gpt-oss's format <|end|> ends each message of a completion, and generation does not stop there.
    harmony = {"<|channel|>", "<|return|>"} <= set(added.values())
    ends = {number for number, token in added.items() if not harmony or token not in ("<|end|>",)}
    return next((token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in ends), None)


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
    tokenizer: PreTrainedTokenizerBase, turns: list[Message]
) -> tuple[list[Message], dict[str, str]]:
    """Replace text that looks like a special token by a mark; return the turns and the text of each mark.

    An end of turn that a question quotes is text, and must not end the turn. Reasoning marks of an assistant turn
    stay: the template looks for them, and the model generates them as tokens.
    """
    specials, first = _special_tokens(tokenizer)
    texts = "".join(map(text_of_turn, turns))
    if first.isdisjoint(texts):
        return turns, {}
    free = (char for code in PRIVATE_USE if (char := chr(code)) not in texts)
    marks = {next(free): special for special in specials if special in texts}
    thoughts = reasoning_marks(marks.values())
    for mark, special in marks.items():
        turns = [
            turn
            if turn["role"] == "assistant" and special in thoughts
            else {**turn, "content": text_of_turn(turn).replace(special, mark)}
            for turn in turns
        ]
    return turns, marks


@cache
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], set[str]]:
    """Return the special tokens of a tokenizer, the longest first, and their first characters."""
    specials = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    return specials[::-1], {special[0] for special in specials}


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, marks: Mapping[str, str]) -> tuple[list[int], str]:
    """Tokenise a rendered text, with the text of each mark as plain text; return ids and text."""
    parts = re.split(f"([{''.join(marks)}])", text) if marks else [text]
    ids: list[int] = []
    for part in parts:
        plain = part in marks
        ids += tokenizer(marks.get(part, part), add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return ids, "".join(marks.get(part, part) for part in parts)


def unmark(text: str, marks: Mapping[str, str]) -> str:
    """Replace marks by the text that they stand for."""
    return "".join(marks.get(char, char) for char in text)
