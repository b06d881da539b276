"""Generation: each prompt once and in the order of the test set, with any number of engines and after any fault."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model
from test_faults import stage_processes

from sftlab.config import Config
from sftlab.errors import ConfigError, StageError
from sftlab.eval import launch, progress, worker
from sftlab.eval import stage as evaluate
from sftlab.eval.answers import ALIVE, FINISHED, FORCED, Answer, Answers, Letters, Question
from sftlab.eval.engines import Completion
from sftlab.eval.forced import FORCING, choose_letters
from sftlab.eval.prompts import Prompt, Prompts, tokenize_prompts
from sftlab.eval.scorers import scorer
from sftlab.eval.stage import Model
from sftlab.instance import machine as instance
from sftlab.instance.machine import Machine
from sftlab.model import base as models
from sftlab.records import Example, Generation, Prediction, single_turn
from sftlab.runtime.processes import Child
from sftlab.runtime.store import Store

Make = Callable[..., Config]
CPU = Machine("cpu", "cpu", 1, "sdpa")
PROMPTS = Prompts([Prompt(f"q{n}", f"Question {n}", [n, n, n], "AB") for n in range(7)], {})


@pytest.fixture
def model(tmp_path: Path) -> Model:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}', "utf-8")
    return Model(tmp_path / "model", "identity", False)


def settings(config: Make, *overrides: str) -> Any:
    letters = "eval.logprobs=false"  # the engines of most tests are stand-ins
    return config("model=tiny_random", "eval.max_tokens=8", "eval.dtype=bfloat16", letters, *overrides).eval


def answer(repeat: int, row: int, text: str | None = None) -> Answer:
    return Answer(repeat, row, text or f"{repeat}.{row}: the answer is (A)", "stop", 5)


def line(record: Any) -> str:
    return json.dumps(asdict(record)) + "\n"


CHOSEN = {"A": -2.0, "B": -1.0}
Prompted = list[list[int]]


class Engines:
    """Stands in for child processes: writes what they write, and can die in the middle."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.dies_after = dies_after
        self.asked: list[list[tuple[int, int]]] = []

    def all(self) -> list[tuple[int, int]]:
        return sorted(prompt for engine in self.asked for prompt in engine)

    def __call__(self, module: str, tasks: list[Child], **_: Any) -> None:
        for task in tasks:
            rows = Question.read(task.folder / "prompts.jsonl")
            self.asked.append([(row.repeat, row.row) for row in rows])
            lines = [line(answer(row.repeat, row.row)) for row in reversed(rows)]  # engines finish in any order
            if self.dies_after is not None:
                cut = "".join(lines[: self.dies_after]) + lines[self.dies_after][:20]
                (task.folder / FINISHED).write_text(cut, "utf-8")
                continue
            (task.folder / FINISHED).write_text("".join(lines), "utf-8")
            speed = {"start_seconds": 1.0, "generate_seconds": 2.0 + len(self.asked), "tokens": 5 * len(rows)}
            (task.folder / "speed.json").write_text(json.dumps(speed), "utf-8")
        if self.dies_after is not None:
            raise StageError("ended by SIGKILL")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    engines = Engines()
    monkeypatch.setattr(launch, "children", engines)
    return engines


def texts(generated: evaluate.Generated, repeat: int = 0) -> list[str]:
    return [row.completion for row in generated.rows(repeat)]


def test_engines_share_the_prompts_and_the_result_has_the_order_of_the_test_set(
    tmp_path: Path, config: Make, model: Model, engines: Engines
) -> None:
    machine = replace(CPU, num_processes=3)
    generated = evaluate.make(Store(tmp_path / "store"), model, PROMPTS, settings(config), machine, 0)
    assert engines.all() == [(0, number) for number in range(7)]
    assert sorted(map(len, engines.asked)) == [2, 2, 3]
    assert [row.id for row in generated.rows()] == [f"q{number}" for number in range(7)]
    assert texts(generated) == [f"0.{number}: the answer is (A)" for number in range(7)]
    assert sorted(path.name for path in generated.stage.path.iterdir()) == [
        "generations.jsonl",
        "manifest.json",
        "speed.json",
    ]
    speed = json.loads((generated.stage.path / "speed.json").read_text("utf-8"))
    assert speed == {
        "engines": 3,
        "start_seconds": 1.0,
        "generate_seconds": 5.0,
        "tokens": 35,
        "tokens_per_second": 7.0,
    }


def test_no_engine_is_started_without_a_prompt(tmp_path: Path, config: Make, model: Model, engines: Engines) -> None:
    few = Prompts(PROMPTS.rows[:2], {})
    machine = replace(CPU, num_processes=4)
    for _ in range(2):
        generated = evaluate.make(Store(tmp_path / "store"), model, few, settings(config), machine, 0)
    assert generated.stage.cached
    assert engines.asked == [[(0, 0)], [(0, 1)]]


def test_the_number_of_engines_is_not_in_the_key(config: Make, model: Model) -> None:
    first, second = (settings(config, f"eval.batch_size={size}") for size in (1, 2))
    assert evaluate.inputs(model, PROMPTS, first, "cpu", 0) == evaluate.inputs(model, PROMPTS, second, "cpu", 0)
    assert "repeats" not in evaluate.inputs(model, PROMPTS, first, "cpu", 0)


def test_completed_answers_are_reused_and_a_truncated_line_is_ignored(
    tmp_path: Path, config: Make, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, eval_settings = Store(tmp_path / "store"), settings(config)
    monkeypatch.setattr(launch, "children", dying := Engines(dies_after=2))
    with pytest.raises(StageError, match="SIGKILL"):
        evaluate.make(store, model, PROMPTS, eval_settings, replace(CPU, num_processes=2), 0)
    monkeypatch.setattr(launch, "children", living := Engines())
    generated = evaluate.make(store, model, PROMPTS, eval_settings, replace(CPU, num_processes=3), 0)
    reused = {prompt for asked in dying.asked for prompt in asked[-2:]}
    assert living.all() == sorted({(0, number) for number in range(7)} - reused)
    assert texts(generated) == [f"0.{number}: the answer is (A)" for number in range(7)]
    assert not list(generated.stage.path.glob("engine-*"))


# — faults after the last answer —


class Fault:
    """A fault at the n-th file operation below a folder: a kill, or a disk that is full from then on.

    Python raises an audit event before each operation, also for those of its standard library.
    """

    armed: Fault | None = None

    def __init__(self, folder: Path, at: int, kind: str) -> None:
        self.folder, self.at, self.kind, self.seen = str(folder), at, kind, 0

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.mkdir"):
            return
        if not isinstance(values[0], str | Path) or not str(values[0]).startswith(self.folder):
            return
        writes = event != "open" or bool(values[2] & (os.O_WRONLY | os.O_RDWR))
        if str(values[0]).endswith(".lock") or not writes:
            return
        self.seen += 1
        if self.seen <= self.at:
            return
        if self.kind == "killed":
            os._exit(9)
        if event == "open":
            raise OSError(errno.ENOSPC, "No space left on device", str(values[0]))


sys.addaudithook(lambda event, values: Fault.armed and Fault.armed(event, values))


def faulty(make: Callable[[], Any], store: Path, at: int, kind: str) -> int:
    """Build the stage in a forked process, which fails at an operation after the engines' end; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 0
        run = launch.children

        def then_fail(*arguments: Any, **options: Any) -> None:
            run(*arguments, **options)
            Fault.armed = Fault(store, at, kind)

        launch.children = then_fail
        try:
            make()
        except StageError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "expected"), [("killed", 9), ("full", 1)])
def test_a_fault_after_the_last_answer_loses_no_answer(
    tmp_path: Path, config: Make, model: Model, monkeypatch: pytest.MonkeyPatch, kind: str, expected: int
) -> None:
    """Whichever file operation fails, nothing is generated again."""
    eval_settings, points = settings(config, "eval.repeats=2"), 0
    names = ["generations-2.jsonl", "generations.jsonl", "manifest.json", "speed.json"]
    for at in range(100):
        store = Store(tmp_path / f"{kind}-{at}")
        make = partial(evaluate.make, store, model, PROMPTS, eval_settings, CPU, 0)
        monkeypatch.setattr(launch, "children", Engines())
        code = faulty(make, store.root, at, kind)
        monkeypatch.setattr(launch, "children", again := Engines())
        generated = make()
        assert again.asked == [], f"operation {at}"
        assert texts(generated, 1) == [f"1.{number}: the answer is (A)" for number in range(7)]
        assert json.loads((generated.stage.path / "speed.json").read_text("utf-8")).keys() >= {"engines", "tokens"}
        assert sorted(path.name for path in generated.stage.path.glob("[!.]*")) == names, f"operation {at}"
        if code == 0:
            break
        assert code == expected
        points += 1
    assert points >= 5  # two files of generations, speed, manifest, and at least one rename


def test_complete_answers_of_a_killed_run_need_no_engine(
    tmp_path: Path, config: Make, model: Model, engines: Engines
) -> None:
    store, eval_settings = Store(tmp_path / "store"), settings(config)
    folder = store.path("generations", evaluate.inputs(model, PROMPTS, eval_settings, "cpu", 0))
    part = folder.with_name(folder.name + ".partial") / "engine-0"
    part.mkdir(parents=True)
    (part / FINISHED).write_text("".join(line(answer(0, row, f"silence {row}")) for row in range(7)), "utf-8")
    (part / FORCED).write_text("".join(line(Letters(0, row, CHOSEN)) for row in range(7)), "utf-8")
    generated = evaluate.make(store, model, PROMPTS, eval_settings, CPU, 0)
    assert engines.asked == []
    assert generated.rows()[6] == Generation("q6", "Question 6", "silence 6", "stop", 5, "B", CHOSEN)


def answers(texts: dict[int, str]) -> Answers:
    """Answers of the first repeat; those of some rows with another text."""
    return {(0, row): answer(0, row, texts.get(row)) for row in range(7)}


def test_only_the_forced_choice_is_made_for_an_answer_that_lacks_it(config: Make) -> None:
    done = answers({3: "no letter", 5: "no letter"})
    done[0, 5] = replace(done[0, 5], forced=CHOSEN)
    questions = evaluate._questions(PROMPTS, settings(config), 0, done)
    assert [(question.row, question.completion) for question in questions] == [(3, "no letter")]
    assert evaluate._questions(PROMPTS, settings(config, "eval.forced=false"), 0, done) == []


def test_only_the_letters_after_the_question_are_computed_if_they_are_missing(config: Make) -> None:
    done = {place: replace(one, letters=CHOSEN if place[1] != 4 else None) for place, one in answers({}).items()}
    done |= {(1, row): answer(1, row) for row in range(7)}  # repeats need none
    asked = evaluate._questions(PROMPTS, settings(config, "eval.logprobs=true", "eval.repeats=2"), 0, done)
    assert [(question.repeat, question.row, question.completion) for question in asked] == [
        (0, 4, done[0, 4].completion)
    ]


def test_each_repeat_has_its_own_order_and_the_first_that_of_the_test_set(config: Make) -> None:
    questions = evaluate._questions(PROMPTS, settings(config, "eval.repeats=3"), 0, {})
    orders = [[question.row for question in questions if question.repeat == repeat] for repeat in range(3)]
    assert orders[0] == list(range(7))
    assert sorted(orders[1]) == sorted(orders[2]) == orders[0]
    assert orders[1] != orders[0] != orders[2] != orders[1]
    assert questions == evaluate._questions(PROMPTS, settings(config, "eval.repeats=3"), 0, {})


def test_more_repeats_reuse_the_finished_ones(tmp_path: Path, config: Make, model: Model, engines: Engines) -> None:
    store = Store(tmp_path / "store")
    evaluate.make(store, model, PROMPTS, settings(config), CPU, 0)
    engines.asked.clear()
    three = evaluate.make(store, model, PROMPTS, settings(config, "eval.repeats=3"), CPU, 0)
    assert engines.all() == [(repeat, number) for repeat in (1, 2) for number in range(7)]
    assert [texts(three, repeat)[2] for repeat in range(3)] == [f"{repeat}.2: the answer is (A)" for repeat in range(3)]
    engines.asked.clear()
    two = evaluate.make(store, model, PROMPTS, settings(config, "eval.repeats=2"), CPU, 0)
    assert engines.asked == []
    assert texts(two, 1) == texts(three, 1)


def test_answers_are_reused_by_the_same_prompts_of_other_test_sets_and_by_other_seeds(
    tmp_path: Path, config: Make, model: Model, engines: Engines
) -> None:
    store = Store(tmp_path / "store")
    few, all_rows = (Prompts(PROMPTS.rows[:count], {"rows": str(count), "tokenizer": "t"}) for count in (3, 7))
    evaluate.make(store, model, few, settings(config), CPU, 0)
    engines.asked.clear()
    generated = evaluate.make(store, model, all_rows, settings(config), CPU, 1)
    assert engines.all() == [(0, number) for number in (3, 4, 5, 6)]
    assert texts(generated) == [f"0.{number}: the answer is (A)" for number in range(7)]
    engines.asked.clear()
    evaluate.make(store, model, all_rows, settings(config), CPU, 2)
    assert engines.asked == []
    other = Prompts([replace(PROMPTS.rows[0], text="Another question")], {"rows": "x", "tokenizer": "t"})
    for prompts in (other, replace(few, key={**few.key, "tokenizer": "u"})):
        engines.asked.clear()
        evaluate.make(store, model, prompts, settings(config), CPU, 0)
        assert engines.all() == [(0, number) for number in range(len(prompts.rows))]
    Generation.write(
        generated.stage.path / "generations.jsonl", [Generation("q6", "Question 6", "", "stop", 5, "B", CHOSEN)]
    )
    for choices, count in (("AB", 0), ("ABC", 1)):  # letters are those of other options
        engines.asked.clear()
        more = Prompts([replace(PROMPTS.rows[6], choices=choices)], {"rows": choices, "tokenizer": "t"})
        evaluate.make(store, model, more, settings(config), CPU, 0)
        assert len(engines.all()) == count
    engines.asked.clear()
    evaluate.make(store, model, few, settings(config, "eval.temperature=1"), CPU, 0)
    evaluate.make(store, model, few, settings(config, "eval.temperature=1"), CPU, 1)
    assert engines.all() == sorted(2 * [(0, number) for number in range(3)])


# — stall detection —


class Clock:
    """The time that stall detection reads; the engines below advance it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


CLOCK = Clock()


class Slow(Engines):
    """Engines that take longer than eval.stall_min for their first completion and for each forced choice."""

    def __init__(self, signs: list[str]) -> None:
        super().__init__()
        self.signs = signs

    def __call__(self, module: str, tasks: list[Child], **options: Any) -> None:
        for sign in self.signs:
            for task in tasks:
                (task.folder / FINISHED).touch()
                path = task.folder / sign
                path.write_text(
                    (path.read_text("utf-8") if path.is_file() else "") + "{}\n" * (sign == FORCED), "utf-8"
                )
            for _ in range(4):
                CLOCK.now += 0.1
                options["watch"]([task.folder for task in tasks])
        for task in tasks:
            (task.folder / FORCED).unlink(missing_ok=True)
        super().__call__(module, tasks)


@pytest.mark.parametrize("sign", [ALIVE, FORCED])
def test_an_engine_with_signs_of_life_is_not_ended(tmp_path: Path, config: Make, model: Model, sign: str) -> None:
    cfg = settings(config, "eval.stall_min=0.01")  # 0.6 s, and the engine takes 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", CLOCK)
        patch.setattr(launch, "children", Slow([sign] * 5))
        assert len(evaluate.make(Store(tmp_path / "store"), model, PROMPTS, cfg, CPU, 0).rows()) == 7
        patch.setattr(launch, "children", Slow([sign, "nothing", "nothing"]))
        with pytest.raises(StageError, match=r"made no progress for 0\.01 minutes.*raise eval\.stall_min"):
            evaluate.make(Store(tmp_path / "silent"), model, PROMPTS, cfg, CPU, 0)


class OneHangs(Engines):
    """Two engines: one works for longer than eval.stall_min, the other ends at once or hangs."""

    def __init__(self, ends: bool) -> None:
        super().__init__()
        self.ends = ends

    def __call__(self, module: str, tasks: list[Child], **options: Any) -> None:
        folders = [task.folder for task in tasks]
        for folder in folders:
            (folder / FINISHED).touch()
        for _ in range(12):
            (folders[0] / ALIVE).touch()
            options["watch"](folders[:1] if self.ends else folders)
            CLOCK.now += 0.1
        super().__call__(module, tasks)


def test_an_engine_that_hangs_beside_a_working_engine_is_ended(tmp_path: Path, config: Make, model: Model) -> None:
    cfg, two = settings(config, "eval.stall_min=0.01"), replace(CPU, num_processes=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", CLOCK)
        patch.setattr(launch, "children", OneHangs(ends=False))
        with pytest.raises(StageError, match=r"an engine made no progress"):
            evaluate.make(Store(tmp_path / "hangs"), model, PROMPTS, cfg, two, 0)
        patch.setattr(launch, "children", OneHangs(ends=True))
        assert len(evaluate.make(Store(tmp_path / "ends"), model, PROMPTS, cfg, two, 0).rows()) == 7


# — devices —


def test_each_engine_has_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("large", "cuda", 4, "sdpa")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [shown["CUDA_VISIBLE_DEVICES"] for shown in machine.engines(1)] == ["0", "1", "2", "3"]
    assert [shown["CUDA_VISIBLE_DEVICES"] for shown in machine.engines(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5a,3,1,0")
    assert [shown["CUDA_VISIBLE_DEVICES"] for shown in machine.engines(2)] == ["7,GPU-5a", "3,1"]


def test_vllm_samples_without_flashinfer_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer compiles its kernels, which needs a complete CUDA toolkit."""
    name = "VLLM_USE_FLASHINFER_SAMPLER"
    monkeypatch.delenv(name, raising=False)
    machine = Machine("medium", "cuda", 2, "sdpa")
    assert [shown[name] for shown in [*machine.engines(1), *machine.engines(2)]] == ["0", "0", "0"]
    assert all(name not in shown for shown in Machine("cpu", "cpu", 2, "sdpa").engines(1))
    monkeypatch.setenv(name, "1")
    assert all(name not in shown for shown in machine.engines(1))


def test_engines_on_the_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 5, 7})
    assert launch._cores(CPU, 2) == [[0, 2], [4, 5]]
    assert launch._cores(CPU, 6) == [None] * 6  # fewer cores than engines: all share them
    assert launch._cores(CPU, 1) == [None]
    assert launch._cores(Machine("large", "cuda", 2, "sdpa"), 2) == [None, None]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["instance=large", "instance.num_processes=4", "eval.tensor_parallel_size=3"], "does not divide the 4 GPUs"),
        (["instance=cpu", "eval.tensor_parallel_size=2"], "this runs on the CPU"),
        (["instance=large", "eval.engine=transformers", "eval.tensor_parallel_size=2"], "only vLLM shards"),
    ],
)
def test_an_impossible_tensor_parallel_size_is_refused(config: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"eval.tensor_parallel_size=.*{message}"):
        config(*overrides)


# — real engines —


def real(config: Make, tmp_path: Path, *overrides: str) -> tuple[Any, ...]:
    cfg = config("model=tiny_random", "dataset.max_rows=48", "eval.dtype=bfloat16", *overrides)
    base = models.resolve(cfg.model, Store(tmp_path / "store"), 0)
    user = "Which of these is it? " * 3
    examples = [
        Example(f"q{n}", single_turn("Answer the question.", f"{user}{'x' * n}", ""), "A", choices="ABC")
        for n in range(12)
    ]
    prompts = tokenize_prompts(examples, base, cfg.eval)
    return Model(base.path, base.identity, False), prompts, cfg.eval, instance.find(cfg.instance), 0


@pytest.mark.smoke
def test_two_vllm_engines_answer_like_a_single_engine(tmp_path: Path, config: Make) -> None:
    settings = ["eval=vllm", "eval.max_tokens=24", "instance=cpu"]
    single = evaluate.make(Store(tmp_path / "one"), *real(config, tmp_path, *settings))
    two = evaluate.make(Store(tmp_path / "two"), *real(config, tmp_path, *settings, "instance.num_processes=2"))
    assert json.loads((two.stage.path / "speed.json").read_text("utf-8"))["engines"] == 2
    assert [row.id for row in single.rows()] == [f"q{number}" for number in range(12)]
    assert len({row.completion for row in single.rows()}) > 1
    assert two.rows() == single.rows()
    assert two.stage.key == single.stage.key


@pytest.mark.smoke
@pytest.mark.parametrize("stops", ["at its start", "at work"])
def test_an_engine_that_hangs_is_ended(tmp_path: Path, config: Make, stops: str) -> None:
    """A process stopped by SIGSTOP is as silent as one that hangs."""
    minutes = {"at its start": 0.01, "at work": 0.3}[stops]
    settings = ["eval.engine=transformers", "eval.batch_size=1", "eval.max_tokens=80", "instance=cpu"]
    store = Store(tmp_path / "store")
    model, prompts, cfg, machine, seed = real(config, tmp_path, *settings, f"eval.stall_min={minutes}")

    ended = threading.Event()

    def stop_when_at_work() -> None:
        while not list(tmp_path.glob(f"store/generations/*/engine-0/{FINISHED}")):
            if ended.wait(0.01):  # a busy machine, on which the engine did not start
                return
        (engine,) = (pid for pid, _ in stage_processes(os.getpid()))
        os.kill(engine, signal.SIGSTOP)

    if stops == "at work":
        threading.Thread(target=stop_when_at_work, daemon=True).start()
    with pytest.raises(StageError, match=r"an engine (did not start|made no progress) for 0\.\d+ minutes and was"):
        evaluate.make(store, model, prompts, cfg, machine, seed)
    ended.set()
    assert list(stage_processes(os.getpid())) == []
    patient = cfg.model_copy(update={"stall_min": 30.0})
    assert len(evaluate.make(store, model, prompts, patient, machine, seed).rows()) == len(prompts.rows)


@pytest.mark.smoke
def test_forced_choices_survive_an_engine_that_dies(tmp_path: Path, config: Make) -> None:
    store = Store(tmp_path / "store")
    arguments = real(config, tmp_path, "eval=transformers", "eval.batch_size=1", "eval.max_tokens=4", "instance=cpu")

    def choices() -> list[Path]:
        return [path for path in tmp_path.glob(f"store/generations/*.partial/engine-0/{FORCED}") if _size(path)]

    def kill_when_choosing() -> None:
        while not choices():
            time.sleep(0.001)
        (child,) = (pid for pid, _ in stage_processes(os.getpid()))
        os.kill(child, signal.SIGKILL)

    threading.Thread(target=kill_when_choosing, daemon=True).start()
    with pytest.raises(StageError, match="ended by SIGKILL"):
        evaluate.make(store, *arguments)
    (file,) = choices()
    first = json.loads(file.read_text("utf-8").split("\n")[0])
    file.write_text(json.dumps(first | {"logprobs": {"A": -9, "B": -1, "C": -2}}) + "\n", "utf-8")
    rows = evaluate.make(store, *arguments).rows()
    assert rows[first["row"]].forced_logprobs == {"A": -9, "B": -1, "C": -2}
    assert rows[first["row"]].forced == "B"
    assert {row.forced for row in rows} <= {"A", "B", "C"}
    # One token is no answer, so each row has letters after its text, and all have those after the question.
    assert all(set(row.logprobs or "") == set(row.forced_logprobs or "") == set("ABC") for row in rows)
    assert any(row.logprobs != row.forced_logprobs for row in rows)


@pytest.mark.smoke
def test_answers_survive_a_vllm_engine_that_dies(tmp_path: Path, config: Make) -> None:
    store = Store(tmp_path / "store")
    arguments = real(config, tmp_path, "eval=vllm", "eval.max_tokens=60", "eval.forced=false", "instance=cpu")

    def answers() -> list[Path]:
        files = tmp_path.glob(f"store/generations/*.partial/engine-0/{FINISHED}")
        return [path for path in files if _size(path)]

    def kill_when_at_work() -> None:
        while not answers():
            time.sleep(0.001)
        (engine,) = (pid for pid, _ in stage_processes(os.getpid()))
        os.kill(engine, signal.SIGKILL)

    threading.Thread(target=kill_when_at_work, daemon=True).start()
    with pytest.raises(StageError, match=r"sftlab\.eval\.worker: ended by SIGKILL"):
        evaluate.make(store, *arguments)
    (file,) = answers()
    lines = file.read_text("utf-8").split("\n")
    first = json.loads(lines[0])
    # The first shows whether it is generated again; the last may be truncated by the kill.
    lines[0] = json.dumps(first | {"completion": "reused"})
    lines.append(lines.pop() or lines[0][:9])
    file.write_text("\n".join(lines), "utf-8")
    generated = evaluate.make(store, *arguments)
    assert generated.rows()[first["row"]].completion == "reused"
    assert len({row.id for row in generated.rows()}) == 12
    assert not list(generated.stage.path.glob("engine-*"))
    speed = json.loads((generated.stage.path / "speed.json").read_text("utf-8"))
    assert speed["tokens"] <= 11 * 60


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


@pytest.mark.smoke
def test_vllm_without_memory_for_its_cache_names_the_setting(
    tmp_path: Path, config: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = real(config, tmp_path, "eval=vllm", "eval.max_tokens=8", "eval.kv_cache_gib=4000", "instance=cpu")
    with pytest.raises(StageError, match=r"eval: out of memory: .*\(4000\.0 GiB\)") as caught:
        evaluate.make(Store(tmp_path / "store"), *arguments)
    assert "(70 tokens); to need less:\n  eval.kv_cache_gib=1: instead of 4000 GiB of cache\n" in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_the_settings_to_change_on_gpus_and_with_the_other_engine(tmp_path: Path, config: Make, model: Model) -> None:
    vllm = launch._smaller(model, PROMPTS.longest, settings(config), Machine("large", "cuda", 4, "sdpa"))
    assert "eval.gpu_memory_utilization: now 0.9; lower if" in vllm
    assert "eval.tensor_parallel_size=2: 0.00 GiB of weights per GPU" in vllm
    batches = launch._smaller(model, PROMPTS.longest, settings(config, "eval.engine=transformers"), CPU)
    assert "eval.batch_size=8: 0.04 GiB of cache\n  eval.batch_size=1:" in batches


# — repeats, as they are reported —


def predicted(answers: str, target: str = "A") -> list[Prediction]:
    readings = [{"strict": letter if letter != "-" else None, "forced": "A"} for letter in answers]
    return [
        Prediction(f"q{number}", "", "", "stop", row["strict"], target, row["strict"] == target, None, row)
        for number, row in enumerate(readings)
    ]


def test_repeats_tell_how_much_answers_change(config: Make) -> None:
    cfg = config("model=tiny_random")
    score = scorer(cfg.eval)
    found = score.repeats([predicted("AAB-"), predicted("ABB-"), predicted("AAAA")])
    assert (found.values, found.changed, found.noise, found.forced_noise) == ([0.5, 0.25, 1.0], 3, 0.75, 0.0)
    # Three, one, two and one of three answers are right.
    assert found.pass_at == pytest.approx({1: 7 / 12, 2: (1 + 2 / 3 + 1 + 2 / 3) / 4, 3: 1})
    assert found.majority == pytest.approx((1 + 1 + 0 + 1) / 4)


@pytest.mark.slow
def test_repeats_are_averaged_and_tell_more_than_one_generation(config: Make) -> None:
    score = scorer(config("model=tiny_random").eval)
    first = [predicted("ABBB" * 10), predicted("BABB" * 10), predicted("BBAB" * 10)]
    second = [predicted("AABB" * 10), predicted("BAAB" * 10), predicted("ABAB" * 10)]
    one, three = score.comparison(first[:1], second[:1]), score.comparison(first, second)
    assert (one.baseline, one.finetuned) == (0.25, 0.5)
    assert (three.baseline, three.finetuned) == (0.25, 0.5)
    assert three.p_value < one.p_value
    assert three.n == 40
    assert three.smallest_visible_difference is not None
    assert one.smallest_visible_difference is not None
    assert three.smallest_visible_difference < one.smallest_visible_difference
    result = score.result(first)
    assert (result.value, result.n, result.answers, result.correct) == (0.25, 40, 120, 30)
    assert result.interval[1] - result.interval[0] < 0.8 * (
        score.result(first[:1]).interval[1] - score.result(first[:1]).interval[0]
    )


# — reasoning —


def test_a_letter_in_reasoning_only_is_not_an_answer_and_one_is_forced(config: Make) -> None:
    closed = "<think>Suppose the answer is (A).</think> The answer is (B)"
    done = answers({2: "<think>Suppose the answer is (A). Then", 4: closed})
    assert [question.row for question in evaluate._questions(PROMPTS, settings(config), 0, done)] == [2]
    opened = Prompts([replace(prompt, text="<assistant><think>\n") for prompt in PROMPTS.rows], {})
    silent = [question.row for question in evaluate._questions(opened, settings(config), 0, done)]
    assert silent == [0, 1, 2, 3, 5, 6]


def test_truncated_reasoning_is_closed_before_a_letter_is_forced(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    folder = write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked: list[list[int]] = []

    class Engine:
        def logprobs(self, prompts: Prompted, tokens: Prompted) -> Iterator[tuple[int, dict[int, float]]]:
            asked.extend(prompts)
            yield from enumerate(dict.fromkeys(own, -1.0) for own in tokens)

    texts = ["<think>Suppose (A)", "It depends."]
    silent = [Question(0, row, "Q", [5], "AB", text, "length") for row, text in enumerate(texts)]
    engine_settings: Any = SimpleNamespace(model=str(folder), trust_remote_code=False, max_model_len=2048)
    assert len(list(choose_letters(Engine(), engine_settings, silent))) == 2  # type: ignore[arg-type]
    assert [tokenizer.decode(prompt[1:]) for prompt in asked] == [
        f"<think>Suppose (A)\n</think>{FORCING}",
        f"It depends.{FORCING}",
    ]


def test_questions_with_settings_of_their_own_share_the_start_of_an_engine(
    tmp_path: Path, config: Make, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, tasks = settings(config, "eval.forced=true"), list[Any]()
    other = cfg.model_copy(update={"max_tokens": 3, "task": "exact", "forced": False})

    def children(module: str, started: list[Child], **_: Any) -> None:
        for child in started:
            task: Any = child.task
            tasks.append(task)
            worker.run(child.folder, task)

    class Echo:
        def generate(self, prompts: Any, *, seed: int, max_tokens: int) -> Any:
            yield from ((n, Completion(f"{max_tokens} the answer is (A)", [1], "stop")) for n in range(len(prompts)))

    monkeypatch.setattr(launch, "children", children)
    monkeypatch.setattr(worker, "start", lambda *_: Echo())
    rows = [Prompt(f"q{n}", "text", [1, 2], "") for n in range(3)]
    requests = [
        evaluate.Request("m", Prompts(rows, {"set": "a"}, [0])),
        evaluate.Request("m", Prompts(rows, {"set": "b"}, [0]), cfg=other),
    ]
    machine = instance.find(config("instance=cpu").instance)
    first, second = evaluate.make_each(Store(tmp_path / "store"), model, requests, cfg, machine, 0)
    assert [row.completion for row in first.rows()] == ["8 the answer is (A)"] * 3
    assert [row.completion for row in second.rows()] == ["3 the answer is (A)"] * 3
    assert len(tasks) == 1
    (alone,) = evaluate.make_all(
        Store(tmp_path / "store"), replace(model, identity="m"), [Prompts(rows, {"set": "b"}, [0])], other, machine, 0
    )
    assert alone.stage.cached
