"""Rows without templates, from a file to examples: formats, overrides, problems, and the task that fits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Row, problem, rendered, write_rows

from sftlab.dataset import stage as dataset
from sftlab.errors import ConfigError
from sftlab.eval.task import fitted
from sftlab.records import single_turn
from sftlab.runtime.store import Store

CHOICES = ["opa", "opb", "opc", "opd"]
BASE = ["model=tiny_random", "train.per_device_train_batch_size=2"]


def chat(number: int) -> Row:
    first, second = (
        single_turn("Be brief.", f"Where is lake {number}?", f"North of hill {number}."),
        single_turn("", f"How deep is lake {number}?", f"It is {number} metres deep, and colder at its bottom."),
    )
    return {"messages": [*first, *second]}


def quiz(number: int) -> Row:
    options = {column: f"{column} of {number}" for column in CHOICES}
    return {"question": f"What is number {number} of all?", **options, "cop": 1 + number % 4}


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    return write_rows(path, rows)


FILES: dict[str, tuple[list[Row], str, str]] = {
    "chats.jsonl": ([chat(number) for number in range(40)], "chat", "rouge"),
    "alpaca.jsonl": ([{"instruction": f"Count to {n}.", "input": "", "output": f"{n}"} for n in range(40)], "alpaca",
                     "exact"),
    "med.csv": ([quiz(number) for number in range(40)], "multiple_choice", "choice"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_examples_without_a_template(tmp_path: Path, config: Any, name: str) -> None:
    rows, form, task = FILES[name]
    cfg = config(*BASE, "dataset=auto", f"dataset.name_or_path={write(tmp_path / name, rows)}")
    assert cfg.eval.task == "auto"
    data = dataset.make(Store(str(tmp_path / "store")), cfg.dataset)
    splits = {split: list(data.split(split)) for split in ("train", "validation", "test")}
    assert [len(examples) for examples in splits.values()] == [32, 4, 4]
    found = data.row_format()
    assert found is not None
    assert found.format == form
    assert found.messages == splits["train"][0].messages
    assert fitted(cfg, splits["test"]).eval.task == task
    written = {json.dumps(example.messages) for examples in splits.values() for example in examples}
    assert len(written) == len(rows)
    if form == "chat":
        assert written == {json.dumps(row["messages"]) for row in rows}
    explicit = config(*BASE, f"dataset={form}", f"dataset.name_or_path={tmp_path / name}")
    assert rendered(explicit.dataset).splits == splits


def test_a_task_that_the_configuration_decides_is_settled_before_the_rows_are_read(config: Any) -> None:
    assert config(*BASE).eval.task == "choice"


def test_templates_replace_parts_of_a_format(tmp_path: Path, config: Any) -> None:
    path = write(tmp_path / "chats.jsonl", FILES["chats.jsonl"][0])
    common = [*BASE, "dataset=auto", f"dataset.name_or_path={path}"]

    def first(*overrides: str) -> Any:
        return rendered(config(*common, *overrides).dataset).splits["train"][0]

    assert [turn["role"] for turn in first().messages] == ["system", "user", "assistant", "user", "assistant"]
    example = first("dataset.system=Answer in French.", "dataset.target='{{ messages[1].content }}'", "eval.task=rouge")
    assert example.messages[0] == {"role": "system", "content": "Answer in French."}
    assert example.target == example.messages[1]["content"]
    assert [turn["role"] for turn in first("dataset.system=''").messages] == ["user", "assistant"] * 2


def test_a_later_row_that_does_not_fit_is_named(tmp_path: Path, config: Any) -> None:
    rows = [quiz(number) for number in range(300)]
    path = write(tmp_path / "med.jsonl", [*rows, {**quiz(300), "cop": 7}, {**quiz(301), "opd": None}])
    with pytest.raises(ConfigError) as caught:
        config(*BASE, "dataset=auto", f"dataset.name_or_path={path}")
    (found,) = caught.value.problems
    assert found.key == f"{path}, row 301"
    assert "cop is 7" in found.message
    assert "dataset.answer_kind" in found.remedy


@pytest.mark.parametrize(
    ("rows", "overrides", "parts"),
    [
        ([{"text": "a long text"}] * 20, [], ["dataset.format=auto: ", "pretraining"]),
        ([{"ask": "why?", "say": "so"}] * 20, [], ["dataset.columns.prompt=ask dataset.columns.completion=say"]),
        ([chat(1)] * 20, ["dataset.user='{{ messages[0].content }}'"], ["dataset.user", "dataset.format=template"]),
        ([chat(1)] * 20, ["dataset.format=template"], ["dataset.user=null", "dataset.target=null"]),
        ([chat(1)] * 20, ["eval.task=choice"], ["eval.task=choice", "no letters", "eval.task=rouge", "mode=train"]),
        ([quiz(1)] * 20, ["dataset.columns.question=opa", "dataset.columns.anwser=cop"], ["dataset.columns.anwser"]),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(
    tmp_path: Path, rows: list[Row], overrides: list[str], parts: list[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    message = problem([*BASE, "dataset=auto", f"dataset.name_or_path={path}", *overrides])
    assert message is not None
    assert all(part in message for part in parts), message


def test_rows_of_different_formats_need_a_source_for_each(tmp_path: Path, config: Any) -> None:
    write_rows(tmp_path / "train.jsonl", [chat(number) for number in range(9)])
    write_rows(tmp_path / "test.jsonl", [{"instruction": f"Count to {n}.", "output": f"{n}"} for n in range(9)])
    with pytest.raises(ConfigError, match=r"different rows have different formats: .*\(dataset\.sources\)"):
        rendered(config(*BASE, "dataset=auto", f"dataset.name_or_path={tmp_path}").dataset)
