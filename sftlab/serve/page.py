"""``mode=page``: ask the base model and the fine-tuned model in the browser, side by side."""

from __future__ import annotations

import html
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.util import find_spec
from typing import Any

from sftlab.errors import ConfigError, Problem, shown
from sftlab.records import Message, text_of_turn
from sftlab.serve.client import RefusedError, Stream, growing
from sftlab.serve.server import free_port, in_use
from sftlab.serve.worker import HOST

EXAMPLES = 40  # questions of the test set
PER_PAGE = 5
AT_ONCE = 16  # questions of several browsers that are answered at the same time
CSS = (
    "#question textarea {font-size: 1rem} footer {display: none !important} "
    ".message-markdown-disabled .md {white-space: pre-wrap !important}"  # with the indentation of code
)
# Gradio copies a text as it was passed, with the entities of `_escaped`.
COPY = """() => {
  const plain = {"&lt;": "<", "&gt;": ">", "&amp;": "&", "&#32;": " ", "&#9;": "\\t"};
  const decoded = (text) => text.replace(/&(lt|gt|amp|#32|#9);/g, (name) => plain[name]);
  if (navigator.clipboard) navigator.clipboard.writeText = (text) =>
    Clipboard.prototype.writeText.call(navigator.clipboard, decoded(text));
}"""

Talk = dict[str, list[Message]]


def check(port: int) -> None:
    """Check that the page can be shown.

    Raises:
        ConfigError: Gradio is not installed, or the port is in use.
    """
    if find_spec("gradio") is None:
        remedy = "pip install --no-deps -r locks/page.lock, or set mode=chat"
        raise ConfigError(Problem("mode", "page", "requires the package gradio", remedy))
    if reason := in_use(port):
        remedy = f"stop the program that uses it, or set serve.page_port={free_port()}"
        raise ConfigError(Problem("serve.page_port", shown(port), f"cannot be used: {reason}", remedy))


def show(
    models: Sequence[str],
    stream: Stream,
    *,
    title: str,
    examples: Sequence[str],
    port: int,
    when_ready: Callable[[], None],
    until: Callable[[], bool],
) -> None:
    """Show the page until ``until()``."""
    # No usage statistics, no fonts of another server.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    page = build(models, stream, title=title, examples=examples)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        ssr_mode=False,
        theme=gradio.themes.Default(**fonts),
        css=CSS,
        js=COPY,
    )
    try:
        when_ready()
        while not until():
            time.sleep(0.2)
    finally:
        page.close(verbose=False)


def build(models: Sequence[str], stream: Stream, *, title: str, examples: Sequence[str]) -> Any:
    """Build the page: a conversation with each model, one box for the questions, and examples."""
    import gradio as gr

    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {title}")
        talk = gr.State({model: [] for model in models})
        with gr.Row():
            chats = [
                gr.Chatbot(
                    label=model,
                    buttons=["copy", "copy_all"],
                    render_markdown=False,  # the text as the model writes it
                    feedback_options=None,
                )
                for model in models
            ]
        question = gr.Textbox(label="Question to both models", lines=3, elem_id="question")
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            stop = gr.Button("Stop", elem_id="stop")
            clear = gr.Button("New conversation", elem_id="clear")
        if examples:
            gr.Examples(
                [[text] for text in examples[:EXAMPLES]],
                inputs=question,
                label="Questions of the test set",
                examples_per_page=PER_PAGE,
                cache_examples=False,
            )

        async def ask(text: str, talk: Talk) -> AsyncIterator[tuple[Any, ...]]:
            if not text.strip():
                yield gr.skip(), talk, *_shown(talk)
                return
            asked: Message = {"role": "user", "content": text.strip()}
            prompts = {model: [*turns, asked] for model, turns in talk.items()}
            yield "", talk, *_shown(prompts)  # the box is emptied once: the next question may be typed already
            try:
                async for answers in growing(prompts, stream):
                    grown: Talk = {
                        model: [*prompts[model], {"role": "assistant", "content": answer}]
                        for model, answer in answers.items()
                    }
                    yield gr.skip(), grown, *_shown(grown)
            except RefusedError as error:
                gr.Warning(f"{error}. Start a new conversation, or ask a shorter question", duration=None)
                yield text, talk, *_shown(talk)

        def reset() -> tuple[Any, ...]:
            empty: Talk = {model: [] for model in models}
            return empty, *_shown(empty)

        asking = gr.on(
            [send.click, question.submit],
            ask,
            [question, talk],
            [question, talk, *chats],
            concurrency_limit=AT_ONCE,
            show_progress="hidden",
            api_name="ask",
        )
        stop.click(None, None, None, cancels=[asking], api_name=False)
        for clearing in (clear.click, *(chat.clear for chat in chats)):
            clearing(reset, None, [talk, *chats], cancels=[asking], api_name=False)
    return page


def _shown(talk: Talk) -> list[list[dict[str, str]]]:
    """The turns of each conversation as Gradio expects them."""
    return [
        [{"role": turn["role"], "content": _escaped(text_of_turn(turn))} for turn in turns] for turns in talk.values()
    ]


def _escaped(text: str) -> str:
    """A text as HTML, which Gradio expects also without Markdown; indented by entities, since it removes spaces."""
    return re.sub(r"^ ", "&#32;", html.escape(text, quote=False).replace("\t", "&#9;"), flags=re.MULTILINE)
