"""The embedded vignettes: their form, their uniqueness and the arithmetic of their medicine."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from sftlab.dataset import vignettes
from sftlab.dataset.vignettes import TOPICS, rows
from sftlab.dataset.vignettes.draw import Diagnosis, Topic, fill, number, sentence, who

Row = dict[str, Any]
DIAGNOSES = {diagnosis.name: diagnosis for topic in TOPICS for diagnosis in topic.diagnoses}


@pytest.fixture(scope="module")
def many() -> list[Row]:
    return rows(5000, 3)


def of(many: list[Row], *, topic: str = "", answer: str = "") -> list[Row]:
    found = [row for row in many if (not topic or row["topic"] == topic) and (not answer or row["answer"] == answer)]
    assert found
    return found


def values(text: str, *patterns: str) -> list[float]:
    """The number that each pattern has in its one group; every pattern must be found."""
    matches = [re.search(pattern, text) for pattern in patterns]
    assert all(matches), (patterns, text)
    return [float(match[1]) for match in matches if match]


def test_same_seed_same_rows_and_longer_begins_with_shorter() -> None:
    long = rows(400, 7)
    assert long == rows(400, 7)
    assert long[:130] == rows(130, 7)
    assert [row["id"] for row in long[::399]] == ["vignette-000000", "vignette-000399"]
    assert rows(0, 7) == []


def test_seeds_differ_also_by_sign() -> None:
    questions = [tuple(row["question"] for row in rows(20, seed)) for seed in (0, 1, -1, 2)]
    assert len(set(questions)) == 4


def test_global_random_state_is_neither_used_nor_moved() -> None:
    random.seed(1)
    state = random.getstate()
    first = rows(50, 4)
    assert random.getstate() == state
    random.seed(2)
    assert rows(50, 4) == first


def test_hash_order_does_not_matter() -> None:
    program = "import json; from sftlab.dataset.vignettes import rows; print(json.dumps(rows(130, 5)))"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        assert json.loads(done.stdout) == rows(130, 5)


def test_no_question_twice(many: list[Row]) -> None:
    assert len(many) == 5000
    assert len({" ".join(row["question"].lower().split()) for row in many}) == 5000
    assert len({row["id"] for row in many}) == 5000


def test_exhausted_space_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Diagnosis("Cold", (30, 30), ("sneezes",), (("the nose runs",),), "Runny nose.", sexes="f")
    topic = Topic("nose", (("the ears are fine",), ("the eyes are fine",)), (fixed,), leads=("Which is it?",))
    monkeypatch.setattr(vignettes, "TOPICS", (topic,))
    # Three openings, and one of two normals first or second, or both in any order: 3 × (2 × 2 + 6).
    with pytest.raises(ValueError, match=r"no new question about 'Cold' for row \d+ of 40 .* at most \d+ rows"):
        rows(40, 0)
    assert len(rows(5, 0)) == 5


def test_negative_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        rows(-1, 0)


def test_topics_and_names() -> None:
    assert len({topic.name for topic in TOPICS}) == len(TOPICS) >= 12
    assert all(len(topic.diagnoses) >= 5 for topic in TOPICS)
    assert len(DIAGNOSES) == sum(len(topic.diagnoses) for topic in TOPICS)
    assert all(1 <= len(name.split()) <= 4 for name in DIAGNOSES)
    assert len({diagnosis.because for diagnosis in DIAGNOSES.values()}) == len(DIAGNOSES)


def test_every_diagnosis_once_before_any_again(many: list[Row]) -> None:
    size = len(DIAGNOSES)
    decks = [[row["answer"] for row in many[start : start + size]] for start in range(0, 5000 - size, size)]
    assert all(sorted(deck) == sorted(DIAGNOSES) for deck in decks)
    assert decks[0] != decks[1]


def test_options_are_of_the_topic_and_hold_the_answer(many: list[Row]) -> None:
    topics = {topic.name: {diagnosis.name for diagnosis in topic.diagnoses} for topic in TOPICS}
    for row in many:
        assert list(row) == ["id", "topic", "question", "options", "answer", "answer_idx", "rationale"]
        options = row["options"]
        assert "".join(options) in ("ABCD", "ABCDE")
        assert len(set(options.values())) == len(options)
        assert set(options.values()) <= topics[row["topic"]]
        assert options[row["answer_idx"]] == row["answer"]


@pytest.mark.parametrize("letters", ["ABCD", "ABCDE"])
def test_answers_are_uniform_over_the_letters(many: list[Row], letters: str) -> None:
    counts = Counter(row["answer_idx"] for row in many if len(row["options"]) == len(letters))
    total = sum(counts.values())
    assert 2300 < total < 2700
    expected = total / len(letters)
    # 16.3 is the 99.9% point of chi-square with 3 degrees of freedom, 18.5 that with 4.
    assert sum((counts[letter] - expected) ** 2 / expected for letter in letters) < {4: 16.3, 5: 18.5}[len(letters)]


def test_rationale_has_findings_then_name_then_letter(many: list[Row]) -> None:
    for row in many:
        letter, name = row["answer_idx"], row["answer"]
        because = DIAGNOSES[name].because
        assert (
            row["rationale"] == f"{because} These findings mean {name} ({letter}). Therefore, the answer is ({letter})."
        )
        assert row["options"][letter] == name


def test_question_names_no_diagnosis_of_its_topic(many: list[Row]) -> None:
    for topic in TOPICS:
        names = "|".join(re.escape(diagnosis.name) for diagnosis in topic.diagnoses)
        pattern = re.compile(rf"\b({names})\b", re.IGNORECASE)
        for row in of(many, topic=topic.name):
            assert not pattern.search(row["question"])


def test_lengths(many: list[Row]) -> None:
    questions = [len(row["question"].split()) for row in many]
    rationales = [len(row["rationale"].split()) for row in many]
    assert max(questions) <= 90
    assert max(rationales) <= 30
    assert 30 < sum(questions) / 5000 < 60
    assert 12 < sum(rationales) / 5000 < 25
    assert all(len(diagnosis.because.split()) <= 9 for diagnosis in DIAGNOSES.values())


def test_text_is_finished(many: list[Row]) -> None:
    for row in many:
        assert not re.search(r"[\[\]{}]|\.\.|\s\s|None", row["question"] + row["rationale"])
        assert row["question"].endswith("?")
        assert row["question"][0].isupper()


def test_age_sex_and_pronouns(many: list[Row]) -> None:
    for row in many:
        diagnosis = DIAGNOSES[row["answer"]]
        patient = re.search(r"\b(an?) (\d+)-year-old (boy|girl|man|woman)\b", row["question"], re.IGNORECASE)
        assert patient
        age, sex = int(patient[2]), "m" if patient[3] in ("boy", "man") else "f"
        assert diagnosis.ages[0] <= age <= diagnosis.ages[1]
        assert sex in diagnosis.sexes
        assert (patient[3] in ("boy", "girl")) == (age < 18)
        assert (patient[1].lower() == "an") == (patient[2][0] == "8" or patient[2] in ("11", "18"))
        others = r"\b(she|her)\b" if sex == "m" else r"\b(he|his|him)\b"
        assert not re.search(others, row["question"], re.IGNORECASE)


def test_every_finding_is_told(many: list[Row]) -> None:
    def pattern(phrasing: str) -> str:
        parts = re.split(r"\{\w+\}|\[[\d.]+\]", phrasing)
        return r"[\w.]+".join(re.escape(part) for part in parts)

    told = {
        name: [re.compile("|".join(map(pattern, phrasings)), re.IGNORECASE) for phrasings in diagnosis.findings]
        for name, diagnosis in DIAGNOSES.items()
    }
    for row in many:
        assert all(finding.search(row["question"]) for finding in told[row["answer"]]), row["question"]


def gases(many: list[Row], *answers: str) -> Iterator[tuple[float, float, float]]:
    for answer in answers:
        for row in of(many, topic="acid-base", answer=answer):
            ph, pco2, bicarbonate = values(
                row["question"], r"pH (?:is \w+ at |of )(7\.\d\d)", r"pCO2 (?:of )?(\d+)", r"bicarbonate (?:of )?(\d+)"
            )
            assert ph == pytest.approx(6.1 + math.log10(bicarbonate / (0.03 * pco2)), abs=0.0051)
            yield ph, pco2, bicarbonate


def test_metabolic_acidosis_is_compensated_by_winters_formula(many: list[Row]) -> None:
    for ph, pco2, bicarbonate in gases(many, "High-gap metabolic acidosis", "Non-gap metabolic acidosis"):
        assert ph < 7.35
        assert abs(pco2 - (1.5 * bicarbonate + 8)) <= 2


def test_metabolic_alkalosis_is_compensated(many: list[Row]) -> None:
    for ph, pco2, bicarbonate in gases(many, "Metabolic alkalosis"):
        assert ph > 7.45
        assert abs(pco2 - (40 + 0.7 * (bicarbonate - 24))) <= 2


def test_respiratory_disorders_are_acute(many: list[Row]) -> None:
    for ph, pco2, bicarbonate in gases(many, "Acute respiratory acidosis"):
        assert ph < 7.35
        assert abs(bicarbonate - (24 + 0.1 * (pco2 - 40))) <= 0.5
    for ph, pco2, bicarbonate in gases(many, "Acute respiratory alkalosis"):
        assert ph > 7.45
        assert abs(bicarbonate - (24 - 0.2 * (40 - pco2))) <= 0.5


@pytest.mark.parametrize(("kind", "lowest", "highest"), [("High", 20, 40), ("Non", 8, 12)])
def test_anion_gap(many: list[Row], kind: str, lowest: int, highest: int) -> None:
    for row in of(many, answer=f"{kind}-gap metabolic acidosis"):
        sodium, chloride, bicarbonate, gap = values(
            row["question"],
            r"odium (?:is )?(\d+)",
            r"chloride (\d+)",
            r"bicarbonate of (\d+)",
            r"anion gap (?:is \w+ at|of) (\d+)",
        )
        assert sodium - chloride - bicarbonate == gap
        assert lowest <= gap <= highest
        assert (chloride > 106) == (kind == "Non")


def test_serum_osmolality(many: list[Row]) -> None:
    checked = 0
    for answer in ("SIADH", "Hypovolemic hyponatremia"):
        for row in of(many, answer=answer):
            text = row["question"]
            # Three digits: urine sodium has two.
            sodium, osmolality = values(text, r"odium (?:is low at|of) (1\d\d) mEq", r"erum osmolality is (\d+)")
            assert osmolality < 275
            if "lucose" in text:
                glucose, urea = values(text, r"lucose (?:is )?(\d+)", r"rea nitrogen (?:is )?(\d+)")
                assert osmolality == pytest.approx(2 * sodium + glucose / 18 + urea / 2.8, abs=0.51)
                checked += 1
    assert checked > 20


def test_desmopressin_raises_urine_osmolality_only_in_central_disease(many: list[Row]) -> None:
    pattern = r"smopressin.*?osmolality(?: to| is hardly changed at|, now| rises to) (\d+)"
    for kind in ("Central", "Nephrogenic"):
        for row in of(many, answer=f"{kind} diabetes insipidus"):
            before, after = values(row["question"], r"rine osmolality (?:is )?(\d+) mOsm", pattern)
            assert before < 300
            assert (after > 1.5 * before) == (kind == "Central")
            assert (after <= 1.1 * before) == (kind == "Nephrogenic")


def test_lights_criteria(many: list[Row]) -> None:
    for row in of(many, topic="pleural-effusion"):
        text = row["question"]
        fluid, serum = values(text, r"rotein (?:is )?(\d\.\d) g/dL", r"(?:serum |and )(\d\.\d)\)?(?: in serum)?")
        exudate = "exudate" in text
        assert exudate == (row["answer"] != "Heart failure")
        assert exudate == (fluid / serum > 0.5)
        if not exudate:
            fluid_ldh, serum_ldh = values(text, r"LDH (?:is )?(\d+)", r"U/L (?:in the fluid and |\(serum )(\d+)")
            assert fluid_ldh / serum_ldh <= 0.6


def test_urea_to_creatinine_and_sodium_excretion(many: list[Row]) -> None:
    for row in of(many, topic="kidney-injury"):
        creatinine, urea = values(row["question"], r"reatinine (?:is )?(\d\.\d)", r"rea nitrogen (?:is )?(\d+)")
        assert (urea / creatinine > 20) == (row["answer"] == "Prerenal azotemia")
        if "FENa" in row["question"]:
            (excretion,) = values(row["question"], r"FENa (?:is \w+ at|of) ([\d.]+)%")
            assert (excretion < 1) == (row["answer"] == "Prerenal azotemia")
            assert (excretion > 2) == (row["answer"] == "Acute tubular necrosis")


def test_thalassemia_indices(many: list[Row]) -> None:
    for row in of(many, answer="Beta-thalassemia trait"):
        volume, cells, hemoglobin = values(
            row["question"], r"MCV (?:is low at|of) (\d+)", r"(\d\.\d) million", r"emoglobin (?:is )?(\d+\.\d) g/dL"
        )
        assert volume / cells < 13  # Mentzer
        assert 29 < hemoglobin / (volume * cells / 1000) < 33  # MCHC


def test_numbers_keep_range_and_decimals() -> None:
    rng = random.Random(0)
    assert {number(rng, "0.8", "1.1") for _ in range(200)} == {"0.8", "0.9", "1.0", "1.1"}
    assert {number(rng, "9", "11") for _ in range(200)} == {"9", "10", "11"}
    assert re.fullmatch(r"she has [567],000/mm3", fill("{he} has [5..7],000/mm3", {"he": "she"}, rng))


def test_words_for_the_patient_and_sentences() -> None:
    assert who(8, "f") == "an 8-year-old girl"
    assert who(17, "m") == "a 17-year-old boy"
    assert who(18, "m") == "an 18-year-old man"
    assert who(80, "f") == "an 80-year-old woman"
    assert sentence("aPTT is long") == "aPTT is long."
    assert sentence("anti-HBs is positive") == "Anti-HBs is positive."
    assert sentence("a man waits") == "A man waits."
