from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftlab.dataset import containment, overlap
from sftlab.dataset.overlap import describe, find_overlaps, normalise_question
from sftlab.records import Example, single_turn
from sftlab.results import OverlapPair, OverlapReport, OverlapRow


def rows(name: str, texts: Sequence[str]) -> list[Example]:
    return [
        Example(f"{name}-{row}", single_turn("system", text, "assistant"), "target") for row, text in enumerate(texts)
    ]


def splits(
    train: Sequence[str] = (), validation: Sequence[str] = (), test: Sequence[str] = ()
) -> dict[str, list[Example]]:
    return {"train": rows("train", train), "validation": rows("validation", validation), "test": rows("test", test)}


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user turns of an example are the paragraphs of its text."""
    monkeypatch.setattr(overlap, "asked", lambda example: (example.question, example.question.split("\n\n")[0]))


def numbered(first: int, last: int) -> str:
    return " ".join(f"word{number}" for number in range(first, last))


def pair(report: OverlapReport, left: str, right: str) -> OverlapPair:
    (actual,) = (pair for pair in report.pairs if (pair.left_split, pair.right_split) == (left, right))
    return actual


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = normalise_question(text).split()
    return {tuple(words[at : at + n]) for at in range(max(len(words) - n, 0) + 1)}


def statistics(*values: Any) -> OverlapPair:
    """A pair with its fields in order."""
    return OverlapPair.model_validate(dict(zip(OverlapPair.model_fields, values, strict=True)))


def by_definition(data: dict[str, list[Example]], limit: float, n: int) -> tuple[list[OverlapPair], list[tuple]]:
    """The report's pairs and all its overlaps (without texts), written down as plainly as the definition."""
    pairs, actual = [], []
    for left, right in (("validation", "train"), ("test", "train"), ("test", "validation")):
        shares, exact, near = [], 0, 0
        for question in data[left]:
            own, best = grams(question.question, n), (0.0, False, "")
            for row in data[right]:
                same = normalise_question(question.question) == normalise_question(row.question)
                share = len(own & grams(row.question, n)) / len(own)
                if (share, same) > best[:2]:
                    best = (share, same, row.id)
            shares.append(best[0])
            exact += best[1]
            near += best[0] > limit and not best[1]
            if best[0] > 0:
                actual.append((left, question.id, right, best[2], best[0], best[1]))
        p50, p95 = np.percentile(shares, [50, 95]) if shares else (0.0, 0.0)
        mean = float(np.mean(shares)) if shares else 0.0
        pairs.append(statistics(left, right, len(shares), exact, near, mean, p50, p95, max(shares, default=0.0)))
    return pairs, sorted(actual, key=lambda overlap: (-overlap[4], not overlap[5]))


def plain(worst: Sequence[OverlapRow]) -> list[tuple]:
    return [(o.left_split, o.left_id, o.right_split, o.right_id, o.share, o.exact) for o in worst]


def random_splits(seed: int) -> dict[str, list[Example]]:
    """Few words and copied pieces, so that grams repeat within rows, across rows and across splits."""
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(rng.choice([2, 4, 30]))]
    pieces = [rng.choices(words, k=rng.randint(1, 25)) for _ in range(rng.choice([2, 6, 40]))]

    def text() -> str:
        parts = [
            rng.choice(pieces) if rng.random() < 0.8 else rng.choices(words, k=3) for _ in range(rng.randint(0, 4))
        ]
        return " ".join(rng.choice((str.upper, str.lower, "{}, ".format))(word) for part in parts for word in part)

    return splits(*([text() for _ in range(rng.choice([1, 10, 60]))] for _ in range(3)))


@pytest.mark.parametrize("budget", [1, 1024])
@pytest.mark.parametrize("seed", range(18))  # each n and limit twice
def test_report_equals_the_definition(seed: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "WORST", 1000)
    monkeypatch.setattr(containment, "TABLE", budget)
    monkeypatch.setattr(containment, "BUDGETS", (budget, 8 * budget))  # of 1: these small splits must look further
    monkeypatch.setattr(overlap, "CHUNK", 100 * budget)  # of 100: a few rows at once
    monkeypatch.setattr(overlap, "BLOCK", 500 * budget)
    data, n, limit = random_splits(seed), (1, 3, 8)[seed % 3], (0.0, 0.5, 0.8)[seed // 3 % 3]
    report = find_overlaps(data, max_overlap=limit, n=n)
    pairs, worst = by_definition(data, limit, n)
    for got, expected in zip(report.pairs, pairs, strict=True):
        assert vars(got) == pytest.approx(vars(expected))
    assert plain(report.worst) == worst
    assert report.leaking == sum(pair.exact + pair.near for pair in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_rare_words_first_equals_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows of rare and frequent words, where the rows of the rarest words often do not hold the most."""
    monkeypatch.setattr(overlap, "WORST", 1000)
    monkeypatch.setattr(containment, "TABLE", 2000)
    monkeypatch.setattr(containment, "BUDGETS", (60, 200))
    rng = random.Random(seed)
    words, odds = [f"w{rank}" for rank in range(60)], [1 / (rank + 1) for rank in range(60)]
    texts = [" ".join(rng.choices(words, odds, k=12)) for _ in range(500)]
    data = splits(texts[:400], texts[400:450], texts[450:])
    report = find_overlaps(data, max_overlap=0.6, n=1)
    pairs, worst = by_definition(data, 0.6, 1)
    for got, expected in zip(report.pairs, pairs, strict=True):
        assert vars(got) == pytest.approx(vars(expected))
    assert plain(report.worst) == worst


def test_the_row_with_the_most_rare_words_need_not_hold_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containment, "BUDGETS", (5,))  # just the rows of a, b, c, d and e
    extra = [f"x{number}" for number in range(300)]
    train = [
        "a b c often1 often2",
        "d e often1 often2 often3 often4",
        *(f"often1 often2 often3 often4 {x}" for x in extra),
    ]
    report = find_overlaps(
        splits(train, test=["a b c d e often1 often2 often3 often4", " ".join(extra)]), max_overlap=0.5, n=1
    )
    assert plain(report.worst)[0] == ("test", "test-0", "train", "train-1", 6 / 9, False)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("Don't “stop” – it’s (well-known)…", "dont stop its well known"),
        ("Straße ＡＢＣ ﬁne", "strasse abc fine"),
        ("𝐁ǰ", "bǰ"),  # the first has no lower case of its own, the second is taken apart by casefold
        ("हिन्दी में।", "हिन्दी में"),
        ("3.5 + -2 = 1.5.", "3.5 + -2 = 1.5"),
        ("?!", ""),
    ],
)
def test_normalise(raw: str, expected: str) -> None:
    assert normalise_question(raw) == expected
    assert normalise_question(expected) == expected


@pytest.mark.parametrize("other", ["3 / 5", "3 + 5", "3 * -5", "3.5", "35"])
def test_two_sums_are_no_duplicates(other: str) -> None:
    assert normalise_question("What is 3 * 5?") != normalise_question(f"What is {other}?")


def test_exact_duplicate_in_other_dress() -> None:
    data = splits(
        train=[numbered(0, 30) + " and more", "x", numbered(0, 30)],
        test=[numbered(0, 30).upper().replace(" ", " -\n ") + "?!", numbered(50, 90)],
    )
    report = find_overlaps(data, max_overlap=1.0)
    actual = pair(report, "test", "train")
    assert (actual.examined, actual.exact, actual.near, actual.max) == (2, 1, 0, 1.0)
    (worst,) = report.worst
    # train-0 holds all of it too and comes first, but the duplicate is what a person wants to see
    assert (worst.left_id, worst.right_id, worst.share, worst.exact) == ("test-0", "train-2", 1.0, True)
    assert worst.left_text == data["test"][0].question
    assert report.leaking == 1


def test_a_contained_question_is_near_but_not_exact() -> None:
    report = find_overlaps(
        splits(train=[numbered(0, 30) + " and more"], validation=[numbered(0, 30)]), max_overlap=0.99
    )
    actual = pair(report, "validation", "train")
    assert (actual.exact, actual.near, actual.max) == (0, 1, 1.0)
    # The other way round, a long question is not leaked by a short row that is part of it.
    report = find_overlaps(splits(train=[numbered(0, 15)], validation=[numbered(0, 107)]), max_overlap=0.5)
    assert pair(report, "validation", "train").max == 0.08
    assert report.leaking == 0


def test_one_row_counts_not_the_union_of_rows() -> None:
    report = find_overlaps(splits(train=[numbered(0, 17), numbered(10, 27)], test=[numbered(0, 27)]), max_overlap=0.5)
    assert report.worst[0].share == 0.5
    assert report.worst[0].right_id == "train-0"
    assert report.leaking == 0  # the limit itself is not over the limit
    assert find_overlaps(splits(train=[numbered(0, 18)], test=[numbered(0, 27)]), max_overlap=0.5).leaking == 1


def test_short_questions_are_found_as_duplicates_only() -> None:
    data = splits(
        train=["one two three", "one two three four five six seven eight nine"], test=["One, two, three!", "two three"]
    )
    report = find_overlaps(data, max_overlap=0.1)
    assert [(o.left_id, o.right_id, o.exact) for o in report.worst] == [("test-0", "train-0", True)]
    assert pair(report, "test", "train").near == 0


def test_grams_do_not_reach_into_the_next_row() -> None:
    data = splits(train=[numbered(0, 10), numbered(10, 20)], test=[numbered(5, 15)])
    assert find_overlaps(data, max_overlap=0.5).worst == []


LONG = "How many tablets of 5 mg does a patient of 70 kg take?"


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize(
    ("train", "test", "leaks"),
    [
        (f"{LONG}\n\nAnd a child?", f"{LONG}\n\n{numbered(0, 50)}", True),
        (f"{LONG}\n\n{numbered(0, 50)}", LONG.upper(), True),
        (LONG, f"{LONG}\n\n{numbered(0, 50)}", True),
        (f"Hi\n\n{LONG}\n\nThanks", f"Hello!\n\n{LONG}", True),
        ("Hi\n\nWho are you?", "Hi\n\nWho are you?", True),
        (f"Hi\n\n{LONG}", f"Hi\n\n{numbered(0, 50)}", False),
        (f"Hey there!\n\n{LONG}", "hey there\n\nWho are you?", False),
        ("Hello", f"Hello\n\n{LONG}", False),
        (f"{LONG}\n\nWho are you?", f"{numbered(0, 50)}\n\nWho are you?", False),
        (f"{'药' * 40}\n\n{'一' * 99}", f"{'药' * 40}\n\n{'二' * 99}", True),
        (f"你好\n\n{'一' * 99}", f"你好\n\n{'二' * 99}", False),
    ],
)
def test_conversations(train: str, test: str, leaks: bool) -> None:
    assert find_overlaps(splits(train=["x", train], test=[test]), max_overlap=0.8).leaking == leaks


@pytest.mark.usefixtures("turns")
def test_a_conversation_is_a_closer_duplicate_than_its_opening() -> None:
    train = [f"{LONG}\n\nWhy?", f"{LONG}\n\nWho says so?", LONG]
    report = find_overlaps(splits(train=train, test=[f"{LONG}\n\nWho says so?", f"{LONG}\n\nWhat?"]), max_overlap=0.8)
    assert [(o.left_id, o.right_id, o.exact) for o in report.worst] == [
        ("test-0", "train-1", True),
        ("test-1", "train-0", True),
    ]


def test_another_system_prompt_or_answer_hides_nothing() -> None:
    data = {
        "train": [Example("a", single_turn("Be brief.", LONG, "Two."), "2")],
        "test": [Example("b", single_turn("", LONG, "Three."), "3")],
    }
    assert pair(find_overlaps(data, max_overlap=0.8), "test", "train").exact == 1


class Lazy(Sequence[Example]):
    """Rows that are made when they are read."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.opened = name, count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        self.opened += 1
        return self.row(index)

    def __iter__(self) -> Iterator[Example]:
        return map(self.row, range(self.count))

    def row(self, index: int) -> Example:
        text = " ".join(f"{self.name}{index * number}" for number in range(1, 101))
        return Example(f"{self.name}-{index}", single_turn("", f"{numbered(0, 20)} {text}", ""), "")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_earlier_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "CHUNK", 2**12)
    peaks = []
    find_overlaps({"train": Lazy("train", 10), "test": Lazy("test", 10)}, max_overlap=0.8)  # loads libraries
    for count in (100, 700):
        train = Lazy("train", count)
        tracemalloc.start()
        find_overlaps({"train": train, "test": Lazy("test", 10)}, max_overlap=0.8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert train.opened <= overlap.WORST
    assert peaks[1] - peaks[0] < 200 * (700 - 100)  # a row has 500 bytes and 113 n-grams of 8 bytes


@pytest.mark.slow
def test_boilerplate_is_measured_and_does_not_explode() -> None:
    rng = random.Random(0)

    def templated() -> str:
        names = [f"name{rng.randrange(20)}" for _ in range(4)]
        return " ".join(f"{numbered(20 * part, 20 * part + 20)} {name}" for part, name in enumerate(names))

    texts = [templated() for _ in range(6000)]
    data = splits(train=texts[:5000], validation=texts[5000:5500], test=[*texts[5500:], numbered(0, 20)])
    start = time.process_time()
    report = find_overlaps(data, max_overlap=0.9)
    assert time.process_time() - start < 30  # a second; a look at each pair of rows that share a gram takes minutes
    for actual in report.pairs:
        assert actual.examined in (500, 501)
        assert actual.p50 >= 52 / 77  # of 77 grams, the boilerplate alone is 13 in each of 4 parts
    assert report.worst[0].share == 1
    holder = {example.id: grams(example.question, 8) for name in data for example in data[name]}
    for worst in report.worst:
        assert worst.share == len(holder[worst.left_id] & holder[worst.right_id]) / len(holder[worst.left_id])


def test_empty_and_missing_splits() -> None:
    for data in ({}, splits(), splits(train=["a b"]), {"test": rows("test", ["a b"])}):
        report = find_overlaps(data, max_overlap=0.5)
        assert len(report.pairs) == 3
        assert report.worst == []
        assert report.leaking == 0
    assert pair(report, "test", "train") == statistics("test", "train", 1, 0, 0, 0.0, 0.0, 0.0, 0.0)
    assert pair(report, "validation", "train").examined == 0


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown splits \['dev'\]"):
        find_overlaps({"dev": []}, max_overlap=0.5)
    with pytest.raises(ValueError, match="n is 0"):
        find_overlaps({}, max_overlap=0.5, n=0)


def test_worst_are_ten_and_in_order() -> None:
    held = [numbered(100 * row, 100 * row + 20) for row in range(30)]
    report = find_overlaps(splits(train=held, test=[text + " tail" for text in held[:-1]] + held[-1:]), max_overlap=0.5)
    assert [o.left_id for o in report.worst] == ["test-29", *(f"test-{row}" for row in range(9))]
    assert pair(report, "test", "train").near == 29


def test_describe() -> None:
    text = numbered(0, 100)
    lines = describe(
        find_overlaps(splits(train=[text], validation=["a\nb"], test=[text.upper(), text + " end"]), max_overlap=0.8)
    )
    assert lines.splitlines()[:3] == [
        "train–validation: of 1 questions 0 are exact duplicates and 0 more overlap by over 80.0% "
        "(mean 0.0%, median 0.0%, 95th percentile 0.0%, largest 0.0%)",
        "train–test: of 2 questions 1 are exact duplicates and 1 more overlap by over 80.0% "
        "(mean 99.5%, median 99.5%, 95th percentile 99.9%, largest 100.0%)",
        "validation–test: of 2 questions 0 are exact duplicates and 0 more overlap by over 80.0% "
        "(mean 0.0%, median 0.0%, 95th percentile 0.0%, largest 0.0%)",
    ]
    assert "exact: test test-0 in train train-0\n  test: WORD0 WORD1 " in lines
    assert "98.9%: test test-1 in train train-0\n" in lines
    assert max(map(len, lines.splitlines()[3:])) < 120


@pytest.mark.slow
def test_same_report_under_any_hash_seed() -> None:
    """Words are told apart by str hashes, which differ from process to process."""
    code = "from test_overlap import *; print(find_overlaps(random_splits(5), max_overlap=0.5))"
    reports = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}",
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert reports == {f"{find_overlaps(random_splits(5), max_overlap=0.5)}\n"}


def test_conversations_are_compared_by_their_user_turns() -> None:
    def chat(name: str, *texts: str, system: str = "") -> Example:
        roles = ("user", "assistant") * len(texts)
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        instruction = [{"role": "system", "content": system}] if system else []
        return Example(name, [*instruction, *turns], texts[-1])  # type: ignore[list-item]

    train = [chat("a", LONG, "One.", "And then?", "Two."), chat("b", "Hi", "Hello.", "What is a kidney?", "An organ.")]
    test = [
        chat("opening", LONG, "Another answer.", "Why is that so?", "Because."),
        chat("system", "Hi", "Good day.", "What is a kidney?", "I do not know.", system="Be brief."),
        chat("greeting", "Hi", "Hello.", "What is a liver?", "An organ too."),
    ]
    report = find_overlaps({"train": train, "test": test}, max_overlap=0.9)
    assert pair(report, "test", "train").exact == 2
    assert {(row.left_id, row.right_id) for row in report.worst if row.exact} == {("opening", "a"), ("system", "b")}
