"""mode=serve: which run and models, refusals, and a real server with the ``openai`` client."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from browser import CHROMIUM, browser
from conftest import composed, interruptible
from made_runs import make_run
from rich.console import Console
from test_cli import quick, whole
from test_modes import TINY

from sftlab.dataset.arrow_examples import Examples
from sftlab.errors import ConfigError, StageError
from sftlab.model import finished
from sftlab.records import Example, read_jsonl
from sftlab.runtime.run import Run
from sftlab.serve import chat, page, server, worker
from sftlab.serve.client import streaming

# ------------------------------------------------------------------- which run, which models


def found(folder: Path, **adapter: Any) -> finished.Finished:
    return finished.find(composed(f"run={make_run(folder, **adapter)}", f"store={folder}/outputs/store"))


def test_without_run_the_newest_success_with_a_merged_model_is_used(tmp_path: Path) -> None:
    oldest = make_run(tmp_path)
    for newer in ({"mode": "train"}, {"status": "failed"}):
        record = Run.read(make_run(tmp_path, **newer)).record
        assert record.started >= Run.read(oldest).record.started
    cfg = composed(f"runs.outputs={tmp_path}/outputs", f"store={tmp_path}/outputs/store")
    assert finished.find(cfg).folder.resolve() == oldest.resolve()
    shutil.rmtree(tmp_path / "outputs" / "store" / "merged")
    with pytest.raises(ConfigError, match="no successful run with a merged model"):
        finished.find(cfg)


def test_a_lora_adapter_shares_the_engine_of_its_base(tmp_path: Path) -> None:
    (one,) = server.servers(found(tmp_path), 8000, adapter=True)
    assert one.names == ("baseline", "finetuned")
    assert one.arguments[-2:] == ("--lora-modules", f"finetuned={tmp_path}/outputs/store/train/key/checkpoint-4")


@pytest.mark.parametrize("changed", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"r": 999}])
def test_what_vllm_cannot_add_is_served_merged_by_a_second_engine(tmp_path: Path, changed: dict[str, Any]) -> None:
    planned = server.servers(found(tmp_path, **changed), 8000, adapter=True)
    assert [(one.names, one.port) for one in planned] == [(("baseline",), 8000), (("finetuned",), 8001)]
    assert planned[1].arguments[0] == str(tmp_path / "outputs" / "store" / "merged" / "key")


def test_the_adapter_of_a_model_that_reads_images_is_not_added(tmp_path: Path) -> None:
    run = found(tmp_path)
    assert run.adapter is not None
    assert finished.lora_rank(run.adapter, run.base.path) == 16
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text('{"vision_config": {}}', "utf-8")
    assert finished.lora_rank(run.adapter, tmp_path / "vision") is None


def test_a_rank_is_rounded_up_to_one_of_vllm(tmp_path: Path) -> None:
    (one,) = server.servers(found(tmp_path, r=24), 8000, adapter=True)
    assert one.arguments[one.arguments.index("--max-lora-rank") + 1] == "32"


SPOILT = {
    "trained only": (lambda run: None, "mode=train does not merge; run its command again with mode=all"),
    "deleted": (lambda run: (run / "merged").unlink(), "its merged model was deleted; run its command again"),
    "no record": (lambda run: (run / "run.json").unlink(), "has no run.json; set it to the folder of a run"),
    "no job": (lambda run: (run / "job.json").unlink(), "job 0 has no job.json; run its command again"),
}


@pytest.mark.parametrize("about", SPOILT)
def test_a_run_without_a_merged_model_is_refused(tmp_path: Path, about: str) -> None:
    spoil, message = SPOILT[about]
    folder = make_run(tmp_path, mode="train" if about == "trained only" else "all")
    spoil(folder)
    done = quick(tmp_path, "mode=serve", f"run={folder}", "instance=cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sftlab: run={str(folder)!r}: ")
    assert message in done.stderr


def test_a_busy_port_is_refused_with_a_free_one(tmp_path: Path) -> None:
    make_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = quick(tmp_path, "mode=serve", f"serve.port={port}", "instance=cpu")
    assert done.returncode == 2, done.stderr
    assert f"serve.port={port}: port {port} cannot be used: Address already in use" in done.stderr
    (other,) = re.findall(r"set serve.port=(\d+)", done.stderr)
    dry = quick(tmp_path, "mode=serve", f"serve.port={other}", "instance=cpu", "dry_run=true")
    assert dry.returncode == 0, dry.stderr
    assert f"would serve: baseline and finetuned at http://127.0.0.1:{other}/v1" in dry.stdout


# ------------------------------------------------------------------- the chat template

TEMPLATE = "\n{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
ASKED = [{"role": "user", "content": "What?"}]


def render(template: str, messages: list[dict[str, str]]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # As transformers and vLLM render chat templates.
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        messages=messages, strftime_now=lambda form: "today"
    )  # fmt: skip


@pytest.mark.parametrize("text", ["Be brief.", 'It\'s "so"\\n\n{{ not a template }}', "ümlaut 😀", ""])
def test_a_conversation_without_a_system_prompt_gets_that_of_the_run(text: str) -> None:
    template = worker.chat_template(TEMPLATE, text, None)
    own = [{"role": "system", "content": "Own."}, *ASKED]
    assert render(template, ASKED) == render(TEMPLATE, [{"role": "system", "content": text}, *ASKED])
    assert render(template, own) == render(TEMPLATE, own)
    assert worker.chat_template(TEMPLATE, None, None) == TEMPLATE


def test_a_date_is_that_of_the_training() -> None:
    template = worker.chat_template("Today is {{ strftime_now('%d %B %Y') }}.", None, "2026-11-28T10:00:00")
    assert render(template, []) == "Today is 28 November 2026."


# ------------------------------------------------------------------- a real server


UNFINISHED = "\ufffd"  # a random model may end within a character, which vLLM leaves out


@dataclass
class Serving:
    """A server, the run that it serves, and the process of the command."""

    url: str
    folder: Path
    process: subprocess.Popen[str]

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600)

    def recorded(self, name: str) -> list[tuple[Example, str]]:
        record = json.loads((self.folder / "run" / "run.json").read_text("utf-8"))
        examples = {row.id: row for row in Examples(self.folder / record["stages"]["dataset"] / "test.arrow")}
        rows = read_jsonl(self.folder / "run" / "predictions" / f"{name}.jsonl")
        return [(examples[row["id"]], row["completion"]) for row in rows]

    def ask(self, model: str, example: Example, **options: Any) -> Any:
        """Ask without the system prompt, which is the server's default."""
        turns = [turn for turn in example.prompt if turn["role"] != "system"]
        options = {"max_tokens": self.max_tokens, **options}
        return self.client().chat.completions.create(model=model, messages=turns, **options)

    @property
    def max_tokens(self) -> int:
        """That of the run."""
        return int(json.loads((self.folder / "run" / "job.json").read_text("utf-8"))["config"]["eval"]["max_tokens"])


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One engine for all tests below. In float32, so that another batch changes no answer."""
    folder = tmp_path_factory.mktemp("served")
    done = whole(folder, *TINY, "eval.dtype=float32", "train.learning_rate=0.01", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    port = server.free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "sftlab", "mode=serve", "run=run", f"serve.port={port}", "instance=cpu"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=interruptible, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"serve: ready: baseline and finetuned at http://127.0.0.1:{port}/v1; Ctrl-C stops it" in line, (
        line + process.communicate(timeout=600)[1]
    )
    yield Serving(f"http://127.0.0.1:{port}/v1", folder, process)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.smoke
def test_served_answers_are_the_recorded_ones(serving: Serving) -> None:
    assert [model.id for model in serving.client().models.list()] == ["baseline", "finetuned"]
    answers = {}
    for name in ("baseline", "finetuned"):
        recorded = serving.recorded(name)
        served = [serving.ask(name, example).choices[0].message.content for example, _ in recorded]
        assert served == [completion.rstrip(UNFINISHED) for _, completion in recorded]
        answers[name] = served
    assert answers["baseline"] != answers["finetuned"]


@pytest.mark.smoke
def test_settings_of_a_request_take_precedence(serving: Serving) -> None:
    example, _ = serving.recorded("finetuned")[0]
    answer = serving.ask("finetuned", example, max_tokens=1)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (1, "length")
    assert serving.ask("finetuned", example).usage.completion_tokens > 1
    more = serving.max_tokens + 8
    answer = serving.ask("finetuned", example, max_tokens=more, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == more
    own = [{"role": "system", "content": "Other."}, *(turn for turn in example.prompt if turn["role"] != "system")]
    other = serving.client().chat.completions.create(model="finetuned", messages=own, max_tokens=9)
    assert other.usage.prompt_tokens != serving.ask("finetuned", example).usage.prompt_tokens


@pytest.mark.smoke
def test_fifty_requests_at_once_and_dropped_connections(serving: Serving) -> None:
    example, _ = serving.recorded("finetuned")[0]

    def ask(number: int) -> str:
        if number % 10 == 0:  # closes the connection after the first token
            with serving.ask("finetuned", example, stream=True, max_tokens=400) as stream:
                return str(next(iter(stream)).object)
        return str(serving.ask(("baseline", "finetuned")[number % 2], example).choices[0].message.content)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert set(answers[::10]) == {"chat.completion.chunk"}
    assert len({answer for number, answer in enumerate(answers) if number % 10 and number % 2}) == 1


@pytest.mark.smoke
def test_what_cannot_be_answered_is_refused_and_the_server_continues(serving: Serving) -> None:
    import openai

    example, completion = serving.recorded("finetuned")[0]
    long = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError, match="context length"):
        serving.client().chat.completions.create(model="finetuned", messages=long)
    with pytest.raises(openai.NotFoundError, match="other"):
        serving.ask("other", example)
    assert serving.ask("finetuned", example).choices[0].message.content == completion.rstrip(UNFINISHED)


@pytest.mark.smoke
def test_a_conversation_in_the_terminal(serving: Serving) -> None:
    (first, answer), (second, _) = serving.recorded("finetuned")[:2]
    models = ("baseline", "finetuned")

    def talk(stream: Any, *lines: str) -> str:
        out = io.StringIO()
        chat.converse(iter(lines), models, stream, Console(file=out, width=100))
        return out.getvalue()

    stream = streaming(dict.fromkeys(models, serving.url), serving.max_tokens)
    out = talk(stream, first.question, "/reset", second.question, "word " * 5000, "Hello")
    assert f"finetuned: {answer.rstrip(UNFINISHED)}\n" in out
    assert "context length" in out
    assert len(re.findall("^(?:baseline|finetuned): ", out, re.MULTILINE)) == 7  # with one refusal
    with pytest.raises(StageError, match="does not answer"):
        talk(streaming(dict.fromkeys(models, "http://127.0.0.1:9/v1"), 9), "Hello")


@pytest.mark.smoke
def test_the_run_is_exported_and_tested(serving: Serving) -> None:
    """In 4 bits of bitsandbytes; GGUF needs a tokenizer that llama.cpp knows, which a random model does not have."""
    pytest.importorskip("bitsandbytes")
    done = whole(serving.folder, "mode=export", "export.format=bnb4", "run=run", "instance=cpu")
    assert done.returncode == 0, done.stderr
    assert "Verdict on the exported model: " in done.stdout
    assert (serving.folder / "run" / "export" / "bnb4" / "model.safetensors").is_file()
    (export,) = Run.read(serving.folder / "run").record.exports
    assert 0 < export.weight_bytes < 0.8 * export.merged_bytes  # its embeddings stay as they are
    assert (export.comparison.n, export.engine) == (6, "transformers")
    rows = {name: list(read_jsonl(serving.folder / "run" / "predictions" / f"{name}.jsonl"))
            for name in ("finetuned", "bnb4")}  # fmt: skip
    assert [row["id"] for row in rows["bnb4"]] == [row["id"] for row in rows["finetuned"]]
    again = whole(serving.folder, "mode=export", "export.format=bnb4", "run=run", "instance=cpu")
    assert again.returncode == 0, again.stderr
    assert len(Run.read(serving.folder / "run").record.exports) == 1


@pytest.mark.smoke
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
@pytest.mark.filterwarnings("ignore")
def test_the_page_in_a_browser(serving: Serving, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install --no-deps -r locks/page.lock")
    (example, _), (other, _) = serving.recorded("finetuned")[:2]
    ready, done, port = Event(), Event(), server.free_port()
    models = ("baseline", "finetuned")
    shown = partial(
        page.show, models, streaming(dict.fromkeys(models, serving.url), serving.max_tokens),
        title="a <b>run</b>", port=port,
        examples=[example.question, other.question], when_ready=ready.set, until=done.is_set,
    )  # fmt: skip
    answers = "document.querySelectorAll('.message.bot').length"
    field = "document.querySelector('#question textarea').value"
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(shown)
        try:
            assert ready.wait(600), running.exception(timeout=1)
            with browser(tmp_path, f"http://127.0.0.1:{port}/") as window:
                window.wait("document.querySelectorAll('.gallery-item, .gallery button').length >= 2")
                window.run("document.querySelectorAll('.gallery-item, .gallery button')[1].click()")
                window.wait(f"{field}.length > 0")
                assert window.run(field).split() == other.question.split()
                window.press("#send")
                window.wait(f"{answers} == 2 && {field} == ''")
                window.type("#question textarea", "<i>Why</i> &amp;\n  how?")
                window.press("#send")
                window.wait(f"{answers} == 4")
                assert "<i>Why</i> &amp;\n  how?" in window.run("document.body.innerText")
                window.run("Clipboard.prototype.writeText = async (text) => { window.copied = text }")
                window.run("[...document.querySelectorAll('button[title=\"Copy message\"]')][2].click()")
                assert window.wait("window.copied") == "<i>Why</i> &amp;\n  how?"
                window.press("#clear")
                window.wait(f"{answers} == 0")
                window.type("#question textarea", "word " * 5000)
                window.press("#send")
                window.wait("document.body.innerText.includes('context length')")
        finally:
            done.set()
    gc.collect()  # Gradio leaves event loops open, which would be reported after the last test


@pytest.mark.smoke
def test_ctrl_c_ends_all_processes(serving: Serving) -> None:
    os.killpg(serving.process.pid, signal.SIGINT)
    _, errors = serving.process.communicate(timeout=600)
    assert (serving.process.returncode, errors) == (130, "sftlab: interrupted\n")
    for _ in range(50):  # a process that has ended stays visible until it is reaped
        if not (left := in_session(serving.process.pid)):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {left}")


def in_session(session: int) -> list[str]:
    """The processes of a session that have not ended."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, values = stat.read_text("utf-8").rpartition(")")
        except OSError:
            continue
        if values.split()[3] == str(session) and values.split()[0] != "Z":
            left.append(name)
    return left
