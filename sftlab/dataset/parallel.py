"""Apply a function to chunks of rows: a small dataset in this process, a large one in a process for each core."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from sftlab.errors import StageError
from sftlab.runtime.processes import die_with_parent

C = TypeVar("C")
R = TypeVar("R")

FEW = 4  # chunks that cost less than the start of processes

_apply: Callable[[Any], Any]  # in a worker process: the function that it applies


def in_order(function: Callable[[C], R], chunks: Iterable[C], few: int | None = None) -> Generator[R, None, None]:
    """Yield the result of a function for each chunk, in order.

    After the first ``few`` (``FEW``), chunks are computed in parallel: the function, the chunks and the results are
    pickled. Few chunks are in memory at a time.

    Raises:
        StageError: a process was killed.
    """
    remaining = iter(chunks)
    for chunk in islice(remaining, FEW if few is None else few):
        yield function(chunk)
    for chunk in remaining:
        yield from _parallel(function, chain([chunk], remaining))


def _parallel(function: Callable[[C], R], chunks: Iterable[C]) -> Iterator[R]:
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pending = deque[Future[R]]()
    # A forked process could hang on a lock that a thread of this one holds.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(function, os.getpid()))
    try:
        for chunk in chunks:
            pending.append(pool.submit(_work, chunk))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise StageError(
            "a process that reads or tokenises rows was killed, perhaps because memory ran out; free memory, and run "
            "the same command again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    global _apply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the workers
    die_with_parent()  # otherwise it waits for ever for work from a parent that was killed
    if os.getppid() != parent:
        sys.exit(1)
    _apply = function


def _work(chunk: Any) -> Any:
    return _apply(chunk)
