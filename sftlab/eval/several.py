"""Answers of several checkpoints of one base model by one engine, which is loaded with each in turn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftlab.config import EvalConfig
from sftlab.eval import stage as evaluate
from sftlab.eval.answers import ENGINE, QUESTIONS, Question
from sftlab.eval.forced import answer_pattern, with_logprobs
from sftlab.eval.progress import progress
from sftlab.eval.prompts import Prompts
from sftlab.eval.stage import Generated, Model
from sftlab.eval.worker import GenerateTask, Part
from sftlab.instance.machine import Machine
from sftlab.runtime.processes import Child
from sftlab.runtime.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A model to generate with: the base model, or a checkpoint of it. ``identity`` is that of its weights."""

    checkpoint: Path | None
    identity: str


@dataclass(frozen=True)
class Work:
    """A variant without all of its answers: the folder in which its stage is built, and its open questions."""

    variant: Variant
    folder: Path
    questions: list[Question]


def make_all(
    store: Store,
    base: Model,
    variants: Sequence[Variant],
    prompts: Prompts,
    cfg: EvalConfig,
    machine: Machine,
    seed: int,
    lora_rank: int | None = None,
) -> list[Generated]:
    """Take the completions of each variant from the store, or generate those that are missing.

    An engine starts once, on each device, however many variants there are. Each variant has a stage of its own, so that
    completed answers survive a kill, and a longer sweep generates for its new checkpoints only.

    Args:
        store: The store.
        base: The base model, which the engine is started with.
        variants: The variants; equal ones (by ``identity``) are generated once.
        prompts: The prompts.
        cfg: Settings of the generation.
        machine: The machine.
        seed: Seed of sampled answers.
        lora_rank: Rank with which vLLM computes adapters beside the weights of the base model; None: each is merged
            into them when it is its turn.
    """
    keys = {}
    for variant in dict.fromkeys(variants):
        model = Model(base.path, variant.identity, base.trust_remote_code)
        keys[variant] = evaluate.inputs(model, prompts, cfg, machine.device, seed)
    made: dict[Variant, Generated] = {}

    def build(todo: Sequence[Variant], works: list[Work]) -> None:
        """Build the stage of the first variant, and within it those of the others: the engine starts in the last."""
        if not todo:
            if open_works := [work for work in works if work.questions]:
                _generate(open_works, base, prompts, cfg, machine, seed, lora_rank)
            return
        variant, *others = todo

        def inside(folder: Path) -> None:
            questions = evaluate.remaining(folder, store, keys[variant], prompts, cfg, seed)
            build(others, [*works, Work(variant, folder, questions)])
            evaluate.write(folder, prompts, cfg)

        made[variant] = evaluate.finished(store.stage("generations", keys[variant], inside, resumable=True))
        if made[variant].stage.cached:
            build(others, works)

    # The base model first: its weights are loaded already. Otherwise in the order of their keys, which is the same in
    # every process, so that no two wait for each other's locks.
    order = sorted(keys, key=lambda variant: store.path("generations", keys[variant]).name)
    build(order, [])
    return [made[variant] for variant in variants]


def _generate(
    works: Sequence[Work],
    base: Model,
    prompts: Prompts,
    cfg: EvalConfig,
    machine: Machine,
    seed: int,
    lora_rank: int | None,
) -> None:
    """Run one engine per device. Each loads its share of the variants, one after another."""
    ordered = sorted(works, key=lambda work: work.variant.checkpoint is not None)
    environments = machine.engines(cfg.tensor_parallel_size)[: len(ordered)]
    settings = replace(evaluate.settings_of(base, prompts, cfg, machine, seed), lora_rank=lora_rank)
    cores = evaluate.cores_of(machine, len(environments))
    engines: list[Child] = []
    answers: Mapping[Path, list[Path]] = {}
    for number, environment in enumerate(environments):
        share = ordered[number :: len(environments)]
        parts = []
        for work in share:
            part = work.folder / f"{ENGINE}0"
            part.mkdir()
            Question.write(part / QUESTIONS, work.questions)
            checkpoint = work.variant.checkpoint
            parts.append(Part(checkpoint=checkpoint and checkpoint.resolve(), folder=part.resolve()))
        own = share[0].folder / f"{ENGINE}1"
        own.mkdir()
        task = GenerateTask(
            engine=cfg.engine,
            settings=settings,
            pattern=answer_pattern(cfg),
            logprobs=with_logprobs(cfg),
            cores=cores[number],
            parts=parts,
        )
        engines.append(Child(own, task, environment))
        answers = {**answers, own: [part.folder for part in parts]}
    incomplete = sum(question.completion is None for work in ordered for question in work.questions)
    log.info("evaluate: %d models in turn, %d answers, with %s", len(ordered), incomplete, cfg.engine)
    folders = [engine.folder for engine in engines]
    with progress(folders, incomplete, f"starting {cfg.engine}", cfg.stall_min, answers) as watch:
        evaluate.run_engines(engines, watch, base, prompts, cfg, machine)
