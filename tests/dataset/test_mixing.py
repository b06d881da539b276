"""Several sources in one dataset (dataset.sources): formats, weights, splits, keys, and every refusal."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, write_model, write_rows
from test_dataset import SPLITS
from test_prompt import settings

from sftlab.config import Config, DatasetConfig, TrainOn
from sftlab.dataset import stage as dataset
from sftlab.dataset.pinning import pinned_data
from sftlab.dataset.prompt import tokenize
from sftlab.errors import ConfigError
from sftlab.eval.contenders import read_test
from sftlab.eval.decision import decide
from sftlab.eval.scorers import scorer
from sftlab.eval.task import fitted
from sftlab.model.base import Base
from sftlab.records import Example, Generation
from sftlab.runtime.job import revisions
from sftlab.runtime.store import Store
from sftlab.validation.validate import validate

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def write_chats(path: Path, count: int = 20) -> Path:
    turns = [("user", "Is {} even?"), ("assistant", "{}")]
    return write_rows(
        path,
        [
            {
                "messages": [
                    {"role": role, "content": text.format(n if role == "user" else ("yes", "no")[n % 2])}
                    for role, text in turns
                ],
                "kind": "chat",
                "patient": f"p{n // 2}",
            }
            for n in range(count)
        ],
    )


def write_choices(path: Path, count: int = 15) -> Path:
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["question", "opa", "opb", "opc", "opd", "cop", "patient"])
        for n in range(count):
            writer.writerow(
                [f"Which of these is item {n}?", f"a{n}", f"b{n}", f"c{n}", f"d{n}", 1 + n % 4, f"p{n // 2}"]
            )
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Two sources of different formats."""
    chats, choices = write_chats(tmp_path / "chat.jsonl"), write_choices(tmp_path / "mc.csv")
    return {"chat": {"name_or_path": str(chats)}, "mc": {"name_or_path": str(choices)}}


def mix(sources: dict[str, Any] | None, **changed: Any) -> DatasetConfig:
    """A dataset whose formats are recognised."""
    templates = ("id", "user", "assistant", "target", "choices", "options", "system", "keep", "group_by", "stratify_by")
    auto = {"name_or_path": None, "format": "auto", "sources": sources, "split": SHARES, **dict.fromkeys(templates)}
    return settings(**{**auto, **changed})


def made(tmp_path: Path, cfg: DatasetConfig, *, mounted: bool = False) -> dataset.Dataset:
    return dataset.make(Store(tmp_path / "store"), cfg, mounted=mounted)


def splits(tmp_path: Path, cfg: DatasetConfig, *, mounted: bool = False) -> dict[str, list[Example]]:
    data = made(tmp_path, cfg, mounted=mounted)
    return {name: list(data.split(name)) for name in SPLITS}


def plain(example: Example, name: str) -> Example:
    """An example as the dataset of its source alone has it."""
    group = example.group and example.group.removeprefix(f"{name}/")
    return replace(example, id=example.id.removeprefix(f"{name}/"), group=group, source=None)


def test_sources_of_different_formats_are_mixed(files: dict[str, Any], tmp_path: Path) -> None:
    data = made(tmp_path, mix(files))
    train, validation, test = (list(data.split(name)) for name in SPLITS)
    assert Counter(row.source for row in train) == {"chat": 12, "mc": 9}
    order = [row.source for row in train]
    assert order != sorted(order, key=lambda name: name or "")  # shuffled
    assert order != sorted(order, key=lambda name: name or "", reverse=True)
    assert [row.source for row in validation] == ["chat"] * 4 + ["mc"] * 3
    assert [row.source for row in test] == ["chat"] * 4 + ["mc"] * 3
    assert all(row.id.startswith(f"{row.source}/") for row in [*train, *validation, *test])
    formats = {record.name: record.row_format and record.row_format.format for record in data.sources()}
    assert formats == {"chat": "chat", "mc": "multiple_choice"}
    assert [record.rows for record in data.sources()] == [
        {"train": 12, "validation": 4, "test": 4},
        {"train": 9, "validation": 3, "test": 3},
    ]


def test_each_source_has_the_examples_of_its_own_dataset(files: dict[str, Any], tmp_path: Path) -> None:
    own = {"group_by": "{{ patient }}", "max_rows": 12}
    mixed = splits(tmp_path, mix(files, **own))
    for name, source in files.items():
        alone = splits(tmp_path, mix(None, **source, **own))
        for split in SPLITS:
            rows = [plain(row, name) for row in mixed[split] if row.source == name]
            if split == "train":  # its order is that of the mix
                rows.sort(key=lambda row: row.id)
                alone[split].sort(key=lambda row: row.id)
            assert rows == alone[split]
    groups = {name: {row.group for rows in mixed.values() for row in rows if row.source == name} for name in files}
    assert None not in groups["chat"] | groups["mc"]
    assert not groups["chat"] & groups["mc"]  # "p1" of one source is not "p1" of the other


@pytest.mark.parametrize(("weight", "times"), [(2, {2: 12}), (0.5, {1: 6}), (1.5, {1: 6, 2: 6}), (0.01, {1: 1})])
def test_weight_is_how_often_training_rows_are_used(
    files: dict[str, Any], tmp_path: Path, weight: float, times: dict[int, int]
) -> None:
    before = splits(tmp_path, mix(files))
    after = splits(tmp_path, mix({**files, "chat": {**files["chat"], "weight": weight}}))
    used = Counter(row.id for row in after["train"] if row.source == "chat")
    assert Counter(used.values()) == times
    assert set(used) <= {row.id for row in before["train"]}
    assert sum(row.source == "mc" for row in after["train"]) == 9
    assert after["validation"] == before["validation"]
    assert after["test"] == before["test"]


def test_the_seed_decides_the_order_and_the_drawn_rows(files: dict[str, Any], tmp_path: Path) -> None:
    half = {**files, "chat": {**files["chat"], "weight": 0.5}}
    first, again = (splits(tmp_path / name, mix(half)) for name in ("a", "b"))
    assert first == again
    assert splits(tmp_path, mix(half, seed=7))["train"] != first["train"]


def test_a_source_has_the_keys_of_the_section_that_it_does_not_set(files: dict[str, Any], tmp_path: Path) -> None:
    files["chat"] |= {"split": {"train": 10, "validation": 0, "test": 0}, "system": "Be brief."}
    rows = splits(tmp_path, mix(files, system="Be exact."))
    assert Counter(row.source for row in rows["train"]) == {"chat": 10, "mc": 9}
    assert {row.source for row in [*rows["validation"], *rows["test"]]} == {"mc"}
    systems = {row.source: row.messages[0]["content"] for row in rows["train"]}
    assert systems == {"chat": "Be brief.", "mc": "Be exact."}


def test_the_key_has_the_content_of_every_source(files: dict[str, Any], tmp_path: Path) -> None:
    def key() -> str:
        return made(tmp_path, mix(files)).stage.key

    keys = [key()]
    write_chats(tmp_path / "chat.jsonl", 21)
    keys.append(key())
    write_choices(tmp_path / "mc.csv", 16)
    keys.append(key())
    files["mc"]["weight"] = 3
    keys.append(key())
    assert len(set(keys)) == 4
    assert key() == keys[-1]
    assert made(tmp_path, mix(files, max_overlap=0.1)).stage.key == keys[-1]


def test_a_mounted_mix_is_a_test_set(files: dict[str, Any], tmp_path: Path) -> None:
    rows = splits(tmp_path, mix(files), mounted="eval.dataset")
    assert [len(rows[name]) for name in SPLITS] == [0, 0, 35]


def test_results_are_reported_by_source(files: dict[str, Any], tmp_path: Path) -> None:
    cfg = validated(files, "eval.task=exact", "dataset.split={train: 0.6, validation: 0.2, test: 0.2}")
    test = read_test(cfg, Store(tmp_path / "store"), made(tmp_path, cfg.dataset)).examples
    answers = [Generation(row.id, "", row.target if row.source == "chat" else "?", "stop", 1) for row in test]
    evaluation = decide(
        {"finetuned": [scorer(cfg.eval).predictions(answers, test)]}, {}, cfg.eval, tmp_path, both_mute=True
    )
    found = evaluation.subgroups
    assert found is not None
    assert found.column == "source"
    assert {group.name: (group.n, group.finetuned and group.finetuned.value) for group in found.groups} == {
        "chat": (4, 1),
        "mc": (3, 0),
    }


def test_subgroups_of_a_column_that_one_source_has(files: dict[str, Any]) -> None:
    values = dataset.subgroups(mix(files), "kind")
    assert Counter(values.values()) == {"chat": 4, None: 3}
    with pytest.raises(ConfigError, match=r"eval\.group_by='nothing': no source has such a column"):
        dataset.subgroups(mix(files), "nothing")


def test_problems_of_all_sources_are_reported_with_their_keys(files: dict[str, Any], tmp_path: Path) -> None:
    files["chat"] |= {"group_by": "{{ nothing }}"}
    files["mc"] |= {"columns": {"question": "nothing"}}
    with pytest.raises(ConfigError) as caught:
        splits(tmp_path, mix(files))
    assert {problem.key.rpartition(".")[0] for problem in caught.value.problems} >= {"dataset.sources.chat"}
    assert "dataset.sources.mc.columns.question" in str(caught.value)


def validated(sources: Any, *overrides: str) -> Config:
    cfg = compose("model=tiny_random", "dataset=auto", *overrides)
    cfg.dataset.sources = sources
    return validate(cfg)


def test_sources_are_validated_without_a_name_of_the_section(files: dict[str, Any]) -> None:
    cfg = validated(files)
    assert cfg.dataset.name_or_path is None
    assert [part.key for part in cfg.dataset.parts()] == ["dataset.sources.chat", "dataset.sources.mc"]
    assert Config.model_validate(cfg.model_dump()) == cfg  # as job.json has it
    known = fitted(cfg, dataset.load(Store(cfg.store), cfg.dataset)["test"]).eval
    assert known.task == "exact"
    assert known.extract
    assert "[(]([A-Z])[)]" in known.extract  # rows of both sources can be right


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, r"dataset\.sources=\{\}: has no source"),
        ({"a": {"wieght": 2}}, r"dataset\.sources\.a\.wieght: no such key; did you mean dataset\.sources\.a\.weight\?"),
        ({"a": {"weight": 0}}, r"dataset\.sources\.a\.weight=0: should be greater than 0"),
        ({"a": {"weight": "2"}}, r"dataset\.sources\.a\.weight='2': should be a valid number"),
        ({"a": {"name_or_path": None}}, r"dataset\.sources\.a\.name_or_path=null: should be a valid string"),
        ({"a": {"allow_overlap": True}}, r"dataset\.sources\.a\.allow_overlap: .*; set dataset\.allow_overlap"),
        ({"a": {"split": {"trian": 1}}}, r"dataset\.sources\.a\.split\.trian: no such key; the splits are"),
        ({"a b": {}}, r"dataset\.sources\.a b: is not a name of a source"),
        ({"a": {"name_or_path": "missing.csv"}}, r"dataset\.sources\.a\.name_or_path='missing.csv': no such file"),
        ({"a": {"split": {"train": 5}}}, r"dataset\.sources=\['a'\]: no source has validation rows"),
    ],
)
def test_wrong_sources_are_refused(tmp_path: Path, sources: Any, message: str) -> None:
    file = {"name_or_path": str(write_chats(tmp_path / "chat.jsonl"))}
    with pytest.raises(ConfigError, match=message):
        validated({name: file | one for name, one in sources.items()})


def test_a_wrong_value_of_the_section_is_reported_once(files: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(files, "dataset.max_rows=0")
    assert [problem.key for problem in caught.value.problems] == ["dataset.max_rows"]


def test_a_name_beside_sources_is_refused(files: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.name_or_path='x\.csv': has no effect with dataset\.sources"):
        validated(files, "dataset.name_or_path=x.csv")
    with pytest.raises(ConfigError, match=r"dataset\.name_or_path=null: names no rows"):
        validated(None, "dataset.name_or_path=null")


def test_a_source_given_twice_on_the_command_line_is_refused() -> None:
    from sftlab.hydra_app.arguments import options_first

    with pytest.raises(ConfigError, match=r"dataset\.sources: has the key 'a' twice"):
        options_first(["dataset.sources={a: {name_or_path: x, id: a}, b: {name_or_path: z}, a: {name_or_path: y}}"])
    assert options_first(["dataset.sources={a: {id: a}, b: {id: a}}"])


def test_commits_of_every_source_are_pinned(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = validated(files)
    hub = {"hub": {"name_or_path": "org/rows"}, **files}
    cfg = cfg.model_copy(update={"dataset": mix(hub)})
    monkeypatch.setattr("sftlab.model.hub.dataset_commit", lambda name, revision, key: f"{key} of {name}")
    commit = "dataset.sources.hub.name_or_path of org/rows"
    assert revisions(pinned_data(cfg)) == {"dataset.sources.hub.revision": commit}
    assert json.loads(json.dumps(dataset.inputs(mix(hub))["source"]))["hub"] == commit


def test_each_source_has_its_own_supervised_turns(files: dict[str, Any], tmp_path: Path) -> None:
    turns = [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    sources = {name: {"name_or_path": str(write_rows(tmp_path / name, [chat] * 3))} for name in ("a.jsonl", "b.jsonl")}
    cfg = mix({"all": sources["a.jsonl"], "last": {**sources["b.jsonl"], "train_on": "last"}}, train_on="all")
    tokenizer = Base("tiny", write_model(tmp_path / "m"), "identity", False, None).tokenizer()
    rows = splits(tmp_path, cfg)["train"]

    def labels_of(row: Example, train_on: TrainOn) -> list[int]:
        return tokenize(tokenizer, row, train_on)[0].labels

    labels = {row.source: tokenize(tokenizer, row, cfg.supervised())[0].labels for row in rows}
    assert labels == {"all": labels_of(rows[0], "all"), "last": labels_of(rows[0], "last")}
    assert labels["all"] != labels["last"]
