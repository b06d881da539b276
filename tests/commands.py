"""Command lines in processes of their own that start fast: each is forked off one that has the light modules.

The names of heavier ones, which only whole runs need, are this process's arguments.

A line of the input is a JSON object with ``folder``, ``arguments``, ``environment``, ``code``, ``names``, ``output``
and ``session``. The fork runs the code, which may put a fault somewhere, and ``sftlab.cli.main``; in ``output`` it
leaves out, err, and which of the modules ``names`` it has loaded. Its process id is answered at once. For the line
``{"wait": ID}`` the answers are its exit code and the CPU seconds that it took.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import logging
import os
import pickle
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

CONF = Path(__file__).parents[1] / "conf"
# Modules that most commands import; httpx2 is for the hub's library.
LIGHT = (
    "httpx2", "jinja2.sandbox", "sftlab.cli", "sftlab.work", "sftlab.hydra_app.arguments", "sftlab.hydra_app.finish",
    "sftlab.hydra_app.sweep", "sftlab.hydra_app.wording", "sftlab.validation.validate", "sftlab.instance.preflight",
)  # fmt: skip
LEFT_OUT = ("bitsandbytes", "wandb")
# Stages whose libraries the server has imported.
FORKED = (
    "sftlab.train.worker", "sftlab.train.trace", "sftlab.model.merge_worker", "sftlab.eval.worker",
    "sftlab.instance.precision_worker", "fsdp_on_cpu",
)  # fmt: skip
RANKS = "sftlab.runtime.ranks"
HANDLER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"


def parse_yaml_once() -> None:
    """Let OmegaConf parse each text once in this process and its forks."""
    from omegaconf import omegaconf

    parsed: dict[str, Any] = {}

    def load(file: Any, Loader: Any) -> Any:  # noqa: N803 – its name in PyYAML
        if isinstance(file, str):
            return yaml.load(file, Loader)
        text = file.read()
        if text not in parsed:
            file.seek(0)
            parsed[text] = yaml.load(file, Loader)
        return parsed[text]

    omegaconf.yaml = SimpleNamespace(**{**vars(yaml), "load": load})  # type: ignore[assignment]


def compose_once() -> None:
    """Let Hydra read and merge the files of conf/ once for the same options, in this process and its forks.

    Values of single keys are applied each time, and so are the files of any other folder. Each override is parsed once.
    """
    from hydra._internal import config_loader_impl as loader
    from hydra._internal.config_repository import ConfigRepository, IConfigRepository
    from hydra.core.default_element import ResultDefault
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

    create, merge = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list
    read, parse = ConfigRepository.load_config, OverridesParser.parse_rule
    lists: dict[Any, Any] = {}
    merged: dict[Any, bytes] = {}
    files: dict[str, bytes] = {}
    overrides: dict[tuple[str, str], bytes] = {}

    def has_own_files(repo: IConfigRepository) -> bool:
        return any(source.scheme() == "file" and Path(source.path) != CONF for source in repo.get_sources())

    def create_defaults_list(
        repo: IConfigRepository,
        config_name: str,
        overrides_list: list[Override],
        prepend_hydra: bool,
        skip_missing: bool,
    ) -> Any:
        fixed = [one for one in overrides_list if not one.is_sweep_override()]
        values = [one for one in fixed if isinstance(one.value(), dict) or not repo.group_exists(one.key_or_group)]
        choices = [one for one in fixed if one not in values]
        if has_own_files(repo):
            return create(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        key = config_name, prepend_hydra, skip_missing, *(one.input_line for one in choices)
        if key not in lists:
            lists[key] = create(repo, config_name, choices, prepend_hydra, skip_missing)
        return dataclasses.replace(lists[key], config_overrides=values)

    def compose(self: loader.ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> Any:
        if has_own_files(repo):
            return merge(self, defaults, repo)
        key = tuple((one.config_path, one.package, one.primary) for one in defaults)
        if key not in merged:
            merged[key] = pickle.dumps(merge(self, defaults, repo))
        return pickle.loads(merged[key])

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        if has_own_files(self):
            return read(self, config_path)
        if config_path not in files:
            files[config_path] = pickle.dumps(read(self, config_path))
        return pickle.loads(files[config_path])

    def parse_rule(self: OverridesParser, text: str, rule: str) -> Any:
        if (text, rule) not in overrides:
            overrides[text, rule] = pickle.dumps(parse(self, text, rule))
        return pickle.loads(overrides[text, rule])

    ConfigRepository.load_config = load_config  # type: ignore[method-assign]
    OverridesParser.parse_rule = parse_rule  # type: ignore[method-assign]
    loader.create_defaults_list = create_defaults_list
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = compose  # type: ignore[method-assign]


def serve() -> None:
    from hydra import compose, initialize_config_dir

    parse_yaml_once()
    compose_once()
    # As a training process that quantises nothing and reports nothing leaves them out.
    sys.modules.update(dict.fromkeys(LEFT_OUT))
    for name in (*LIGHT, *sys.argv[1:]):
        import_module(name)
    for name in LEFT_OUT:
        del sys.modules[name]
    from sftlab.validation import rows, validate

    with initialize_config_dir(str(CONF), version_base="1.3"):
        for choices in ([], ["model=tiny_random"], ["instance=cpu", "model=tiny_random"]):
            cfg = compose("config", overrides=choices)  # imports Hydra's plugins, and builds the tables of its parser
    validate.validate(cfg)  # renders the rows of the demo, which most commands read
    rows.CHECKED.clear()
    gc.freeze()  # what is imported by now is not looked through again in each fork
    seen: Counter[tuple[str, ...]] = Counter()
    for line in sys.stdin:
        case = json.loads(line)
        if "wait" in case:
            _, status, used = os.wait4(case["wait"], 0)
            print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
            continue
        choices = tuple(word for word in case["arguments"] if is_choice(word))
        seen[choices] += 1
        if seen[choices] == 2:  # merged here, it is merged for all further forks
            with suppress(Exception), initialize_config_dir(str(CONF), version_base="1.3"):
                compose("config", overrides=list(choices))
        child = os.fork()
        if child == 0:
            os._exit(run(case))
        print(child, flush=True)


def is_choice(word: str) -> bool:
    """Whether an override chooses one option of a group."""
    key, _, value = word.partition("=")
    group = key.lstrip("+").partition("@")[0]
    return bool(value) and "," not in value and (group.startswith("hydra/") or (CONF / group).is_dir())


class Forked(subprocess.Popen[bytes]):
    """A stage's process as a fork of the command's, which has imported its libraries already."""

    def __init__(self, command: list[str], env: dict[str, str], prepare: Callable[[], None]) -> None:
        self.args, self.returncode = command, None  # type: ignore[assignment]
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._sigint_wait_secs, self._waitpid_lock = True, 0.25, threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            arguments = command[command.index("-m") + 1 :]
            ctypes.CDLL(None).prctl(15, arguments[0].removeprefix("sftlab.").encode())  # PR_SET_NAME, for tests
            prepare()
            os._exit(stage(arguments, env))


def stage(arguments: list[str], env: dict[str, str]) -> int:
    """What ``python -m`` does with these arguments in a process without warnings, handlers and locks of its parent."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    logging.root.handlers.clear()
    warnings.simplefilter("ignore")
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(arguments)
    if arguments[0] == RANKS:
        handler = import_module(HANDLER).SubprocessHandler
        handler._popen = lambda self, command, env: Forked(command, env, as_rank)
    code = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def as_rank() -> None:
    """Leave the session and the sockets of the launcher, as a new process would."""
    os.setsid()
    os.closerange(3, 1024)


def start(command: list[str], env: dict[str, str], preexec_fn: Callable[[], None]) -> subprocess.Popen[bytes]:
    """Fork a stage's process if all libraries that it needs are imported; otherwise start it."""
    task = json.loads(Path(command[-1], "inputs.json").read_text("utf-8"))
    plain = command[-2] in FORKED
    method, optim = task.get("peft", {}).get("method"), task.get("train", {}).get("optim", "")
    quantised = method == "qlora" or any(word in optim for word in ("bit", "bnb", "paged", "ademamix"))
    if plain and not quantised and not task.get("tracker") and task.get("engine") != "vllm":
        return Forked(command, env, preexec_fn)
    return subprocess.Popen(command, env=env, preexec_fn=preexec_fn)


def run(case: dict[str, Any]) -> int:
    from sftlab.cli import main
    from sftlab.runtime import processes

    if "sftlab.train.trainer" in sys.modules:
        processes.subprocess = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore

    output = Path(case["output"])
    if case["session"]:
        os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update({"OMP_NUM_THREADS": "1", **case["environment"]})
    os.chdir(case["folder"])
    sys.argv = ["sftlab", *case["arguments"]]
    code = 1
    try:
        exec(case["code"], {"__name__": "fault"})
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    (output / "loaded").write_text(" ".join(sorted(set(case["names"]) & set(sys.modules))), "utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
