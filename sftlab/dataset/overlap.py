"""Detect leakage between splits: questions of a later split that an earlier split contains in full or in large part."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from sftlab.dataset.containment import Containment, Hashes, Indices
from sftlab.records import Example, text_of_turn
from sftlab.results import OverlapPair, OverlapReport, OverlapRow

SPLITS = ("train", "validation", "test")
PAIRS = (("validation", "train"), ("test", "train"), ("test", "validation"))  # the later split is examined
WORST = 10
CHUNK = 2**20  # n-grams of the rows that are read at once
BLOCK = 2**26  # n-grams of the questions that are compared in one pass over an earlier split (about 2.5 GiB)
LETTERS = 5  # characters that count as a word where words are not separated


def normalise_question(question: str) -> str:
    """Remove differences that hide a duplicate: case, Unicode variants, punctuation and spacing.

    Punctuation separates words, except for the apostrophe ("don't" becomes "dont"). It stays where it belongs to a
    number (3.5, -5, 3 * 5, 3/5), so that two sums stay different; symbols such as + and < are not punctuation.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", question).casefold())
    return " ".join(_punctuation().sub(" ", text.replace("'", "").replace("’", "")).split())


@cache
def _punctuation() -> re.Pattern[str]:
    # Marks beyond U+FFFF belong to ancient scripts, and would make the pattern seven times slower.
    marks = "".join(char for char in map(chr, range(0x10000)) if unicodedata.category(char).startswith("P"))
    return re.compile(rf"[{re.escape(marks)}](?<![-.](?=\d))(?<![*/%](?=\s*\d))")


def find_overlaps(splits: Mapping[str, Sequence[Example]], *, max_overlap: float, n: int = 8) -> OverlapReport:
    """Find the questions that an earlier split contains.

    The question of a conversation is the text of all its user turns, so that it is the same under another system
    prompt or with other answers. The overlap of a question is the largest share of its distinct word n-grams that a
    single row of the other split contains. Of rows with the same share, an exact duplicate is reported before others,
    then the first row. Shares are exact, and frequent grams count too. Grams and questions are compared by 64-bit
    hashes: among 25 million grams, the chance that any two have the same hash is 1 in 50,000.

    A conversation whose first user turn is that of another row is an exact duplicate too, whatever follows, if this
    turn has at least ``n`` words. Shorter ones ("Hi", "Can you help me?") open unrelated conversations; these are
    duplicates only if all their user turns are the same. Where words are not separated by spaces, five characters
    count as a word. A long opening that many conversations share is reported: group the rows by it
    (dataset.group_by) or allow it.

    A question of fewer than ``n`` words is a single gram, so it is detected as an exact duplicate only. The same holds
    for text in a script without spaces between words. A missing split counts as empty.

    Rows are read in order. In memory are the grams of a block of questions, and of the other split only the grams that
    these questions have. A split with more questions than fit into a block needs several passes over the other split.

    Args:
        splits: the examples of each split.
        max_overlap: share (0..1) above which a question counts as ``near``.
        n: words of a gram.

    Raises:
        ValueError: a split has another name than those of ``SPLITS``, or ``n`` is below 1.
    """
    if unknown := splits.keys() - set(SPLITS):
        raise ValueError(f"unknown splits {sorted(unknown)}: they are {', '.join(SPLITS)}")
    if n < 1:
        raise ValueError(f"n is {n}: a gram has at least one word")
    matches: dict[tuple[str, str], _Matches] = {}
    for right in dict.fromkeys(right for _, right in PAIRS):
        left = {name: splits.get(name, ()) for name, other in PAIRS if other == right}
        matches |= {(name, right): some for name, some in _compare(left, right, splits.get(right, ()), n).items()}
    pairs, overlaps = zip(
        *(_pair(left, right, splits, matches[left, right], max_overlap) for left, right in PAIRS), strict=True
    )
    # Sorting is stable: equal overlaps stay in the order of PAIRS and of the rows.
    worst = sorted(chain.from_iterable(overlaps), key=attrgetter("share", "exact"), reverse=True)[:WORST]
    return OverlapReport(max_overlap=max_overlap, n=n, pairs=list(pairs), worst=worst)


def describe(report: OverlapReport) -> str:
    """Return the report as text: a line for each pair of splits, then the worst overlaps with both texts."""
    lines = [
        f"{pair.right_split}–{pair.left_split}: of {pair.examined} questions {pair.exact} are exact duplicates and "
        f"{pair.near} more overlap by over {report.max_overlap:.1%} "
        f"(mean {pair.mean:.1%}, median {pair.p50:.1%}, 95th percentile {pair.p95:.1%}, largest {pair.max:.1%})"
        for pair in report.pairs
    ]
    for bad in report.worst:
        left, right = (textwrap.shorten(text, 100, placeholder=" …") for text in (bad.left_text, bad.right_text))
        share = "exact" if bad.exact else f"{bad.share:.1%}"
        lines.append(f"{share}: {bad.left_split} {bad.left_id} in {bad.right_split} {bad.right_id}")
        lines += [f"  {bad.left_split}: {left}", f"  {bad.right_split}: {right}"]
    return "\n".join(lines)


def asked(example: Example) -> tuple[str, str]:
    """Return the question of an example, and its first user turn."""
    turns = [text_of_turn(turn) for turn in example.prompt if turn["role"] == "user"]
    return example.question, turns[0] if turns else example.question


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows."""

    grams: Hashes
    """Hashes of the n-grams of all rows, with repeats."""
    sizes: Indices
    """Number of n-grams of each row."""
    keys: list[tuple[int, ...]]
    """Hash of the question of each row, then that of its first user turn if this is compared by itself."""

    def distinct(self) -> _Chunk:
        """Return the same rows with each n-gram once per row."""
        rows = np.repeat(np.arange(len(self.sizes)), self.sizes)
        order = np.lexsort((self.grams, rows))
        grams = self.grams[order]
        is_first = np.ones(len(grams), dtype=bool)
        is_first[1:] = (grams[1:] != grams[:-1]) | (rows[1:] != rows[:-1])
        sizes = np.bincount(rows[is_first], minlength=len(self.sizes))
        return replace(self, grams=grams[is_first], sizes=sizes)


@dataclass(frozen=True)
class _Matches:
    """For each question: the largest share, the row that contains it, and whether that is an exact duplicate."""

    share: NDArray[np.float64]
    closest: NDArray[np.int64]
    exact: NDArray[np.bool_]


def _read(examples: Sequence[Example], n: int, label: str) -> Iterator[_Chunk]:
    """Read a split, in chunks of about ``CHUNK`` n-grams."""
    from tqdm.auto import tqdm

    hashes, lengths, keys = array("q"), array("q"), list[tuple[int, ...]]()
    for example in tqdm(examples, desc=label, unit="row", leave=False, delay=3):
        question, opening = asked(example)
        text = normalise_question(question)
        words = text.split()
        words += [" "] * (n - len(words))  # no word is a space, so the only gram of a short text is unique
        hashes.extend(map(hash, words))
        lengths.append(len(words))
        keys.append((hash(text), *_opening(opening, n)) if opening != question else (hash(text),))
        if len(hashes) >= CHUNK:
            yield _chunk(hashes, lengths, keys, n)
            hashes, lengths, keys = array("q"), array("q"), []
    if keys:
        yield _chunk(hashes, lengths, keys, n)


def _opening(turn: str, n: int) -> tuple[int, ...]:
    """Return the hash of a first user turn, or nothing if it may open unrelated conversations."""
    text = normalise_question(turn)
    return (hash(text),) if text.count(" ") + 1 >= n or len(text) >= LETTERS * n else ()


def _chunk(hashes: array[int], lengths: array[int], keys: list[tuple[int, ...]], n: int) -> _Chunk:
    """Compute the hashes of n-grams from those of words."""
    word, sizes = np.array(hashes).astype(np.uint64), np.array(lengths) - n + 1
    grams = np.zeros(len(word) - n + 1, dtype=np.uint64)
    for place in range(n):
        grams *= np.uint64(0x9E3779B97F4A7C13)
        grams += word[place : place + len(grams)]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return _Chunk(grams[np.arange(len(rows)) + rows * (n - 1)], sizes, keys)  # n - 1 windows extend into the next row


def _compare(
    left: Mapping[str, Sequence[Example]], right: str, holders: Sequence[Example], n: int
) -> dict[str, _Matches]:
    """Compare the questions of several splits with an earlier split."""
    counts = [len(examples) for examples in left.values()]
    label = f"comparing {right} with {' and '.join(left)}"
    parts = [_Matches(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))]
    if len(holders):
        chunks = chain.from_iterable(_read(examples, n, f"reading {name}") for name, examples in left.items())
        parts += [_match(block, _read(holders, n, label)) for block in _blocks(chunks)]
    else:
        parts.append(_Matches(np.zeros(sum(counts)), np.full(sum(counts), -1), np.zeros(sum(counts), dtype=bool)))
    columns = (
        np.split(np.concatenate([getattr(part, name) for part in parts]), np.cumsum(counts)[:-1])
        for name in ("share", "closest", "exact")
    )
    return {name: _Matches(*some) for name, *some in zip(left, *columns, strict=True)}


def _blocks(chunks: Iterator[_Chunk]) -> Iterator[list[_Chunk]]:
    """Gather chunks, with each n-gram once per row, into blocks of about ``BLOCK`` n-grams."""
    block: list[_Chunk] = []
    for chunk in chunks:
        block.append(chunk.distinct())
        if sum(len(some.grams) for some in block) >= BLOCK:
            yield block
            block = []
    if block:
        yield block


def _match(questions: list[_Chunk], holders: Iterator[_Chunk]) -> _Matches:
    """Compare a block of questions with all rows of an earlier split."""
    keys = [key for chunk in questions for key in chunk.keys]
    grams, sizes = (np.concatenate([getattr(chunk, name) for chunk in questions]) for name in ("grams", "sizes"))
    questions.clear()  # of its memory too
    containment = Containment(grams, sizes)
    wanted = set(chain.from_iterable(keys))
    first: dict[int, int] = {}
    start = 0
    for chunk in holders:
        containment.add(chunk.grams, chunk.sizes)
        for row, some in enumerate(chunk.keys, start):
            for key in some:
                if key in wanted:
                    first.setdefault(key, row)
        start += len(chunk.keys)
    duplicate = np.array([next((first[key] for key in some if key in first), -1) for some in keys])
    exact = duplicate >= 0
    share, closest = containment.closest(skip=exact)
    share[exact], closest[exact] = 1, duplicate[exact]
    return _Matches(share, closest, exact)


def _pair(
    left: str, right: str, splits: Mapping[str, Sequence[Example]], matches: _Matches, max_overlap: float
) -> tuple[OverlapPair, list[OverlapRow]]:
    """Return the statistics of two splits and the worst overlaps."""
    names = {"left_split": left, "right_split": right}
    share, exact = matches.share, matches.exact
    if not len(share):
        nothing = dict.fromkeys(("examined", "exact", "near", "mean", "p50", "p95", "max"), 0)
        return OverlapPair.model_validate(names | nothing), []
    p50, p95 = np.percentile(share, [50, 95])
    worst = []
    for row in np.lexsort((~exact, -share))[: min(WORST, np.count_nonzero(share))]:
        question, holder = splits[left][int(row)], splits[right][int(matches.closest[row])]
        worst.append(
            OverlapRow(
                **names,
                left_id=question.id,
                right_id=holder.id,
                share=float(share[row]),
                exact=bool(exact[row]),
                left_text=asked(question)[0],
                right_text=asked(holder)[0],
            )
        )
    pair = OverlapPair(
        **names,
        examined=len(share),
        exact=int(exact.sum()),
        near=int(((share > max_overlap) & ~exact).sum()),
        mean=float(share.mean()),
        p50=float(p50),
        p95=float(p95),
        max=float(share.max()),
    )
    return pair, worst
