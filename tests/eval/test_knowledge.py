"""A gain split into knowledge, guessing and form: simulated models whose knowledge is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import log

import pytest

from sftlab.eval.knowledge import FEWEST, constant, debiased, knowledge, prior, split, unknown
from sftlab.records import Prediction

LETTERS = "ABCDE"
EVEN = [0.2] * 5
ALWAYS_C = [0.02, 0.02, 0.92, 0.02, 0.02]
UNEVEN = [0.1, 0.1, 0.5, 0.2, 0.1]  # right answers, of which half are C


def row(number: int, target: str, answer: str | None, forced: str | None = None, **values: object) -> Prediction:
    readings = {"strict": answer, "forced": answer or forced}
    made = Prediction(str(number), "", "", "stop", answer, target, answer == target, None, readings, choices=LETTERS)
    return replace(made, **values)  # type: ignore[arg-type]


def model(
    draw: random.Random, targets: Sequence[str], knows: float, guesses: list[float], silent: float
) -> list[Prediction]:
    """Answers of a model that knows a share of the questions, and guesses the others with a preference for letters.

    A share of the answers is not stated. For these, letters have log-probabilities: the preference and some noise, and
    more for a letter that is known.
    """
    rows = []
    for number, target in enumerate(targets):
        known = draw.random() < knows
        if draw.random() >= silent:
            rows.append(row(number, target, target if known else draw.choices(LETTERS, guesses)[0]))
            continue
        values = {letter: log(p) + draw.gauss(0, 0.3) for letter, p in zip(LETTERS, guesses, strict=True)}
        values[target] += 3 * known
        forced = max(values, key=lambda letter: values[letter])
        rows.append(row(number, target, None, forced, forced_logprobs=values))
    letters = debiased(rows)
    return [
        replace(one, readings={**one.readings, "debiased": letters.get(place, one.readings["forced"])})
        for place, one in enumerate(rows)
    ]


def targets(draw: random.Random, n: int, shares: list[float]) -> list[str]:
    return draw.choices(LETTERS, shares, k=n)


# What each model knows; the letters that the first prefers; the answers that each does not state; the right answers.
STUDIES = [
    (0.0, 0.0, ALWAYS_C, 1.0, 0.0, EVEN),  # the demo's base model against one that learned the form only
    (0.0, 0.0, ALWAYS_C, 1.0, 0.1, UNEVEN),
    (0.1, 0.5, ALWAYS_C, 1.0, 0.0, EVEN),
    (0.3, 0.3, EVEN, 0.5, 0.2, UNEVEN),
]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "prefers", "silent", "quiet", "shares"), STUDIES)
def test_the_interval_of_a_gain_in_knowledge_covers_it(
    first: float, second: float, prefers: list[float], silent: float, quiet: float, shares: list[float]
) -> None:
    draw = random.Random(1)
    covered, estimates, runs, n = 0, 0.0, 100, 60
    for _ in range(runs):
        right = targets(draw, n, shares)
        a, b = model(draw, right, first, prefers, silent), model(draw, right, second, EVEN, quiet)
        parts = split([a], [b], 0.05)
        assert parts is not None
        gain = sum(one.correct for one in b) / n - sum(one.correct for one in a) / n
        assert parts.knowledge.value + parts.guessing.value + parts.form.value == pytest.approx(gain)
        low, high = parts.knowledge.interval
        covered += low <= second - first <= high
        estimates += parts.knowledge.value
    assert 0.9 <= covered / runs < 1  # 0.95, and two standard errors of 100 studies are 0.04
    assert estimates / runs == pytest.approx(second - first, abs=0.04)


@pytest.mark.parametrize(("groups", "size"), [(1, 40), (2, 20), (5, 10)])
def test_few_groups_that_are_known_as_a_whole_show_no_gain(groups: int, size: int) -> None:
    draw = random.Random(3)
    claims, runs = 0, 60
    for _ in range(runs):
        right, sides = targets(draw, groups * size, EVEN), []
        for _ in "ab":
            knows = [float(draw.random() < 0.5) for _ in range(groups)]
            parts = [model(draw, right[g * size : (g + 1) * size], knows[g], EVEN, 0) for g in range(groups)]
            rows = [replace(one, group=str(g)) for g, part in enumerate(parts) for one in part]
            sides.append([replace(one, id=str(number)) for number, one in enumerate(rows)])
        parts_of = split([sides[0]], [sides[1]], 0.05)
        claims += parts_of is not None and parts_of.outcome != "inconclusive"
    assert claims / runs <= 0.05


def test_a_model_that_always_answers_c_knows_nothing() -> None:
    """However often C is right, stated or forced, and also if a few letters differ."""
    draw = random.Random(2)
    right = targets(draw, 200, UNEVEN)
    for silent, prefers in ((0.0, [0, 0, 1, 0, 0]), (1.0, ALWAYS_C), (0.3, ALWAYS_C)):
        rows = model(draw, right, 0, [max(p, 1e-9) for p in prefers], silent)
        known = knowledge([rows], 0.05)
        assert known is not None
        assert known.interval[0] < 0 < known.interval[1]
        assert abs(known.value) < 0.1
        assert sum(one.readings["forced"] == one.target for one in rows) > 80  # by luck
    best = constant(rows)
    assert (best.answer, best.correct) == ("C", right.count("C"))


def test_a_gain_by_stating_guesses_is_guessing_and_not_form() -> None:
    """The first model states nothing, the second guesses: all of its right answers are luck."""
    draw = random.Random(13)
    right = targets(draw, 1000, EVEN)
    parts = split([model(draw, right, 0, ALWAYS_C, 1)], [model(draw, right, 0, EVEN, 0)], 0.05)
    assert parts is not None
    assert parts.outcome == "inconclusive"
    assert parts.guessing.value == pytest.approx(0.2, abs=0.04)
    assert parts.form.value == pytest.approx(0, abs=0.04)


def test_a_gain_by_stating_what_was_known_is_form() -> None:
    draw = random.Random(14)
    right = targets(draw, 1000, EVEN)
    parts = split([model(draw, right, 0.6, EVEN, 1)], [model(draw, right, 0.6, EVEN, 0)], 0.05)
    assert parts is not None
    assert parts.form.value == pytest.approx(0.6, abs=0.06)
    assert parts.guessing.value == pytest.approx(0.08, abs=0.03)  # a fifth of what is not known
    assert parts.knowledge.interval[0] < 0 < parts.knowledge.interval[1]


def test_what_a_preferred_letter_hides_is_found_without_its_prior() -> None:
    draw = random.Random(5)
    rows = model(draw, targets(draw, 300, EVEN), 0.5, [0.005, 0.005, 0.98, 0.005, 0.005], 1)
    plain = [replace(one, readings={"strict": None, "forced": one.readings["forced"]}) for one in rows]
    found, hidden = knowledge([rows], 0.05), knowledge([plain], 0.05)
    assert found is not None
    assert hidden is not None
    assert hidden.value < 0.2 < 0.45 < found.value
    assert found.prior["C"] > 0.9
    assert found.forced["C"] > 250


def test_a_prior_needs_enough_forced_choices_of_the_same_letters() -> None:
    draw = random.Random(6)
    rows = model(draw, targets(draw, FEWEST, EVEN), 0, ALWAYS_C, 1)
    assert len(debiased(rows)) == FEWEST
    assert not debiased(rows[1:])
    assert not prior(rows[1:])
    other = dict.fromkeys("ABC", -1.0)
    assert len(debiased([*rows, replace(rows[0], forced_logprobs=other)])) == FEWEST
    assert not debiased([replace(one, forced_logprobs=None) for one in rows])


def test_nothing_is_said_about_knowledge_without_a_letter_for_every_question() -> None:
    draw = random.Random(7)
    a, b = (model(draw, targets(draw, 50, EVEN), 0.5, EVEN, 0) for _ in range(2))
    assert split([a], [b], 0.05) is not None
    a[3] = row(3, "A", None)
    assert split([a], [b], 0.05) is None
    assert split([b], [a], 0.05) is None
    assert knowledge([a], 0.05) is None
    assert unknown({"x": [b], "y": [b, a]}) == "1 of 50 questions have neither an answer nor a forced choice of y"
    same = [row(number, "A", "A") for number in range(5)]
    assert unknown({"x": [same]}) == "one letter is the right answer of every question"
    assert unknown({"x": [[]]}) == "there are no questions"


def test_letters_are_dealt_among_questions_with_the_same_choices() -> None:
    """Yes-or-no questions beside questions with five options: guesses that fit the options are not knowledge."""
    draw = random.Random(8)
    rows = []
    for number in range(2000):
        choices = "AB" if number % 2 else "CDEFGHIJ"
        target, answer = draw.choice(choices), draw.choice(choices)
        rows.append(replace(row(number, target, answer), choices=choices))
    known = knowledge([rows], 0.05)
    assert known is not None
    assert known.interval[0] < 0 < known.interval[1]


def test_several_answers_to_a_question_are_averaged() -> None:
    """The parts add up to the difference of averages; copies of an answer add nothing, new answers narrow intervals."""
    draw = random.Random(10)
    right, n, narrower, covered = targets(draw, 100, EVEN), 100, 0, 0
    for _ in range(20):
        a = [model(draw, right, 0.2, ALWAYS_C, 0.5) for _ in range(3)]
        b = [model(draw, right, 0.5, EVEN, 0.1) for _ in range(2)]
        several, single, copied = split(a, b, 0.05), split(a[:1], b[:1], 0.05), split(a[:1] * 3, b[:1] * 2, 0.05)
        assert several is not None
        assert single is not None
        assert copied is not None
        assert copied.p_value == pytest.approx(single.p_value)
        first, second = (sum(one.correct for rows in runs for one in rows) / n / len(runs) for runs in (a, b))
        parts = (several.knowledge, several.guessing, several.form)
        assert sum(part.value for part in parts) == pytest.approx(second - first)
        low, high = several.knowledge.interval
        narrower += high - low < single.knowledge.interval[1] - single.knowledge.interval[0]
        covered += low <= 0.3 <= high
    assert narrower == 20
    assert covered >= 17  # fewer in 0.3 % of tries with 95 %


def test_groups_of_questions_count_once() -> None:
    draw = random.Random(9)
    right = targets(draw, 60, EVEN)
    a, b = model(draw, right, 0.2, EVEN, 0), model(draw, right, 0.5, EVEN, 0)
    alone = split([a], [b], 0.05)
    many = [[replace(one, group=one.id) for one in rows for _ in range(10)] for rows in (a, b)]
    copied = split([many[0]], [many[1]], 0.05)
    assert alone is not None
    assert copied is not None
    assert copied.knowledge.value == pytest.approx(alone.knowledge.value)
    width = alone.knowledge.interval[1] - alone.knowledge.interval[0]
    assert copied.knowledge.interval[1] - copied.knowledge.interval[0] == pytest.approx(width, rel=0.1)
