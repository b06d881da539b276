"""mode=export: what is refused, and what is written; tests/serve/test_serve.py exports a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import composed
from made_runs import make_run
from test_cli import quick

from sftlab import work
from sftlab.errors import ConfigError
from sftlab.export import formats, stage
from sftlab.instance import machine as instance
from sftlab.model import finished
from sftlab.runtime.store import Store


def test_a_format_that_a_cpu_cannot_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    name = "fp8"
    make_run(tmp_path)
    done = quick(tmp_path, "mode=export", f"export.format={name}", "instance=cpu")
    assert done.returncode == 2
    assert f"sftlab: export.format={name}: cannot be tested on the CPU: " in done.stderr
    assert done.stderr.endswith("; choose gguf, awq or bnb4, or export on a machine with a GPU\n")
    assert [
        one for one in formats.problems(composed(f"export.format={name}").export, "cuda") if "CPU" in str(one)
    ] == []


def test_a_tool_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    remedies = {"gguf": "auto-round; pip install --no-deps -r locks/export.lock",
                "bnb4": "bitsandbytes; pip install --no-deps -r locks/cpu.lock"}  # fmt: skip
    for name, remedy in remedies.items():
        (problem,) = formats.problems(composed(f"export.format={name}").export, "cpu")
        assert str(problem) == f"export.format={name}: requires the package {remedy}"


def test_a_folder_that_may_not_be_written_to_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed(f"run={make_run(tmp_path)}", f"store={tmp_path}/outputs/store", "instance=cpu")
    monkeypatch.setattr(work, "not_writable", lambda folder: "may not be written to")
    with pytest.raises(ConfigError, match=r"may not be written to; make it writable"):
        work.export_run(cfg, dry_run=True)


def test_another_type_of_weights_is_another_export(tmp_path: Path) -> None:
    run = finished.find(composed(f"run={make_run(tmp_path)}", f"store={tmp_path}/outputs/store"))
    varied = (["export.gguf=q8_0"], ["export.gguf=q4_k_m"], ["export.format=bnb4"], ["export.rows=5"])
    keys = [Store(tmp_path).path("export", stage.inputs(run, composed(*words).export, [])) for words in varied]
    assert keys[0] == keys[3]  # the rows are of AWQ
    assert len(set(keys)) == 3


def test_awq_without_training_rows_says_so(tmp_path: Path) -> None:
    cfg = composed(f"run={make_run(tmp_path)}", f"store={tmp_path}/outputs/store", "export.format=awq", "instance=cpu")
    with pytest.raises(ConfigError, match="measures activations on training rows, and those of the run were deleted"):
        stage.make(Store(cfg.store), finished.find(cfg), cfg.export, instance.find(cfg.instance))
