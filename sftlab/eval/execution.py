"""Judge SQL statements by executing them: the parent of ``sql_worker.py``."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Literal, NamedTuple, Self

from sftlab.config import SqlConfig

GRACE = 5  # seconds beyond the limit of a statement after which the child is ended: some functions do not stop

Outcome = Literal["equal", "different", "failed", "unknown", "known"]


class Execution(NamedTuple):
    """What executing an answer showed; ``reason`` is why it failed, or why no result of the target decides."""

    outcome: Outcome
    reason: str


class Executor:
    """A child process that executes statements one after another. It is started anew if one of them ends it."""

    def __init__(self, cfg: SqlConfig) -> None:
        self.cfg = cfg
        self._child: subprocess.Popen[bytes] | None = None
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def execute(self, setup: str, targets: Sequence[str], answer: str | None) -> Execution:
        """Compare an answer with the targets of a row; without an answer, return whether a target's result decides."""
        limits = {"seconds": self.cfg.seconds, "rows": self.cfg.rows, "dialect": self.cfg.dialect}
        request = json.dumps({"setup": setup, "targets": targets, "answer": answer, **limits})
        child = self._started()
        assert child.stdin is not None
        answering = False
        try:
            child.stdin.write(request.encode() + b"\n")
            child.stdin.flush()
            while line := self._line(child, self.cfg.seconds * (1 if answering else 1 + len(targets)) + GRACE):
                reply = json.loads(line)
                if "answering" not in reply:
                    return Execution(reply["outcome"], reply["reason"])
                answering = True
        except (BrokenPipeError, TimeoutError):
            pass
        self._end()
        if answering:
            return Execution("failed", "the statement does not end, or ended the process that executes it")
        return Execution("unknown", "the target or the tables do not end, or ended the process that executes them")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            # -P: the folder of the script is not searched for modules.
            command = [sys.executable, "-P", str(Path(__file__).with_name("sql_worker.py"))]
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        return self._child

    def _line(self, child: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line of the child; nothing if it has ended.

        Raises:
            TimeoutError: it has written no line in time.
        """
        assert child.stdout is not None
        end = monotonic() + seconds
        while b"\n" not in self._read:
            if not select.select([child.stdout], [], [], max(0.0, end - monotonic()))[0]:
                raise TimeoutError
            if not (part := os.read(child.stdout.fileno(), 1 << 16)):
                return b""
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _end(self) -> None:
        if self._child is not None:
            for stream in (self._child.stdin, self._child.stdout):
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()
            self._child.kill()
            self._child.wait()
            self._child, self._read = None, b""
