"""Arithmetic with small whole numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack")
THINGS = ("apples", "books", "coins", "pencils", "stamps", "shells", "tickets", "buttons")


def number(value: int) -> str:
    """A regular expression for a number that is not a part of another one."""
    return rf"(?<![\d.,])-?(?<!\d){value}(?![\d]|[.,]\d)" if value < 0 else rf"(?<![\d.,-]){value}(?!\d|[.,]\d)"


def arithmetic(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Additions, subtractions, multiplications and short stories, without end."""
    while True:
        for kind in ("add", "subtract", "multiply", "gain", "lose"):
            a, b = rng.randint(3, 40), rng.randint(3, 40)
            if kind in ("subtract", "lose"):
                a, b = max(a, b) + rng.randint(2, 30), min(a, b)
            if kind == "multiply":
                a, b = rng.randint(2, 9), rng.randint(2, 9)
            result = {"add": a + b, "gain": a + b, "multiply": a * b}.get(kind, a - b)
            if result in (a, b):  # an answer that repeats the question would be right
                continue
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            question = {
                "add": f"What is {a} + {b}?",
                "subtract": f"What is {a} - {b}?",
                "multiply": f"What is {a} times {b}?",
                "gain": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
                "lose": f"{name} has {a} {thing} and gives away {b} of them. How many {thing} are left?",
            }[kind]
            yield question, number(result), str(result)
