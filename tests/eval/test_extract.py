from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from sftlab.dataset import sandbox
from sftlab.errors import ConfigError
from sftlab.eval import extract
from sftlab.eval.extract import compile_pattern, last, normalise_answer, probe, read, strict
from sftlab.eval.lenient import lenient

PATTERN = compile_pattern(r"(?i)the answer is\s*\(([A-Z])\)")
OPTIONS = {
    "A": "Blood test",
    "B": "Iron deficiency",
    "C": "Iron deficiency anemia",
    "D": "Clostridioides difficile colitis",
}


@pytest.mark.parametrize(
    ("text", "first", "final"),
    [
        ("the answer is (B)", "B", "B"),
        ("The Answer Is (b).", "B", "B"),
        ("the answer is\n(C)", "C", "C"),
        ("The answer is (A). No, the answer is (D).", "A", "D"),
        ("the answer is (Z)", "Z", "Z"),  # outside the options: given, and wrong
        ("the answer is **(B)**", None, None),
        ("the answer is: (B)", None, None),
        ("", None, None),
    ],
)
def test_strict_is_the_first_match_and_last_the_last(text: str, first: str | None, final: str | None) -> None:
    assert strict(text, PATTERN) == first
    assert last(text, PATTERN) == final


def test_longer_answers_keep_their_case_and_empty_ones_do_not_count() -> None:
    assert strict("#### Paris", compile_pattern(r"#### *(\w*)")) == "Paris"
    assert strict("#### \n#### 42", compile_pattern(r"#### *(\d*)")) == "42"
    assert strict("ab b", compile_pattern(r"ab|(b)")) == "B"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"the answer is (([A-Z])", "position 14"),
        (r"the answer is [A-Z]", "0 capturing groups"),
        (r"(the) answer is ([A-Z])", "2 capturing groups"),
        (r"(a{99999999999999999999})", "lower the count"),
    ],
)
def test_a_bad_pattern_is_named_with_its_remedy(pattern: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_pattern(pattern)
    assert repr(pattern) in str(caught.value)
    assert says in str(caught.value)


COMMITTED = [
    # The letter by an answer or a choice.
    ("the answer is (B)", "B"),
    ("The answer is (b).", "B"),
    ("The answer is **(B)**", "B"),
    ("The answer is: B", "B"),
    ("Answer: C", "C"),
    ("Answer: c", "C"),
    ("ANSWER: C.", "C"),
    ("**Answer:** C", "C"),
    ("**Answer: (C)**", "C"),
    ("Answer:\n\n**C**", "C"),
    ("Reasoning.\n\n## Final Answer\n\n**C**", "C"),
    ("the correct answer is **B**", "B"),
    ("The correct answer is:\n\n**B. Iron deficiency**", "B"),
    ("The correct option is therefore B.", "B"),
    ("The best choice is option b", "B"),
    ("My answer would be option b.", "B"),
    ("The answer is option (D).", "D"),
    ("The answer to this question is clearly (D).", "D"),
    ("The answer, therefore, is D.", "D"),
    ("The answer must be (B).", "B"),
    ("The most likely diagnosis is (B).", "B"),
    ("The most appropriate next step is B.", "B"),
    ("Answer = D", "D"),
    ("Answer - D", "D"),
    ("Answer → D", "D"),
    ("answer is 'B'", "B"),
    ('{"answer": "B"}', "B"),
    ("<answer>B</answer>", "B"),
    ("The answer is [B].", "B"),
    ("The answer is B) Iron deficiency", "B"),
    ("The answer is A.", "A"),
    ("Answer: A", "A"),
    ("Answer: a.", "A"),
    ("The answer is A because the others are late signs.", "A"),
    ("The answer is A, not B.", "A"),
    ("The answer is A blood test.", "A"),  # the article or the letter: both mean option A
    ("The answer is B Iron deficiency", "B"),
    ("The answer is B - Iron deficiency", "B"),
    ("The answer is B (iron deficiency).", "B"),
    ("The answer is B, a common cause of fatigue.", "B"),
    ("The answer is B, and I am sure of it.", "B"),
    ("The answer is (B) and (A) is wrong.", "B"),
    ("The answer is B as it explains the ferritin.", "B"),
    (r"So \boxed{B}", "B"),
    (r"$\boxed{\text{B}}$", "B"),
    (r"The answer is \boxed{(b)}.", "B"),
    (r"\boxed{C. Iron deficiency anemia}", "C"),
    # The letter with little around it.
    ("B", "B"),
    ("b", "B"),
    ("A", "A"),
    ("(B)", "B"),
    ("(a)", "A"),
    ("B.", "B"),
    ("**(B)**", "B"),
    ("`B`", "B"),
    ("option b", "B"),
    ("Option A", "A"),
    ("B. Iron deficiency", "B"),
    ("(B) Iron deficiency", "B"),
    ("B. Iron deficiency\n\nThe ferritin is low.", "B"),
    ("B\n\nExplanation: the ferritin is low.", "B"),
    ("The ferritin is low, which points to a lack of iron.\n\nB", "B"),
    ("I would go with (B).", "B"),
    ("I'd pick option b", "B"),
    ("We choose B because it fits.", "B"),
    ("The ferritin is low. So (B).", "B"),
    ("Thus, B.", "B"),
    ("It must be (B).", "B"),
    ("It's B.", "B"),
    # A claim about the letter.
    ("(B) is correct.", "B"),
    ("Option b is the best answer.", "B"),
    ("B is the correct answer because ferritin is low.", "B"),
    ("(B) Iron deficiency is the most likely answer.", "B"),
    # By the option's own text.
    ("The answer is Iron deficiency anemia.", "C"),
    ("the answer is iron deficiency anemia", "C"),
    ("Answer: Iron deficiency.", "B"),
    ("The answer is a blood test.", "A"),
    ("Answer: a blood test", "A"),
    ("The correct answer is **iron deficiency anemia (C)**.", "C"),
    ("Iron deficiency anemia", "C"),
    ("Iron deficiency anemia is the correct answer.", "C"),
    ("The answer is Iron deficiency, because ferritin is low.", "B"),
    # Taken back, and another given.
    ("The answer is (A)… no, wait, the answer is (C).", "C"),
    ("The answer is (A). Actually, (C)", "C"),
    ("The answer is (A), actually (C).", "C"),
    ("The answer is (A). Wait, it is (C).", "C"),
    ("The answer is not (A) but (B).", "B"),
    ("The answer is not (A). It is (B).", "B"),
    ("The answer is (A). That is wrong. The answer is (B).", "B"),
    ("Rather than (A), the answer is (B).", "B"),
    ("The answer is (B) rather than (A).", "B"),
    ("The answer is (B) instead of (A).", "B"),
    ("It cannot be (B), so the answer is (C).", "C"),
    ("I would choose (B) over (A).", "B"),
    ("This is not a colitis, so the answer is (B).", "B"),
    ("The answer is (A).\nThe answer is (D).", "D"),
    ("Answer: (A) is incorrect. (B) is correct.", "B"),
    ("You might think the answer is (A), but it is (B).", "B"),
    ("The answer isn't (A) – it is (B).", "B"),
    ("While (A) is tempting, the answer is (C).", "C"),
    ("Answer: (B), (A) is wrong.", "B"),
    ("The answer is (B). Correction: (C).", "C"),
    # Said firmly, and left alone after that.
    ("The answer is (B). (A) is wrong. (C) is too specific. It could be (D) in theory.", "B"),
    ("Ferritin is low. The answer is (B). If the answer were (A), it would be high. It could be (D).", "B"),
    ("Ferritin is low. The answer is (B). The answer could be (D) in a child.", "B"),
    ("The answer is (B). No other option explains the ferritin.", "B"),
    ("The answer is (B). Should one wait and see? A control is due in a week.", "B"),
    ("(A) Blood test: no. (B) Iron deficiency: yes. The answer is (B).", "B"),
    ("A) late.\nB) fits.\nC) no.\nThe answer is B.", "B"),
    ("The answer is (B).\n\nQuestion: A man has a cough. Which test?\nAnswer: (D)", "B"),
    ("Question: which one?\nAnswer: (D)", "D"),
    ("No doubt the answer is (B).", "B"),
    # Other words for the answer, and other languages.
    ("Ans: B", "B"),
    ("Ans. (B)", "B"),
    ("Choice: C", "C"),
    ("Answer (B)", "B"),
    ("Option B fits best.", "B"),
    ("The answer is (A) no wait (C) fits better", "C"),
    ("答案：Ｂ", "B"),
    ("正确答案是（B）。", "B"),
    ("（Ｂ）", "B"),
    ("Antwort: B", "B"),
    ("Die richtige Antwort ist (B).", "B"),
    ("Réponse : B", "B"),
    ("La bonne réponse est (B).", "B"),
    ("Respuesta: B", "B"),
    ("La respuesta correcta es (B).", "B"),
    ("Ответ: B", "B"),
    ("Правильный ответ — B.", "B"),
    # Ordinary words after an answer do not take it back.
    ("The answer is (B). Wait for the culture before treatment.", "B"),
    ("The answer is (B). One must wait.", "B"),
    ("The answer is (B). Sorry for the long explanation.", "B"),
    ("The answer is (B), sorry.", "B"),
]


@pytest.mark.parametrize(("text", "letter"), COMMITTED)
def test_lenient_reads_what_a_person_would(text: str, letter: str) -> None:
    assert lenient(text, "ABCD", OPTIONS) == letter


UNCOMMITTED = [
    "",
    "I do not know.",
    "The answer is",
    "The patient has a fever.",
    "A patient with a fever and a cough.",
    "a",
    # Articles, initials and names that look like letters.
    "Answer: a biopsy of the marrow",
    "Answer: A biopsy of the marrow",
    "The answer is A rather rare disease.",
    "The answer is a",  # cut off in the middle of "a blood test"
    "Answer: A 45-year-old man should be seen at once.",
    "Answer: I think it needs more thought.",
    "The answer is C. difficile infection.",
    "Answer: B. cereus food poisoning",
    "The answer is B cells.",
    "The answer is B-cell lymphoma.",
    "The answer is vitamin D.",
    "The answer is D-dimer.",
    "The answer is C3 glomerulopathy.",
    "Answer: N/A",
    "Answer: A/G ratio",
    "Hepatitis B is the correct answer.",
    "So A 45-year-old man.",
    "It is (a) common, (b) benign.",
    # Two answers, or none in particular.
    "The answer is either A or B.",
    "The answer is A or C.",
    "The answer is (A) or (C).",
    "The answer is (A) and (C).",
    "The answer is (A), (B) or (C).",
    "The answer is A/C.",
    "Answer: A, B, C or D",
    "The answer is (A) (B).",
    "The answer is (A) plus (B).",
    "The answer is A–C.",
    "The answer is (A), maybe (B).",
    "Both (A) and (B) are correct.",
    "A, B and C are correct.",
    "(A) is correct. (B) is correct.",
    "The answer is (A), so the answer is (B).",
    "The answer is (A), or possibly (B).",
    "The answer is (A) if the patient is pregnant.",
    "The answer is (A) or (B). (A) is not likely.",
    "The answer is (B) Iron deficiency anemia.",  # that text is C's
    "The answer is Iron deficiency anemia (B).",
    r"\boxed{A} or \boxed{B}",
    # Taken back, denied, asked, supposed.
    "The answer is (A)… no, wait",
    "The answer is (A). Never mind.",
    "The answer is (A). But it does not fit.",
    "The answer is (A). Or is it (B)?",
    "The answer is (B). But (C) is better.",
    "The answer is (A). Hmm, let me reconsider.",
    "The answer is (A). That is wrong.",
    "The answer is (A). No, that cannot be.",
    "The answer is (A). However, (A) is incorrect.",
    "The answer is (A) is a common mistake.",
    "The answer is not (A).",
    "The answer isn't (A).",
    "The answer is not Iron deficiency anemia.",
    "The answer cannot be (B).",
    "It cannot be (B).",
    "It is not (B).",
    "(B) is not correct.",
    "(B) is wrong.",
    "Neither (A) nor (B) is correct.",
    "I do not think the answer is (A).",
    "I would not choose (A).",
    "I was going to say (A).",
    "The wrong answer is (A).",
    "Rather than (B)",
    "instead of (B).",
    "Is the answer (A)?",
    "The answer is (A)?",
    "If the answer is (A), the ferritin is low.",
    "The answer could be (A).",
    "Perhaps the answer is (A).",
    "Some say the answer is (A).",
    "It is false that the answer is (A).",
    "The answer is (A) in children and (B) in adults.",
    "(A) or (B) is correct.",
    "Many would say the answer is (A).",
    "We must see whether (A) is correct.",
    # Options listed or walked through.
    "The answer choices are: (A) Blood test (B) Iron deficiency",
    "Answer options: (A) Blood test",
    "I will answer by looking at each option: (A) Blood test is late.",
    "Answer: (A) Blood test (B) Iron deficiency (C) Iron deficiency anemia",
    "Answer:\n(A) Blood test\n(B) Iron deficiency\n(C) Iron deficiency anemia",
    "(A) Blood test: no. (B) Iron deficiency: yes.",
    "A) Blood test\nB) Iron deficiency\nC) Iron",
    "(A) Blood test: no, (B) Iron deficiency: yes",
    "(A) no, (B) yes, (C) no",
    "A: no\nB",
    "Answer: (A) Blood test: no.",
    "A. Paris B. Lyon",
    "Answer: A. Paris B. Lyon",
    # Negated in other languages.
    "Die Antwort ist nicht (A).",
    "La respuesta no es (A).",
    "答案不是 A。",
    # Not one of the options.
    "The answer is (F).",
    "The answer is (A). No, the answer is (F).",
    'I will end with "The answer is (X)".',
    "The answer is Aspirin.",
    "The answer is Iron deficiency and a bleed.",
]


@pytest.mark.parametrize("text", UNCOMMITTED)
def test_lenient_does_not_guess(text: str) -> None:
    assert lenient(text, "ABCD", OPTIONS) is None


def test_lenient_without_the_options_texts() -> None:
    assert lenient("The answer is (B) iron deficiency.", "ABCD", None) == "B"
    assert lenient("The answer is iron deficiency.", "ABCD", None) is None
    assert lenient("Answer: B. iron deficiency", "ABCD", None) is None  # as may be "B. cereus"
    assert lenient("Answer: B. iron deficiency", "ABCD", {"B": "iron deficiency"}) == "B"


def test_an_options_text_must_be_unique_and_whole() -> None:
    twice = {"A": "Aspirin", "B": "Aspirin", "C": "Heparin"}
    assert lenient("The answer is aspirin.", "ABC", twice) is None
    assert lenient("The answer is aspirin (B).", "ABC", twice) == "B"
    assert lenient("The answer is heparin.", "ABC", twice) == "C"
    doses = {"A": "2", "B": "2.5", "C": "25"}
    assert [lenient(f"The answer is {dose}.", "ABC", doses) for dose in doses.values()] == ["A", "B", "C"]
    assert lenient("The answer is 2.7.", "ABC", doses) is None
    assert lenient("The answer is 25 mg.", "ABC", doses) is None
    assert lenient("The answer is Iron deficiency", "ABCD", OPTIONS) is None  # cut off before "anemia"?


def test_options_that_speak_of_letters() -> None:
    groups = {"A": "O", "B": "A", "C": "B", "D": "AB"}
    assert lenient("The answer is A.", "ABCD", groups) is None  # option A, or blood group A, which is option B
    assert lenient("The answer is (A) O.", "ABCD", groups) == "A"
    both = {"A": "Aspirin", "B": "Heparin", "C": "Both A and B", "D": "Neither"}
    assert lenient("The answer is both A and B.", "ABCD", both) == "C"
    assert lenient("The answer is neither.", "ABCD", both) == "D"
    names = {"A": "B. cereus", "B": "C. difficile", "C": "E. coli"}
    assert lenient("The answer is C. difficile.", "ABC", names) == "B"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("No.", "B"), ("no", "B"), ("The answer is no.", "B"), ("Answer: No, because it was small.", "B"),
        ("Answer: no", "B"), ("Maybe", "C"), ("The answer is maybe.", "C"), ("Answer: yes", "A"),
        ("There is no doubt.", None), ("The answer is yes. No other reading fits.", "A"),
        ("The answer is (B) no.", "B"),
    ],
)  # fmt: skip
def test_yes_no_and_maybe_may_be_options(text: str, letter: str | None) -> None:
    assert lenient(text, "ABC", {"A": "yes", "B": "no", "C": "maybe"}) == letter


def test_no_choices_no_letter() -> None:
    assert lenient("The answer is (A).", "", None) is None
    assert lenient("The answer is (E).", "ABCDE", None) == "E"


def test_read_has_every_way_of_reading() -> None:
    text = "At first the answer is (A) to most. No, the answer is (B)! Wait: Answer: **C**"
    assert read(text, PATTERN, "ABCD", OPTIONS) == {"strict": "A", "last": "B", "lenient": "C"}


PIECES = (
    "the answer is", "Answer:", "(A)", "(B)", "A", "b", "C.", "a", "I", "not", "or", "and", "no, wait", "Actually,",
    "Iron deficiency", "is correct", "is wrong", "\n", "\n\n", ". ", "…", "?", "**", "\\boxed{", "}", "rather than",
    "option", "if", "it is", "I choose", "so", "Question:", "İ", "ẞ", "’",
    "(", ")", "[", "$", "<answer>", "\t", "é", "😀",
)  # fmt: skip


def test_lenient_never_raises_and_never_invents_a_letter() -> None:
    dice = random.Random(0)
    actual = set()
    for _ in range(4000):
        text = dice.choice((" ", "")).join(dice.choices(PIECES, k=dice.randint(0, 14)))
        choices = dice.choice(("AB", "ABCD", "BC"))
        answer = lenient(text, choices, dice.choice((None, OPTIONS, {"A": "+", "B": ""})))
        assert answer is None or (answer in choices and (answer in text.upper() or "Iron deficiency" in text)), text
        actual.add(answer)
    assert actual == {None, "A", "B", "C"}  # so the strings do reach answers


def test_a_commitment_survives_any_prose_in_front_of_it() -> None:
    dice = random.Random(1)
    words = ["a", "the", "with", "I", "and", "C.", "difficile", "vitamin", "B", "(see below)", "is", "4.5", "not", "so"]
    for _ in range(300):
        prose = " ".join(dice.choices(words, k=dice.randint(0, 30)))
        assert lenient(f"{prose}.\nThe answer is (D).", "ABCD", OPTIONS) == "D", prose


PATHOLOGICAL = (
    "\n", " ", "a ", "x", "(A) ", "(a)", "A, ", "**", "'", '"', "`", "{", "```\n", "- ", "the answer is ", "<answer>",
    "the answer is (A) ", "I choose not ", "Iron deficiency ", "no, wait. ", "\\boxed{", "The fever is (B). ",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("piece", PATHOLOGICAL)
def test_the_time_is_linear_in_the_length_of_an_answer(piece: str) -> None:
    text = piece * (2**17 // len(piece)) + "x"
    before = time.process_time()
    read(text, PATTERN, "ABCD", OPTIONS)
    for start in ("", "```\n"):
        normalise_answer(start + text)
    assert time.process_time() - before < 5  # 0.3 at most; a minute if each character costs a pass


def test_a_long_answer_is_read_at_both_ends() -> None:
    filler = "The fever is high. " * 10_000
    assert lenient(f"{filler}The answer is (B).", "ABCD", OPTIONS) == "B"
    assert lenient(f"The answer is (C). {filler}", "ABCD", OPTIONS) == "C"
    assert lenient(f"The answer is (C). {filler}The answer is (B).", "ABCD", OPTIONS) == "B"


@pytest.mark.parametrize("pattern", [r"((?:a|aa)+)$", r"(?:(a+a+)+)y"])
@pytest.mark.parametrize("read_by", [lambda pattern: strict("a" * 500 + "!", compile_pattern(pattern)), probe])
def test_a_pattern_that_backtracks_for_ever_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch, read_by: Callable[[str], object], pattern: str
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"takes more than 0\.2 s on 'a.*remove nested repetitions"):
        read_by(pattern)


@pytest.mark.parametrize("pattern", [r"the answer is\s*\(([A-Z])\)", r"#### *(-?[\d,.]+)", r"(?s).*?answer:\s*(\w)"])
def test_a_common_pattern_passes_the_probe(pattern: str) -> None:
    probe(pattern)
    assert compile_pattern(pattern).groups == 1


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The  Capital\nis PARIS. ", "the capital is paris"),
        ('"Paris"', "paris"),
        ("“Paris”.", "paris"),
        ("**Paris**!", "paris"),
        ("`x`", "x"),
        ("```sql\nSELECT *\nFROM t;\n```", "select * from t"),
        ("```\n42\n```", "42"),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("-5", "-5"),
        ("50%", "50%"),
        (".5", ".5"),
        ("f(x)", "f(x)"),
        ("a.b", "a.b"),
        ("", ""),
        ("?!", "?!"),
    ],
)
def test_normalise(text: str, plain: str) -> None:
    assert normalise_answer(text) == plain
    assert normalise_answer(plain) == plain


@pytest.mark.parametrize(
    ("pattern", "choices", "text", "answer"),
    [
        (r"(?i)the answer is \(([A-Z])\)", "ABCD", "The answer is (b)", "B"),
        (r"(?i)the answer is \(([A-Z])\)", "abcd", "The answer is (b)", "b"),
        (r"(?i)the answer is \(([A-Z])\)", "abcd", "The answer is (B)", "b"),
        (r"the answer is \(([A-Z])\)", "ABCD", "the answer is (b)", None),
        (r"the answer is \(([a-d])\)", "ABCD", "the answer is (b)", "B"),
        (r"the answer is \((\w)\)", "aA", "the answer is (a), the answer is (A)", "a"),
        (r"the answer is \((\w)\)", "АБ", "the answer is (б)", "Б"),
        (r"the answer is \((\w)\)", "12", "the answer is (2)", "2"),
    ],
)
def test_a_letter_is_the_choice_that_it_names(pattern: str, choices: str, text: str, answer: str | None) -> None:
    actual = read(text, compile_pattern(pattern), choices, None)
    assert actual["strict"] == answer
    assert actual["last"] == (answer if choices != "aA" else "A")
    if answer is not None and choices != "aA":
        assert actual["lenient"] == answer


@pytest.mark.parametrize(
    ("pattern", "can", "cannot"),
    [
        (r"(?i)the answer is\s*\(([A-Z])\)", "Ab", "2-é"),
        (r"answer is ([A-D])", "Ad", "E2"),
        (r"(?i:answer) ([a-d](?=\)))", "aD", "e"),
        (r"#### *(-?[\d,.]+)", ["7", "1,234", "-0.5"], ["", "x", "7 km"]),
        (r"is (?P<answer>yes|no)\b", ["yes", "no", "Yes"], ["maybe", "y"]),
        (r"(?x) is ( [A-C] ) # the letter", "B", "D"),
        (r"is(\s+\w+)", ["B", "maybe"], ["B C", "-"]),
        (r"(?=.*is (\w))", "B2", "-"),
        (r"ab|(?:c|(b)+)", "b", "a"),
    ],
)
def test_what_the_group_of_a_pattern_can_match(pattern: str, can: list[str], cannot: list[str]) -> None:
    assert [answer for answer in can if not extract.can_read(pattern, answer)] == []
    assert [answer for answer in cannot if extract.can_read(pattern, answer)] == []
