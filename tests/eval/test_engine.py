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

from sftlab.errors import ConfigError
from sftlab.eval import stage as evaluate
from sftlab.eval.engines import Settings, Transformers, Vllm
from sftlab.model import base as models
from sftlab.model.base import Base
from sftlab.records import Example

PROMPTS = [[number + 10 * step for step in range(1, 4 + 5 * number)] for number in (7, 1, 4, 2, 9, 3, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    models._random("llama", 0, folder)
    # What a model's own config may bring, and vLLM does not take from there.
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
    """Counts the signs of life of an engine."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture(scope="module")
def engine(folder: Path) -> Transformers:
    made = Transformers(settings(folder), Beats())
    made.model.float()  # in bfloat16 the width of a batch may change which of two equal tokens is chosen
    return made


def logits(engine: Transformers, prompt: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return engine.model(input_ids=torch.tensor([prompt])).logits[0, -1]


def test_choices_in_batches_are_those_of_one_prompt_alone(engine: Transformers) -> None:
    allowed = [[(prompt[0] * 7 + step) % 1000 for step in range(0, 500, 50)] for prompt in PROMPTS]
    chosen = dict(engine.choose(PROMPTS, allowed))
    expected = {}
    for place, (prompt, tokens) in enumerate(zip(PROMPTS, allowed, strict=True)):
        scores = logits(engine, prompt)
        expected[place] = max(tokens, key=lambda token: float(scores[token]))
    assert chosen == expected
    assert len(set(chosen.values())) > 1


def test_a_choice_computes_the_logits_of_one_position(engine: Transformers) -> None:
    shapes = []
    hook = engine.model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[:2])))
    try:
        list(engine.choose(PROMPTS, [[5, 6]] * len(PROMPTS)))
    finally:
        hook.remove()
    assert shapes == [(4, 1), (3, 1)]


def greedy(engine: Transformers, prompt: list[int], tokens: int) -> list[int]:
    for _ in range(tokens):
        prompt = [*prompt, int(logits(engine, prompt).argmax())]
    return prompt[-tokens:]


def test_completions_are_greedy_and_end_at_each_stop_token(engine: Transformers, monkeypatch: Any) -> None:
    expected = [greedy(engine, prompt, 12) for prompt in PROMPTS]
    made = dict(engine.generate(PROMPTS, seed=0))
    assert [made[place].token_ids for place in range(len(PROMPTS))] == expected
    assert {one.finish_reason for one in made.values()} == {"length"}
    stops = [expected[0][5], expected[1][3]]
    monkeypatch.setattr(engine, "settings", replace(engine.settings, stop_token_ids=stops))
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", stops)
    for place, completion in engine.generate(PROMPTS, seed=0):
        ends = [at for at, token in enumerate(expected[place]) if token in stops]
        assert completion.token_ids == expected[place][: ends[0] if ends else 12]
        assert completion.finish_reason == ("stop" if ends else "length")
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_vllm_counts_the_token_that_ends_a_completion_as_little_as_transformers_does(
    engine: Transformers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's output has it."""
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


def test_an_engine_shows_life_at_every_token(folder: Path) -> None:
    beats = Beats()
    made = Transformers(settings(folder, batch_size=16), beats)
    outputs = made.generate(PROMPTS, seed=0)
    next(outputs)
    assert beats.count >= 12  # before the first completion of a batch is there
    before = beats.count
    list(made.choose(PROMPTS, [[5, 6]] * len(PROMPTS)))
    assert beats.count > before


# — forced choice —


class Chooses:
    """In the place of an engine: chooses the tokens of one letter, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, letter: str) -> None:
        self.tokenizer, self.letter = tokenizer, letter
        self.prompts: list[list[int]] = []

    def choose(self, prompts: Sequence[list[int]], allowed: Sequence[list[int]]) -> Iterator[tuple[int, int]]:
        self.prompts += prompts
        wanted = f"{evaluate.FORCING}{self.letter})".encode()
        for place in reversed(range(len(prompts))):  # in no order that could be relied on
            texts = [self.bytes([*prompts[place], token]) for token in allowed[place]]
            assert len({*allowed[place]}) == len(allowed[place]) > 1
            fits = [token for token, text in zip(allowed[place], texts, strict=True) if text.rfind(b"(") >= 0
                    and wanted.startswith(evaluate.FORCING.encode() + text[text.rfind(b"(") + 1 :])]  # fmt: skip
            yield place, fits[0]

    def bytes(self, ids: list[int]) -> bytes:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        table = {char: number for number, char in bytes_to_unicode().items()}
        return bytes(table[char] for token in self.tokenizer.convert_ids_to_tokens(ids) for char in token)


# In the tokenizer's bytes, Cyrillic letters and digits of other scripts begin alike.
@pytest.mark.parametrize("letters", ["ABCD", "AАБВ", "АБ", "12١٢", "éÉ"])
def test_letters_that_share_tokens_are_told_apart(engine: Transformers, letters: str) -> None:
    for letter in letters:
        chooses = Chooses(engine.tokenizer, letter)
        rows: list[dict[str, Any]] = [
            {
                "row": n,
                "made": {"finish_reason": "stop", "completion": "x" * n},
                "prompt": "?",
                "prompt_token_ids": [200 + n] * 5,
                "choices": letters,
            }
            for n in range(3)
        ]
        found = [(row["row"], chosen) for row, chosen in evaluate._force(chooses, engine.settings, rows)]
        assert sorted(found) == [(0, letter), (1, letter), (2, letter)]


def test_the_first_letter_is_chosen_among_what_the_model_finds_likely(engine: Transformers) -> None:
    """With the real engine: each choice is the most likely one at the place where the letters differ."""
    row = {
        "row": 0,
        "made": {"finish_reason": "stop", "completion": "Hm."},
        "prompt": "?",
        "prompt_token_ids": [300, 301, 302],
        "choices": "AАБ",
    }
    ((_, letter),) = evaluate._force(engine, engine.settings, [row])
    options = {
        one: engine.tokenizer(f"Hm.{evaluate.FORCING}{one})", add_special_tokens=False)["input_ids"] for one in "AАБ"
    }
    left, at = dict(options), 0
    while len(left) > 1:
        prompt = [300, 301, 302, *next(iter(left.values()))[:at]]
        scores = logits(engine, prompt)
        best = max({ids[at] for ids in left.values()}, key=lambda token: float(scores[token]))
        left, at = {one: ids for one, ids in left.items() if ids[at] == best}, at + 1
    assert letter == next(iter(left))


def test_a_long_text_loses_its_beginning_and_the_prompt_stays(engine: Transformers) -> None:
    prompt, asked = list(range(300, 340)), []

    class Records:
        def choose(self, prompts: Sequence[list[int]], allowed: Sequence[list[int]]) -> Iterator[tuple[int, int]]:
            asked.extend(prompts)
            return ((place, tokens[0]) for place, tokens in enumerate(allowed))

    for length in (41, 42, 43, 60):  # the first leaves no room for anything but the letter
        row = {
            "row": 0,
            "made": {"finish_reason": "stop", "completion": "word " * 500},
            "prompt": "?",
            "prompt_token_ids": prompt,
            "choices": "AB",
        }
        limited = replace(engine.settings, max_model_len=length)
        assert [letter for _, letter in evaluate._force(Records(), limited, [row])] == ["A"]
        assert asked[-1][:40] == prompt
        assert len(asked[-1]) < length
        text = engine.tokenizer.decode(asked[-1][40:])
        assert f"{('word ' * 500).rstrip()}{evaluate.FORCING}".endswith(text)
    assert len({len(one) for one in asked}) > 1


def test_letters_that_a_tokenizer_writes_alike_are_refused(tmp_path: Path, config: Any) -> None:
    """One that knows no upper case cannot tell a from A."""
    folder = tmp_path / "model"
    folder.mkdir()
    models._random("llama", 0, folder)
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(values | {"normalizer": {"type": "Lowercase"}}), "utf-8")
    base = Base("lower", folder, "identity", False, None)
    cfg = config("model=tiny_random", "eval.max_tokens=8")
    example = Example("r0", "", "which?", "a", "a", choices="Aab")
    with pytest.raises(ConfigError, match=r"eval\.forced=true: .*'A' and 'a' alike.*set eval\.forced=false"):
        evaluate.prompts([example], base, "key", cfg.eval, 0)
    quiet = config("model=tiny_random", "eval.max_tokens=8", "eval.forced=false")
    assert evaluate.prompts([example], base, "key", quiet.eval, 0).rows
