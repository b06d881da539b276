"""Let machines that train together agree whether there is anything to train, before torch's own rendezvous.

Only machine 0 has the store, in which a training may be cached or shared with another job. Without this exchange the
other machines would wait for ranks that never start. Both sides send one line of JSON to the port of
``instance.rdzv_endpoint``, which is free again before torch uses it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from pydantic import BaseModel

from sftlab.errors import ConfigError, Problem, StageError
from sftlab.instance.machine import Machine

log = logging.getLogger(__name__)

GREETING = b"sftlab\n"  # torch's store of an earlier job may still listen at the port, and does not speak first
PORT_SECONDS, ANSWER_SECONDS, PAUSE = 30.0, 10.0, 0.3
DIFFERENT = Problem(
    "instance.nnodes",
    None,
    "the machines have different rows, settings or libraries",
    "start the same command on each, with the same data, and change only instance.node_rank",
)


class Request(BaseModel):
    """What a machine sends: its instance.node_rank, and the key of the stage that it would train."""

    machine: int
    stage: str


class Answer(BaseModel):
    """What machine 0 answers: whether to train, or why nothing is trained."""

    train: bool
    error: str | None = None


def tell(machine: Machine, stage: str, *, train: bool) -> None:
    """On machine 0: wait for the other machines, and answer whether they have to ``train`` this stage.

    Raises:
        StageError: a machine did not connect in time, and there is something to train.
        ConfigError: a machine would train another stage.
    """
    others = set(range(1, machine.nnodes))
    log.info("train: waiting for the other machines (%d) at %s", len(others), machine.rdzv_endpoint)
    connections: dict[int, socket.socket] = {}
    error = None
    deadline = time.monotonic() + 60 * machine.rdzv_timeout_min
    with _server(machine) as server, ExitStack() as opened:
        while set(connections) != others and error is None and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            # Anybody can connect to the port; what is not a request of ours is dropped.
            with suppress(OSError, ValueError):
                connection = opened.enter_context(server.accept()[0])
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(GREETING)
                request = Request.model_validate_json(_line(connection))
                if request.machine in others:
                    connections[request.machine] = connection
                    error = None if request.stage == stage else str(DIFFERENT)
        missing = ", ".join(map(str, sorted(others - set(connections))))
        if missing and error is None and train:
            error = (
                f"instance.nnodes={machine.nnodes}: machine {missing} did not connect to {machine.rdzv_endpoint} "
                f"within {machine.rdzv_timeout_min:g} minutes; start the same command on every machine, each with its "
                "own instance.node_rank, or set a longer instance.rdzv_timeout_min"
            )
        answer = Answer(train=train, error=error).model_dump_json(exclude_none=True).encode()
        for connection in connections.values():
            with suppress(OSError):
                connection.sendall(answer + b"\n")
    _raise(error)
    if missing:
        log.warning(
            "train: nothing to train, and machine %s did not connect within %g minutes (instance.rdzv_timeout_min) to "
            "receive this",
            missing,
            machine.rdzv_timeout_min,
        )


def ask(machine: Machine, stage: str) -> bool:
    """On the other machines: ask machine 0 whether there is anything to train.

    Raises:
        StageError: machine 0 did not answer in time, or another machine is missing.
        ConfigError: machine 0 would train another stage.
    """
    log.info("train: waiting for machine 0 at %s", machine.rdzv_endpoint)
    deadline = time.monotonic() + 60 * machine.rdzv_timeout_min
    reason = "nothing answers there"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(_address(machine), timeout=ANSWER_SECONDS) as connection:
                if _line(connection) != GREETING:
                    raise OSError("something else answers there")
                request = Request(machine=machine.node_rank, stage=stage)
                connection.sendall(request.model_dump_json().encode() + b"\n")
                # Machine 0 waits this long for the others before it answers; add the time of its last read.
                connection.settimeout(60 * machine.rdzv_timeout_min + 2 * ANSWER_SECONDS)
                answer = Answer.model_validate_json(_line(connection))
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0] or reason
            time.sleep(PAUSE)
            continue
        _raise(answer.error)
        return answer.train
    raise StageError(
        f"instance.rdzv_endpoint={machine.rdzv_endpoint}: machine 0 did not answer within "
        f"{machine.rdzv_timeout_min:g} minutes ({reason}); start the same command there with instance.node_rank=0, "
        "check that this machine can connect to it, or set a longer instance.rdzv_timeout_min"
    )


def _raise(error: str | None) -> None:
    if error == str(DIFFERENT):
        raise ConfigError(DIFFERENT)
    if error is not None:
        raise StageError(error)


def _address(machine: Machine) -> tuple[str, int]:
    assert machine.rdzv_endpoint is not None
    host, _, port = machine.rdzv_endpoint.rpartition(":")
    return host.strip("[]"), int(port)


@contextmanager
def _server(machine: Machine) -> Iterator[socket.socket]:
    """Listen at the port. A training that has just ended may still hold it for some seconds.

    Raises:
        StageError: the port cannot be used.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    deadline = time.monotonic() + PORT_SECONDS
    port = _address(machine)[1]
    while True:
        try:
            server = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise StageError(
                    f"instance.rdzv_endpoint={machine.rdzv_endpoint}: port {port} of machine 0 cannot be used: "
                    f"{os.strerror(error.errno or 0)}; set a free port in instance.rdzv_endpoint on every machine"
                ) from error
            time.sleep(PAUSE)
    with server:
        yield server


def _line(connection: socket.socket) -> bytes:
    """Read a line of at most 4 KiB.

    Raises:
        OSError: the other end closed the connection.
    """
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        if not (more := connection.recv(1024)):
            raise OSError("the connection was closed")
        text += more
    return text
