"""Every mode as a single run and a sweep, run and dry run: exit code, written files, and refused sweeps."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import vignettes, write_model, write_rows
from made_runs import make_run
from test_cli import REPORTED, files, quick, refused, sftlab, whole

from sftlab import pipeline
from sftlab.config import Config
from sftlab.errors import StageError
from sftlab.hydra_app.callback import StudyCallback
from sftlab.hydra_app.study import Study
from sftlab.hydra_app.task import run_task
from sftlab.records import read_jsonl
from sftlab.results import Evaluation
from sftlab.runtime.job import Job, jobs
from sftlab.runtime.modes import MODES
from sftlab.runtime.run import Run, hold
from sftlab.serve.server import free_port
from sftlab.work import WORK, InJobs

TINY = [
    "model=tiny_random", "instance=cpu", "tracking=none", "eval.engine=transformers", "eval.max_tokens=4",
    "eval.forced=false", "dataset.split={train: 8, validation: 4, test: 6}", "train.num_train_epochs=1",
    "train.max_length=768",
]  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def predictions(folder: Path) -> str:
    for name, answers in (("a", "ABAB"), ("b", "AAAA")):
        rows = [{"id": i, "completion": f"The answer is ({x}).", "target": "AB"[i % 2]} for i, x in enumerate(answers)]
        write_rows(folder / f"{name}.jsonl", rows)
    return "eval.predictions=[a.jsonl,b.jsonl]"


# ------------------------------------------------------------------- all modes × {single, -m} × {run, dry run}

RECORD = {".hydra", ".lock", "run.json", "sftlab.log"}
TRAINED = {"job.json", "best", "loss.png", "metrics.jsonl", "sweep.csv", "report.html"}
EVALUATED = {"merged", "predictions", "model_card.md"}
SWEPT = {".lock", "run.json", "multirun.yaml", "0", "1"}
# What each mode writes into a run's folder, single and swept; None if it cannot be swept.
WRITES: dict[str, tuple[set[str], set[str] | None]] = {
    "all": (RECORD | TRAINED | EVALUATED, SWEPT | TRAINED - {"job.json"} | EVALUATED),
    "train": (RECORD | TRAINED, SWEPT | TRAINED - {"job.json"}),
    "evaluate": (RECORD | {"job.json", "predictions", "report.html"}, SWEPT | {"report.html"}),
    "plan": (RECORD | {"job.json"}, SWEPT),
    "preview": (RECORD | {"preview.html"}, None),
    "compare": (RECORD | {"predictions", "report.html"}, None),
    "report": ({"report.html"}, None),
    "clean": (set(), None),
    "runs": (set(), None),
    "serve": (set(), None),
    "chat": (set(), None),
    "page": (set(), None),
    "export": (set(), None),
}
AXIS = {"evaluate": "eval.name_or_path=random:llama,random:qwen3"}
LIGHT = {"compare", "report", "clean", "runs", "serve", "chat", "page", "export"}


def cases() -> list[Any]:
    found = []
    for mode in MODES:
        for sweep in (False, True):
            for dry in (False, True):
                if MODES[mode].works_on == "run" and not sweep and not dry:
                    continue  # tests/serve starts it
                if mode == "page" and dry and not sweep and find_spec("gradio") is None:
                    continue
                light = mode in LIGHT or (sweep and not MODES[mode].has_jobs)
                marks = [] if light else [pytest.mark.smoke]
                if mode == "compare" and not sweep:
                    marks = [pytest.mark.slow]
                name = f"{mode}-{'sweep' if sweep else 'single'}-{'dry' if dry else 'run'}"
                found.append(pytest.param(mode, sweep, dry, marks=marks, id=name))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests with a model, so that each stage is built once."""
    return tmp_path_factory.mktemp("shared") / "store"


@pytest.mark.parametrize(("mode", "sweep", "dry"), cases())
def test_every_mode_writes_its_files_or_is_refused(
    tmp_path: Path, store: Path, mode: str, sweep: bool, dry: bool
) -> None:
    settings = [f"mode={mode}", f"dry_run={str(dry).lower()}", f"store={store}"]
    if mode == "compare":
        settings.append(predictions(tmp_path))
    elif mode == "report":
        Run.start(tmp_path / "out", name="demo", mode="train", seed=1, command="").finish("success")
    elif mode == "clean":
        settings[-1:] = ["store=store"]
        (tmp_path / "store").mkdir()
    elif mode == "runs":
        Run.start(tmp_path / "outputs" / "a", name="demo", mode="train", seed=1, command="").finish("success")
    elif MODES[mode].works_on == "run":
        settings += [f"run={make_run(tmp_path)}", f"serve.port={free_port()}", "instance=cpu", "export.format=bnb4"]
    else:
        settings += TINY
    if sweep:
        settings = ["-m", *settings, AXIS.get(mode, "train.learning_rate=1e-3,2e-3"), "hydra.sweep.dir=out"]
    else:
        settings += ["hydra.run.dir=out"] + (["eval.name_or_path=random:qwen3"] if mode == "evaluate" else [])
    expected = WRITES[mode][sweep]
    if expected is None:
        assert f"mode={mode}: cannot be swept" in refused(tmp_path, *settings)
        return
    before = files(tmp_path), files(store)
    if mode in LIGHT:
        done = quick(tmp_path, *settings, modules=REPORTED if mode == "compare" else ())
    else:
        done = whole(tmp_path, *settings)
    code, out, errors = done.returncode, done.stdout, done.stderr
    assert code == 0, out + errors
    assert "Traceback" not in out + errors
    if dry:
        assert files(tmp_path) == before[0]
        assert [name for name in files(store) if not name.endswith(".lock") and "use" not in name] == [
            name for name in before[1] if not name.endswith(".lock") and "use" not in name
        ]
        return
    written = {path.name for path in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()
    assert written - {"run.json", ".lock"} == expected - {"run.json", ".lock"}
    assert set(MODES[mode].writes) == WRITES[mode][0] - {".hydra", ".lock", "sftlab.log"}
    if MODES[mode].has_record:
        record = read(tmp_path / "out" / "run.json")
        assert (record["status"], record["mode"], record["error"]) == ("success", mode, None)
    if mode == "evaluate" and sweep:
        assert [row["model"] for row in record["evaluations"]] == ["random:llama", "random:qwen3"]
        for row, job in zip(record["evaluations"], jobs(tmp_path / "out"), strict=True):
            assert Evaluation.model_validate(row["evaluation"]) == job.evaluation
            assert row["evaluation"]["finetuned"]["n"] == 6
            assert row["evaluation"]["comparison"]["p_value"] <= row["p_adjusted"]
            assert {"predictions", "report.html"} <= {path.name for path in job.folder.iterdir()}
        # The base is evaluated once for both jobs. It is the model of the first job.
        first, second = record["evaluations"]
        assert first["stages"]["baseline"] == second["stages"]["baseline"] == first["stages"]["finetuned"]
        assert "random:qwen3" in (tmp_path / "out" / "report.html").read_text("utf-8")
        assert out.count("All evaluations on the test set") == 1


def test_every_mode_has_its_functions() -> None:
    assert set(WORK) == set(MODES) == set(get_args(Config.model_fields["mode"].annotation))
    assert {name for name, work in WORK.items() if isinstance(work, InJobs)} == {
        name for name, mode in MODES.items() if mode.has_jobs
    }
    assert all(mode.result if mode.has_jobs else mode.instead for mode in MODES.values())


def test_the_worker_of_a_launcher_gets_an_empty_study(tmp_path: Path) -> None:
    study = Study(folder=tmp_path, lock=hold(tmp_path))
    task, callback = pickle.loads(pickle.dumps((partial(run_task, study), StudyCallback(study))))
    assert task.func is run_task
    assert task.args[0] == callback.study == Study()


# ------------------------------------------------------------------- what a sweep may vary

FIXED = ["instance=cpu", "model=tiny_random", "dataset.split={train: 8, validation: 4, test: 6}"]
REFUSED = [
    (["eval.temperature=0,0.7"], "eval.temperature"),
    (["mode=train", "eval.max_tokens=8,16"], "eval.max_tokens"),
    (["mode=plan", "eval.alpha=0.1,0.2"], "eval.alpha"),
    (["select.metric=eval_loss,score", "merge.max_loss_gap=0.1,0.2", "hub.private=true,false"],
     "hub.private, merge.max_loss_gap, select.metric"),
    (["tracking=none,wandb"], "tracking.backend"),
    (["mode=train,all"], "mode"),
    (["dry_run=true,false"], "dry_run"),
    (["eval=demo,vllm"], "eval.max_tokens"),
    (["dataset@eval.dataset=vignettes,medqa"], "eval.dataset.name_or_path"),
    (["+debug=fast,overfit"], "eval.max_rows"),
    (["--config-dir", "own", "+experiment=own"], "eval.temperature"),
    (["hydra/sweeper=optuna", "eval.temperature=interval(0,1)"], "eval.temperature"),
    (["mode=evaluate", "eval.name_or_path=random:llama", "train.learning_rate=1e-3,2e-3"], "train.learning_rate"),
    (["mode=evaluate", "eval.name_or_path=random:llama", "dataset@eval.dataset=vignettes", "dataset.max_rows=9,8"],
     "dataset.max_rows"),
    (["mode=evaluate", "hydra/sweeper=optuna", "eval.name_or_path=random:llama,random:qwen3"], "hydra/sweeper=basic"),
    (["+experiment=demo_sweep,demo_optuna"], "hydra.sweeper"),
    (["model=tiny_random,nope"], "nope"),
    (["train.lerning_rate=1,2"], "did you mean train.learning_rate?"),
    (["instance.grace_seconds=10,20"], "instance.grace_seconds"),
    (["train.gradient_checkpointing=true,false"], "train.gradient_checkpointing"),
    (["instance.nnodes=2", "instance.rdzv_endpoint=a:1", "instance.node_rank=0,1"], "instance.node_rank"),
    (["mode=evaluate", "eval.name_or_path=random:llama", "eval.stall_min=1,2"], "eval.stall_min"),
    (["seed=glob(*)"], "seed=glob(*): matches no choice"),
    (["seed=1,"], "seed=1,: has an empty value between its commas; write seed=1"),
    (["seed=1,,2"], "seed=1,,2: has an empty value between its commas; write seed=1,2"),
    (["seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: no job would run"),
    (["mode=train", "dataset@eval.dataset=vignettes,null"], "sftlab: dataset@eval.dataset=null: cannot be composed"),
    (["+hydra.sweeper.params.seed='1,2'"], "write -m seed=1,2"),
    (["+hydra.sweeper.params={seed: '1,2'}"], "write -m KEY=VALUE1,VALUE2"),
    (["seed=1,2", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0: no job would run"),
    (["hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: no job would run"),
    (["hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.direction=maximize"], "set it to minimize"),
    (["hydra/sweeper=optuna", "seed=1"], "nothing to search"),
    (["seed=1,2", "hydra.sweep.dir=out/${hydra.job.num}"], "hydra.sweep.dir: MissingMandatoryValue"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "key"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_a_sweep_over_a_key_without_effect_is_refused(tmp_path: Path, arguments: list[str], key: str) -> None:
    if "own" in arguments:
        (tmp_path / "own" / "experiment").mkdir(parents=True)
        params = {"eval.temperature": "0,1", "train.num_train_epochs": "1,2"}
        text = "# @package _global_\n" + json.dumps({"hydra": {"sweeper": {"params": params}}})
        (tmp_path / "own" / "experiment" / "own.yaml").write_text(text, "utf-8")
    message = refused(tmp_path, "-m", *FIXED, *arguments)
    assert key in message


def test_the_refusal_to_preview_a_sweep_names_hydra_mode(tmp_path: Path) -> None:
    message = refused(tmp_path, "+experiment=demo_sweep", "mode=preview", *FIXED)
    assert "hydra.mode=RUN" in message
    code, _, errors, _ = sftlab(
        tmp_path, "+experiment=demo_sweep", "mode=preview", *FIXED, "hydra.mode=RUN", "dry_run=true"
    )
    assert code == 0, errors


@pytest.mark.parametrize(
    ("axis", "in_file"),
    [("seed=1,2", False), ("model=tiny_random,smollm2_135m", False), ("dataset.max_rows=30,40", True)],
)
def test_no_second_command_evaluates_another_split_or_base_than_the_trained_one(
    tmp_path: Path, axis: str, in_file: bool
) -> None:
    """The seed, dataset and base of the selected model are unknown before the training."""
    own = []
    if in_file:
        (tmp_path / "own" / "experiment").mkdir(parents=True)
        key, _, values = axis.partition("=")
        text = "# @package _global_\n" + json.dumps({"hydra": {"sweeper": {"params": {key: values}}}})
        (tmp_path / "own" / "experiment" / "own.yaml").write_text(text, "utf-8")
        own = ["--config-dir", "own", "+experiment=own"]
    common = ["-m", *own, "instance=cpu", *([] if in_file else [axis])]
    message = refused(tmp_path, *common, "eval.temperature=0,0.7")
    assert "name_or_path=" not in message
    assert "run one command for each value of eval.temperature" in message
    if not in_file:
        code, _, errors, _ = sftlab(tmp_path, *common, "eval.temperature=0.7", "eval.sampler=none", "dry_run=true")
        assert "cannot be swept" not in errors
        assert code == 2


@pytest.mark.smoke
def test_the_two_commands_that_a_refusal_names_do_what_was_asked(tmp_path: Path, store: Path) -> None:
    message = refused(tmp_path, "-m", *TINY, f"store={store}", "eval.temperature=0,0.7", "train.learning_rate=1e-3")
    first, second = [shlex.split(line)[3:] for line in message.splitlines() if line.startswith("  python -m sftlab")]
    assert whole(tmp_path, *first, "hydra.run.dir=RUN").returncode == 0
    done = whole(tmp_path, *second, "hydra.sweep.dir=out")
    assert done.returncode == 0, done.stderr
    record = read(tmp_path / "out" / "run.json")
    temperatures = [job.settings().eval.temperature for job in jobs(tmp_path / "out")]
    assert temperatures == [0, 0.7]
    stages = [row["stages"]["finetuned"] for row in record["evaluations"]]
    assert len(set(stages)) == 2
    paths = [tmp_path / folder / "predictions" / "finetuned.jsonl" for folder in ("RUN", "out/0", "out/1")]
    trained, greedy, sampled = ([row["completion"] for row in read_jsonl(path)] for path in paths)
    assert trained == greedy != sampled


# ------------------------------------------------------------------- no exit code 0 without success

# A job of mode=plan that takes no time.
PLANNED = """
import sftlab.work
from dataclasses import replace
from sftlab.results import PlanCell
def plan_job(cfg, job, folder):
    parts = ("libraries", "weights", "gradients", "optimizer", "activations", "logits")
    job.plan = PlanCell(memory=dict.fromkeys(parts, 0.1), training_gib=1.0, generation_gib=1.0, capacity_gib=2.0,
                        seconds_per_epoch=1.0, timed_by="a test")
sftlab.work.WORK["plan"] = replace(sftlab.work.WORK["plan"], job=plan_job)
"""


def run(
    folder: Path, *overrides: str, code: str = PLANNED, modules: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return quick(folder, *overrides, code=code, modules=modules)


DRY = """
sftlab.work.WORK["plan"] = replace(sftlab.work.WORK["plan"], dry_run=lambda cfg, folder, scratch: None)
"""
PAGE = """
import sftlab.work
from dataclasses import replace
from sftlab.errors import StageError
from sftlab.report import page as report
def run_job(cfg, job, folder):
    {body}
def page(*given):
    raise KeyError("the page")
report.write = page
train = sftlab.work.WORK["train"]
sftlab.work.WORK["train"] = replace(train, job=run_job, finish=lambda run, jobs, is_sweep: None)
"""
PLAN = ["-m", "mode=plan", "instance=cpu", "hydra.sweep.dir=out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subdir", "folders"),
    [
        ("${hydra.job.override_dirname}", ["mode=plan,model.name_or_path=m/a", "mode=plan,model.name_or_path=m/b"]),
        ("x/${hydra.job.num}/y", ["x/0/y", "x/1/y"]),
        ("${hydra:job.num}", ["0", "1"]),
    ],
)
def test_jobs_are_found_wherever_their_folders_are(tmp_path: Path, subdir: str, folders: list[str]) -> None:
    write_model(tmp_path / "m" / "a")
    write_model(tmp_path / "m" / "b")
    exclude = ["hydra.job.config.override_dirname.exclude_keys=[instance]"]
    done = run(tmp_path, *PLAN, "model.name_or_path=m/a,m/b", *exclude, f"hydra.sweep.subdir={subdir}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [str(job.folder) for job in jobs(tmp_path / "out")] == [str(tmp_path / "out" / name) for name in folders]
    assert [row["job"] for row in read(tmp_path / "out" / "run.json")["plan"]] == [0, 1]


@pytest.mark.parametrize(
    ("subdir", "seeds"),
    [("same", "1,2"), ("${seed}", "1,1"), ("../${seed}", "1,2"), (".", "1"), ("/tmp/${seed}", "1,2"), ("a" * 300, "1"),
     ("${nothing}", "1,2")],
)  # fmt: skip
def test_folders_that_jobs_would_share_are_refused(tmp_path: Path, subdir: str, seeds: str) -> None:
    message = refused(tmp_path, *PLAN, *FIXED[1:], f"seed={seeds}", f"hydra.sweep.subdir={subdir}")
    assert "hydra.sweep.subdir" in message


def test_optuna_with_folders_named_by_values_is_refused(tmp_path: Path) -> None:
    settings = ["-m", *FIXED, "hydra/sweeper=optuna", "seed=1,2"]
    assert "hydra.sweep.subdir" in refused(tmp_path, *settings, "hydra.sweep.subdir=${seed}")


# Hydra imports its launcher a second time, so the class in its list of plugins is patched.
LAUNCHER = """
from hydra.core.plugins import Plugins
Basic = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
launch = Basic.launch
"""
NOTHING = LAUNCHER + "Basic.launch = lambda self, job_overrides, initial_job_idx: []\n"
ONE = LAUNCHER + "Basic.launch = lambda self, job_overrides, initial_job_idx: launch(self, job_overrides[:1], 0)\n"
BUG = """
import sftlab.hydra_app.sweep
def examine(config):
    raise KeyError("a bug")
sftlab.hydra_app.sweep.examine = examine
"""
FULL = """
import sftlab.runtime.run
def write_json(path, value):
    raise OSError(28, "No space left on device", str(path))
sftlab.runtime.run.write_json = write_json
"""
SILENT = (
    PLANNED
    + """
from sftlab.hydra_app.callback import StudyCallback
StudyCallback.on_multirun_start = lambda self, config, **kwargs: None
"""
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lacking"), [(NOTHING, "job 0, 1: left no record"), (ONE, "job 1: left no record")], ids=["none", "one"]
)
def test_a_launcher_that_leaves_jobs_out_is_a_failure(tmp_path: Path, fault: str, lacking: str) -> None:
    done = run(tmp_path, *PLAN, *FIXED[1:], "seed=1,2", code=PLANNED + fault)
    assert done.returncode == 1, done.stderr
    record = read(tmp_path / "out" / "run.json")
    assert record["status"] == "failed"
    assert lacking in record["error"]
    dry = run(tmp_path, *PLAN, *FIXED[1:], "seed=1,2", "dry_run=true", code=fault)
    assert dry.returncode != 0


@pytest.mark.parametrize("fault", [BUG, FULL, SILENT], ids=["bug", "full", "silent"])
def test_an_error_in_the_callback_is_not_a_warning(tmp_path: Path, fault: str) -> None:
    done = run(tmp_path, *PLAN, *FIXED[1:], "seed=1,2", code=fault)
    assert done.returncode == 1, done.stderr
    assert "UserWarning" not in done.stderr
    if fault == FULL:
        assert done.stderr.startswith("sftlab: cannot write ")
        assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("override", "sweep"),
    [("~hydra.callbacks", True), ("hydra.callbacks=null", False), ("hydra.callbacks={}", False),
     ("hydra.callbacks={}", True)],
)  # fmt: skip
def test_no_override_disables_the_checks(tmp_path: Path, override: str, sweep: bool) -> None:
    settings = ["-m", *FIXED, "seed=1,2"] if sweep else FIXED
    message = refused(tmp_path, *settings, override, "dataset.max_rows=-3")
    assert ("dataset.max_rows=-3: should be greater" in message) == (override == "hydra.callbacks={}")


def test_a_sweeps_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "hydra.sweep.dir='out'" in refused(tmp_path, *PLAN, *FIXED[1:], "seed=1,2")


def test_a_jobs_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1").write_text("")
    message = refused(tmp_path, *PLAN, *FIXED[1:], "seed=1,2")
    assert "hydra.sweep.dir='out': the folder 1 of job 1 cannot be made: File exists" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.run.dir=out/${hydra.job.num}", "hydra.run.dir: MissingMandatoryValue"),
        ("hydra.run.dir=out/${nosuch}", "hydra.run.dir: Interpolation key 'nosuch' not found"),
        ("hydra.job.name=a/b", "hydra.job.name='a/b'"),
        ("hydra.output_subdir=/x", "hydra.output_subdir='/x'"),
    ],
)
def test_invalid_names_in_hydras_section_are_refused(tmp_path: Path, override: str, message: str) -> None:
    assert message in refused(tmp_path, "mode=preview", *FIXED, override)


def test_a_run_without_jobs_that_the_store_cannot_register_fails(tmp_path: Path) -> None:
    """Otherwise ``mode=clean`` would miss the run and delete its stages."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".runs").write_text("")
    code, _, errors, _ = sftlab(tmp_path, "mode=compare", predictions(tmp_path), "store=store", "hydra.run.dir=out")
    assert code == 1
    assert "cannot be written: store/.runs: File exists" in errors
    assert read(tmp_path / "out" / "run.json")["status"] == "failed"
    assert not (tmp_path / "out" / "job.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dry", ["false", "true"])
def test_a_sweep_with_an_invalid_job_exits_like_its_dry_run(tmp_path: Path, dry: str) -> None:
    done = run(tmp_path, *PLAN, *FIXED[1:], "seed=1,-1", f"dry_run={dry}", code=PLANNED + DRY)
    assert done.returncode == 1, done.stderr
    assert "job 1: seed=-1: should be greater" in done.stdout + done.stderr
    assert run(tmp_path, *PLAN, *FIXED[1:], "seed=-2,-1", f"dry_run={dry}", code=PLANNED + DRY).returncode == 2


@pytest.mark.parametrize("failed", [False, True])
def test_a_page_that_cannot_be_written_does_not_replace_the_reason(tmp_path: Path, failed: bool) -> None:
    settings = ["mode=train", "instance=cpu", *FIXED[1:], "hydra.run.dir=out"]
    done = run(tmp_path, *settings, code=PAGE.format(body="raise StageError('the reason')" if failed else "pass"))
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) != failed
    assert ("sftlab: the reason" in done.stderr) == failed
    if failed:
        assert read(tmp_path / "out" / "run.json")["error"] == "the reason"


# ------------------------------------------------------------------- dry runs

LEAK = ["mode=all", "dataset.name_or_path=twice.jsonl", "dataset.max_overlap=0.9", "store=store", *TINY[:6]]
SPLIT = "dataset.split={train: 0.5, validation: 0.25, test: 0.25}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "sweep", "dry"),
    [("all", False, False), ("train", True, False), ("train", False, True), ("all", True, True)],
)
def test_leakage_is_refused_before_the_model_is_loaded(tmp_path: Path, mode: str, sweep: bool, dry: bool) -> None:
    rows = vignettes(12)
    write_rows(tmp_path / "twice.jsonl", [*rows, *({**row, "id": f"again-{row['id']}"} for row in rows)])
    settings = [*LEAK, f"mode={mode}", SPLIT, f"dry_run={str(dry).lower()}"]
    settings += ["train.learning_rate=1e-3,2e-3", "hydra.sweep.dir=out"] if sweep else ["hydra.run.dir=out"]
    settings = ["-m", *settings] if sweep else settings
    found = quick(tmp_path, *settings, modules=REPORTED)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "dataset.max_overlap=0.9" in found.stderr
    assert "row-" in found.stderr
    assert not (tmp_path / "store" / "model").exists()
    if dry:
        assert files(tmp_path) == ["twice.jsonl"]
    else:
        assert "dataset.max_overlap" in read(tmp_path / "out" / "run.json")["error"]
    if dry:
        allowed = quick(tmp_path, *settings, "dataset.allow_overlap=true", modules=REPORTED)
        assert allowed.returncode == 0, allowed.stdout + allowed.stderr


@pytest.mark.slow
def test_a_dry_run_describes_the_work_of_its_mode(tmp_path: Path) -> None:
    compared = quick(tmp_path, "mode=compare", predictions(tmp_path), "dry_run=true", "tracking=none", modules=REPORTED)
    assert compared.returncode == 0, compared.stderr
    assert "4 rows" in compared.stdout + compared.stderr
    assert "train" not in compared.stdout
    (tmp_path / "b.jsonl").unlink()
    assert "b.jsonl" in refused(tmp_path, "mode=compare", "eval.predictions=[a.jsonl,b.jsonl]", "dry_run=true")
    # The training split and settings do not matter to an evaluation.
    write_rows(tmp_path / "test.jsonl", vignettes(7))
    mounted = ["dataset@eval.dataset=vignettes", "eval.dataset.name_or_path=test.jsonl", "dataset.name_or_path=gone"]
    evaluated = ["mode=evaluate", "eval.name_or_path=random:qwen3", *TINY[:6], *mounted, "dry_run=true"]
    dry = quick(tmp_path, *evaluated, modules=REPORTED)
    assert dry.returncode == 0, dry.stderr
    assert "test set: 7 rows" in dry.stdout + dry.stderr
    assert "random:qwen3" in dry.stdout + dry.stderr
    assert "effective batch" not in dry.stdout + dry.stderr


def test_a_dry_run_of_clean_deletes_nothing(tmp_path: Path) -> None:
    stage = tmp_path / "store" / "tokens" / ("0" * 16)
    stage.mkdir(parents=True)
    (stage / "manifest.json").write_text("{}", "utf-8")
    Run.start(tmp_path / "outputs" / "a", name="a", mode="train", seed=1, command="").finish("success")
    code, out, errors, _ = sftlab(
        tmp_path, "mode=clean", "store=store", "clean.outputs=.", "clean.delete=true", "dry_run=true"
    )
    assert code == 0, errors
    assert "0" * 16 in out
    assert "would be deleted" in out
    assert "nothing was deleted" not in out
    assert stage.is_dir()
    shutil.rmtree(tmp_path / "outputs")
    for dry in ("true", "false"):
        code, _, errors, _ = sftlab(
            tmp_path, "mode=clean", "store=store", "clean.outputs=.", "clean.delete=true", f"dry_run={dry}"
        )
        assert code == 2
        assert "clean.outputs=" in errors


def test_runs_are_listed_with_filters_and_the_page_has_all_of_them(tmp_path: Path) -> None:
    for name in ("first", "second"):
        Run.start(tmp_path / "outputs" / name, name=name, mode="train", seed=1, command="").finish("success")
    code, out, errors, loaded = sftlab(tmp_path, "mode=runs", "runs.name=sec*", "runs.since=1d")
    assert code == 0, errors
    assert "1 of 2 runs match the filters" in out
    assert "second" in out
    assert "first" not in out
    page = (tmp_path / "outputs" / "index.html").read_text("utf-8")
    assert 'href="first/"' in page
    assert 'href="second/"' in page
    assert not loaded


def test_the_dry_run_of_a_report_reads_the_run_and_writes_nothing(tmp_path: Path) -> None:
    Run.start(tmp_path / "a", name="a", mode="train", seed=1, command="").finish("success")
    (tmp_path / "a" / "predictions").mkdir()
    (tmp_path / "a" / "predictions" / "baseline.jsonl").write_text('{"id": 1}\n')
    message = refused_late(tmp_path, "mode=report", "hydra.run.dir=a", "dry_run=true")
    assert "its files are not those of a run" in message
    assert refused_late(tmp_path, "mode=report", "hydra.run.dir=b", "dry_run=true")


def refused_late(folder: Path, *arguments: str) -> str:
    before = files(folder)
    code, _, message, _ = sftlab(folder, *arguments)
    assert code == 2, message
    assert files(folder) == before
    return message


# ------------------------------------------------------------------- jobs that fail

STAGES = {
    "data": "sftlab.pipeline.dataset.make",
    "overlap": "sftlab.pipeline.gate",
    "model": "sftlab.pipeline.models.resolve",
    "tokens": "sftlab.pipeline.tokenize.make",
    "training": "sftlab.pipeline.train.make",
    "folder": "sftlab.hydra_app.task._enter_folder",
}
FAILS = """
import {module}
from sftlab.errors import StageError
before = {name}
def fails(*given, **named):
    first = not seen
    seen.append(1)
    if {always} or first:
        raise {error}
    return before(*given, **named)
seen = []
{name} = fails
"""


GONE, BUGGY = "StageError('the disk of the store is gone')", "KeyError('a bug')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "error", "sweep"),
    # Each stage fails, in a single run or in a sweep; two of them by a bug.
    [(stage, BUGGY if stage in ("data", "training") else GONE, stage in ("folder", "overlap", "training"))
     for stage in sorted(STAGES)],
)  # fmt: skip
def test_a_job_that_fails_is_recorded_with_its_reason(tmp_path: Path, stage: str, error: str, sweep: bool) -> None:
    name = STAGES[stage]
    module = name.rpartition(".")[0].removesuffix(".dataset").removesuffix(".models").removesuffix(".tokenize")
    code = FAILS.format(module=module.removesuffix(".train"), name=name, error=error, always=True)
    # No model is needed before the training.
    code += "import sftlab.model.base\n" + (
        "" if stage in ("model", "folder") else "sftlab.model.base.resolve = lambda *a: " + BASE
    )
    if stage == "training":
        code += TOKENS
    settings = [
        *TINY,
        "mode=train",
        "instance.bf16=true",
        "eval.dtype=bfloat16",
        *(["seed=1,2", "hydra.sweep.dir=out"] if sweep else ["hydra.run.dir=out"]),
    ]
    done = run(tmp_path, *(["-m"] if sweep else []), *settings, code=code, modules=REPORTED)
    assert done.returncode == 1, done.stdout + done.stderr
    reason = "the disk of the store is gone" if error.startswith("StageError") else "KeyError: 'a bug'"
    record = read(tmp_path / "out" / "run.json")
    assert record["status"] == "failed"
    assert record["error"] == (f"job 0: {reason}; job 1: {reason}" if sweep else reason)
    assert reason in done.stderr
    assert [job.error for job in jobs(tmp_path / "out")] == [reason] * (2 if sweep else 1)
    if error.startswith("StageError"):
        assert "Traceback" not in done.stderr + done.stdout


BASE = "__import__('sftlab.model.base').model.base.Base('m', __import__('pathlib').Path('m'), 'i', False, None)\n"
TOKENS = """
from types import SimpleNamespace
counts = SimpleNamespace(train=SimpleNamespace(rows=8))
sftlab.pipeline.tokenize.make = lambda *a: SimpleNamespace(stage=None, counts=counts)
"""


def test_a_job_without_a_checkpoint_is_reported(tmp_path: Path, config: Any) -> None:
    record = Run.start(tmp_path, name="a", mode="train", seed=1, command="")
    job = Job(number=3, overrides=[], config=config().model_dump(), status="success")
    failed = Job(number=4, overrides=[], config={"seed": "${nothing}"}, status="failed", error="the disk is gone")
    with pytest.raises(StageError, match="job 3: reports success and no checkpoint"):
        pipeline.finish_training(record, [failed, job], True)


def test_an_error_after_the_jobs_does_not_hide_why_a_job_failed(tmp_path: Path) -> None:
    code = """
import sftlab.work
from dataclasses import replace
def run_job(cfg, job, folder):
    if cfg.seed == 1:
        raise RuntimeError("the first reason")
sftlab.work.WORK["train"] = replace(sftlab.work.WORK["train"], job=run_job)
"""
    done = run(tmp_path, "-m", *TINY, "mode=train", "seed=1,2", "hydra.sweep.dir=out", code=code)
    assert done.returncode == 1
    record = read(tmp_path / "out" / "run.json")
    assert record["status"] == "failed"
    assert "job 0: RuntimeError: the first reason" in record["error"]
    assert "job 1: reports success and no checkpoint" in record["error"]


# ------------------------------------------------------------------- once

COUNTED = """
import sftlab.dataset.stage
render = sftlab.dataset.stage.render_examples
def render_examples(*given, **named):
    print("RENDERED")
    return render(*given, **named)
sftlab.dataset.stage.render_examples = render_examples
import sftlab.validation.validate
check = sftlab.validation.validate.validate
def validate(composed):
    print("VALIDATED")
    return check(composed)
sftlab.validation.validate.validate = validate
from hydra._internal.config_loader_impl import ConfigLoaderImpl
compose = ConfigLoaderImpl._load_configuration_impl
def composed(*given, **named):
    print("COMPOSED")
    return compose(*given, **named)
ConfigLoaderImpl._load_configuration_impl = composed
import sftlab.instance.preflight
machine = sftlab.instance.preflight.check
def check_machine(*given):
    print("MACHINE")
    return machine(*given)
sftlab.instance.preflight.check = check_machine
"""


@pytest.mark.slow
def test_a_command_composes_validates_and_warns_once(tmp_path: Path) -> None:
    settings = [*TINY, "dry_run=true", "mode=all", "eval.hoped_difference=0.01"]
    alone = run(tmp_path, *settings, code=COUNTED, modules=REPORTED)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.count("VALIDATED") == 1
    assert alone.stdout.count("COMPOSED") == 1
    assert alone.stdout.count("MACHINE") == 1
    assert alone.stdout.count("RENDERED") == 1  # for validation and for the dataset
    assert (alone.stdout + alone.stderr).count("eval.hoped_difference=0.01: this test set is too small") == 1
    swept = run(tmp_path, "-m", *settings, "train.learning_rate=1e-3,2e-3,3e-3", code=COUNTED, modules=REPORTED)
    assert swept.returncode == 0, swept.stderr
    assert swept.stdout.count("RENDERED") == 1
    assert swept.stdout.count("MACHINE") == 3  # each job, which may run on another machine
    assert (swept.stdout + swept.stderr).count("eval.hoped_difference=0.01: this test set is too small") == 1
    assert files(tmp_path) == []


@pytest.mark.smoke
def test_evaluations_in_workers_are_read_from_their_files(tmp_path: Path, store: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", exc_type=ImportError)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "sftlab", "-m", *TINY, f"store={store}", "mode=evaluate", "hydra/launcher=joblib",
         "hydra.launcher.n_jobs=2", "eval.name_or_path=random:llama,./gone", "hydra.sweep.dir=out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    rows = read(tmp_path / "out" / "run.json")["evaluations"]
    assert [row["status"] for row in rows] == ["success", "failed"]
    assert rows[0]["evaluation"]["finetuned"]["n"] == 6
    assert "./gone" in rows[1]["error"]
    both = whole(
        tmp_path, "-m", *TINY, f"store={store}", "mode=evaluate", "eval.name_or_path=./gone,./lost", "hydra.sweep.dir=x"
    )
    assert both.returncode == 2
