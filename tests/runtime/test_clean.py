"""mode=clean lists and deletes the stages that no run refers to, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftlab.errors import ConfigError, StageError
from sftlab.records import Candidate
from sftlab.results import Status
from sftlab.runtime import clean as module
from sftlab.runtime.clean import clean, unreferenced
from sftlab.runtime.job import Job
from sftlab.runtime.run import Run
from sftlab.runtime.store import Stage, Store, write_json

OLD = time.time() - 30 * 24 * 3600


def stage(store: Path, kind: str, inputs: dict[str, Any], content: bytes = b"made", age: float = OLD) -> Stage:
    made = Store(store).stage(kind, inputs, lambda folder: (folder / "result").write_bytes(content) and None)
    os.utime(made.path / "manifest.json", (age, age))
    return made


def chain(store: Path, seed: int) -> dict[str, Stage]:
    """The stages of one run. As in the pipeline, the inputs of a stage name the stages it was built from."""
    made = {"model": stage(store, "model", {"random": "llama", "seed": seed})}
    made["dataset"] = stage(store, "dataset", {"seed": seed, "source": {"rows.py": "ab" * 32}})
    base, data = made["model"].key, made["dataset"].key
    made["tokens"] = stage(store, "tokens", {"dataset": data, "tokenizer": base})
    made["train"] = stage(store, "train", {"tokens": made["tokens"].key, "base": base, "seed": seed})
    made["merged"] = stage(store, "merged", {"train": made["train"].key, "step": 20, "base": base})
    prompts = {"dataset": data, "tokenizer": base}
    made["generations"] = stage(store, "generations", {"model": made["merged"].key, "prompts": prompts})
    return made


def record(folder: Path, status: Status = "success", **values: Any) -> Run:
    run = Run.start(folder, name="x", mode="train", seed=1, command="sftlab")
    run.update(status=status, **values)
    return run


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """The printed text in one line."""
    return " ".join(capsys.readouterr().out.split())


def listed(store: Path, outputs: Path) -> set[tuple[str, str]]:
    return {(item.kind, item.path.name) for item in unreferenced(store, outputs)}


def names(stages: dict[str, Stage], *kinds: str) -> set[tuple[str, str]]:
    return {(kind, stages[kind].key) for kind in (kinds or stages)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "store"


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def test_only_stages_without_a_run_are_listed(store: Path, outputs: Path) -> None:
    kept, lost = chain(store, 1), chain(store, 2)
    record(outputs / "demo" / "2026", stages={kind: str(one.path) for kind, one in kept.items()})
    assert listed(store, outputs) == names(lost)
    (item,) = [item for item in unreferenced(store, outputs) if item.kind == "train"]
    assert item.path == lost["train"].path
    assert item.last_used == pytest.approx(OLD, abs=1)
    assert item.bytes == sum(file.stat().st_size for file in item.path.iterdir()) > 4


def test_the_inputs_of_a_used_stage_are_retained(store: Path, outputs: Path) -> None:
    kept, lost = chain(store, 1), chain(store, 2)
    record(outputs / "a", stages={"finetuned": str(kept["generations"].path)})
    record(outputs / "b", stages={"merged": str(lost["merged"].path)})
    assert listed(store, outputs) == names(lost, "generations")


def test_a_model_named_only_in_the_inputs_of_a_child_process_is_retained(store: Path, outputs: Path) -> None:
    model = stage(store, "model", {"random": "llama"})
    # With a custom chat template, the identity of a model differs from its key.
    train = stage(store, "train", {"base": "0" * 16})
    write_json(train.path / "inputs.json", {"base": str(model.path.resolve())})
    record(outputs / "a", stages={"train": str(train.path)})
    assert listed(store, outputs) == set()


@pytest.mark.parametrize("where", ["demo/2026/3", "somewhere/else/below"])
def test_jobs_and_checkpoints_count(store: Path, outputs: Path, where: str) -> None:
    first, second, third = chain(store, 1), chain(store, 2), chain(store, 3)
    job = Job(number=3, overrides=[], config={}, stages={"tokens": str(first["tokens"].path)})
    checkpoint = f"{second['train'].path}/checkpoint-20"
    job.candidates = [Candidate(1.0, 1.0, 20, checkpoint, 3, [], None, 1.0)]
    job.config = {"eval": {"name_or_path": str(third["merged"].path)}}
    job.status = "success"
    job.write(outputs / where)
    assert listed(store, outputs) == (
        names(first, "train", "merged", "generations")
        | names(second, "merged", "generations")
        | names(third, "generations")
    )


def test_runs_that_the_store_has_registered_count_and_other_texts_do_not(tmp_path: Path) -> None:
    store = tmp_path / "shared" / "store"
    Store(store).register(tmp_path / "elsewhere")  # an empty store, all of whose runs are known
    kept, single, lost = chain(store, 1), chain(store, 2), chain(store, 3)
    record(tmp_path / "elsewhere" / "x", stages={"all": str(kept["generations"].path)})
    Job(number=3, overrides=[], config={}, stages={"all": str(single["generations"].path)}).write(
        tmp_path / "elsewhere" / "x" / "3"
    )
    for folder in ("x", "x/3", "x/3"):
        Store(store).register(tmp_path / "elsewhere" / folder)
    (tmp_path / "shared" / "notes.json").write_text(str(lost["generations"].path), "utf-8")
    assert listed(store, tmp_path / "outputs") == names(lost)
    # A moved store has another path and the same keys.
    record(tmp_path / "outputs", stages={"all": f"/gone/store/generations/{lost['generations'].key}"})
    assert listed(store, tmp_path / "outputs") == set()
    shutil.rmtree(tmp_path / "elsewhere")
    assert listed(store, tmp_path / "outputs") == names(kept) | names(single)
    clean(store, tmp_path / "outputs", delete=True)
    assert list((store / ".runs").iterdir()) == []


def test_only_the_store_and_the_outputs_are_read(tmp_path: Path) -> None:
    store, outputs = tmp_path / "store", tmp_path / "outputs"
    lost = chain(store, 1)
    record(outputs / "a")
    Store(store).register(outputs / "a")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "run.json").symlink_to("run.json")  # whoever reads it gets an error
    assert listed(store, outputs) == names(lost)
    with pytest.raises(ConfigError, match=r"run.json: cannot be read"):
        unreferenced(store, tmp_path)


def test_a_run_on_an_unreachable_machine_stops_the_command(store: Path, outputs: Path) -> None:
    made = chain(store, 1)
    record(outputs / "a")
    Store(store).register(outputs / "gone")
    (entry,) = (store / ".runs").iterdir()
    entry.write_text(json.dumps({"folder": "/scratch/run", "host": "another"}), "utf-8")
    with pytest.raises(ConfigError, match=r"names a run on another that this machine cannot see; .* delete this file"):
        clean(store, outputs, delete=True)
    entry.unlink()
    assert listed(store, outputs) == names(made)


def test_a_store_of_an_earlier_version_whose_runs_may_be_anywhere(tmp_path: Path) -> None:
    store, outputs = tmp_path / "shared" / "store", tmp_path / "outputs"
    lost = chain(store, 1)
    record(outputs / "a")
    record(tmp_path / "shared" / "runs" / "b")
    with pytest.raises(ConfigError, match=r"set clean\.outputs= to a folder that contains both"):
        clean(store, outputs, delete=True)
    assert lost["train"].path.is_dir()
    clean(store, tmp_path, delete=True)
    assert not lost["train"].path.exists()


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_first_run_of_this_version_does_not_release_the_stages_of_earlier_ones(
    tmp_path: Path, unfinished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    store, outputs = tmp_path / "shared" / "store", tmp_path / "outputs"
    old = stage(store, "train", {"seed": 1}).path
    if unfinished:
        old = old.rename(old.with_suffix(".partial"))
    for name in "ab":
        record(outputs / name)
        Store(store).register(outputs / name)
    new = stage(store, "train", {"seed": 2}).path
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=r"1 of 2 folders .* set clean\.outputs= to a folder that contains both"):
            clean(store, outputs, delete=True, dry_run=dry_run)
    assert old.is_dir()
    assert new.is_dir()
    capsys.readouterr()
    clean(store, outputs, delete=False)
    assert "add clean.delete=true" not in printed(capsys)
    clean(store, tmp_path, delete=True)
    assert not old.exists()
    assert not new.exists()
    # A deleted stage is no longer listed as unregistered.
    stage(store, "train", {"seed": 3})
    clean(store, outputs, delete=True)
    assert not list(store.glob("train/*"))


def test_a_truncated_record_still_counts(store: Path, outputs: Path) -> None:
    kept = chain(store, 1)
    (outputs / "broken").mkdir(parents=True)
    (outputs / "broken" / "run.json").write_bytes(b'\xff{"stages": {"a": "x/' + kept["generations"].key.encode() + b'"')
    assert listed(store, outputs) == set()


def test_an_unreadable_record_stops_the_command(store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(store, 1)
    record(outputs / "secret")
    real = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "run.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    for delete in (False, True):
        with pytest.raises(ConfigError, match=r"secret/run\.json: cannot be read .*make it readable"):
            clean(store, outputs, delete=delete)
    assert (store / "train").is_dir()


def test_while_a_run_is_running_recently_used_stages_are_retained(
    store: Path, outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = chain(store, 1)
    dataset = stage(store, "dataset", {"seed": 2}, age=time.time() - 3600)
    merged = stage(store, "merged", {"train": old["train"].key}, age=time.time() - 60)
    with caplog.at_level("INFO"):
        run = record(outputs / "goes-on", status="running")
        assert listed(store, outputs) == names(old, "merged", "generations")
    assert f"{run.folder} is running (or was killed)" in caplog.text
    run.update(status="success")
    assert listed(store, outputs) == names(old) | {("dataset", dataset.key), ("merged", merged.key)}


HOLDER = """
import sys
from pathlib import Path
from sftlab.runtime.store import Store, write_json
def build(folder):
    write_json(folder / "inputs.json", {"tokens": sys.argv[2]})
    print("holds", flush=True)
    sys.stdin.readline()
Store(sys.argv[1]).stage("train", {"seed": 9}, build, resumable=True)
"""


def holder(store: Path, tokens: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(store), str(tokens)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_stage_under_construction_is_retained_with_its_inputs(
    store: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = chain(store, 1)
    record(outputs / "another")
    process = holder(store, made["tokens"].path)
    partial = Store(store).path("train", {"seed": 9}).name + ".partial"
    try:
        assert listed(store, outputs) == names(made, "train", "merged", "generations")
        clean(store, outputs, delete=True)
        assert (store / "train" / partial / "inputs.json").is_file()
        assert (store / "train" / partial).with_suffix(".lock").is_file()
    finally:
        process.kill()
        process.communicate(timeout=900)
    assert "3 deleted" in printed(capsys)
    # The process has ended, so the unfinished stage is unlocked, and no run needs it.
    assert ("train", partial) in listed(store, outputs)
    clean(store, outputs, delete=True)
    assert list((store / "train").iterdir()) == []


USER = """
import sys
from sftlab.runtime.store import Store
assert Store(sys.argv[1]).stage("dataset", {"seed": 1}, lambda folder: None).cached
print("uses", flush=True)
sys.stdin.readline()
"""


def user(store: Path) -> subprocess.Popen[str]:
    """A process that uses a finished stage until it ends."""
    command = [sys.executable, "-c", USER, str(store)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "uses\n"
    return process


@pytest.mark.parametrize("end", [subprocess.Popen.kill, subprocess.Popen.terminate, None])
def test_a_stage_that_another_process_uses_is_not_deleted(
    store: Path, outputs: Path, end: Callable[[subprocess.Popen[str]], None] | None
) -> None:
    used, other = stage(store, "dataset", {"seed": 1}), stage(store, "dataset", {"seed": 2})
    record(outputs / "a")
    process = user(store)
    try:
        assert listed(store, outputs) == {("dataset", other.key)}
        assert not Store(store).remove(used)
        assert (used.path / "result").read_bytes() == b"made"
        assert stage(store, "dataset", {"seed": 1}).cached
    finally:
        if end:
            end(process)
        process.communicate(timeout=900)
    assert ("dataset", used.key) in listed(store, outputs)
    assert Store(store).remove(used)
    assert not used.path.exists()
    assert not Store(store).remove(used)
    assert len(list((store / ".in-use").glob("*.lock"))) <= 1  # that of this process


def test_a_stage_that_another_process_starts_to_use_after_the_listing_is_retained(
    store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = stage(store, "dataset", {"seed": 1})
    record(outputs / "a")
    processes = []

    def act() -> None:
        processes.append(user(store))
        os.utime(used.path / "manifest.json", (OLD, OLD))  # as where the user may not write

    interfere(monkeypatch, act)
    clean(store, outputs, delete=True)
    processes[0].communicate(timeout=900)
    assert "0 deleted, 1 retained" in printed(capsys)
    assert stage(store, "dataset", {"seed": 1}).cached


def test_nothing_is_deleted_without_clean_delete(
    store: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, lost = chain(store, 1), chain(store, 2)
    stage(store, "dataset", {"seed": 3}, b"x" * 2_500_000)
    record(outputs / "a", stages={"all": str(kept["generations"].path)})
    before = sorted(outputs.rglob("*"))
    clean(store, outputs, delete=False)
    assert sorted(outputs.rglob("*")) == before
    out = capsys.readouterr().out
    for kind, key in names(lost):
        assert any(kind in line and key in line for line in out.splitlines()), out
    assert time.strftime("%Y-%m-%d", time.localtime(OLD)) in out
    assert "7 folders, 2.5 MB: nothing was deleted; add clean.delete=true to delete them" in " ".join(out.split())
    assert kept["train"].key not in out


def test_deletion_retains_the_stages_of_runs_and_removes_stale_locks(
    store: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, lost = chain(store, 1), chain(store, 2)
    record(outputs / "a", stages={"all": str(kept["generations"].path)})
    (store / "train" / ("e" * 16 + ".lock")).write_text("", "utf-8")
    (store / f".trash-train-{'f' * 16}-77").mkdir()
    (store / f".trash-train-{'f' * 16}-77" / "half").write_text("left by a deletion that was killed", "utf-8")
    files = {file: file.read_bytes() for one in kept.values() for file in one.path.iterdir()}
    clean(store, outputs, delete=True)
    assert "6 deleted" in printed(capsys)
    assert {file: file.read_bytes() for file in files} == files
    assert {path.stem for path in store.glob("[!.]*/*")} == {one.key for one in kept.values()}
    assert sorted(path.name for path in store.iterdir() if path.name != ".in-use") == sorted(kept)
    assert not Store(store).has("train", {"tokens": lost["tokens"].key, "base": lost["model"].key, "seed": 2})
    clean(store, outputs, delete=True)
    assert "runs refer to all stages" in printed(capsys)


def interfere(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call a function between the listing and the deletion."""
    listed = module.unreferenced

    def then(store: Path, outputs: Path) -> Any:
        result = listed(store, outputs)
        act()
        return result

    monkeypatch.setattr(module, "unreferenced", then)


def test_a_stage_used_after_the_listing_is_retained(
    store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = stage(store, "dataset", {"seed": 1}), stage(store, "dataset", {"seed": 2})
    record(outputs / "a")
    interfere(monkeypatch, lambda: Store(store).stage("dataset", {"seed": 1}, lambda _: None))
    clean(store, outputs, delete=True)
    assert (first.path / "result").is_file()
    assert not second.path.exists()
    assert "1 deleted, 1 retained, which are in use" in printed(capsys)


def test_a_stage_locked_or_deleted_after_the_listing_is_skipped(
    store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    held, gone, partial = (stage(store, "dataset", {"seed": seed}) for seed in range(3))
    unfinished = partial.path.rename(partial.path.with_suffix(".partial"))
    record(outputs / "a")
    lock = FileLock(f"{held.path}.lock")

    def act() -> None:
        lock.acquire(timeout=0)
        shutil.rmtree(gone.path)
        unfinished.rename(partial.path)  # was finished

    interfere(monkeypatch, act)
    clean(store, outputs, delete=True)
    lock.release()
    assert (held.path / "result").is_file()
    assert (partial.path / "result").is_file()
    assert "0 deleted, 3 retained" in printed(capsys)


def test_a_process_that_waits_for_a_deleted_stage_builds_it_again(store: Path, outputs: Path) -> None:
    made = stage(store, "dataset", {"seed": 1})
    record(outputs / "a")
    clean(store, outputs, delete=True)
    assert not stage(store, "dataset", {"seed": 1}).cached
    assert made.path.is_dir()


def test_links_are_not_followed_out_of_the_store(store: Path, outputs: Path, tmp_path: Path) -> None:
    outside = stage(tmp_path / "precious", "dataset", {"seed": 1})
    precious = tmp_path / "precious"
    chain(store, 1)
    record(outputs / "a")
    (store / "linked").symlink_to(precious / "dataset")
    (store / "dataset" / outside.key).symlink_to(outside.path)
    (store / "dataset" / (outside.key + ".partial")).symlink_to(outside.path)
    (store / f".trash-dataset-{outside.key}-1").symlink_to(outside.path)
    inside = stage(store, "dataset", {"seed": 7})
    (inside.path / "link").symlink_to(precious)
    listed = unreferenced(store, outputs)
    assert all(item.path.is_relative_to(store) and not item.path.is_symlink() for item in listed)
    clean(store, outputs, delete=True)
    assert not inside.path.exists()
    assert (outside.path / "result").read_bytes() == b"made"
    assert (precious / "dataset" / f"{outside.key}.lock").is_file()


def test_a_stage_that_becomes_a_link_is_not_followed(
    store: Path, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(store, "dataset", {"seed": 1})
    record(outputs / "a")
    elsewhere = tmp_path / "elsewhere"

    def swap() -> None:
        made.path.rename(elsewhere)
        made.path.symlink_to(elsewhere)

    interfere(monkeypatch, swap)
    clean(store, outputs, delete=True)
    assert (elsewhere / "result").is_file()


def test_files_that_are_not_stages_are_retained(store: Path, outputs: Path) -> None:
    chain(store, 1)
    record(outputs / "a")
    mine = [store / "notes.txt", store / "train" / "mine" / "file", store / "train" / ("a" * 16) / "no-manifest"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", "utf-8")
    (store / "train" / "mine" / "manifest.json").write_text("{}", "utf-8")
    clean(store, outputs, delete=True)
    assert all(path.is_file() for path in mine)
    assert (outputs / "a" / "run.json").is_file()


def test_a_store_may_be_a_symbolic_link(store: Path, outputs: Path, tmp_path: Path) -> None:
    kept, lost = chain(tmp_path / "disk" / "store", 1), chain(tmp_path / "disk" / "store", 2)
    outputs.mkdir()
    store.symlink_to(tmp_path / "disk" / "store")
    record(outputs / "a", stages={"all": str(store / "generations" / kept["generations"].key)})
    clean(store, outputs, delete=True)
    assert all(one.path.is_dir() for one in kept.values())
    assert not any(one.path.exists() for one in lost.values())


def test_hard_links_count_once(store: Path, outputs: Path) -> None:
    first, second = stage(store, "train", {"epochs": 2}, b"x" * 1000), stage(store, "train", {"epochs": 1}, b"")
    (second.path / "shared").hardlink_to(first.path / "result")
    both = {item.path: item.bytes for item in unreferenced(store, outputs)}
    manifests = sum((one.path / "manifest.json").stat().st_size for one in (first, second))
    assert sum(both.values()) == 1000 + manifests


def test_without_any_run_nothing_is_deleted(store: Path, outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = chain(store, 1)
    for dry_run in (True, False):
        with pytest.raises(
            ConfigError, match=r"there is no run below .*outputs .* all of .*store would be deleted; set store="
        ):
            clean(store, outputs, delete=True, dry_run=dry_run)
    assert all(one.path.is_dir() for one in made.values())
    assert "deleted" not in printed(capsys)
    clean(store, outputs, delete=False)
    assert "add clean.delete=true" not in printed(capsys)


@pytest.mark.parametrize("delete", [False, True])
def test_a_missing_and_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str], delete: bool) -> None:
    with pytest.raises(ConfigError, match=r"store='.*none': no such folder in .*; set it to the store of your runs"):
        clean(tmp_path / "none", tmp_path / "outputs", delete=delete)
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    clean(tmp_path / "empty", tmp_path / "outputs", delete=delete)
    assert "runs refer to all stages" in printed(capsys)


def test_a_missing_folder_of_runs_stops_the_deletion(store: Path, tmp_path: Path) -> None:
    """A typo in clean.outputs must not make runs look deleted."""
    made, moved = chain(store, 1), chain(store, 2)
    record(tmp_path / "here", stages={"train": made["train"].key})
    Store(store).register(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"clean.outputs='.*archiv': no such folder"):
        clean(store, tmp_path / "archiv", delete=True)
    assert all(one.path.is_dir() for one in [*made.values(), *moved.values()])


def test_a_read_only_store_is_reported(store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(store, "dataset", {"seed": 1})
    record(outputs / "a")
    real = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == made.path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StageError, match=f"clean: cannot delete .*{made.key}: Permission denied"):
        clean(store, outputs, delete=True)
    assert json.loads((made.path / "manifest.json").read_text("utf-8"))["key"] == made.key
