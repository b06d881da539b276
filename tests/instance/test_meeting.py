"""Machines that train together hear from machine 0 whether there is anything to train, or end with the reason."""

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


class Clock:
    """The time as sftlab.instance.meeting sees it; ``passed`` is added to it."""

    passed = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


def meet(told: Machine, asking: list[Machine], train: bool = True, stages: tuple[str, ...] = ()) -> list[Any]:
    """What machine 0 and the others return or raise, in their order."""
    with ThreadPoolExecutor() as pool:
        stages = stages or ("stage",) * len(asking)
        others: list[Future[Any]] = [
            pool.submit(meeting.ask, machine, stage) for machine, stage in zip(asking, stages, strict=True)
        ]
        first = pool.submit(meeting.tell, told, "stage", train=train)
        return [future.exception() or future.result() for future in (first, *others)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("count", "host"), [(2, "127.0.0.1"), (4, "localhost")])
def test_all_machines_hear_whether_to_train(
    machines: Callable[..., list[Machine]], train: bool, count: int, host: str
) -> None:
    first, *others = machines(count, host=host)
    for _ in range(2):  # of a sweep's jobs, one after the other
        assert meet(first, others, train) == [None, *[train] * (count - 1)]


def test_another_stage_is_refused_everywhere(machines: Callable[..., list[Machine]]) -> None:
    first, *others = machines(2)
    found = meet(first, others, stages=("another",))
    assert [type(error) for error in found] == [ConfigError] * 2
    assert "start the same command on each" in str(found[1])


def test_a_machine_that_never_comes_is_named_to_the_others(machines: Callable[..., list[Machine]]) -> None:
    first, second, _ = machines(3, seconds=3)
    start = time.monotonic()
    found = meet(first, [second])
    assert time.monotonic() - start < 20
    assert [type(error) for error in found] == [StageError] * 2
    assert all("machine 2 did not come" in str(error) for error in found)


def test_an_answer_that_machine_0_gives_after_its_last_second_is_heard(machines: Callable[..., list[Machine]]) -> None:
    """Machine 0 waits for the others to the end, and only then tells those that came who is missing."""
    _, second, _ = machines(3, seconds=5)

    def answers_late() -> None:
        with socket.create_server(("127.0.0.1", int(str(second.rdzv_endpoint).rpartition(":")[2]))) as server:
            connection, _ = server.accept()
            with connection:
                connection.sendall(meeting.GREETING)
                connection.recv(100)
                time.sleep(5.5)
                with suppress(OSError):
                    connection.sendall(b'{"train": true, "error": "machine 2 did not come"}\n')

    thread = threading.Thread(target=answers_late)
    thread.start()
    with pytest.raises(StageError, match="machine 2 did not come"):
        meeting.ask(second, "stage")
    thread.join()


def test_nobody_is_needed_where_there_is_nothing_to_train(
    machines: Callable[..., list[Machine]], caplog: pytest.LogCaptureFixture
) -> None:
    meeting.tell(machines(2, seconds=0.5)[0], "stage", train=False)
    assert "machine 1 did not come" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_machine_0_that_never_answers_ends_the_others(machines: Callable[..., list[Machine]], host: str) -> None:
    with pytest.raises(StageError, match="machine 0 did not answer") as told:
        meeting.ask(machines(2, seconds=0.5, host=host)[1], "stage")
    assert "instance.node_rank=0" in str(told.value)


def test_others_at_the_port_do_not_disturb(machines: Callable[..., list[Machine]]) -> None:
    """A scanner at machine 0; and for machine 1 first something else that listens there, and then machine 0."""
    first, second = machines(2)
    assert first.rdzv_endpoint is not None
    port = int(first.rdzv_endpoint.rpartition(":")[2])
    with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", port)) as before:
        answer = pool.submit(meeting.ask, second, "stage")
        before.accept()[0].close()
        before.close()
        told = pool.submit(meeting.tell, first, "stage", train=True)
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"machine": 9}\n', b'{"machine": 1}\n'):
            while not told.done():
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as scanner:
                        scanner.sendall(garbage)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        assert answer.result() is True
        assert told.result() is None


def test_a_port_in_use_is_named(machines: Callable[..., list[Machine]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PORT_SECONDS", 0.2)
    first, _ = machines(2)
    assert first.rdzv_endpoint is not None
    with (
        socket.create_server(("", int(first.rdzv_endpoint.rpartition(":")[2]))),
        pytest.raises(StageError, match="cannot be used: Address already in use; set a free port"),
    ):
        meeting.tell(first, "stage", train=True)


def test_machine_0_that_dies_while_others_wait_is_a_bounded_wait(machines: Callable[..., list[Machine]]) -> None:
    _, second = machines(3, seconds=0.5)[:2]
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
