"""Machines that train together learn from machine 0 whether there is anything to train, or fail with the reason."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from sftlab.errors import ConfigError, SftlabError, StageError
from sftlab.instance import meeting
from sftlab.instance.machine import Machine

SECONDS = 300.0  # longer than any of the waits below takes on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def machines() -> Callable[..., list[Machine]]:
    def make(count: int, seconds: float = SECONDS, host: str = "127.0.0.1") -> list[Machine]:
        endpoint = f"{host}:{free_port()}"
        return [
            Machine("cpu", "cpu", 1, "sdpa", "ddp", count, rank, endpoint, rdzv_timeout_min=seconds / 60)
            for rank in range(count)
        ]

    return make


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PAUSE", 0.02)


def meet(first: Machine, asking: list[Machine], train: bool = True, stages: tuple[str, ...] = ()) -> list[Any]:
    """Return what machine 0 and the others return or raise, in their order."""
    with ThreadPoolExecutor() as pool:
        stages = stages or ("stage",) * len(asking)
        others: list[Future[Any]] = [
            pool.submit(meeting.ask, machine, stage) for machine, stage in zip(asking, stages, strict=True)
        ]
        telling = pool.submit(meeting.tell, first, "stage", train=train)
        return [future.exception() or future.result() for future in (telling, *others)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("count", "host"), [(2, "127.0.0.1"), (4, "localhost")])
def test_all_machines_learn_whether_to_train(
    machines: Callable[..., list[Machine]], train: bool, count: int, host: str
) -> None:
    first, *others = machines(count, host=host)
    for _ in range(2):  # jobs of a sweep, one after the other
        assert meet(first, others, train) == [None, *[train] * (count - 1)]


def test_another_stage_is_refused_everywhere(machines: Callable[..., list[Machine]]) -> None:
    first, *others = machines(2)
    results = meet(first, others, stages=("another",))
    assert [type(error) for error in results] == [ConfigError] * 2
    assert "start the same command on each" in str(results[1])


class Clock:
    """The time that sftlab.instance.meeting reads; ``passed`` seconds are added to it."""

    passed = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


def test_a_missing_machine_is_named_to_the_others(
    machines: Callable[..., list[Machine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(meeting, "time", clock)
    first, *_ = machines(3)
    port = int(str(first.rdzv_endpoint).rpartition(":")[2])
    with ThreadPoolExecutor() as pool:
        telling = pool.submit(meeting.tell, first, "stage", train=True)
        with connected(port) as second:
            assert second.recv(100) == meeting.GREETING
            second.sendall(meeting.Request(machine=1, stage="stage").model_dump_json().encode() + b"\n")
            clock.passed = 2 * SECONDS
            with suppress(OSError):  # machine 0 reads the clock after each connection, or has read it already
                socket.create_connection(("127.0.0.1", port), timeout=10).close()
            assert "machine 2 did not connect" in second.makefile().read()
        with pytest.raises(StageError, match="machine 2 did not connect"):
            telling.result()


def connected(port: int) -> socket.socket:
    """A connection to machine 0, as soon as it listens."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_an_answer_at_the_end_of_the_wait_arrives(machines: Callable[..., list[Machine]]) -> None:
    """Machine 0 waits for the others until its timeout before it names the missing ones."""
    _, second, _ = machines(3, seconds=0.5)
    server = socket.create_server(("127.0.0.1", int(str(second.rdzv_endpoint).rpartition(":")[2])))

    def answers_late() -> None:
        with server:
            connection, _ = server.accept()
            with connection:
                connection.sendall(meeting.GREETING)
                connection.recv(100)
                time.sleep(1)
                with suppress(OSError):
                    connection.sendall(b'{"train": true, "error": "machine 2 did not connect"}\n')

    thread = threading.Thread(target=answers_late)
    thread.start()
    with pytest.raises(StageError, match="machine 2 did not connect"):
        meeting.ask(second, "stage")
    thread.join()


def test_a_missing_machine_is_only_warned_about_if_there_is_nothing_to_train(
    machines: Callable[..., list[Machine]], caplog: pytest.LogCaptureFixture
) -> None:
    meeting.tell(machines(2, seconds=0.2)[0], "stage", train=False)
    assert "machine 1 did not connect" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_without_an_answer_of_machine_0_the_others_fail(machines: Callable[..., list[Machine]], host: str) -> None:
    with pytest.raises(StageError, match="machine 0 did not answer") as caught:
        meeting.ask(machines(2, seconds=0.2, host=host)[1], "stage")
    assert "instance.node_rank=0" in str(caught.value)


def test_other_programs_at_the_port_are_ignored(machines: Callable[..., list[Machine]]) -> None:
    """A scanner connects to machine 0; and machine 1 first reaches another program, then machine 0."""
    first, second = machines(2)
    assert first.rdzv_endpoint is not None
    port = int(first.rdzv_endpoint.rpartition(":")[2])
    with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", port)) as before:
        answer = pool.submit(meeting.ask, second, "stage")
        before.accept()[0].close()
        before.close()
        telling = pool.submit(meeting.tell, first, "stage", train=True)
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"machine": 9}\n', b'{"machine": 1}\n'):
            while not telling.done():
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=10) as scanner:
                        scanner.sendall(garbage)
                    break
                except OSError:  # machine 0 does not listen yet, or no longer
                    time.sleep(0.01)
        assert answer.result() is True
        assert telling.result() is None


def test_a_port_in_use_is_named(machines: Callable[..., list[Machine]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PORT_SECONDS", 0.2)
    first, _ = machines(2)
    assert first.rdzv_endpoint is not None
    with (
        socket.create_server(("", int(first.rdzv_endpoint.rpartition(":")[2]))),
        pytest.raises(StageError, match="cannot be used: Address already in use; set a free port"),
    ):
        meeting.tell(first, "stage", train=True)


def test_the_wait_for_a_machine_0_that_dies_is_bounded(machines: Callable[..., list[Machine]]) -> None:
    _, second = machines(3, seconds=0.2)[:2]
    server = socket.create_server(("127.0.0.1", int(str(second.rdzv_endpoint).rpartition(":")[2])))

    def dies() -> None:
        with server:
            connection, _ = server.accept()
            connection.sendall(meeting.GREETING)
            connection.recv(100)
            connection.close()

    thread = threading.Thread(target=dies)
    thread.start()
    with pytest.raises(SftlabError, match="did not answer"):
        meeting.ask(second, "stage")
    thread.join()
