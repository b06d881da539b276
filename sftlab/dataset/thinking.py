"""Remove the reasoning from the assistant turns of a conversation (``dataset.thinking=drop``)."""

from __future__ import annotations

from dataclasses import replace

from sftlab.errors import ConfigError, Problem
from sftlab.model.reasoning import answered
from sftlab.records import Example, Message, text_of_turn


def without_thinking(example: Example, key: str, place: str) -> Example:
    """Return an example whose assistant turns have no reasoning blocks and no ``reasoning_content``.

    Args:
        example: the example.
        key: the section of its dataset, "dataset" or "eval.dataset".
        place: file and row, for messages.

    Raises:
        ConfigError: an assistant turn is reasoning only.
    """
    messages = [_without(turn) if turn["role"] == "assistant" else turn for turn in example.messages]
    for before, after in zip(example.messages, messages, strict=True):
        if text_of_turn(before).strip() and not text_of_turn(after).strip() and not after.get("tool_calls"):
            raise ConfigError(
                Problem(
                    place,
                    None,
                    f"an assistant turn has reasoning only, which {key}.thinking=drop removes: "
                    f"{text_of_turn(before).strip()[:60]!r}",
                    f"leave the row out by {key}.keep, or set {key}.thinking=keep",
                    (f"{key}.thinking", f"{key}.keep"),
                )
            )
    return replace(example, messages=messages)


def _without(turn: Message) -> Message:
    text = text_of_turn(turn)
    answer = answered(text)
    answered_only: Message = turn if answer == text else {**turn, "content": answer.strip()}
    if "reasoning_content" in answered_only:
        answered_only = {**answered_only}
        del answered_only["reasoning_content"]
    return answered_only
