"""Acid–base disorders, with gases and electrolytes that are computed together."""

from __future__ import annotations

import math
import random

from sftlab.dataset.vignettes.draw import Diagnosis, Topic
from sftlab.dataset.vignettes.normals import ALBUMIN, HEMOGLOBIN, PLATELETS

# Harrison's 21e, "Acidosis and Alkalosis"; Berend, de Vries, Gans: N Engl J Med 2014;371:1434 (compensation
# and anion gap). The gap is Na − Cl − HCO3, normal 8–12 mEq/L at the normal albumin that is told beside it.


def _ph(bicarbonate: int, pco2: int) -> str:
    """Henderson–Hasselbalch: pK' 6.1, CO2 solubility 0.03 mmol/L per mm Hg."""
    return f"{6.1 + math.log10(bicarbonate / (0.03 * pco2)):.2f}"


def _values(bicarbonate: int, pco2: int, sodium: int, gap: int) -> dict[str, object]:
    chloride = sodium - bicarbonate - gap
    return {
        "ph": _ph(bicarbonate, pco2),
        "pco2": pco2,
        "hco3": bicarbonate,
        "na": sodium,
        "cl": chloride,
        "gap": gap,
    }


def _high_gap(rng: random.Random) -> dict[str, object]:
    bicarbonate = rng.randint(8, 15)
    # Winter's formula, 1.5 × HCO3 + 8 (± 2): no second, respiratory disorder.
    pco2 = round(1.5 * bicarbonate + 8) + rng.randint(-1, 1)
    # The gap rises by 1.0–1.3 times what bicarbonate falls: no second, metabolic disorder.
    gap = 12 + round((24 - bicarbonate) * rng.uniform(1.0, 1.3))
    return _values(bicarbonate, pco2, rng.randint(136, 142), gap)


def _non_gap(rng: random.Random) -> dict[str, object]:
    bicarbonate = rng.randint(11, 16)
    pco2 = round(1.5 * bicarbonate + 8) + rng.randint(-1, 1)
    return _values(bicarbonate, pco2, rng.randint(136, 142), rng.randint(8, 12))


def _alkalosis(rng: random.Random) -> dict[str, object]:
    bicarbonate = rng.randint(34, 42)
    # pCO2 rises by 0.7 mm Hg for each mEq/L.
    pco2 = round(40 + 0.7 * (bicarbonate - 24)) + rng.randint(-1, 1)
    return _values(bicarbonate, pco2, rng.randint(135, 140), rng.randint(11, 12))


def _hypoventilation(rng: random.Random) -> dict[str, object]:
    pco2 = rng.randint(58, 80)
    # Acute: bicarbonate rises by 1 mEq/L for each 10 mm Hg.
    return _values(round(24 + (pco2 - 40) / 10), pco2, rng.randint(137, 141), rng.randint(9, 12))


def _hyperventilation(rng: random.Random) -> dict[str, object]:
    pco2 = rng.randint(20, 29)
    # Acute: bicarbonate falls by 2 mEq/L for each 10 mm Hg.
    return _values(round(24 - (40 - pco2) / 5), pco2, rng.randint(136, 139), rng.randint(10, 12))


_LOW_GAS = (
    "arterial pH is low at {ph}, with pCO2 {pco2} mm Hg and low bicarbonate of {hco3} mEq/L",
    "blood gas shows a low pH of {ph}, pCO2 {pco2} mm Hg, and low bicarbonate of {hco3} mEq/L",
)

ACID_BASE = Topic(
    name="acid-base",
    normals=(ALBUMIN, HEMOGLOBIN, PLATELETS),
    diagnoses=(
        Diagnosis(
            name="High-gap metabolic acidosis",
            ages=(20, 65),
            presents=(
                "is confused after drinking antifreeze",
                "is drowsy after drinking methanol",
                "has type 1 diabetes and stopped {his} insulin [2..4] days ago",
                "has septic shock with a high lactate",
            ),
            findings=(
                _LOW_GAS,
                (
                    "sodium is {na} and chloride {cl} mEq/L, so the anion gap is high at {gap}",
                    "with sodium {na} and chloride {cl} mEq/L, there is a high anion gap of {gap}",
                ),
            ),
            because="Low pH, low bicarbonate, high anion gap.",
            numbers=_high_gap,
        ),
        Diagnosis(
            name="Non-gap metabolic acidosis",
            ages=(20, 75),
            presents=(
                "has had profuse watery diarrhea for [3..6] days",
                "has severe diarrhea after a trip abroad",
                "has had watery diarrhea for a week after antibiotics",
            ),
            findings=(
                _LOW_GAS,
                (
                    "sodium is {na} and chloride {cl} mEq/L, so the anion gap is normal at {gap}",
                    "with sodium {na} and chloride {cl} mEq/L, there is a normal anion gap of {gap}",
                ),
            ),
            because="Low pH, low bicarbonate, normal anion gap.",
            numbers=_non_gap,
        ),
        Diagnosis(
            name="Metabolic alkalosis",
            ages=(20, 70),
            presents=(
                "has been vomiting for [3..6] days",
                "has gastric outlet obstruction and keeps vomiting",
                "is weak after [3..5] days of nasogastric suction",
            ),
            findings=(
                (
                    "arterial pH is high at {ph}, with pCO2 {pco2} mm Hg and high bicarbonate of {hco3} mEq/L",
                    "blood gas shows a high pH of {ph}, pCO2 {pco2} mm Hg, and high bicarbonate of {hco3} mEq/L",
                ),
                (
                    "sodium is {na} and chloride is low at {cl} mEq/L",
                    "chloride is low at {cl} mEq/L with sodium {na} mEq/L",
                ),
            ),
            because="High pH with high bicarbonate.",
            numbers=_alkalosis,
        ),
        Diagnosis(
            name="Acute respiratory acidosis",
            ages=(20, 70),
            presents=(
                "is found drowsy after an oxycodone overdose",
                "is hard to wake after injecting heroin",
                "is drowsy an hour after a large dose of morphine",
            ),
            findings=(
                (
                    "arterial pH is low at {ph}, with high pCO2 of {pco2} mm Hg and bicarbonate {hco3} mEq/L",
                    "blood gas shows a low pH of {ph}, high pCO2 of {pco2} mm Hg, and bicarbonate {hco3} mEq/L",
                ),
                (
                    "breathing is slow and shallow at [5..8]/min",
                    "{he} takes slow, shallow breaths at [5..8]/min",
                ),
            ),
            because="Low pH with high pCO2 and slow breathing.",
            numbers=_hypoventilation,
        ),
        Diagnosis(
            name="Acute respiratory alkalosis",
            ages=(18, 50),
            presents=(
                "has a panic attack with tingling fingers",
                "has sudden pleuritic chest pain after a long flight",
                "feels anxious, dizzy, and numb around the mouth",
            ),
            findings=(
                (
                    "arterial pH is high at {ph}, with low pCO2 of {pco2} mm Hg and bicarbonate {hco3} mEq/L",
                    "blood gas shows a high pH of {ph}, low pCO2 of {pco2} mm Hg, and bicarbonate {hco3} mEq/L",
                ),
                (
                    "breathing is fast and deep at [28..38]/min",
                    "{he} takes fast, deep breaths at [28..38]/min",
                ),
            ),
            because="High pH with low pCO2 and fast breathing.",
            numbers=_hyperventilation,
        ),
    ),
)
