"""Rendezvous of several machines before training: machine 0 announces whether there is anything to train.

Only machine 0 knows it, by its store: a training may be cached, or copied from another job. Without this the others
would wait for ranks that never start. The port is that of ``instance.rdzv_endpoint``; it is free again before
torch's own rendezvous takes it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from sftlab.errors import ConfigError, StageError
from sftlab.instance.machine import Machine

log = logging.getLogger(__name__)

GREETING = b"sftlab\n"  # torch's store, which may still be at the port after an earlier job, does not speak first
PORT_SECONDS, ANSWER_SECONDS, PAUSE = 30.0, 10.0, 0.3
DIFFERENT = (
    "instance.nnodes: the machines were given different rows, settings or libraries; start the same command on each, "
    "with the same data, and only instance.node_rank different"
)


def tell(machine: Machine, stage: str, *, train: bool) -> None:
    """On machine 0: wait for the other machines, and answer whether they have to ``train`` this stage.

    Raises:
        StageError: one of them did not come in time, and there is something to train.
        ConfigError: one of them would train another stage.
    """
    others = set(range(1, machine.nnodes))
    deadline = time.monotonic() + 60 * machine.rdzv_timeout_min
    log.info("train: waiting for the other machines (%d) at %s", len(others), machine.rdzv_endpoint)
    came: dict[int, socket.socket] = {}
    answer: dict[str, Any] = {"train": train}
    with _server(machine) as server, ExitStack() as open_connections:
        while set(came) != others and "error" not in answer and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            # The port is open to anybody; what is not ours is dropped.
            with suppress(OSError, ValueError, LookupError, TypeError):
                connection = open_connections.enter_context(server.accept()[0])
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(GREETING)
                asked = json.loads(_line(connection))
                number, theirs = asked["machine"], asked["stage"]
                if number in others:
                    came[number] = connection
                    if theirs != stage:
                        answer["error"] = DIFFERENT
        missing = ", ".join(map(str, sorted(others - set(came))))
        if missing and "error" not in answer and train:
            answer["error"] = (
                f"instance.nnodes={machine.nnodes}: machine {missing} did not come to {machine.rdzv_endpoint} within "
                f"{machine.rdzv_timeout_min:g} minutes; start the same command on every machine, each with its own "
                "instance.node_rank, or give them more time by instance.rdzv_timeout_min"
            )
        for connection in came.values():
            with suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
    if answer.get("error") == DIFFERENT:
        raise ConfigError(DIFFERENT)
    if "error" in answer:
        raise StageError(answer["error"])
    if missing:
        log.warning(
            "train: there is nothing to train, and machine %s did not come to hear it within %g minutes "
            "(instance.rdzv_timeout_min)", missing, machine.rdzv_timeout_min,
        )  # fmt: skip


def ask(machine: Machine, stage: str) -> bool:
    """On the other machines: whether there is anything to train, by machine 0.

    Raises:
        StageError: machine 0 did not answer in time, or does not get all machines together.
        ConfigError: it would train another stage.
    """
    log.info("train: waiting for machine 0 at %s", machine.rdzv_endpoint)
    deadline = time.monotonic() + 60 * machine.rdzv_timeout_min
    reason = "nothing answers there"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(_address(machine), timeout=ANSWER_SECONDS) as connection:
                if _line(connection) != GREETING:
                    raise OSError("something else answers there")
                request = {"machine": machine.node_rank, "stage": stage}
                connection.sendall(json.dumps(request).encode() + b"\n")
                # Machine 0 waits this long for the others, and then answers: not before its last read has ended.
                connection.settimeout(60 * machine.rdzv_timeout_min + 2 * ANSWER_SECONDS)
                answer = json.loads(_line(connection))
        except (OSError, ValueError) as error:
            reason = str(error) or reason
            time.sleep(PAUSE)
            continue
        if answer.get("error") == DIFFERENT:
            raise ConfigError(DIFFERENT)
        if "error" in answer:
            raise StageError(answer["error"])
        return bool(answer["train"])
    raise StageError(
        f"instance.rdzv_endpoint={machine.rdzv_endpoint}: machine 0 did not answer within "
        f"{machine.rdzv_timeout_min:g} minutes ({reason}); start the same command there with instance.node_rank=0, "
        "check that this machine reaches it, or give it more time by instance.rdzv_timeout_min"
    )


def _address(machine: Machine) -> tuple[str, int]:
    assert machine.rdzv_endpoint is not None
    host, _, port = machine.rdzv_endpoint.rpartition(":")
    return host.strip("[]"), int(port)


@contextmanager
def _server(machine: Machine) -> Iterator[socket.socket]:
    """Listen at the port, once what had it before (a training that has just ended) has given it up."""
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
                    f"{os.strerror(error.errno or 0)}; set a free port on every machine"
                ) from error
            time.sleep(PAUSE)
    with server:
        yield server


def _line(connection: socket.socket) -> bytes:
    """A line of at most a few hundred bytes.

    Raises:
        OSError: the other end closed the connection, or says too much.
    """
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        if not (more := connection.recv(1024)):
            raise OSError("the connection was closed")
        text += more
    return text
