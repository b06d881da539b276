"""Ask the served models, as any OpenAI client does, and stream their answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, cast

from sftlab.errors import StageError
from sftlab.records import Message

Stream = Callable[[str, Sequence[Message]], AsyncIterator[str]]
"""Takes the name of a model and the turns of a conversation; yields its answer in parts."""


class RefusedError(StageError):
    """A request that the server refuses, such as one with a prompt longer than the context."""


def streaming(urls: Mapping[str, str], max_tokens: int) -> Stream:
    """Return a function that asks the servers at ``urls``, by name of the model, for at most ``max_tokens`` tokens.

    It raises a RefusedError if the server refuses the request, and a StageError if the server cannot be reached.
    """
    for name in ("httpx", "httpx2", "openai"):  # they log each request
        logging.getLogger(name).setLevel(logging.WARNING)
    from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient

    async def stream(model: str, turns: Sequence[Message]) -> AsyncIterator[str]:
        # One client per answer: a client belongs to one event loop. Proxies are not for this machine.
        http = DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(base_url=urls[model], api_key="none", max_retries=0, http_client=http) as client:
            try:
                messages = cast(Any, list(turns))
                answer = await client.chat.completions.create(
                    model=model, messages=messages, max_tokens=max_tokens, stream=True
                )
                async for part in answer:
                    if part.choices and (text := part.choices[0].delta.content):
                        yield text
            except APIStatusError as error:
                body = error.body if isinstance(error.body, dict) else {}
                raise RefusedError(f"{model}: {body.get('message', error.message)}") from error
            except APIConnectionError as error:
                raise StageError(f"{model}: the server at {urls[model]} does not answer") from error

    return stream


async def growing(prompts: Mapping[str, Sequence[Message]], stream: Stream) -> AsyncIterator[dict[str, str]]:
    """Ask all models at once, and yield their answers while they grow, at most ten times per second.

    If the caller stops, so do the models.
    """
    answers = dict.fromkeys(prompts, "")

    async def read(model: str) -> None:
        async for part in stream(model, prompts[model]):
            answers[model] += part

    tasks = [asyncio.create_task(read(model)) for model in prompts]
    pending, shown = set(tasks), dict(answers)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if answers != shown:
                shown = dict(answers)
                yield shown
        yield dict(answers)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
