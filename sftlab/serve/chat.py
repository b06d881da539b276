"""``mode=chat``: ask the base model and the fine-tuned model in the terminal, side by side."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sftlab.records import Message
from sftlab.serve.client import RefusedError, Stream, growing

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

COMMANDS = "/reset starts a new conversation, /quit or Ctrl-D ends"
PROMPT = "> "


def converse(lines: Iterator[str], models: Sequence[str], stream: Stream, console: Console) -> None:
    """Ask every model each line, in a conversation of its own, until ``/quit`` or the last line."""
    turns: dict[str, list[Message]] = {model: [] for model in models}
    console.print(COMMANDS, style="dim", highlight=False)
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            turns = {model: [] for model in models}
            console.print("new conversation", style="dim")
        elif text.startswith("/"):
            console.print(f"{text.split()[0]}: no such command; {COMMANDS}", highlight=False, markup=False)
        elif text:
            asked: Message = {"role": "user", "content": text}
            prompts = {model: [*before, asked] for model, before in turns.items()}
            try:
                answers = asyncio.run(_answers(prompts, stream, console))
            except RefusedError as error:
                console.print(f"{error}; /reset starts a new conversation", highlight=False, markup=False)
                continue
            turns = {
                model: [*prompts[model], {"role": "assistant", "content": answer}] for model, answer in answers.items()
            }


def typed() -> Iterator[str]:
    """Yield the lines of standard input until its end; on a terminal with a prompt and a history."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 – gives `input` its history and editing keys
    while True:
        try:
            yield input(PROMPT if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return


async def _answers(prompts: dict[str, list[Message]], stream: Stream, console: Console) -> dict[str, str]:
    """Stream the answers of all models at once. On a terminal they are shown while they grow."""
    from rich.live import Live

    answers: dict[str, str] = {}
    with Live(console=console, transient=True, auto_refresh=False, vertical_overflow="ellipsis") as live:
        async for answers in growing(prompts, stream):
            if console.is_terminal:
                live.update(_table(answers, console.width), refresh=True)
    if console.is_terminal:
        console.print(_table(answers, console.width))
    else:
        for model, text in answers.items():
            console.print(f"{model}: {text}", highlight=False, markup=False, soft_wrap=True)
    return answers


def _table(answers: dict[str, str], width: int) -> RenderableType:
    """The answers side by side; one below the other in a narrow terminal."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    panels = [Panel(Text(text), title=model, title_align="left") for model, text in answers.items()]
    table = Table.grid(expand=True)
    if width < 60:
        table.add_column()
        for panel in panels:
            table.add_row(panel)
    else:
        for _ in panels:
            table.add_column(ratio=1)
        table.add_row(*panels)
    return table
