"""Ask a model behind an OpenAI-compatible endpoint. Answers are stored like those of an engine on this machine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from sftlab.config import ContenderConfig, EvalConfig
from sftlab.errors import StageError
from sftlab.eval.answers import FINISHED, SPEED, Answer, completed, retain
from sftlab.eval.prompts import Prompt, Prompts
from sftlab.eval.stage import Generated, finish, reusable
from sftlab.records import Example, text_of_turn
from sftlab.runtime.store import Store, write_json

log = logging.getLogger(__name__)

LOCAL = ("localhost", "127.0.0.1", "::1")


class UnreachableError(StageError):
    """An endpoint that refuses a request, does not answer after all retries, or answers without a completion."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint, the name of its model, and how requests are sent.

    ``api_key_env`` names the environment variable with the key; the key itself is in no file.
    """

    url: str
    model: str
    api_key_env: str | None
    concurrency: int
    timeout_s: float
    retries: int

    @classmethod
    def of(cls, cfg: ContenderConfig) -> Endpoint:
        """The endpoint of a contender."""
        assert cfg.url is not None
        assert cfg.model is not None
        return cls(cfg.url.rstrip("/"), cfg.model, cfg.api_key_env, cfg.concurrency, cfg.timeout_s, cfg.retries)


def inputs(endpoint: Endpoint, rows_key: str, cfg: EvalConfig, seed: int) -> Mapping[str, object]:
    """List what the answers depend on. A model that its host changes under the same name has the same key."""
    key = {
        "version": 2,
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "prompts": rows_key,
        "max_tokens": cfg.max_tokens,
        "temperature": cfg.temperature,
        "seed": seed if cfg.temperature else None,
    }
    return key if cfg.repeats == 1 else {**key, "repeats": cfg.repeats}


def make(
    store: Store, endpoint: Endpoint, rows: Sequence[Example], rows_key: str, cfg: EvalConfig, seed: int
) -> Generated:
    """Take the answers from the store, or ask for those that it lacks.

    Answers of a run that was killed, and to the same prompts in other test sets, are reused.

    Raises:
        UnreachableError: the endpoint refuses a request, does not answer, or answers without a completion.
    """
    prompts = Prompts([Prompt(row.id, written(row), [], row.choices) for row in rows], {})
    key = inputs(endpoint, rows_key, cfg, seed)

    def build(folder: Path) -> None:
        answers = reusable(store, key, prompts) | completed(folder)
        retain(folder, answers.values())
        missing = [
            (repeat, place)
            for repeat in range(cfg.repeats)
            for place in range(len(rows))
            if (repeat, place) not in answers
        ]
        begin = time.monotonic()
        if missing:
            asyncio.run(_ask(endpoint, rows, missing, folder, cfg, seed))
        asked = {(answer.repeat, answer.row): answer.tokens for answer in completed(folder).values()}
        speed = {"engines": 0, "tokens": sum(asked[one] for one in missing)}
        write_json(folder / SPEED, {**speed, "generate_seconds": round(time.monotonic() - begin, 1)})
        finish(folder, prompts, cfg)

    stage = store.stage("generations", key, build, resumable=True)
    (stage.path / FINISHED).unlink(missing_ok=True)
    return Generated(stage, stage.seconds)


def written(row: Example) -> str:
    """The prompt of a row as text: the endpoint applies a chat template of its own."""
    return "\n\n".join(f"{turn['role']}: {text_of_turn(turn)}" for turn in row.prompt)


async def _ask(
    endpoint: Endpoint,
    rows: Sequence[Example],
    missing: Sequence[tuple[int, int]],
    folder: Path,
    cfg: EvalConfig,
    seed: int,
) -> None:
    """Ask the questions, several at a time, and append each answer to the stage's folder when it arrives."""
    from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient
    from tqdm import tqdm

    for name in ("httpx", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log every request
    key = os.environ.get(endpoint.api_key_env or "", "") or "none"
    here = urlsplit(endpoint.url).hostname in LOCAL
    slots = asyncio.Semaphore(endpoint.concurrency)
    with (folder / FINISHED).open("a", encoding="utf-8") as file, tqdm(total=len(missing), unit="prompt") as bar:
        bar.set_description(f"asking {endpoint.model}")

        async def one(repeat: int, place: int) -> None:
            async with slots:
                answer = await _answer(client, endpoint, rows[place], repeat, place, cfg, seed)
            file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        async with AsyncOpenAI(
            base_url=endpoint.url,
            api_key=key,
            max_retries=endpoint.retries,
            timeout=endpoint.timeout_s,
            http_client=DefaultAsyncHttpxClient(trust_env=not here),  # proxies are not for this machine
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for repeat, place in missing:
                        group.create_task(one(repeat, place))
            except ExceptionGroup as errors:
                error = errors.exceptions[0]
                if isinstance(error, APIStatusError):
                    raise _unreachable(endpoint, key, f"refuses the request: {error}") from error
                if isinstance(error, APIConnectionError):
                    tried = f"{endpoint.retries + 1} tries of at most {endpoint.timeout_s:g} s"
                    raise _unreachable(endpoint, key, f"does not answer ({tried}): {error}") from error
                if isinstance(error, APIError):
                    raise _unreachable(endpoint, key, f"answers with an error: {error}") from error
                raise error from errors


async def _answer(
    client: Any, endpoint: Endpoint, row: Example, repeat: int, place: int, cfg: EvalConfig, seed: int
) -> Answer:
    tools = {"tools": row.tools} if row.tools else {}
    try:
        reply = await client.chat.completions.create(
            model=endpoint.model,
            messages=cast(Any, list(row.prompt)),
            max_tokens=cfg.max_tokens,
            temperature=cfg.temperature,
            seed=seed + repeat,
            **tools,
        )
        choice = reply.choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a page, or JSON without a completion
        message = f"{endpoint.model} at {endpoint.url} answers without a completion; check the URL (…/v1)"
        raise UnreachableError(message) from error
    reason = reason if reason in ("stop", "length") else "unknown"
    asked, written = (getattr(reply.usage, f"{of}_tokens", None) for of in ("prompt", "completion"))
    return Answer(repeat, place, text, reason, written or 0, prompt_tokens=asked)


def _unreachable(endpoint: Endpoint, key: str, reason: str) -> UnreachableError:
    """The error with the reason in one line, without the key."""
    text = " ".join(reason.split())
    if endpoint.api_key_env is not None and key != "none":
        text = text.replace(key, f"${endpoint.api_key_env}")
    return UnreachableError(f"{endpoint.model} at {endpoint.url} {text[:300]}")
