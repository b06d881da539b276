"""Split accuracy in multiple choice into knowledge, guessing and form.

A model that always answers C is right in every question whose answer is C, and knows nothing. So knowledge is what the
letters have in common with the questions: the share of right letters, minus the share that the same letters would have
if they were dealt to the questions at random (Cohen 1960), scaled so that a model without errors has 1. If a model
either knows an answer or guesses without regard to the question, this is the share of questions that it knows,
whichever letters it prefers (the classical correction for guessing).

Every question needs a letter for this: the stated answer, or a forced choice. Most models prefer a letter in forced
choices, so its prior is divided out first (PriDe, arXiv 2309.03882, here estimated over the test questions instead of
permuted options, as in arXiv 2309.17249): a letter's log-probability minus its mean over the questions.

Several answers of a model to each question are averaged: knowledge is computed for each generation, and the mean of a
question's values is its value. So the parts add up to the difference of the averaged accuracies, and a question counts
once, however many answers it has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftlab.records import Prediction
from sftlab.results import Constant, Knowledge, Outcome, Part, Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sftlab.eval.scorers.base import Runs

FEWEST = 20
"""Forced choices from which a prior is estimated. It changes little if there are fewer, and they estimate it badly."""

LOWEST = -30.0
"""Smallest log-probability that counts, in nats: one letter of probability 0 must not decide a mean."""


def debiased(rows: Sequence[Prediction]) -> dict[int, str]:
    """The most likely letter of each forced choice after the prior is divided out, by the row's place.

    Rows with the same choices share a prior. Empty if there are too few of them, or no log-probabilities.
    """
    letters = {}
    for choices, places in _forced(rows).items():
        scores = _scores(rows, places, choices)
        scores -= scores.mean(axis=0)
        letters.update({place: choices[best] for place, best in zip(places, scores.argmax(axis=1), strict=True)})
    return letters


def prior(rows: Sequence[Prediction]) -> dict[str, float]:
    """The prior that is divided out of forced choices, as probabilities: that of the most common choices."""
    import numpy as np

    forced = _forced(rows)
    if not forced:
        return {}
    choices = max(forced, key=lambda choices: len(forced[choices]))
    weights = np.exp(_scores(rows, forced[choices], choices).mean(axis=0))
    return {letter: float(weight) for letter, weight in zip(choices, weights / weights.sum(), strict=True)}


def _forced(rows: Sequence[Prediction]) -> dict[str, list[int]]:
    """The places of the rows whose letter is a forced choice with log-probabilities, by their choices."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if is_forced(row) and row.forced_logprobs:
            places["".join(sorted(row.forced_logprobs))].append(place)
    return {choices: own for choices, own in places.items() if len(own) >= FEWEST}


def _scores(rows: Sequence[Prediction], places: Sequence[int], choices: str) -> NDArray[np.float64]:
    import numpy as np
    from scipy.special import log_softmax

    known = [rows[place].forced_logprobs or {} for place in places]
    values = np.array([[max(LOWEST, of[letter]) for letter in choices] for of in known], dtype=np.float64)
    scores: NDArray[np.float64] = log_softmax(values, axis=1)
    return scores


def is_forced(row: Prediction) -> bool:
    """Whether a row's letter is a forced choice: no answer was extracted."""
    return row.answer is None and row.readings.get("strict") is None and row.readings.get("forced") is not None


def has_letter(row: Prediction) -> bool:
    """Whether a row has a letter: a stated answer, or a forced choice."""
    return _letter(row) is not None


def constant(rows: Sequence[Prediction]) -> Constant:
    """The best constant answer: the letter that is right most often."""
    right: dict[str, int] = defaultdict(int)
    for row in rows:
        for target in row.accepted:
            right[target] += 1
    answer = max(sorted(right), key=lambda letter: right[letter])
    return Constant(answer=answer, correct=right[answer])


def unknown(named: Mapping[str, Runs]) -> str | None:
    """Why knowledge cannot be separated from guessing; None if it can.

    ``named`` has the predictions of each model by the name that a message uses. Every generation needs its letters.
    """
    for name, runs in named.items():
        if missing := sum(not all(map(has_letter, answers)) for answers in zip(*runs, strict=True)):
            return f"{missing} of {len(runs[0])} questions have neither an answer nor a forced choice of {name}"
    rows = next(iter(named.values()))[0]
    if not rows:
        return "there are no questions"
    if not 1 - _dealt(rows, [None] * len(rows)).ceiling > 1e-9:
        return "one letter is the right answer of every question"
    return None


def knowledge(runs: Runs, alpha: float) -> Knowledge | None:
    """Summarise the letters of one model; None if it has none for some question."""
    if unknown({"": runs}) is not None:
        return None
    known = _averaged(runs, _letter)[1]
    forced: dict[str, int] = defaultdict(int)
    for row in (row for rows in runs for row in rows):
        if is_forced(row):
            forced[row.readings["forced"] or ""] += 1
    return Knowledge(
        value=float(known.mean()),
        interval=_mean(known, runs[0], alpha)[0].interval,
        level=1 - alpha,
        forced=dict(sorted(forced.items())),
        prior=prior(runs[0]),
    )


def split(a: Runs, b: Runs, alpha: float) -> Split | None:
    """Split the difference of two models in right answers into three parts that add up to it.

    - ``knowledge``: more questions known, by the letters of all questions.
    - ``form``: more of what is known is stated as an answer.
    - ``guessing``: the rest, which is luck: a stated guess is right now and then, no answer never is.

    None if a model has no letter for some question.
    """
    if unknown({"a": a, "b": b}) is not None:
        return None
    parts = []
    for runs in (a, b):
        known = _averaged(runs, _letter)[1]
        right, stated = _averaged(runs, lambda row: row.answer)
        parts.append((known, right - stated, stated - known))
    known, luck, form = (second - first for first, second in zip(*parts, strict=True))
    gain, p = _mean(known, a[0], alpha)
    outcome: Outcome = "inconclusive" if p >= alpha else "better" if gain.value > 0 else "worse"
    return Split(
        knowledge=gain,
        guessing=_mean(luck, a[0], alpha)[0],
        form=_mean(form, a[0], alpha)[0],
        level=1 - alpha,
        p_value=p,
        outcome=outcome,
    )


def _letter(row: Prediction) -> str | None:
    """A row's letter: stated or forced, without the prior if that was divided out."""
    return row.readings.get("debiased") or row.readings.get("forced")


def _averaged(
    runs: Runs, letter: Callable[[Prediction], str | None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average ``right`` and ``known`` of each question over generations."""
    import numpy as np

    dealt = [_dealt(rows, [letter(row) for row in rows]) for rows in runs]
    return np.mean([one.right for one in dealt], axis=0), np.mean([one.known for one in dealt], axis=0)


@dataclass(frozen=True)
class _Dealt:
    """Letters compared with the same letters dealt to the questions at random.

    Attributes:
        right: 1 for each right letter, 0 for others.
        known: A value for each question. Their mean is the knowledge, and their spread its uncertainty: they are the
            influence of each question on an estimate that depends on the shares of all letters (the delta method).
        ceiling: The share of right letters of a model without errors whose letters are dealt at random.
    """

    right: NDArray[np.float64]
    known: NDArray[np.float64]
    ceiling: float


def _dealt(rows: Sequence[Prediction], letters: Sequence[str | None]) -> _Dealt:
    import numpy as np

    n = len(rows)
    right = np.array([letter in row.accepted for row, letter in zip(rows, letters, strict=True)], dtype=np.float64)
    above, spread, ceiling = np.zeros(n), np.zeros(n), 0.0
    for places in _by_choices(rows).values():
        of = [(rows[place].accepted, letters[place]) for place in places]
        given = _shares([[] if letter is None else [letter] for _, letter in of])
        correct = _shares([accepted for accepted, _ in of])
        perfect = _shares([accepted for accepted, _ in of], evenly=True)
        chance = sum(share * correct[letter] for letter, share in given.items())
        best = sum(share * correct[letter] for letter, share in perfect.items())
        ceiling += best * len(places) / n
        for place, (accepted, letter) in zip(places, of, strict=True):
            by_chance = sum(given[target] for target in accepted) + (correct[letter] if letter is not None else 0.0)
            above[place] = right[place] - by_chance + chance
            own = sum(correct[target] for target in accepted) / len(accepted)
            spread[place] = own + sum(perfect[target] for target in accepted) - 2 * best
    room = max(1 - ceiling, 1e-9)
    return _Dealt(right, (above + above.mean() / room * spread) / room, ceiling)


def _by_choices(rows: Sequence[Prediction]) -> dict[str, list[int]]:
    """The places of the rows with the same choices: letters are dealt among them only."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        places[row.choices].append(place)
    return places


def _shares(of: Sequence[Sequence[str]], *, evenly: bool = False) -> dict[str, float]:
    """The share of questions that have each letter; ``evenly`` divides a question among its letters."""
    shares: dict[str, float] = defaultdict(float)
    for letters in of:
        for letter in letters:
            shares[letter] += 1 / len(of) / (len(letters) if evenly else 1)
    return shares


def _mean(values: NDArray[np.float64], rows: Sequence[Prediction], alpha: float) -> tuple[Part, float]:
    """Mean of the questions' values with its confidence interval, from whole groups of rows, and p of a mean of 0.

    One question more with +1 and one with −1 are counted, as Bonett and Price (2012) do for paired differences of
    proportions: without them, an interval from few changes is too narrow, and one from none has no width. They add no
    degrees of freedom to those of groups, and a mean over one group shows nothing.
    """
    import numpy as np
    from scipy.stats import t

    numbers: dict[object, int] = {}
    names = [number if row.group is None else row.group for number, row in enumerate(rows)]
    of_row = [numbers.setdefault(name, len(numbers)) for name in names]
    sums = np.append(np.bincount(of_row, weights=values), [1.0, -1.0])
    sizes = np.append(np.bincount(of_row), [1.0, 1.0])
    count, total = len(sums) if len(numbers) == len(rows) else len(numbers), sizes.sum()
    if count == 1:
        return Part(value=float(values.mean()) + 0.0, interval=(-1.0, 1.0)), 1.0
    mean = float(sums.sum() / total)
    error = math.sqrt(count / (count - 1) * float(((sums - mean * sizes) ** 2).sum()) / total**2)
    reach = float(t.ppf(1 - alpha / 2, count - 1)) * error
    interval = max(-1.0, mean - reach), min(1.0, mean + reach)
    return Part(value=float(values.mean()) + 0.0, interval=interval), float(2 * t.sf(abs(mean) / error, count - 1))
