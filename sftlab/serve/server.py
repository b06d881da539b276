"""Start vLLM's OpenAI-compatible server with the base model and the fine-tuned model of a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem, StageError, shown
from sftlab.instance import machine as instance
from sftlab.instance.machine import Machine
from sftlab.model.base import reads_images
from sftlab.model.finished import Finished, lora_rank
from sftlab.runtime.processes import Child, children
from sftlab.serve.worker import HOST, ServeTask, is_ready

BASELINE, FINETUNED = "baseline", "finetuned"  # names of the models, as in the folder predictions/


@dataclass(frozen=True)
class Server:
    """A server: its port, the names of its models, and the arguments of ``vllm serve`` about the models."""

    port: int
    names: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def url(self) -> str:
        """The base URL of OpenAI clients."""
        return f"http://{HOST}:{self.port}/v1"


def servers(finished: Finished, port: int, *, adapter: bool) -> list[Server]:
    """Plan the servers of a run: one for base model and adapter, or else one for each model.

    The second one has the next port. With ``adapter=False`` the merged model is always served.
    """
    base, merged = str(finished.base.path.resolve()), str(finished.merged)
    rank = lora_rank(finished.adapter, finished.base.path) if adapter and finished.adapter is not None else None
    if rank is not None:
        lora = ("--enable-lora", "--max-lora-rank", str(rank))
        modules = ("--lora-modules", f"{FINETUNED}={finished.adapter}")
        return [Server(port, (BASELINE, FINETUNED), (base, "--served-model-name", BASELINE, *lora, *modules))]
    models = {BASELINE: base, FINETUNED: merged}
    return [
        Server(port + place, (name,), (path, "--served-model-name", name))
        for place, (name, path) in enumerate(models.items())
    ]


def check_ports(planned: list[Server]) -> None:
    """Refuse a port on which another program listens.

    Raises:
        ConfigError: a port is in use.
    """
    for server in planned:
        if reason := in_use(server.port):
            second = "" if server is planned[0] else f", which {server.names[0]} needs,"
            message = f"port {server.port}{second} cannot be used: {reason}"
            remedy = f"stop the program that uses it, or set serve.port={free_port()}"
            raise ConfigError(Problem("serve.port", shown(planned[0].port), message, remedy))


def in_use(port: int) -> str | None:
    """Return why no server can listen on a port; None if one can."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
        try:
            listener.bind((HOST, port))
        except OSError as error:
            return error.strerror
    return None


def free_port() -> int:
    """Return a port that is free, and whose next port is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind((HOST, 0))
            port: int = first.getsockname()[1]
            try:
                second.bind((HOST, port + 1))
            except OSError:
                continue
            return port


@contextmanager
def background(finished: Finished, planned: list[Server], cfg: Config) -> Iterator[Callable[[], bool]]:
    """Serve while the block runs, which starts when all servers answer; yield whether the servers have ended.

    Raises:
        StageError: a server failed, or the block raised it.
    """
    ready, stop = Event(), Event()
    # A thread that lives as long as the servers: the kernel ends a process with the thread that started it.
    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(run, finished, planned, cfg, ready.set, stop.is_set)
        try:
            while not ready.wait(timeout=0.2):
                if serving.done():
                    serving.result()
            yield serving.done
        except StageError as error:
            stop.set()
            raise serving.exception() or error from None  # the cause, if a server has failed
        finally:
            stop.set()


def run(
    finished: Finished,
    planned: list[Server],
    cfg: Config,
    when_ready: Callable[[], None],
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until a signal, or until ``until()``. ``when_ready`` is called once, when all servers answer.

    Raises:
        StageError: a server failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all servers have ended.
    """
    machine = instance.find(cfg.instance)
    environments = machine.engines(cfg.eval.tensor_parallel_size)
    shared = len(planned) > len(environments) or machine.device == "cpu"
    memory = cfg.eval.gpu_memory_utilization / (len(planned) if shared else 1)
    system_prompt = finished.system_prompt()
    waiting = [server.port for server in planned]

    def watch(running: Collection[Path]) -> None:
        while waiting and is_ready(waiting[0]):
            del waiting[0]
            if not waiting:
                when_ready()
        if until():
            raise _StoppedError

    with TemporaryDirectory(prefix="sftlab-") as temporary:
        tasks = []
        for place, server in enumerate(planned):
            folder = Path(temporary, str(server.port))
            folder.mkdir()
            task = ServeTask(
                arguments=[*server.arguments, *_options(finished, server, cfg, machine, memory)],
                base=finished.base,
                merged=finished.merged,
                system_prompt=system_prompt,
                temperature=finished.generation.temperature,
                after=planned[place - 1].port if place else None,
            )
            tasks.append(Child(folder, task, _environment(environments[place % len(environments)], machine, cfg)))
        with suppress(_StoppedError):
            children("sftlab.serve.worker", tasks, watch=watch)


class _StoppedError(Exception):
    """What ends the servers when they are not needed any more."""


def _environment(devices: Mapping[str, str], machine: Machine, cfg: Config) -> dict[str, str]:
    """The environment of a server, which variables of the user override."""
    variables = {"TORCH_LOGS": "-torch._library.triton"}  # it warns on the CPU that Triton is missing
    if machine.device == "cpu":
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(cfg.eval.kv_cache_gib)))
    return {**{name: value for name, value in variables.items() if name not in os.environ}, **devices}


def _options(finished: Finished, server: Server, cfg: Config, machine: Machine, memory: float) -> list[str]:
    """The options of ``vllm serve`` that do not depend on which models are served."""
    options = ["--host", HOST, "--port", str(server.port), "--dtype", finished.generation.dtype]
    options += ["--max-model-len", "auto"]  # the model's context, or less if the cache is too small for it
    # Contents as in training rows: text, not lists of parts.
    options += ["--chat-template-content-format", "string"]
    options += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "error", "--disable-log-stats"]
    options += ["--no-use-tqdm-on-load"]
    options += ["--tensor-parallel-size", str(cfg.eval.tensor_parallel_size)]
    if machine.device == "cpu":
        options += ["--enforce-eager"]  # compilation needs a C compiler, which a CPU machine may not have
    else:
        options += ["--gpu-memory-utilization", f"{memory:g}"]
    if finished.base.trust_remote_code:
        options += ["--trust-remote-code"]
    if reads_images(finished.base.path):
        options += ["--language-model-only"]
    return options
