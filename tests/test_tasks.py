"""Tasks that are not multiple choice, results by subgroup, and what cannot be judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import vignette, vignettes, write_rows
from test_cli import refused, sftlab, whole

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError
from sftlab.records import Example, Generation, Prediction
from sftlab.score import check, comparison, metric, predictions, scored, summary
from sftlab.subgroups import subgroups

SETTINGS: dict[str, Any] = {"extract": None, "rouge": "rougeL", "group_by": None, "alpha": 0.05, "forced": False}
EXACT = EvalConfig.model_construct(task="exact", pattern="(.)", **SETTINGS)
ROUGE = EXACT.model_copy(update={"task": "rouge"})
SQL = EXACT.model_copy(update={"extract": "{{ text | sql }}"})
BY = "meta_info"


def read(cfg: EvalConfig, *pairs: tuple[str, str], subgroup: list[str | None] | None = None) -> list[Prediction]:
    """Predictions of completions beside their targets."""
    names = [f"q{number}" for number in range(len(pairs))]
    kinds = subgroup or [None] * len(pairs)
    examples = [
        Example(name, "", "Q", "A", target, subgroup=kind)
        for name, (_, target), kind in zip(names, pairs, kinds, strict=True)
    ]
    made = [Generation(name, "Q", text, "stop", 1) for name, (text, _) in zip(names, pairs, strict=True)]
    return scored(predictions(made, examples, cfg), cfg)


def by_letters(right: str, kinds: list[str | None]) -> list[Prediction]:
    """Predictions that are right where there is a +."""
    return read(EXACT, *[("x" if mark == "+" else "y", "x") for mark in right], subgroup=kinds)


def test_a_score_for_every_text_and_a_mean_with_its_interval() -> None:
    # By hand: 2 · 2 / (2 + 4); nothing in common; the same but for case and signs; an empty answer.
    rows = read(
        ROUGE, ("the court", "The court, held so."), ("a b", "c d"), ("Kein Recht!", "kein recht"), (" \n", "x")
    )
    assert [row.score for row in rows] == pytest.approx([2 / 3, 0, 1, 0])
    assert [row.answer for row in rows] == ["the court", "a b", "Kein Recht!", None]
    found = summary(rows, ROUGE, seed=1)
    assert found["rougeL"] == found["rouge1"] == pytest.approx((2 / 3 + 1) / 4)
    assert found["rouge2"] == pytest.approx((2 * 1 / (1 + 3) + 1) / 4)
    assert found["metric"] == "rougeL"
    assert (found["n"], found["unparsed"], found["truncated"]) == (4, 1, 0)
    low, high = found["ci95"]
    assert 0 <= low < found["rougeL"] < high <= 1
    assert summary(rows, ROUGE, seed=1) == found
    assert "accuracy" not in found
    assert metric({"baseline": found}) == "rougeL"
    assert metric({"baseline": {"accuracy": 0.5}}) == "accuracy"


def test_another_rouge_may_be_judged() -> None:
    second = ROUGE.model_copy(update={"rouge": "rouge2"})
    rows = read(second, ("a b c", "a b d"))
    assert rows[0].score == pytest.approx(1 / 2)
    found = summary(rows, second, seed=1)
    assert (found["metric"], found["rouge2"]) == ("rouge2", rows[0].score)


def test_two_models_are_compared_by_their_scores() -> None:
    target = " ".join(f"w{number}" for number in range(10))
    half, most = " ".join(target.split()[:5]), " ".join(target.split()[:9])
    a = read(ROUGE, *[(half, target)] * 20, (target, target), ("", target))
    b = read(ROUGE, *[(most, target)] * 20, (half, target), ("", target))
    found = comparison(a, b, ROUGE, seed=1)
    gain = 2 * 9 / 19 - 2 * 5 / 15
    assert found["delta"] == pytest.approx((20 * gain - (1 - 2 / 3)) / 22)
    assert (found["gained"], found["lost"], found["same"], found["n"]) == (20, 1, 1, 22)
    assert found["verdict"].startswith("better: mean ROUGE-L 0.")
    assert found["p_value"] < 0.05
    assert not {"accuracy_a", "both_right"} & set(found)
    assert 0 < found["smallest_visible_difference"] < 0.2
    assert comparison(b, a, ROUGE, seed=1)["verdict"].startswith("worse: ")
    same = comparison(a, a, ROUGE, seed=1)
    assert same["verdict"].startswith("inconclusive: both models have a mean ROUGE-L of 0.")
    assert same["smallest_visible_difference"] is None


@pytest.mark.parametrize(
    ("completion", "by_layout"),
    [
        ("SELECT a, b\nFROM t\nWHERE a=1;", True),
        ("```sql\nselect a,b from t where a=1\n```", True),
        ("select   a,b from t where a=1", True),
        ("select a,b from t where a=2", False),
        ("select b,a from t where a=1", False),
        ("", False),
        ("(" * 20_000, False),  # what a parser gives up on is a wrong answer, and no error
    ],
)
def test_sql_is_laid_out_on_both_sides_if_the_config_says_so(completion: str, by_layout: bool) -> None:
    target = "select a,b from t where a=1"
    assert read(SQL, (completion, target))[0].correct == by_layout
    assert summary(read(SQL, (completion, target)), SQL, 1)["accuracy"] == by_layout
    by_text = "SELECT a, b" not in completion and by_layout  # "a, b" is not "a,b" without the layout
    assert read(EXACT, (completion, target))[0].correct == by_text


def test_the_answer_may_be_read_out_of_a_text_by_the_config() -> None:
    cfg = EXACT.model_copy(update={"extract": "{{ text | search('#### *(.+)') or text }}"})
    rows = read(cfg, ("9 + 9 is\n#### 18", "18"), ("18", "so\n#### 18"), ("17", "18"))
    assert [row.correct for row in rows] == [True, True, False]
    lost = EXACT.model_copy(update={"extract": "{{ text | search('#### *(.+)') }}"})
    with pytest.raises(ConfigError, match=r"makes nothing of the target of test row 'q', 'none'; mend"):
        check([Example("q", "", "", "", "none")], lost)


def test_subgroups_by_hand() -> None:
    kinds: list[str | None] = ["s1"] * 12 + ["s2"] * 8 + ["few"] * 3 + [None]
    a = by_letters("-" * 10 + "++" + "++++----" + "+--" + "+", kinds)
    b = by_letters("+" * 10 + "+-" + "++++---+" + "-++" + "+", kinds)
    found = subgroups({"baseline": a, "finetuned": b}, EXACT.model_copy(update={"group_by": BY}), seed=1)
    assert (found["column"], found["without"], found["compared"]) == (BY, 1, 2)
    assert [(group["name"], group["n"]) for group in found["groups"]] == [("s1", 12), ("s2", 8), ("few", 3)]
    first, second, few = found["groups"]
    assert (first["baseline"]["accuracy"], first["finetuned"]["accuracy"]) == (2 / 12, 11 / 12)
    # Wilson's interval of 4 of 8: centre 1/2, half width z sqrt(1/(4·8) + z²/(4·64)) / (1 + z²/8).
    z = 1.959964
    half = z * math.sqrt(1 / 32 + z**2 / 256) / (1 + z**2 / 8)
    assert second["baseline"]["ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    # McNemar: 10 gained, 1 lost: 2 · (1 + 11) / 2^11; one gained: 1. Holm: the smaller of two is doubled.
    p = 2 * 12 / 2**11
    assert first["difference"]["p_value"] == pytest.approx(p)
    assert first["difference"]["p_adjusted"] == pytest.approx(2 * p)
    assert (second["difference"]["p_value"], second["difference"]["p_adjusted"]) == (1, 1)
    assert first["difference"]["delta"] == pytest.approx(9 / 12)
    assert few["difference"] is None
    assert few["reason"] == "too few rows to compare: fewer than 6 cannot show a difference"
    assert "2 of 3 subgroups were compared" in found["note"]
    assert "NaN" not in json.dumps(found, allow_nan=False)


@pytest.mark.smoke  # libraries that take seconds to import
def test_subgroups_of_one_model_of_none_and_of_scores() -> None:
    kinds: list[str | None] = ["s1", "s1", None]
    alone = subgroups({"finetuned": by_letters("++-", kinds)}, EXACT, seed=1)
    assert alone["groups"][0]["reason"] == "one model alone"
    assert (alone["note"], alone["groups"][0]["finetuned"]["accuracy"]) == (None, 1)
    nothing = by_letters("+-", [None, None])
    assert subgroups({"baseline": nothing, "finetuned": nothing}, EXACT, seed=1)["groups"] == []
    scored = read(ROUGE, *[("a b", "a b c d")] * 7, ("x", "a"), subgroup=["long"] * 7 + ["one"])
    better = read(ROUGE, *[("a b c", "a b c d")] * 7, ("a", "a"), subgroup=["long"] * 7 + ["one"])
    groups = subgroups({"baseline": scored, "finetuned": better}, ROUGE, seed=1)["groups"]
    assert groups[0]["difference"]["delta"] == pytest.approx(6 / 7 - 4 / 6)
    assert groups[0]["difference"]["p_adjusted"] < 0.05
    assert groups[1]["baseline"] == {"rougeL": 0, "ci95": None}  # one text has no interval


def test_questions_of_one_source_count_as_one() -> None:
    kinds: list[str | None] = ["s1"] * 10
    rows = [by_letters(marks, kinds) for marks in ("-" * 10, "+" * 10)]
    sides = [
        [Prediction(**{**row.__dict__, "group": f"g{number % 5}"}) for number, row in enumerate(side)] for side in rows
    ]
    (group,) = subgroups({"baseline": sides[0], "finetuned": sides[1]}, EXACT, seed=1)["groups"]
    assert group["reason"] == "too few sources to compare: fewer than 6 cannot show a difference"


# ------------------------------------------------------------------- the workshop's other cases


def decisions(folder: Path, **counts: int) -> Path:
    """Rows in the form of ipst/slds, in its own splits."""
    folder.mkdir()
    number = 0
    for split, count in counts.items():
        rows = []
        for _ in range(count):
            number += 1
            rows.append(
                {
                    "sample_id": number,
                    "decision_id": f"100 Ia {number}",
                    "decision": f"Faits {number}: " + " ".join(f"mot{number}x{at}" for at in range(20)),
                    "decision_language": "fr",
                    "headnote": f"Art. {number} BV; Rechtsgleichheit für Bürger {number}.",
                    "headnote_language": "de",
                    "law_area": ["Public law", "Civil law"][number % 2],
                    "year": 1990,
                    "volume": "I",
                    "url": "https://example.org",
                }
            )
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def statements(folder: Path, **counts: int) -> Path:
    """Rows in the form of gretelai/synthetic_text_to_sql, in its own splits."""
    folder.mkdir()
    for split, count in counts.items():
        rows = [
            {
                "id": number,
                "sql_complexity": ["basic SQL", "aggregation"][number % 2],
                "sql_context": f"CREATE TABLE {split}{number} (a INT);",
                "sql_prompt": f"Which a are in {split}{number}?",
                "sql": f"select a,b from {split}{number} where a=1",
            }
            for number in range(count)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


HERE = ("model=tiny_random", "instance=cpu", "tracking=none")
SHARES = "dataset.split={train: 0.8, validation: 0.1, test: 0.1}"


def test_slds_is_a_file_and_no_code(tmp_path: Path, config: Callable[..., Any]) -> None:
    from sftlab.stages import dataset

    folder = decisions(tmp_path / "slds", train=6, validation=2, test=4)
    cfg = config("+experiment=slds", f"dataset.name_or_path={folder}", *HERE)
    assert (cfg.eval.task, cfg.eval.group_by, cfg.dataset.subset) == ("rouge", "law_area", "fr_de")
    splits = dataset.examples(cfg.dataset, cfg.seed, column=cfg.eval.group_by)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "validation": 2, "test": 4}
    one = splits["test"][0]
    assert "headnote of the decision in German" in one.system
    assert one.target == one.assistant == "Art. 9 BV; Rechtsgleichheit für Bürger 9."
    assert (one.subgroup, one.group) == ("Civil law", "100 Ia 9")


def test_text_to_sql_is_a_file_and_no_code(tmp_path: Path, config: Callable[..., Any]) -> None:
    from sftlab.stages import dataset

    folder = statements(tmp_path / "sql", train=40, test=4)
    cfg = config("+experiment=text_to_sql", f"dataset.name_or_path={folder}", *HERE)
    assert (cfg.eval.task, cfg.eval.extract, cfg.eval.group_by) == ("exact", "{{ text | sql }}", "sql_complexity")
    splits = dataset.examples(cfg.dataset, cfg.seed, column=cfg.eval.group_by)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 38, "validation": 2, "test": 4}
    assert splits["test"][1].target == "SELECT a,\n       b\nFROM test1\nWHERE a=1"
    assert splits["test"][1].subgroup == "aggregation"


def test_a_column_of_the_test_rows_changes_no_stage(tmp_path: Path, config: Callable[..., Any]) -> None:
    from sftlab.pipeline import test_data
    from sftlab.stages import dataset
    from sftlab.store import Store

    write_rows(tmp_path / "test.jsonl", [vignette(number, meta_info=f"step{number % 2}") for number in range(4)])
    write_rows(tmp_path / "rows.jsonl", vignettes(40))
    mounted = ["dataset@eval.dataset=vignettes", f"eval.dataset.name_or_path={tmp_path / 'test.jsonl'}"]
    settings = [
        f"dataset.name_or_path={tmp_path / 'rows.jsonl'}",
        f"store={tmp_path / 'store'}",
        SHARES,
        *mounted,
        *HERE,
    ]
    plain, grouped = config(*settings), config(*settings, f"eval.group_by={BY}")
    store = Store(plain.store)
    data = dataset.make(store, plain.dataset, plain.seed)
    without, key = test_data(plain, store, data)
    rows, same = test_data(grouped, store, data)
    assert same == key
    assert {row.subgroup for row in without} == {None}
    assert [row.subgroup for row in rows] == ["step0", "step1", "step0", "step1"]


# ------------------------------------------------------------------- bad input


BAD = [
    (["eval.group_by=meta_inf"], ["eval.group_by='meta_inf': there is no such column; the test rows have id, quest"]),
    (["eval.pattern='the answer is'"], ["eval.pattern", "has 0 capturing groups", "exactly one must capture"]),
    (["eval.pattern='(a)(b)'"], ["has 2 capturing groups"]),
    (["dataset.choices=A"], ["dataset.choices gives one letter, 'A'; an answer needs at least two"]),
    (["dataset.choices=\"{{ '' }}\""], ["has no letters to choose from", "eval.task=exact"]),
    (["dataset.split={train: 0.9, validation: 0.1, test: 0}"], ["the test split of rows.jsonl has no rows"]),
    (["eval.extract='{{ text }}'"], ["eval.task=choice reads answers by eval.pattern"]),
    (["eval.task=exact", "eval.extract='{{ txt | sql }}'"], ["there is no variable 'txt'; there is only text"]),
    (["eval.task=exact", "eval.extract='{{ text | sqll }}'"], ["eval.extract: is no Jinja template", "search and sql"]),
    (["eval.task=exact", "eval.extract=\"{{ text | search('(9)') }}\""], ["makes nothing of the target of test row"]),
    (["eval.task=rouge", "select.metric=exact_match"], ["select.metric=exact_match: counts right answers"]),
    (["eval.task=rouge", "eval.rouge=rougeX"], ["eval.rouge='rougeX'", "rouge1"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_what_could_not_be_judged_is_refused(tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", vignettes(40))
    message = refused(tmp_path, "dataset.name_or_path=rows.jsonl", SHARES, *HERE, *arguments)
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("rows", "said"),
    [("", "test.jsonl: is empty; give a file with rows"), ("\n\n", "'test.jsonl': has no rows")],
)
def test_an_empty_test_set_is_refused(tmp_path: Path, rows: str, said: str) -> None:
    (tmp_path / "test.jsonl").write_text(rows)
    write_rows(tmp_path / "rows.jsonl", vignettes(40))
    mounted = ["dataset@eval.dataset=vignettes", "eval.dataset.name_or_path=test.jsonl"]
    assert said in refused(tmp_path, "dataset.name_or_path=rows.jsonl", SHARES, *mounted, *HERE)


def judged(folder: Path, a: list[Any], b: list[Any], *arguments: str) -> tuple[str, dict[str, Any], str]:
    """What mode=compare says about two files: the terminal, run.json (which holds no NaN), and the page."""
    for name, rows in (("a", a), ("b", b)):
        write_rows(folder / f"{name}.jsonl", rows)
    files = "eval.predictions=[a.jsonl,b.jsonl]"
    done = whole(folder, "mode=compare", files, "hydra.run.dir=run", "tracking=none", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    text = (folder / "run" / "run.json").read_text("utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert "nan" not in done.stdout.lower().split()
    return done.stdout, json.loads(text)["evaluation"], (folder / "run" / "report.html").read_text("utf-8")


def answers(count: int, text: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": at, "completion": text, "target": "AB"[at % 2], BY: ["step1", "step2&3"][at % 2], **more}
        for at in range(count)
    ]


@pytest.mark.smoke  # libraries that take seconds to import
def test_answers_that_no_pattern_reads_cannot_be_judged(tmp_path: Path) -> None:
    out, found, page = judged(tmp_path, answers(20, "Hm."), answers(20, "Well…"), f"eval.group_by={BY}")
    assert "Verdict: inconclusive: cannot be judged by this pattern: no answer of the first file or" in out
    assert found["comparison"]["p_value"] == 1
    assert found["baseline"]["unparsed"] == 20
    assert "The models cannot be judged." in page
    assert "step2&amp;3" in page
    assert [group["difference"]["p_adjusted"] for group in found["subgroups"]["groups"]] == [1, 1]


@pytest.mark.smoke  # libraries that take seconds to import
def test_scores_in_another_script_cannot_be_judged(tmp_path: Path) -> None:
    rows = [{"id": at, "completion": "裁判所", "target": "裁判所"} for at in range(9)]
    out, found, _ = judged(tmp_path, rows, rows, "eval.task=rouge")
    assert "inconclusive: cannot be judged by this score: no target has a word of ASCII letters" in out
    assert found["finetuned"]["rougeL"] == 0


@pytest.mark.smoke  # libraries that take seconds to import
def test_one_row_of_each_is_judged_without_a_number_that_is_none(tmp_path: Path) -> None:
    one = [{"id": 1, "completion": "", "target": "a b", BY: None}]
    two = [{"id": 1, "completion": "a b", "target": "a b", BY: "x"}]
    out, found, page = judged(tmp_path, one, two, "eval.task=rouge", f"eval.group_by={BY}")
    assert "Verdict: inconclusive: cannot be judged: every completion of the first file is empty" in out
    assert found["subgroups"]["groups"][0]["reason"].startswith("too few rows")
    assert "too few rows" in page


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        (answers(4, "The answer is (A).")[::2], [], "an answer set of one letter, 'A'"),
        (answers(4, "The answer is (A)."), ["eval.group_by=step"], "no row of a.jsonl or a.jsonl has a value in such"),
        (answers(4, "The answer is (A)."), ["eval.pattern='the answer is'"], "has 0 capturing groups"),
        ([], [], "a.jsonl: is empty or has no rows"),
    ],
)
def test_files_that_cannot_be_compared_end_with_2(
    tmp_path: Path, rows: list[Any], arguments: list[str], said: str
) -> None:
    write_rows(tmp_path / "a.jsonl", rows)
    files = "eval.predictions=[a.jsonl,a.jsonl]"
    code, _, message, _ = sftlab(tmp_path, "mode=compare", files, "hydra.run.dir=run", *arguments)
    assert code == 2, message
    assert said in message
    assert "Traceback" not in message


# ------------------------------------------------------------------- from training to the verdict


@pytest.mark.smoke
@pytest.mark.parametrize("task", ["rouge", "exact"])
def test_from_training_to_a_verdict(tmp_path: Path, task: str) -> None:
    if task == "rouge":
        decisions(tmp_path / "data", train=12, validation=4, test=14)
    else:
        statements(tmp_path / "data", train=12, test=14)
    done = whole(
        tmp_path, "+experiment=" + {"rouge": "slds", "exact": "text_to_sql"}[task], "dataset.name_or_path=data", *HERE,
        "eval.engine=transformers", "eval.max_tokens=8", "train.max_length=1024", "train.num_train_epochs=1",
        "train.warmup_steps=0", "dataset.allow_overlap=true", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    found = run["evaluation"]
    rows = Prediction.read(tmp_path / "run" / "predictions" / "finetuned.jsonl")
    assert (
        {row.subgroup for row in rows} == {"Public law", "Civil law"}
        if task == "rouge"
        else {"basic SQL", "aggregation"}
    )
    assert [group["n"] for group in found["subgroups"]["groups"]] == [7, 7]
    card = (tmp_path / "run" / "model_card.md").read_text("utf-8")
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    if task == "rouge":
        assert found["finetuned"]["rougeL"] == pytest.approx(sum(row.score or 0 for row in rows) / len(rows))
        assert "ROUGE-L by law_area" in page
        assert "type: rouge" in card
        assert "## By law\\_area" in card
    else:
        assert found["finetuned"]["accuracy"] == sum(row.correct for row in rows) / len(rows)
        assert all(row.score is None for row in rows)
        assert "Accuracy by sql_complexity" in page
        assert "type: accuracy" in card
    assert "Verdict: inconclusive: " in done.stdout
    assert "subgroups were compared" in done.stdout
