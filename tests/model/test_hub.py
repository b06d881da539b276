"""The hub, played by a server on this machine: what it refuses is worded, and what it has is fetched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import TEMPLATE, vignettes, write_model
from test_cli import refused, sftlab
from test_dataset import examples, ids
from test_prompt import settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few requests of the hub that fetching needs. ``files`` is by repository and path."""

    protocol_version = "HTTP/1.1"
    files: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 – set by the fixture, read by every request
    asked: list[str] = []  # noqa: RUF012
    commit = COMMIT
    older: dict[str, dict[str, dict[str, bytes]]] = {}  # noqa: RUF012 – by commit
    cut: list[str] = []  # noqa: RUF012 – files that are cut off once
    over = threading.Event()  # set when the test is over: a stalled request is not answered before

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if status := re.search(r"/status/(\d+)", path):
            return self.answer(int(status[1]), {"error": "down for maintenance"}, Retry_After="1")
        if "/stalled/" in path:
            self.over.wait(600)
            return None
        name = next((name for name in self.files if f"/{name}/" in f"{path}/"), None)
        if name is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        rest = path.partition(name)[2].strip("/")
        # A gated repository shows its description to everybody, and its files to those who accepted its terms.
        if "gated" in name and ("resolve" in rest or rest == "auth-check"):
            status = 401 if "nobody" in name else 403  # without a token, and with one that was not granted access
            return self.answer(status, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        match rest.split("/"):
            case ["" | "auth-check"]:
                return self.answer(200, self.info(name, self.commit))
            case ["revision", revision] if self.at(revision):
                return self.answer(200, self.info(name, self.at(revision)))
            case ["tree", revision, *folder]:
                files = self.stored(name, self.at(revision)).items()
                return self.answer(200, [self.entry(*file) for file in files if file[0].startswith("/".join(folder))])
            case ["resolve", revision, *file] if commit := self.at(revision):
                return self.file("/".join(file), self.stored(name, commit), commit)
        return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")

    def file(self, file: str, files: dict[str, bytes], commit: str) -> None:
        if file not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        text, reported = files[file], {"X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        reported["ETag"] = f'"{hashlib.sha1(text).hexdigest()}"'
        if self.command == "GET" and file in self.cut:
            self.cut.remove(file)
            self.answer(200, text[:-10], Content_Length=str(len(text)), **reported)
            self.close_connection = True
            return None
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, size = int(asked[1]), len(text)
            return self.answer(206, text[start:], Content_Range=f"bytes {start}-{size - 1}/{size}", **reported)
        return self.answer(200, text, **reported)

    def at(self, revision: str) -> str:
        """The commit that a revision names, or nothing."""
        commit = self.commit if revision == "main" else revision
        return commit if commit == self.commit or commit in self.older else ""

    def stored(self, name: str, commit: str) -> dict[str, bytes]:
        return self.older.get(commit, self.files)[name]

    do_HEAD = do_GET  # noqa: N815 – the name that http.server calls

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(f"POST {path}")
        name = next(name for name in self.files if f"/{name}/" in path)
        files = self.stored(name, self.at(path.rpartition("/")[2]))
        self.answer(200, [self.entry(file, files[file]) for file in asked["paths"] if file in files])  # paths-info

    def info(self, name: str, commit: str) -> dict[str, Any]:
        return {
            "_id": "1", "id": name, "sha": commit, "private": False, "gated": "manual" if "gated" in name else False,
            "downloads": 0, "likes": 0, "tags": [],
            "siblings": [{"rfilename": file} for file in self.stored(name, commit)],
        }  # fmt: skip

    def entry(self, file: str, text: bytes) -> dict[str, Any]:
        return {"type": "file", "path": file, "size": len(text), "oid": hashlib.sha1(text).hexdigest()}


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with a model, a dataset, and one of each that is gated. Processes started now ask it."""
    model = write_model(tmp_path_factory.mktemp("model"))
    stored = {file.name: file.read_bytes() for file in model.iterdir()}
    rows = "".join(json.dumps(row) + "\n" for row in vignettes(20)).encode()
    Hub.files = {
        "org/tiny": {
            **stored,
            "qwen.tiktoken": b"IQ== 0",
            "README.md": b"about",
            "model.gguf": b"not needed",
            "code.py": b"raise SystemExit",
        },
        "org/gated": stored,
        "org/gated-nobody": stored,
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
        "org/bare": {"README.md": b"about"},
        "org/rows": {"train.jsonl": rows, "README.md": b"---\nlicense: mit\n---\n"},
        "org/gated-rows": {"train.jsonl": rows},
    }
    Hub.asked, Hub.cut, Hub.older, Hub.commit, Hub.over = [], [], {}, COMMIT, threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    ask(monkeypatch, tmp_path_factory.mktemp("home"), server.server_port)
    yield Hub
    Hub.over.set()
    server.shutdown()
    server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, home: Path, port: int) -> None:
    """Let processes that are started from now on take this server for the hub."""
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "300")


def python(code: str) -> Any:
    """What code prints, as JSON, in a process of its own: the endpoint is read when the library is imported."""
    status, out, errors, _ = sftlab(Path.cwd(), code=f"{code}\nraise SystemExit(0)")
    assert status == 0, errors
    return json.loads(out)


DATA = ["dataset.split={train: 0.5, validation: 0.25, test: 0.25}", "model=tiny_random"]
REFUSED = [
    (
        ["model.name_or_path=org/gated"],
        [
            "model.name_or_path='org/gated': is gated",
            "accept its terms at {hub}/org/gated,",
            "`hf auth login`",
            "HF_TOKEN",
        ],
    ),
    (
        ["model.name_or_path=org/gone"],
        ["model.name_or_path='org/gone': is neither a local path nor a repository", "{hub}/org/gone", "check the name"],
    ),
    (["model.name_or_path=org/tiny", "model.revision=v9"], ["model.name_or_path='org/tiny': has no such revision"]),
    (["model.name_or_path=org/bare"], ["model.name_or_path='org/bare': has no config.json; name a saved model"]),
    (["model.name_or_path=org/gated-nobody"], ["model.name_or_path='org/gated-nobody': is gated", "`hf auth login`"]),
    (
        ["model.name_or_path=org/pickled"],
        ["has no weights as safetensors", "name a model with safetensors"],
    ),
    *(
        ([f"model.name_or_path=status/{status}"], [f"the hub ({{hub}}) answered {status}", "try again later"])
        for status in (429, 503)
    ),
    *(
        ([f"model.name_or_path=status/{status}"], [f"refuses your token ({status}); log in with `hf auth login`"])
        for status in (401,)
    ),
    (
        [*DATA, "dataset.name_or_path=status/500"],
        ["dataset.name_or_path='status/500': the hub ({hub}) answered 500", "try again later"],
    ),
    (["model.name_or_path=stalled/model"], ["the hub ({hub}) cannot be reached", "timed out", "check the network"]),
    (
        [*DATA, "dataset.name_or_path=org/gated-rows"],
        ["dataset.name_or_path='org/gated-rows': is gated", "accept its terms at {hub}/datasets/org/gated-rows,"],
    ),
    (
        [*DATA, "dataset.name_or_path=org/gone"],
        ["dataset.name_or_path='org/gone': is neither", "{hub}/datasets/org/gone"],
    ),
    (
        [*DATA, "dataset@eval.dataset=medqa", "eval.dataset.name_or_path=org/rows", "eval.dataset.revision=v9"],
        ["eval.dataset.name_or_path='org/rows': has no such revision"],
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[arguments[-1] for arguments, _ in REFUSED])
def test_what_the_hub_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: type[Hub], arguments: list[str], expected: list[str]
) -> None:
    if "stalled" in arguments[-1]:
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    message = refused(tmp_path, *arguments)
    parts = [part.format(hub=os.environ["HF_ENDPOINT"]) for part in expected]
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("name", ["model.name_or_path=org/tiny", "dataset.name_or_path=org/rows"])
def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port at which nothing listens
        ask(monkeypatch, tmp_path / "home", closed.getsockname()[1])
        (tmp_path / "work").mkdir()
        message = refused(tmp_path / "work", name)
    assert f"the hub ({os.environ['HF_ENDPOINT']}) cannot be reached and no copy is cached" in message
    assert "check the network, or name a local folder" in message


SNAPSHOT = """
import json
from sftlab.model.hub import model_snapshot
folder, commit = model_snapshot("org/tiny", None, code=False)
print(json.dumps([sorted(path.name for path in folder.iterdir()), commit, str(folder)]))
"""


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_then_found_without_the_hub(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names, commit, folder = python(SNAPSHOT)
    assert names == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert commit == COMMIT
    for name in names:
        assert (Path(folder) / name).read_bytes() == hub.files["org/tiny"][name]
    fetched = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == len(names)
    hub.asked.clear()
    assert python(SNAPSHOT)[1] == COMMIT
    assert [line for line in hub.asked if "/resolve/" in line] == []
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert python(SNAPSHOT) == [names, commit, folder]
    assert hub.asked == []


def test_a_file_that_is_cut_off_is_fetched_to_its_end(hub: type[Hub]) -> None:
    hub.cut.append("tokenizer.json")
    names, _, folder = python(SNAPSHOT)
    assert hub.cut == []
    for name in names:
        assert (Path(folder) / name).read_bytes() == hub.files["org/tiny"][name]


PINNED = """
import json, os
from pathlib import Path
from conftest import composed
os.environ["HF_HUB_OFFLINE"] = "0"
from sftlab.model import base as models
from sftlab.dataset import stage as dataset
from sftlab.dataset.pinning import pinned
from sftlab.runtime.job import revisions
from sftlab.runtime.store import Store
cfg = composed(*json.loads(os.environ["OVERRIDES"]))
base = models.resolve(cfg.model, Store("store"), cfg.seed)
cfg = pinned(cfg, base)
rows = dataset.load(Store("store"), cfg.dataset)
text = (base.path / "chat_template.jinja").read_text("utf-8")
print(json.dumps([revisions(cfg), text, sorted(row.question for part in rows.values() for row in part)]))
"""


@pytest.mark.smoke
def test_a_rerun_with_the_recorded_revisions_gets_the_same_bytes(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*DATA[:1], "model.name_or_path=org/tiny", "dataset.name_or_path=org/rows"]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("OVERRIDES", json.dumps(overrides))
    first = python(PINNED)
    assert first[0] == {"model.revision": COMMIT, "dataset.revision": COMMIT}
    hub.older[COMMIT] = {name: dict(files) for name, files in hub.files.items()}
    hub.commit = "f" * 40  # the branch goes on
    hub.files["org/tiny"]["chat_template.jinja"] = TEMPLATE.replace("<", "[").encode()
    hub.files["org/rows"]["train.jsonl"] = "".join(json.dumps(row) + "\n" for row in vignettes(30)).encode()
    later = python(PINNED)
    assert later[0] == {"model.revision": hub.commit, "dataset.revision": hub.commit}
    assert later[1:] != first[1:]
    monkeypatch.setenv("OVERRIDES", json.dumps([*overrides, *(f"{key}={value}" for key, value in first[0].items())]))
    assert python(PINNED) == first


ROWS = """
import json, os
from sftlab.config import DatasetConfig
from sftlab.dataset import stage as dataset
from sftlab.runtime.store import Store
cfg = DatasetConfig.model_validate_json(os.environ["SETTINGS"])
splits = dataset.load(Store("store"), cfg)
ids = {name: [row.id for row in rows] for name, rows in splits.items()}
print(json.dumps([ids, dataset.inputs(cfg)["source"]]))
"""


@pytest.mark.slow
def test_a_dataset_is_downloaded_and_cut_like_a_file_of_the_same_rows(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SETTINGS", settings(name_or_path="org/rows").model_dump_json())
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    splits, commit = python(ROWS)
    (tmp_path / "rows.jsonl").write_bytes(hub.files["org/rows"]["train.jsonl"])
    assert splits == ids(examples(tmp_path / "rows.jsonl"))
    assert commit == COMMIT


def test_a_pinned_commit_is_its_own_name_and_needs_no_hub() -> None:
    from sftlab.model.hub import dataset_commit

    assert dataset_commit("org/rows", COMMIT) == COMMIT


def test_offline_says_so(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = """
import json
from sftlab.errors import ConfigError
from sftlab.model.hub import dataset_commit, model_snapshot
said = []
for fetch in (lambda: dataset_commit("org/rows", None), lambda: model_snapshot("org/tiny", None, code=False)):
    try:
        fetch()
    except ConfigError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    expected = python(code)
    assert len(expected) == 2
    assert all("cannot be reached and no copy is cached" in text for text in expected), expected
    assert hub.asked == []


def test_a_full_disk_is_not_taken_for_the_network(tmp_path: Path) -> None:
    from sftlab.errors import StageError
    from sftlab.model.hub import explained

    expected = r"cannot be written to the hub's cache .*No space left.*HF_HOME"
    with pytest.raises(StageError, match=expected), explained("org/tiny", "model.name_or_path"):
        Path("/dev/full").write_text("x", "utf-8")
