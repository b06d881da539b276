"""A new task is one file and one config choice, as CONTRIBUTING.md describes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from conftest import write_rows

import sftlab
from sftlab.config import EvalConfig, Task
from sftlab.eval import scorers

CONTAINS = '''
"""``eval.task=contains``: a target is anywhere in the answer."""

from __future__ import annotations

from sftlab.eval.scorers.accuracy import Accuracy
from sftlab.records import Example, Prediction


class Contains(Accuracy):
    """Right if the answer contains a target."""

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether a reference is part of the answer."""
        return any(reference in answer for reference in self.references(row))
'''


def test_every_task_of_the_config_has_a_scorer() -> None:
    tasks = get_args(Task)
    for task in tasks:
        scorer = scorers.scorer(
            EvalConfig.model_construct(
                task=task,
                rouge="rougeL",
                metric="score.py",
                metric_value=None,
                scorer="a.py:score",
                smallest_gain=0.0,
                margin=None,
            )
        )
        assert scorer.metric in (scorer.view.metrics or ["score"])
        assert scorers.view(task) is scorer.view
        assert type(scorer).__doc__


@pytest.mark.smoke  # a process of its own
def test_a_scorer_is_added_by_a_file_and_a_choice(tmp_path: Path) -> None:
    package = Path(sftlab.__file__).parent
    shutil.copytree(package, tmp_path / "sftlab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "conf", tmp_path / "conf")
    (tmp_path / "sftlab" / "eval" / "scorers" / "contains.py").write_text(CONTAINS, "utf-8")
    config = tmp_path / "sftlab" / "config.py"
    choices = 'Task = Literal["choice", '
    text = config.read_text("utf-8")
    assert text.count(choices) == 1
    config.write_text(text.replace(choices, f'{choices}"contains", '), "utf-8")

    work = tmp_path / "work"
    work.mkdir()
    for name, words in (("a", "in Paris"), ("b", "in Berne, since 1848")):
        write_rows(work / f"{name}.jsonl", [{"id": at, "completion": words, "target": "Berne"} for at in range(8)])
    done = subprocess.run(
        [sys.executable, "-m", "sftlab", "mode=compare", "eval.task=contains", "eval.predictions=[a.jsonl,b.jsonl]",
         "tracking=none", "hydra.run.dir=run"],
        cwd=work, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((work / "run" / "run.json").read_text("utf-8"))["evaluation"]
    assert evaluation["task"] == "contains"
    assert [evaluation[side]["correct"] for side in ("baseline", "finetuned")] == [0, 8]
    assert evaluation["comparison"]["verdict"]["outcome"] == "better"
    assert "Verdict: better: 8 of 8 against 0" in done.stdout
    page = (work / "run" / "report.html").read_text("utf-8")
    assert "<h1>b is better." in page
    assert ">Question by question<" in page
