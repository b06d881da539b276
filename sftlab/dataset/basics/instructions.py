"""Instructions about the form of an answer, which a program can check."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

WORDS = (
    "river", "garden", "window", "candle", "mountain", "silver", "bridge", "forest", "button", "market", "planet",
    "engine", "letter", "summer", "orange", "kitchen", "ladder", "mirror", "pocket", "rabbit",
)  # fmt: skip
SENTENCES = (
    "The train leaves at noon.", "Birds sing in the morning.", "My sister likes green tea.",
    "We walked along the beach.", "The old clock is slow today.", "Snow fell during the night.",
    "He put the keys on the table.", "The shop opens at nine.", "Two boats crossed the lake.",
    "Her coat hangs by the door.",
)  # fmt: skip
GROUPS = ("animals", "colors", "fruits", "countries", "vegetables", "sports", "cities", "trees", "tools", "birds")


def instruction(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """One instruction of each form, then again with other words, without end."""
    while True:
        word, other = rng.sample(WORDS, 2)
        sentence, group, digits = rng.choice(SENTENCES), rng.choice(GROUPS), rng.randint(100, 999)
        a, b = rng.sample(range(10, 99), 2)
        yes = "yes" if a > b else "no"
        yield (
            f'Write the word "{word}" in capital letters, and nothing else.',
            rf"^\W*{word.upper()}\W*$",
            word.upper(),
        )
        yield (
            f"Repeat this sentence exactly, and write nothing else: {sentence}",
            rf"^[\"'“]?{re.escape(sentence)}[\"'”]?$",
            sentence,
        )
        yield f"Reply with the number {digits} and nothing else.", rf"^\W*{digits}\W*$", str(digits)
        yield (
            f"Name three {group}. Separate them by commas, and write nothing else.",
            r"^[^,\n]{2,40},[^,\n]{2,40},[^,\n]{2,40}$",
            "one, two, three",
        )
        yield (
            f"Is {a} greater than {b}? Answer with one word, yes or no.",
            rf"(?i)^\W*{yes}\W*$",
            yes,
        )
        yield (
            f'Write a JSON object that has the key "{word}" with the value "{other}", and nothing else.',
            rf'^\{{\s*"{word}"\s*:\s*"{other}"\s*\}}$',
            f'{{"{word}": "{other}"}}',
        )
        yield (
            f'Write the word "{word}" three times, separated by spaces, and nothing else.',
            rf"(?i)^\W*{word}\s+{word}\s+{word}\W*$",
            f"{word} {word} {word}",
        )
        yield (
            f'Begin your answer with the word "{word.upper()}", then write one sentence about {group}.',
            rf"^\W*{word.upper()}\b[\W]*\w+",
            f"{word.upper()}: I like {group}.",
        )
        yield (
            f'Write one short sentence about {group} that ends with the word "{word}".',
            rf"(?is)\w.*\b{word}\W*$",
            f"The {group} are by the {word}.",
        )
        earlier, later = sorted((word, other))
        yield (
            f"Put the words {other} and {word} in alphabetical order, separated by a comma, and write nothing else.",
            rf"(?i)^\W*{earlier},?\s*{later}\W*$",
            f"{earlier}, {later}",
        )
