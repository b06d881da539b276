"""Disorders of sodium and water, with osmolalities that are computed."""

from __future__ import annotations

import random

from sftlab.dataset.vignettes.draw import Diagnosis, Topic
from sftlab.dataset.vignettes.normals import POTASSIUM, TSH

# European hyponatraemia guideline 2014 (Spasovski); Christ-Crain et al.: Nat Rev Dis Primers 2019;5:54 (diabetes
# insipidus, water deprivation and desmopressin). The names are the older ones that examinations still use;
# since 2022 central and nephrogenic diabetes insipidus are also called AVP deficiency and AVP resistance.


def _serum(rng: random.Random, sodium: tuple[int, int], urea: tuple[int, int] = (7, 14)) -> dict[str, object]:
    """Serum osmolality is 2 × Na + glucose / 18 + urea nitrogen / 2.8 (mg/dL)."""
    values = {"na": rng.randint(*sodium), "glucose": rng.randint(80, 105), "bun": rng.randint(*urea)}
    return {**values, "osm": round(2 * values["na"] + values["glucose"] / 18 + values["bun"] / 2.8)}


def _siadh(rng: random.Random) -> dict[str, object]:
    return _serum(rng, (118, 128), urea=(5, 9))


def _volume_loss(rng: random.Random) -> dict[str, object]:
    return _serum(rng, (119, 127), urea=(26, 38))


def _central(rng: random.Random) -> dict[str, object]:
    # Complete deficiency: urine osmolality more than doubles with desmopressin (> 50% is the criterion).
    before = rng.randint(90, 190)
    return _serum(rng, (146, 152)) | {"urine": before, "after": before + rng.randint(250, 400)}


def _nephrogenic(rng: random.Random) -> dict[str, object]:
    before = rng.randint(100, 200)
    # Resistance: less than a tenth more, even at the highest dose.
    return _serum(rng, (145, 150)) | {"urine": before, "after": before + rng.randint(2, 9)}


def _polydipsia(rng: random.Random) -> dict[str, object]:
    return _serum(rng, (130, 135), urea=(5, 9)) | {"urine": rng.randint(50, 95)}


_LOW_SODIUM = (
    "sodium is low at {na} mEq/L and serum osmolality is {osm} mOsm/kg",
    "serum osmolality is {osm} mOsm/kg with low sodium of {na} mEq/L",
)
_HIGH_SODIUM = (
    "sodium is high at {na} mEq/L with urine osmolality {urine} mOsm/kg",
    "urine osmolality is {urine} mOsm/kg with high sodium of {na} mEq/L",
)

SODIUM_WATER = Topic(
    name="sodium-water",
    normals=(
        ("glucose is {glucose} and urea nitrogen {bun} mg/dL", "urea nitrogen is {bun} and glucose {glucose} mg/dL"),
        POTASSIUM,
        TSH,
    ),
    diagnoses=(
        Diagnosis(
            name="SIADH",
            ages=(45, 80),
            presents=(
                "has small cell lung cancer and is confused",
                "is confused [2..4] weeks after starting sertraline",
                "takes carbamazepine and is newly confused",
            ),
            findings=(
                _LOW_SODIUM,
                (
                    "{he} is euvolemic, and urine sodium is high at [45..80] mEq/L",
                    "volume status is euvolemic, with high urine sodium of [45..80] mEq/L",
                ),
            ),
            because="Low sodium, euvolemic, high urine sodium.",
            numbers=_siadh,
        ),
        Diagnosis(
            name="Hypovolemic hyponatremia",
            ages=(25, 80),
            presents=(
                "is dizzy after [3..5] days of diarrhea",
                "is weak after [3..5] days of gastroenteritis",
                "faints when standing after days of diarrhea",
            ),
            findings=(
                _LOW_SODIUM,
                (
                    "mucous membranes are dry, and urine sodium is low at [5..15] mEq/L",
                    "{he} has dry mucous membranes and low urine sodium of [5..15] mEq/L",
                ),
            ),
            because="Low sodium, dry membranes, low urine sodium.",
            numbers=_volume_loss,
        ),
        Diagnosis(
            name="Central diabetes insipidus",
            ages=(20, 60),
            presents=(
                "passes [6..10] L of urine a day after pituitary surgery",
                "has polyuria and thirst after a head injury",
                "has thirst and passes [6..10] L of urine a day; MRI shows a pituitary mass",
            ),
            findings=(
                _HIGH_SODIUM,
                (
                    "after desmopressin, urine osmolality rises to {after}",
                    "desmopressin raises urine osmolality to {after}",
                ),
            ),
            because="Dilute urine that concentrates after desmopressin.",
            numbers=_central,
        ),
        Diagnosis(
            name="Nephrogenic diabetes insipidus",
            ages=(25, 70),
            presents=(
                "has taken lithium for years and passes [5..9] L of urine a day",
                "takes lithium and is always thirsty",
                "has polyuria and has taken lithium for bipolar disorder",
            ),
            findings=(
                _HIGH_SODIUM,
                (
                    "after desmopressin, urine osmolality is hardly changed at {after}",
                    "desmopressin hardly changes urine osmolality, now {after}",
                ),
            ),
            because="Lithium and dilute urine hardly changed by desmopressin.",
            numbers=_nephrogenic,
        ),
        Diagnosis(
            name="Primary polydipsia",
            ages=(20, 50),
            presents=(
                "has schizophrenia and drinks water all day",
                "has schizophrenia and drinks [8..12] L of water a day",
                "drinks [8..12] L of water a day and has an anxiety disorder",
            ),
            findings=(
                (
                    "sodium is {na} mEq/L with urine osmolality {urine} mOsm/kg",
                    "urine osmolality is {urine} mOsm/kg with sodium {na} mEq/L",
                ),
                (
                    "water deprivation alone raises urine osmolality to [580..740]",
                    "urine osmolality rises to [580..740] with water deprivation alone",
                ),
            ),
            because="Dilute urine that concentrates with water deprivation.",
            numbers=_polydipsia,
        ),
    ),
)
