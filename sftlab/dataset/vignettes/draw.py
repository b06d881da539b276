"""What a vignette is made of, and the drawing of its patient, wording and numbers.

Texts are templates. ``[62..75]`` is a number drawn evenly from that range, with the decimals that its
lower bound is written with; ``{he}``, ``{his}`` and ``{him}`` (or with a capital) follow the patient's sex, and
any other ``{name}`` is one of the diagnosis's own ``numbers``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Phrasings = tuple[str, ...]
"""Several wordings of one thing, of which a vignette uses one."""

Numbers = Callable[[random.Random], Mapping[str, object]]
"""Draws the values that depend on each other, by the name of their slot."""

NEUTRAL_LEADS: Phrasings = (
    "Which of the following best explains these findings?",
    "These findings are most consistent with which of the following?",
)

LEADS: Phrasings = (
    "Which of the following is the most likely diagnosis?",
    "What is the most likely diagnosis?",
    *NEUTRAL_LEADS,
)

OPENINGS: Phrasings = (
    "{who} {presents}",
    "{who} {presents}",
    "a physician sees {who} who {presents}",
    "a doctor examines {who} who {presents}",
)

_RANGE = re.compile(r"\[(\d+(?:\.\d+)?)\.\.(\d+(?:\.\d+)?)\]")
_PRONOUNS = {"m": {"he": "he", "his": "his", "him": "him"}, "f": {"he": "she", "his": "her", "him": "her"}}


@dataclass(frozen=True)
class Diagnosis:
    """One right answer and the patients who have it.

    ``presents`` are predicates of the first sentence, ``findings`` are always all told (in any order), and
    ``because`` repeats the decisive ones in the rationale. ``because`` has no variants on purpose: a small
    model learns the link from finding to diagnosis by the words that are the same in every row.
    """

    name: str
    ages: tuple[int, int]
    presents: Phrasings
    findings: tuple[Phrasings, ...]
    because: str
    sexes: str = "mf"
    numbers: Numbers | None = None


@dataclass(frozen=True)
class Topic:
    """Diagnoses that are each other's distractors, and ``normals`` that are true of every one of them."""

    name: str
    normals: tuple[Phrasings, ...]
    diagnoses: tuple[Diagnosis, ...]
    leads: Phrasings = LEADS


def number(rng: random.Random, low: str, high: str) -> str:
    """A number of the closed range, with as many decimals as ``low`` has."""
    decimals = len(low.partition(".")[2])
    scale = 10**decimals
    drawn = rng.randint(round(float(low) * scale), round(float(high) * scale))
    return f"{drawn / scale:.{decimals}f}"


def fill(template: str, slots: Mapping[str, object], rng: random.Random) -> str:
    """The template with its slots filled and its ranges drawn."""
    text = template.format_map(slots)
    return _RANGE.sub(lambda match: number(rng, match[1], match[2]), text)


def who(age: int, sex: str) -> str:
    """The patient in words: "an 8-year-old girl"."""
    noun = {"m": ("boy", "man"), "f": ("girl", "woman")}[sex][age >= 18]
    article = "an" if age in (8, 11, 18) or 80 <= age <= 89 else "a"
    return f"{article} {age}-year-old {noun}"


def sentence(text: str) -> str:
    """The text with a full stop, and a capital unless it begins with an abbreviation like aPTT."""
    first = text[0] if text[1].isupper() else text[0].upper()
    return f"{first}{text[1:]}."


def question(topic: Topic, diagnosis: Diagnosis, rng: random.Random) -> str:
    """One vignette with its lead-in question."""
    sex = rng.choice(diagnosis.sexes)
    slots: dict[str, object] = dict(diagnosis.numbers(rng)) if diagnosis.numbers else {}
    for slot, pronoun in _PRONOUNS[sex].items():
        slots |= {slot: pronoun, slot.capitalize(): pronoun.capitalize()}
    patient = who(rng.randint(*diagnosis.ages), sex)
    opening = fill(rng.choice(OPENINGS), {"who": patient, "presents": rng.choice(diagnosis.presents)}, rng)
    told = [*diagnosis.findings, *rng.sample(topic.normals, rng.randint(1, 2))]
    rng.shuffle(told)
    texts = [opening, *(rng.choice(phrasings) for phrasings in told)]
    return " ".join([*(sentence(fill(text, slots, rng)) for text in texts), rng.choice(topic.leads)])
