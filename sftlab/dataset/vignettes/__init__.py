"""Board-style clinical vignettes, written by rule: the dataset that needs no download.

Every row is a multiple-choice question whose distractors are the other diagnoses of the same topic, and a rationale
that names the decisive findings, then the diagnosis, then its letter. A 135M model learns from that order; asked for a
letter before the diagnosis is named, it stays at chance. The medicine is sourced beside each topic, the spelling is
American as in the examinations, and the vignettes are made up: they are for training and testing software, not for
advice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from sftlab.dataset.vignettes.blood import ANEMIA, BLEEDING
from sftlab.dataset.vignettes.calcium import CALCIUM
from sftlab.dataset.vignettes.chest import MURMURS, PLEURAL
from sftlab.dataset.vignettes.draw import Diagnosis, Topic, question
from sftlab.dataset.vignettes.fluids import JOINT_FLUID, SPINAL_FLUID
from sftlab.dataset.vignettes.gases import ACID_BASE
from sftlab.dataset.vignettes.hormones import ADRENAL, THYROID
from sftlab.dataset.vignettes.organs import HEPATITIS, KIDNEY
from sftlab.dataset.vignettes.water import SODIUM_WATER

__all__ = ["TOPICS", "rows"]

TOPICS: tuple[Topic, ...] = (
    ACID_BASE,
    ADRENAL,
    ANEMIA,
    BLEEDING,
    CALCIUM,
    HEPATITIS,
    JOINT_FLUID,
    KIDNEY,
    MURMURS,
    PLEURAL,
    SODIUM_WATER,
    SPINAL_FLUID,
    THYROID,
)

_TRIES = 200
"""How often a repeated question is drawn again before the space counts as exhausted."""


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The first ``count`` vignettes of the endless series that ``seed`` names.

    Args:
        count: How many rows. A longer series begins with the shorter one of the same seed.
        seed: Names the series.

    Returns:
        Rows with id, topic, question, options, answer, answer_idx and rationale. No two questions are the
        same, and every diagnosis comes once before any comes again.

    Raises:
        ValueError: If ``count`` is negative, or higher than the number of different questions.
    """
    if count < 0:
        raise ValueError(f"vignettes: count is {count}, and must be 0 or more")
    # A string seed is hashed with SHA-512: the same everywhere, and -1 is not 1 as it is for an int.
    rng = random.Random(f"vignettes {seed}")
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    for topic, diagnosis in _cases(rng):
        if len(made) == count:
            break
        made.append(_row(len(made), count, topic, diagnosis, seen, rng))
    return made


def _cases(rng: random.Random) -> Iterator[tuple[Topic, Diagnosis]]:
    """Every diagnosis once in random order, then all again in another, without end."""
    deck = [(topic, diagnosis) for topic in TOPICS for diagnosis in topic.diagnoses]
    while True:
        rng.shuffle(deck)
        yield from deck


def _row(
    number: int, count: int, topic: Topic, diagnosis: Diagnosis, seen: set[str], rng: random.Random
) -> dict[str, Any]:
    for _ in range(_TRIES):
        text = question(topic, diagnosis, rng)
        key = " ".join(text.lower().split())
        if key not in seen:
            break
    else:
        raise ValueError(
            f"vignettes: no new question about {diagnosis.name!r} for row {number + 1} of {count} "
            f"in {_TRIES} draws; ask for at most {number} rows"
        )
    seen.add(key)
    names = [other.name for other in topic.diagnoses if other is not diagnosis]
    names = [diagnosis.name, *rng.sample(names, min(rng.choice((3, 4)), len(names)))]
    rng.shuffle(names)
    options = dict(zip("ABCDE", names, strict=False))
    letter = "ABCDE"[names.index(diagnosis.name)]
    return {
        "id": f"vignette-{number:06d}",
        "topic": topic.name,
        "question": text,
        "options": options,
        "answer": diagnosis.name,
        "answer_idx": letter,
        "rationale": _rationale(diagnosis, letter),
    }


def _rationale(diagnosis: Diagnosis, letter: str) -> str:
    return f"{diagnosis.because} These findings mean {diagnosis.name} ({letter}). Therefore, the answer is ({letter})."
