"""The medical questions of the case that this project comes from, where they are at hand (../shared/data)."""

from pathlib import Path
from typing import Any

import pytest
from conftest import compose, rendered
from omegaconf import OmegaConf

from sftlab.config import DatasetConfig
from sftlab.dataset import overlap, sources
from sftlab.dataset.row_formats.recognise import convert, recognise
from sftlab.dataset.templates import Templates

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not on this machine")


def test_medqa_cot_splits_by_seed_and_shares_nothing(config: Any) -> None:
    cfg = config("+experiment=medqa", f"dataset.name_or_path={DATA / 'medqa_cot'}").dataset
    splits = rendered(cfg).splits
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert sum(sizes.values()) == 3741
    assert sizes["validation"] == sizes["test"] == 187
    for rows in splits.values():
        for example in rows:
            assert example.target in example.choices
            assert f"({example.target})" in example.assistant
    assert [row.id for row in rendered(cfg.model_copy(update={"seed": 43})).splits["test"]] != [
        row.id for row in splits["test"]
    ]
    actual = overlap.find_overlaps(splits, max_overlap=cfg.max_overlap)
    assert {(pair.left_split, pair.right_split) for pair in actual.pairs} == {
        ("validation", "train"),
        ("test", "train"),
        ("test", "validation"),
    }


def test_medqa_mounted_as_a_test_set_is_the_whole_file(config: Any) -> None:
    cfg = config(
        "+experiment=medqa", "dataset@eval.dataset=medqa", f"eval.dataset.name_or_path={DATA / 'medqa' / 'test.jsonl'}"
    ).eval.dataset
    splits = rendered(cfg, mounted="eval.dataset").splits
    assert len(splits["test"]) == 1273
    assert splits["train"] == splits["validation"] == []
    example = splits["test"][0]
    assert example.options is not None
    assert set(example.options) == set(example.choices) == set("ABCD")
    assert example.question.endswith(f"(D) {example.options['D']}")


@pytest.mark.parametrize(("folder", "dataset"), [("medqa_cot", "medqa_cot"), ("medqa", "medqa")])
def test_the_questions_are_recognised_without_templates(folder: str, dataset: str) -> None:
    """Letters, and in MedQA the texts of the options, are those of the templates."""
    cfg = DatasetConfig.model_validate(OmegaConf.to_container(compose(f"dataset={dataset}").dataset))
    chunks = [chunk for split in sources.read(DATA / folder).values() for chunk in split]
    rows = [row for chunk in chunks for row in chunk.table().rows if row is not None]
    found = recognise(list(rows[0]), rows)
    assert found.task == "choice"
    templates = Templates(cfg, "dataset", list(rows[0]))
    for row in rows:
        expected, converted = templates.example(row, "1", "row"), convert(found, row)
        assert converted.targets == expected.accepted
        if expected.options is not None:
            assert converted.options == {letter: text.strip() for letter, text in expected.options.items()}
