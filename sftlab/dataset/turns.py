"""Render the turns of a conversation by a chat template, and check that it writes their texts unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sftlab.dataset.chat_template import (
    Kind,
    end_of_calls,
    end_token,
    extra_text,
    has_tokens_only,
    kinds_of,
    mark_special_tokens,
    outline_of,
    render,
    text_of_token,
    token_ids,
    unmark,
)
from sftlab.dataset.tool_calls import prepared, unwritten_names
from sftlab.errors import ConfigError, Problem
from sftlab.model.reasoning import answered, marks_with_spacing, opening_at_end, unclosed
from sftlab.records import Message, Role, Tool, text_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAUSES = ("model.chat_template", "dataset")  # keys that decide whether a template changes the text of a row
TEXT = Kind("assistant")

# Indentation of the first line with text. A single space is a separator, as after "Answer:".
_INDENTATION = re.compile(r"(?:\s*\n)?( {2,}| *\t[ \t]*)(?=\S)")


class ChangedTextError(ConfigError):
    """A chat template changes the text of a row, which the problem names."""


class Turn(NamedTuple):
    """An assistant turn: the prompt before it, what the template writes after that, and its end mark.

    ``ends`` are lengths of ``written`` at which an earlier turn may end: after further special tokens behind the end
    mark, or after the end mark.
    """

    prompt: str
    written: str
    ends: tuple[int, ...] = ()
    end: int | None = None
    dedented: bool = False


class Conversation(NamedTuple):
    """A conversation as a chat template takes it. ``marks`` stand for text that looks like a special token."""

    tokenizer: PreTrainedTokenizerBase
    row: str
    turns: list[Message]
    tools: list[Tool] | None
    marks: Mapping[str, str]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, row: str, messages: Sequence[Message], tools: list[Tool] | None
    ) -> Conversation:
        """Prepare messages for the chat template of a tokenizer."""
        turns = prepared(tokenizer, messages, tools, row)
        return cls(tokenizer, row, *mark_special_tokens(tokenizer, turns, tools or None))

    @property
    def answers(self) -> list[int]:
        """The places of the assistant turns."""
        return [at for at, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    def render(self, count: int, *, generation: bool) -> str:
        """Render the first turns."""
        turns = self.turns[:count]
        return render(self.tokenizer, turns, generation=generation, tools=self.tools, row=self.row)

    def ids(self, text: str) -> list[int]:
        """Tokenise a rendered text."""
        return token_ids(self.tokenizer, text, self.marks)[0]

    def text(self, text: str) -> str:
        """Replace the marks of a rendered text by what they stand for."""
        return unmark(text, self.marks)

    def problem(self, message: str, remedy: str = "", *keys: str) -> Problem:
        """Return a problem of this row."""
        return Problem(self.row, None, message, remedy, keys or CAUSES)


def turn_at(chat: Conversation, at: int) -> Turn | None:
    """Render an earlier assistant turn; None if the template does not continue its prompt, or refuses it."""
    try:
        prompt, full = chat.render(at, generation=True), chat.render(at + 1, generation=False)
        if not full.startswith(prompt):
            return None
        written = full[len(prompt) :]
        body = _body(chat, at, written)
        end = _end(chat, at, written[len(body) :])
    except ConfigError:
        return None
    return Turn(prompt, written, _ends(chat, written, len(body), end), end)


def checked_turn(chat: Conversation, at: int) -> Turn:
    """Render a supervised assistant turn, and check that the template writes its texts and its end."""
    tokenizer, turn = chat.tokenizer, chat.turns[at]
    if not (text_of_turn(turn).strip() or "tool_calls" in turn or "reasoning_content" in turn):
        message = f"the assistant turn at place {at + 1} of the conversation has neither text nor tool calls"
        raise ConfigError(chat.problem(message, "fix the row, or leave it out by dataset.keep", "dataset"))
    prompt_text = checked_prompt(chat, at)
    full_text = chat.render(at + 1, generation=False)
    if not full_text.startswith(prompt_text):
        raise ConfigError(
            chat.problem(
                f"the chat template of {tokenizer.name_or_path} does not begin a conversation with its prompt (it may "
                "strip or move text)",
                "set model.chat_template to another one"
                + (", or set dataset.system=null if it moves the system text" if _has_instruction(chat) else ""),
                "model.chat_template",
                "dataset.system",
            )
        )
    written, answer = full_text[len(prompt_text) :], text_of_turn(turn).strip()
    body = _body(chat, at, written)
    # The prompt may end with the opening mark with which the answer begins, as in "<think>\n".
    whole = (opening_at_end(prompt_text) + body).rstrip()
    if "tool_calls" in turn:
        whole = _before_calls(chat, turn, whole, answer)
    if not whole.endswith(answer):
        lost, instead = (chat.text(part) for part in _difference(answer, whole.strip()))
        message = f"instead of {lost} in the assistant text the template writes {instead}"
        remedy = _spacing_remedy(whole) if "".join(whole.split()) == "".join(answer.split()) else ""
        raise ChangedTextError(chat.problem(message, remedy))
    end = _end(chat, at, tail := written[len(body) :])
    if end is None:
        raise ConfigError(
            Problem(
                "model.chat_template",
                None,
                f"the template of {tokenizer.name_or_path} writes {tail!r} after an assistant turn. It contains no "
                "special token of the tokenizer that ends a completion, so generation could not stop there",
                f"set model.chat_template to a Jinja file that writes {{{{ eos_token }}}} ({tokenizer.eos_token}) "
                "after the assistant text",
            )
        )
    before = whole[: len(whole) - len(answer)]
    added = _without_thought(chat, turn, before, opening_at_end(prompt_text) + written)
    if problem := extra_text(tokenizer, added, "" if "tool_calls" in turn else tail, chat.row):
        raise ConfigError(problem)
    if "tool_calls" not in turn and (mark := unclosed(body, prompt_text)) and not unclosed(answer):
        raise ConfigError(
            chat.problem(
                f"the chat template of {tokenizer.name_or_path} opens a reasoning block before the assistant text, "
                "and the text does not close it: it would be trained as reasoning without an answer",
                f"write {mark} before the answer in dataset.assistant, or set model.chat_template to a Jinja file "
                "that opens no block",
                "model.chat_template",
                "dataset.assistant",
            )
        )
    indentation = _INDENTATION.match(text_of_turn(turn))
    dedented = indentation is not None and not before.endswith(indentation[1])
    return Turn(prompt_text, written, _ends(chat, written, len(body), end), end, dedented)


def checked_prompt(chat: Conversation, count: int) -> str:
    """Render the prompt after the first turns, and check that it contains the text of each.

    A template may leave out the reasoning of earlier assistant turns, as it does in a chat.
    """
    text = chat.render(count, generation=True)
    outline = outline_of(chat.tokenizer, kinds_of(chat.turns[:count]), TEXT)
    for at, turn in enumerate(chat.turns[:count]):
        content, role = text_of_turn(turn).strip(), turn["role"]
        if content and not (outline.has_text_of(at) and (content in text or _otherwise(role, content) in text)):
            raise ChangedTextError(chat.problem(f"the prompt does not contain the {role} text unchanged"))
        if names := unwritten_names(turn, text):
            raise ChangedTextError(chat.problem(f"the prompt does not contain the tool call {names[0]!r}"))
    return text


def _otherwise(role: Role, content: str) -> str:
    """Return the other form in which a template may write the text of an earlier turn."""
    if role == "assistant":
        return answered(content).strip()
    return json.dumps(content, ensure_ascii=False)[1:-1] if role == "tool" else content


def _has_instruction(chat: Conversation) -> bool:
    return chat.turns[0]["role"] == "system"


def _before_calls(chat: Conversation, turn: Message, written: str, answer: str) -> str:
    """Return what a template writes before the calls of a turn: the turn's text ends it."""
    if names := unwritten_names(turn, written):
        raise ChangedTextError(chat.problem(f"the template does not write the tool call {names[0]!r}"))
    if not answer:
        return ""
    at = written.find(answer)
    return written if at < 0 else written[: at + len(answer)]


def _without_thought(chat: Conversation, turn: Message, before: str, written: str) -> str:
    """Remove ``reasoning_content`` from what a template writes before the text of a turn."""
    thought = turn.get("reasoning_content", "").strip()
    if thought not in written:
        raise ChangedTextError(
            chat.problem(
                "the template does not write the reasoning_content of an assistant turn",
                "set dataset.thinking=drop, or model.chat_template to a Jinja file that writes it",
            )
        )
    return before.replace(thought, "", 1)


def _body(chat: Conversation, at: int, written: str) -> str:
    """Remove what the template writes after the text or the last call of an assistant turn."""
    turns = kinds_of(chat.turns[: at + 1])
    tail = outline_of(chat.tokenizer, turns[:-1], turns[-1]).tail
    if tail is None:
        return written
    if "tool_calls" in chat.turns[at]:  # after the last argument, the tail begins with what ends a text or an object
        return written[: len(written) - common_prefix(written[::-1], tail[::-1])]
    if written.endswith(tail):
        return written[: len(written) - len(tail)]
    answer = text_of_turn(chat.turns[at]).strip()
    return written[: found + len(answer)] if (found := written.rfind(answer)) >= 0 else written


def _end(chat: Conversation, at: int, tail: str) -> int | None:
    """Return the token that ends an assistant turn, in what the template writes after its text or last call."""
    if "tool_calls" not in chat.turns[at]:
        return end_token(chat.tokenizer, tail)
    return end_of_calls(chat.tokenizer, tail, outline_of(chat.tokenizer, kinds_of(chat.turns[:at]), TEXT))


def _ends(chat: Conversation, written: str, start: int, end: int | None) -> tuple[int, ...]:
    """Return the lengths of a turn with the special tokens behind its end mark and without them, from ``start``."""
    if end is None:
        return ()
    mark = text_of_token(chat.tokenizer, end)
    found = written.find(mark, start)
    if found < 0:
        return ()
    through = found + len(mark)
    whole = (len(written.rstrip()),) if has_tokens_only(chat.tokenizer, written[through:]) else ()
    return (*whole, through)


def _difference(text: str, written: str) -> tuple[str, str]:
    """Return the middle parts in which two texts differ, shortened."""
    first = common_prefix(text, written)
    last = common_prefix(text[first:][::-1], written[first:][::-1])
    parts = (part[first : len(part) - last] for part in (text, written))
    lost, instead = (
        repr(part if len(part) <= 80 else f"{part[:60]}…{part[-19:]}") if part else "nothing" for part in parts
    )
    return lost, instead


def common_prefix(text: str, other: str) -> int:
    """Return the number of characters that two texts have in common at their beginning."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(text), len(other)))


def _spacing_remedy(written: str) -> str:
    """Return how to write a text that the template changes in white space only."""
    spaced = [f"{text.strip()} as {text!r}" for text in marks_with_spacing(written)]
    return "only white space differs" + (f": write {' and '.join(spaced)} in dataset.assistant" if spaced else "")
