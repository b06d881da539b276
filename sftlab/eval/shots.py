"""Other texts in the prompts of a test set: examples from the training rows, another instruction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from sftlab.config import ContenderConfig
from sftlab.dataset.sandbox import compiled
from sftlab.model.reasoning import answered
from sftlab.records import Example, Message, text_of_turn

LOOKED_AT = 200  # training rows among which enough short ones are searched


def drawn(rows: Sequence[Example], seed: int) -> Iterator[Example]:
    """Yield training rows in an order drawn by seed: those with an answer, and without tools."""
    order = random.Random(f"{seed}-shots").sample(range(len(rows)), min(len(rows), LOOKED_AT))
    for row in (rows[index] for index in order):
        plain = not row.tools and all(turn["role"] != "tool" and "tool_calls" not in turn for turn in row.messages)
        if plain and answered(row.assistant).strip():
            yield row


def fitting(rows: Iterator[Example], number: int, room: int, tokens: Callable[[Example], int]) -> list[Example]:
    """Choose the first rows that fit into a prompt together: none takes more than its share of the room.

    If no ``number`` rows are short enough, fewer are chosen.

    Args:
        rows: the rows in their order.
        number: how many to choose.
        room: tokens that all of them may take.
        tokens: the number of tokens that a row adds to a prompt.
    """
    known: list[tuple[Example, int]] = []

    def measured() -> Iterator[tuple[Example, int]]:
        yield from known[:]
        for row in rows:
            known.append((row, tokens(row)))
            yield known[-1]

    for fewer in range(number, 0, -1):
        chosen = list(islice((row for row, length in measured() if length <= room // fewer), fewer))
        if len(chosen) == fewer:
            return chosen
    return []


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Put other rows before the question, as earlier turns of the conversation.

    The instruction of the question comes first. An example with another instruction has it before its own question.
    """
    head = [turn for turn in example.messages[:1] if turn["role"] == "system"]
    turns = [turn for shot in shots for turn in _turns(shot, head)]
    return replace(example, messages=[*head, *turns, *example.messages[len(head) :]])


def _turns(shot: Example, head: Sequence[Message]) -> list[Message]:
    """The turns of an example, without the reasoning before its answers, which templates leave out of earlier turns."""
    own = [text_of_turn(turn) for turn in shot.messages if turn["role"] == "system"]
    instruction = "\n\n".join(text for text in own if text not in map(text_of_turn, head))
    turns: list[Message] = []
    for turn in shot.messages:
        text = text_of_turn(turn)
        if turn["role"] == "assistant":
            turns.append({"role": "assistant", "content": answered(text).strip()})
        elif turn["role"] == "user":
            turns.append({"role": "user", "content": f"{instruction}\n\n{text}" if instruction else text})
            instruction = ""
    return turns


def reworded(example: Example, cfg: ContenderConfig) -> Example:
    """Replace the instruction and the last question of a row by the templates ``system`` and ``user``.

    The templates may use both texts of the row as ``system`` and ``user``. An empty instruction leaves none.
    """
    if cfg.system is None and cfg.user is None:
        return example
    prompt = list(example.prompt)
    system = "\n\n".join(text_of_turn(turn) for turn in prompt if turn["role"] == "system")
    asked = max((at for at, turn in enumerate(prompt) if turn["role"] == "user"), default=None)
    user = "" if asked is None else text_of_turn(prompt[asked])
    texts = {"system": system, "user": user}
    if cfg.user is not None and asked is not None:
        prompt[asked] = {**prompt[asked], "content": _written(cfg.user, texts)}
    if cfg.system is not None:
        instruction = _written(cfg.system, texts)
        rest = [turn for turn in prompt if turn["role"] != "system"]
        first: list[Message] = [{"role": "system", "content": instruction}] if instruction.strip() else []
        prompt = [*first, *rest]
    return replace(example, messages=[*prompt, *example.messages[-1:]])


def _written(template: str, texts: dict[str, str]) -> str:
    return compiled(template).render(texts)
