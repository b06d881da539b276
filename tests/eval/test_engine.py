"""The engine of transformers on a tiny random model, and forced choices between letters that share tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_model

from sftlab.errors import ConfigError
from sftlab.eval import contenders
from sftlab.eval.answers import Question
from sftlab.eval.engines import Settings, Transformers, Vllm
from sftlab.eval.extract import likeliest
from sftlab.eval.forced import FORCING, choose_letters
from sftlab.eval.prompts import tokenize_prompts
from sftlab.model.base import Base
from sftlab.model.random import save_random_model
from sftlab.records import Example, single_turn

pytestmark = pytest.mark.smoke  # torch, and a model

PROMPTS = [[number + 10 * step for step in range(1, 4 + 5 * number)] for number in (7, 1, 4, 2, 9, 3, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model("llama", 0, folder)
    # A sampling option of a model's own config, which vLLM ignores.
    path = folder / "generation_config.json"
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(values | {"repetition_penalty": 1.9}), "utf-8")
    return folder


def settings(folder: Path, **changed: Any) -> Settings:
    return Settings(
        **{
            "model": str(folder),
            "trust_remote_code": False,
            "stop_token_ids": [],
            "device": "cpu",
            "dtype": "bfloat16",
            "max_model_len": 400,
            "max_tokens": 12,
            "temperature": 0.0,
            "seed": 0,
            "batch_size": 4,
            "tensor_parallel_size": 1,
            "gpu_memory_utilization": 0.9,
            "kv_cache_gib": 1.0,
        }
        | changed
    )


class Beats:
    """Counts the calls of an engine."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture(scope="module")
def engine(folder: Path) -> Transformers:
    engine = Transformers(settings(folder), Beats())
    engine.model.float()  # in bfloat16 the width of a batch may change which of two equal tokens is chosen
    return engine


def logits(engine: Transformers, prompt: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return engine.model(input_ids=torch.tensor([prompt])).logits[0, -1]


def test_choices_in_batches_equal_those_of_single_prompts(engine: Transformers) -> None:
    allowed = [[(prompt[0] * 7 + step) % 1000 for step in range(0, 500, 50)] for prompt in PROMPTS]
    known = dict(engine.logprobs(PROMPTS, allowed))
    for place, (prompt, tokens) in enumerate(zip(PROMPTS, allowed, strict=True)):
        expected = logits(engine, prompt).float().log_softmax(-1)
        assert known[place] == pytest.approx({token: float(expected[token]) for token in tokens}, abs=1e-4)
    assert len({max(of_prompt, key=of_prompt.__getitem__) for of_prompt in known.values()}) > 1


def test_a_choice_computes_the_logits_of_one_position(engine: Transformers) -> None:
    shapes = []
    hook = engine.model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[:2])))
    try:
        list(engine.logprobs(PROMPTS, [[5, 6]] * len(PROMPTS)))
    finally:
        hook.remove()
    assert shapes == [(4, 1), (3, 1)]


def greedy(engine: Transformers, prompt: list[int], tokens: int) -> list[int]:
    for _ in range(tokens):
        prompt = [*prompt, int(logits(engine, prompt).argmax())]
    return prompt[-tokens:]


def test_completions_are_greedy_and_end_at_each_stop_token(engine: Transformers, monkeypatch: Any) -> None:
    expected = [greedy(engine, prompt, 12) for prompt in PROMPTS]
    completions = dict(engine.generate(PROMPTS, seed=0))
    assert [completions[place].token_ids for place in range(len(PROMPTS))] == expected
    assert {completion.finish_reason for completion in completions.values()} == {"length"}
    stops = [expected[0][5], expected[1][3]]
    monkeypatch.setattr(engine, "settings", replace(engine.settings, stop_token_ids=stops))
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", stops)
    for place, completion in engine.generate(PROMPTS, seed=0):
        ends = [at for at, token in enumerate(expected[place]) if token in stops]
        assert completion.token_ids == expected[place][: ends[0] if ends else 12]
        assert completion.finish_reason == ("stop" if ends else "length")
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_neither_engine_counts_the_stop_token(
    engine: Transformers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's output contains it."""
    expected = greedy(engine, PROMPTS[0], 6)
    stops = [expected[-1]]
    monkeypatch.setattr(engine, "settings", replace(engine.settings, stop_token_ids=stops))
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", stops)
    ((_, expected_completion),) = engine.generate(PROMPTS[:1], seed=0)
    at = expected.index(stops[0])

    def run(*_: Any) -> Iterator[tuple[int, Any]]:
        yield 0, SimpleNamespace(token_ids=expected[: at + 1], text=expected_completion.text, finish_reason="stop")

    parameters = SimpleNamespace(clone=lambda: None)
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=0))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: parameters))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    monkeypatch.setattr(Vllm, "_run", run)
    vllm = Vllm.__new__(Vllm)
    vllm.settings = settings(folder, stop_token_ids=stops)
    vllm.llm = SimpleNamespace(get_tokenizer=lambda: engine.tokenizer, reset_prefix_cache=lambda: None)
    assert list(vllm.generate(PROMPTS[:1], seed=0)) == [(0, expected_completion)]
    assert expected_completion.token_ids == expected[:at]


def test_an_engine_calls_beat_at_every_token(folder: Path) -> None:
    beats = Beats()
    engine = Transformers(settings(folder, batch_size=16), beats)
    outputs = engine.generate(PROMPTS, seed=0)
    next(outputs)
    assert beats.count >= 12  # before the first completion of a batch
    before = beats.count
    list(engine.logprobs(PROMPTS, [[5, 6]] * len(PROMPTS)))
    assert beats.count > before


# — forced choice —


Lists = Sequence[list[int]]


class Chooses:
    """Stands in for an engine: the tokens of one letter have the highest log-probability. Records the prompts."""

    def __init__(self, tokenizer: Any, letter: str) -> None:
        self.tokenizer, self.letter = tokenizer, letter
        self.prompts: list[list[int]] = []

    def logprobs(self, prompts: Lists, tokens: Lists) -> Iterator[tuple[int, dict[int, float]]]:
        self.prompts += prompts
        wanted = f"{FORCING}{self.letter})".encode()
        for place in reversed(range(len(prompts))):  # engines finish in any order
            texts = [self.bytes([*prompts[place], token]) for token in tokens[place]]
            assert len({*tokens[place]}) == len(tokens[place]) > 1
            fits = [token for token, text in zip(tokens[place], texts, strict=True) if text.rfind(b"(") >= 0
                    and wanted.startswith(FORCING.encode() + text[text.rfind(b"(") + 1 :])]  # fmt: skip
            yield place, {token: -1.0 if token in fits else -5.0 for token in tokens[place]}

    def bytes(self, ids: list[int]) -> bytes:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        table = {char: number for number, char in bytes_to_unicode().items()}
        return bytes(table[char] for token in self.tokenizer.convert_ids_to_tokens(ids) for char in token)


# In the tokenizer's bytes, Cyrillic letters and digits of other scripts begin alike.
@pytest.mark.parametrize("letters", ["ABCD", "AАБВ", "АБ", "12١٢", "éÉ"])
def test_letters_that_share_tokens_are_told_apart(engine: Transformers, letters: str) -> None:
    for letter in letters:
        chooses = Chooses(engine.tokenizer, letter)
        questions = [Question(0, n, "?", [200 + n] * 5, letters, "x" * n, "stop") for n in range(3)]
        chosen = [(asked.row, likeliest(known)) for asked, known in choose_letters(chooses, engine.settings, questions)]
        assert sorted(chosen) == [(0, letter), (1, letter), (2, letter)]


def test_letters_have_the_log_probabilities_of_their_tokens(engine: Transformers) -> None:
    """Summed from the first token in which a letter differs from the others, with the real engine."""
    question = Question(0, 0, "?", [300, 301, 302], "AАБ", "Hm.", "stop")
    ((_, letters),) = choose_letters(engine, engine.settings, [question])
    options = {
        letter: engine.tokenizer(f"Hm.{FORCING}{letter})", add_special_tokens=False)["input_ids"] for letter in "AАБ"
    }
    shared = next(at for at, ids in enumerate(zip(*options.values(), strict=False)) if len({*ids}) > 1)
    for letter, ids in options.items():
        others = [other for name, other in options.items() if name != letter]
        end = next(at for at in range(len(ids)) if all(other[: at + 1] != ids[: at + 1] for other in others))
        expected = sum(
            float(logits(engine, [300, 301, 302, *ids[:at]]).log_softmax(-1)[ids[at]])
            for at in range(shared, end + 1)
            if any(other[:at] == ids[:at] and other[at] != ids[at] for other in others)
        )
        assert letters[letter] == pytest.approx(expected, abs=1e-4)


def test_a_text_that_fills_the_context_loses_its_beginning_and_not_the_prompt(engine: Transformers) -> None:
    prompt, asked = list(range(300, 340)), []

    class Records:
        def logprobs(self, prompts: Lists, tokens: Lists) -> Iterator[tuple[int, dict[int, float]]]:
            asked.extend(prompts)
            return ((place, dict.fromkeys(own, -1.0)) for place, own in enumerate(tokens))

    for length in (41, 42, 43, 60):  # the first leaves no room for anything but the letter
        question = Question(0, 0, "?", prompt, "AB", "word " * 500, "stop")
        limited = replace(engine.settings, max_model_len=length)
        assert [known for _, known in choose_letters(Records(), limited, [question])] == [{"A": -1.0, "B": -1.0}]
        assert asked[-1][:40] == prompt
        assert len(asked[-1]) < length
        text = engine.tokenizer.decode(asked[-1][40:])
        assert f"{('word ' * 500).rstrip()}{FORCING}".endswith(text)
    assert len({len(tokens) for tokens in asked}) > 1


def test_letters_with_the_same_tokens_are_refused(tmp_path: Path, config: Any) -> None:
    """A tokenizer without upper case cannot tell a from A."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_random_model("llama", 0, folder)
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(values | {"normalizer": {"type": "Lowercase"}}), "utf-8")
    base = Base("lower", folder, "identity", False, None)
    cfg = config("model=tiny_random", "eval.max_tokens=8")
    example = Example("r0", single_turn("", "which?", "a"), "a", choices="Aab")
    with pytest.raises(ConfigError, match=r"eval\.forced=true: .*'A' and 'a' the same tokens.*set eval\.forced=false"):
        tokenize_prompts([example], base, cfg.eval)
    quiet = config("model=tiny_random", "eval.max_tokens=8", "eval.forced=false", "eval.logprobs=false")
    assert tokenize_prompts([example], base, quiet.eval).rows


def test_a_test_set_is_tokenized_once_for_the_same_model_and_settings(
    tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job checks the prompts before the training; they are judged after it."""
    first, other = (Base("m", write_model(tmp_path / name), name, False, None) for name in ("a", "b"))
    rows = [Example("r0", single_turn("", "which?", "(A)"), "A", choices="AB")]
    tokenized = []

    def counted(examples: Any, base: Base, *given: Any) -> Any:
        tokenized.append(base.identity)
        return tokenize_prompts(examples, base, *given)

    monkeypatch.setattr(contenders, "tokenize_prompts", counted)
    monkeypatch.setattr(contenders, "_memory", {})
    cfg = config("model=tiny_random", "eval.max_tokens=8")
    for _ in range(2):
        assert contenders.prompts(cfg, first, contenders.EvalSet(rows, "x")).rows[0].id == "r0"
    assert tokenized == ["a"]
    contenders.prompts(cfg, other, contenders.EvalSet(rows, "x"))
    contenders.prompts(cfg, first, contenders.EvalSet(rows, "y"))
    assert tokenized == ["a", "b", "a"]
    with pytest.raises(ConfigError, match=r"eval\.max_tokens"):
        contenders.prompts(config("model=tiny_random", "eval.max_tokens=4096"), first, contenders.EvalSet(rows, "y"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the model."""
    import torch
    from peft import LoraConfig, get_peft_model

    from sftlab.model.base import load

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    saved = tmp_path_factory.mktemp("adapter")
    get_peft_model(load(folder, dtype="float32"), config).save_pretrained(saved)
    return saved


def test_an_adapter_beside_the_weights_answers_as_the_merged_model(folder: Path, adapter: Path, tmp_path: Path) -> None:
    from sftlab.model.base import load

    beside = Transformers(settings(folder, lora_rank=8, dtype="float32"), Beats())
    before = dict(beside.generate(PROMPTS, seed=0))
    beside.load(adapter, tmp_path)
    answers = dict(beside.generate(PROMPTS, seed=0))
    assert {name for name, _ in beside.model.named_modules() if name.endswith("lora_A")}  # it is not merged
    from peft import PeftModel

    merged = Transformers(settings(folder, dtype="float32"), Beats())
    config = merged.model.generation_config
    merged.model = PeftModel.from_pretrained(load(folder, dtype="float32"), str(adapter)).merge_and_unload().eval()
    merged.model.generation_config = config
    expected = dict(merged.generate(PROMPTS, seed=0))
    assert [one.token_ids for _, one in sorted(answers.items())] == [
        one.token_ids for _, one in sorted(expected.items())
    ]
    assert answers != before


def test_weights_are_quantised_when_they_are_loaded(folder: Path, engine: Transformers) -> None:
    pytest.importorskip("bitsandbytes")
    small = Transformers(settings(folder, quantization="nf4", dtype="float32"), Beats())
    kinds = {type(module).__name__ for module in small.model.modules()}
    assert "Linear4bit" in kinds
    own, exact = (logits(one, PROMPTS[0]).float() for one in (small, engine))
    assert 0 < float((own - exact).abs().max()) < float(exact.abs().max())
    assert len(dict(small.generate(PROMPTS, seed=0))) == len(PROMPTS)
