"""Viral hepatitis serology and acute kidney injury."""

from __future__ import annotations

import random

from sftlab.dataset.vignettes.draw import NEUTRAL_LEADS, Diagnosis, Numbers, Topic
from sftlab.dataset.vignettes.normals import ALBUMIN, GLUCOSE, PLATELETS, POTASSIUM, SODIUM

# CDC 2023 hepatitis B screening and testing recommendations (Conners), table of serologic results; EASL 2017.
HEPATITIS = Topic(
    name="hepatitis-serology",
    # Immunity is not a diagnosis.
    leads=NEUTRAL_LEADS,
    normals=(ALBUMIN, PLATELETS, ("anti-HCV is negative", "a test for anti-HCV is negative")),
    diagnoses=(
        Diagnosis(
            name="Acute hepatitis B",
            ages=(20, 50),
            presents=(
                "has had jaundice and nausea for [4..8] days",
                "shares needles and has new jaundice",
                "has jaundice [2..3] months after a new sexual partner",
            ),
            findings=(
                ("HBsAg and IgM anti-HBc are both positive", "IgM anti-HBc is positive and HBsAg is positive"),
                ("ALT is very high at [900..2400] U/L", "very high ALT of [900..2400] U/L is found"),
            ),
            because="Positive HBsAg with positive IgM anti-HBc.",
        ),
        Diagnosis(
            name="Chronic hepatitis B",
            ages=(25, 60),
            presents=(
                "was born in Vietnam and has no symptoms",
                "has felt well; {his} mother died of liver cancer",
                "has no symptoms; {his} brother has liver cancer",
            ),
            findings=(
                (
                    "HBsAg has been positive for [8..30] months, and IgM anti-HBc is negative",
                    "IgM anti-HBc is negative, and HBsAg has been positive for [8..30] months",
                ),
                ("ALT is [62..140] U/L", "ALT is mildly high at [62..140] U/L"),
            ),
            because="HBsAg positive for months, negative IgM anti-HBc.",
        ),
        Diagnosis(
            name="Resolved hepatitis B",
            ages=(30, 65),
            presents=(
                "had jaundice [5..20] years ago and is well",
                "wants to donate blood and had jaundice in {his} youth",
                "used to inject drugs and now feels well",
            ),
            findings=(
                ("HBsAg is negative, but anti-HBs is positive", "anti-HBs is positive with negative HBsAg"),
                (
                    "total anti-HBc is positive, with ALT [16..32] U/L",
                    "ALT is [16..32] U/L and total anti-HBc is positive",
                ),
            ),
            because="Positive anti-HBs with positive anti-HBc.",
        ),
        Diagnosis(
            name="Vaccine immunity",
            ages=(19, 40),
            presents=(
                "is a nursing student with a routine blood test",
                "is starting work as a dental assistant",
                "is a healthy medical student",
            ),
            findings=(
                ("HBsAg is negative, but anti-HBs is positive", "anti-HBs is positive with negative HBsAg"),
                (
                    "total anti-HBc is negative, with ALT [16..32] U/L",
                    "ALT is [16..32] U/L and total anti-HBc is negative",
                ),
            ),
            because="Positive anti-HBs with negative anti-HBc.",
        ),
        # ACIP 2020 hepatitis A recommendations (Nelson).
        Diagnosis(
            name="Acute hepatitis A",
            ages=(19, 45),
            presents=(
                "has jaundice [3..5] weeks after a trip to Mexico",
                "has jaundice and nausea after eating raw oysters",
                "has dark urine [3..5] weeks after travel in Egypt",
            ),
            findings=(
                ("IgM anti-HAV is positive and HBsAg is negative", "HBsAg is negative but IgM anti-HAV is positive"),
                ("ALT is very high at [900..2400] U/L", "very high ALT of [900..2400] U/L is found"),
            ),
            because="Positive IgM anti-HAV.",
        ),
    ),
)


def _creatinine(low: float, high: float, ratio: tuple[int, int]) -> Numbers:
    """Creatinine of the range, and a urea nitrogen that is ``ratio`` times as high."""

    def numbers(rng: random.Random) -> dict[str, object]:
        creatinine = rng.randint(round(low * 10), round(high * 10)) / 10
        return {"cr": f"{creatinine:.1f}", "bun": round(creatinine * rng.randint(*ratio))}

    return numbers


_CREATININE = (
    "creatinine is {cr} and urea nitrogen {bun} mg/dL",
    "urea nitrogen is {bun} and creatinine {cr} mg/dL",
)

# KDIGO 2012 acute kidney injury guideline; Harrison's 21e, "Acute Kidney Injury" (sediment, ratio, FENa).
KIDNEY = Topic(
    name="kidney-injury",
    normals=(GLUCOSE, PLATELETS, POTASSIUM, SODIUM),
    diagnoses=(
        Diagnosis(
            name="Prerenal azotemia",
            ages=(30, 85),
            presents=(
                "is dizzy after [2..4] days of vomiting and poor intake",
                "has hardly drunk for days and passes little urine",
                "is thirsty and passes little urine in a heat wave",
            ),
            findings=(
                _CREATININE,
                (
                    "FENa is low at 0.[2..6]%, with hyaline casts",
                    "urine shows hyaline casts and a low FENa of 0.[2..6]%",
                ),
            ),
            because="Low FENa with hyaline casts.",
            # Above 20 to 1.
            numbers=_creatinine(1.6, 2.6, (23, 30)),
        ),
        Diagnosis(
            name="Acute tubular necrosis",
            ages=(35, 80),
            presents=(
                "passes little urine [2..3] days after hemorrhagic shock",
                "has rising creatinine on day [6..9] of gentamicin",
                "passes little urine [2..3] days after septic shock",
            ),
            findings=(
                _CREATININE,
                (
                    "FENa is high at [3..6]%, with muddy brown casts",
                    "urine shows muddy brown casts and a high FENa of [3..6]%",
                ),
            ),
            because="High FENa with muddy brown casts.",
            numbers=_creatinine(2.6, 5.4, (10, 14)),
        ),
        Diagnosis(
            name="Acute interstitial nephritis",
            ages=(25, 75),
            presents=(
                "has fever and a rash [8..14] days after starting nafcillin",
                "has a rash [2..4] weeks after starting omeprazole",
                "has fever and rash while taking ibuprofen and cephalexin",
            ),
            findings=(
                _CREATININE,
                (
                    "there are white cell casts in urine and eosinophils in blood",
                    "blood shows eosinophilia, and urine shows white cell casts",
                ),
            ),
            because="New drug, rash, white cell casts.",
            numbers=_creatinine(2.0, 4.2, (10, 14)),
        ),
        # KDIGO 2021 glomerular diseases guideline, infection-related glomerulonephritis.
        Diagnosis(
            name="Poststreptococcal glomerulonephritis",
            ages=(5, 13),
            presents=(
                "has cola-colored urine [10..18] days after a sore throat",
                "has a puffy face and dark urine after a sore throat",
                "has cola-colored urine [3..5] weeks after impetigo",
            ),
            findings=(
                _CREATININE,
                (
                    "urine shows red cell casts, and complement C3 is low",
                    "complement C3 is low, with red cell casts in urine",
                ),
            ),
            because="Red cell casts with low C3.",
            numbers=_creatinine(1.2, 2.2, (13, 17)),
        ),
        Diagnosis(
            name="Obstructive uropathy",
            ages=(62, 88),
            sexes="m",
            presents=(
                "has had a weak stream and now cannot pass urine",
                "dribbles urine and has a full, palpable bladder",
                "has lower abdominal pain and a large prostate",
            ),
            findings=(
                _CREATININE,
                (
                    "ultrasound shows bilateral hydronephrosis, and there are no casts",
                    "urine has no casts, and ultrasound shows bilateral hydronephrosis",
                ),
            ),
            because="Bilateral hydronephrosis without casts.",
            numbers=_creatinine(2.4, 5.0, (14, 18)),
        ),
    ),
)
