"""Tasks that are not multiple choice, results by subgroup, and what cannot be judged."""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, problem, rendered, vignette, vignettes, write_rows
from omegaconf import OmegaConf
from test_cli import refused, sftlab, whole

from sftlab.config import Config, EvalConfig
from sftlab.errors import ConfigError
from sftlab.eval.scorers import scorer
from sftlab.eval.subgroups import subgroups
from sftlab.instance.machine import Machine
from sftlab.records import Example, Generation, Prediction, single_turn
from sftlab.results import SubgroupSide, Verdict

SETTINGS: dict[str, Any] = {
    "reading": "strict",
    "dataset": None,
    "extract": None,
    "rouge": "rougeL",
    "group_by": None,
    "alpha": 0.05,
    "forced": False,
    "smallest_gain": 0.0,
    "margin": None,
}
EXACT = EvalConfig.model_construct(task="exact", pattern="(.)", **SETTINGS)
ROUGE = EXACT.model_copy(update={"task": "rouge"})
SQL = EXACT.model_copy(update={"extract": "{{ text | sql }}"})
BY = "meta_info"


def read(cfg: EvalConfig, *pairs: tuple[str, str], subgroup: list[str | None] | None = None) -> list[Prediction]:
    """Predictions of completions beside their targets."""
    names = [f"q{number}" for number in range(len(pairs))]
    kinds = subgroup or [None] * len(pairs)
    examples = [
        Example(name, single_turn("", "Q", "A"), target, subgroup=kind)
        for name, (_, target), kind in zip(names, pairs, kinds, strict=True)
    ]
    made = [Generation(name, "Q", text, "stop", 1) for name, (text, _) in zip(names, pairs, strict=True)]
    return scorer(cfg).scored(scorer(cfg).predictions(made, examples))


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
    found = scorer(ROUGE).result([rows])
    assert found.value == found.scores["rougeL"] == found.scores["rouge1"] == pytest.approx((2 / 3 + 1) / 4)
    assert found.scores["rouge2"] == pytest.approx((2 * 1 / (1 + 3) + 1) / 4)
    assert (found.metric, found.correct) == ("rougeL", None)
    assert (found.n, found.unparsed, found.truncated) == (4, 1, 0)
    low, high = found.interval
    assert 0 <= low < found.value < high <= 1
    assert scorer(ROUGE).result([rows]) == found


def test_another_rouge_may_be_judged() -> None:
    second = ROUGE.model_copy(update={"rouge": "rouge2"})
    rows = read(second, ("a b c", "a b d"))
    assert rows[0].score == pytest.approx(1 / 2)
    found = scorer(second).result([rows])
    assert (found.metric, found.value) == ("rouge2", rows[0].score)


def test_two_models_are_compared_by_their_scores() -> None:
    target = " ".join(f"w{number}" for number in range(10))
    half, most = " ".join(target.split()[:5]), " ".join(target.split()[:9])
    a = read(ROUGE, *[(half, target)] * 20, (target, target), ("", target))
    b = read(ROUGE, *[(most, target)] * 20, (half, target), ("", target))
    found = scorer(ROUGE).comparison([a], [b])
    gain = 2 * 9 / 19 - 2 * 5 / 15
    assert found.delta == pytest.approx((20 * gain - (1 - 2 / 3)) / 22)
    assert (found.gained, found.lost, found.n) == (20, 1, 22)
    assert str(found.verdict).startswith("better: mean ROUGE-L 0.")
    assert found.p_value < 0.05
    assert (found.metric, found.both_right) == ("rougeL", None)
    assert found.smallest_visible_difference is not None
    assert 0 < found.smallest_visible_difference < 0.25
    assert "80 %" in found.smallest_visible_assumes
    assert scorer(ROUGE).comparison([b], [a]).verdict.outcome == "worse"
    same = scorer(ROUGE).comparison([a], [a])
    assert str(same.verdict).startswith("inconclusive: both models have a mean ROUGE-L of 0.")
    assert same.smallest_visible_difference is not None
    assert same.smallest_visible_difference < found.smallest_visible_difference


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
    assert scorer(SQL).result([read(SQL, (completion, target))]).value == by_layout
    by_text = "SELECT a, b" not in completion and by_layout  # "a, b" is not "a,b" without the layout
    assert read(EXACT, (completion, target))[0].correct == by_text


def test_the_answer_may_be_read_out_of_a_text_by_the_config() -> None:
    cfg = EXACT.model_copy(update={"extract": "{{ text | search('#### *(.+)') or text }}"})
    rows = read(cfg, ("9 + 9 is\n#### 18", "18"), ("18", "so\n#### 18"), ("17", "18"))
    assert [row.correct for row in rows] == [True, True, False]
    lost = EXACT.model_copy(update={"extract": "{{ text | search('#### *(.+)') }}"})
    with pytest.raises(
        ConfigError,
        match=r"the target after eval\.extract=.*: test row 'q' has target 'none'; fix",
    ):
        scorer(lost).check([Example("q", single_turn("", "", ""), "none")])


def test_subgroups_by_hand() -> None:
    kinds: list[str | None] = ["s1"] * 12 + ["s2"] * 8 + ["few"] * 3 + [None]
    a = by_letters("-" * 10 + "++" + "++++----" + "+--" + "+", kinds)
    b = by_letters("+" * 10 + "+-" + "++++---+" + "-++" + "+", kinds)
    cfg = EXACT.model_copy(update={"group_by": BY})
    found = subgroups({"baseline": [a], "finetuned": [b]}, scorer(cfg))
    assert (found.column, found.without, found.compared) == (BY, 1, 2)
    assert [(group.name, group.n) for group in found.groups] == [("s1", 12), ("s2", 8), ("few", 3)]
    first, second, few = found.groups
    assert first.baseline is not None
    assert first.finetuned is not None
    assert (first.baseline.value, first.finetuned.value) == (2 / 12, 11 / 12)
    # Wilson's interval of 4 of 8: centre 1/2, half width z sqrt(1/(4·8) + z²/(4·64)) / (1 + z²/8).
    z = 1.959964
    half = z * math.sqrt(1 / 32 + z**2 / 256) / (1 + z**2 / 8)
    assert second.baseline is not None
    assert second.baseline.interval == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    # McNemar, exact since most answers change: 10 gained, 1 lost: 2 · (1 + 11) / 2^11. Mid-p of one gained: 2 · ½ · ½.
    # Holm: the smaller of two is doubled.
    p = 2 * 12 / 2**11
    assert first.difference is not None
    assert second.difference is not None
    assert first.difference.p_value == pytest.approx(p)
    assert first.difference.p_adjusted == pytest.approx(2 * p)
    assert (second.difference.p_value, second.difference.p_adjusted) == (0.5, 0.5)
    assert first.difference.delta == pytest.approx(9 / 12)
    assert few.difference is None
    assert few.reason == "too few rows to compare: fewer than 6 cannot show a difference"
    assert "2 of 3 subgroups were compared" in (found.note or "")


@pytest.mark.smoke  # libraries that take seconds to import
def test_subgroups_of_one_model_of_none_and_of_scores() -> None:
    kinds: list[str | None] = ["s1", "s1", None]
    alone = subgroups({"finetuned": [by_letters("++-", kinds)]}, scorer(EXACT))
    assert alone.groups[0].reason == "one model alone"
    assert alone.groups[0].finetuned is not None
    assert (alone.note, alone.groups[0].finetuned.value) == (None, 1)
    nothing = by_letters("+-", [None, None])
    assert subgroups({"baseline": [nothing], "finetuned": [nothing]}, scorer(EXACT)).groups == []
    low = read(ROUGE, *[("a b", "a b c d")] * 40, ("x", "a"), subgroup=["long"] * 40 + ["one"])
    better = read(ROUGE, *[("a b c", "a b c d")] * 40, ("a", "a"), subgroup=["long"] * 40 + ["one"])
    groups = subgroups({"baseline": [low], "finetuned": [better]}, scorer(ROUGE)).groups
    assert groups[0].difference is not None
    assert groups[0].difference.delta == pytest.approx(6 / 7 - 4 / 6)
    assert groups[0].difference.p_adjusted < 0.05
    assert groups[1].baseline == SubgroupSide(value=0, interval=None)  # one text has no interval


def test_questions_of_one_source_count_as_one() -> None:
    kinds: list[str | None] = ["s1"] * 10
    rows = [by_letters(marks, kinds) for marks in ("-" * 10, "+" * 10)]
    sides = [
        [Prediction(**{**row.__dict__, "group": f"g{number % 5}"}) for number, row in enumerate(side)] for side in rows
    ]
    (group,) = subgroups({"baseline": [sides[0]], "finetuned": [sides[1]]}, scorer(EXACT)).groups
    assert group.reason == "too few sources to compare: fewer than 6 cannot show a difference"


def test_intervals_have_the_level_of_the_config() -> None:
    rows = by_letters("+" * 12 + "-" * 8, ["s1"] * 20)
    results = [scorer(EXACT.model_copy(update={"alpha": alpha})).result([rows]) for alpha in (0.05, 0.1)]
    assert [result.level for result in results] == [0.95, 0.9]
    assert results[0].interval[0] < results[1].interval[0] < 0.6 < results[1].interval[1] < results[0].interval[1]
    by_group = subgroups({"baseline": [rows], "finetuned": [rows]}, scorer(EXACT.model_copy(update={"alpha": 0.1})))
    assert by_group.level == 0.9
    assert by_group.groups[0].baseline is not None
    assert by_group.groups[0].baseline.interval == results[1].interval


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
                "sql_context": f"CREATE TABLE {split}{number} (a INT, b INT); INSERT INTO {split}{number} VALUES (1, 2);",  # noqa: E501
                "sql_prompt": f"Which a are in {split}{number}?",
                "sql": f"select a,b from {split}{number} where a=1",
            }
            for number in range(count)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


OWN_SQL = Path(__file__).parent.parent / "data" / "text_to_sql.jsonl"  # 60 rows of the project in gretel's form
HERE = ("model=tiny_random", "instance=cpu", "tracking=none")
SHARES = "dataset.split={train: 0.8, validation: 0.1, test: 0.1}"


def test_slds_is_a_file_and_no_code(tmp_path: Path, config: Callable[..., Any]) -> None:
    folder = decisions(tmp_path / "slds", train=6, validation=2, test=4)
    cfg = config("+experiment=slds", f"dataset.name_or_path={folder}", *HERE)
    assert (cfg.eval.task, cfg.eval.group_by, cfg.dataset.subset) == ("rouge", "law_area", "fr_de")
    result = rendered(cfg.dataset, column=cfg.eval.group_by)
    splits, subgroups = result.splits, result.subgroups[cfg.eval.group_by]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "validation": 2, "test": 4}
    one = splits["test"][0]
    assert "Write the headnote in German for" in str(one.prompt[1]["content"])
    assert str(one.prompt[1]["content"]).endswith(
        f"Leading decision:\nFaits 9: {' '.join(f'mot9x{at}' for at in range(20))}"
    )
    assert one.target == one.assistant == "Art. 9 BV; Rechtsgleichheit für Bürger 9."
    assert (subgroups[one.id], one.group) == ("Civil law", "100 Ia 9")


def test_text_to_sql_is_a_file_and_no_code(tmp_path: Path, config: Callable[..., Any]) -> None:
    folder = statements(tmp_path / "sql", train=40, test=4)
    cfg = config("+experiment=text_to_sql", f"dataset.name_or_path={folder}", *HERE)
    assert (cfg.eval.task, cfg.eval.extract, cfg.eval.group_by) == ("sql", None, "sql_complexity")
    result = rendered(cfg.dataset, column=cfg.eval.group_by)
    splits, subgroups = result.splits, result.subgroups[cfg.eval.group_by]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 38, "validation": 2, "test": 4}
    one = splits["test"][1]
    assert one.target == "SELECT a,\n       b\nFROM test1\nWHERE a=1"
    assert one.assistant == f"```sql\n{one.target}\n```"
    assert str(one.prompt[1]["content"]).startswith(
        "Prompt:\nWhich a are in test1?\n\nSchema:\n```sql\nCREATE TABLE test1 (a INT, b INT);"
    )
    assert one.context == "CREATE TABLE test1 (a INT, b INT); INSERT INTO test1 VALUES (1, 2);"
    assert subgroups[splits["test"][1].id] == "aggregation"


@pytest.mark.parametrize(
    ("name", "model", "method", "learning_rate", "epochs", "gpus", "rows"),
    [
        ("text_to_sql", "google/gemma-3-270m-it", "none", 2e-5, 1, 1, 4),
        ("slds", "google/gemma-3-4b-it", "lora", 2e-4, 1, 1, 4),
        ("medqa", "google/gemma-3-4b-it", "lora", 2e-4, 10, 4, 64),
    ],
)
def test_a_case_is_trained_as_in_the_workshop(
    name: str, model: str, method: str, learning_rate: float, epochs: int, gpus: int, rows: int
) -> None:
    cfg = Config.model_validate(OmegaConf.to_container(compose(f"+experiment={name}"), resolve=True))
    assert (cfg.model.name_or_path, cfg.peft.method) == (model, method)
    assert (cfg.train.learning_rate, cfg.train.num_train_epochs) == (learning_rate, epochs)
    assert cfg.instance.num_processes == gpus
    assert Machine("workshop", "cuda", gpus, "sdpa").effective_batch(cfg.train) == rows


def test_a_column_of_the_test_rows_changes_no_stage(tmp_path: Path, config: Callable[..., Any]) -> None:
    from sftlab.dataset import stage as dataset
    from sftlab.eval.contenders import read_test
    from sftlab.runtime.store import Store

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
    data = dataset.make(store, plain.dataset)
    without, with_column = read_test(plain, store, data), read_test(grouped, store, data)
    assert with_column.key == without.key
    assert {row.subgroup for row in without.examples} == {None}
    assert [row.subgroup for row in with_column.examples] == ["step0", "step1", "step0", "step1"]


# ------------------------------------------------------------------- bad input


BAD = [
    (["eval.group_by=meta_inf"], ["eval.group_by='meta_inf': there is no such column; the test rows have id, quest"]),
    (["eval.pattern='the answer is'"], ["eval.pattern", "has 0 capturing groups", "exactly one must capture"]),
    (["eval.pattern='(a)(b)'"], ["has 2 capturing groups"]),
    (["dataset.choices=A"], ["dataset.choices renders to a single letter, 'A'; an answer needs at least two"]),
    (["dataset.choices=\"{{ '' }}\""], ["has no letters to choose from", "eval.task=exact"]),
    (["dataset.split={train: 0.9, validation: 0.1, test: 0}"], ["the test split of rows.jsonl has no rows"]),
    (["eval.extract='{{ text }}'"], ["eval.extract='{{ text }}': eval.task=choice"]),
    (["eval.task=exact", "eval.extract='{{ txt | sql }}'"], ["there is no variable 'txt'; there is only text"]),
    (
        ["eval.task=exact", "eval.extract='{{ text | sqll }}'"],
        ["eval.extract: is not a Jinja template", "search and sql"],
    ),
    (["eval.task=exact", "eval.extract=\"{{ text | search('(9)') }}\""], ["nothing is left to compare"]),
    (["eval.task=rouge", "eval.rouge=rougeX"], ["eval.rouge='rougeX'", "rouge1"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_what_could_not_be_judged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", vignettes(40))
    command = ["dataset.name_or_path=rows.jsonl", SHARES, *HERE, *arguments]
    message = refused(tmp_path, *command) if arguments == BAD[0][0] else problem(command) or ""
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("rows", "said"),
    [("", "test.jsonl: is empty; give a file with rows"), ("\n\n", "'test.jsonl': has no rows")],
)
def test_an_empty_test_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.jsonl").write_text(rows)
    write_rows(tmp_path / "rows.jsonl", vignettes(40))
    mounted = ["dataset@eval.dataset=vignettes", "eval.dataset.name_or_path=test.jsonl"]
    assert said in (problem(["dataset.name_or_path=rows.jsonl", SHARES, *mounted, *HERE]) or "")


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
    assert "Verdict: inconclusive: cannot be judged by this pattern: no answer of a or" in out
    assert found["comparison"]["p_value"] == 1
    assert found["baseline"]["unparsed"] == 20
    assert "The models cannot be judged." in page
    assert "step2&amp;3" in page
    assert [group["difference"]["p_adjusted"] for group in found["subgroups"]["groups"]] == [1, 1]


@pytest.mark.smoke  # libraries that take seconds to import
def test_one_row_of_each_is_judged_without_a_number_that_is_none(tmp_path: Path) -> None:
    one = [{"id": 1, "completion": "", "target": "a b", BY: None}]
    two = [{"id": 1, "completion": "a b", "target": "a b", BY: "x"}]
    out, found, page = judged(tmp_path, one, two, "eval.task=rouge", f"eval.group_by={BY}")
    assert "Verdict: inconclusive: cannot be judged: every completion of a is empty" in out
    assert found["subgroups"]["groups"][0]["reason"].startswith("too few rows")
    assert "too few rows" in page


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        (answers(4, "The answer is (A).")[::2], [], "an answer set of one letter, 'A'"),
        (answers(4, "The answer is (A)."), ["eval.group_by=step"], "no row of a.jsonl or a.jsonl has a value in such"),
        (answers(4, "The answer is (A)."), ["eval.pattern='the answer is'"], "has 0 capturing groups"),
        ([], [], "a.jsonl: is empty or has no rows"),
        (
            [{"id": at, "completion": "裁判所", "target": "裁判所"} for at in range(9)],
            ["eval.task=rouge"],
            "no target has a word of ASCII letters or digits",
        ),
        (answers(4, "The answer is (A)."), ["eval.task=exact", "eval.reading=last"], "eval.reading=last"),
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
@pytest.mark.parametrize("task", ["rouge", "sql"])
def test_from_training_to_a_verdict(tmp_path: Path, task: str) -> None:
    data = [f"dataset.name_or_path={OWN_SQL}", "dataset.split={train: 36, validation: 8, test: 16}"]
    if task == "rouge":
        decisions(tmp_path / "data", train=12, validation=4, test=14)
        data = ["dataset.name_or_path=data"]
    done = whole(
        tmp_path, "+experiment=" + {"rouge": "slds", "sql": "text_to_sql"}[task], *data, *HERE,
        "eval.engine=transformers", "eval.max_tokens=8", "train.max_length=1024", "train.num_train_epochs=1",
        "train.warmup_steps=0", "dataset.allow_overlap=true", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    found = run["evaluation"]
    rows = Prediction.read(tmp_path / "run" / "predictions" / "finetuned.jsonl")
    kinds = {"Public law", "Civil law"} if task == "rouge" else {"basic SQL", "aggregation"}
    assert kinds <= {row.subgroup for row in rows}
    assert sum(group["n"] for group in found["subgroups"]["groups"]) == len(rows)
    card = (tmp_path / "run" / "model_card.md").read_text("utf-8")
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    if task == "rouge":
        assert found["finetuned"]["value"] == pytest.approx(sum(row.score or 0 for row in rows) / len(rows))
        assert "ROUGE-L by law_area" in page
        assert "type: rouge" in card
        assert "## By law\\_area" in card
    else:
        assert found["finetuned"]["value"] == sum(row.correct for row in rows) / len(rows)
        assert all(row.score is None for row in rows)
        executed = sum(str(row.note).startswith("executed: ") for row in rows)
        assert (found["finetuned"]["scores"], found["finetuned"]["executed"]) == ({"sql_exact": 0}, executed)
        assert executed >= 10
        assert "Execution accuracy by sql_complexity" in page
        assert "type: accuracy" in card
    assert "Verdict: inconclusive: " in done.stdout


# ------------------------------------------------------------------- targets that can be judged


def remedied(*arguments: str) -> str:
    """The setting that a refusal names last, which is followed here to the letter: the command is then valid."""
    message = problem([*arguments])
    assert message is not None
    (remedy,) = shlex.split(message.rpartition("; set ")[2])
    key = remedy.partition("=")[0]
    others = [argument for argument in arguments if not argument.startswith(f"{key}=")]
    assert problem([*others, remedy]) is None
    return message


DIGITS = {"options": {"1": "this", "2": "that"}, "answer_idx": "2", "rationale": "The answer is (2)."}


@pytest.mark.parametrize(
    ("changed", "arguments", "said"),
    [
        (DIGITS, [], ["its group cannot match all targets: test row 'row-", "has target '2'"]),
        ({}, ["eval.pattern='([(][A-Z][)])'"], ["its group cannot match all targets"]),
        ({}, ["eval.pattern='The Answer is .([A-Z])'"], ["none of 12 training completions is read as its target"]),
        ({"rationale": "Answer: A"}, [], ["its completion ends in 'Answer: A' and is read as nothing"]),
        ({"rationale": "First (B). Answer: (A)"}, ["eval.pattern='[(]([A-Z])'"], ["is read as 'B'"]),
        (
            {"rationale": "It does. The answer is yes.", "answer_idx": "yes"},
            ["dataset.choices=null", "eval.task=exact"],
            ["is read as 'it does. the answer is yes'"],
        ),
    ],
)
def test_targets_that_no_answer_can_equal_are_refused_with_a_remedy_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], arguments: list[str], said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [vignette(number, **(changed if number % 3 == 0 or changed is not DIGITS else {})) for number in range(24)]
    write_rows(tmp_path / "rows.jsonl", rows)
    split = "dataset.split={train: 0.5, validation: 0.25, test: 0.25}"
    message = remedied("dataset.name_or_path=rows.jsonl", split, *HERE, *arguments)
    assert [part for part in said if part not in message] == [], message


def test_targets_are_checked_when_the_dataset_is_cached(tmp_path: Path, config: Callable[..., Any]) -> None:
    from sftlab.dataset import stage as dataset
    from sftlab.runtime.store import Store

    write_rows(tmp_path / "rows.jsonl", vignettes(40))
    settings = [f"dataset.name_or_path={tmp_path / 'rows.jsonl'}", f"store={tmp_path / 'store'}", SHARES, *HERE]
    cfg = config(*settings)
    dataset.make(Store(cfg.store), cfg.dataset)
    with pytest.raises(ConfigError, match="its group cannot match"):
        config(*settings, "eval.pattern='answer is .([0-9])'")
    assert config(*settings, "eval.pattern='answer is .([0-9])'", "mode=train").mode == "train"
    with pytest.raises(ConfigError, match="its group cannot match all targets: validation row"):
        config(*settings, "eval.pattern='answer is .([0-9])'", "mode=train", "select.metric=score")


def test_some_training_completions_may_say_something_else() -> None:
    rows = [
        Example(f"q{n}", single_turn("", "Q", f"The answer is ({letter})"), "A", "AB")
        for n, letter in enumerate(["A", "B", "A"])
    ]
    cfg = EXACT.model_copy(update={"task": "choice", "pattern": r"answer is \(([A-Z])\)"})
    warning = scorer(cfg).check_completions(rows) or ""
    assert "1 of 3 training completions are not read as their target; train row 'q1'" in warning
    assert scorer(cfg).check_completions(rows[:1]) is None
    thought = [Example("q", single_turn("", "Q", "<think>The answer is (B)?</think>The answer is (A)"), "A", "AB")]
    assert scorer(cfg).check_completions(thought) is None


def test_any_of_several_targets_scores() -> None:
    examples = [
        Example("q0", single_turn("", "Q", "A"), "Berne", targets=["Berne", "Bern"]),
        Example("q1", single_turn("", "Q", "A"), "in the year 1901", targets=["in the year 1901", "1901"]),
        Example(
            "q2", single_turn("", "Q", "A"), "<think>Two and two.</think> Four"
        ),  # a target that is the whole completion
    ]
    made = [
        Generation("q0", "Q", "<think>Berne?</think>bern.", "stop", 1),
        Generation("q1", "Q", "1902", "stop", 1),
        Generation("q2", "Q", "<think>Three?</think> four", "stop", 1),
    ]
    exact = scorer(EXACT).predictions(made, examples)
    assert [(row.answer, row.correct, row.targets) for row in exact] == [
        ("bern", True, ["Berne", "Bern"]),
        ("1902", False, ["in the year 1901", "1901"]),
        ("four", True, None),
    ]
    assert scorer(EXACT).result([exact]).value == pytest.approx(2 / 3)
    scorer(EXACT).check(examples)
    with pytest.raises(ConfigError, match=r"nothing is left to compare .* test row 'q' has target '```.n```'"):
        scorer(EXACT).check([Example("q", single_turn("", "", ""), "a", targets=["a", "```\n```"])])


@pytest.mark.smoke  # libraries that take seconds to import
def test_of_several_references_the_most_similar_scores() -> None:
    examples = [
        Example("q0", single_turn("", "Q", "A"), "a b c d", targets=["a b c d", "x y"]),
        Example("q1", single_turn("", "Q", "A"), "a b"),
    ]
    made = [Generation(name, "Q", text, "stop", 1) for name, text in (("q0", "x y z"), ("q1", "a b c d"))]
    rows = scorer(ROUGE).scored(scorer(ROUGE).predictions(made, examples))
    assert [row.score for row in rows] == pytest.approx([2 * 2 / 5, 2 * 2 / 6])


def test_choices_in_lower_case_and_several_right_letters() -> None:
    cfg = EXACT.model_copy(update={"task": "choice", "pattern": r"(?i)the answer is \(([A-Z])\)"})
    examples = [Example(f"q{n}", single_turn("", "Q", "A"), "b", "abcd", targets=["b", "d"]) for n in range(3)]
    texts = ["The answer is (B)", "the answer is (d)", "the answer is (c)"]
    generations = [Generation(f"q{n}", "", text, "stop", 1) for n, text in enumerate(texts)]
    rows = scorer(cfg).predictions(generations, examples)
    assert [(row.answer, row.correct) for row in rows] == [("b", True), ("d", True), ("c", False)]
    result = scorer(cfg).result([rows])
    assert result.readings["lenient"].correct == 2
    assert result.letters == {"b": 1, "c": 1, "d": 1}
    scorer(cfg).check(examples)


# ------------------------------------------------------------------- failing inputs of others, as commands


def thinking(number: int, first: str, final: str, target: str) -> dict[str, Any]:
    text = f"<think>\nAt first sight the answer is ({first}).\n</think>\n\nThe answer is ({final})."
    return {"id": number, "target": target, "choices": "ABCD", "completion": text}


THOUGHT = [thinking(n, "ABCD"[(n + (n % 3 > 0)) % 4], "ABCD"[(n + (n % 3 == 0)) % 4], "ABCD"[n % 4]) for n in range(30)]
SPOKEN = [row | {"completion": row["completion"].partition("</think>")[2]} for row in THOUGHT]
CUT = [row | {"completion": row["completion"][:40], "finish_reason": "length"} for row in THOUGHT]
WORDS = [["Ada Lovelace", "Lovelace"], ["Berne", "Bern"], ["3", "three"], ["in 1901", "1901"]]


@pytest.mark.smoke  # libraries that take seconds to import
@pytest.mark.parametrize(
    ("a", "b", "arguments", "right", "unparsed", "verdict"),
    [
        (THOUGHT, SPOKEN, [], [20, 20], [0, 0], "inconclusive: both models have 20 of 30 right"),
        (SPOKEN, CUT, [], [20, 0], [0, 30], "30 of 30 answers of b are truncated"),
        (
            [{"id": 0, "completion": "The answer is a drug, so the answer is B", "target": "B", "choices": "ABCD"}],
            [{"id": 0, "completion": "The answer is B", "target": "B"}],
            ['eval.pattern="answer is ([A-D])"'],
            [1, 1],
            [0, 0],
            "inconclusive: both models have 1 of 1 right",
        ),
        (
            [{"doc_id": n, "target": words, "resps": [["x"]]} for n, words in enumerate(WORDS)],
            [{"doc_id": n, "target": words, "resps": [[words[1]]]} for n, words in enumerate(WORDS)],
            ["eval.task=exact"],
            [0, 4],
            [0, 0],
            "4 of 4 against 0",
        ),
        (
            [{"id": n, "completion": "The answer is (B). No, the answer is (A).", "target": "A"} for n in range(9)],
            [{"id": n, "completion": "The answer is (A).", "target": "A", "choices": "AB"} for n in range(9)],
            [],
            [0, 9],
            [0, 0],
            "strict 9 of 9 against 0 (better), last 9 of 9 against 9 (inconclusive), lenient 9 of 9 against 9",
        ),
        (
            [{"id": n, "completion": "The answer is (B). No, the answer is (A).", "target": "A"} for n in range(9)],
            [{"id": n, "completion": "The answer is (A).", "target": "A", "choices": "AB"} for n in range(9)],
            ["eval.reading=last"],
            [9, 9],
            [0, 0],
            "inconclusive: both models have 9 of 9 right; 0 answers gained, 0 lost, so no answer changed sides; the "
            "verdict depends on how answers are read (eval.reading): strict 9 of 9 against 0 (better), last",
        ),
    ],
)
def test_two_files_get_the_verdict_of_their_answers(
    tmp_path: Path,
    a: list[Any],
    b: list[Any],
    arguments: list[str],
    right: list[int],
    unparsed: list[int],
    verdict: str,
) -> None:
    out, found, page = judged(tmp_path, a, b, *arguments)
    sides = [found[name] for name in ("baseline", "finetuned")]
    assert [side["correct"] for side in sides] == right
    assert [side["unparsed"] for side in sides] == unparsed
    assert [side["truncated"] for side in sides] == [None, len(b) if b is CUT else None]
    assert verdict in str(Verdict.model_validate(found["comparison"]["verdict"]))
    printed = " ".join(out.split())
    assert verdict in printed
    assert html.escape(verdict.partition(": ")[2] or verdict, quote=False)[1:40] in page
    assert ("by eval.reading=last" in printed) == bool(arguments and "reading" in arguments[0])
    assert "│ – │" in printed.replace("┃", "│") or b is CUT


@pytest.mark.smoke  # libraries that take seconds to import
def test_a_partly_known_count_of_truncated_answers_says_so(tmp_path: Path) -> None:
    rows = answers(6, "The answer is (A).")
    known = [row | {"finish_reason": "length" if row["id"] == 0 else "stop"} for row in rows[:4]] + rows[4:]
    out, found, page = judged(tmp_path, rows, known)
    assert [found[name]["truncated"] for name in ("baseline", "finetuned")] == [None, 1]
    assert [found[name]["finish_reasons"] for name in ("baseline", "finetuned")] == [0, 4]
    assert "1 of 4 known" in out
    assert ">1 of 4 known</td>" in page
    assert 'data-label="Truncated">–</td><td data-label="p"></td></tr>' in page


@pytest.mark.smoke
def test_questions_with_words_for_answers(tmp_path: Path) -> None:
    """Rows in the form of PubMedQA, from the first refusal to a verdict by the remedies that it names."""
    words = ["yes", "no", "maybe"]
    rows = [
        {
            "pubid": number,
            "question": f"Does mitochondrion {number} play a role in cell death?",
            "context": {"contexts": [f"Finding {number}."]},
            "long_answer": f"Finding {number} says so.",
            "final_decision": words[number % 3],
        }
        for number in range(40)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [
        "dataset.name_or_path=rows.jsonl", SHARES, *HERE, "dataset.id='{{ pubid }}'", "dataset.options=null",
        "dataset.user='{{ context.contexts | join }} {{ question }}'",
        "dataset.assistant='{{ long_answer }} The answer is {{ final_decision }}.'",
        "dataset.target='{{ final_decision }}'", "eval.engine=transformers", "eval.max_tokens=8",
        "train.num_train_epochs=1", "train.warmup_steps=0", "dataset.allow_overlap=true", "hydra.run.dir=run",
    ]  # fmt: skip
    message = refused(tmp_path, *arguments, "dataset.choices=yesnomaybe")
    assert "for words set eval.task=exact dataset.choices=null" in message
    arguments += ["eval.task=exact", "dataset.choices=null"]
    message = refused(tmp_path, *arguments)
    done = whole(tmp_path, *arguments, *shlex.split(message.rpartition("; set ")[2]))
    assert done.returncode == 0, done.stderr
    made = Prediction.read(tmp_path / "run" / "predictions" / "finetuned.jsonl")
    assert {row.target for row in made} <= set(words)


def told_otherwise(number: int) -> dict[str, Any]:
    """A row whose completion names another letter than its target."""
    return vignette(number, rationale="The answer is (B).", answer_idx="A")


@pytest.mark.parametrize("mode", ["all", "evaluate"])
@pytest.mark.parametrize(("wrong", "code"), [(1, 0), (6, 2)])
def test_completions_of_test_rows_are_read_too(
    tmp_path: Path, config: Callable[..., Any], caplog: pytest.LogCaptureFixture, mode: str, wrong: int, code: int
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for first, name in ((0, "train"), (12, "validation"), (24, "test")):
        count = wrong if name == "test" else 0
        rows = [vignette(first + n, rationale="The answer is (A).", answer_idx="A") for n in range(count, 6)]
        write_rows(folder / f"{name}.jsonl", [*(told_otherwise(first + n) for n in range(count)), *rows])
    split = "dataset.split={train: 6, validation: 6, test: 6}"
    settings = [f"dataset.name_or_path={folder}", split, f"store={tmp_path / 'store'}", *HERE]
    settings += [f"mode={mode}", "eval.name_or_path=random:llama"]
    if code:
        with pytest.raises(ConfigError, match="none of 6 test completions is read as its target: test row"):
            config(*settings)
    else:
        config(*settings)
        assert [f"{wrong} of 6 test completions are not read" in record.message for record in caplog.records] == [True]


def test_a_mounted_test_set_may_be_written_otherwise() -> None:
    from sftlab.config import DatasetConfig

    cfg = EXACT.model_copy(update={"task": "choice", "pattern": r"answer is \(([A-Z])\)"})
    rows = [Example("q", single_turn("", "Q", "(A)"), "A", "AB")]
    with pytest.raises(ConfigError, match="none of 1 test completions"):
        scorer(cfg).check_completions(rows, "test")
    mounted = cfg.model_copy(update={"dataset": DatasetConfig.model_construct()})
    assert "1 of 1 test completions are not read" in (scorer(mounted).check_completions(rows, "test") or "")
    assert scorer(cfg).check_completions([Example("q", single_turn("", "Q", ""), "A", "AB")], "test") is None


def test_a_warning_about_training_completions_is_logged_without_a_run(
    tmp_path: Path, config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        told_otherwise(n) if n % 3 else vignette(n, rationale="The answer is (A).", answer_idx="A") for n in range(24)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    split = "dataset.split={train: 0.5, validation: 0.25, test: 0.25}"
    config(f"dataset.name_or_path={tmp_path / 'rows.jsonl'}", split, f"store={tmp_path / 'store'}", *HERE)
    assert sum("training completions are not read as their target" in record.message for record in caplog.records) == 1
