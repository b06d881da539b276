"""mode=chat: conversations with two models, with answers that are made up; test_serve.py has one with real models."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import pytest
from conftest import interruptible
from rich.console import Console

from sftlab.errors import ConfigError, StageError
from sftlab.records import Message
from sftlab.serve import page
from sftlab.serve.chat import converse
from sftlab.serve.client import RefusedError, growing
from sftlab.serve.server import free_port

MODELS = ("baseline", "finetuned")


class Models:
    """Answer with the number of turns; records what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[Message]]] = []

    async def __call__(self, model: str, turns: Sequence[Message]) -> AsyncIterator[str]:
        self.asked.append((model, list(turns)))
        for part in (f"{model} ", "[b]has[/b] ", f"{len(turns)}"):
            await asyncio.sleep(0)
            yield part


def chat(lines: list[str], stream: object, *, terminal: bool = False, width: int = 100) -> str:
    out = io.StringIO()
    converse(iter(lines), MODELS, stream, Console(file=out, force_terminal=terminal, width=width))  # type: ignore[arg-type]
    return out.getvalue()


def test_each_model_has_its_own_conversation() -> None:
    models = Models()
    out = chat(["one", "", "two", "/reset", "three", "/quit", "four"], models)
    assert [(model, len(turns)) for model, turns in models.asked] == [
        *((model, 1) for model in MODELS), *((model, 3) for model in MODELS), *((model, 1) for model in MODELS),
    ]  # fmt: skip
    assert [turn["content"] for turn in models.asked[2][1]] == ["one", "baseline [b]has[/b] 1", "two"]
    assert [turn["content"] for turn in models.asked[3][1]] == ["one", "finetuned [b]has[/b] 1", "two"]
    assert "baseline: baseline [b]has[/b] 3\nfinetuned: finetuned [b]has[/b] 3\n" in out


def test_an_unknown_command_lists_the_commands_and_asks_nothing() -> None:
    models = Models()
    assert "/help: no such command; /reset starts a new conversation, /quit" in chat(["/help me"], models)
    assert models.asked == []


def test_a_refused_question_is_not_part_of_the_conversation() -> None:
    asked = []

    async def refuse_long(model: str, turns: Sequence[Message]) -> AsyncIterator[str]:
        asked.append([turn["content"] for turn in turns])
        if model == "finetuned" and turns[-1]["content"] == "long":
            raise RefusedError("finetuned: too long")
        yield "yes"

    out = chat(["long", "short"], refuse_long)
    assert "finetuned: too long; /reset starts a new conversation" in out
    assert asked[2:] == [["short"], ["short"]]


def test_a_server_that_ended_ends_the_conversation() -> None:
    async def fail(model: str, turns: Sequence[Message]) -> AsyncIterator[str]:
        raise StageError("does not answer")
        yield ""

    with pytest.raises(StageError, match="does not answer"):
        chat(["one", "two"], fail)


@pytest.mark.parametrize(("width", "rows"), [(100, 1), (40, 2)])
def test_answers_are_side_by_side_where_there_is_room(width: int, rows: int) -> None:
    lines = chat(["one"], Models(), terminal=True, width=width).splitlines()
    assert len([line for line in lines if "has" in line and "[b]" in line]) >= rows
    assert any("baseline [b]" in line and "finetuned [b]" in line for line in lines) == (rows == 1)


def test_a_page_needs_gradio_and_a_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "find_spec", lambda module: module)
    page.check(free_port())
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ConfigError, match=r"set serve\.page_port=") as e,
    ):
        page.check(listener.getsockname()[1])
    assert "cannot be used: Address already in use" in str(e.value)
    monkeypatch.setattr(page, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=r"mode=page: requires the package gradio; pip install"):
        page.check(free_port())


def test_answers_grow_and_stop_with_the_caller() -> None:
    ended: list[str] = []

    async def slow(model: str, turns: Sequence[Message]) -> AsyncIterator[str]:
        try:
            for number in range(1000):
                yield f"{number} "
                await asyncio.sleep(0.01)
        finally:
            ended.append(model)

    async def first() -> dict[str, str]:
        answers = growing({model: [] for model in MODELS}, slow)
        shown = await anext(answers)
        await answers.aclose()  # type: ignore[attr-defined]
        return shown

    shown = asyncio.run(first())
    assert set(shown) == set(ended) == set(MODELS)
    assert all(text.startswith("0 ") and "999" not in text for text in shown.values())


TERMINAL = """
import sys
from rich.console import Console
from sftlab.serve.chat import converse, typed

async def stream(model, turns):
    yield f"{model} answers {turns[-1]['content']}"

converse(typed(), ("baseline", "finetuned"), stream, Console())
print("ended")
"""


@pytest.mark.parametrize(("key", "code"), [(b"\x04", 0), (b"\x03", -signal.SIGINT)], ids=["ctrl-d", "ctrl-c"])
def test_in_a_terminal_ctrl_d_ends_and_ctrl_c_interrupts(key: bytes, code: int) -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL], stdin=child, stdout=child, stderr=child, start_new_session=True,
        preexec_fn=terminal, env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    )  # fmt: skip
    os.close(child)
    out, end = b"", time.monotonic() + 300

    def until(text: bytes, times: int = 1) -> None:
        nonlocal out
        while out.count(text) < times:
            assert time.monotonic() < end, out
            if select.select([parent], [], [], 1)[0]:
                out += os.read(parent, 4096)

    until(b"> ")
    os.write(parent, b"Why?\n")
    until(b"> ", times=2)
    assert b"baseline answers Why?" in out
    assert b"finetuned answers Why?" in out
    while process.poll() is None:  # Python's prompt overlooks a key that arrives just before it waits: press it again
        assert time.monotonic() < end, out
        with suppress(OSError, subprocess.TimeoutExpired):
            os.write(parent, key)
            process.wait(timeout=1)
    assert process.returncode == code
    os.close(parent)


def terminal() -> None:
    """Make the pseudo-terminal the controlling one, so that Ctrl-C sends a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    interruptible()
