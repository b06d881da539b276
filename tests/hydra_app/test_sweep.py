"""Jobs of a sweep: what they share, how they are ranked, how failed ones are reported, and which folders they use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import REPORTED, quick, refused

from sftlab.config import Config
from sftlab.records import Candidate
from sftlab.report import files, terminal
from sftlab.results import Status
from sftlab.runtime.job import OWN, Job, jobs, trained_as
from sftlab.runtime.run import Run, hold
from sftlab.runtime.store import Store
from sftlab.train.ranking import comparable
from sftlab.train.select import select

Compose = Callable[..., Config]
WSD = [
    "train.lr_scheduler_type=warmup_stable_decay",
    "train.warmup_steps=2",
    "+train.lr_scheduler_kwargs.num_decay_steps=3",
]


def job(number: int, cfg: Config, family: str | None, status: Status = "success") -> Job:
    return Job(number=number, overrides=[], config=cfg.model_dump(), status=status, family=family)


def changed(one: Job, **fields: Any) -> Job:
    return one.model_copy(update=fields)


def test_the_table_shows_which_jobs_share_steps(config: Compose) -> None:
    def epochs(count: int, *more: str) -> Config:
        return config(f"train.num_train_epochs={count}", *more)

    constant = [job(0, epochs(1), "a"), job(1, epochs(3), "a"), job(2, epochs(3), "a"), job(3, epochs(5), None)]
    assert [trained_as(one, constant) for one in constant] == [
        "the first epochs of job 1",
        OWN,
        "the same as job 1",
        OWN,
    ]
    decayed = [job(0, epochs(1, *WSD), "b"), job(1, epochs(2, *WSD), "b")]
    assert [trained_as(one, decayed) for one in decayed] == ["a decay of 3 steps from job 1", OWN]


def candidate(job: int, epoch: float, loss: float) -> Candidate:
    return Candidate(loss, epoch, int(epoch), f"job-{job}/checkpoint-{int(epoch)}", job, [], None, 1.0)


@pytest.mark.slow
def test_answers_rank_before_the_loss() -> None:
    made = [candidate(0, 1, 0.5), candidate(0, 2, 0.7), candidate(1, 1, 0.6)]
    right = [[0.0] * 40, [1.0] * 39 + [0.0], [1.0] * 39 + [0.0]]
    chosen = select(made, "lowest", right)
    assert chosen.chosen == chosen.best == replace(made[2], score=39 / 40)  # equal answers: the lower loss
    assert [row.score for row in chosen.candidates] == [0, 39 / 40, 39 / 40]
    assert {row.job for row in chosen.ties} == {0, 1}
    assert len(chosen.ties) == 2


def test_jobs_that_cannot_be_ranked_together_are_reported_with_a_remedy(
    config: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config()
    first, second = ({"validation tokens": "a", "autocast": dtype} for dtype in ("bfloat16", None))
    made = [changed(job(number, cfg, None), comparable=what) for number, what in enumerate((first, second, first))]
    groups = comparable(made)
    assert [[one.number for one in group] for group in groups] == [[0, 2], [1]]
    assert "jobs 0, 2 and jobs 1 cannot be ranked together: autocast differ" in caplog.text
    assert "select.metric=score" in caplog.text


def test_jobs_ranked_by_loss_and_by_answers_are_two_groups(config: Compose, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config()
    by_loss, by_answers = {"validation tokens": "a"}, {"validation questions": "b"}
    made = [changed(job(number, cfg, None), comparable=what) for number, what in enumerate((by_loss, by_answers))]
    assert [[one.number for one in group] for group in comparable(made)] == [[0], [1]]
    assert "validation tokens and validation questions differ" in caplog.text


def test_the_ranking_and_the_table_name_every_kind(
    config: Compose, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import csv

    cfg = config("train.num_train_epochs=1"), config("train.num_train_epochs=2")
    made = [changed(job(0, cfg[0], "a"), candidates=[candidate(0, 1, 0.6)], overrides=["train.num_train_epochs=1"])]
    two = [candidate(1, 1, 0.6), candidate(1, 2, 0.5)]
    made.append(changed(job(1, cfg[1], "a"), candidates=two, overrides=["train.num_train_epochs=2"]))
    every = [row for one in made for row in one.candidates]
    selection = select(every, "lowest", [[0, 1], [0, 1], [1, 1]])
    failed = changed(
        job(2, cfg[0], None, "failed"), overrides=["train.num_train_epochs=0"], config={}, error="must be positive"
    )
    terminal.ranking(selection, [*made, failed])
    printed = capsys.readouterr().out
    assert "the first epochs of job 1" in printed
    assert "must be positive" in printed
    assert "1.0000" in printed
    files.sweep_csv(tmp_path / "sweep.csv", selection, made)
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["selected"] for row in table] == ["False", "False", "True"]
    assert [row["score"] for row in table] == ["0.5", "0.5", "1.0"]
    assert [row["trained_as"] for row in table] == ["the first epochs of job 1", OWN, OWN]


def test_a_removed_stage_is_built_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stage = store.stage("merged", {}, lambda folder: (folder / "model").write_text("weights") and None)
    store.remove(stage)
    assert not stage.path.exists()
    assert not store.stage("merged", {}, lambda folder: (folder / "model").write_text("again") and None).cached


def start(folder: Path) -> str:
    """Start a run in a folder, and return its id."""
    lock = hold(folder)
    run = Run.start(folder, name="x", mode="train", seed=1, command="sftlab")
    lock.release()
    return run.record.id


def test_jobs_of_an_earlier_sweep_are_ignored(config: Compose, tmp_path: Path) -> None:
    earlier = start(tmp_path)
    for number in (0, 1, 7):
        changed(job(number, config(), None), run=earlier).write(tmp_path / str(number))
    assert [one.number for one in jobs(tmp_path)] == [0, 1, 7]
    start(tmp_path)
    assert jobs(tmp_path) == []
    assert list(tmp_path.rglob("job.json")) == []


def test_jobs_of_other_runs_in_subfolders_are_ignored_and_retained(config: Compose, tmp_path: Path) -> None:
    single, sweep = start(tmp_path / "demo" / "single"), start(tmp_path / "demo" / "sweep")
    changed(job(0, config(), None), run=single).write(tmp_path / "demo" / "single")
    changed(job(1, config(), None), run=sweep).write(tmp_path / "demo" / "sweep" / "1")
    job(2, config(), None).write(tmp_path / "demo" / "2")  # by a version that recorded no run
    (tmp_path / "demo" / "3").mkdir()
    (tmp_path / "demo" / "3" / "job.json").write_text("{", "utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert len(before) == 6
    for _ in range(2):
        outer = start(tmp_path / "demo")
        assert jobs(tmp_path / "demo") == []
        changed(job(4, config(), None), run=outer).write(tmp_path / "demo" / "model=org" / "a" / "4")
        assert [one.number for one in jobs(tmp_path / "demo")] == [4]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["hydra.run.dir=demo"], ["-m", "hydra.sweep.dir=demo", "seed=1,2"]])
def test_a_run_around_other_runs_leaves_their_records(tmp_path: Path, settings: list[str]) -> None:
    inner = quick(tmp_path, "mode=train", "instance=cpu", "hydra.run.dir=demo/7", code=FAULTS)
    assert inner.returncode == 1
    before = {path: path.read_bytes() for path in (tmp_path / "demo" / "7").iterdir() if path.suffix == ".json"}
    assert len(before) == 2
    outer = quick(tmp_path, *settings, "mode=train", "instance=cpu", code=FAULTS)
    assert outer.returncode == 1, outer.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert len(jobs(tmp_path / "demo")) == (2 if "-m" in settings else 1)


def test_a_copy_of_a_run_below_it_is_neither_counted_nor_deleted(config: Compose, tmp_path: Path) -> None:
    sweep = start(tmp_path / "out")
    for number in (0, 1):
        changed(job(number, config(), None), run=sweep).write(tmp_path / "out" / f"seed={number}" / "x")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.move(tmp_path / "copy", tmp_path / "out" / "backup")
    assert [one.folder.parts[-2] for one in jobs(tmp_path / "out")] == ["seed=0", "seed=1"]
    start(tmp_path / "out")
    assert jobs(tmp_path / "out") == []
    assert [one.number for one in jobs(tmp_path / "out" / "backup")] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message", "dry"),
    [
        (["hydra.run.dir=store/x"], "hydra.run.dir='store/x': is inside store=store", False),
        (["-m", "seed=1,2", "hydra.sweep.dir=store/x"], "hydra.sweep.dir='store/x': is inside store=store", True),
        (["hydra.run.dir=file"], "hydra.run.dir='file': cannot be made: File exists", False),
        (["hydra.run.dir=file/x"], "hydra.run.dir='file/x': cannot be made: Not a directory", True),
        (["-m", "seed=1,2", "hydra.sweep.dir=file/x/y"], "hydra.sweep.dir='file/x/y': cannot be made: Not a", False),
        (["hydra.run.dir=" + "x" * 300], "cannot be made: File name too long", True),
        (["hydra.run.dir=a/1"], "hydra.run.dir='a/1': is the folder of a sweep's job", False),
        (["-m", "seed=1,2", "hydra.sweep.dir=a/1"], "hydra.sweep.dir='a/1': is the folder of a sweep's job", True),
        (["-m", "seed=1,2", "hydra.sweep.dir=b"], "hydra.sweep.dir='b': job 1 would replace a record", False),
        (["-m", "seed=1,2", "hydra.sweep.dir=b", "hydra.sweep.subdir=1/${hydra.job.num}"], "job 0 would replace", True),
        (
            ["-m", "seed=1,2", "hydra.sweep.dir=.", "hydra.sweep.subdir=c/d/${hydra.job.num}"],
            "job 1 would replace",
            False,
        ),
        (
            ["-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=b"],
            "job 1 would",
            True,
        ),
    ],
)
def test_an_invalid_folder_of_a_run_is_refused_before_it_starts(
    tmp_path: Path, config: Compose, arguments: list[str], message: str, dry: bool
) -> None:
    (tmp_path / "file").write_text("")
    start(tmp_path / "b" / "1")
    changed(job(1, config(), None), run="another").write(tmp_path / "a" / "1")
    changed(job(1, config(), None), run="another").write(tmp_path / "c" / "d" / "1")
    settings = ["mode=train", "instance=cpu", "model=tiny_random", "store=store", f"dry_run={str(dry).lower()}"]
    assert message in refused(tmp_path, *arguments, *settings)


@pytest.mark.slow
def test_the_folder_of_another_runs_job_is_refused(tmp_path: Path) -> None:
    assert quick(tmp_path, "-m", "mode=train", "instance=cpu", "hydra.sweep.dir=a", "seed=1,2", code=FAULTS).returncode
    assert quick(tmp_path, "mode=train", "instance=cpu", "hydra.run.dir=b/1", code=FAULTS).returncode == 1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    inside = quick(tmp_path, "mode=train", "instance=cpu", "hydra.run.dir=a/1", code=FAULTS)
    assert inside.returncode == 2
    assert "hydra.run.dir='a/1': is the folder of a sweep's job" in inside.stderr
    around = quick(tmp_path, "-m", "mode=train", "instance=cpu", "hydra.sweep.dir=b", "seed=1,2", code=FAULTS)
    assert around.returncode == 2
    assert around.stderr.startswith("sftlab: hydra.sweep.dir='b': job 1 would replace a record")
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_named_after_a_swept_key_is_the_same_for_all_jobs(tmp_path: Path) -> None:
    done = quick(tmp_path, "-m", "mode=train", "instance=cpu", "seed=1,2", "hydra.sweep.dir=out/${seed}", code=FAULTS)
    assert done.returncode == 1
    (folder,) = (file.parent for file in tmp_path.rglob("run.json"))
    assert [one.error for one in jobs(folder)] == ["KeyError: 'a bug'"] * 2


def test_a_second_run_waits_for_the_folder(tmp_path: Path) -> None:
    code = (
        "import logging, sys, pathlib; logging.basicConfig(level='INFO')\n"
        "from sftlab.runtime.run import Run, hold; hold(pathlib.Path(sys.argv[1]))"
    )
    lock = hold(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "waiting for another run that uses the folder" in process.stderr.readline()
    assert process.poll() is None
    lock.release()
    process.communicate(timeout=900)
    assert process.returncode == 0


def test_a_sweep_without_a_valid_job_writes_nothing(tmp_path: Path) -> None:
    done = quick(tmp_path, "-m", "train.num_train_epochs=1,2", "dataset.max_rows=-3")
    assert done.returncode == 2
    assert done.stderr == "sftlab: dataset.max_rows=-3: should be greater than 0\n"
    assert not os.listdir(tmp_path)


def test_a_problem_that_only_some_jobs_have_does_not_stop_the_sweep(tmp_path: Path) -> None:
    # Liger needs a GPU, so one of the two jobs is invalid on the CPU.
    settings = ["-m", "instance=cpu", "train.use_liger_kernel=true,false", "instance.attn_implementation=sdpa"]
    done = quick(tmp_path, *settings, "hydra.sweep.dir=swept", "mode=train", code=FAULTS)
    assert done.returncode == 1
    found = {one.number: one for one in jobs(tmp_path / "swept")}
    assert "Liger needs a GPU" in str(found[0].error)
    assert found[1].error == "KeyError: 'a bug'"


FAULTS = """
import sftlab.work
from dataclasses import replace
def run_job(cfg, job, folder):
    raise KeyError("a bug")
for mode in ("all", "train"):
    sftlab.work.WORK[mode] = replace(sftlab.work.WORK[mode], job=run_job)
"""


def test_a_bug_ends_its_job_and_not_the_sweep(tmp_path: Path) -> None:
    done = quick(tmp_path, "-m", "train.num_train_epochs=1,2", "hydra.sweep.dir=swept", code=FAULTS)
    assert done.returncode == 1
    assert [(one.status, one.error) for one in jobs(tmp_path / "swept")] == [("failed", "KeyError: 'a bug'")] * 2
    record: dict[str, Any] = json.loads((tmp_path / "swept" / "run.json").read_text("utf-8"))
    assert record["status"] == "failed"
    assert "job 0: KeyError: 'a bug'; job 1" in record["error"]
    assert "Traceback" in done.stderr + done.stdout  # a bug is to be reported


@pytest.mark.slow
@pytest.mark.parametrize("epochs", ["1,2", "1,0"])
def test_the_dry_run_of_a_sweep_reports_every_job_and_writes_nothing(tmp_path: Path, epochs: str) -> None:
    # Without a model in the store, the dry run tokenizes nothing and takes seconds.
    settings = ["-m", "+experiment=demo_sweep", "dry_run=true", "train.gradient_accumulation_steps=2"]
    done = quick(tmp_path, *settings, f"train.num_train_epochs={epochs}", modules=REPORTED)
    output = done.stdout + done.stderr
    if epochs == "1,2":
        assert done.returncode == 0, output
        assert "job 1: " in output
        assert output.count("questions can show") == 2
    else:
        assert done.returncode == 1  # as the run itself, of which one job is done
        assert output.count("questions can show") == 1
        assert "sftlab: job 1: train.num_train_epochs=0: should be greater than 0" in done.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_value_on_the_command_line_replaces_an_axis_of_an_experiment(tmp_path: Path) -> None:
    settings = ["+experiment=demo_sweep", "dry_run=true", "train.num_train_epochs=7"]
    done = quick(tmp_path, *settings, modules=REPORTED)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if " job " in line]
    assert len(lines) == 2  # the other axis is left
    assert all("train.num_train_epochs=7" in line for line in lines)
