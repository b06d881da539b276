"""Conversations with several assistant turns: what is supervised, and the same tokens in training and evaluation."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEMPLATE, training, write_model
from test_preview import run

from sftlab.dataset import tokenize as stage
from sftlab.dataset.arrow_examples import batch_of, reorder, text_of, write
from sftlab.dataset.prompt import Tokens, prompt_tokens, tokenize, tokenize_all
from sftlab.dataset.thinking import without_thinking
from sftlab.dataset.token_rows import read_rows
from sftlab.errors import ConfigError
from sftlab.model.base import Base
from sftlab.records import IGNORED, Example, Message, Tool, ToolCall
from sftlab.report.preview import statistics
from sftlab.runtime.store import Store

# The templates of common models, and of each a variant with {% generation %}, come with TRL.
TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # type: ignore[index,union-attr]
PATTERN = re.compile(r"<\|?[a-zA-Z_/]+\|?>|\[/?[A-Z_]+\]|<｜[^｜]+｜>")

CALL: ToolCall = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"city": "Bern", "days": 3}},
}
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city."},
                "days": {"type": "integer", "description": "Days from now."},
            },
            "required": ["city"],
        },
    },
}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> Message:
    return Message(role="assistant", content=text, **fields)


PLAIN = [user("One?"), assistant("First."), user("Two?"), assistant("Second."), user("Three?"), assistant("Third.")]
THOUGHTS = [
    *(user("One?"), assistant("<think>\nHm.\n</think>\n\nFirst.")),
    *(user("Two?"), assistant("<think>\nSo.\n</think>\n\nSecond.")),
]
CALLS: list[Message] = [
    *(user("Weather?"), assistant(None, tool_calls=[CALL])),
    {"role": "tool", "content": "Sunny, 21.", "tool_call_id": "abcdef123", "name": "look_up"},
    *(assistant("It is sunny."), user("Thanks!"), assistant("Welcome.")),
]
CONVERSATIONS = {"plain": PLAIN, "thoughts": THOUGHTS, "calls": CALLS}


def example(messages: list[Message] = PLAIN, name: str = "r0") -> Example:
    return Example(name, messages, "A", tools=[TOOL] if messages is CALLS else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@cache
def load(folder: Path, template: str) -> Any:
    result = Base("tiny", folder, "identity", False, template).tokenizer()
    result.add_tokens(sorted(set(PATTERN.findall(template))), special_tokens=True)
    result.eos_token = "</s>"
    return result


@pytest.fixture
def of_trl(folder: Path) -> Callable[[str], Any]:
    return lambda name: load(folder, (TEMPLATES / f"{name}.jinja").read_text("utf-8"))


def supervised(tokenizer: Any, tokens: Tokens) -> list[str]:
    """The text of each run of supervised tokens."""
    texts, run_of = list[str](), list[int]()
    for label in [*tokens.labels, IGNORED]:
        run_of += [label] if label != IGNORED else []
        if label == IGNORED and run_of:
            texts.append(tokenizer.decode(run_of))
            run_of = []
    return texts


# — what is supervised —


def test_every_assistant_turn_to_its_end_mark_or_the_last_one(folder: Path) -> None:
    tokenizer = load(folder, TEMPLATE)
    [every] = tokenize(tokenizer, example())
    [last] = tokenize(tokenizer, example(), "last")
    assert supervised(tokenizer, every) == ["First.</s>", "Second.</s>", "Third.</s>"]
    assert supervised(tokenizer, last) == ["Third.</s>"]
    assert every.ids == last.ids
    assert tokenizer.decode(every.ids) == (
        "<s><user>One?</s><assistant>First.</s><user>Two?</s><assistant>Second.</s><user>Three?</s><assistant>Third.</s>"
    )


WITH_GENERATION = [
    *("cohere_training", "cohere2_training", "gemma_training", "gemma3_training", "glm4moe_training"),
    *("lfm2_v2_training", "llama3_training", "phi3_training", "phi3_5_training", "qwen2_5_training"),
    *("qwen3_training", "qwen3_instruct_2507_training", "qwen3_5_think_training", "qwen3_8_training"),
]


@pytest.mark.parametrize("name", WITH_GENERATION)
def test_the_mask_is_that_of_generation_blocks(of_trl: Callable[[str], Any], name: str) -> None:
    """Some blocks begin within the header of the turn, which a model is given and does not write."""
    tokenizer = of_trl(name)
    compared = 0
    for messages in CONVERSATIONS.values():
        try:
            rows = tokenize(tokenizer, example(messages))
        except ConfigError:  # a template without tools, or with another layout of thoughts
            continue
        if len(rows) == 1:
            compared += 1
            masked = tokenizer.apply_chat_template(
                [turn | {"content": turn["content"] or ""} for turn in messages],
                tools=[TOOL] if messages is CALLS else None,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            blocks = [token for token, mask in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if mask]
            header = tokenizer.decode(rows[0].segments[0].ids)
            rest = tokenizer.decode(blocks)
            for text in supervised(tokenizer, rows[0]):
                before, found, rest = rest.partition(text)
                assert found
                assert header.endswith(before)
            assert rest == ""
    assert compared


ONE_ROW = ["cohere", "gemma", "gemma3", "gemma4", "lfm2_v2", "llama3", "llama3_1", "phi3", "qwen2_5", "qwen3_8"]
REWRITTEN = ["qwen3", "gptoss", "qwen3_5_think", "qwen3_6"]


@pytest.mark.parametrize("name", [*ONE_ROW, *REWRITTEN])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_prompt_has_the_same_tokens_in_training_and_evaluation(
    of_trl: Callable[[str], Any], name: str, kind: str
) -> None:
    """The prompt of every assistant turn, token for token; a rewritten history is that of inference."""
    tokenizer, messages = of_trl(name), CONVERSATIONS[kind]
    try:
        rows = tokenize(tokenizer, example(messages))
    except ConfigError:
        assert kind == "calls"
        assert name in ("cohere", "gemma", "gemma3", "llama3", "phi3")
        return
    answers = [at for at, turn in enumerate(messages) if turn["role"] == "assistant"]
    assert len(rows) == (len(answers) if name in REWRITTEN else 1)
    assert [row.id for row in rows] == ([f"r0#{n}" for n in range(1, len(answers) + 1)] if len(rows) > 1 else ["r0"])
    for number, at in enumerate(answers):
        row = example(messages[: at + 1])
        if messages is CALLS:
            row = Example("r0", row.messages, "A", tools=[TOOL])
        ids, text = prompt_tokens(tokenizer, row)
        tokens = rows[number] if len(rows) > 1 else rows[0]
        assert tokens.ids[: len(ids)] == ids
        assert tokens.labels[len(ids)] == tokens.ids[len(ids)]  # the turn begins after its prompt
        clean = [turn | {"content": turn["content"] or ""} for turn in messages[:at]]
        tools = [TOOL] if messages is CALLS else None
        assert text == tokenizer.apply_chat_template(clean, tools=tools, tokenize=False, add_generation_prompt=True)
        if len(rows) > 1:
            assert tokens.prompt == ids
            assert tokens.labels[: len(ids)] == [IGNORED] * len(ids)


def test_a_thought_that_the_history_lacks_is_learned_in_its_own_row(of_trl: Callable[[str], Any]) -> None:
    tokenizer = of_trl("qwen3")
    first, second = tokenize(tokenizer, example(THOUGHTS))
    assert supervised(tokenizer, first) == ["<think>\nHm.\n</think>\n\nFirst.<|im_end|>\n"]
    assert supervised(tokenizer, second) == ["<think>\nSo.\n</think>\n\nSecond.<|im_end|>\n"]
    assert "Hm." not in second.text
    assert "First." in second.text
    [only] = tokenize(tokenizer, example(THOUGHTS), "last")
    assert (only.id, only.ids) == ("r0", second.ids)


def test_the_checks_hold_for_every_turn(folder: Path) -> None:
    shouted = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] | replace('Sec', 'SEC') }}")
    with pytest.raises(ConfigError, match=r"^r0: instead of 'ec' in the assistant text the template writes 'EC'"):
        tokenize(load(folder, shouted), example())
    with pytest.raises(ConfigError, match=r"^r0: the prompt does not contain the assistant text unchanged"):
        tokenize(load(folder, shouted), example(), "last")
    with pytest.raises(ConfigError, match=r"^r0: the assistant turn at place 2 .* neither text nor tool calls"):
        tokenize(load(folder, TEMPLATE), example([*PLAIN[:1], assistant(""), *PLAIN[2:]]))


def test_a_special_token_in_any_turn_is_text(folder: Path) -> None:
    tokenizer = load(folder, TEMPLATE)
    quoted = [user("What is </s>?"), assistant("<s> and </s>."), user("And <user>?"), assistant("A </s> too.")]
    [tokens] = tokenize(tokenizer, example(quoted))
    assert [tokens.ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<user>")] == [
        1,
        4,
        2,
    ]
    assert supervised(tokenizer, tokens) == ["<s> and </s>.</s>", "A </s> too.</s>"]
    assert tokens.prompt == prompt_tokens(tokenizer, example(quoted))[0]


# — tools —


@pytest.mark.parametrize("arguments", [{"city": "Bern", "days": 3}, '{"city": "Bern", "days": 3}'])
@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_calls_and_results_are_written_by_the_template(
    of_trl: Callable[[str], Any], arguments: object, content: str | None
) -> None:
    tokenizer = of_trl("qwen2_5")
    call: Any = {**CALL, "function": {"name": "look_up", "arguments": arguments}}
    messages = [CALLS[0], assistant(content, tool_calls=[call]), *CALLS[2:]]
    [tokens] = tokenize(tokenizer, Example("r0", messages, "A", tools=[TOOL]))
    before = f"{content}\n" if content else ""
    assert supervised(tokenizer, tokens) == [
        before + '<tool_call>\n{"name": "look_up", "arguments": {"city": "Bern", "days": 3}}\n</tool_call><|im_end|>\n',
        "It is sunny.<|im_end|>\n",
        "Welcome.<|im_end|>\n",
    ]
    assert "<tool_response>\nSunny, 21.\n</tool_response>" in tokens.text
    assert '"description": "The weather."' in tokens.text


# As DeepSeek's: calls only if there is no content, and arguments as text.
AS_TEXT = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is none %}{% for call in message['tool_calls'] %}{{ call['function']['name'] + '('"
    " + call['function']['arguments'] + ')' }}{% endfor %}{% else %}{{ message['content'] }}{% endif %}",
).replace("{% for", "{{ tools | tojson if tools }}{% for", 1)


def test_a_template_that_takes_arguments_as_text_and_no_content(folder: Path) -> None:
    tokenizer = load(folder, AS_TEXT)
    [tokens] = tokenize(tokenizer, example(CALLS))
    assert supervised(tokenizer, tokens)[0] == 'look_up({"city": "Bern", "days": 3})</s>'


@pytest.mark.parametrize(
    ("template", "changed", "message"),
    [
        (TEMPLATE, {}, "r0: the chat template of tiny does not write the tools of the conversation"),
        (TEMPLATE, {"tools": None}, "r0: the chat template of tiny does not write the tool calls"),
        (
            AS_TEXT.replace("{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"),
            {},
            "r0: the prompt does not contain the tool text unchanged",
        ),
        (
            AS_TEXT,
            {"messages": [user("?"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "[1"}}])]},
            "r0: the arguments of the tool call 'f' are not a JSON object",
        ),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_of_tools_is_refused(
    folder: Path, template: str, changed: dict[str, Any], message: str
) -> None:
    row = Example(**{"id": "r0", "messages": CALLS, "target": "A", "tools": [TOOL]} | changed)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") as caught:
        tokenize(load(folder, template), row)
    assert caught.value.problems[0].depends_on("model.chat_template" if "arguments" not in message else "dataset.keep")


# — reasoning —


def test_thinking_is_dropped_from_texts_and_fields() -> None:
    row = example([*THOUGHTS[:3], assistant("Second.", reasoning_content="So.")])
    kept = without_thinking(row, "dataset", "rows, row 1")
    assert kept.messages == [user("One?"), assistant("First."), user("Two?"), assistant("Second.")]
    assert without_thinking(example(), "dataset", "rows, row 1") == example()
    with pytest.raises(ConfigError, match=r"^rows, row 1: .*reasoning only.*dataset\.thinking=keep"):
        without_thinking(example([user("?"), assistant("<think>Hm.</think>")]), "dataset", "rows, row 1")


def test_reasoning_content_has_to_be_written(of_trl: Callable[[str], Any]) -> None:
    thought = [user("One?"), assistant("First.", reasoning_content="Hm.")]
    [tokens] = tokenize(of_trl("qwen3"), example(thought))
    assert supervised(of_trl("qwen3"), tokens) == ["<think>\nHm.\n</think>\n\nFirst.<|im_end|>\n"]
    with pytest.raises(ConfigError, match=r"^r0: .*reasoning_content.*dataset\.thinking=drop"):
        tokenize(of_trl("llama3"), example(thought))


# — questions —


def test_a_question_is_the_same_under_another_system_prompt() -> None:
    other: list[Message] = [{"role": "system", "content": "Be brief."}, *PLAIN[:1], assistant("Else."), *PLAIN[2:]]
    assert example(other).question == example().question == "One?\n\nTwo?\n\nThree?"
    assert example([user("One?"), assistant("First.")]).question == "One?"


# — the stage, and the preview —


def made(tmp_path: Path, base: Base, rows: list[Example], max_length: int = 4096, allowed: bool = False) -> Any:
    from sftlab.dataset.stage import Dataset

    def build(folder: Path) -> None:
        for name in ("train", "validation", "test"):
            write(folder / "rows.arrow", [batch_of(map(text_of, rows))])
            reorder([folder / "rows.arrow"], np.arange(len(rows)), folder / f"{name}.arrow")

    store = Store(tmp_path / "store")
    data = Dataset(store.stage("dataset", {"rows": str(rows)}, build))
    return stage.make(store, data, base, training(max_length, allowed=allowed))


def test_labels_counts_and_truncation(tmp_path: Path, folder: Path) -> None:
    base = Base("tiny", folder, "identity", False, TEMPLATE)
    rows = [example(name="a"), example([user("One?"), assistant("First.")], "b")]
    [tokens], [short] = (tokenize(base.tokenizer(), row) for row in rows)
    written = made(tmp_path, base, rows)
    table = read_rows(written.stage.path, "train")
    assert [list(row) for row in table["labels"]] == [tokens.labels, short.labels]
    counts = written.counts.train
    assert counts.supervised == sum(label != IGNORED for label in tokens.labels + short.labels)
    assert (counts.rows, counts.tokens, counts.longest) == (2, len(tokens.ids) + len(short.ids), len(tokens.ids))
    with pytest.raises(ConfigError, match=r"truncates the completion of 1 of 2 train rows"):
        made(tmp_path, base, rows, len(tokens.ids) - 1)
    cut = sum(tokens.runs[:3])  # in the header of the second answer: the first one fits
    counts = made(tmp_path, base, rows, cut, allowed=True).counts.train
    assert (counts.rows, counts.truncated, counts.left_out) == (2, 1, 0)
    assert counts.supervised == tokens.runs[1] + short.runs[1]
    found = statistics([tokens.runs, short.runs], cut)
    assert (found.kept, found.supervised, found.cut, found.left_out) == (counts.tokens, counts.supervised, 1, 0)


def test_rows_of_a_rewritten_conversation_are_logged_once(
    tmp_path: Path, of_trl: Callable[[str], Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = (TEMPLATES / "qwen3.jinja").read_text("utf-8").replace("<|im_end|>", "</s>")
    base = Base("tiny", folder, "identity", False, template)
    with caplog.at_level(logging.INFO):
        counts = made(tmp_path, base, [example(name="a"), example(name="b")]).counts
    assert counts.train.rows == 6
    logged = [text for text in caplog.messages if "one for each assistant turn" in text and "train:" in text]
    assert len(logged) == 1
    assert "2 conversations are trained as 6 rows" in logged[0]


def test_the_preview_shows_the_mask_turn_by_turn(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Base("tiny", folder, "identity", False, TEMPLATE)
    page = run(base, tmp_path, [example()], validation=[])
    assert re.findall(r'<pre class="tokens (\w+)"', page) == ["prompt", "supervised"] * 3
    out = capsys.readouterr().out
    assert out.count("Completion, supervised") == out.count("Prompt, no loss") == 3


def test_an_example_is_stored_with_its_conversation(tmp_path: Path) -> None:
    Example.write(tmp_path / "rows.jsonl", [example(CALLS)])
    assert Example.read(tmp_path / "rows.jsonl") == [example(CALLS)]
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8"))["messages"][1]["tool_calls"][0]["id"] == "abcdef123"
    assert list(tokenize_all(lambda row: row.question, [example(CALLS)], "train")) == ["Weather?\n\nThanks!"]


# — a real model —


@pytest.mark.smoke
def test_a_model_learns_every_turn_and_answers_the_last(tmp_path: Path, config: Any) -> None:
    """Three-turn conversations through tokens, training, merging and generation."""
    from sftlab.eval import stage as evaluate
    from sftlab.eval.prompts import tokenize_prompts
    from sftlab.instance import machine as instance
    from sftlab.model import base as models
    from sftlab.model import merge
    from sftlab.train import stage as train

    cfg = config(
        *("model=smollm2_135m", "instance=cpu", "tracking=none", "train.bf16=false", "train.num_train_epochs=3"),
        *("train.learning_rate=2e-3", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1"),
        *("train.gradient_checkpointing=false", "train.lr_scheduler_type=constant", "train.warmup_steps=0"),
        *(
            "eval.engine=transformers",
            "eval.dtype=float32",
            "eval.max_tokens=12",
            "eval.forced=false",
            "eval.logprobs=false",
        ),
    )
    things = ["a river", "the moon", "my lamp", "some bread", "a violin", "the harbour", "one otter", "an anchor"]

    def conversation(number: int, thing: str) -> Example:
        turns = [
            user(f"Remember {thing}."),
            assistant(f"Noted: {thing}."),
            user("Are you sure?"),
            assistant("Certain."),
        ]
        return Example(f"r{number}", [*turns, user("What was it?"), assistant(f"It was {thing}, friend.")], thing)

    rows = [conversation(number, thing) for number, thing in enumerate(things)]
    store, machine = Store(tmp_path / "store"), instance.find(cfg.instance)
    base = models.resolve(cfg.model, store, cfg.seed)
    tokens = made(tmp_path, base, rows)
    answers = [supervised(base.tokenizer(), tokenize(base.tokenizer(), row)[0]) for row in rows[:1]]
    assert answers == [["Noted: a river.<|im_end|>\n", "Certain.<|im_end|>\n", "It was a river, friend.<|im_end|>\n"]]
    for at in (1, 3, 5):  # with the model's own tokenizer
        ids, _ = prompt_tokens(base.tokenizer(), Example("r0", rows[0].messages[: at + 1], "A"))
        assert tokenize(base.tokenizer(), rows[0])[0].ids[: len(ids)] == ids
    trained = train.make(store, tokens, base, cfg.peft, cfg.train, machine, cfg.seed, {})
    first, _, last = trained.candidates(0, [])
    assert last.eval_loss < first.eval_loss
    merged = merge.make(store, Path(last.checkpoint), base, tokens.stage.path, machine, cfg.merge)
    prompts = tokenize_prompts(rows[:4], base, cfg.eval)
    model = evaluate.Model(merged.stage.path, merged.stage.key, False)
    found = evaluate.make(store, model, prompts, cfg.eval, machine, cfg.seed).rows()
    assert [row.prompt for row in found] == [tokenize(base.tokenizer(), row)[0].text for row in rows[:4]]
    assert all(row.completion.startswith("It was ") for row in found), found
