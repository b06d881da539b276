"""Start generation engines in child processes on the questions of one or several sets of prompts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftlab.config import EvalConfig
from sftlab.errors import OutOfMemoryError, advised
from sftlab.eval.answers import ENGINE, QUESTIONS, SPEED, Question, Speed
from sftlab.eval.engines import Settings
from sftlab.eval.forced import answer_pattern, with_logprobs
from sftlab.eval.progress import progress
from sftlab.eval.prompts import Prompts, context_length
from sftlab.eval.worker import GenerateTask, Own
from sftlab.instance.machine import Machine
from sftlab.model.base import cache_bytes
from sftlab.runtime.processes import Child, children
from sftlab.runtime.store import write_json

# Advice if memory is too small and the model's config cannot be read.
SMALLER = (
    "to need less memory: a smaller eval.batch_size (engine transformers), eval.kv_cache_gib (vLLM on the CPU) or "
    "eval.max_tokens, a larger eval.tensor_parallel_size, or an instance= with more memory"
)


@dataclass(frozen=True)
class Model:
    """A model to evaluate: a folder, and the identity of its content.

    ``quantization`` is the format to which its weights are quantised when it is loaded, None for their own.
    """

    path: Path
    identity: str
    trust_remote_code: bool
    quantization: str | None = None


@dataclass(frozen=True)
class Asked:
    """The prompts of a stage, its unfinished folder, and the questions that need an engine.

    ``checkpoint`` is a checkpoint of the engine's model that answers them; None: the model itself. ``cfg`` has settings
    of their own; None: those of the engine.
    """

    folder: Path
    prompts: Prompts
    questions: Sequence[Question]
    checkpoint: Path | None = None
    cfg: EvalConfig | None = None

    def own(self) -> Own | None:
        """The settings of the questions, for the engine."""
        if self.cfg is None:
            return None
        return Own(pattern=answer_pattern(self.cfg), logprobs=with_logprobs(self.cfg), max_tokens=self.cfg.max_tokens)


def generate(
    asked: Sequence[Asked],
    model: Model,
    cfg: EvalConfig,
    machine: Machine,
    seed: int,
    lora_rank: int | None = None,
) -> Mapping[Path, float]:
    """Run engines on the questions of all sets, all at once, and write ``speed.json`` of each set.

    Tokens are summed over the engines; seconds are those of the slowest one. All sets have the same tokens that end a
    completion. Checkpoints of the model are loaded one after another, each by one engine; with ``lora_rank`` vLLM
    computes adapters of at most this rank beside the weights of the model.

    Returns:
        The seconds that the engines worked for each set, by its folder, without those of their start.
    """
    asked = sorted(asked, key=lambda one: one.checkpoint is not None)  # the weights of the model are loaded already
    loads = asked[-1].checkpoint is not None
    questions = [(place, question) for place, one in enumerate(asked) for question in one.questions]
    environments = machine.engines(cfg.tensor_parallel_size)[: len(asked) if loads else len(questions)]
    cores = _cores(machine, len(environments))
    longest = max(one.prompts.longest for one in asked)
    room = max(one.prompts.longest + (one.cfg or cfg).max_tokens for one in asked)
    settings = Settings(
        model=str(model.path.resolve()),
        trust_remote_code=model.trust_remote_code,
        stop_token_ids=asked[0].prompts.stop_token_ids,
        device=machine.device,
        dtype=cfg.dtype,
        max_model_len=min(context_length(model.path), room + 64),
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        seed=seed,
        batch_size=cfg.batch_size,
        tensor_parallel_size=cfg.tensor_parallel_size,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        kv_cache_gib=cfg.kv_cache_gib,
        lora_rank=lora_rank,
        quantization=model.quantization,
    )
    engines, parts = list[Child](), dict[Path, list[Path]]()
    for number, environment in enumerate(environments):
        # Round-robin over engines, so that each gets an equal share of every set and repeat, or of the checkpoints.
        share = questions[number :: len(environments)]
        if loads:
            share = [(place, question) for place, question in questions if place % len(environments) == number]
        folders, places = [], [*dict.fromkeys(place for place, _ in share)]
        for place in places:
            part = asked[place].folder / f"{ENGINE}{number}"
            part.mkdir()
            Question.write(part / QUESTIONS, [question for of, question in share if of == place])
            folders.append(part)
        task = GenerateTask(
            engine=cfg.engine,
            settings=settings,
            pattern=answer_pattern(cfg),
            logprobs=with_logprobs(cfg),
            cores=cores[number],
            also=folders[1:],
            checkpoints=[path and path.resolve() for path in (asked[place].checkpoint for place in places)],
            own=[asked[place].own() for place in places],
        )
        engines.append(Child(folders[0], task, environment))
        parts[folders[0]] = folders
    incomplete = sum(question.completion is None for _, question in questions)
    label = f"starting {len(engines)} × {cfg.engine}" if len(engines) > 1 else f"starting {cfg.engine}"
    with progress(parts, incomplete, label, cfg.stall_min) as watch:
        try:
            children("sftlab.eval.worker", engines, watch=watch)
        except OutOfMemoryError as error:
            raise advised(error, lambda: _smaller(model, longest, cfg, machine), otherwise=SMALLER) from error
    return {one.folder: _speed(one.folder, len(engines)) for one in asked if one.questions}


def _speed(folder: Path, engines: int) -> float:
    """Write the speed of all engines that worked for a set, and return the seconds of the slowest one."""
    files = sorted(folder.glob(f"{ENGINE}*/{SPEED}"))
    speeds = [Speed(**json.loads(file.read_text("utf-8"))) for file in files]
    seconds, tokens = max(speed.generate_seconds for speed in speeds), sum(speed.tokens for speed in speeds)
    summary = {
        "engines": engines,
        "start_seconds": round(max(speed.start_seconds for speed in speeds), 1),
        "generate_seconds": round(seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
    }
    write_json(folder / SPEED, summary)
    return max(speed.seconds for speed in speeds)


def _smaller(model: Model, longest: int, cfg: EvalConfig, machine: Machine) -> str:
    """List settings that need less memory, with the GiB that each takes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code, local_files_only=True)
    tokens = longest + cfg.max_tokens
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


def _cores(machine: Machine, engines: int) -> list[list[int] | None]:
    """Assign cores to each engine on the CPU: two that share cores wait for each other at every operation."""
    if machine.device != "cpu" or engines == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * engines
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // engines
    return [cores[number * size : (number + 1) * size] or None for number in range(engines)]
