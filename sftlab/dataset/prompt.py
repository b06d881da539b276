"""Render conversations by a chat template and tokenise them, in the same way for training and for evaluation.

A text is tokenised in segments: each assistant turn that the template writes as the model would, and what stands
between. So a prompt has the same token ids in training and evaluation, however many turns it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby, takewhile
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sftlab.config import Supervised
from sftlab.dataset.chat_template import end_token, kinds_of, outline_of
from sftlab.dataset.parallel import in_order
from sftlab.dataset.turns import (
    TEXT,
    ChangedTextError,
    Conversation,
    Turn,
    checked_prompt,
    checked_turn,
    turn_at,
)
from sftlab.errors import ConfigError, Problem
from sftlab.records import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

CHUNK = 100  # examples of a chunk, after which the progress bar moves
ALONE = 2000  # examples that are tokenised in less time than the start of processes takes


class Segment(NamedTuple):
    """Token ids that were tokenised together, and whether they have a loss."""

    ids: list[int]
    supervised: bool


@dataclass(frozen=True)
class Tokens:
    """A tokenised row. The last segment is a supervised assistant turn; the header of the turn is before it.

    ``text`` is the prompt of that turn as text. ``dedented`` is set if the chat template removes the indentation of
    the first line of a supervised turn. ``ends`` are the tokens that end supervised turns.
    """

    id: str
    segments: Sequence[Segment]
    text: str
    dedented: bool = False
    ends: frozenset[int] = frozenset()

    @property
    def prompt(self) -> list[int]:
        """The token ids before the last turn."""
        return list(chain.from_iterable(segment.ids for segment in self.segments[:-1]))

    @property
    def completion(self) -> list[int]:
        """The token ids of the last turn."""
        return self.segments[-1].ids

    @cached_property
    def ids(self) -> list[int]:
        """All token ids."""
        return list(chain.from_iterable(segment.ids for segment in self.segments))

    @cached_property
    def labels(self) -> list[int]:
        """The token ids with a loss, and ``IGNORED`` for each other one."""
        return list(
            chain.from_iterable(
                segment.ids if segment.supervised else [IGNORED] * len(segment.ids) for segment in self.segments
            )
        )

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """Numbers of tokens without and with a loss in turn, beginning with those without."""
        parts = groupby(self.segments, lambda segment: segment.supervised)
        lengths = [(supervised, sum(len(segment.ids) for segment in run)) for supervised, run in parts]
        return tuple(length for _, length in ([(False, 0), *lengths] if lengths[0][0] else lengths))


def attempt(tokenize_one: Callable[[Example], T], examples: Iterable[Example]) -> tuple[list[T], list[Problem]]:
    """Apply ``tokenize`` or ``prompt_tokens`` to examples; return the results, and the texts that a template changes.

    Raises:
        ConfigError: the chat template cannot be used.
    """
    results, problems = list[T](), list[Problem]()
    for example in examples:
        try:
            results.append(tokenize_one(example))
        except ChangedTextError as error:
            problems += error.problems
    return results, problems


def tokenize_all(tokenize_one: Callable[[Example], T], examples: Sequence[Example], split: str) -> Iterator[T]:
    """Apply ``tokenize``, ``prompt_tokens`` or a function that calls one to every example of a split.

    Many examples are tokenised in a process for each core, so the function and its results are pickled.

    Raises:
        ConfigError: the chat template changes texts; has a problem for each row of the split for which it does.
    """
    from tqdm.auto import tqdm

    problems: list[Problem] = []
    chunks = (examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK))
    few = len(examples) <= ALONE
    tokenized = in_order(partial(attempt, tokenize_one), chunks, len(examples) if few else 0)
    bar = tqdm(total=len(examples), desc=f"tokenizing {split}", leave=False, delay=3)
    with closing(tokenized), bar:
        for results, changed in tokenized:
            problems += changed
            bar.update(len(results) + len(changed))
            yield from results
    if problems:
        raise changed_texts(problems, len(examples), split)


def changed_texts(problems: Sequence[Problem], rows: int, split: str) -> ConfigError:
    """Return the error of a chat template that changes texts of a split."""
    summary = Problem(
        "model.chat_template",
        None,
        f"the template changes the text of {len(problems)} of {rows} {split} rows",
        "set model.chat_template to a Jinja file that writes it unchanged, or change the text in "
        "dataset.assistant, dataset.user or dataset.system",
        ("dataset",),
    )
    return ConfigError(summary, *problems)


def tokenize(tokenizer: PreTrainedTokenizerBase, example: Example, train_on: Supervised = "all") -> list[Tokens]:
    """Tokenise a conversation as the chat template writes it, for training.

    The text is that of the prompt of the last turn and what the template writes after it. An assistant turn in it is
    supervised from the end of its own prompt to its end mark. If the template writes a supervised turn in another way
    once further turns follow, no text is right for all of them: then each turn is a row with its own prompt,
    ``id#1``, ``id#2`` and so on.

    Raises:
        ConfigError: the template writes a prompt differently if an answer follows, adds text to an answer, or ends
            a turn without a special token.
        ChangedTextError: the template leaves out or rewrites part of a text.
    """
    chat = Conversation.of(tokenizer, example.id, example.messages, example.tools)
    last = len(chat.turns) - 1
    wanted = train_on if isinstance(train_on, str) else train_on[example.source or ""]
    supervised = [at for at in chat.answers if at == last or wanted == "all"]
    turns = {at: checked_turn(chat, at) for at in supervised}
    ends = frozenset(turn.end for turn in turns.values() if turn.end is not None)
    parts = _parts(chat, last, turns)
    if set(supervised) <= {at for _, at in parts if at is not None} | {last}:
        segments = [Segment(chat.ids(text), at in turns) for text, at in parts]
        segments.append(Segment(chat.ids(turns[last].written), supervised=True))
        dedented = any(turn.dedented for turn in turns.values())
        return [Tokens(example.id, segments, chat.text(turns[last].prompt), dedented, ends)]
    rows = []
    for number, (at, turn) in enumerate(turns.items(), start=1):
        segments = [Segment(chat.ids(text), supervised=False) for text, _ in _parts(chat, at, turns)]
        segments.append(Segment(chat.ids(turn.written), supervised=True))
        rows.append(Tokens(f"{example.id}#{number}", segments, chat.text(turn.prompt), turn.dedented, ends))
    return rows


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], str]:
    """Return token ids and text of the prompt of the last turn, the same as those of ``tokenize``.

    Raises:
        ChangedTextError: the template leaves out or rewrites part of a text.
    """
    chat = Conversation.of(tokenizer, example.id, example.prompt, example.tools)
    text = checked_prompt(chat, len(chat.turns))
    parts = _parts(chat, len(chat.turns), {}, text)
    return list(chain.from_iterable(chat.ids(part) for part, _ in parts)), chat.text(text)


def turn_end(tokenizer: PreTrainedTokenizerBase, example: Example) -> int | None:
    """Return the token by which the chat template ends an assistant turn; None if it writes no special token there."""
    tail = outline_of(tokenizer, kinds_of(example.prompt), TEXT).tail
    return None if tail is None else end_token(tokenizer, tail)


def _parts(
    chat: Conversation, count: int, known: Mapping[int, Turn], text: str | None = None
) -> list[tuple[str, int | None]]:
    """Divide the prompt of the turn at ``count`` at the assistant turns in it that are written as the model would.

    Returns texts, each with the place of its assistant turn, or None between turns. ``known`` turns and the ``text``
    of the prompt are not rendered again.
    """
    text = known[count].prompt if text is None else text
    parts: list[tuple[str, int | None]] = []
    start = 0
    for at in chat.answers:
        turn = (known.get(at) or turn_at(chat, at)) if at < count else None
        if turn is None or len(turn.prompt) < start or not text.startswith(turn.prompt):
            continue
        end = _end(turn, text)
        if end is None:
            continue
        parts += [(text[start : len(turn.prompt)], None), (text[len(turn.prompt) : end], at)]
        start = end
    return [*parts, (text[start:], None)]


def _end(turn: Turn, text: str) -> int | None:
    """Return where an earlier assistant turn ends in a prompt; None if it is not written as the model would.

    After the end mark a template may write something else if another turn follows. White space there belongs to the
    turn, as it does in the last turn.
    """
    start = len(turn.prompt)
    for length in turn.ends or (len(turn.written),):
        if text.startswith(turn.written[:length], start):
            both = zip(turn.written[length:], text[start + length :], strict=False)
            return (
                start + length + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] and pair[0].isspace(), both))
            )
    return None
