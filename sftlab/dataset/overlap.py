"""Detect leakage between splits: questions of a later split that an earlier split contains in full or in large part."""

# Libraries for near duplicates (datasketch and other MinHash indexes) estimate Jaccard similarity, which misses a short
# question inside a long row. This module computes exact containment.

from __future__ import annotations

import re
import textwrap
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.records import Example
from sftlab.results import OverlapPair, OverlapReport, OverlapRow

SPLITS = ("train", "validation", "test")
PAIRS = (("validation", "train"), ("test", "train"), ("test", "validation"))  # the later split is examined
WORST = 10
BUDGET = 1024  # rows looked up for one question before it is compared with all
TABLE = 2**22  # cells of the tables in which questions are compared with all (16 MiB each)


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
    """Find the questions (``Example.question``) that an earlier split contains.

    The overlap of a question is the largest share of its distinct word n-grams that a single row of the other split
    contains. Of rows with the same share, an exact duplicate is reported before others, then the first row. Shares are
    exact, and frequent grams count too. Grams are compared by 64-bit hashes: among 25 million grams, the chance that
    any two have the same hash is 1 in 50,000.

    A question of fewer than ``n`` words is a single gram, so it is detected as an exact duplicate only. The same holds
    for text in a script without spaces between words. A missing split counts as empty.

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
    read = {name: _Split(name, splits.get(name, ()), n) for name in SPLITS}
    pairs, overlaps = zip(*(_pair(read[left], read[right], max_overlap) for left, right in PAIRS), strict=True)
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


class _Split:
    """Normalised texts of a split, the first row of each text, and hash and row of every n-gram (with repeats)."""

    def __init__(self, name: str, examples: Sequence[Example], n: int) -> None:
        self.name, self.examples = name, examples
        self.texts = [normalise_question(example.question) for example in examples]
        self.first = {text: row for row, text in reversed(list(enumerate(self.texts)))}
        hashes, lengths = array("q"), array("q")
        for text in self.texts:
            words = text.split()
            words += [" "] * (n - len(words))  # no word is a space, so the only gram of a short text is unique
            hashes.extend(map(hash, words))
            lengths.append(len(words))
        word = np.array(hashes).astype(np.uint64)
        grams = np.zeros(max(len(word) - n + 1, 0), dtype=np.uint64)
        for place in range(n):
            grams *= np.uint64(0x9E3779B97F4A7C13)
            grams += word[place : place + len(grams)]
        self.rows = np.repeat(np.arange(len(examples)), np.array(lengths) - n + 1)
        self.grams = grams[np.arange(len(self.rows)) + self.rows * (n - 1)]  # n - 1 windows extend into the next row


def _pair(left: _Split, right: _Split, max_overlap: float) -> tuple[OverlapPair, list[OverlapRow]]:
    """Compare two splits; return the statistics and the worst overlaps."""
    names = {"left_split": left.name, "right_split": right.name}
    if not left.examples:
        nothing = dict.fromkeys(("examined", "exact", "near", "mean", "p50", "p95", "max"), 0)
        return OverlapPair.model_validate(names | nothing), []
    duplicate = np.array([right.first.get(text, -1) for text in left.texts])
    exact = duplicate >= 0
    share, closest = _shares(left, right, skip=exact)
    share[exact], closest[exact] = 1, duplicate[exact]
    p50, p95 = np.percentile(share, [50, 95])
    worst = []
    for row in np.lexsort((~exact, -share))[: min(WORST, np.count_nonzero(share))]:
        question, holder = left.examples[row], right.examples[closest[row]]
        worst.append(
            OverlapRow(
                **names,
                left_id=question.id,
                right_id=holder.id,
                share=float(share[row]),
                exact=bool(exact[row]),
                left_text=question.question,
                right_text=holder.question,
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


def _shares(left: _Split, right: _Split, skip: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the overlap of each row of ``left``, and the first row of ``right`` with that overlap (-1 for none).

    Boilerplate makes every row share grams with every other row, which gives too many pairs to compare. Therefore equal
    columns and rows are merged first: grams in the same rows of ``right``, then rows with the same grams (of those
    that ``left`` has too).
    """
    from scipy import sparse

    def incidence(rows: NDArray[np.int64], grams: NDArray[np.int64], shape: tuple[int, int]) -> Any:
        matrix = sparse.csr_array((np.ones(len(rows), dtype=np.uint64), (rows, grams)), shape=shape)
        matrix.data[:] = 1  # repeats were summed
        return matrix

    vocabulary, columns = np.unique(left.grams, return_inverse=True)
    questions = incidence(left.rows, columns, (len(left.examples), len(vocabulary)))
    size = np.diff(questions.indptr)
    # Most grams of right are not in left: a table of the lowest bits excludes nearly all before the slow search.
    bits = np.uint64((1 << (8 * len(vocabulary)).bit_length()) - 1)
    table = np.zeros(int(bits) + 1, dtype=bool)
    table[vocabulary & bits] = True
    maybe = np.flatnonzero(table[right.grams & bits])
    columns = np.searchsorted(vocabulary[:-1], right.grams[maybe])
    shared = vocabulary[columns] == right.grams[maybe]
    holders = incidence(right.rows[maybe[shared]], columns[shared], (len(right.examples), len(vocabulary)))
    # Two sets are equal if the sums of random numbers drawn for their members are equal.
    draw = np.random.default_rng(0)
    used = np.flatnonzero(np.bincount(holders.indices, minlength=len(vocabulary)))
    questions, holders = questions[:, used], holders[:, used]
    signature = holders.T @ draw.integers(2**64, size=holders.shape[0], dtype=np.uint64)
    _, kept, merged = np.unique(signature, return_index=True, return_inverse=True)
    questions = questions @ incidence(np.arange(len(used)), merged, (len(used), len(kept)))
    signature = holders[:, kept] @ draw.integers(2**64, size=len(kept), dtype=np.uint64)
    first = np.sort(np.unique(signature, return_index=True)[1])  # in the order of rows: ties go to the first row
    holders, questions = holders[first][:, kept].astype(np.float32), questions.astype(np.float32)
    postings, weight = holders.tocsc(), np.zeros(len(kept))
    hits, closest, undecided = np.zeros(len(size)), np.full(len(size), -1), []
    for row in np.flatnonzero((np.diff(questions.indptr) > 0) & ~skip):
        span = slice(*questions.indptr[row : row + 2])
        grams = questions.indices[span]
        weight[grams] = questions.data[span]
        if match := _closest(grams, weight, holders, postings):
            hits[row], closest[row] = match[0], first[match[1]]
        else:
            undecided.append(row)
        weight[grams] = 0
    step = 1 + TABLE // (1 + max(holders.shape))
    for some in (undecided[start : start + step] for start in range(0, len(undecided), step)):
        score = np.ascontiguousarray((holders @ questions[some].T.toarray()).T)
        hits[some], closest[some] = score.max(axis=1), first[score.argmax(axis=1)]
    return hits / size, closest


def _closest(grams: NDArray[Any], weight: NDArray[Any], holders: Any, postings: Any) -> tuple[float, int] | None:
    """Return the largest total weight of ``grams`` in a row of ``holders``, and the first such row.

    Only the rows with the rarest grams are examined; None means that another row may contain as much.
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
    """Concatenate the entries of lines of a compressed matrix; return them, and the index in ``lines`` of each."""
    start, length = matrix.indptr[lines], matrix.indptr[lines + 1] - matrix.indptr[lines]
    owner = np.repeat(np.arange(len(lines)), length)
    return matrix.indices[np.arange(len(owner)) + (start - length.cumsum() + length)[owner]], owner
