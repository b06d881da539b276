"""Anemias and bleeding disorders."""

from __future__ import annotations

import random

from sftlab.dataset.vignettes.draw import Diagnosis, Topic
from sftlab.dataset.vignettes.normals import ALT, CREATININE, GLUCOSE, PLATELETS, POTASSIUM, SODIUM


def _trait(rng: random.Random) -> dict[str, object]:
    """Hemoglobin follows from red cells × MCV (the hematocrit) at a just low MCHC of 31 g/dL."""
    cells, volume = rng.randint(54, 59) / 10, rng.randint(60, 65)
    return {"cells": f"{cells:.1f}", "mcv": volume, "hb": f"{cells * volume * 0.031:.1f}"}


# Anemia is hemoglobin below 12 (women) or 13 g/dL (men): WHO 2024 guideline on haemoglobin cutoffs.
ANEMIA = Topic(
    name="anemia",
    normals=(PLATELETS, CREATININE, POTASSIUM, SODIUM),
    diagnoses=(
        # WHO 2020 guideline on ferritin (< 15 ng/mL); Harrison's 21e, "Iron Deficiency".
        Diagnosis(
            name="Iron deficiency anemia",
            ages=(18, 48),
            sexes="f",
            presents=(
                "has heavy periods and craves ice",
                "is tired and short of breath on stairs and has heavy periods",
                "has had fatigue and brittle nails for [2..8] months",
            ),
            findings=(
                (
                    "hemoglobin is [7.6..10.4] g/dL with a low MCV of [64..75] fL",
                    "MCV is low at [64..75] fL and hemoglobin is [7.6..10.4] g/dL",
                ),
                (
                    "ferritin is low at [3..11] ng/mL and TIBC is high at [430..520] µg/dL",
                    "low ferritin of [3..11] ng/mL and high TIBC of [430..520] µg/dL are found",
                ),
            ),
            because="Low MCV, low ferritin, high TIBC.",
        ),
        # Weiss, Ganz, Goodnough: Blood 2019;133:40 (anemia of inflammation).
        Diagnosis(
            name="Anemia of inflammation",
            ages=(35, 75),
            presents=(
                "has long-standing rheumatoid arthritis and fatigue",
                "has had chronic osteomyelitis for [5..14] months and is tired",
                "has fatigue during a flare of Crohn disease",
            ),
            findings=(
                (
                    "hemoglobin is [8.8..10.6] g/dL with a normal MCV of [82..90] fL",
                    "MCV is normal at [82..90] fL and hemoglobin is [8.8..10.6] g/dL",
                ),
                (
                    "ferritin is high at [320..680] ng/mL and TIBC is low at [170..235] µg/dL",
                    "high ferritin of [320..680] ng/mL and low TIBC of [170..235] µg/dL are found",
                ),
            ),
            because="High ferritin with low TIBC.",
        ),
        # BSH 2010 haemoglobinopathy guideline (HbA2 > 3.5%); Mentzer: Lancet 1973;1:882 (MCV / red cells < 13).
        Diagnosis(
            name="Beta-thalassemia trait",
            ages=(18, 45),
            presents=(
                "has no symptoms; {his} family comes from Cyprus",
                "has a routine check; {his} parents come from Sardinia",
                "feels well; {his} family comes from Greece",
            ),
            findings=(
                (
                    "hemoglobin is {hb} g/dL with a low MCV of {mcv} fL and normal ferritin",
                    "MCV is low at {mcv} fL, hemoglobin {hb} g/dL, and ferritin normal",
                ),
                (
                    "hemoglobin A2 is high at [4.2..6.0]% and the red cell count is {cells} million/mm3",
                    "the red cell count is {cells} million/mm3 with a high hemoglobin A2 of [4.2..6.0]%",
                ),
            ),
            because="Low MCV with high hemoglobin A2.",
            numbers=_trait,
        ),
        # BSH 2014 cobalamin and folate guideline (Devalia); Harrison's 21e, "Megaloblastic Anemias".
        Diagnosis(
            name="Vitamin B12 deficiency",
            ages=(45, 80),
            presents=(
                "has numb feet and an unsteady gait",
                "has eaten a strict vegan diet for years and has tingling feet",
                "has numb feet and a smooth, sore tongue",
            ),
            findings=(
                (
                    "hemoglobin is [7.8..10.2] g/dL with a high MCV of [108..122] fL",
                    "MCV is high at [108..122] fL and hemoglobin is [7.8..10.2] g/dL",
                ),
                (
                    "the smear shows hypersegmented neutrophils, and methylmalonic acid is high",
                    "methylmalonic acid is high, with hypersegmented neutrophils on the smear",
                ),
            ),
            because="High MCV with hypersegmented neutrophils.",
        ),
        # BSH 2017 primary autoimmune haemolytic anaemia guideline (Hill).
        Diagnosis(
            name="Autoimmune hemolytic anemia",
            ages=(25, 70),
            presents=(
                "has had jaundice and dark urine for [3..9] days",
                "has lupus and is newly pale and jaundiced",
                "has chronic lymphocytic leukemia and new jaundice",
            ),
            findings=(
                (
                    "hemoglobin is [6.8..9.4] g/dL with spherocytes and a positive Coombs test",
                    "the direct Coombs test is positive with spherocytes; hemoglobin is [6.8..9.4] g/dL",
                ),
                (
                    "haptoglobin is low and LDH is high at [520..980] U/L",
                    "LDH is high at [520..980] U/L with low haptoglobin",
                ),
            ),
            because="Positive Coombs test with spherocytes.",
        ),
    ),
)

BLEEDING = Topic(
    name="bleeding",
    normals=(ALT, GLUCOSE, POTASSIUM, SODIUM),
    diagnoses=(
        # WFH 2020 hemophilia guidelines (Srivastava): moderate is factor VIII 1–5%.
        Diagnosis(
            name="Hemophilia A",
            ages=(6, 16),
            sexes="m",
            presents=(
                "has a swollen, painful knee after a minor fall",
                "has a swollen elbow; {his} maternal uncle bleeds easily",
                "has bled into the knee after gym class",
            ),
            findings=(
                (
                    "aPTT is long at [62..90] s with normal PT and normal platelets",
                    "PT and platelets are normal but aPTT is long at [62..90] s",
                ),
                ("factor VIII activity is low at [2..4]%", "low factor VIII activity of [2..4]% is measured"),
            ),
            because="Joint bleeding with low factor VIII.",
        ),
        # ASH ISTH NHF WFH 2021 guideline (James): VWF activity < 30% is diagnostic; factor VIII follows VWF.
        Diagnosis(
            name="Von Willebrand disease",
            ages=(14, 42),
            presents=(
                "has frequent nosebleeds and bleeding gums",
                "bled for hours after a tooth extraction",
                "has nosebleeds, as does {his} father",
            ),
            findings=(
                (
                    "aPTT is slightly long at [42..49] s with normal PT and normal platelets",
                    "PT and platelets are normal and aPTT is slightly long at [42..49] s",
                ),
                (
                    "ristocetin cofactor activity is low at [12..27]%",
                    "low ristocetin activity of [12..27]% is measured",
                ),
            ),
            because="Mucosal bleeding with low ristocetin activity.",
        ),
        # ISTH 2001 DIC score (Taylor): platelets, D-dimer, PT, fibrinogen.
        Diagnosis(
            name="Disseminated intravascular coagulation",
            ages=(25, 70),
            presents=(
                "has septic shock and oozes from catheter sites",
                "has acute promyelocytic leukemia and bleeds from venipuncture sites",
                "has gram-negative sepsis and oozes from every line",
            ),
            findings=(
                (
                    "PT is long at [20..29] s and aPTT at [50..75] s, and platelets are [24..70],000/mm3",
                    "platelets are [24..70],000/mm3 with long PT of [20..29] s and aPTT of [50..75] s",
                ),
                (
                    "fibrinogen is low at [50..95] mg/dL and D-dimer is high",
                    "D-dimer is high and fibrinogen is low at [50..95] mg/dL",
                ),
            ),
            because="Long PT, low fibrinogen, high D-dimer.",
        ),
        # ASH 2019 immune thrombocytopenia guideline (Neunert).
        Diagnosis(
            name="Immune thrombocytopenia",
            ages=(18, 60),
            presents=(
                "feels well but has new petechiae on the legs",
                "has petechiae and easy bruising but is otherwise healthy",
                "has had petechiae since a cold [2..4] weeks ago",
            ),
            findings=(
                (
                    "platelets are [6..24],000/mm3, with normal PT and aPTT",
                    "PT and aPTT are normal; platelets are [6..24],000/mm3",
                ),
                (
                    "hemoglobin is normal and the smear shows only few, large platelets",
                    "the smear shows few, large platelets, and hemoglobin is normal",
                ),
            ),
            because="Isolated low platelets with few, large platelets.",
        ),
        # ISTH 2020 TTP guidelines (Zheng): ADAMTS13 activity < 10%.
        Diagnosis(
            name="Thrombotic thrombocytopenic purpura",
            ages=(22, 55),
            presents=(
                "has fever, confusion, and petechiae",
                "has had confusion and purpura since yesterday",
                "has a seizure after [2..4] days of fever and purpura",
            ),
            findings=(
                (
                    "platelets are [8..24],000/mm3, with normal PT and aPTT",
                    "PT and aPTT are normal; platelets are [8..24],000/mm3",
                ),
                (
                    "the smear shows schistocytes, and ADAMTS13 activity is below 10%",
                    "ADAMTS13 activity is below 10%, with schistocytes on the smear",
                ),
            ),
            because="Schistocytes with low ADAMTS13.",
        ),
    ),
)
