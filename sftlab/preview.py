"""``mode=preview``: what will be trained on, counted and token by token, in the terminal and as one page."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count as numbers
from itertools import groupby
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from sftlab.page import count, percent, sha256
from sftlab.prompt import Tokens, tokenize
from sftlab.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = {"5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "longest": 100}
BINS, BAR = 20, 50  # at most so many bars, at most so many characters long
SHOWN = 300  # tokens of a part's beginning, and of its end, in the terminal; the page has them all
# The parts of a row, each with two shades for the terminal: on their own ground, to be read on dark and on light.
PARTS = {
    "prompt": ("Prompt, not learned from", "#a0a8b3 on #1c2026", "#a0a8b3 on #343b45"),
    "supervised": ("Completion, learned from", "#6fcf97 on #12261a", "#6fcf97 on #1f4a30"),
    "cut": ("Cut, beyond train.max_length", "strike #f0938b on #331a19", "strike #f0938b on #5a2b28"),
}


class Bin(NamedTuple):
    """A bar of the histogram: rows of ``low`` to ``high`` tokens, which are ``over`` max_length or not."""

    low: int
    high: int
    rows: int
    over: bool


@dataclass(frozen=True)
class Statistics:
    """Counts of a split: ``cut`` rows lose the end of their completion, ``left_out`` ones have a prompt too long.

    ``tokens``, ``percentiles`` and ``bins`` are of whole rows; ``kept`` and ``supervised`` tokens of what is trained.
    """

    rows: int
    tokens: int
    kept: int
    supervised: int
    cut: int
    left_out: int
    percentiles: dict[str, list[int]]
    bins: list[Bin]


def statistics(lengths: Sequence[tuple[int, int]], max_length: int) -> Statistics:
    """Sum up the lengths of (prompt, completion). Percentiles are lengths that rows have (nearest rank)."""
    whole = [prompt + completion for prompt, completion in lengths]
    parts = {"row": whole, "prompt": [pair[0] for pair in lengths], "completion": [pair[1] for pair in lengths]}
    trained = [(prompt, min(prompt + completion, max_length)) for prompt, completion in lengths if prompt < max_length]
    return Statistics(
        rows=len(lengths),
        tokens=sum(whole),
        kept=sum(end for _, end in trained),
        supervised=sum(end - prompt for prompt, end in trained),
        cut=sum(row > max_length for row in whole) - (len(lengths) - len(trained)),
        left_out=len(lengths) - len(trained),
        percentiles={
            name: [sorted(part)[-(-p * len(part) // 100) - 1] for p in PERCENTILES.values()]
            for name, part in parts.items()
        },
        bins=histogram(whole, max_length),
    )


def histogram(lengths: Sequence[int], max_length: int) -> list[Bin]:
    """Bars of one round width, none of which has rows on both sides of ``max_length``."""
    low, high = min(lengths), max(lengths)
    edge = max_length + 1 if low <= max_length < high else 0
    widths = (factor * 10**power for power in numbers() for factor in (1, 2, 5))
    width = next(width for width in widths if (high - edge) // width - (low - edge) // width < BINS)
    found = Counter((length - edge) // width for length in lengths)
    starts = {at: edge + at * width for at in range(min(found), max(found) + 1)}
    return [Bin(max(low, 1), low + width - 1, found[at], low > max_length) for at, low in starts.items()]


def pick(lengths: Sequence[int], rows: int, seed: int) -> list[int]:
    """The rows to show: ``rows`` of them drawn by seed, in their order, and the longest."""
    drawn = sorted(Random(seed).sample(range(len(lengths)), min(rows, len(lengths))))
    return list(dict.fromkeys([*drawn, lengths.index(max(lengths))]))


class Span(NamedTuple):
    """A token, or the few that only together are a character. ``part`` is one of PARTS."""

    text: str
    ids: list[int]
    start: int
    part: str
    special: bool


def spans(decode: Callable[[list[int]], str], tokens: Tokens, max_length: int, special: Set[int]) -> list[Span]:
    """The text of each token. Pieces of a character wait until it is whole: no text is lost or changed.

    A token is decoded after the one before it, because some decoders drop a space at the very beginning.
    """
    ids, prompt = [*tokens.prompt, *tokens.completion], len(tokens.prompt)
    # No character goes on across these: the parts are tokenised one by one, and special tokens are whole.
    borders = {prompt, len(ids), *(side for at, token in enumerate(ids) if token in special for side in (at, at + 1))}
    made: list[Span] = []

    def add(end: int, text: str) -> None:
        start = made[-1].start + len(made[-1].ids) if made else 0
        part = "cut" if end > max_length else "prompt" if end <= prompt else "supervised"
        made.append(Span(text, ids[start:end], start, part, ids[start] in special))

    waiting = ""
    for end in range(1, len(ids) + 1):
        before, start = (made[-1].ids, made[-1].start + len(made[-1].ids)) if made else ([], 0)
        text = decode(before + ids[start:end])[len(decode(before)) :]
        whole = text != "" and not text.endswith("\ufffd")
        if whole and waiting and text.startswith(waiting):  # no half character: the text itself has this sign
            add(end - 1, waiting)
            text = text.removeprefix(waiting)
        if whole or end in borders:
            add(end, text)
        waiting = "" if whole or end in borders else text
    return made


def visible(text: str) -> str:
    """Text that hides nothing and moves no cursor: line ends are marked and kept, control characters named."""
    marks = {"\n": "⏎\n", "\t": "⇥\t", "\u200c": "\u200c", "\u200d": "\u200d"}  # joiners belong to words and emoji
    hiding = ("Cc", "Cf", "Cs", "Zl", "Zp")
    named = (f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in hiding else char for char in text)
    return "".join(marks.get(char, name) for char, name in zip(text, named, strict=True)) or "∅"


class Split(NamedTuple):
    """Everything that is told of a split, by the terminal and by the page. ``rows`` are (heading, [(part, spans)])."""

    name: str
    statistics: Statistics
    facts: dict[str, str]
    notes: list[str]
    rows: list[tuple[str, list[tuple[str, list[Span]]]]]


def preview(
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[Example]],
    *,
    max_length: int,
    folder: Path,
    rows: int = 3,
    seed: int,
) -> None:
    """Print what training would see of each split, and write ``preview.html`` into the folder.

    Raises:
        ConfigError: the chat template refuses a row.
    """
    from sftlab.stages.report import say

    names = [name for name in ("train", "validation") if splits[name]]
    found = [_split(tokenizer, name, splits[name], max_length, rows, seed) for name in names]
    for part in (part for split in found for part in _printed(split, max_length)):
        say(part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preview.html").write_text(render(found, max_length), "utf-8")
    say(f"Every token with its id: {folder / 'preview.html'}")


def _split(tokenizer: Any, name: str, examples: Sequence[Example], max_length: int, rows: int, seed: int) -> Split:
    from tqdm.auto import tqdm

    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    specials, lengths = Counter[int](), list[tuple[int, int]]()  # of the tokens only counts: a split may be large
    for example in tqdm(examples, desc=f"tokenizing {name}", leave=False, delay=3):
        tokens = tokenize(tokenizer, example)
        specials.update(token for token in tokens.prompt + tokens.completion if token in special)
        lengths.append((len(tokens.prompt), len(tokens.completion)))
    found, whole, first = statistics(lengths, max_length), list(map(sum, lengths)), tokenize(tokenizer, examples[0])
    longest = max(whole)
    facts = {
        "rows": count(found.rows),
        "tokens": f"{count(found.tokens)}; trained on: {count(found.kept)}",
        "tokens learned from": f"{count(found.supervised)}, {percent(found.supervised / max(found.kept, 1))} of those",
        f"rows over max_length={max_length}": f"{count(found.cut + found.left_out)}, "
        f"{percent((found.cut + found.left_out) / found.rows)}; completion cut: {count(found.cut)}, "
        f"left out, because the prompt fills it: {count(found.left_out)}",
    }
    for kind, token in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id)):
        where = f"prompt {first.prompt.count(token)}, completion {first.completion.count(token)}"
        facts[f"{kind} in the first row"] = "the tokenizer has none" if token is None else where
    ...
