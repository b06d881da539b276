"""Questions about a short text, some of which it does not answer."""

from __future__ import annotations

import random
from collections.abc import Iterator

NAMES = ("Anna", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ingrid", "Jonas", "Karin", "Luis")
PLACES = ("Oslo", "Lima", "Cairo", "Dublin", "Naples", "Boston", "Lyon", "Prague", "Seoul", "Tunis", "Quito", "Porto")
JOBS = ("baker", "pilot", "nurse", "painter", "farmer", "dentist", "plumber", "lawyer", "tailor", "sailor", "barber")
PETS = ("a cat", "a dog", "a parrot", "a horse", "a rabbit", "a goat", "a hamster", "a turtle")
FOODS = ("soup", "rice", "pasta", "salad", "cheese", "fish", "bread", "pancakes", "beans", "eggs")
UNKNOWN = (
    r"unknown|not (?:say|state|mention|specif|given|provided|known|stated|mentioned|specified|clear|enough)|"
    r"(?:don['’]t|do not|cannot|can['’]t) (?:know|say|tell|answer|determine|be)|no information|not in the text"
)
INVENTED = (
    "the novel “The Glass Orchard of Vendrelle”", "the opera “Mirrors over Talvik”", "the poem “Ashes of Ombrino”",
    "the film “Nine Doors to Karsund”", "the song “Lanterns for Ysabeth”", "the play “The Salt Clerk of Mervo”",
    "the novel “A Winter at Quillhaven”", "the painting “Three Herons at Dovrelle”", "the ballet “The Tin Gardener”",
    "the poem “Letters to Orsolya Finch”", "the song “Blue Mill at Hasterby”", "the film “The Cartographer’s Goose”",
)  # fmt: skip
MADE = {"novel": "wrote", "poem": "wrote", "play": "wrote", "opera": "composed", "song": "composed",
        "ballet": "composed", "film": "directed", "painting": "painted"}  # fmt: skip


def reading(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Questions about one of two people in a text, without end. An answer that names the other's is wrong."""
    while True:
        (one, two), (here, there), (job, work) = (rng.sample(pool, 2) for pool in (NAMES, PLACES, JOBS))
        (pet, animal), (food, dish) = rng.sample(PETS, 2), rng.sample(FOODS, 2)
        text = (
            f"{one} lives in {here}, works as a {job}, has {pet} and likes {food}. "
            f"{two} lives in {there}, works as a {work}, has {animal} and likes {dish}."
        )
        first = rng.random() < 0.5
        who = one if first else two
        for question, mine, others in (
            (f"Where does {who} live?", here, there),
            (f"What is {who}'s job?", job, work),
            (f"Which animal does {who} have?", pet[2:], animal[2:]),
            (f"What does {who} like?", food, dish),
        ):
            right, wrong = (mine, others) if first else (others, mine)
            yield f"{text}\n\n{question}", rf"(?is)^(?!.*\b{wrong}\b).*\b{right}\b", right
            break_ = rng.random() < 0.5  # one or two questions about a text
            if break_:
                break


def missing(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Questions that a text does not answer, and questions about works that do not exist, without end."""
    while True:
        (one, two), (here, there), (job, work) = (rng.sample(pool, 2) for pool in (NAMES, PLACES, JOBS))
        question, known = rng.choice(
            (
                (f"Where does {two} live?", (f"{one} lives in {here}. {two} works as a {work}.", here)),
                (f"What is {two}'s job?", (f"{one} works as a {job}. {two} lives in {there}.", job)),
                (f"Which animal does {one} have?", (f"{one} lives in {here}. {two} has a cat.", "cat")),
                (f"How old is {one}?", (f"{one} lives in {here}. {two} is {rng.randint(20, 70)} years old.", r"\d+")),
            )
        )
        text, wrong = known
        yield (
            f'{text}\n\n{question} If the text does not say it, answer "unknown".',
            rf"(?is)^(?!.*\b{wrong}\b).*(?:{UNKNOWN})",
            "unknown",
        )
        work_ = rng.choice(INVENTED)
        verb, year = MADE[work_.split()[1]], rng.randint(1850, 1990)
        yield (
            f'Who {verb} {work_} in {year}? If you do not know, answer "unknown".',
            rf"(?is)(?:{UNKNOWN}|not (?:aware|familiar)|(?:does not|doesn['’]t) exist|could not find)",
            "unknown",
        )
