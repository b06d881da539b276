"""CONTRIBUTING.md names files and functions that exist, and its steps for adding a model work."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from test_cli import REPORTED, quick, whole

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
# Rows of the tables: | `sftlab/train/stage.py` | `inputs`, `make` | …
TABLES = TEXT[TEXT.index("## From the command line") : TEXT.index("## How to add a dataset")]
STOPS = re.findall(r"^\| `([\w/.]+)` \| (.*?) \|", TABLES, re.MULTILINE)
# Examples that the reader writes.
OWN = {"conf/dataset/mine.yaml", "sftlab/eval/scorers/contains.py"}


def defined(file: Path) -> set[str]:
    """The functions, classes and methods of a module."""
    names = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_the_tables_follow_a_parameter_and_a_row() -> None:
    files = [file for file, _ in STOPS]
    assert len(files) > 30
    assert files[0] == "conf/train/default.yaml"
    assert files.count("sftlab/report/page.py") == 2


@pytest.mark.parametrize(("file", "functions"), STOPS)
def test_every_stop_exists(file: str, functions: str) -> None:
    named = re.findall(r"`([\w.]+)`", functions)
    assert (ROOT / file).is_file()
    assert bool(named) == file.endswith(".py")
    assert set(named) <= (defined(ROOT / file) if named else set())


def test_every_file_that_the_text_names_exists() -> None:
    named = set(re.findall(r"`((?:sftlab|conf|tests|scripts|docs|locks)/[\w./*]*)`", TEXT)) - OWN
    assert len(named) > 30
    assert [name for name in sorted(named) if not list(ROOT.glob(name.rstrip("/")))] == []


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """The arguments for a folder with the model file of the text."""
    (block,) = re.findall(r"^```yaml\n(# conf/model/mine.yaml\n.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    file = tmp_path / "own" / "model" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(block.replace("owner/name", "random:qwen3"), "utf-8")
    return ["--config-dir", "own", "model=mine", "dataset.split={train: 8, validation: 4, test: 4}", "instance=cpu"]


@pytest.mark.slow
def test_a_model_is_added_by_a_file(tmp_path: Path, own: list[str]) -> None:
    done = quick(tmp_path, *own, "dry_run=true", "eval.engine=transformers", modules=REPORTED)
    assert done.returncode == 0, done.stderr
    assert re.search(r"model +random:qwen3: will be downloaded or generated", done.stdout + done.stderr)


@pytest.mark.smoke  # creates the model
def test_the_added_model_is_read(tmp_path: Path, own: list[str]) -> None:
    done = whole(tmp_path, *own, "mode=preview", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "preview.html").is_file()
    (config,) = (tmp_path / "outputs" / "store" / "model").glob("*/config.json")
    assert json.loads(config.read_text("utf-8"))["model_type"] == "qwen3"
