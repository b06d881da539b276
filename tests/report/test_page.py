from __future__ import annotations

import base64
import copy
import html
import json
import random
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sftlab.errors import ConfigError
from sftlab.eval.knowledge import knowledge, split
from sftlab.eval.statistics import compare, wilson
from sftlab.records import Prediction, write_jsonl
from sftlab.report.page import render
from sftlab.report.text import count, date, percent, points, seconds, sha256, span
from sftlab.results import RunRecord
from sftlab.runtime.run import read_record

HOSTILE = (
    "</script><script>document.title='pwned'</script><img src=x onerror=document.title='pwned'>"
    "<!-- \u2028 &amp; {{ 7*7 }}"
)
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CHROMIUM = shutil.which("chromium")


def predictions(n: int, rate: float, parsed: float, seed: int, words: int = 20) -> list[Prediction]:
    draw = random.Random(seed)
    rows = []
    for number in range(n):
        target = "ABCD"[number % 4]
        right = draw.random() < rate
        letter = target if right else "ABCD"[(number + 1) % 4]
        answer = letter if draw.random() < parsed else None
        rows.append(
            Prediction(
                id=f"q-{number:05d}",
                prompt="<|im_start|>system\nAnswer with a letter.<|im_end|>\n<|im_start|>user\n"
                f"A patient of {20 + number % 60} years has serum sodium of {110 + number % 40} mmol/L. "
                "Which is the cause? (A) Thirst (B) Vomiting (C) Diuretics (D) None<|im_end|>\n<|im_start|>assistant\n",
                completion=" ".join(["Sodium is low, so water is held back."] * (words // 7))
                + (f" The answer is ({letter})." if answer else " It is hard to say"),
                finish_reason="stop" if answer else "length",
                answer=answer,
                target=target,
                correct=answer == target,
                group=["water", "gases", "calcium"][number % 3],
                readings={"strict": answer, "last": answer, "lenient": letter, "forced": letter},
            )
        )
    return rows


def evaluation(baseline: list[Prediction], finetuned: list[Prediction]) -> dict[str, Any]:
    made: dict[str, Any] = {"task": "choice"}
    for name, rows in (("baseline", baseline), ("finetuned", finetuned)):
        correct = sum(row.correct for row in rows)
        readings = {
            reading: {
                "correct": sum(row.readings[reading] == row.target for row in rows),
                "unparsed": sum(row.readings[reading] is None for row in rows),
            }
            for reading in rows[0].readings
        }
        made[name] = {
            "metric": "accuracy",
            "value": correct / len(rows),
            "interval": wilson(correct, len(rows)),
            "level": 0.95,
            "correct": correct,
            "n": len(rows),
            "unparsed": sum(row.answer is None for row in rows),
            "truncated": sum(row.finish_reason == "length" for row in rows),
            "finish_reasons": len(rows),
            "reading": "strict",
            "readings": readings,
            "letters": Counter(row.answer or "none" for row in rows),
        }

    def against(reading: str) -> dict[str, Any]:
        right = [[row.readings[reading] == row.target for row in rows] for rows in (baseline, finetuned)]
        return compare(right[0], right[1], groups=None, alpha=0.05).model_dump()

    parts = split([baseline], [finetuned], 0.05)
    assert parts is not None
    made["comparison"] = {**against("strict"), "smallest_visible_difference": 0.041, "forced": against("forced")}
    made["comparison"]["split"] = parts.model_dump()
    for name, rows in (("baseline", baseline), ("finetuned", finetuned)):
        made[name]["knowledge"] = known.model_dump() if (known := knowledge([rows], 0.05)) else None
    made["constant"] = {"answer": "A", "correct": len(baseline) // 4}
    return made


def candidates(jobs: int, epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "eval_loss": 1.2 + 0.01 * job + 0.05 * abs(epoch - 3),
            "epoch": float(epoch),
            "step": 40 * epoch,
            "checkpoint": f"store/train/{job:04d}/checkpoint-{40 * epoch}",
            "job": job,
            "overrides": [
                "model=tiny",
                f"train.learning_rate={10.0 ** -(job % 4 + 2):g}",
                f"peft.r={2 ** (job % 5 + 2)}",
            ],
            "train_loss": 1.5 - 0.1 * epoch,
            "seconds": 31.4 * epoch,
        }
        for job in range(jobs)
        for epoch in range(1, epochs + 1)
    ]


def write(folder: Path, n: int = 60, jobs: int = 1, epochs: int = 5, words: int = 20) -> dict[str, Any]:
    """A run folder with every part; its ``run.json`` is returned, to be changed and written again."""
    baseline, finetuned = predictions(n, 0.45, 0.5, 1, words), predictions(n, 0.55, 0.98, 2, words)
    (folder / "predictions").mkdir(parents=True)
    Prediction.write(folder / "predictions" / "baseline.jsonl", baseline)
    Prediction.write(folder / "predictions" / "finetuned.jsonl", finetuned)
    (folder / "loss.png").write_bytes(PIXEL)
    write_jsonl(
        folder / "metrics.jsonl",
        [
            {"loss": 2.0, "epoch": 0.5, "step": 1},
            {"loss": 1.0, "epoch": 1.0, "step": 2},
            {"eval_loss": 1.25, "epoch": 1.0},
        ],
    )
    rows = candidates(jobs, epochs)
    text = "A patient of 40 years has serum sodium of 120 mmol/L. Which is the cause?"
    pair = {"examined": n, "exact": 0, "near": 0, "mean": 0.11, "p50": 0.1, "p95": 0.32, "max": 0.48}
    run = {
        "schema_version": 2,
        "id": "1",
        "status": "success",
        "error": None,
        "experiment": "sodium-lora",
        "mode": "all",
        "command": "python -m sftlab experiment=sodium 'dataset.keep=a < b'",
        "started": "2026-11-24T23:13:08+00:00",
        "finished": "2026-11-25T01:14:03+00:00",
        "git": "34558a1acf3381ff092e18480a21d7ff9c8cc713+",
        "versions": {"sftlab": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"},
        "seed": 42,
        "receipt": {
            "parameters": 134_515_008,
            "trainable_parameters": 4_884_480,
            "quantized_layers": 0,
            "attn_implementation": "sdpa",
            "liger_modules": 0,
            "loss": "nll",
            "optimizer_state": ["float32"],
            "base_dtype": "torch.bfloat16",
            "autocast": None,
            "effective_batch": 8,
            "optimizer_steps": 200,
            "left_out_rows": {"train": 0, "validation": 0},
            "num_processes": 1,
            "strategy": "ddp",
            "tokens_per_second_per_device": 769.1,
            "mfu": None,
            "step_seconds": 1.5,
            "rank_checksums": [1.5],
            "earlier_machines": [],
            "diverged_at_step": None,
            "supervised_tokens": 314_159,
            "supervised_share": 0.2582,
            "truncated_rows": {"train": 3, "validation": 0},
            "prompt_bos": 1,
            "device": "cpu",
            "train_seconds": 4747.4,
            "tokens_per_second": 769.1,
            "peak_memory_gib": 0.92,
        },
        "times": {"dataset": 0.1, "train": 4755.1, "baseline": 920.2},
        "stages": {"dataset": "store/dataset/494f0d78c4c7c65c"},
        "jobs": [
            {
                "job": job,
                "overrides": candidates(job + 1, 1)[-1]["overrides"],
                "status": "success",
                "error": None,
                "ranked": True,
                "trained_as": "trained separately",
            }
            for job in range(jobs)
        ],
        "selection": {
            **rows[1],
            "metric": "eval_loss",
            "score": None,
            "best": rows[2]["checkpoint"],
            "lowest_eval_loss": rows[2]["eval_loss"],
            "ties": [rows[1]["checkpoint"], rows[2]["checkpoint"]],
            "candidates": rows,
        },
        "merge": {
            "adapter_loss": 1.21,
            "merged_loss": 1.22,
            "rows": 16,
            "agreeing_tokens": 95,
            "compared_tokens": 96,
            "changed_tensors": 14,
            "tensors": 21,
        },
        "evaluation": evaluation(baseline, finetuned),
        "overlap": {
            "max_overlap": 0.5,
            "n": 8,
            "leaking": 0,
            "allow_overlap": False,
            "pairs": [
                {"left_split": left, "right_split": right, **pair}
                for left, right in (("validation", "train"), ("test", "train"), ("test", "validation"))
            ],
            "worst": [
                {
                    "left_split": "test",
                    "left_id": "q-00001",
                    "right_split": "train",
                    "right_id": "q-00901",
                    "share": 0.48,
                    "exact": False,
                    "left_text": text,
                    "right_text": text.replace("40", "71"),
                }
            ],
        },
    }
    save(folder, run)
    return run


def save(folder: Path, run: dict[str, Any]) -> None:
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")


class Reader(HTMLParser):
    """A page as a parser sees it: the text that people read, the elements, and the script blocks."""

    VOID = frozenset({"meta", "img", "input", "br", "line", "circle"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.words.append(data)


def rendered(folder: Path) -> str:
    return render(folder, RunRecord.model_validate_json((folder / "run.json").read_text("utf-8")))


def read(folder: Path) -> Reader:
    page = Reader(rendered(folder))
    assert not re.search(r"\b(NaN|nan|None|Infinity|inf|Undefined|undefined)\b", page.text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "xlink:href"):
            assert re.match(r"#|data:image/png;base64,", attributes.get(name) or "#"), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in page.elements:
        if re.fullmatch(r"#[\w-]+", attributes.get("href") or ""):
            assert (attributes["href"] or "")[1:] in names
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in names
    return page


def block(page: Reader) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(page.scripts[0])
    return made


def with_contender(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The run with a contender, whose answers are in the folder, and one that was left out."""
    rows = predictions(60, 0.5, 0.9, 3)
    Prediction.write(folder / "predictions" / "few_shot.jsonl", rows)
    compared = run["evaluation"]["comparison"]
    verdict = {"outcome": "inconclusive", "reason": "33 of 60 against 30 (p = 0.3)"}
    about = {"about": "the base model with 5 examples in its prompt", "prompting": True}
    contenders = [
        {"name": "few_shot", **about, "result": run["evaluation"]["finetuned"], "comparison": compared,
         "p_adjusted": 0.31, "verdict": verdict},
        {"name": "../many", **about, "left_out": "no row is short enough"},
    ]  # fmt: skip
    return {**run, "evaluation": {**run["evaluation"], "contenders": contenders, "p_adjusted": 0.0002}}


def test_contenders_have_a_table_a_forest_plot_and_their_answers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save(folder, with_contender(folder, write(folder)))
    page = read(folder)
    compared = f"{points((run := json.loads((folder / 'run.json').read_text()))['evaluation']['comparison']['delta'])}"
    assert f"few_shot {compared}" in page.text  # the forest plot
    assert "0.31 inconclusive" in page.text
    assert "../many: the base model with 5 examples in its prompt; left out: no row is short enough." in page.text
    assert "A prompt may have been enough" in page.text
    shown = block(page)
    assert shown["models"] == ["Baseline", "Fine-tuned", "few_shot"]
    assert all(len(row["sides"]) == 3 for row in shown["rows"])
    # The filters are those of the two models.
    two = Reader(rendered_without(folder, run))
    assert [row["kinds"] for row in shown["rows"]] == [row["kinds"] for row in block(two)["rows"]]


def rendered_without(folder: Path, run: dict[str, Any]) -> str:
    values = {**run, "evaluation": {**run["evaluation"], "contenders": [], "p_adjusted": None}}
    return render(folder, RunRecord.model_validate(values))


def exported(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The merged model as a GGUF file, and in 4 bits without a test of its loss."""
    size = {"folder": "outputs/store/export/key", "weight_bytes": 150 << 20, "merged_bytes": 270 << 20}
    compared = run["evaluation"]["comparison"]
    loss = {
        "margin": 0.05,
        "p_value": 0.2,
        "p_worse": 0.8,
        "level": 0.95,
        "bound": -0.081,
        "outcome": "inconclusive",
        "needed": 1234,
    }
    return [
        {
            "format": "gguf",
            "gguf": "q8_0",
            "engine": "vllm",
            "comparison": {**compared, "noninferiority": loss},
            **size,
        },
        {"format": "bnb4", "gguf": None, "engine": "transformers", "comparison": compared, **size},
    ]


def test_exports_have_a_table(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    assert "in other formats" not in read(tmp_path / "run").text
    save(tmp_path / "run", {**run, "exports": exported(run)})
    page = read(tmp_path / "run")
    assert "gguf q8_0 150 of 270 MiB vllm" in page.text
    assert " 8.1 undecided (about 1,300 questions decide) bnb4 150 of 270 MiB" in page.text
    assert " – not judged" in page.text


def test_everything(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    page = read(tmp_path / "run")
    compared = run["evaluation"]["comparison"]
    assert compared["verdict"]["outcome"] == "better"
    for part in (
        "sodium-lora · 24 November 2026, 23:13 UTC",
        "The fine-tuned model is better.",
        "One training run (seed 42) is one draw",
        "Knowledge, guessing or form?",
        "A model that always answers A is right in 15 of 60 questions.",
        "Selected: epoch 2 (step 80), validation loss 1.2500.",
        "The lowest is 1.2000, but 2 checkpoints are within the noise of it",
        "Smallest difference this test set shows 4.1",
        "3.6% 4,884,480 of 134,515,008",
        "1 h 19 min",
        "train 3, validation 0",
        "Number format of the base model bfloat16",
        "Autocast to none",
        "34558a1acf33 with uncommitted changes",
        "python -m sftlab experiment=sodium 'dataset.keep=a < b'",
        "No question of one split is in another",
        "Accuracy by group",
        "Where the two models differ",
        "95 of 96",
    ):
        assert part in page.text, part
    assert f"+{compared['gained']} −{compared['lost']}" in page.text
    strict, known = compared["delta"], compared["split"]["knowledge"]["value"]
    assert f"The strict difference of {points(strict)} points splits into {points(known)} points of know" in page.text
    assert f") and {points(compared['split']['form']['value'])} points of form (" in page.text
    lead = (
        f"By strict reading: {points(strict)} points ({span(compared['interval'])}). With forced choices, which give "
    )
    forced = f"{points(compared['forced']['delta'])} points ({span(compared['forced']['interval'])})"
    assert f"{lead}every question an answer: {forced}: no difference is shown. " in page.text
    in_knowledge = f"Knowledge: {points(known)} points ({span(compared['split']['knowledge']['interval'])})"
    assert f"{in_knowledge}: no difference is shown, so the change may be one of form or luck" in page.text


def test_the_number_of_models_judged_on_the_test_set_stands_beside_the_verdict(tmp_path: Path) -> None:
    run = write(tmp_path / "run", n=12)
    reuse = {"test_set": "0" * 16, "number": 15, "models": 15, "rows": 12, "alpha": 0.05, "chance": 0.181}
    texts = []
    for mode, corrected in (("all", False), ("evaluate", True), ("compare", None)):
        run["mode"] = mode
        run["evaluation"]["reuse"] = None if corrected is None else {**reuse, "corrected": corrected}
        save(tmp_path / "run", run)
        texts.append(read(tmp_path / "run").text)
    used = (
        "Model 15 judged on these 12 questions. If all 15 changed nothing, at least one would be called better with a "
    )
    assert f"{used}probability of about 18 %; eval.correct_for_reuse=true adjusts p for this." in texts[0]
    assert "One training run is one draw" in texts[1]
    assert f"{used}probability of about 18 %. eval.correct_for_reuse=true multiplies p by 15 × 16" in texts[1]
    assert "is one draw" not in texts[2]
    assert "mode=compare does not count" in texts[2]


def test_overlapping_intervals_are_explained(tmp_path: Path) -> None:
    run = write(tmp_path / "run", n=12)
    for low, overlap in ((0.3, True), (0.5, False)):
        run["evaluation"]["baseline"]["interval"] = [0.2, 0.4]
        run["evaluation"]["finetuned"]["interval"] = [low, 0.9]
        save(tmp_path / "run", run)
        assert (
            "These two intervals overlap, which does not mean that the models are equal" in read(tmp_path / "run").text
        ) == overlap


def test_questions_block(tmp_path: Path) -> None:
    write(tmp_path / "run")
    page = read(tmp_path / "run")
    data = block(page)
    assert data["models"] == ["Baseline", "Fine-tuned"]
    assert data["before"].endswith("<|im_start|>user\n")
    assert data["after"].startswith("<|im_end|>")
    assert len(data["rows"]) == 60
    first = Prediction.read(tmp_path / "run" / "predictions" / "baseline.jsonl")[0]
    assert data["before"] + data["rows"][0]["question"] + data["after"] == first.prompt
    assert data["rows"][0]["question"].startswith("A patient")
    kinds = [kind for row in data["rows"] for kind in row["kinds"]]
    assert kinds.count("differ") == kinds.count("gained") + kinds.count("lost")
    assert f"Gained or lost {kinds.count('differ')}" in page.text


def test_several_right_answers_other_readings_and_unknown_truncation(tmp_path: Path) -> None:
    run = write(tmp_path / "run", n=8)
    for name in ("baseline", "finetuned"):
        path = tmp_path / "run" / "predictions" / f"{name}.jsonl"
        Prediction.write(path, [replace(row, targets=[row.target, "E"]) for row in Prediction.read(path)])
        run["evaluation"][name] |= {"truncated": None, "finish_reasons": 0, "reading": "lenient"}
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert {row["target"] for row in block(page)["rows"]} == {"A or E", "B or E", "C or E", "D or E"}
    assert "Answers are read by eval.reading=lenient." in page.text
    assert f"The lenient difference of {points(run['evaluation']['comparison']['delta'])} points" in page.text
    assert "first answer in the requested form" in page.text


def test_the_policy_names_the_only_style_and_script(tmp_path: Path) -> None:
    write(tmp_path / "run")
    text = rendered(tmp_path / "run")
    page = Reader(text)
    policy = next(
        a["content"] for tag, a in page.elements if tag == "meta" and "Security" in (a.get("http-equiv") or "")
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert f"script-src 'sha256-{sha256(page.scripts[1])}'" in policy
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    assert f"style-src 'sha256-{sha256(style)}'" in policy
    assert "http" not in style
    assert "innerHTML" not in text


def test_the_time_that_a_chat_template_prints_is_shown(tmp_path: Path) -> None:
    run = write(tmp_path / "run", n=12)
    assert "chat template prints" not in read(tmp_path / "run").text
    save(tmp_path / "run", run | {"template_time": "2024-02-03T04:05:06"})
    assert "2024-02-03T04:05:06" in read(tmp_path / "run").text


@pytest.mark.parametrize(
    "part",
    [
        *("error", "finished", "git", "receipt", "template_time", "precision"),
        *("selection", "merge", "evaluation", "overlap"),
    ],
)
def test_each_part_may_be_absent(tmp_path: Path, part: str) -> None:
    run = write(tmp_path / "run", n=12)
    run.pop(part, None)
    save(tmp_path / "run", run)
    without = read(tmp_path / "run")
    save(tmp_path / "run", {**run, part: None})
    assert read(tmp_path / "run").text == without.text


@pytest.mark.parametrize(
    "file", ["predictions/baseline.jsonl", "predictions/finetuned.jsonl", "metrics.jsonl", "loss.png"]
)
def test_each_file_may_be_absent(tmp_path: Path, file: str) -> None:
    write(tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    page = read(tmp_path / "run")
    assert ("Where the two models differ" in page.text) == (not file.startswith("predictions"))


def refusal(values: dict[str, Any]) -> str | None:
    try:
        read_record(Path("run.json"), values)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_each_value_may_be_null_or_its_record_is_refused(tmp_path: Path) -> None:
    """Whatever single value is null, the page has no word of a programming language, or the record is not read."""
    run = write(tmp_path / "run", n=4)
    run["evaluation"] |= {name: {**run["evaluation"][name], "letters": {}} for name in ("baseline", "finetuned")}

    def spots(value: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        inner = value.items() if isinstance(value, dict) else []
        return [path, *(spot for key, part in inner for spot in spots(part, (*path, key)))]

    shown = refused = 0
    for spot in [spot for key, value in run.items() for spot in spots(value, (key,))]:
        changed = copy.deepcopy(run)
        holder = changed
        for key in spot[:-1]:
            holder = holder[key]
        holder[spot[-1]] = None
        save(tmp_path / "run", changed)
        problem = refusal(changed)
        if problem is None:
            read(tmp_path / "run")
            shown += 1
        else:
            assert spot[0] in problem
            refused += 1
    assert shown > 20
    assert refused > 20


MINIMAL: dict[str, Any] = {
    "schema_version": 2,
    "id": "1",
    "status": "success",
    "experiment": "x",
    "mode": "all",
    "command": "python -m sftlab",
    "started": "2026-11-24T23:13:08+00:00",
    "seed": 1,
}


def test_nothing_at_all(tmp_path: Path) -> None:
    save(tmp_path, MINIMAL)
    assert "No results yet." in read(tmp_path).text
    save(tmp_path, MINIMAL | {"command": "", "started": ""})  # as for the page of a job
    text = read(tmp_path).text
    assert "–" not in text
    assert "Command" not in text
    assert "Versions" not in text


def test_train_only(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "predictions")
    del run["evaluation"], run["merge"]
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert "Trained, not evaluated. Selected: epoch 2" in page.text
    assert "Results on the test set" not in page.text
    assert len(page.scripts) == 1


def test_early_stopping_and_what_it_means_for_the_schedule(tmp_path: Path) -> None:
    run = write(tmp_path / "run", n=12, jobs=2)
    stop = {"step": 120, "planned_steps": 400, "best_step": 90, "validations": 3, "schedule": "cosine"}
    stop |= {"learning_rate": 1.6e-4, "peak_learning_rate": 2e-4, "saved_seconds": 560.0, "depends_on_length": True}
    run["jobs"][1]["early_stop"] = stop
    save(tmp_path / "run", run)
    page = read(tmp_path / "run").text
    assert "Job 1 stopped early at step 120 of 400" in page
    assert "280 steps (about 9 min 20 s) were not trained" in page
    assert "the learning rate was still 0.00016 (peak 0.0002)" in page
    run["jobs"][1]["early_stop"] = {**stop, "schedule": "constant", "depends_on_length": False}
    save(tmp_path / "run", run)
    assert "learning rate was still" not in read(tmp_path / "run").text


def test_the_untrained_model_is_selected(tmp_path: Path) -> None:
    run = write(tmp_path / "run", n=12)
    run["selection"] |= {"step": 0, "epoch": 0.0}
    reason = "step 0, the untrained model, is selected: its comparison would be with itself"
    save(tmp_path / "run", run | {"evaluation": None, "merge": None, "skipped": reason})
    page = read(tmp_path / "run").text
    assert "The untrained model is selected." in page
    assert "Step 0, the untrained model, is selected: its comparison would be with itself." in page
    assert "Selected: step 0, the untrained model, validation loss" in page


def test_compare_only(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    for name in ("loss.png", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    save(tmp_path / "run", MINIMAL | {"mode": "compare", "evaluation": run["evaluation"]})
    page = read(tmp_path / "run")
    assert "The fine-tuned model is better." in page.text
    assert "bias and variance" not in page.text


def test_compared_files_are_named_by_their_labels(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    for name in ("loss.png", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    evaluation = run["evaluation"] | {"labels": {"baseline": "Qwen3", "finetuned": "Gemma"}}
    evaluation["finetuned"]["repeats"] = {"values": [0.5, 0.7], "changed": 9, "noise": 0.2, "forced_noise": 0.1}
    evaluation["comparison"]["split"] |= {"outcome": "better"}
    sources = {"baseline": "a.jsonl", "finetuned": "b.jsonl"}
    save(tmp_path / "run", MINIMAL | {"mode": "compare", "evaluation": evaluation, "sources": sources})
    page = read(tmp_path / "run")
    for part in ("Gemma is better.", "Gemma knows more answers", "Gemma − Qwen3", "Run-to-run noise, Gemma:"):
        assert part in page.text, part
    assert not re.search("baseline|fine-tuned|base model", page.text, re.IGNORECASE)
    assert block(page)["models"] == ["Qwen3", "Gemma"]


def test_a_difference_that_is_not_split_claims_nothing_about_knowledge(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    reason = "3 of 60 questions have neither an answer nor a forced choice of the base model"
    run["evaluation"]["comparison"] |= {"split": None, "forced": None, "unsplit": reason}
    save(tmp_path / "run", run)
    text = read(tmp_path / "run").text
    assert "Whether this is a difference in knowledge is not known" in text
    assert f"The difference is not split into knowledge, guessing and form: {reason}." in text
    assert "answer form" not in text


def test_one_model_alone(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    (tmp_path / "run" / "predictions" / "baseline.jsonl").unlink()
    del run["evaluation"]["baseline"], run["evaluation"]["comparison"]
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    accuracy = run["evaluation"]["finetuned"]["value"]
    assert (
        f"The model answers {percent(accuracy)} of the questions correctly. It was not compared with its base model."
        in page.text
    )
    assert "Lost" not in page.text
    assert {kind for row in block(page)["rows"] for kind in row["kinds"]} <= {"all", "right", "wrong", "unparsed"}


def test_free_text_has_no_letters(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    for name in ("baseline", "finetuned"):
        path = tmp_path / "run" / "predictions" / f"{name}.jsonl"
        rows = Prediction.read(path)
        changes = {"target": "select 1", "readings": {}, "answer": "select 2", "group": None}
        write_jsonl(path, [{**row.__dict__, **changes} for row in rows])
        run["evaluation"][name] |= {"reading": None, "readings": {}, "letters": {"select 2": len(rows)}}
    run["evaluation"]["task"] = "exact"
    del run["evaluation"]["comparison"]["forced"], run["evaluation"]["comparison"]["split"]
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert "Knowledge, guessing or form?" not in page.text
    assert "Which letters were given" not in page.text
    assert "Accuracy by group" not in page.text


def scores(folder: Path) -> dict[str, Any]:
    """A run whose answers have scores: each answer's is a number between 0 and 1, and two are empty."""
    run = write(folder)
    draw = random.Random(3)
    for name, shift in (("baseline", 0.2), ("finetuned", 0.4)):
        path = folder / "predictions" / f"{name}.jsonl"
        rows = [row.__dict__ for row in Prediction.read(path)]
        for number, row in enumerate(rows):
            text = f"{name} summary {number}" if number > 1 else ""
            row |= {"completion": text, "answer": text or None, "readings": {}, "correct": False, "subgroup": "civil"}
            row |= {"target": f"reference {number}", "score": shift + draw.random() / 2 if text else 0.0}
        write_jsonl(path, rows)
        value = shift + 0.25
        run["evaluation"][name] = {
            "metric": "rougeL",
            "value": value,
            "interval": [shift, shift + 0.3],
            "level": 0.95,
            "scores": {"rouge1": 0.6, "rouge2": 0.2, "rougeL": value, "rougeLsum": 0.55},
            "n": 60,
            "unparsed": 2,
            "truncated": 1,
            "finish_reasons": 60,
        }
    run["evaluation"]["task"] = "rouge"
    run["evaluation"]["comparison"] = {
        "metric": "rougeL",
        "n": 60,
        "baseline": 0.45,
        "finetuned": 0.65,
        "delta": 0.2,
        "interval": [0.15, 0.25],
        "level": 0.95,
        "p_value": 0.0001,
        "gained": 50,
        "lost": 8,
        "smallest_visible_difference": 0.05,
        "verdict": {
            "outcome": "better",
            "reason": "mean ROUGE-L 0.650 against 0.450 (+20.0 points, 95 % interval +15.0 to +25.0, p = 0.0001)",
        },
    }
    run["evaluation"]["subgroups"] = found = copy.deepcopy(SUBGROUPS)
    found["groups"][1]["baseline"]["interval"] = None
    save(folder, run)
    return run


SUBGROUPS: dict[str, Any] = {
    "column": "meta_info",
    "level": 0.95,
    "without": 3,
    "compared": 1,
    "note": "1 of 2 subgroups were compared. Among many, some differ by chance.",
    "groups": [
        {
            "name": "step2&3",
            "n": 55,
            "baseline": {"value": 0.4, "interval": [0.28, 0.53], "correct": 22},
            "finetuned": {"value": 0.6, "interval": [0.47, 0.72], "correct": 33},
            "difference": {
                "delta": 0.2,
                "interval": [0.05, 0.35],
                "gained": 15,
                "lost": 4,
                "p_value": 0.0192,
                "p_adjusted": 0.0385,
            },
            "reason": None,
        },
        {
            "name": "step1",
            "n": 2,
            "baseline": {"value": 0.5, "interval": [0.09, 0.91], "correct": 1},
            "finetuned": {"value": 0.5, "interval": [0.09, 0.91], "correct": 1},
            "difference": None,
            "reason": "too few rows to compare",
        },
    ],
}


def test_scores(tmp_path: Path) -> None:
    scores(tmp_path / "run")
    page = read(tmp_path / "run")
    for part in (
        "Mean ROUGE-L 0.650 against 0.450",
        "Baseline ROUGE-L 0.450 0.200 to 0.500",
        "Model ROUGE-L 95 % interval ROUGE-1 ROUGE-2 ROUGE-Lsum Higher, lower Texts Empty Truncated p",
        "Fine-tuned 0.650 0.400 to 0.700 0.600 0.200 0.550 60 2 1",
        "Difference +20.0 points +15.0 to +25.0 +50 −8 60 0.0001",
        "Text by text",
        "50 higher 8 lower 2 same",
        "ROUGE-L by meta_info",
        "step1 2 0.500 – 0.500 0.090 to 0.910 too few rows to compare",
        "Higher",
    ):
        assert part in page.text, part
    for part in ("Accuracy", "accuracy", "Question by question", "both wrong", "Knowledge, guessing or form?"):
        assert part not in page.text, part
    rows = block(page)["rows"]
    changes = [abs(row["sides"][1]["score"] - row["sides"][0]["score"]) for row in rows]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] == 0
    assert rows[-1]["kinds"] == ["all", "unparsed", "same"]
    assert rows[0]["sides"][0]["answer"] == ""  # the text that was scored is there once


def test_scores_of_one_model_alone(tmp_path: Path) -> None:
    run = scores(tmp_path / "run")
    (tmp_path / "run" / "predictions" / "baseline.jsonl").unlink()
    del run["evaluation"]["baseline"], run["evaluation"]["comparison"], run["evaluation"]["subgroups"]
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert "The model has a mean ROUGE-L of 0.650." in page.text
    assert "Its 95 % interval over 60 texts is 0.400 to 0.700." in page.text
    assert block(page)["rows"][0]["sides"][0]["score"] == 0


def test_subgroups(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    run["evaluation"]["subgroups"] = copy.deepcopy(SUBGROUPS)
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    for part in (
        "Accuracy by meta_info 1 of 2 subgroups were compared.",
        "step2&3 55 40.0% 28.0% to 53.0% 60.0% 47.0% to 72.0% +20.0 +5.0 to +35.0 0.0192 0.0385",
        "step1 2 50.0% 9.0% to 91.0% 50.0% 9.0% to 91.0% too few rows to compare",
        "3 questions have no value in this column and are in no subgroup.",
    ):
        assert part in page.text, part
    assert ("a", {"href": "#subgroups"}) in page.elements
    assert sum(tag == "svg" for tag, _ in page.elements) == 3
    run["evaluation"]["subgroups"]["groups"] = [
        {**copy.deepcopy(SUBGROUPS["groups"][0]), "name": f"{HOSTILE} {number}"} for number in range(31)
    ]
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert "All 31 subgroups" in page.text
    assert sum(tag == "svg" for tag, _ in page.elements) == 2  # thirty-one would be no picture
    assert "<img src=x" not in rendered(tmp_path / "run")


def test_failed_run(tmp_path: Path) -> None:
    save(tmp_path, MINIMAL | {"status": "failed", "error": HOSTILE})
    page = read(tmp_path)
    assert "The run failed." in page.text
    assert " ".join(HOSTILE.split()) in page.text


def test_repeats_few_groups_and_what_the_detectable_difference_assumes(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    judged = run["evaluation"]["finetuned"]
    judged |= {"groups": 12, "answers": 2 * judged["n"]}
    judged["repeats"] = {
        "values": [0.5, 0.7],
        "changed": 9,
        "noise": 0.2,
        "forced_noise": 0.1,
        "pass_at": {"1": 0.6, "2": 0.75},
        "majority": 0.65,
    }
    run["evaluation"]["comparison"]["smallest_visible_assumes"] = "if 21.5 % of the answers change"
    save(tmp_path / "run", run)
    text = read(tmp_path / "run").text
    assert "pass@1 60.0%, pass@2 75.0%, majority@2 65.0%." in text
    assert "The questions are of 12 groups only." in text
    assert "The test set shows a difference of 4.1 points or more if 21.5 % of the answers change." in text
    assert f"{judged['n']} × 2" in text


def test_worse_and_a_test_set_too_small(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    run["evaluation"]["comparison"] |= {
        "verdict": {
            "outcome": "worse",
            "reason": "20 of 60 against 30 (-16.7 points, 95 % interval -25.0 to -8.3, p = 0.002)",
            "notes": ["29 of 30 answers of the base model are truncated"],
        },
        "smallest_visible_difference": None,
    }
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert "The fine-tuned model is worse. 20 of 60 against 30 (−16.7 points, 95 % interval −25.0 to −8.3" in page.text
    assert "; 29 of 30 answers of the base model are truncated." in page.text
    assert "Smallest difference this test set shows none too few questions" in page.text


@pytest.mark.parametrize("jobs", [2, 8])
def test_sweep_with_a_failed_job(tmp_path: Path, jobs: int) -> None:
    run = write(tmp_path / "run", jobs=jobs)
    run["jobs"].append(
        {
            **run["jobs"][0],
            "job": jobs,
            "overrides": ["model=tiny", "peft.r=<1>"],
            "status": "failed",
            "error": "oom " + HOSTILE,
        }
    )
    run["status"], run["error"] = "failed", f"job {jobs}: oom"
    run["selection"]["candidates"][0]["eval_loss"] = float("nan")
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert "Jobs that did not finish" in page.text
    assert f"{jobs} model=tiny peft.r=<1> oom </script>" in page.text
    assert "Selected: job 0, epoch 2" in page.text
    assert "train.learning_rate=0.01 peft.r=4 2 80" in page.text  # what all jobs share is left out
    assert ("All 40 checkpoints" in page.text) == (jobs == 8)
    assert page.text.count("checkpoint-") == 5 * jobs
    assert page.text.count("within noise") == 1


def test_overlap_that_was_allowed(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    run["overlap"] |= {"allow_overlap": True, "leaking": 3}
    run["overlap"]["pairs"][1] |= {"exact": 2, "near": 1}
    run["overlap"]["worst"][0] |= {"exact": True, "left_text": HOSTILE}
    save(tmp_path / "run", run)
    page = read(tmp_path / "run")
    assert "3 questions of one split are in another" in page.text
    assert "Exact duplicate: test q-00001 in train q-00901" in page.text


def test_groups_are_shown_from_two_to_twenty(tmp_path: Path) -> None:
    write(tmp_path / "run")
    for number, shown in ((1, False), (2, True), (20, True), (21, False)):
        for name in ("baseline", "finetuned"):
            path = tmp_path / "run" / "predictions" / f"{name}.jsonl"
            rows = [{**row.__dict__, "group": f"g{at % number}"} for at, row in enumerate(Prediction.read(path))]
            write_jsonl(path, rows)
        assert ("Accuracy by group" in read(tmp_path / "run").text) == shown


def hostile(folder: Path) -> None:
    run = write(folder)
    for name in ("baseline", "finetuned"):
        path = folder / "predictions" / f"{name}.jsonl"
        rows = [row.__dict__ for row in Prediction.read(path)]
        rows = [
            {
                **row,
                "completion": f"{name} {HOSTILE}",
                "prompt": f"{row['prompt']} {HOSTILE} {at}",
                "group": HOSTILE + str(at % 3),
            }
            for at, row in enumerate(rows)
        ]
        rows[0] |= {"answer": HOSTILE, "id": HOSTILE, "correct": name == "finetuned"}
        rows[1] |= {"completion": "lone \ud800 surrogate", "correct": name == "baseline", "answer": "B"}
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )  # a lone surrogate is escaped
    run |= {"experiment": HOSTILE, "error": HOSTILE, "command": HOSTILE, "git": HOSTILE}
    run["versions"][HOSTILE] = HOSTILE
    run["receipt"] |= {"device": HOSTILE, "truncated_rows": {HOSTILE: 1}}
    run["selection"]["candidates"][0]["overrides"] = [HOSTILE]
    run["evaluation"]["comparison"]["verdict"] = {"outcome": "better", "reason": HOSTILE, "notes": [HOSTILE]}
    run["evaluation"]["finetuned"]["readings"][HOSTILE] = {"correct": 1, "unparsed": 0}
    save(folder, run)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile(tmp_path / "run")
    text = rendered(tmp_path / "run")
    text.encode("utf-8")
    assert "<img src=x" not in text
    assert "\u2028" not in text[text.index('id="answers"') : text.index("</script>", text.index('id="answers"'))]
    page = read(tmp_path / "run")
    assert len(page.scripts) == 2
    assert [tag for tag, _ in page.elements if tag == "img"] == ["img"]
    assert block(page)["rows"][0]["sides"][0]["text"] == f"baseline {HOSTILE}"
    assert "lone ? surrogate" in page.scripts[0]
    assert page.text.count("{{ 7*7 }}") > 8


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([percent(value) for value in (0.5, None, float("nan"))], ["50.0%", "–", "–"]),
        ([points(value) for value in (0.25, -0.031, 0.0, -1e-9)], ["+25.0", "−3.1", "0.0", "0.0"]),
        ([points(value) for value in (0.0003, -0.0003, None)], ["+0.03", "−0.03", "–"]),
        ([count(value) for value in (1234567, 3.0, 769.1, 0.92)], ["1,234,567", "3", "769.1", "0.92"]),
        ([seconds(value) for value in (0.14, 47.4, 59.7)], ["0.14 s", "47.4 s", "1 min 0 s"]),
        ([seconds(value) for value in (200, 7500, float("inf"))], ["3 min 20 s", "2 h 5 min", "–"]),
        (
            [date(value) for value in ("2026-01-02T03:04:05+02:00", "soon")],
            ["2 January 2026, 01:04 UTC", "–"],
        ),
    ],
)
def test_numbers_as_people_read_them(shown: list[str], expected: list[str]) -> None:
    assert shown == expected


@pytest.mark.smoke  # a browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
@pytest.mark.timeout(120)
def test_in_a_browser(tmp_path: Path) -> None:
    hostile(tmp_path / "run")
    page = tmp_path / "report.html"
    page.write_text(rendered(tmp_path / "run"), encoding="utf-8")

    def dom(fragment: str) -> str:
        return browse(tmp_path, f"{page.as_uri()}{fragment}")

    shown = dom("#filter=gained")
    assert "<title>pwned</title>" not in shown
    assert "<img src=" not in shown.replace('<img src="data:image/png', "")
    listed = shown[shown.index('class="list"') : shown.index('id="answers"')]
    assert html.escape(f"baseline {HOSTILE}", quote=False) in listed
    assert html.escape(f"finetuned {HOSTILE}", quote=False) in listed
    assert re.search(r'data-kind="gained" aria-pressed="true"', listed + shown)
    assert set(re.findall(r'class="kind ([\w-]+)"', listed)) == {"gained"}
    lost = dom("#filter=lost&search=SURROGATE")
    assert set(re.findall(r'class="kind ([\w-]+)"', lost)) == {"lost"}
    assert "1 of 60 questions" in lost
    assert "0 of 60 questions" in dom("#filter=all&search=nowhere")
    assert 'data-kind="differ" aria-pressed="true"' in dom("#training")


@pytest.mark.smoke  # a browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
@pytest.mark.timeout(120)
def test_no_table_is_wider_than_a_phone(tmp_path: Path) -> None:
    hostile(tmp_path / "hostile")
    sweep = write(tmp_path / "sweep", jobs=3)
    sweep["jobs"][2] |= {"status": "failed", "error": "x" * 90}
    sweep["selection"]["metric"] = "accuracy"
    sweep["evaluation"]["subgroups"] = {**SUBGROUPS, "column": "y" * 60}
    sweep["exports"] = exported(sweep)
    sweep["evaluation"]["labels"] = {"baseline": "x" * 60, "finetuned": "Llama-3.1-8B-Instruct/samples_medqa_4options"}
    save(tmp_path / "sweep", sweep)
    row = {"job": 0, "overrides": ["eval.max_tokens=64"], "status": "success", "model": "owner/" + "z" * 60}
    row |= {"evaluation": sweep["evaluation"], "p_adjusted": 0.5, "verdict": {"outcome": "inconclusive", "reason": "x"}}
    (tmp_path / "evaluations").mkdir()
    save(tmp_path / "evaluations", MINIMAL | {"mode": "evaluate", "evaluations": [row, {**row, "job": 1}]})
    scores(tmp_path / "scores")
    # A window of Chromium is at least 500 pixels wide; a frame may have any width.
    pages = [rendered(tmp_path / name) for name in ("hostile", "sweep", "evaluations", "scores")]
    frames = "".join(f'<iframe width="390" height="800" srcdoc="{html.escape(page)}"></iframe>' for page in pages)
    measure = """<script>addEventListener("load", () => {
      document.body.innerHTML += "<pre>" + JSON.stringify([...document.querySelectorAll("iframe")].map((frame) => {
        const page = frame.contentDocument, sizes = {tables: []};
        for (const fold of page.querySelectorAll("details")) fold.open = true;
        for (const table of page.querySelectorAll("table"))
          sizes.tables.push(Math.max(table.getBoundingClientRect().right, 16 + table.parentElement.scrollWidth));
        return {...sizes, page: page.documentElement.scrollWidth};
      })) + "</pre>";
    })</script>"""
    (tmp_path / "frames.html").write_text(
        f"<!doctype html><style>iframe {{ border: 0 }}</style><body>{frames}{measure}", encoding="utf-8"
    )
    shown = browse(tmp_path, (tmp_path / "frames.html").as_uri())
    sizes = json.loads(shown[shown.rindex("<pre>") + 5 : shown.rindex("</pre>")])
    assert [len(page["tables"]) for page in sizes] == [7, 10, 1, 5]
    for page in sizes:
        assert page["page"] <= 390
        assert max(page["tables"]) <= 390 - 16


def browse(folder: Path, address: str) -> str:
    """The document after its scripts ran, in a browser that asks for nothing."""
    assert CHROMIUM is not None
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom"
    )
    command = [CHROMIUM, *options.split(), f"--user-data-dir={folder / 'profile'}", address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout
