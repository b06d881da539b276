"""A model behind an OpenAI-compatible endpoint on this machine: retries, limits, and what is written where."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_contenders import TRAIN, row, settings_of

from sftlab.config import PriceConfig
from sftlab.eval import definitions, endpoint
from sftlab.eval.contenders import Contender, EvalSet, Remote
from sftlab.eval.cost import cost
from sftlab.eval.endpoint import Endpoint, UnreachableError
from sftlab.eval.shots import with_shots
from sftlab.eval.stage import Generated
from sftlab.model.base import Base
from sftlab.records import Generation
from sftlab.runtime.store import Stage, Store

pytest.importorskip("openai", reason="the extra endpoint is not installed")

KEY = "sesame-open-1234"


class Host:
    """What the server has been asked, how often at the same time, and which requests it refuses."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.status: Callable[[str], int] = lambda question: 200
        self.body: bytes | None = None
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.asked.append(body)
            self.keys.add(handler.headers["Authorization"])
            status = self.status(question)
        threading.Event().wait(0.01)
        reply = {
            "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {
                "role": "assistant", "content": f"To {question!r}: the answer is (A)."}}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25},
        }  # fmt: skip
        text = json.dumps(reply if status == 200 else {"error": {"message": f"no, {KEY}"}}).encode()
        text = text if self.body is None else self.body
        with self.lock:
            self.now -= 1
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if text.startswith(b"<html>") else "application/json")
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Host, Endpoint]]:
    state = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MY_HOST_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # proxies are not for this machine
    yield state, Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "big", "MY_HOST_KEY", 3, 20.0, 1)
    server.shutdown()
    server.server_close()


ROWS = [row(number) for number in range(12)]


def make(store: Store, place: Endpoint, *overrides: str) -> Generated:
    cfg = settings_of(Path("random:llama"), *overrides)
    return endpoint.make(store, place, ROWS, "rows", cfg.eval, 3)


def test_answers_are_asked_for_once_and_the_key_is_in_no_file(tmp_path: Path, host: tuple[Host, Endpoint]) -> None:
    state, place = host
    store = Store(tmp_path / "store")
    generated = make(store, place)
    rows = generated.rows()
    assert [one.id for one in rows] == [one.id for one in ROWS]
    assert rows[3].completion == "To 'Question 3?': the answer is (A)."
    assert rows[3].prompt == "system: Be brief.\n\nuser: Question 3?"
    assert {(one.tokens, one.prompt_tokens, one.finish_reason) for one in rows} == {(5, 20, "stop")}
    assert state.most <= 3
    sent = state.asked[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("big", 8, 0, 3)
    assert [turn["role"] for turn in sent["messages"]] == ["system", "user"]
    assert state.keys == {f"Bearer {KEY}"}
    assert make(store, place).stage.cached
    assert len(state.asked) == len(ROWS)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not any(KEY.encode() in file.read_bytes() for file in files)


def test_a_busy_endpoint_is_asked_again_and_one_that_refuses_loses_no_answer(
    tmp_path: Path, host: tuple[Host, Endpoint]
) -> None:
    state, place = host
    store = Store(tmp_path / "store")
    seen: set[str] = set()

    def busy(question: str) -> int:
        first = question not in seen
        seen.add(question)
        return 503 if question == "Question 1?" and first else 401 if question == "Question 11?" else 200

    state.status = busy
    with pytest.raises(UnreachableError, match=r"big at http.* refuses the request: .*401.*\$MY_HOST_KEY") as error:
        make(store, place)
    assert KEY not in str(error.value)
    (partial,) = store.root.glob("generations/*.partial/finished.jsonl")
    done = {f"Question {json.loads(line)['row']}?" for line in partial.read_text("utf-8").splitlines()}
    assert len(done) >= 6
    state.status, before = lambda question: 200, len(state.asked)
    assert len(make(store, place).rows()) == len(ROWS)
    again = {body["messages"][-1]["content"] for body in state.asked[before:]}
    assert again == {f"Question {number}?" for number in range(len(ROWS))} - done
    assert "Question 11?" in again


def test_an_endpoint_that_does_not_answer_is_left_out_with_the_reason(tmp_path: Path) -> None:
    place = Endpoint("http://127.0.0.1:9/v1", "big", None, 2, 0.5, 0)
    with pytest.raises(UnreachableError, match=r"does not answer \(1 tries of at most 0\.5 s\)"):
        make(Store(tmp_path / "store"), place)


@pytest.mark.parametrize(
    "body", [b"<html>Hi", b"<p>Hi", b"{}", b"[]", b'{"choices": null}', b'{"choices": []}', b'{"choices": [{}]}']
)
def test_an_endpoint_without_a_completion_is_left_out_with_the_reason(
    tmp_path: Path, host: tuple[Host, Endpoint], body: bytes
) -> None:
    state, place = host
    state.body = body
    with pytest.raises(UnreachableError, match=r"answers without a completion; check the URL"):
        make(Store(tmp_path / "store"), place)


def test_a_definition_with_a_url_is_asked_with_examples(tmp_path: Path) -> None:
    definition = "+eval.contenders.big={url: 'https://host.example/v1/', model: large, shots: 2}"
    cfg = settings_of(Path("random:llama"), definition, "eval.contenders.few_shot=null")
    base = Base("base", tmp_path, "base", False, None)
    test = EvalSet([row(100)], "key", TRAIN)
    found, (record,) = definitions.defined(cfg, Store(tmp_path), {"baseline": Contender.of(base)}, test)
    remote = found["big"]
    assert isinstance(remote, Remote)
    assert remote.endpoint == Endpoint("https://host.example/v1", "large", None, 8, 120.0, 5)
    shots = [one for name in record.shots for one in TRAIN if one.id == name]
    assert remote.asked.examples == [with_shots(row(100), shots)]
    assert (record.about, record.prompting) == ("large at host.example with 2 examples in its prompt", False)


def test_cost_counts_tokens_of_all_repeats_and_their_price(tmp_path: Path) -> None:
    for name in ("generations.jsonl", "generations-2.jsonl"):
        Generation.write(tmp_path / name, [Generation(f"q{n}", "", "", "stop", 10 * n) for n in (1, 2)])
    # Of 60 tokens 15 were generated now, in 3 s; the others by a run that was killed.
    (tmp_path / "speed.json").write_text('{"tokens": 15, "generate_seconds": 3.0}', "utf-8")
    generated = Generated(Stage("generations", "0", tmp_path, cached=True, seconds=0.0))
    found = cost(generated, 2, [100, 200], PriceConfig(input=1.0, output=10.0))
    assert (found.answers, found.prompt_tokens, found.completion_tokens) == (4, 600, 60)
    assert found.seconds_per_answer == pytest.approx(3.0)
    assert found.price == pytest.approx((600 * 1.0 + 60 * 10.0) / 1e6 / 4 * 1000)
    unknown = cost(generated, 2, None, PriceConfig(input=1.0, output=10.0))
    assert (unknown.prompt_tokens, unknown.price) == (None, None)
