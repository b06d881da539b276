"""A new user's file, from the file to the report with one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import whole
from test_recognition import FILES, write

pytestmark = pytest.mark.smoke

TINY = [
    "model=tiny_random",
    "eval.engine=transformers",
    "eval.max_tokens=16",
    "tracking=none",
    "train.num_train_epochs=1",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_leads_to_a_report_with_one_command(tmp_path: Path, name: str) -> None:
    rows, form, task = FILES[name]
    write(tmp_path / name, rows)
    done = whole(tmp_path, *TINY, "dataset=auto", f"dataset.name_or_path={name}", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert f"dataset: format {form}" in done.stdout
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert run["row_format"]["format"] == form
    assert run["row_format"]["messages"][-1]["role"] == "assistant"
    assert run["evaluation"]["task"] == task
    assert (tmp_path / "run" / "report.html").exists()
