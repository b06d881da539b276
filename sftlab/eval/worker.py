"""Generate answers in a child process: one engine, which completes questions and makes forced choices.

Every answer is written as soon as it is complete, so that a kill loses none.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Literal, TextIO

from pydantic import BaseModel, ConfigDict

from sftlab.eval.answers import ALIVE, FINISHED, FORCED, LETTERS, QUESTIONS, SPEED, Answer, Letters, Question, Speed
from sftlab.eval.engines import Engine, Settings, start
from sftlab.eval.forced import choose_letters, needs_choice
from sftlab.runtime.processes import serve
from sftlab.runtime.store import write_json


class Own(BaseModel):
    """Settings of the questions in one folder, such as those of a guard."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    pattern: str | None
    """Pattern of an answer, as in GenerateTask."""
    logprobs: bool
    """Whether to compute log-probabilities of letters, as in GenerateTask."""
    max_tokens: int
    """eval.max_tokens."""


class GenerateTask(BaseModel):
    """The task of one engine; its questions are in ``prompts.jsonl``."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    engine: Literal["vllm", "transformers"]
    """eval.engine."""
    settings: Settings
    """What the engine is started with."""
    pattern: str | None
    """Pattern of an answer; completions without a match get a forced choice. None: forced choices are off."""
    logprobs: bool
    """Whether to compute the log-probabilities of the letters directly after each question."""
    cores: list[int] | None
    """CPU cores that the engine may use; None: all."""
    also: list[Path] = []
    """Folders with further questions, which follow."""
    checkpoints: list[Path | None] = []
    """For each folder the checkpoint of the model that answers its questions; None or missing: the model itself."""
    own: list[Own | None] = []
    """For each folder its settings; None or missing: those of the task."""


def run(folder: Path, task: GenerateTask) -> None:
    """Start an engine, and answer the questions in each folder."""
    if task.cores is not None:
        os.sched_setaffinity(0, task.cores)  # before the import of torch, which starts a thread per core
    begin = time.monotonic()
    engine = start(task.engine, task.settings, _heartbeat(folder / ALIVE))
    start_seconds, limit = time.monotonic() - begin, task.settings.max_tokens
    for part, checkpoint, own in zip_longest((folder, *task.also), task.checkpoints, task.own):
        if checkpoint is not None:
            engine.load(checkpoint, part)
        speed = _answer(part, engine, task, own or Own(pattern=task.pattern, logprobs=task.logprobs, max_tokens=limit))
        write_json(part / SPEED, asdict(replace(speed, start_seconds=start_seconds)))


def _answer(folder: Path, engine: Engine, task: GenerateTask, own: Own) -> Speed:
    """Complete the questions of each repeat, then make the forced choices that the repeat needs.

    The letters directly after the questions are the same in every repeat, so they are computed in the first only.
    """
    begin = time.monotonic()
    questions = Question.read(folder / QUESTIONS)
    seconds, tokens = 0.0, 0
    with (
        (folder / FINISHED).open("w", encoding="utf-8") as finished,
        (folder / FORCED).open("w", encoding="utf-8") as forced,
        (folder / LETTERS).open("w", encoding="utf-8") as letters,
    ):
        for repeat, group in groupby(questions, key=attrgetter("repeat")):
            part = {question.row: question for question in group}
            todo = [question for question in part.values() if question.completion is None]
            begin_repeat = time.monotonic()
            prompts = [question.token_ids for question in todo]
            completions = engine.generate(prompts, seed=task.settings.seed + repeat, max_tokens=own.max_tokens)
            for place, completion in completions:
                row, text, reason = todo[place].row, completion.text, completion.finish_reason
                _append(finished, Answer(repeat, row, text, reason, len(completion.token_ids)))
                part[row] = replace(todo[place], completion=text, finish_reason=reason)
                tokens += len(completion.token_ids)
            seconds += time.monotonic() - begin_repeat
            if own.pattern is not None:
                lacking = [question for question in part.values() if not question.has_forced]
                silent = [question for question in lacking if needs_choice(question, own.pattern)]
                for question, logprobs in choose_letters(engine, task.settings, silent):
                    _append(forced, Letters(repeat, question.row, logprobs))
            if own.logprobs and repeat == 0:
                # An empty answer that was truncated: reasoning that the prompt opens is closed first.
                lacking = [question for question in part.values() if not question.has_letters]
                bare = [replace(question, completion="", finish_reason="length") for question in lacking]
                for question, logprobs in choose_letters(engine, task.settings, bare):
                    _append(letters, Letters(repeat, question.row, logprobs))
    return Speed(0.0, seconds, tokens, time.monotonic() - begin)


def _append(file: TextIO, record: Answer | Letters) -> None:
    file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
    file.flush()  # to the kernel, which keeps it if this process is killed


def _heartbeat(path: Path) -> Callable[[], None]:
    """Return a function that touches a file, at most five times per second: a step may take less than a millisecond."""
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            path.touch()
            last = time.monotonic()

    return beat


if __name__ == "__main__":
    serve(GenerateTask, run)
