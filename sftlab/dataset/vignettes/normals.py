"""Normal results that several topics share as distracting findings.

Adult reference ranges of the NBME "Laboratory Reference Values" (USMLE), kept well inside their limits.
Each is used only where it holds for every diagnosis of the topic, the children among them included.
"""

from __future__ import annotations

from sftlab.dataset.vignettes.draw import Phrasings

ALBUMIN: Phrasings = ("serum albumin is [3.9..4.6] g/dL", "albumin is normal at [3.9..4.6] g/dL")
ALT: Phrasings = ("ALT is [14..32] U/L", "ALT is normal at [14..32] U/L")
CALCIUM: Phrasings = ("serum calcium is [9.0..9.9] mg/dL", "calcium is normal at [9.0..9.9] mg/dL")
CREATININE: Phrasings = ("creatinine is [0.7..1.0] mg/dL", "creatinine is normal at [0.7..1.0] mg/dL")
GLUCOSE: Phrasings = ("glucose is [82..98] mg/dL", "glucose is normal at [82..98] mg/dL")
HEMOGLOBIN: Phrasings = ("hemoglobin is [13.6..15.2] g/dL", "hemoglobin is normal at [13.6..15.2] g/dL")
MAGNESIUM: Phrasings = ("magnesium is [1.8..2.1] mg/dL", "magnesium is normal at [1.8..2.1] mg/dL")
PLATELETS: Phrasings = ("platelets are [180..340],000/mm3", "the platelet count is normal at [180..340],000/mm3")
POTASSIUM: Phrasings = ("potassium is [3.8..4.7] mEq/L", "potassium is normal at [3.8..4.7] mEq/L")
SODIUM: Phrasings = ("sodium is [137..142] mEq/L", "sodium is normal at [137..142] mEq/L")
TSH: Phrasings = ("TSH is [1.0..3.2] mU/L", "TSH is normal at [1.0..3.2] mU/L")
