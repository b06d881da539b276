"""Heart murmurs and pleural effusions."""

from __future__ import annotations

import random

from sftlab.dataset.vignettes.draw import Diagnosis, Topic
from sftlab.dataset.vignettes.normals import CALCIUM, CREATININE, HEMOGLOBIN, PLATELETS, POTASSIUM, TSH

# ACC/AHA 2020 valvular heart disease guideline (Otto); murmurs as in Bates' Guide to Physical Examination, 13e.
MURMURS = Topic(
    name="murmurs",
    normals=(CREATININE, HEMOGLOBIN, POTASSIUM, TSH),
    diagnoses=(
        Diagnosis(
            name="Aortic stenosis",
            ages=(65, 88),
            presents=(
                "fainted while climbing stairs",
                "has chest pain and near-fainting on exertion",
                "has had exertional dyspnea and one faint",
            ),
            findings=(
                (
                    "a harsh crescendo-decrescendo systolic murmur radiates to the carotids",
                    "a crescendo-decrescendo systolic murmur at the right sternal border radiates to the carotids",
                ),
                ("the carotid pulse is weak and late", "the carotid upstroke is weak and delayed"),
            ),
            because="Systolic murmur radiating to carotids.",
        ),
        Diagnosis(
            name="Aortic regurgitation",
            ages=(30, 70),
            presents=(
                "has dyspnea and a pounding heartbeat",
                "has a dilated aortic root and exertional dyspnea",
                "feels {his} heart pounding when lying on the left side",
            ),
            findings=(
                (
                    "an early diastolic decrescendo murmur is heard at the left sternal border",
                    "at the left sternal border there is an early diastolic decrescendo murmur",
                ),
                (
                    "blood pressure is [150..172]/[42..56] mm Hg with bounding pulses",
                    "pulses are bounding at [150..172]/[42..56] mm Hg",
                ),
            ),
            because="Early diastolic murmur with bounding pulses.",
        ),
        Diagnosis(
            name="Mitral stenosis",
            ages=(25, 55),
            presents=(
                "had rheumatic fever as a child and has dyspnea",
                "grew up in rural India and coughs up blood",
                "has dyspnea and had rheumatic fever at age 9",
            ),
            findings=(
                (
                    "an opening snap and a low-pitched diastolic rumble are heard at the apex",
                    "at the apex, an opening snap is followed by a diastolic rumble",
                ),
                ("the first heart sound is loud", "S1 is loud"),
            ),
            because="Opening snap with diastolic rumble.",
        ),
        Diagnosis(
            name="Mitral regurgitation",
            ages=(45, 80),
            presents=(
                "has dyspnea [3..6] days after a myocardial infarction",
                "has had slowly worsening dyspnea and fatigue",
                "has dyspnea and ankle swelling for [2..5] months",
            ),
            findings=(
                (
                    "a holosystolic murmur at the apex radiates to the axilla",
                    "a blowing holosystolic apical murmur radiates to the axilla",
                ),
                ("a third heart sound is heard", "there is an S3 gallop"),
            ),
            because="Holosystolic murmur radiating to axilla.",
        ),
        # AHA/ACC 2024 hypertrophic cardiomyopathy guideline (Ommen).
        Diagnosis(
            name="Hypertrophic cardiomyopathy",
            ages=(16, 32),
            presents=(
                "collapsed during a basketball game",
                "fainted on the soccer field; {his} brother died suddenly",
                "is an athlete with chest pain on exertion",
            ),
            findings=(
                (
                    "a systolic murmur gets louder with Valsalva and softer with squatting",
                    "a systolic murmur is softer with squatting and louder with Valsalva",
                ),
                ("ECG shows left ventricular hypertrophy", "echocardiography shows a thick septum of [18..26] mm"),
            ),
            because="Systolic murmur louder with Valsalva.",
        ),
    ),
)

# Light et al.: Ann Intern Med 1972;77:507. An exudate has fluid/serum protein > 0.5, or fluid/serum LDH > 0.6,
# or fluid LDH above 2/3 of the upper normal serum value. BTS 2023 pleural disease guideline (Roberts).


def _protein(rng: random.Random, low: int, high: int) -> dict[str, object]:
    """Serum protein, and a fluid protein that is ``low`` to ``high`` per cent of it."""
    serum = rng.randint(66, 76) / 10
    return {"serum": f"{serum:.1f}", "fluid": f"{serum * rng.randint(low, high) / 100:.1f}"}


def _transudate(rng: random.Random) -> dict[str, object]:
    serum_ldh = rng.randint(170, 210)
    return _protein(rng, 28, 44) | {"serum_ldh": serum_ldh, "fluid_ldh": round(serum_ldh * rng.randint(35, 52) / 100)}


def _exudate(rng: random.Random) -> dict[str, object]:
    return _protein(rng, 58, 75)


_EXUDATE = (
    "the fluid is an exudate, with protein {fluid} g/dL (serum {serum})",
    "protein is {fluid} g/dL in the fluid and {serum} in serum, an exudate",
)

PLEURAL = Topic(
    name="pleural-effusion",
    normals=(CALCIUM, CREATININE, PLATELETS, POTASSIUM),
    diagnoses=(
        Diagnosis(
            name="Heart failure",
            ages=(60, 85),
            presents=(
                "has orthopnea, swollen legs, and bilateral effusions",
                "sleeps on three pillows and has bilateral effusions",
                "has distended neck veins and bilateral effusions",
            ),
            findings=(
                (
                    "the fluid is a transudate, with protein {fluid} g/dL (serum {serum})",
                    "protein is {fluid} g/dL in the fluid and {serum} in serum, a transudate",
                ),
                (
                    "LDH is {fluid_ldh} U/L in the fluid and {serum_ldh} in serum",
                    "fluid LDH is {fluid_ldh} U/L (serum {serum_ldh})",
                ),
            ),
            because="Bilateral effusions with a transudate.",
            numbers=_transudate,
        ),
        # BTS 2023: pus, or pH at most 7.2, or glucose below 60 mg/dL (3.3 mmol/L) in pleural infection.
        Diagnosis(
            name="Empyema",
            ages=(30, 75),
            presents=(
                "still has fever after [7..10] days of pneumonia",
                "has pneumonia with fever and a loculated effusion",
                "has fever and pleuritic pain despite antibiotics",
            ),
            findings=(
                _EXUDATE,
                (
                    "thoracentesis yields pus with pH [6.80..7.08] and glucose [10..32] mg/dL",
                    "the pleural fluid is pus, with glucose [10..32] mg/dL and pH [6.80..7.08]",
                ),
            ),
            because="Fever with pus and low fluid pH.",
            numbers=_exudate,
        ),
        Diagnosis(
            name="Malignant effusion",
            ages=(55, 80),
            presents=(
                "has smoked for 30 years and has lost 10 kg",
                "has had lung cancer for a year and has new dyspnea",
                "has weight loss, dyspnea, and a lung mass",
            ),
            findings=(
                _EXUDATE,
                (
                    "the pleural fluid is bloody with clusters of atypical cells",
                    "cytology of the bloody fluid shows atypical cells in clusters",
                ),
            ),
            because="Bloody fluid with atypical cells.",
            numbers=_exudate,
        ),
        # Light: Respirology 2010;15:451 (lymphocytes, and adenosine deaminase above 40 U/L).
        Diagnosis(
            name="Tuberculous effusion",
            ages=(20, 50),
            presents=(
                "has had night sweats and cough for [4..9] weeks",
                "worked in a refugee camp and has night sweats",
                "has night sweats; {his} roommate coughs up blood",
            ),
            findings=(
                _EXUDATE,
                (
                    "the fluid is [82..94]% lymphocytes with adenosine deaminase high at [55..110] U/L",
                    "adenosine deaminase is high at [55..110] U/L with [82..94]% lymphocytes in the fluid",
                ),
            ),
            because="Lymphocytes with high adenosine deaminase.",
            numbers=_exudate,
        ),
        # BTS 2023: triglycerides above 110 mg/dL (1.24 mmol/L).
        Diagnosis(
            name="Chylothorax",
            ages=(35, 75),
            presents=(
                "has dyspnea [3..7] days after esophageal surgery",
                "has lymphoma and a new right effusion",
                "has dyspnea [3..7] days after thoracic surgery",
            ),
            findings=(
                _EXUDATE,
                (
                    "the pleural fluid is milky with triglycerides of [180..620] mg/dL",
                    "triglycerides are [180..620] mg/dL in the milky fluid",
                ),
            ),
            because="Milky fluid with high triglycerides.",
            numbers=_exudate,
        ),
    ),
)
