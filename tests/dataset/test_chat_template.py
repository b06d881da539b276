"""Chat templates: what they write around texts, how they end a turn, and the time that they print."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, training, write_model, write_rows
from test_cli import whole
from test_prompt import tokenized as tokenize

from sftlab.config import Config, ModelConfig
from sftlab.dataset.prompt import prompt_tokens, turn_end
from sftlab.errors import ConfigError
from sftlab.eval import stage as evaluate
from sftlab.eval.prompts import tokenize_prompts
from sftlab.model import base as models
from sftlab.model.base import Base, stop_tokens
from sftlab.model.random import CHATML, save_random_model
from sftlab.model.reasoning import answered
from sftlab.records import Example, single_turn
from sftlab.report.preview import preview
from sftlab.runtime.store import Store

Make = Callable[..., Config]
CONTENT = "{{ message['content'] }}"
THOUGHT = "<think>Two pairs.</think> The answer is (A)."
# As those of reasoning models: what stands before </think> is not written again.
FORGETFUL = "{{ message['content'].split('</think>')[-1].lstrip() }}"
# As Qwen3's: an empty thought is written before an answer without one, and a whole one is laid out anew.
THINKING = (
    "{% if message['role'] == 'assistant' and '</think>' in message['content'] %}<think>\n"
    "{{ message['content'].split('</think>')[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n"
    "{{ message['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% elif message['role'] == 'assistant' %}<think>\n\n</think>\n\n{{ message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
)
# As Qwen3-Thinking's: the prompt begins the thought.
BEGUN = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")

WITHOUT = {
    role: f"{{% if message['role'] != '{role}' %}}{{{{ message['content'] }}}}{{% endif %}}"
    for role in ("system", "user", "assistant")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def tokenizer(folder: Path, template: str, time: str | None = None) -> Any:
    return Base("tiny", folder, "identity", False, template, template_time=time).tokenizer()


def example(
    assistant: str = "The answer is (A).", system: str = "Be brief.", user: str = "Which?", choices: str = ""
) -> Example:
    return Example("r0", single_turn(system, user, assistant), "A", choices)


@pytest.mark.parametrize(
    ("written", "row", "text", "reported"),
    [
        (FORGETFUL, example(THOUGHT), "assistant", "'<think>Two pairs.</think> '"),
        (THINKING, example(THOUGHT), "assistant", r"'Two pairs.</think>'.*'\\nTwo"),
        ("{{ message['content'] | upper }}", example(), "system", "system"),
        ("{{ message['content'] | e }}", example(user="Is 1 < 2?"), "user", "user"),
        ("{{ message['content'] | e }}", example("1 < 2"), "assistant", "'<'.*'&lt;'"),
        ("{{ message['content'] | replace('\n', ' ') }}", example("one\ntwo"), "assistant", r"'\\n'.*' '"),
        ("{{ message['content'][:5] }}", example(system="", user="Which"), "assistant", "nothing"),
        (CONTENT + "{% if '(A)' in message['content'] %}!{% endif %}", example(), "assistant", "nothing.*'!'"),
        (WITHOUT["system"], example(), "system", "system"),
        (WITHOUT["user"], example(), "user", "user"),
        # The letter is in the template's own text, and the user's text is not.
        (WITHOUT["user"], example(user="s"), "user", "user"),
        (WITHOUT["assistant"], example("s"), "assistant", "'s'"),
    ],
)  # fmt: skip
def test_a_template_that_changes_a_text_is_refused(
    folder: Path, written: str, row: Example, text: str, reported: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^r0: .*{reported}") as caught:
        tokenize(tokenizer(folder, TEMPLATE.replace(CONTENT, written)), row)
    assert f"the {text} text" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "row", "completion"),
    [
        (CONTENT, example(THOUGHT), THOUGHT),
        (CONTENT, example(" white space \n"), " white space \n"),
        ("{{ message['content'] | trim }}", example(" white space \n", user="\tWhich? "), "white space"),
        (" {{ message['content'] }} ", example("s"), "s "),
        (THINKING, example("<think>\nTwo.\n</think>\n\nA"), "<think>\nTwo.\n</think>\n\nA"),
        (THINKING, example("A"), "<think>\n\n</think>\n\nA"),
        (CONTENT, example("It says </s><assistant>, so A."), "It says </s><assistant>, so A."),
        (CONTENT, example(system=""), "The answer is (A)."),
    ],
)
def test_a_template_that_keeps_the_texts_is_not(folder: Path, written: str, row: Example, completion: str) -> None:
    result = tokenizer(folder, TEMPLATE.replace(CONTENT, written))
    text = result.decode(tokenize(result, row).completion)
    assert text.strip() == f"{completion}</s>".strip()
    assert turn_end(result, row) == result.eos_token_id


LAID_OUT = "<think>\nTwo pairs.\n</think>\n\nThe answer is (A)."


@pytest.mark.parametrize("template", [TEMPLATE, BEGUN])
def test_a_text_that_differs_in_line_breaks_only(folder: Path, template: str) -> None:
    """The message says how to write it, and so written it is accepted."""
    result = tokenizer(folder, template.replace(CONTENT, THINKING))
    with pytest.raises(ConfigError, match="only white space differs") as caught:
        tokenize(result, example(THOUGHT))
    text = THOUGHT
    for mark, layout in re.findall(r"(\S+) as '(\S+)'", str(caught.value)):
        text = re.sub(rf"\s*{mark}\s*", layout.replace("\\n", "\n"), text)
    assert text == LAID_OUT
    tokens = tokenize(result, example(text))
    assert (tokens.text + result.decode(tokens.completion)).endswith(f"<assistant>{LAID_OUT}</s>")


@pytest.mark.parametrize(
    ("text", "written", "dedented"),
    [
        ("    return x\n    # a b\n", "{{ message['content'] | trim }}", True),
        ("\n\n\treturn x\n", "{{ message['content'].strip() }}", True),
        ("  return x", " {{ message['content'] | trim }}", True),
        ("```\n    return x", "{{ message['content'] | trim }}", False),  # as the warning proposes
        ("    return x", CONTENT, False),
        ("\n    return x", "{{ message['content'].strip('\n') }}", False),
        ("    return x", "<think>\n\n</think>\n\n{{ message['content'] }}", False),
        (" The answer is (A). \n", "{{ message['content'] | trim }}", False),
        ("\n\nA\n    b", "{{ message['content'] | trim }}", False),
    ],
)
def test_indentation_that_a_template_leaves_out(folder: Path, text: str, written: str, dedented: bool) -> None:
    assert tokenize(tokenizer(folder, TEMPLATE.replace(CONTENT, written)), example(text)).dedented == dedented


def test_lost_indentation_is_reported_once_for_each_split(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from conftest import vignettes
    from test_tokenize import data

    from sftlab.dataset import tokenize as stage

    rows = [row | {"rationale": "    return x" if number % 2 else "x"} for number, row in enumerate(vignettes(40))]
    dataset = data(tmp_path, rows)
    base = Base("tiny", folder, "identity", False, TEMPLATE.replace(CONTENT, "{{ message['content'] | trim }}"))
    stage.make(Store(tmp_path / "store"), dataset, base, training(4096))
    warnings = [record.getMessage() for record in caplog.records if "indentation" in record.getMessage()]
    for split, warning in zip(("train", "validation"), warnings, strict=True):
        lost = [row.id for row in dataset.split(split) if row.assistant.startswith("    ")]
        assert f"{len(lost)} of {len(dataset.split(split))} {split} rows (first: {lost[0]})" in warning


def test_a_template_that_moves_the_system_text(folder: Path) -> None:
    """As Mistral's third: it stands in the last turn, if that is the user's."""
    moves = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<user>"
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n{% endif %}"
        "{{ message['content'] }}<system>{% elif message['role'] == 'assistant' %}{{ message['content'] }}</s>"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"dataset\.system=null"):
        tokenize(tokenizer(folder, moves), example())
    assert tokenize(tokenizer(folder, moves), example(system="")).text == "<s><user>Which?<system>"


def test_a_default_system_text_is_no_fault(folder: Path) -> None:
    added = "{% if messages[0]['role'] != 'system' %}<system>You help.</s>{% endif %}" + TEMPLATE
    result = tokenizer(folder, added)
    assert tokenize(result, example(system="")).text == "<system>You help.</s><s><user>Which?</s><assistant>"


def test_all_rows_that_a_template_changes_are_reported_at_once(folder: Path, tmp_path: Path, config: Make) -> None:
    from conftest import vignettes
    from test_tokenize import data

    from sftlab.dataset import tokenize as stage

    base = Base("tiny", folder, "identity", False, TEMPLATE.replace(CONTENT, FORGETFUL))
    rows = [row | {"rationale": f"<think>{row['id']}</think> (A)"} for row in vignettes(40)]
    with pytest.raises(ConfigError) as caught:
        stage.make(Store(tmp_path / "store"), data(tmp_path, rows), base, training(4096))
    summary, *rows = caught.value.problems
    assert "30 of 30 train rows" in str(summary)
    assert summary.key == "model.chat_template"
    assert len(rows) == 30
    assert all(f"<think>{row.key}</think>" in row.message for row in rows)


ASSISTANT = "{% if message['role'] == 'assistant' %}"


@pytest.mark.parametrize(
    ("written", "added"),
    [
        (CONTENT + ASSISTANT + " I hope this helps!{% endif %}", "'I hope this helps!' after"),
        (ASSISTANT + "Sure! {% endif %}" + CONTENT, "'Sure!' before"),
        (ASSISTANT + "<system>final\nSure: {% endif %}" + CONTENT, "'Sure:' before"),
        (ASSISTANT + "<think>\nEasy.\n</think>\n\n{% endif %}" + CONTENT, "'Easy.' before"),
    ],
)
def test_text_that_a_template_adds_is_refused(folder: Path, written: str, added: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.chat_template: .* writes {added} the assistant text \(r0\)"):
        tokenize(tokenizer(folder, TEMPLATE.replace(CONTENT, written)), example())


def test_a_header_that_the_generation_prompt_lacks_is_refused(folder: Path) -> None:
    plain = TEMPLATE.replace("<{{ message['role'] }}>", "{{ message['role'] | upper }}: ")
    with pytest.raises(ConfigError, match=r"writes 'ASSISTANT:' before .*add_generation_prompt"):
        tokenize(tokenizer(folder, plain.replace("<assistant>", "")), example())
    mended = tokenizer(folder, plain.replace("<assistant>", "ASSISTANT: "))
    assert mended.decode(tokenize(mended, example()).completion) == "The answer is (A).</s>"


# — a prompt that begins a thought —


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("written", "text", "completion"),
    [
        (THINKING, "<think>\nTwo.\n</think>\n\nA", "Two.\n</think>\n\nA"),
        (THINKING, "A", "\n</think>\n\nA"),
        (CONTENT, "<think>\nTwo.\n</think>\n\nA", "Two.\n</think>\n\nA"),
        (ASSISTANT + "<think>\n{% endif %}" + CONTENT, "Two.\n</think>\n\nA", "Two.\n</think>\n\nA"),
    ],
)
def test_a_thought_may_begin_in_the_prompt(
    folder: Path, written: str, text: str, completion: str, special: bool
) -> None:
    result = with_marks(folder, BEGUN.replace(CONTENT, written), special=special)
    tokens = tokenize(result, example(text))
    assert tokens.text.endswith("<assistant><think>\n")
    assert result.decode(tokens.completion) == f"{completion}</s>"
    assert prompt_tokens(result, example(text)) == (tokens.prompt, tokens.text)
    assert answered(completion, tokens.text).strip() == "A"


@pytest.mark.parametrize("written", [FORGETFUL, "{{ message['content'].split('</think>')[-1] }}"])
def test_a_thought_that_the_prompt_begins_and_the_template_drops_is_refused(folder: Path, written: str) -> None:
    with pytest.raises(ConfigError, match="r0: "):
        tokenize(tokenizer(folder, BEGUN.replace(CONTENT, written)), example(THOUGHT))


def test_an_answer_within_the_thought_of_the_prompt_is_refused(folder: Path) -> None:
    result = tokenizer(folder, BEGUN.replace(CONTENT, ASSISTANT + "<think>\n{% endif %}" + CONTENT))
    with pytest.raises(ConfigError, match=r"r0: .* write </think> before the answer in dataset\.assistant"):
        tokenize(result, example("A"))
    assert result.decode(tokenize(result, example("</think>A")).completion) == "</think>A</s>"


# — reasoning marks that are tokens —


def with_marks(folder: Path, template: str, *, special: bool, marks: tuple[str, ...] = ("<think>", "</think>")) -> Any:
    result = tokenizer(folder, template)
    result.add_tokens(list(marks), special_tokens=special)
    return result


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("written", "text"), [(CONTENT, THOUGHT), (THINKING, "<think>\nTwo.\n</think>\n\nA"), (THINKING, "A")]
)
def test_reasoning_marks_in_an_assistant_turn_are_tokens(folder: Path, written: str, text: str, special: bool) -> None:
    result = with_marks(folder, TEMPLATE.replace(CONTENT, written), special=special)
    tokens = tokenize(result, example(text, user="What is <think>? </s>"))
    written_tokens = result.convert_ids_to_tokens(tokens.completion)
    assert [written_tokens.count(mark) for mark in ("<think>", "</think>")] == [1, 1]
    assert tokens.text.count("<think>") == 1
    if special:  # what a question quotes is plain text
        assert result.convert_tokens_to_ids("<think>") not in tokens.prompt
        assert (
            tokens.completion
            == tokenize(with_marks(folder, TEMPLATE.replace(CONTENT, written), special=False), example(text)).completion
        )


@pytest.mark.parametrize("special", [False, True])
def test_a_template_that_drops_a_thought_is_refused_whatever_its_marks_are(folder: Path, special: bool) -> None:
    result = with_marks(folder, TEMPLATE.replace(CONTENT, FORGETFUL), special=special)
    with pytest.raises(ConfigError, match=r"instead of '<think>Two pairs\.</think> '"):
        tokenize(result, example(THOUGHT))


# — how a turn ends —


@pytest.mark.parametrize("end", ["", "\n", ";", "<|im_end|>", " [END]\n"])
def test_a_turn_that_ends_without_a_special_token_is_refused(folder: Path, end: str) -> None:
    """Such as a ChatML template for a tokenizer that has no <|im_end|>."""
    plain = TEMPLATE.replace("</s>", end)
    with pytest.raises(ConfigError, match=r"^model\.chat_template: .*\{\{ eos_token \}\}"):
        tokenize(tokenizer(folder, plain), example())
    mended = tokenizer(folder, plain.replace(CONTENT, CONTENT + "{{ eos_token }}"))
    assert mended.eos_token_id in tokenize(mended, example()).completion
    assert turn_end(mended, example()) == mended.eos_token_id


def test_the_end_of_a_turn_is_the_first_special_token_after_the_text(folder: Path) -> None:
    channels = TEMPLATE.replace(
        CONTENT, "{% if message['role'] == 'assistant' %}<system>final<user>{% endif %}{{ message['content'] }}\n"
    ).replace("</s>", "<s></s>")
    result = tokenizer(folder, channels)
    assert turn_end(result, example()) == result.bos_token_id


def test_every_token_that_ends_a_completion_is_collected(folder: Path, tmp_path: Path) -> None:
    """From the tokenizer, both configs of the model, and the template; none that the model has no logit for."""
    model = write_model(tmp_path / "model")
    actual = tokenizer(model, TEMPLATE)
    assert stop_tokens(model, actual, []) == [1]
    (model / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7, "vocab_size": 50}}), "utf-8")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 9, 60]}', "utf-8")
    assert stop_tokens(model, actual, [4]) == [1, 4, 7, 9]


def test_an_evaluation_warns_of_a_template_without_an_end(
    folder: Path, config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config("model=tiny_random", "eval.max_tokens=8").eval
    for template in (TEMPLATE, TEMPLATE.replace("</s>", "\n")):
        caplog.clear()
        base = Base("tiny", folder, "identity", False, template)
        tokenize_prompts([example(choices="AB")], base, cfg)
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == (template != TEMPLATE)
    assert "the template of tiny writes no special token after an assistant turn" in warned[0]


def test_stop_tokens_are_in_the_key_of_completions(folder: Path, config: Make) -> None:
    cfg = config("model=tiny_random", "eval.max_tokens=8", "eval.dtype=bfloat16").eval
    model = evaluate.Model(folder, "identity", False)
    keys = []
    for end in ("</s>", "<s></s>"):
        base = Base("tiny", folder, "identity", False, TEMPLATE.replace("</s>", end))
        prompts = tokenize_prompts([example(choices="AB")], base, cfg)
        keys.append(evaluate.inputs(model, prompts, cfg, "cpu", 0))
    assert [key["stop_token_ids"] for key in keys] == [[1], [0, 1]]


# As gpt-oss writes an answer: its last turn ends with <|return|>, and a message with <|end|>.
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_the_end_of_a_message_of_gpt_oss_ends_no_completion(folder: Path) -> None:
    marks = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]

    def harmony(template: str) -> tuple[Any, dict[str, int]]:
        result = tokenizer(folder, template)
        result.add_special_tokens({"additional_special_tokens": marks, "eos_token": "<|return|>"})
        return result, result.get_added_vocab()

    result, ids = harmony(HARMONY)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [ids["<|return|>"], ids["<|end|>"]]}), "utf-8")
    assert turn_end(result, example()) == ids["<|return|>"]
    for ends in ([ids["<|return|>"]], [ids["<|end|>"]]):
        assert stop_tokens(folder, result, ends) == sorted([ids["<|return|>"], ids["<|call|>"]])
    assert tokenize(result, example()).completion[-1] == ids["<|return|>"]
    # A model that learns to end its answer as it ends a message would never stop.
    result, ids = harmony(HARMONY.replace("<|return|>", "<|end|>"))
    with pytest.raises(ConfigError, match="generation could not stop there"):
        tokenize(result, example())


# — the time —

CLOCK = TEMPLATE.replace("{% for", "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}{% for")


def resolved(folder: Path, template: Path, store: Path, time: str | None = None) -> Base:
    cfg = ModelConfig(
        name_or_path=str(folder),
        revision=None,
        trust_remote_code=False,
        chat_template=str(template),
        template_time=time,
    )
    return models.resolve(cfg, Store(store), 0)


def test_a_template_that_prints_the_time_is_given_one_for_all_runs_of_a_store(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clock.jinja").write_text(CLOCK, "utf-8")
    (tmp_path / "plain.jinja").write_text(TEMPLATE, "utf-8")
    first = resolved(folder, tmp_path / "clock.jinja", tmp_path / "one")
    time.sleep(1.1)
    again = resolved(folder, tmp_path / "clock.jinja", tmp_path / "one")
    other = resolved(folder, tmp_path / "clock.jinja", tmp_path / "two")
    assert first == again
    assert len({first.identity, other.identity}) == 2
    texts = [tokenize(base.tokenizer(), example()).text for base in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    set_by_hand = resolved(folder, tmp_path / "clock.jinja", tmp_path / "one", "2024-02-03T04:05:06")
    assert tokenize(set_by_hand.tokenizer(), example()).text.startswith("<s>03 Feb 2024 04:05:06.000000<system>")
    assert set_by_hand.identity not in (first.identity, other.identity)
    plain = [resolved(folder, tmp_path / "plain.jinja", tmp_path / "one", time) for time in (None, "2024-02-03")]
    assert plain[0].identity == plain[1].identity
    assert plain[1].template_time is None


def test_a_template_in_the_folder_of_additional_ones_is_given_the_time(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", template=None)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "default.jinja").write_text(CLOCK, "utf-8")
    cfg = ModelConfig(
        name_or_path=str(model),
        revision=None,
        trust_remote_code=False,
        chat_template=None,
        template_time="2024-02-03T04:05:06",
    )
    base = models.resolve(cfg, Store(tmp_path / "store"), 0)
    assert tokenize(base.tokenizer(), example()).text.startswith("<s>03 Feb 2024 04:05:06.000000<system>")


def test_the_preview_shows_the_time(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tokenizer(folder, CLOCK, "2024-02-03T04:05:06")
    splits = {"train": [example()], "validation": []}
    preview(result, splits, max_length=99, train_on="all", folder=tmp_path, seed=0, template_time="2024-02-03T04:05:06")
    out = capsys.readouterr().out
    assert "2024-02-03T04:05:06" in out
    assert "2024-02-03T04:05:06" in (tmp_path / "preview.html").read_text("utf-8")


def test_a_dry_run_fixes_no_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clock.jinja").write_text(CLOCK, "utf-8")
    cfg = ModelConfig(
        name_or_path=str(folder),
        revision=None,
        trust_remote_code=False,
        chat_template=str(tmp_path / "clock.jinja"),
        template_time=None,
    )
    base = models.cached(cfg, Store(tmp_path / "store"), 0)
    assert base is not None
    assert base.template_time is not None
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("value", ["noon", "2026-13-01", "''"])
def test_a_time_that_is_none(config: Make, value: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.template_time=.* is not an ISO time"):
        config(f"model.template_time={value}")


# — whole runs —

TINY = ["model=tiny_random", "instance=cpu", "tracking=none", "eval.engine=transformers", "hydra.run.dir=run"]
EXACT = [*TINY, "eval.task=exact"]
OWN = """
name_or_path: rows.jsonl
subset: null
split: {train: 0.6, validation: 0.2, test: 0.2}
system: Answer.
user: "{{ question }}"
assistant: "{{ answer }}"
target: "yes"
choices: null
options: null
id: "{{ id }}"
max_overlap: 1.0
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A dataset of its own, whose answer is always the same."""
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "own.yaml").write_text(f"defaults: [medqa_cot, _self_]\n{OWN}", "utf-8")
    words = ["river", "cedar", "stone", "lamp", "otter", "amber"]
    rows = [
        {"id": f"r{n}", "question": f"{words[n % 6]} {words[n // 6]} {n}?", "answer": "<think>Hm.</think> yes"}
        for n in range(36)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


@pytest.mark.smoke
def test_the_token_that_ends_a_turn_in_training_ends_it_in_generation(own: Path) -> None:
    """The template ends turns with <|endoftext|>, and the tokenizer's EOS is <|im_end|>."""
    ends = CHATML.replace("<|im_end|>", "<|endoftext|>").replace("<|im_start|>", "#")
    (own / "end.jinja").write_text(ends, "utf-8")
    done = whole(
        own, "--config-dir", "conf", "dataset=own", "model.chat_template=end.jinja", "dataset.assistant=yes",
        "peft=none", "train.num_train_epochs=12", "train.learning_rate=5e-3", "eval.task=exact", "eval.max_tokens=16",
        *TINY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (own / "run" / "predictions" / "finetuned.jsonl").read_text().splitlines()]
    assert {(row["completion"], row["finish_reason"]) for row in rows} == {("yes", "stop")}
    served = json.loads((own / "run" / "merged" / "generation_config.json").read_text("utf-8"))
    assert served["eos_token_id"] == [0, 2]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["all", "preview"])
def test_a_thought_that_the_template_drops_is_reported_before_training(own: Path, mode: str) -> None:
    (own / "drops.jinja").write_text(CHATML.replace(CONTENT, FORGETFUL), "utf-8")
    done = whole(own, "--config-dir", "conf", "dataset=own", "model.chat_template=drops.jinja", f"mode={mode}", *EXACT)
    assert done.returncode == 2
    assert "<think>Hm.</think>" in done.stderr
    assert not list(own.glob("outputs/store/train/*"))
    (own / "keeps.jinja").write_text(CHATML, "utf-8")
    done = whole(own, "--config-dir", "conf", "dataset=own", "model.chat_template=keeps.jinja", "mode=preview", *EXACT)
    assert done.returncode == 0, done.stderr


@pytest.mark.smoke
def test_all_prompts_of_a_run_have_the_time_of_its_record(own: Path) -> None:
    (own / "clock.jinja").write_text("{{ strftime_now('at %X') }}" + CHATML, "utf-8")
    common = ["--config-dir", "conf", "dataset=own", "model.chat_template=clock.jinja", "train.num_train_epochs=1"]
    common += ["eval.task=exact", "eval.max_tokens=4", *TINY]
    assert whole(own, *common, "mode=train").returncode == 0
    run = json.loads((own / "run" / "run.json").read_text("utf-8"))
    time.sleep(1.1)
    done = whole(own, *common)
    assert done.returncode == 0, done.stderr
    record = json.loads((own / "run" / "run.json").read_text("utf-8"))
    assert record["template_time"] == run["template_time"]
    assert record["times"]["train"] == 0  # the second command found the training of the first
    clock = f"at {record['template_time'][11:]}"
    for name in ("baseline", "finetuned"):
        rows = (own / "run" / "predictions" / f"{name}.jsonl").read_text("utf-8").splitlines()
        assert all(json.loads(row)["prompt"].startswith(clock) for row in rows)


REMOTE = """from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    def decode(self, *given, **options):
        return "§" + super().decode(*given, **options)


class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


@pytest.mark.smoke
def test_a_model_with_code_of_its_own_is_trained_and_evaluated(own: Path) -> None:
    """Its tokenizer is loaded for prompts, generation and forced choice, from the base and from the merged model."""
    folder = own / "model"
    folder.mkdir()
    save_random_model("llama", 0, folder)
    (folder / "own_code.py").write_text(REMOTE, "utf-8")
    for name, changed in {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]},
            "tokenizer_class": "OwnTokenizer",
        },
        "config.json": {"auto_map": {"AutoModelForCausalLM": "own_code.OwnForCausalLM"}},
    }.items():
        values = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(values | changed), "utf-8")
    common = ["model.name_or_path=model", "dataset.max_rows=48", "eval.max_tokens=8", "eval.max_rows=4"]
    trusted = [*TINY, *common, "train.num_train_epochs=1", "model.trust_remote_code=true"]
    done = whole(own, *trusted)
    assert done.returncode == 0, done.stderr
    for name in ("baseline", "finetuned"):
        rows = (own / "run" / "predictions" / f"{name}.jsonl").read_text("utf-8").splitlines()
        assert all(json.loads(row)["completion"].startswith("§") for row in rows)
        assert all(json.loads(row)["readings"]["forced"] for row in rows)
    assert (own / "run" / "merged" / "own_code.py").is_file()
    assert whole(own, *trusted, "mode=plan", "hydra.run.dir=plan").returncode == 0
