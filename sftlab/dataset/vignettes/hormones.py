"""Thyroid and adrenal disease."""

from __future__ import annotations

from sftlab.dataset.vignettes.draw import Diagnosis, Topic
from sftlab.dataset.vignettes.normals import CALCIUM, CREATININE, GLUCOSE, HEMOGLOBIN, MAGNESIUM, PLATELETS, TSH

# Normal: TSH 0.4–4.0 mU/L, free T4 0.8–1.8 ng/dL.
THYROID = Topic(
    name="thyroid",
    normals=(CALCIUM, CREATININE, GLUCOSE, PLATELETS),
    diagnoses=(
        # ATA 2016 hyperthyroidism guideline (Ross).
        Diagnosis(
            name="Graves disease",
            ages=(20, 50),
            presents=(
                "has lost weight and has palpitations and bulging eyes",
                "has a tremor, heat intolerance, and bulging eyes",
                "has double vision, bulging eyes, and weight loss",
            ),
            findings=(
                (
                    "TSH is low at 0.0[1..3] mU/L and free T4 is high at [3.0..5.8] ng/dL",
                    "free T4 is high at [3.0..5.8] ng/dL with low TSH of 0.0[1..3] mU/L",
                ),
                (
                    "the thyroid is diffusely large, and TSH receptor antibodies are positive",
                    "TSH receptor antibodies are positive, and there is a diffuse goiter",
                ),
            ),
            because="Low TSH with TSH receptor antibodies.",
        ),
        # ATA/AACE 2012 hypothyroidism guideline (Garber).
        Diagnosis(
            name="Hashimoto thyroiditis",
            ages=(28, 60),
            presents=(
                "has gained weight and feels cold",
                "is tired and constipated and has dry skin",
                "has fatigue and cold intolerance",
            ),
            findings=(
                (
                    "TSH is high at [18..75] mU/L and free T4 is low at [0.2..0.6] ng/dL",
                    "free T4 is low at [0.2..0.6] ng/dL with high TSH of [18..75] mU/L",
                ),
                (
                    "the thyroid is firm, and thyroid peroxidase antibodies are positive",
                    "thyroid peroxidase antibodies are positive, and there is a firm goiter",
                ),
            ),
            because="High TSH, low T4, peroxidase antibodies.",
        ),
        # ATA 2016 (Ross): painful thyroiditis, high ESR, low uptake.
        Diagnosis(
            name="Subacute thyroiditis",
            ages=(28, 55),
            presents=(
                "has neck pain [2..4] weeks after a sore throat",
                "has neck pain and palpitations after a viral illness",
                "has had neck pain since a cold [2..4] weeks ago",
            ),
            findings=(
                (
                    "TSH is low at 0.0[1..5] mU/L and free T4 is high at [2.2..3.4] ng/dL",
                    "free T4 is high at [2.2..3.4] ng/dL with low TSH of 0.0[1..5] mU/L",
                ),
                (
                    "the thyroid is tender, and ESR is high at [60..98] mm/h",
                    "ESR is high at [60..98] mm/h with a tender thyroid",
                ),
            ),
            because="Low TSH with a tender thyroid.",
        ),
        # ETA 2018 central hypothyroidism guideline (Persani): low free T4 with a low or normal TSH.
        Diagnosis(
            name="Central hypothyroidism",
            ages=(30, 65),
            presents=(
                "feels cold and has lost {his} outer visual fields",
                "is tired and has headaches and poor side vision",
                "has fatigue and cold intolerance after pituitary radiation",
            ),
            findings=(
                (
                    "free T4 is low at [0.3..0.6] ng/dL, yet TSH is also low at 0.[10..30] mU/L",
                    "TSH is low at 0.[10..30] mU/L, and free T4 is also low at [0.3..0.6] ng/dL",
                ),
                ("MRI shows a pituitary abnormality", "the pituitary is abnormal on MRI"),
            ),
            because="Low T4 with low TSH and abnormal pituitary.",
        ),
        # ETA 2013 subclinical hypothyroidism guideline (Pearce): raised TSH with a normal free T4.
        Diagnosis(
            name="Subclinical hypothyroidism",
            ages=(35, 75),
            presents=(
                "feels well at a routine visit",
                "has no symptoms at a yearly check",
                "is well and has blood drawn for a health check",
            ),
            findings=(
                (
                    "TSH is slightly high at [5.4..9.4] mU/L but free T4 is normal at [1.0..1.4] ng/dL",
                    "free T4 is normal at [1.0..1.4] ng/dL with slightly high TSH of [5.4..9.4] mU/L",
                ),
                ("the thyroid is not enlarged", "there is no goiter"),
            ),
            because="Slightly high TSH with normal T4.",
        ),
    ),
)

ADRENAL = Topic(
    name="adrenal",
    normals=(CALCIUM, HEMOGLOBIN, MAGNESIUM, TSH),
    diagnoses=(
        # Endocrine Society 2008 (Nieman): cortisol above 1.8 µg/dL after 1 mg dexamethasone.
        Diagnosis(
            name="Cushing syndrome",
            ages=(25, 60),
            presents=(
                "has gained weight and bruises easily",
                "has a round face and weak thighs",
                "has new diabetes and central weight gain",
            ),
            findings=(
                ("there are wide purple striae on the abdomen", "the abdomen has wide purple striae"),
                (
                    "after dexamethasone, morning cortisol stays high at [9..22] µg/dL",
                    "dexamethasone leaves morning cortisol high at [9..22] µg/dL",
                ),
            ),
            because="Purple striae with high cortisol after dexamethasone.",
        ),
        # Endocrine Society 2016 primary adrenal insufficiency (Bornstein).
        Diagnosis(
            name="Addison disease",
            ages=(25, 60),
            presents=(
                "has fatigue, weight loss, and darkened skin",
                "is dizzy and craves salt; {his} gums have darkened",
                "has nausea and weakness and dark skin creases",
            ),
            findings=(
                (
                    "sodium is [124..131] and potassium is high at [5.5..6.3] mEq/L",
                    "potassium is high at [5.5..6.3] with sodium [124..131] mEq/L",
                ),
                (
                    "morning cortisol is low at [1..3] µg/dL and ACTH is high at [220..680] pg/mL",
                    "ACTH is high at [220..680] pg/mL with low morning cortisol of [1..3] µg/dL",
                ),
            ),
            because="Dark skin, low cortisol, high ACTH.",
        ),
        # Endocrine Society/ESE 2024 glucocorticoid-induced adrenal insufficiency (Beuschlein).
        Diagnosis(
            name="Secondary adrenal insufficiency",
            ages=(35, 75),
            presents=(
                "is weak after stopping long-term prednisone",
                "abruptly stopped years of prednisone and is exhausted",
                "has nausea and fatigue since prednisone was stopped",
            ),
            findings=(
                ("potassium is normal at [4.0..4.6] mEq/L", "potassium is [4.0..4.6] mEq/L, which is normal"),
                (
                    "morning cortisol is low at [1..3] µg/dL and ACTH is low at [2..5] pg/mL",
                    "ACTH is low at [2..5] pg/mL with low morning cortisol of [1..3] µg/dL",
                ),
            ),
            because="Prednisone stopped, low cortisol, low ACTH.",
        ),
        # Endocrine Society 2014 (Lenders): metanephrines, here at least 3 times their upper limit.
        Diagnosis(
            name="Pheochromocytoma",
            ages=(25, 60),
            presents=(
                "has spells of headache, sweating, and palpitations",
                "has attacks of pounding headache and sweating",
                "has sudden spells of sweating, pallor, and palpitations",
            ),
            findings=(
                (
                    "plasma metanephrines are [4..9] times the upper limit",
                    "metanephrines in plasma are high, [4..9] times the limit",
                ),
                (
                    "blood pressure is [190..225]/[105..125] mm Hg during a spell",
                    "during a spell, blood pressure is [190..225]/[105..125] mm Hg",
                ),
            ),
            because="Spells with high metanephrines.",
        ),
        # Endocrine Society 2016 primary aldosteronism (Funder).
        Diagnosis(
            name="Primary aldosteronism",
            ages=(30, 60),
            presents=(
                "has hypertension despite three drugs",
                "has muscle cramps and resistant hypertension",
                "has had resistant hypertension for [2..6] years",
            ),
            findings=(
                ("potassium is low at [2.6..3.2] mEq/L", "low potassium of [2.6..3.2] mEq/L is found"),
                (
                    "aldosterone is high at [24..48] ng/dL and renin is suppressed",
                    "renin is suppressed with high aldosterone of [24..48] ng/dL",
                ),
            ),
            because="Low potassium, high aldosterone, suppressed renin.",
        ),
    ),
)
