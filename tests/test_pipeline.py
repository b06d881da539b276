"""The command as a user types it, with real parts: training, merge, engine, files, exit codes."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import interruptible
from test_cli import started, whole
from test_mixing import write_chats, write_choices

pytestmark = pytest.mark.smoke

TINY = [
    "model=tiny_random",
    "dataset.max_rows=48",
    "eval.engine=transformers",
    "eval.max_tokens=16",
    "tracking=none",
    "train.max_length=768",
]


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "sftlab", *overrides]


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all tests of this file run, so that they share a store."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def tiny(place: Path) -> Path:
    """A whole run of the tiny model."""
    done = whole(place, *TINY, "hydra.run.dir=tiny")
    assert done.returncode == 0, done.stderr
    assert "Verdict: inconclusive" in done.stdout
    return place / "tiny"


def test_a_run_leaves_what_the_readme_promises(tiny: Path) -> None:
    run = read(tiny / "run.json")
    assert run["status"] == "success"
    assert run["error"] is None
    chosen = run["selection"]
    losses = {candidate["eval_loss"] for candidate in chosen["candidates"]}
    assert chosen["lowest_eval_loss"] == min(losses)
    assert chosen["eval_loss"] in losses
    assert [candidate["epoch"] for candidate in chosen["candidates"]] == [1.0, 2.0]
    for name in ("baseline", "finetuned"):
        evaluation = run["evaluation"][name]
        predictions = rows(tiny / "predictions" / f"{name}.jsonl")
        assert len(predictions) == evaluation["n"]
        assert sum(row["correct"] for row in predictions) == evaluation["correct"]
        assert evaluation["value"] == pytest.approx(evaluation["correct"] / evaluation["n"])
        assert {"id", "prompt", "completion", "finish_reason", "answer", "target", "correct"} <= set(predictions[0])
    assert (tiny / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tiny / "report.html").read_text("utf-8")
    assert (tiny / "best").resolve() == Path(chosen["checkpoint"]).resolve() or (tiny / "best").exists()
    assert (tiny / "merged" / "config.json").is_file()
    assert "model-index:" in (tiny / "model_card.md").read_text("utf-8")
    assert (tiny / "merged" / "tokenizer.json").is_file()
    history = rows(tiny / "metrics.jsonl")
    assert sum("eval_loss" in row for row in history) == 2
    assert any("loss" in row for row in history)
    receipt = run["receipt"]
    assert receipt["trainable_parameters"] < receipt["parameters"]
    assert receipt["effective_batch"] == 2
    assert receipt["rank_checksums"][0] > 0
    assert receipt["truncated_rows"] == {"train": 0, "validation": 0}


def test_the_same_command_again_finds_everything(tiny: Path, place: Path) -> None:
    again = whole(place, *TINY, "hydra.run.dir=again")
    assert again.returncode == 0, again.stderr
    first, second = read(tiny / "run.json"), read(place / "again" / "run.json")
    assert second["stages"] == first["stages"]
    assert set(second["times"].values()) == {0.0}
    assert second["selection"] == first["selection"]
    assert second["evaluation"] == first["evaluation"]


def test_a_changed_eval_key_trains_nothing_again(tiny: Path, place: Path) -> None:
    done = whole(place, *TINY, "hydra.run.dir=shorter", "eval.max_tokens=8", "eval.max_rows=5")
    assert done.returncode == 0, done.stderr
    run = read(place / "shorter" / "run.json")
    assert run["times"]["train"] == 0.0
    assert run["times"]["finetuned"] > 0
    assert run["evaluation"]["finetuned"]["n"] == 5


def test_dry_run_says_what_is_cached_and_writes_nothing(tiny: Path, place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    done = whole(place, *TINY, "dry_run=true", "hydra.run.dir=dry")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert "train    cached" in text
    questions = read(tiny / "run.json")["evaluation"]["finetuned"]["n"]
    assert f"{questions} questions can show" in text
    assert "test set: 1 model judged on it so far" in text
    assert sorted(path.name for path in place.iterdir()) == before


def test_report_mode_renders_again(tiny: Path, place: Path) -> None:
    (tiny / "report.html").unlink()
    run = (tiny / "run.json").read_bytes()
    done = whole(place, "mode=report", "hydra.run.dir=tiny")
    assert done.returncode == 0, done.stderr
    assert (tiny / "report.html").is_file()
    assert (tiny / "run.json").read_bytes() == run


def test_clean_mode_lists_and_keeps_what_runs_refer_to(tiny: Path, place: Path) -> None:
    stray = place / "outputs" / "store" / "tokens" / ("0" * 16)
    stray.mkdir()
    (stray / "manifest.json").write_text("{}")
    kept = read(tiny / "run.json")["stages"].values()
    listed = whole(place, "mode=clean", "clean.outputs=.")
    assert listed.returncode == 0, listed.stderr
    assert "0" * 16 in listed.stdout
    assert stray.is_dir()
    deleted = whole(place, "mode=clean", "clean.outputs=.", "clean.delete=true")
    assert deleted.returncode == 0, deleted.stderr
    assert not stray.exists()
    assert all((place / stage).is_dir() for stage in kept)


def test_evaluate_mode_takes_any_model(tiny: Path, place: Path) -> None:
    done = whole(
        place, *TINY, "mode=evaluate", f"eval.name_or_path={tiny / 'merged'}", "eval.max_rows=5", "hydra.run.dir=any"
    )
    assert done.returncode == 0, done.stderr
    evaluation = read(place / "any" / "run.json")["evaluation"]
    assert evaluation["finetuned"]["n"] == evaluation["baseline"]["n"] == 5
    # The five rows are another test set; the merged model has the name that the run gave it.
    keys = [read(folder / "run.json")["evaluation"]["reuse"]["test_set"] for folder in (tiny, place / "any")]
    entries = [read(place / "outputs" / "store" / ".ledger" / key / "1.json") for key in keys]
    assert keys[0] != keys[1]
    assert entries[0]["model"] == entries[1]["model"] == (tiny / "merged").resolve().name


def test_compare_mode_judges_two_files(place: Path) -> None:
    for name, answers in (("a", "ABBBB" * 12), ("b", "AAAAA" * 12)):
        (place / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"id": i, "completion": f"So the answer is ({answer}) x.", "target": "AB"[i % 5 == 4]})
                + "\n"
                for i, answer in enumerate(answers)
            )
        )
    done = whole(place, "mode=compare", "eval.predictions=[a.jsonl,b.jsonl]", "hydra.run.dir=compared")
    assert done.returncode == 0, done.stderr
    run = read(place / "compared" / "run.json")
    comparison = run["evaluation"]["comparison"]
    assert comparison["verdict"]["outcome"] == "better"
    assert comparison["gained"] == 36
    assert comparison["lost"] == 12
    # Twice the tail of a fair coin: at most 12 heads of 48.
    tail = sum(math.comb(48, heads) for heads in range(13)) / 2**48
    assert comparison["p_value"] == pytest.approx(2 * tail)
    assert (place / "compared" / "report.html").is_file()


@pytest.mark.parametrize("trained", ["now", "before"])
def test_wandb_offline_gets_curve_and_table_and_no_secret(place: Path, trained: str) -> None:
    # Not a key that wandb could use: it only must not be written anywhere.
    done = whole(
        place,
        *TINY[:4],
        "train.max_length=768",
        "eval.max_rows=3",
        "seed=3",
        f"hydra.run.dir=tracked-{trained}",
        environment={
            "WANDB_MODE": "offline",
            "HF_TOKEN": "hf_secretsecretsecret",
            "WANDB_API_KEY": "a" * 40,
            "SOME_OTHER_API_KEY": "b" * 30,
            "SOME_TOKEN": "c" * 30,
        },
    )
    assert done.returncode == 0, done.stderr
    secrets = [b"hf_secretsecretsecret", b"a" * 40, b"b" * 30, b"c" * 30]
    assert not any(secret.decode() in done.stdout + done.stderr for secret in secrets)
    assert (done.stdout + done.stderr).count("wandb: offline (WANDB_MODE)") == 1
    offline = list((place / f"tracked-{trained}").glob("wandb/offline-run-*/*.wandb"))
    assert len(offline) >= 1
    content = b"".join(path.read_bytes() for path in offline)
    assert b"eval/loss" in content
    assert b"finetuned_accuracy" in content
    for path in place.rglob("*"):  # the run and the store
        if path.is_file():
            text = path.read_bytes()
            assert not any(secret in text for secret in secrets), path


# A busy machine may measure another number format for each store; weights are compared between stores.
FLOAT32 = ["train.bf16=false"]
CONSTANT = [
    *TINY,
    *FLOAT32,
    "mode=train",
    "train.lr_scheduler_type=constant",
    "select.tie=lowest",
    "peft.lora_dropout=0.1",
]


def weights(folder: Path, epoch: int) -> dict:
    from safetensors.torch import load_file

    candidates = read(folder / "run.json")["selection"]["candidates"]
    checkpoint = next(row["checkpoint"] for row in candidates if row["epoch"] == epoch)
    return load_file(folder.parent / checkpoint / "adapter_model.safetensors")


def test_a_sweep_shares_epochs_exactly_and_survives_a_bad_job(place: Path) -> None:
    done = whole(
        place,
        "-m",
        *CONSTANT,
        "train.num_train_epochs=1,3,2",
        "train.per_device_train_batch_size=8,0",
        "hydra.sweep.dir=swept",
    )
    assert done.returncode == 1, done.stderr
    run = read(place / "swept" / "run.json")
    assert run["status"] == "failed"
    assert "train.per_device_train_batch_size=0" in run["error"]
    assert [job["status"] for job in run["jobs"]] == ["success", "failed"] * 3
    assert [len([row for row in run["selection"]["candidates"] if row["job"] == job]) for job in (0, 2, 4)] == [1, 3, 2]
    assert [run["jobs"][job]["trained_as"] for job in (0, 2, 4)] == [
        "the first epochs of job 2",
        "trained separately",
        "the first epochs of job 2",
    ]
    with (place / "swept" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6
    assert sum(row["selected"] == "True" for row in table) == 1
    # The proof of exactness: the same jobs, each trained alone in a store of its own.
    alone = whole(
        place,
        *CONSTANT,
        "train.num_train_epochs=3",
        "train.per_device_train_batch_size=8",
        "hydra.run.dir=alone",
        "store=alone_store",
    )
    assert alone.returncode == 0, alone.stderr
    for epoch in (1, 2, 3):
        shared, separate = weights(place / "swept", epoch), weights(place / "alone", epoch)
        assert shared.keys() == separate.keys()
        for name, tensor in separate.items():
            assert (shared[name] == tensor).all(), (epoch, name)


def test_a_killed_run_goes_on_and_ends_the_same(place: Path) -> None:
    """Also where it is found only then that it does not need gradient checkpointing."""
    settings = [*TINY, *FLOAT32, "mode=train", "train.num_train_epochs=3", "seed=7", "peft.lora_dropout=0.1"]
    undisturbed = whole(place, *settings, "hydra.run.dir=undisturbed", "store=undisturbed_store")
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = started(
        place, *settings, "hydra.run.dir=killed", "store=killed_store", "train.gradient_checkpointing=true"
    )
    deadline = time.monotonic() + 900
    while not list((place / "killed_store").glob("train/*.partial/checkpoint-*/checkpoint.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = whole(place, *settings, "hydra.run.dir=killed", "store=killed_store", "train.gradient_checkpointing=auto")
    assert again.returncode == 0, again.stderr
    assert "resumes from checkpoint" in again.stdout + again.stderr
    assert "gradient checkpointing is off" in again.stdout + again.stderr
    first, second = read(place / "undisturbed" / "run.json"), read(place / "killed" / "run.json")
    assert first["stages"].keys() == second["stages"].keys() - {"memory"}
    assert [run["receipt"]["gradient_checkpointing"] for run in (first, second)] == [False, False]
    losses = [[row["eval_loss"] for row in run["selection"]["candidates"]] for run in (first, second)]
    assert losses[0] == losses[1]
    for name, tensor in weights(place / "undisturbed", 3).items():
        assert (weights(place / "killed", 3)[name] == tensor).all()


def test_ctrl_c_ends_with_130_and_says_so(place: Path) -> None:
    process = subprocess.Popen(
        command(
            *TINY, "mode=train", "train.num_train_epochs=50", "hydra.run.dir=interrupted", "store=interrupted_store"
        ),
        cwd=place,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    deadline = time.monotonic() + 900
    while not list((place / "interrupted_store").glob("train/*.partial/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_jobs_with_validations_within_epochs_share_steps_exactly(place: Path) -> None:
    """The shorter job ends where the longer one has a checkpoint without a validation."""
    settings = [*CONSTANT, "train.per_device_train_batch_size=8", "train.eval_steps=3"]
    done = whole(place, "-m", *settings, "train.num_train_epochs=3,2", "hydra.sweep.dir=within")
    assert done.returncode == 0, done.stderr
    assert "reuses the first" in done.stdout + done.stderr
    alone = whole(place, *settings, "train.num_train_epochs=2", "hydra.run.dir=within_alone", "store=within_store")
    assert alone.returncode == 0, alone.stderr
    shared = [row for row in read(place / "within" / "run.json")["selection"]["candidates"] if row["job"] == 1]
    separate = read(place / "within_alone" / "run.json")["selection"]["candidates"]
    names = ("step", "epoch", "eval_loss", "train_loss")
    assert [[row[name] for name in names] for row in shared] == [[row[name] for name in names] for row in separate]
    assert [row["step"] for row in shared] == [3, 6, 8]
    for one, other in zip(shared, separate, strict=True):
        files = [(place / row["checkpoint"] / "adapter_model.safetensors").read_bytes() for row in (one, other)]
        assert files[0] == files[1]


def test_a_decay_branches_exactly_from_another_jobs_stable_phase(place: Path) -> None:
    settings = [
        *TINY,
        *FLOAT32,
        "mode=train",
        "train.lr_scheduler_type=warmup_stable_decay",
        "train.warmup_steps=2",
        "+train.lr_scheduler_kwargs.num_decay_steps=3",
        "peft.lora_dropout=0.1",
    ]
    done = whole(place, "-m", *settings, "train.num_train_epochs=3,1,2", "hydra.sweep.dir=branched")
    assert done.returncode == 0, done.stderr
    run = read(place / "branched" / "run.json")
    kinds = [job["trained_as"] for job in run["jobs"]]
    assert kinds == ["trained separately", *["a decay of 3 steps from job 0"] * 2]
    assert "reuses the first" in done.stdout + done.stderr
    assert [row["epoch"] for row in run["selection"]["candidates"]] == [1, 2, 3, 1, 1, 2]
    # Nothing is left of what was only there to go on from.
    trained = [Path(place / read(file)["stages"]["train"]) for file in sorted((place / "branched").glob("*/job.json"))]
    assert not [file for path in trained for file in path.glob("checkpoint-*/optimizer.pt")]
    assert [len(list(path.glob("checkpoint-*"))) for path in trained] == [3, 1, 2]
    alone = whole(place, *settings, "train.num_train_epochs=2", "hydra.run.dir=unbranched", "store=unbranched_store")
    assert alone.returncode == 0, alone.stderr
    rows_of = {row["checkpoint"]: row for row in run["selection"]["candidates"] if row["job"] == 2}
    for path, epoch in zip(sorted(rows_of, key=lambda name: rows_of[name]["step"]), (1, 2), strict=True):
        from safetensors.torch import load_file

        branched, separate = load_file(place / path / "adapter_model.safetensors"), weights(place / "unbranched", epoch)
        for name, tensor in separate.items():
            assert (branched[name] == tensor).all(), (epoch, name)


def test_checkpoints_can_be_ranked_by_answers_on_validation(place: Path) -> None:
    settings = [
        "select.metric=score",
        "select.max_rows=3",
        "train.eval_on_start=true",
        "train.eval_steps=1",
        "train.max_steps=3",
    ]
    done = whole(place, *TINY, *settings, "hydra.run.dir=answered")
    assert done.returncode == 0, done.stderr
    chosen = read(place / "answered" / "run.json")["selection"]
    assert chosen["metric"] == "accuracy"
    # The first step of a warm-up changes no weight: step 1 answers as step 0 does, and is not merged.
    assert [row["step"] for row in chosen["candidates"]] == [0, 1, 2, 3]
    assert chosen["scored_rows"] == 3
    assert all(0 <= row["score"] <= 1 for row in chosen["candidates"])
    assert chosen["score"] == max(row["score"] for row in chosen["candidates"])
    assert "accuracy on validation" in done.stdout
    assert "3 different ones" in done.stdout + done.stderr
    # No merged model is left but the selected one.
    assert (place / "answered" / "merged" / "config.json").is_file()
    assert not [*place.glob("outputs/store/generations/*/**/merged")]


def test_the_untrained_model_can_be_selected(place: Path) -> None:
    settings = ["train.eval_on_start=true", "train.max_steps=2", "train.learning_rate=1e-9"]  # no loss changes
    for limit in ("null", "1"):
        done = whole(place, *TINY, *settings, f"train.save_total_limit={limit}", "hydra.run.dir=untrained")
        assert done.returncode == 0, done.stderr
        run = read(place / "untrained" / "run.json")
        assert [row["step"] for row in run["selection"]["candidates"]] == [0, 2]
        assert (run["status"], run["selection"]["step"], run["evaluation"], run["merge"]) == ("success", 0, None, None)
        assert "the untrained model" in run["skipped"]
        assert "the untrained model, is selected" in done.stdout
        written = {path.name for path in (place / "untrained").iterdir()}
        assert not {"best", "merged", "predictions", "model_card.md"} & written
        history = rows(place / "untrained" / "metrics.jsonl")
        assert [row["step"] for row in history if "eval_loss" in row] == [0, 2]
    pushed = whole(place, *TINY, *settings, "hub.push=true", "hub.repo_id=me/model", "hydra.run.dir=unpushed")
    assert pushed.returncode == 1
    assert "nothing was pushed, because the untrained model is selected" in pushed.stderr
    assert read(place / "unpushed" / "run.json")["status"] == "failed"


def test_the_best_checkpoint_survives_a_limit(place: Path) -> None:
    # Four rows, learned by heart: the first epoch is the best one by far.
    settings = [
        *("mode=train", "peft=none", "train.num_train_epochs=4", "train.learning_rate=0.02"),
        *("train.lr_scheduler_type=constant", "train.per_device_train_batch_size=1"),
        "dataset.split={train: 4, validation: 20, test: 8}",
    ]
    done = whole(place, *TINY, *settings, "train.save_total_limit=1", "hydra.run.dir=limited")
    assert done.returncode == 0, done.stderr
    losses = [row["eval_loss"] for row in rows(place / "limited" / "metrics.jsonl") if "eval_loss" in row]
    assert min(losses) < losses[-1] - 0.5
    chosen = read(place / "limited" / "run.json")["selection"]
    assert chosen["eval_loss"] == min(losses)
    assert (place / "limited" / "best" / "model.safetensors").is_file()
    assert len(chosen["candidates"]) <= 2


def test_a_training_that_diverges_is_ended_and_takes_no_other_along(place: Path) -> None:
    settings = [*TINY, "mode=train", "train.num_train_epochs=3"]
    done = whole(place, "-m", *settings, "train.learning_rate=1e30,1e-3", "hydra.sweep.dir=diverged")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    run = read(place / "diverged" / "run.json")
    assert [job["status"] for job in run["jobs"]] == ["failed", "success"]
    said = "train: diverged: the validation loss after step 14 is not a finite number; set a lower train.learning_rate"
    assert said in run["jobs"][0]["error"]
    assert [row["job"] for row in run["selection"]["candidates"]] == [1, 1, 1]


def test_the_validation_loss_is_reported_by_source(place: Path) -> None:
    chats = write_chats(place / "chat.jsonl")
    choices = write_choices(place / "mc.csv")
    sources = f"dataset.sources={{chat: {{name_or_path: {chats}, weight: 2}}, mc: {{name_or_path: {choices}}}}}"
    settings = ["mode=train", "dataset=auto", "train.num_train_epochs=1", "hydra.run.dir=mixed", "eval.group_by=null"]
    done = whole(place, *TINY, *settings, sources)
    assert done.returncode == 0, done.stderr
    run = read(place / "mixed" / "run.json")
    assert {one["name"]: one["row_format"]["format"] for one in run["data_sources"]} == {
        "chat": "chat",
        "mc": "multiple_choice",
    }
    assert [one["rows"]["train"] for one in run["data_sources"]] == [32, 11]
    by_source = run["selection"]["by_source"]
    assert [(one["source"], one["rows"]) for one in by_source] == [("chat", 2), ("mc", 2)]
    tokens = sum(one["tokens"] for one in by_source)
    mean = sum(one["eval_loss"] * one["tokens"] for one in by_source) / tokens
    assert mean == pytest.approx(run["selection"]["eval_loss"], rel=1e-5)
    assert by_source[0]["eval_loss"] != by_source[1]["eval_loss"]
    assert "The selected checkpoint by source" in done.stdout
    page = (place / "mixed" / "report.html").read_text("utf-8")
    assert "Rows by source" in page
    assert f"{by_source[1]['eval_loss']:.4f}" in page
