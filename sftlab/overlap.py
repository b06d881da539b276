"""Leakage between the splits: questions of a later split that an earlier one already holds, whole or in large part."""

# Own code, because the libraries for this (datasketch and other MinHash indexes) estimate the Jaccard similarity, which
# a short question inside a long row escapes; what is wanted here is containment, and exact.

from __future__ import annotations

import re
import textwrap
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sftlab.records import Example

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")
PAIRS = (("validation", "train"), ("test", "train"), ("test", "validation"))  # the later split is the one examined
WORST = 10
BUDGET = 1024  # rows looked up for a question before the first look at what they hold


@dataclass(frozen=True)
class Overlap:
    """A question and the row of an earlier split that holds most of it.

    ``share`` is the part (0..1) of the question's distinct word n-grams that the one row holds, ``exact``
    says whether the two are the same text once normalised.
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
    """What was found for the questions of ``left_split`` in ``right_split``.

    ``exact`` and ``near`` count questions: those with an exact duplicate, and those without one whose share is over
    the limit. The other numbers are of the shares; they are 0 where nothing was examined.
    """

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
    exact: no gram is left out for being frequent. (Grams are compared by 64-bit hashes; for 25 million of them, the
    chance that any two are mistaken for each other is about 1 in 50,000.)

    A question of fewer than ``n`` words is one gram as a whole, so it is only found as an exact duplicate. So is a
    text in a script that puts no spaces between words.

    Args:
        splits: The rows of "train", "validation" and "test"; one that is missing counts as empty.
        max_overlap: The limit (0..1). A question is over it if its share is larger, or if it is an exact duplicate.
        n: Words in a gram.
    """
    if unknown := splits.keys() - set(SPLITS):
        raise ValueError(f"unknown splits {sorted(unknown)}: they are {', '.join(SPLITS)}")
    if n < 1:
        raise ValueError(f"n is {n}: a gram has at least one word")
    read = {name: _Split(splits.get(name, ()), n) for name in SPLITS}
    results = [_pair(left, read[left], right, read[right], max_overlap) for left, right in PAIRS]
    # sorted() is stable: what is equally bad stays in the order of PAIRS and of the rows.
    found = [overlap for _, overlaps in results for overlap in overlaps]
    worst = sorted(found, key=lambda overlap: (-overlap.share, not overlap.exact))
    return Report(max_overlap, n, tuple(pair for pair, _ in results), tuple(worst[:WORST]))


def describe(report: Report) -> str:
    """The report in a few lines for people: each pair of splits, then the worst overlaps with both texts."""
    lines = [
        f"{pair.right_split}–{pair.left_split}: of {pair.examined} questions {pair.exact} are exact duplicates and "
        f"{pair.near} more overlap by over {report.max_overlap:.1%} "
        f"(mean {pair.mean:.1%}, median {pair.p50:.1%}, 95th percentile {pair.p95:.1%}, largest {pair.max:.1%})"
        for pair in report.pairs
    ]
    for overlap in report.worst:
        lines += [
            f"{'exact' if overlap.exact else f'{overlap.share:.1%}'}: "
            f"{overlap.left_split} {overlap.left_id} in {overlap.right_split} {overlap.right_id}",
            f"  {overlap.left_split}: {textwrap.shorten(overlap.left_text, 100, placeholder=' …')}",
            f"  {overlap.right_split}: {textwrap.shorten(overlap.right_text, 100, placeholder=' …')}",
        ]
    return "\n".join(lines)


class _Split:
    """A split's normalised texts, and the hash and the row of each of its n-grams (repeats included)."""

    def __init__(self, examples: Sequence[Example], n: int) -> None:
        import numpy as np

        self.examples = examples
        self.texts = [normalise(example.user) for example in examples]
        self.first = {text: row for row, text in reversed(list(enumerate(self.texts)))}
        hashes, lengths = array("q"), array("q")
        for text in self.texts:
            words = text.split()
            words += [" "] * (n - len(words))  # no word is a space: a short text's only gram is like no other
            hashes.extend(map(hash, words))
            lengths.append(len(words))
        word, length = np.array(hashes).astype(np.uint64), np.array(lengths)
        windows = max(len(word) - n + 1, 0)
        grams = np.zeros(windows, dtype=np.uint64)
        for place in range(n):
            grams *= np.uint64(0x9E3779B97F4A7C13)
            grams += word[place : place + windows]
        inside = np.ones(windows, dtype=bool)
        for back in range(1, n):
            inside[length.cumsum()[:-1] - back] = False  # these windows reach into the next row
        self.grams, self.rows = grams[inside], np.repeat(np.arange(len(examples), dtype=np.int32), length - n + 1)


def _pair(
    left_name: str, left: _Split, right_name: str, right: _Split, max_overlap: float
) -> tuple[Pair, list[Overlap]]:
    """Compare two splits; with the summary come the worst overlaps."""
    import numpy as np

    if not left.examples:
        return Pair(left_name, right_name, 0, 0, 0, 0.0, 0.0, 0.0, 0.0), []
    duplicate = np.array([right.first.get(text, -1) for text in left.texts])
    exact = duplicate >= 0
    share, closest = _shares(left, right, skip=exact)
    share[exact], closest[exact] = 1, duplicate[exact]
    p50, p95 = np.percentile(share, [50, 95])
    near = (share > max_overlap) & ~exact
    summary = Pair(
        *(left_name, right_name, len(share), int(exact.sum()), int(near.sum())),
        *(float(share.mean()), float(p50), float(p95), float(share.max())),
    )
    worst = [
        Overlap(
            *(left_name, question.id, right_name, holder.id),
            *(float(share[row]), bool(exact[row]), question.user, holder.user),
        )
        for row in np.lexsort((~exact, -share))[:WORST]
        if share[row] > 0
        for question, holder in [(left.examples[row], right.examples[closest[row]])]
    ]
    return summary, worst


def _shares(left: _Split, right: _Split, skip: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The overlap of each row of ``left``, and the first row of ``right`` that holds as much (-1: none holds any).

    Boilerplate makes every row share something with every other, too many pairs to look at. So equal things are merged
    first: grams that occur in the same rows of ``right``, then its rows with the same grams (of those that occur in
    ``left``). Then each question looks only as far as it must, see ``_closest``.
    """
    import numpy as np
    from scipy import sparse

    def incidence(rows: NDArray[np.int32], grams: NDArray[np.intp], shape: tuple[int, int]) -> Any:
        matrix = sparse.csr_array((np.ones(len(rows), dtype=np.uint64), (rows, grams)), shape=shape)
        matrix.data[:] = 1  # repeats were added up
        return matrix

    vocabulary, columns = np.unique(left.grams, return_inverse=True)
    questions = incidence(left.rows, columns, (len(left.examples), len(vocabulary)))
    size = np.diff(questions.indptr)
    # Most grams of right are not in left. A table of their lowest bits rules nearly all out before the slow search.
    mask = np.uint64((1 << (8 * len(vocabulary)).bit_length()) - 1)
    table = np.zeros(int(mask) + 1, dtype=bool)
    table[vocabulary & mask] = True
    maybe = np.flatnonzero(table[right.grams & mask])
    columns = np.minimum(np.searchsorted(vocabulary, right.grams[maybe]), len(vocabulary) - 1)
    shared = vocabulary[columns] == right.grams[maybe]
    holders = incidence(right.rows[maybe[shared]], columns[shared], (len(right.examples), len(vocabulary)))

    # Sets are equal if the sums of random numbers drawn for their members are.
    draw = np.random.default_rng(0)
    used = np.flatnonzero(np.bincount(holders.indices, minlength=len(vocabulary)))
    questions, holders = questions[:, used], holders[:, used]
    signature = holders.T @ draw.integers(2**64, size=holders.shape[0], dtype=np.uint64)
    _, kept, merged = np.unique(signature, return_index=True, return_inverse=True)
    questions = (questions @ incidence(np.arange(len(used)), merged, (len(used), len(kept)))).tocsr()
    holders = holders[:, kept]
    signature = holders @ draw.integers(2**64, size=len(kept), dtype=np.uint64)
    first = np.sort(np.unique(signature, return_index=True)[1])  # in the rows' order, so that ties go to the first
    holders = holders[first]

    postings, weight = holders.tocsc(), np.zeros(len(kept))
    hits, closest = np.zeros(len(size)), np.full(len(size), -1)
    for row in np.flatnonzero((np.diff(questions.indptr) > 0) & ~skip):
        span = slice(questions.indptr[row], questions.indptr[row + 1])
        grams = questions.indices[span]
        weight[grams] = questions.data[span]
        hits[row], best = _closest(grams, weight, holders, postings)
        closest[row] = first[best]
        weight[grams] = 0
    return hits / size, closest


def _closest(grams: NDArray[np.int32], weight: NDArray[np.float64], holders: Any, postings: Any) -> tuple[float, int]:
    """The largest total weight of ``grams`` in one row of ``holders``, and the first such row.

    It looks up the rows of the rarest grams, and of more grams only until no row that holds none of them can win.
    """
    import numpy as np

    frequency = postings.indptr[grams + 1] - postings.indptr[grams]
    order = np.argsort(frequency, kind="stable")
    grams, looked_up = grams[order], frequency[order].cumsum()
    unseen = weight[grams].sum() - weight[grams].cumsum()
    budget = BUDGET
    while True:
        known = max(int(np.searchsorted(looked_up, budget, side="right")), 1)
        posted, owner = _members(postings, grams[:known])
        score, rest = np.bincount(posted, weights=weight[grams[:known]][owner]), unseen[known - 1]
        rows = np.flatnonzero((score > 0) & (score + rest >= score.max()))
        held, owner = _members(holders, rows)
        score = np.bincount(owner, weights=weight[held])
        best = int(score.argmax())
        if score[best] > rest or known == len(grams):
            return float(score[best]), int(rows[best])
        budget *= 16


def _members(matrix: Any, lines: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """The entries of some lines of a compressed matrix end to end, and for each the place of its line in ``lines``."""
    import numpy as np

    start, length = matrix.indptr[lines], matrix.indptr[lines + 1] - matrix.indptr[lines]
    owner = np.repeat(np.arange(len(lines)), length)
    return matrix.indices[np.arange(len(owner)) + (start - length.cumsum() + length)[owner]], owner
