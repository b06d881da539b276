"""Leakage between the splits: questions of a later split that an earlier one already holds, whole or in large part."""

# Own code: the libraries for this (datasketch and other MinHash indexes) estimate Jaccard similarity, which overlooks a
# short question inside a long row. What is wanted is containment, and exact.

from __future__ import annotations

import json
import re
import textwrap
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sftlab.records import Example

SPLITS = ("train", "validation", "test")
PAIRS = (("validation", "train"), ("test", "train"), ("test", "validation"))  # the later split is the one examined
WORST = 10
BUDGET = 1024  # rows looked up for one question before it is compared with all
TABLE = 2**22  # cells of the tables in which questions are compared with all (16 MiB each)


@dataclass(frozen=True)
class Overlap:
    """A question and the row of an earlier split that holds the largest share (0..1) of its distinct word n-grams.

    ``exact`` says whether the two are the same text once normalised.
    """

    left_split: str
    left_id: str
    right_split: str
    right_id: str
    share: float
    exact: bool
    left_text: str
    right_text: str


@dataclass(frozen=True)
class Pair:
    """The questions of ``left_split`` found in ``right_split``: exact duplicates, others over the limit, and shares."""

    left_split: str
    right_split: str
    examined: int
    exact: int
    near: int
    mean: float
    p50: float
    p95: float
    max: float


@dataclass(frozen=True)
class Report:
    """The overlap of every pair of splits, and the worst overlaps of all (at most 10, largest share first)."""

    max_overlap: float
    n: int
    pairs: tuple[Pair, ...]
    worst: tuple[Overlap, ...]

    @property
    def leaking(self) -> int:
        """How many findings are exact or over the limit; a question found in two splits counts twice."""
        return sum(pair.exact + pair.near for pair in self.pairs)

    @classmethod
    def read(cls, path: Path) -> Self:
        """A report from its JSON file."""
        values = json.loads(path.read_text("utf-8"))
        values["pairs"] = tuple(Pair(**row) for row in values["pairs"])
        values["worst"] = tuple(Overlap(**row) for row in values["worst"])
        return cls(**values)


def normalise(question: str) -> str:
    """A question without what hides a duplicate: case, Unicode variants, punctuation and spacing.

    Punctuation parts words, save the apostrophe ("don't" is "dont"). It stays where it belongs to a number (3.5, -5,
    3 * 5, 3/5), so that two sums are not taken for one; symbols such as + and < are no punctuation.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", question).casefold())
    return " ".join(_punctuation().sub(" ", text.replace("'", "").replace("’", "")).split())


@cache
def _punctuation() -> re.Pattern[str]:
    # Up to U+FFFF: the marks beyond are of ancient scripts, and with them the pattern is seven times as slow.
    marks = "".join(char for char in map(chr, range(0x10000)) if unicodedata.category(char).startswith("P"))
    return re.compile(rf"[{re.escape(marks)}](?<![-.](?=\d))(?<![*/%](?=\s*\d))")


def check(splits: Mapping[str, Sequence[Example]], *, max_overlap: float, n: int = 8) -> Report:
    """Find the questions (``Example.user``) that an earlier split already holds.

    The overlap of a question is the largest share of its distinct word n-grams that one single row of the other split
    holds; of rows that hold the same share, an exact duplicate is named before others, then the first. Every share is
    exact, no gram is left out for being frequent (grams are compared by 64-bit hashes: among 25 million, the chance
    that any two are mistaken for each other is 1 in 50,000).

    A question of fewer than ``n`` words is one gram as a whole, so it is only found as an exact duplicate. So is a
    text in a script that puts no spaces between words. A split that is missing counts as empty.
    """
    if unknown := splits.keys() - set(SPLITS):
        raise ValueError(f"unknown splits {sorted(unknown)}: they are {', '.join(SPLITS)}")
    if n < 1:
        raise ValueError(f"n is {n}: a gram has at least one word")
    read = {name: _Split(name, splits.get(name, ()), n) for name in SPLITS}
    pairs, found = zip(*(_pair(read[left], read[right], max_overlap) for left, right in PAIRS), strict=True)
    # Sorting is stable: what is equally bad stays in the order of PAIRS and of the rows.
    worst = sorted((one for some in found for one in some), key=attrgetter("share", "exact"), reverse=True)[:WORST]
    return Report(max_overlap, n, pairs, tuple(worst))


def describe(report: Report) -> str:
    """The report in a few lines for people: each pair of splits, then the worst overlaps with both texts."""
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


class _Split:
    """A split's normalised texts, the first row of each, and the hash and row of every n-gram (repeats included)."""

    def __init__(self, name: str, examples: Sequence[Example], n: int) -> None:
        self.name, self.examples = name, examples
        self.texts = [normalise(example.user) for example in examples]
        self.first = {text: row for row, text in reversed(list(enumerate(self.texts)))}
        hashes, lengths = array("q"), array("q")
        for text in self.texts:
            words = text.split()
            words += [" "] * (n - len(words))  # no word is a space: a short text's only gram is like no other
            hashes.extend(map(hash, words))
            lengths.append(len(words))
        word = np.array(hashes).astype(np.uint64)
        grams = np.zeros(max(len(word) - n + 1, 0), dtype=np.uint64)
        for place in range(n):
            grams *= np.uint64(0x9E3779B97F4A7C13)
            grams += word[place : place + len(grams)]
        self.rows = np.repeat(np.arange(len(examples)), np.array(lengths) - n + 1)
        self.grams = grams[np.arange(len(self.rows)) + self.rows * (n - 1)]  # n - 1 windows reach into the next row


def _pair(left: _Split, right: _Split, max_overlap: float) -> tuple[Pair, list[Overlap]]:
    """Compare two splits; with the summary come the worst overlaps."""
    if not left.examples:
        return Pair(left.name, right.name, 0, 0, 0, 0.0, 0.0, 0.0, 0.0), []
    duplicate = np.array([right.first.get(text, -1) for text in left.texts])
    exact = duplicate >= 0
    share, closest = _shares(left, right, skip=exact)
    share[exact], closest[exact] = 1, duplicate[exact]
    counts = len(share), int(exact.sum()), int(((share > max_overlap) & ~exact).sum())
    p50, p95 = np.percentile(share, [50, 95])
    worst = []
    for row in np.lexsort((~exact, -share))[: min(WORST, np.count_nonzero(share))]:
        question, holder = left.examples[row], right.examples[closest[row]]
        ids = left.name, question.id, right.name, holder.id
        worst.append(Overlap(*ids, float(share[row]), bool(exact[row]), question.user, holder.user))
    return Pair(left.name, right.name, *counts, float(share.mean()), float(p50), float(p95), float(share.max())), worst


def _shares(left: _Split, right: _Split, skip: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The overlap of each row of ``left`` and the first row of ``right`` with that overlap (-1 for none).

    Boilerplate makes every row share something with every other: too many pairs to look at. So what is alike is merged
    first: grams in the same rows of ``right`` and then rows with the same grams (of those that ``left`` has too).
    """
    from scipy import sparse

    def incidence(rows: NDArray[np.int64], grams: NDArray[np.int64], shape: tuple[int, int]) -> Any:
        matrix = sparse.csr_array((np.ones(len(rows), dtype=np.uint64), (rows, grams)), shape=shape)
        matrix.data[:] = 1  # repeats were added up
        return matrix

    vocabulary, columns = np.unique(left.grams, return_inverse=True)
    questions = incidence(left.rows, columns, (len(left.examples), len(vocabulary)))
    size = np.diff(questions.indptr)
    # Most grams of right are not in left: a table of their lowest bits rules nearly all out before the slow search.
    bits = np.uint64((1 << (8 * len(vocabulary)).bit_length()) - 1)
    table = np.zeros(int(bits) + 1, dtype=bool)
    table[vocabulary & bits] = True
    maybe = np.flatnonzero(table[right.grams & bits])
    columns = np.searchsorted(vocabulary[:-1], right.grams[maybe])
    shared = vocabulary[columns] == right.grams[maybe]
    holders = incidence(right.rows[maybe[shared]], columns[shared], (len(right.examples), len(vocabulary)))
    # Sets are alike if the sums of random numbers drawn for their members are.
    draw = np.random.default_rng(0)
    used = np.flatnonzero(np.bincount(holders.indices, minlength=len(vocabulary)))
    questions, holders = questions[:, used], holders[:, used]
    signature = holders.T @ draw.integers(2**64, size=holders.shape[0], dtype=np.uint64)
    _, kept, merged = np.unique(signature, return_index=True, return_inverse=True)
    questions = questions @ incidence(np.arange(len(used)), merged, (len(used), len(kept)))
    signature = holders[:, kept] @ draw.integers(2**64, size=len(kept), dtype=np.uint64)
    first = np.sort(np.unique(signature, return_index=True)[1])  # in the rows' order, so that ties go to the first
    holders, questions = holders[first][:, kept].astype(np.float32), questions.astype(np.float32)
    postings, weight = holders.tocsc(), np.zeros(len(kept))
    hits, closest, undecided = np.zeros(len(size)), np.full(len(size), -1), []
    for row in np.flatnonzero((np.diff(questions.indptr) > 0) & ~skip):
        span = slice(*questions.indptr[row : row + 2])
        grams = questions.indices[span]
        weight[grams] = questions.data[span]
        if found := _closest(grams, weight, holders, postings):
            hits[row], closest[row] = found[0], first[found[1]]
        else:
            undecided.append(row)
        weight[grams] = 0
    step = 1 + TABLE // (1 + max(holders.shape))
    for some in (undecided[start : start + step] for start in range(0, len(undecided), step)):
        score = np.ascontiguousarray((holders @ questions[some].T.toarray()).T)
        hits[some], closest[some] = score.max(axis=1), first[score.argmax(axis=1)]
    return hits / size, closest


def _closest(grams: NDArray[Any], weight: NDArray[Any], holders: Any, postings: Any) -> tuple[float, int] | None:
    """The largest total weight of ``grams`` in one row of ``holders``, and the first such row.

    Only the rows of the rarest grams are looked up; None means that a row without them may hold as much.
    """
    frequency = postings.indptr[grams + 1] - postings.indptr[grams]
    order = np.argsort(frequency, kind="stable")
    known = int(np.searchsorted(frequency[order].cumsum(), BUDGET, side="right"))
    if not known:
        return None
    rare, rest = grams[order[:known]], weight[grams[order[known:]]].sum()
    posted, owner = _members(postings, rare)
    score = np.bincount(posted, weights=weight[rare][owner])
    rows = np.flatnonzero((score > 0) & (score + rest >= score.max()))
    held, owner = _members(holders, rows)
    score = np.bincount(owner, weights=weight[held])
    return (float(score.max()), int(rows[score.argmax()])) if score.max() > rest else None


def _members(matrix: Any, lines: NDArray[np.integer[Any]]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
    """The entries of some lines of a compressed matrix end to end, and for each the place of its line in ``lines``."""
    start, length = matrix.indptr[lines], matrix.indptr[lines + 1] - matrix.indptr[lines]
    owner = np.repeat(np.arange(len(lines)), length)
    return matrix.indices[np.arange(len(owner)) + (start - length.cumsum() + length)[owner]], owner
