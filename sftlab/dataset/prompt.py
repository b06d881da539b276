"""Render an example by a chat template and tokenise it, in the same way for training and for evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sftlab.dataset.chat_template import (
    end_token,
    extra_text,
    mark_special_tokens,
    outline_of,
    render,
    token_ids,
    unmark,
)
from sftlab.errors import ConfigError, Problem
from sftlab.model.reasoning import marks_with_spacing, opening_at_end, unclosed
from sftlab.records import Example, Message, text_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

CAUSES = ("model.chat_template", "dataset")  # keys that decide whether a template changes the text of a row

# Indentation of the first line with text. A single space is a separator, as after "Answer:".
_INDENTATION = re.compile(r"(?:\s*\n)?( {2,}| *\t[ \t]*)(?=\S)")


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt, which includes the header of the assistant turn, and of the completion after it.

    ``text`` is the prompt as text. ``dedented`` is set if the chat template removes the indentation of the
    completion's first line.
    """

    prompt: list[int]
    completion: list[int]
    text: str
    dedented: bool = False


class ChangedTextError(ConfigError):
    """A chat template changes the text of a row, which the problem names."""


def tokenize_all(tokenize_one: Callable[[Example], T], examples: Sequence[Example], split: str) -> Iterator[T]:
    """Apply ``tokenize`` or ``prompt_tokens`` to every example of a split.

    Raises:
        ConfigError: the chat template changes texts; has a problem for each row of the split for which it does.
    """
    from tqdm.auto import tqdm

    changed: list[Problem] = []
    for example in tqdm(examples, desc=f"tokenizing {split}", leave=False, delay=3):
        try:
            tokens = tokenize_one(example)
        except ChangedTextError as error:
            changed += error.problems
            continue
        yield tokens
    if changed:
        summary = Problem(
            "model.chat_template",
            None,
            f"the template changes the text of {len(changed)} of {len(examples)} {split} rows",
            "set model.chat_template to a Jinja file that writes it unchanged, or change the text in "
            "dataset.assistant, dataset.user or dataset.system",
            ("dataset",),
        )
        raise ConfigError(summary, *changed)


def tokenize(tokenizer: PreTrainedTokenizerBase, example: Example) -> Tokens:
    """Tokenise prompt and completion as the chat template writes them, with one BOS and the end mark of the turn.

    The prompt is rendered and tokenised by itself, so that training and evaluation see the same tokens. What the
    template writes after it is the completion.

    Raises:
        ConfigError: the template writes the prompt differently if an answer follows, adds text to the answer, or ends
            the turn without a special token.
        ChangedTextError: the template leaves out or rewrites part of a text.
    """
    turns, marks = mark_special_tokens(tokenizer, example.messages)
    prompt_text = _prompt(tokenizer, turns[:-1], example.id)
    full_text = render(tokenizer, turns, generation=False)
    if not full_text.startswith(prompt_text):
        raise ConfigError(
            Problem(
                example.id,
                None,
                f"the chat template of {tokenizer.name_or_path} does not begin a conversation with its prompt (it may "
                "strip or move text)",
                "set model.chat_template to another one"
                + (", or set dataset.system=null if it moves the system text" if turns[0]["role"] == "system" else ""),
                ("model.chat_template", "dataset.system"),
            )
        )
    written, answer = full_text[len(prompt_text) :], text_of_turn(turns[-1]).strip()
    body = _body(written, answer, outline_of(tokenizer, tuple(turn["role"] for turn in turns[:-1])).tail)
    # The prompt may end with the opening mark with which the answer begins, as in "<think>\n".
    whole = (opening_at_end(prompt_text) + body).rstrip()
    if not whole.endswith(answer):
        lost, instead = (unmark(part, marks) for part in _difference(answer, whole.strip()))
        message = f"instead of {lost} in the assistant text the template writes {instead}"
        remedy = _spacing_remedy(whole) if "".join(whole.split()) == "".join(answer.split()) else ""
        raise ChangedTextError(Problem(example.id, None, message, remedy, CAUSES))
    if end_token(tokenizer, tail := written[len(body) :]) is None:
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
    if problem := extra_text(tokenizer, whole[: -len(answer)], tail, example.id):
        raise ConfigError(problem)
    if not unclosed(answer) and (mark := unclosed(body, prompt_text)):
        raise ConfigError(
            Problem(
                example.id,
                None,
                f"the chat template of {tokenizer.name_or_path} opens a reasoning block before the assistant text, "
                "and the text does not close it: it would be trained as reasoning without an answer",
                f"write {mark} before the answer in dataset.assistant, or set model.chat_template to a Jinja file "
                "that opens no block",
                ("model.chat_template", "dataset.assistant"),
            )
        )
    prompt, text = token_ids(tokenizer, prompt_text, marks)
    completion, _ = token_ids(tokenizer, written, marks)
    indentation = _INDENTATION.match(text_of_turn(turns[-1]))
    dedented = indentation is not None and not whole[: -len(answer)].endswith(indentation[1])
    return Tokens(prompt=prompt, completion=completion, text=text, dedented=dedented)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], str]:
    """Return token ids and text of the prompt alone, the same as those of ``tokenize``.

    Raises:
        ChangedTextError: the template leaves out or rewrites part of a text.
    """
    turns, marks = mark_special_tokens(tokenizer, example.prompt)
    return token_ids(tokenizer, _prompt(tokenizer, turns, example.id), marks)


def turn_end(tokenizer: PreTrainedTokenizerBase, example: Example) -> int | None:
    """Return the token by which the chat template ends an assistant turn; None if it writes no special token there."""
    tail = outline_of(tokenizer, tuple(turn["role"] for turn in example.prompt)).tail
    return None if tail is None else end_token(tokenizer, tail)


def _prompt(tokenizer: PreTrainedTokenizerBase, turns: list[Message], row: str) -> str:
    """Render a prompt, and check that it contains the text of every turn unchanged."""
    text = render(tokenizer, turns, generation=True)
    outline = outline_of(tokenizer, tuple(turn["role"] for turn in turns))
    for turn in turns:
        if not outline.has_text_of(turn["role"]) or text_of_turn(turn).strip() not in text:
            message = f"the prompt does not contain the {turn['role']} text unchanged"
            raise ChangedTextError(Problem(row, None, message, keys=CAUSES))
    return text


def _body(written: str, answer: str, tail: str | None) -> str:
    """Remove what the template writes after the assistant text from a completion."""
    if tail is not None and written.endswith(tail):
        return written[: len(written) - len(tail)]
    return written[: at + len(answer)] if tail is not None and (at := written.rfind(answer)) >= 0 else written


def _difference(text: str, written: str) -> tuple[str, str]:
    """Return the middle parts in which two texts differ, shortened."""
    first = _common_prefix(text, written)
    last = _common_prefix(text[first:][::-1], written[first:][::-1])
    parts = (part[first : len(part) - last] for part in (text, written))
    lost, instead = (
        repr(part if len(part) <= 80 else f"{part[:60]}…{part[-19:]}") if part else "nothing" for part in parts
    )
    return lost, instead


def _common_prefix(text: str, other: str) -> int:
    """Return the number of characters that two texts have in common at their beginning."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(text), len(other)))


def _spacing_remedy(written: str) -> str:
    """Return how to write a text that the template changes in white space only."""
    spaced = [f"{text.strip()} as {text!r}" for text in marks_with_spacing(written)]
    return "only white space differs" + (f": write {' and '.join(spaced)} in dataset.assistant" if spaced else "")
