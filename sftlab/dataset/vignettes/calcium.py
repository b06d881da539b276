"""High and low calcium."""

from __future__ import annotations

from sftlab.dataset.vignettes.draw import Diagnosis, Topic
from sftlab.dataset.vignettes.normals import ALBUMIN, MAGNESIUM, POTASSIUM, SODIUM

# Harrison's 21e, "Disorders of the Parathyroid Gland and Calcium Homeostasis". Normal: calcium 8.5–10.3 and
# phosphate 2.5–4.5 mg/dL, PTH 10–65 pg/mL. Calcium needs no correction at the normal albumin.
CALCIUM = Topic(
    name="calcium",
    normals=(ALBUMIN, MAGNESIUM, POTASSIUM, SODIUM),
    diagnoses=(
        # Fifth International Workshop on primary hyperparathyroidism 2022 (Bilezikian).
        Diagnosis(
            name="Primary hyperparathyroidism",
            ages=(45, 75),
            presents=(
                "has had two kidney stones",
                "has osteoporosis and a kidney stone",
                "has constipation and recurrent kidney stones",
            ),
            findings=(
                ("calcium is high at [10.9..12.2] mg/dL", "serum calcium is high, [10.9..12.2] mg/dL"),
                (
                    "PTH is high at [95..210] pg/mL and phosphate is low at [1.7..2.3] mg/dL",
                    "phosphate is low at [1.7..2.3] mg/dL with high PTH of [95..210] pg/mL",
                ),
            ),
            because="High calcium with high PTH.",
        ),
        # Endocrine Society 2023 hypercalcemia of malignancy guideline (El-Hajj Fuleihan).
        Diagnosis(
            name="Hypercalcemia of malignancy",
            ages=(50, 80),
            presents=(
                "has squamous cell lung cancer and is confused",
                "has lost 12 kg and has a large lung mass",
                "has a kidney tumor and is drowsy and thirsty",
            ),
            findings=(
                ("calcium is high at [13.0..15.4] mg/dL", "serum calcium is high, [13.0..15.4] mg/dL"),
                (
                    "PTH is low at [2..7] pg/mL and PTH-related peptide is high",
                    "PTH-related peptide is high with low PTH of [2..7] pg/mL",
                ),
            ),
            because="High calcium, low PTH, high PTH-related peptide.",
        ),
        # Endocrine Society 2011 vitamin D guideline (Holick): toxicity above 150, deficiency below 20 ng/mL.
        Diagnosis(
            name="Vitamin D toxicity",
            ages=(30, 75),
            presents=(
                "takes many high-dose supplements and is nauseated",
                "has nausea and thirst and takes daily mega-dose supplements",
                "is constipated and drowsy; {he} takes online supplements",
            ),
            findings=(
                ("calcium is high at [12.2..14.0] mg/dL", "serum calcium is high, [12.2..14.0] mg/dL"),
                (
                    "25-hydroxyvitamin D is very high at [180..320] ng/mL and PTH is low at [2..7] pg/mL",
                    "PTH is low at [2..7] pg/mL with very high 25-hydroxyvitamin D of [180..320] ng/mL",
                ),
            ),
            because="High calcium with very high 25-hydroxyvitamin D.",
        ),
        # Second International Workshop on hypoparathyroidism 2022 (Khan).
        Diagnosis(
            name="Hypoparathyroidism",
            ages=(25, 70),
            presents=(
                "has tingling lips and hand cramps after thyroid surgery",
                "has had muscle spasms since a thyroidectomy",
                "has perioral tingling [2..5] days after neck surgery",
            ),
            findings=(
                ("calcium is low at [6.2..7.6] mg/dL", "serum calcium is low, [6.2..7.6] mg/dL"),
                (
                    "PTH is low at [2..7] pg/mL and phosphate is high at [5.2..6.8] mg/dL",
                    "phosphate is high at [5.2..6.8] mg/dL with low PTH of [2..7] pg/mL",
                ),
            ),
            because="Low calcium with low PTH.",
        ),
        Diagnosis(
            name="Vitamin D deficiency",
            ages=(30, 80),
            presents=(
                "has bone pain and a waddling gait",
                "stays indoors and has diffuse bone pain",
                "has celiac disease and aching bones",
            ),
            findings=(
                ("calcium is low at [7.6..8.3] mg/dL", "serum calcium is low, [7.6..8.3] mg/dL"),
                (
                    "25-hydroxyvitamin D is very low at [4..9] ng/mL and PTH is high at [95..210] pg/mL",
                    "PTH is high at [95..210] pg/mL with very low 25-hydroxyvitamin D of [4..9] ng/mL",
                ),
            ),
            because="Low calcium with very low 25-hydroxyvitamin D.",
        ),
    ),
)
