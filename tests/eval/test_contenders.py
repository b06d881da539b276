"""Further models on the same questions: examples in the prompt, one start of the engines, comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model
from test_evaluate import CPU, PROMPTS, Engines, settings, texts

from sftlab.config import Config, ContenderConfig
from sftlab.errors import StageError
from sftlab.eval import contenders, decision, definitions, launch
from sftlab.eval import stage as evaluate
from sftlab.eval.contenders import Contender, EvalSet
from sftlab.eval.prompts import Prompt, Prompts
from sftlab.eval.shots import drawn, fitting, reworded, with_shots
from sftlab.eval.stage import Model
from sftlab.eval.statistics import holm
from sftlab.model import base as models
from sftlab.records import Example, Prediction, single_turn
from sftlab.report import contenders as shown
from sftlab.report import terminal
from sftlab.results import Contender as Record
from sftlab.runtime.store import Store

Make = Callable[..., Config]


def row(number: int, answer: str = "So the answer is (A).", system: str = "Be brief.", words: int = 1) -> Example:
    question = " ".join([f"Question {number}?"] * words)
    return Example(f"r{number}", single_turn(system, question, answer), "A", "AB")


TRAIN = [row(number) for number in range(40)]


# — examples in the prompt —


def test_examples_are_drawn_by_seed_from_rows_with_an_answer() -> None:
    rows = [*TRAIN, row(90, ""), row(91, "<think>Hm.</think>"), replace(row(92), tools=[{"name": "look_up"}])]
    first, second, other = ([one.id for one in drawn(rows, seed)] for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert sorted(first) == sorted(one.id for one in TRAIN)


@pytest.mark.parametrize(("room", "expected"), [(100, [0, 1, 2]), (29, [0, 2, 3]), (15, [0, 2]), (5, [0]), (4, [])])
def test_examples_that_are_too_long_are_passed_over(room: int, expected: list[int]) -> None:
    lengths = [5, 30, 6, 9]
    chosen = fitting(iter(TRAIN[:4]), 3, room, lambda one: lengths[int(one.id[1:])])
    assert [int(one.id[1:]) for one in chosen] == expected


def test_an_example_is_an_earlier_turn_and_the_question_stays_last() -> None:
    shots = [row(1, "<think>Long.</think>\nThe answer is (A)."), row(2, system="Speak French.")]
    asked = with_shots(row(3), shots)
    assert [(turn["role"], turn["content"]) for turn in asked.messages] == [
        ("system", "Be brief."),
        ("user", "Question 1?"),
        ("assistant", "The answer is (A)."),
        ("user", "Speak French.\n\nQuestion 2?"),
        ("assistant", "So the answer is (A)."),
        ("user", "Question 3?"),
        ("assistant", "So the answer is (A)."),
    ]


def test_another_instruction_replaces_the_texts_of_the_prompt() -> None:
    definition = ContenderConfig(system="{{ system }} Think first.", user="{{ user }} Answer with a letter.")
    assert [turn["content"] for turn in reworded(row(3), definition).prompt] == [
        "Be brief. Think first.",
        "Question 3? Answer with a letter.",
    ]
    assert [turn["role"] for turn in reworded(row(3), ContenderConfig(system="")).prompt] == ["user"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Contender]]:
    """A base model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    cfg = settings_of(write_model(folder / "model"))
    base = models.resolve(cfg.model, Store(folder / "store"), 0)
    return Store(folder / "store"), {"baseline": Contender.of(base), "finetuned": Contender.of(base)}


def settings_of(model: Path, *overrides: str) -> Any:
    from conftest import composed

    few_shot = "eval.contenders.few_shot={shots: 5}"  # which the vignettes leave out
    return composed(f"model.name_or_path={model}", "instance=cpu", "eval.max_tokens=8", few_shot, *overrides)


def test_a_definition_gives_prompts_that_fit_and_records_its_examples(pair: Any, tmp_path: Path) -> None:
    store, both = pair
    base = both["baseline"].base
    more = ["+eval.contenders.polite.system=Please.", "+eval.contenders.many.shots=12", "+eval.contenders.none=null"]
    cfg = settings_of(base.path, *more, "eval.max_tokens=1800")
    test = EvalSet([row(number) for number in range(100, 102)], "key", TRAIN)
    found, records = definitions.defined(cfg, store, both, test)
    assert list(found) == [record.name for record in records] == ["few_shot", "polite", "many"]
    assert records[0].shots == [one.id for one in list(drawn(TRAIN, cfg.dataset.seed))[:5]]
    assert records[0].about == "the base model with 5 examples in its prompt"
    assert all(record.prompting for record in records)
    written = {name: contenders.prompts(cfg, one.base, one.asked or test) for name, one in found.items()}
    assert written["few_shot"].rows[0].text.count("Question") == 6
    assert written["polite"].rows[0].text.count("Please.") == 1
    # The context is too short for 12 examples: there are as many as fit.
    context = json.loads((base.path / "config.json").read_text("utf-8"))["max_position_embeddings"]
    assert 5 <= len(records[2].shots) < 12
    assert written["many"].longest + cfg.eval.max_tokens <= context
    # The same questions and examples have the same key in another dataset.
    other, _ = definitions.defined(cfg, store, both, replace(test, key="other"))
    assert other["few_shot"].asked is not None
    assert other["few_shot"].asked.key == found["few_shot"].asked.key  # type: ignore[union-attr]


def test_template_and_trust_of_the_base_model_are_not_for_another_model(pair: Any, tmp_path: Path) -> None:
    store, both = pair
    (tmp_path / "own.jinja").write_text("{{ messages }}", "utf-8")
    path = both["baseline"].base.path
    cfg = settings_of(
        path, f"+eval.contenders.other.name_or_path={path}", "eval.contenders.few_shot=null",
        f"model.chat_template={tmp_path / 'own.jinja'}", "model.trust_remote_code=true",
    )  # fmt: skip
    found, _ = definitions.defined(cfg, store, both, EvalSet([row(100)], "key"))
    other = found["other"]
    assert isinstance(other, Contender)
    assert (other.base.chat_template, other.model.trust_remote_code) == (None, False)


def test_a_contender_without_training_rows_is_left_out_with_the_reason(pair: Any) -> None:
    store, both = pair
    test = EvalSet([row(100)], "key")
    found, (record,) = definitions.defined(settings_of(both["baseline"].base.path), store, both, test)
    assert found == {}
    assert record.left_out == "there are no training rows from which examples could be drawn"
    # Without the base model there is nothing to prompt.
    assert definitions.defined(settings_of(both["baseline"].base.path, "eval.baseline=false"), store, both, test) == (
        {},
        [],
    )


# — engines —


SETS = [PROMPTS, Prompts([Prompt(f"q{n}", f"Longer question {n}", [n] * 9, "AB") for n in range(5)], {"shots": "5"})]


def model_of(folder: Path) -> Model:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"max_position_embeddings": 64}', "utf-8")
    return Model(folder / "model", "identity", False)


class Shared(Engines):
    """Engines that answer the questions of every folder that they are given, the last folder only if they live."""

    def __call__(self, module: str, tasks: list[Any], **options: Any) -> None:
        self.starts = getattr(self, "starts", 0) + len(tasks)
        dies, self.dies_after = self.dies_after, None
        for task in tasks:
            parts = [replace(task, folder=folder) for folder in (task.folder, *task.task.also)]
            for part in parts[:-1]:
                super().__call__(module, [part])
            self.dies_after = dies
            super().__call__(module, parts[-1:])


@pytest.mark.parametrize("engines", [1, 2])
def test_sets_of_prompts_for_one_model_share_the_start_of_the_engines(
    tmp_path: Path, config: Make, monkeypatch: pytest.MonkeyPatch, engines: int
) -> None:
    monkeypatch.setattr(launch, "children", running := Shared())
    store, machine = Store(tmp_path / "store"), replace(CPU, num_processes=engines)
    make = lambda sets: evaluate.make_all(store, model, sets, settings(config), machine, 0)  # noqa: E731
    model = model_of(tmp_path)
    both = make(SETS)
    assert running.starts == engines
    assert [len(texts(one)) for one in both] == [7, 5]
    assert not list(store.root.glob("generations/*/engine-*"))
    # Each set is a stage, which later calls find alone, with others and twice.
    again = make([SETS[1], SETS[0], SETS[1]])
    assert running.starts == engines
    assert [one.stage.path for one in again] == [both[1].stage.path, both[0].stage.path, both[1].stage.path]
    assert all(one.stage.cached and one.seconds == 0 for one in again)


def test_answers_of_every_set_survive_a_kill(tmp_path: Path, config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = Store(tmp_path / "store"), model_of(tmp_path)
    monkeypatch.setattr(launch, "children", dying := Shared(dies_after=2))
    with pytest.raises(StageError, match="SIGKILL"):
        evaluate.make_all(store, model, SETS, settings(config), CPU, 0)
    assert sum(map(len, dying.asked)) == 12
    monkeypatch.setattr(launch, "children", living := Shared())
    done = evaluate.make_all(store, model, SETS, settings(config), CPU, 0)
    assert [len(texts(one)) for one in done] == [7, 5]
    lost = {len(SETS[0].rows): 5, len(SETS[1].rows): 3}  # of the set that was answered last, two were complete
    assert len(living.all()) in lost.values()


# — comparisons —


def predictions(right: int, n: int = 60) -> list[list[Prediction]]:
    letters = ["A" if number < right else "B" for number in range(n)]
    rows = [
        Prediction(f"q{number}", "", f"The answer is ({letter}).", "stop", letter, "A", letter == "A", None,
                   {"strict": letter, "forced": letter})
        for number, letter in enumerate(letters)
    ]  # fmt: skip
    return [rows]


def judged(tmp_path: Path, config: Make, few_shot: int, polite: int = 25, finetuned: int = 40) -> Any:
    runs = {"baseline": predictions(10), "finetuned": predictions(finetuned)}
    runs |= {"few_shot": predictions(few_shot), "polite": predictions(polite)}
    records = [Record(name=name, about=f"the base model, {name}", prompting=True) for name in ("few_shot", "polite")]
    cfg = config("eval.task=choice").eval
    return decision.decide(runs, contenders.NAMES, cfg, tmp_path, both_mute=True, contenders=records)


def test_every_contender_is_compared_with_p_adjusted_for_their_number(tmp_path: Path, config: Make) -> None:
    evaluation = judged(tmp_path, config, few_shot=34)
    comparisons = [evaluation.comparison, *(one.comparison for one in evaluation.contenders)]
    adjusted = [evaluation.p_adjusted, *(one.p_adjusted for one in evaluation.contenders)]
    assert adjusted == pytest.approx(holm([one.p_value for one in comparisons]))
    assert [one.delta for one in comparisons] == pytest.approx([30 / 60, 6 / 60, 15 / 60])
    assert {path.stem for path in (tmp_path / "predictions").iterdir()} == {
        "baseline", "finetuned", "few_shot", "polite",
    }  # fmt: skip
    assert [row[0] for row in shown.table(evaluation).rows] == ["Baseline", "few_shot", "polite", "Fine-tuned"]


def test_a_verdict_follows_the_adjusted_p(tmp_path: Path, config: Make) -> None:
    """6 gained of 0 lost have p = 0.016 (mid-p), which three equal comparisons raise above 0.05 only together."""
    evaluation = judged(tmp_path, config, few_shot=35, polite=35, finetuned=40)
    first = evaluation.contenders[0]
    assert first.comparison.p_value < 0.05 <= first.p_adjusted
    assert first.comparison.verdict.outcome == "better"
    assert first.verdict.outcome == "inconclusive"
    assert "among 3 comparisons" in first.verdict.notes[-1]


@pytest.mark.parametrize(
    ("few_shot", "sentence"),
    [(20, "would not have been enough"), (38, "may have been enough"), (56, "would have been better")],
)
def test_the_best_prompt_says_whether_one_would_have_been_enough(
    tmp_path: Path, config: Make, few_shot: int, sentence: str
) -> None:
    text = shown.prompting(judged(tmp_path, config, few_shot, polite=15))
    assert text is not None
    assert sentence in text
    assert "the base model, few_shot" in text
    assert shown.prompting(judged(tmp_path, config, few_shot).model_copy(update={"contenders": []})) is None


# — a chain of models —


@pytest.mark.parametrize(
    ("rights", "results", "said"),
    [
        ((400, 400, 398), ["no worse", "no worse", "no worse"], "no step is worse"),
        ((400, 400, 300), ["no worse", "worse", "worse"], "more than the margin is lost in few_shot → polite"),
        # Each step loses less than the margin, and both together more.
        ((400, 385, 370), ["no worse", "no worse", "undecided"], "is not ruled out in every step"),
    ],
)
def test_each_model_of_a_chain_may_not_lose_more_than_the_margin(
    tmp_path: Path, config: Make, capsys: Any, rights: tuple[int, int, int], results: list[str], said: str
) -> None:
    runs = dict(zip(("finetuned", "few_shot", "polite"), (predictions(right, 500) for right in rights), strict=True))
    records = [Record(name=name, about=name, prompting=False) for name in ("few_shot", "polite")]
    more = ["eval.contenders.few_shot={shots: 5}", "+eval.contenders.polite.shots=1"]
    cfg = config("eval.task=choice", "eval.chain=[finetuned,few_shot,polite]", *more).eval
    evaluation = decision.decide(runs, contenders.NAMES, cfg, tmp_path, both_mute=True, contenders=records)
    table = shown.chain(evaluation)
    assert table is not None
    assert [row[:2] for row in table.rows] == [
        ["finetuned", "few_shot"], ["few_shot", "polite"], ["finetuned", "polite"],
    ]  # fmt: skip
    assert [row[-1].partition(" (")[0] for row in table.rows] == results
    assert said in str(shown.deployed(evaluation))
    alone = evaluation.model_copy(update={"contenders": []})
    terminal.evaluation(alone, "evaluate", 0)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Deployment chain: what each step may not lose" in printed
    assert said in printed
    # Their losses are tested, not the gain of the fine-tuned model over them.
    assert [one.comparison for one in evaluation.contenders] == [None, None]
    assert all(one.result is not None for one in evaluation.contenders)
    prompts = [one.model_copy(update={"prompting": True}) for one in evaluation.contenders]
    assert shown.prompting(evaluation.model_copy(update={"contenders": prompts})) is None


def test_a_chain_with_a_model_that_was_left_out_is_not_passed(tmp_path: Path, config: Make) -> None:
    cfg = config("eval.task=choice", "eval.chain=[finetuned,few_shot]", "eval.contenders.few_shot={shots: 5}").eval
    record = Record(name="few_shot", about="it", prompting=False, left_out="the endpoint does not answer")
    runs = {"finetuned": predictions(40)}
    evaluation = decision.decide(runs, contenders.NAMES, cfg, tmp_path, both_mute=True, contenders=[record])
    assert evaluation.chain[0].comparison is None
    assert "not ruled out" in str(shown.deployed(evaluation))


def test_weights_of_a_definition_are_an_adapter_or_quantised(pair: Any, tmp_path: Path) -> None:
    store, both = pair
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 12, "rank_pattern": {"q_proj": 20}}', "utf-8")
    more = [
        "+eval.contenders.adapter.weights=adapter",
        "+eval.contenders.small={weights: finetuned, quantization: nf4}",
    ]
    cfg = settings_of(both["baseline"].base.path, *more, "eval.contenders.few_shot=null", "eval.engine=transformers")
    test = EvalSet([row(100)], "key", TRAIN)
    tuned = replace(both["finetuned"], model=replace(both["finetuned"].model, identity="tuned"), adapter=adapter)
    found, records = definitions.defined(cfg, store, {**both, "finetuned": tuned}, test)
    written = contenders.prompts(cfg, both["baseline"].base, test)
    beside, small = found["adapter"], found["small"]
    assert isinstance(beside, Contender)
    assert isinstance(small, Contender)
    assert (beside.model, beside.lora_rank) == (both["baseline"].model, 12)
    assert beside.request(written).checkpoint == adapter
    assert small.model.quantization == "nf4"
    assert small.request(written).checkpoint is None
    identities = {one.request(written).identity for one in (beside, small, tuned, both["baseline"])}
    assert len(identities) == 4
    assert [record.about for record in records] == [
        "the adapter on the base model", "the fine-tuned model, quantised to nf4",
    ]  # fmt: skip
    # A full fine-tuning has no adapter.
    _, (none, _) = definitions.defined(cfg, store, {**both, "finetuned": replace(tuned, adapter=None)}, test)
    assert none.left_out == "the fine-tuned model has no adapter: all of its weights were trained"


@pytest.mark.slow
def test_further_files_are_compared_with_the_second(tmp_path: Path) -> None:
    from test_cli import REPORTED, quick

    for name, right in (("base", 10), ("ours", 40), ("other", 34)):
        rows = predictions(right)[0]
        lines = [{"id": one.id, "completion": one.completion, "target": "A", "choices": "AB"} for one in rows]
        reordered = lines if name == "other" else reversed(lines)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reordered), "utf-8")
    files = "eval.predictions=[base.jsonl,ours.jsonl,other.jsonl]"
    done = quick(tmp_path, "mode=compare", files, "hydra.run.dir=run", "eval.group_by=null", modules=REPORTED)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    (other,) = run["evaluation"]["contenders"]
    assert (other["name"], other["result"]["correct"]) == ("other", 34)
    assert (other["comparison"]["gained"], other["comparison"]["lost"]) == (6, 0)
    assert run["sources"]["other"] == "other.jsonl"
    assert (tmp_path / "run" / "predictions" / "other.jsonl").is_file()
