"""Cerebrospinal fluid and joint fluid."""

from __future__ import annotations

from sftlab.dataset.vignettes.draw import Diagnosis, Topic
from sftlab.dataset.vignettes.normals import CALCIUM, CREATININE, PLATELETS, POTASSIUM

# Harrison's 21e, "Acute Meningitis" and "Chronic and Recurrent Meningitis". Normal: glucose 40–70 mg/dL (over
# half of serum), protein 15–45 mg/dL, up to 5 cells/mm3. The serum glucose told beside it keeps the ratios right.
SPINAL_FLUID = Topic(
    name="spinal-fluid",
    normals=(
        ("serum glucose is [86..100] mg/dL", "glucose in serum is normal at [86..100] mg/dL"),
        CREATININE,
        PLATELETS,
        POTASSIUM,
    ),
    diagnoses=(
        # IDSA 2004 bacterial meningitis guideline (Tunkel).
        Diagnosis(
            name="Bacterial meningitis",
            ages=(18, 65),
            presents=(
                "has had high fever and a stiff neck since this morning",
                "has fever, stiff neck, and confusion for [8..20] hours",
                "has severe headache, high fever, and a stiff neck",
            ),
            findings=(
                (
                    "CSF has [1200..4800] cells/mm3, [86..96]% neutrophils",
                    "[86..96]% of the [1200..4800] CSF cells/mm3 are neutrophils",
                ),
                (
                    "CSF glucose is low at [12..34] mg/dL and protein is [160..420] mg/dL",
                    "CSF protein is [160..420] mg/dL with low glucose of [12..34] mg/dL",
                ),
            ),
            because="CSF neutrophils with low glucose.",
        ),
        # Harrison's 21e, "Acute Meningitis": lymphocytes with a normal glucose.
        Diagnosis(
            name="Viral meningitis",
            ages=(18, 40),
            presents=(
                "has headache and mild fever for [2..3] days but is alert",
                "is alert with headache, fever, and photophobia",
                "has headache, photophobia, and fever in late summer",
            ),
            findings=(
                (
                    "CSF has [60..320] cells/mm3, [80..94]% lymphocytes",
                    "[80..94]% of the [60..320] CSF cells/mm3 are lymphocytes",
                ),
                (
                    "CSF glucose is normal at [58..68] mg/dL and protein is [52..88] mg/dL",
                    "CSF protein is [52..88] mg/dL with normal glucose of [58..68] mg/dL",
                ),
            ),
            because="CSF lymphocytes with normal glucose.",
        ),
        # Thwaites, van Toorn, Schoeman: Lancet Neurol 2013;12:999.
        Diagnosis(
            name="Tuberculous meningitis",
            ages=(20, 60),
            presents=(
                "has had headache, night sweats, and fever for [3..6] weeks",
                "has had fever for [3..6] weeks and now a sixth nerve palsy",
                "has had weight loss, night sweats, and headache for weeks",
            ),
            findings=(
                (
                    "CSF has [120..380] cells/mm3, [72..88]% lymphocytes, and MRI shows basal enhancement",
                    "MRI shows basal enhancement, and [72..88]% of [120..380] CSF cells/mm3 are lymphocytes",
                ),
                (
                    "CSF glucose is low at [18..34] mg/dL and protein is [160..420] mg/dL",
                    "CSF protein is [160..420] mg/dL with low glucose of [18..34] mg/dL",
                ),
            ),
            because="Basal enhancement, CSF lymphocytes, low glucose.",
        ),
        # WHO 2022 cryptococcal disease guideline.
        Diagnosis(
            name="Cryptococcal meningitis",
            ages=(25, 55),
            presents=(
                "has untreated HIV and headache for [2..3] weeks",
                "has HIV with a CD4 count of [18..80]/mm3 and a headache",
                "has untreated HIV, blurred vision, and headache",
            ),
            findings=(
                (
                    "India ink shows encapsulated yeast in the CSF",
                    "encapsulated yeast is seen on India ink stain of CSF",
                ),
                ("opening pressure is high at [28..42] cm H2O", "there is a high opening pressure of [28..42] cm H2O"),
            ),
            because="HIV with encapsulated yeast.",
        ),
        # AHA/ASA 2023 aneurysmal subarachnoid hemorrhage guideline (Hoh).
        Diagnosis(
            name="Subarachnoid hemorrhage",
            ages=(35, 65),
            presents=(
                "had a sudden thunderclap headache [13..20] hours ago",
                "has had the worst headache of {his} life since yesterday",
                "had a sudden thunderclap headache while lifting weights yesterday",
            ),
            findings=(
                (
                    "CSF is xanthochromic with [9..40],000 red cells/mm3",
                    "[9..40],000 red cells/mm3 are found in xanthochromic CSF",
                ),
                ("CSF glucose is normal at [58..68] mg/dL", "normal CSF glucose of [58..68] mg/dL is measured"),
            ),
            because="Sudden headache with xanthochromic CSF.",
        ),
    ),
)

# Leukocytes per mm3 of joint fluid: below 2,000 non-inflammatory, above 2,000 inflammatory, above 50,000 likely
# septic (Margaretten et al.: JAMA 2007;297:1478; Harrison's 21e, "Approach to Articular Disorders").
JOINT_FLUID = Topic(
    name="joint-fluid",
    normals=(CALCIUM, CREATININE, PLATELETS, POTASSIUM),
    diagnoses=(
        # ACR/EULAR 2015 gout classification criteria.
        Diagnosis(
            name="Gout",
            ages=(40, 70),
            sexes="m",
            presents=(
                "woke at night with a red, painful big toe",
                "has a hot, swollen big toe after heavy drinking",
                "takes hydrochlorothiazide and has a red, painful big toe",
            ),
            findings=(
                (
                    "joint fluid has needle-shaped, negatively birefringent crystals",
                    "needle-shaped crystals with negative birefringence are seen in the joint fluid",
                ),
                ("fluid leukocytes are [9..38],000/mm3", "there are [9..38],000 leukocytes/mm3 in the fluid"),
            ),
            because="Needle-shaped crystals with negative birefringence.",
        ),
        # ACR/EULAR 2023 CPPD classification criteria.
        Diagnosis(
            name="Pseudogout",
            ages=(65, 88),
            presents=(
                "has a hot, swollen knee [2..4] days after surgery",
                "has sudden knee pain and swelling",
                "has had an acutely painful, swollen wrist since yesterday",
            ),
            findings=(
                (
                    "joint fluid has rhomboid, positively birefringent crystals",
                    "rhomboid crystals with positive birefringence are seen in the joint fluid",
                ),
                ("radiographs show chondrocalcinosis", "chondrocalcinosis is seen on radiographs"),
            ),
            because="Rhomboid crystals with positive birefringence.",
        ),
        Diagnosis(
            name="Septic arthritis",
            ages=(30, 80),
            presents=(
                "has fever, chills, and a hot knee",
                "injects drugs and has fever and a hot, immobile knee",
                "has fever and cannot bend the swollen knee",
            ),
            findings=(
                (
                    "joint fluid has [72..130],000 leukocytes/mm3, [91..97]% neutrophils",
                    "[91..97]% of [72..130],000 joint fluid leukocytes/mm3 are neutrophils",
                ),
                ("gram-positive cocci but no crystals are seen", "no crystals are seen, only gram-positive cocci"),
            ),
            because="Very high leukocytes with cocci.",
        ),
        # NICE NG226 (2022) osteoarthritis guideline: age over 45, use pain, morning stiffness under 30 minutes.
        Diagnosis(
            name="Osteoarthritis",
            ages=(55, 82),
            presents=(
                "has had knee pain with use for [3..9] years",
                "has knee pain on stairs that eases with rest",
                "has knee pain after walking and stiffness for [5..15] minutes",
            ),
            findings=(
                (
                    "joint fluid is clear with [200..900] leukocytes/mm3",
                    "clear joint fluid has [200..900] leukocytes/mm3",
                ),
                ("radiographs show osteophytes and a narrow joint space", "the joint space is narrow with osteophytes"),
            ),
            because="Clear fluid with osteophytes.",
        ),
        # ACR/EULAR 2010 rheumatoid arthritis classification criteria.
        Diagnosis(
            name="Rheumatoid arthritis",
            ages=(30, 65),
            presents=(
                "has had symmetric swelling of the knuckles for [3..8] months",
                "has morning stiffness for 2 hours and swollen wrists",
                "has swollen wrists and knuckles on both sides",
            ),
            findings=(
                (
                    "joint fluid has [6..22],000 leukocytes/mm3 and no crystals",
                    "no crystals and [6..22],000 leukocytes/mm3 are found in joint fluid",
                ),
                ("anti-CCP antibodies are positive", "a test for anti-CCP antibodies is positive"),
            ),
            because="Symmetric joint swelling with anti-CCP antibodies.",
        ),
    ),
)
