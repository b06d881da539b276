"""Rows from files and folders → splits: every format, every way that a file can be wrong, and the drawing."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Row, rendered, vignette, vignettes, write_rows
from test_prompt import settings

from sftlab.dataset import content, formats, sources
from sftlab.dataset import stage as dataset
from sftlab.dataset.rows import Table
from sftlab.errors import ConfigError
from sftlab.records import Example
from sftlab.runtime.store import Store

SPLITS = ("train", "validation", "test")


def examples(path: Path, seed: int = 42, mounted: str | None = None, **changed: Any) -> dict[str, list[Example]]:
    return rendered(settings(name_or_path=str(path), seed=seed, **changed), mounted=mounted).splits


def ids(splits: dict[str, list[Example]]) -> dict[str, list[str]]:
    return {name: [example.id for example in rows] for name, rows in splits.items()}


def sizes(splits: dict[str, list[Example]]) -> tuple[int, ...]:
    return tuple(len(splits[name]) for name in SPLITS)


# — formats —


def write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows), "utf-8")


def write_wrapped(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps({"version": "1", "data": rows}), "utf-8")


def write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows), "utf-8")  # BOM, empty lines, no last end


def write_parquet(path: Path, rows: list[Row]) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_rows), ("a.jsonl", write_lines), ("a.json", write_json), ("a.json", write_wrapped),
     ("a.json", write_lines), ("a.parquet", write_parquet)],
)  # fmt: skip
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path, list[Row]], Any]) -> None:
    # Rows with three options and rows with two: a Parquet file has a null where a key is missing.
    rows = [vignette(1, options={"A": "this", "B": "that", "C": "both"}), *vignettes(1), vignette(2, question="Größe?")]
    write(tmp_path / name, rows)
    result = examples(tmp_path / name, mounted="eval.dataset")["test"]
    assert [example.id for example in result] == ["row-1", "row-0", "row-2"]
    assert [example.choices for example in result] == ["ABC", "AB", "AB"]
    assert result[2].question == "Größe? (A) this (B) that"


def flat(**changed: Any) -> dict[str, Any]:
    """Settings for rows without nested columns."""
    return {"user": "{{ question }}", "choices": "AB", "options": None, **changed}


def test_a_csv_files_cells_stay_text(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "rationale", "answer_idx"])
        writer.writerow(["007", 'Two, "quoted"\nlines?', "NA", "A"])
        writer.writerow(["1e3", "None", "x" * 200_000, "B"])
    result = examples(tmp_path / "a.csv", mounted="eval.dataset", **flat())["test"]
    assert [(row.id, row.question, row.target) for row in result] == [
        ("007", 'Two, "quoted"\nlines?', "A"),
        ("1e3", "None", "B"),
    ]
    assert result[0].assistant == "NA"


def test_a_folder_with_its_own_splits_is_used_as_it_is(tmp_path: Path) -> None:
    rows = vignettes(30)
    write_rows(tmp_path / "train.jsonl", rows[:20])
    write_rows(tmp_path / "valid.jsonl", rows[20:25])
    write_json(tmp_path / "test.json", rows[25:])
    (tmp_path / "README.md").write_text("about", "utf-8")
    result = ids(examples(tmp_path))
    assert result == {
        "train": [row["id"] for row in rows[:20]],
        "validation": [row["id"] for row in rows[20:25]],
        "test": [row["id"] for row in rows[25:]],
    }


def test_shards_of_a_split_are_all_read(tmp_path: Path) -> None:
    rows = vignettes(30)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", rows[:10])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", rows[10:20])
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", rows[20:25])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows[25:])
    assert sizes(examples(tmp_path)) == (20, 5, 5)


def test_what_a_folder_lacks_is_cut_from_its_training_rows(tmp_path: Path) -> None:
    rows = vignettes(120)
    write_rows(tmp_path / "train.jsonl", rows[:100])
    write_rows(tmp_path / "test.jsonl", rows[100:])
    result = examples(tmp_path, split={"train": 0.9, "validation": 0.1, "test": 0.5})
    assert sizes(result) == (90, 10, 20)
    assert ids(result)["test"] == [row["id"] for row in rows[100:]]


def test_a_folder_of_other_names_is_one_source(tmp_path: Path) -> None:
    write_rows(tmp_path / "part1.jsonl", vignettes(12))
    write_rows(tmp_path / "part2.jsonl", [vignette(number) for number in range(12, 20)])
    assert sizes(examples(tmp_path)) == (10, 5, 5)


HUB: list[tuple[list[str], dict[str, int] | str]] = [
    (["train"], {"all": 3}),
    (["full"], {"all": 3}),
    (["train", "test"], {"train": 3, "test": 3}),
    (["train_sft", "test_sft"], {"train": 3, "test": 3}),
    (["train", "validation", "test", "one_shot_examples"], {"train": 3, "validation": 3, "test": 3}),
    (["train_sft", "train_gen", "test_sft"], "train_sft, train_gen would be merged into train; write the splits"),
    (["train_r1", "train_r2"], "train_r1, train_r2 would be merged into train"),
    (["train", "dev", "test"], "org/rows: the split dev has no rows; write the others"),
    (["a", "b"], "a, b would be merged into a single source"),
]


@pytest.mark.parametrize(("names", "expected"), HUB, ids=[" ".join(case[0]) for case in HUB])
def test_splits_of_the_hub_are_named_by_the_same_rule(
    names: list[str], expected: dict[str, int] | str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {name: 0 if name == "dev" else 3 for name in names}
    splits = {name: [*formats.Parsed.of(Table(vignettes(size), []))] for name, size in sizes.items()}
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            sources.read_hub("org/rows", splits, sizes)
        return
    result = sources.read_hub("org/rows", splits, sizes)
    assert {name: sum(len(chunk.table().rows) for chunk in chunks) for name, chunks in result.items()} == expected
    assert ("one_shot_examples" in caplog.text) == ("one_shot_examples" in names)


# — wrong files —


def text(content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


GOOD = json.dumps(vignette(0)) + "\n"
FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a.jsonl", text(""), "a.jsonl: is empty; give a file with rows"),
    ("a.jsonl", text("\n \n"), "has no rows"),
    ("a.jsonl", text(GOOD + "\n{'single': 'quotes'}\n"), "a.jsonl:3: is not JSON: "),
    ("a.jsonl", text(GOOD + "[1, 2]\n"), "a.jsonl:2: is JSON, but not an object"),
    ("a.jsonl", text(GOOD.encode() + b'{"question": "\xff"}\n'), "a.jsonl:2: is not UTF-8 (byte 0xff)"),
    ("a.jsonl", text(GOOD + "\n" + "[" * 200_000), "a.jsonl:3: is not JSON: maximum recursion depth"),
    ("a.json", text('{"a":' * 200_000), "a.json: is not JSON: maximum recursion depth"),
    ("a.json", text('[{"a": 1}, {"a": 2'), "a.json: is not JSON: "),
    ("a.json", text("[1, 2]"), "a.json: is not a list of objects; write a JSON array of rows"),
    ("a.json", text("[]"), "has no rows"),
    ("a.csv", text("id,question\n"), "has no rows"),
    ("a.csv", text("id,question\n1,What, now?\n"), "a.csv:2: has 3 cells, and the header has 2 (id, question)"),
    ("a.csv", text("id,question\n1\n"), "a.csv:2: has 1 cell, and the header has 2"),
    ("a.csv", text("id,id\n1,2\n"), "a.csv:1: two columns have the same name"),
    ("a.csv", text('id,question\n1,"open\n'), "a.csv:2: cannot be read as CSV"),
    ("a.csv", text(b"id,question\n1,\xff\n"), "a.csv:2: is not UTF-8 (byte 0xff)"),
    ("a.parquet", text("PAR1 is not enough"), "a.parquet: cannot be read as Parquet: "),
    ("a.xlsx", text("id\tquestion\n"), "a.xlsx: does not end in .jsonl, .json, .csv, .tsv, .parquet"),
]


@pytest.mark.parametrize(("name", "write", "message"), FILES, ids=[f"{case[0]} {case[2]}" for case in FILES])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        examples(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert ";" in str(caught.value)  # a remedy


FOLDERS: list[tuple[list[str], str]] = [
    ([], "has no .jsonl, .json, .csv, .tsv, .parquet, .arrow file; check the path"),
    (["README.md", ".hidden.jsonl", "dataset_infos.json"], "has no .jsonl"),
    (["train.jsonl", "test.txt"], "test.txt would not be read; move"),
    (["train.jsonl", "test.jsonl.bz2"], "test.jsonl.bz2 would not be read; move"),
    (["train.jsonl", "test.xlsx", "dev.feather"], "dev.feather, test.xlsx would not be read; move"),
    (["train.jsonl", "extra.jsonl"], "extra.jsonl would not be read; move"),
    (["train.jsonl", "test"], ": test would not be read; move"),
    (["train.jsonl", "more/test.jsonl"], ": more would not be read; move"),
    (["data/train.jsonl", "data/test.jsonl"], "has data in folders only (data); name one of them"),
    (["train_test.jsonl"], "train_test.jsonl may be test or train; keep one"),
    (["a_train.jsonl", "b_train.jsonl", "test.jsonl"], "a_train.jsonl, b_train.jsonl would be merged into train"),
    (["train_sft.jsonl", "train_gen.jsonl"], "train_gen.jsonl, train_sft.jsonl would be merged into train"),
    (["train.jsonl", "train.jsonl.gz"], "train.jsonl, train.jsonl.gz would be merged into train"),
    (["train.jsonl", "train.parquet"], "train.jsonl, train.parquet would be merged into train"),
    (["train.v1.jsonl", "train.v2.jsonl"], "train.v1.jsonl, train.v2.jsonl would be merged into train"),
    (["fold1.jsonl", "fold2.jsonl"], "fold1.jsonl, fold2.jsonl would be merged into a single source"),
    (["train.jsonl", "dev.jsonl", "valid.jsonl"], "dev.jsonl, valid.jsonl would be merged into validation"),
    (
        ["train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"],
        "train-00002-of-00003.jsonl: only 2 of 3 shards are there; fetch train-00000-of-00003.jsonl too",
    ),
    (["train-00000-of-00002-5bf5b1f0b1a4.jsonl"], "1 of 2 shards are there; fetch train-00001-of-00002.jsonl too"),
    (
        ["train-00000-of-00002-5bf5b1.jsonl", "train-00000-of-00002-9c2d77.jsonl"],
        "would be merged into train; keep one",
    ),
    (["train.jsonl", "raw/v1/test.jsonl"], ": raw would not be read; move"),
    (["train.jsonl", "raw/v1/more/heldout.data"], ": raw would not be read; move"),
    (["train.jsonl", "metadata.json"], ": metadata.json would not be read; move"),
    (["train.jsonl", "citation.jsonl"], ": citation.jsonl would not be read; move"),
    (["train.jsonl", "notice.csv"], ": notice.csv would not be read; move"),
    (["train.jsonl", "README.jsonl.gz"], ": README.jsonl.gz would not be read; move"),
    (["train.jsonl", "heldout.jsonl.bak"], ": heldout.jsonl.bak would not be read; move"),
    (["train.jsonl", "heldout.data"], ": heldout.data would not be read; move"),
    (["train.jsonl", "heldout.jsonl~"], ": heldout.jsonl~ would not be read; move"),
    (["train-1.jsonl", "train-3.jsonl"], "train-1.jsonl, train-3.jsonl would be merged into train"),
]


def test_the_remedy_for_files_without_a_split_works(tmp_path: Path) -> None:
    for number, name in enumerate(("fold1.jsonl", "fold2.jsonl", "fold3.jsonl")):
        write_rows(tmp_path / name, [vignette(number * 9 + row) for row in range(9)])
    with pytest.raises(ConfigError, match="name each after its split") as caught:
        examples(tmp_path)
    match = re.search(r"\((\w+), (\w+) or (\w+)\)", str(caught.value))
    assert match
    for number, split in enumerate(match.groups(), start=1):
        (tmp_path / f"fold{number}.jsonl").rename(tmp_path / f"{split}.jsonl")
    assert sizes(examples(tmp_path)) == (9, 9, 9)


@pytest.mark.parametrize(("names", "message"), FOLDERS, ids=[" ".join(case[0]) for case in FOLDERS])
def test_a_folder_of_which_a_part_would_be_ignored_or_mixed_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        write_rows(tmp_path / name, [vignette(number * 9 + row) for row in range(9)])
    with pytest.raises(ConfigError) as caught:
        examples(tmp_path)
    assert message in str(caught.value)
    assert ";" in str(caught.value)


def test_a_broken_link_in_a_folder_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", vignettes(9))
    (tmp_path / "test.jsonl").symlink_to("../blobs/0123abcd")
    with pytest.raises(ConfigError, match=r"test\.jsonl cannot be read: a link to \.\./blobs/0123abcd, which is not"):
        examples(tmp_path)


def test_documents_beside_data_are_not_data(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", vignettes(9))
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json", "metadata.json"):
        (tmp_path / name).write_text(json.dumps({"name": "x", "parts": [1]}), "utf-8")
    for name in ("README", "README.md", "LICENSE", "LICENSE.txt", ".gitattributes", "CITATION.cff", "notes", "a.png"):
        (tmp_path / name).write_text("text", "utf-8")
    (tmp_path / "docs" / "img").mkdir(parents=True)
    (tmp_path / "docs" / "img" / "a.png").write_text("text", "utf-8")
    (tmp_path / "docs" / "README.md").write_text("text", "utf-8")
    assert sum(sizes(examples(tmp_path))) == 9


def empty_parquet(path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(vignettes(1)).slice(0, 0), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("test.jsonl", lambda path: path.write_text("\n \n", "utf-8")),
        ("test.json", lambda path: path.write_text("[]", "utf-8")),
        ("test.csv", lambda path: path.write_text("id,question\n", "utf-8")),
        ("validation.parquet", empty_parquet),
        ("train.jsonl.gz", lambda path: path.write_bytes(gzip.compress(b"\n"))),
    ],
)
def test_a_split_without_rows_is_not_cut_from_another(tmp_path: Path, name: str, write: Callable[[Path], Any]) -> None:
    other = "validation.jsonl" if "train" in name else "train.jsonl"
    write_rows(tmp_path / other, vignettes(9))
    write(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} has no rows; write the {name.split('.')[0]} rows into it"):
        examples(tmp_path)


def test_shards_with_a_hash_in_their_names_are_shards(tmp_path: Path) -> None:
    rows = vignettes(36)
    for number, code in enumerate(("5bf5b1f0b1a4c3d2", "9c2d77aa01beef00", "0123456789abcdef")):
        name = f"train-0000{number}-of-00003-{code}.jsonl"
        write_rows(tmp_path / name, rows[9 * number : 9 * number + 9])
    write_rows(tmp_path / "test-00000-of-00001-77aa01be5bf5b1f0.jsonl", rows[27:])
    result = ids(examples(tmp_path, split={"train": 0.9, "validation": 0.1, "test": 0.1}))
    assert result["test"] == [row["id"] for row in rows[27:]]
    assert sorted(result["train"] + result["validation"]) == sorted(row["id"] for row in rows[:27])


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train.jsonl", "eval.jsonl", "test.jsonl"),
        ("Train.JSONL", "Dev.jsonl", "TEST.jsonl"),
        ("X_train.jsonl", "X_val.jsonl", "X_test.jsonl"),
        ("train_sft.jsonl", "valid_sft.jsonl", "test_sft.jsonl"),
        ("medqa.train.v2.jsonl", "medqa.dev.v2.jsonl", "medqa.test.v2.jsonl"),
        ("trainData.jsonl", "devData.jsonl", "testData.jsonl"),
        ("medqaTrain.jsonl", "medqaValid.jsonl", "medqaTest2.jsonl"),
        ("traindata.jsonl", "valdata.jsonl", "testdata.jsonl"),
        ("training.jsonl", "devset.jsonl", "testing-2024.jsonl"),
        ("data-train-00000-of-00001.jsonl", "validation0.jsonl", "test-part-1.jsonl"),
    ],
)
def test_usual_names_are_recognised(tmp_path: Path, train: str, validation: str, test: str) -> None:
    rows = vignettes(30)
    parts = {train: rows[:20], validation: rows[20:25], test: rows[25:]}
    for name, part in parts.items():
        write_rows(tmp_path / name, part)
    (tmp_path / "LICENSE.txt").write_text("free", "utf-8")
    result = ids(examples(tmp_path))
    assert result == dict(zip(SPLITS, ([row["id"] for row in part] for part in parts.values()), strict=True))


def compressed(suffix: str, data: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    from pyarrow import BufferOutputStream, CompressedOutputStream

    buffer = BufferOutputStream()
    with CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return bytes(buffer.getvalue())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "write"), [("test.jsonl", write_rows), ("test.json", write_json), ("test.parquet", write_parquet)]
)
def test_compressed_files_are_read(
    tmp_path: Path, name: str, write: Callable[[Path, list[Row]], Any], suffix: str
) -> None:
    rows = vignettes(30)
    write_rows(tmp_path / "train.jsonl", rows[:25])
    write(tmp_path / name, rows[25:])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    (tmp_path / f"{name}{suffix}").write_bytes(
        compressed(suffix, data[: len(data) // 2]) + compressed(suffix, data[len(data) // 2 :])
    )
    assert ids(examples(tmp_path))["test"] == [row["id"] for row in rows[25:]]  # and both members of the stream


@pytest.mark.slow
def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    rows = vignettes(36)
    for number in range(12):
        write_rows(tmp_path / f"part{number}.jsonl", rows[3 * number : 3 * number + 3])
    assert ids(examples(tmp_path, mounted="eval.dataset"))["test"] == [row["id"] for row in rows]


ROWS: list[tuple[list[Row], dict[str, Any], str]] = [
    ([*vignettes(8), vignette(3)], {}, "a.jsonl, row 9: two rows have the id 'row-3', the other is row 4; fix"),
    (vignettes(8), {"keep": "answer_idx == 'B'"}, "dataset.keep=\"answer_idx == 'B'\": is false for all 8 rows"),
    ([*vignettes(8), vignette(8, rationale="")], {}, "a.jsonl, row 9 (row-8): dataset.assistant renders to nothing"),
    ([*vignettes(8), vignette(8, answer_idx="D")], {}, "a.jsonl, row 9 (row-8): target 'D' is not one of A, B"),
    (vignettes(8), {"user": "{{ Question }}"}, "there is no column 'Question'; the rows have id, question, options"),
    (
        vignettes(8),
        {"split": {"train": 5, "validation": 100, "test": 0}},
        "asks for 105 rows (5 train, 100 validation), and",
    ),
    (vignettes(8), {"max_rows": 2}, "dataset.max_rows=2: is less than one row for each of"),
]


@pytest.mark.parametrize(("rows", "changed", "message"), ROWS, ids=[case[2] for case in ROWS])
def test_rows_that_do_not_make_a_dataset(
    tmp_path: Path, rows: list[Row], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        examples(write_rows(tmp_path / "a.jsonl", rows), **changed)
    assert message in str(caught.value)


# — drawing —


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [vignette(number, group=f"case {number // 5}") for number in range(100)]
    return write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", rows)


def test_the_same_seed_draws_the_same_splits_and_another_others(hundred: Path) -> None:
    first, again, other = (ids(examples(hundred, seed)) for seed in (1, 1, 2))
    assert first == again
    assert set(first["test"]) != set(other["test"])


def test_no_row_is_in_two_splits_and_none_is_lost(hundred: Path) -> None:
    result = ids(examples(hundred))
    assert sorted(row for rows in result.values() for row in rows) == sorted(f"row-{number}" for number in range(100))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ({"train": 0.9, "validation": 0.05, "test": 0.05}, (90, 5, 5)),
        ({"train": 0.5, "validation": 0.1, "test": 0.1}, (50, 10, 10)),  # shares of less than all leave rows out
        ({"train": 70, "validation": 20, "test": 10}, (70, 20, 10)),
        ({"train": 30, "validation": 20, "test": 10}, (30, 20, 10)),
        ({"train": 0.6, "validation": 20, "test": 20}, (60, 20, 20)),
        ({"train": 0.335, "validation": 0.333, "test": 0.332}, (34, 33, 33)),  # no row is lost to rounding
        ({"train": 0.999, "validation": 0.001, "test": 0}, (99, 1, 0)),  # a split that is wanted has a row
    ],
)
def test_shares_and_numbers_of_rows(hundred: Path, split: dict[str, float], expected: tuple[int, ...]) -> None:
    assert sizes(examples(hundred, split=split)) == expected


def homes(splits: dict[str, list[Example]]) -> dict[str, set[str]]:
    actual: dict[str, set[str]] = {}
    for name, rows in splits.items():
        for example in rows:
            actual.setdefault(str(example.group), set()).add(name)
    return actual


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_a_group_stay_together(hundred: Path, seed: int) -> None:
    result = examples(hundred, seed, group_by="{{ group }}", split={"train": 0.6, "validation": 0.23, "test": 0.17})
    assert all(len(splits) == 1 for splits in homes(result).values())
    assert len(homes(result)) == 20
    assert sizes(result) == (55, 25, 20)  # whole groups of five


@pytest.mark.parametrize("group", [None, "", "  ", math.nan, "missing"])
@pytest.mark.parametrize("template", ["{{ group }}", "case {{ group }}", "{{ meta.group }}"])
def test_a_row_without_a_group_is_a_group_of_its_own(tmp_path: Path, group: Any, template: str) -> None:
    rows = []
    for number in range(40):
        value = f"g{number % 4}" if number < 8 else group
        actual = {"group": value} if value != "missing" else {}
        rows.append(vignette(number, meta=dict(actual), **actual))
    path = write_rows(tmp_path / "a.jsonl", rows)
    split = {"train": 20, "validation": 8, "test": 8}
    result = examples(path, group_by=template, split=split)
    assert all(8 <= len(result[name]) <= 9 for name in ("validation", "test"))  # not one group of 32
    assert sum(row.group is None for rows in result.values() for row in rows) >= 28
    assert all(len(splits) == 1 for group, splits in homes(result).items() if group != "None")


NULLS = [
    "{{ 'case ' ~ pat }}", "{{ site }}-{{ pat }}", "{{ pat | int }}", "{{ pat | tojson }}", "{{ '%s/x' % pat }}",
    "{% set p = pat %}case {{ p }}", "{% if pat %}case {{ pat }}{% else %}case {% endif %}", "{{ '{}.'.format(pat) }}",
    "{{ [site, pat] | join('-') }}", "{{ pat | string | upper }}", "{% for p in [pat] %}{{ site }}{{ p }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("template", NULLS)
@pytest.mark.parametrize("missing", [None, math.nan, "", "nan", "None", "null", "N/A"])
def test_a_group_id_made_of_a_null_is_no_group(tmp_path: Path, template: str, missing: Any) -> None:
    rows = [vignette(number, site="S", pat=str(number // 2) if number < 8 else missing) for number in range(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    result = examples(path, mounted="eval.dataset", group_by=template)["test"]
    assert [row.group is None for row in result] == [number >= 8 for number in range(20)]
    assert len({row.group for row in result}) == 5


def test_a_default_in_group_by_is_a_group(tmp_path: Path) -> None:
    rows = [vignette(number, pat=None if number % 2 else f"p{number}") for number in range(6)]
    result = examples(write_rows(tmp_path / "a.jsonl", rows), mounted="eval.dataset", group_by="{{ pat or 'other' }}")[
        "test"
    ]
    assert [row.group for row in result] == ["p0", "other", "p2", "other", "p4", "other"]


def test_a_group_that_fills_a_split_is_warned_about_and_the_remedy_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [vignette(number, src=f"s{number}" if number < 10 else "unknown") for number in range(40)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    split = {"train": 0.6, "validation": 0.2, "test": 0.2}
    for seed in range(9):
        caplog.clear()
        result = examples(path, seed, group_by="{{ src }}", split=split)
        if len(result["validation"]) > 12:
            break
    assert "30 of 40 rows are of group 'unknown': validation has 3" in caplog.text
    match = re.search(r"render nothing for it: (\{\{.*\}\})", caplog.text)
    assert match
    caplog.clear()
    assert sizes(examples(path, seed, group_by=match[1].replace("COLUMN", "src"), split=split)) == (24, 8, 8)
    assert not caplog.text


def test_a_group_by_that_gives_no_row_a_group_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [vignette(number, meta={"case": 1}) for number in range(9)])
    with pytest.raises(ConfigError, match=r"dataset\.group_by='\{\{ meta\.cse \}\}': renders to nothing for every row"):
        examples(path, group_by="{{ meta.cse }}")


ASKED: list[tuple[dict[str, Any], str]] = [
    ({"split": {"train": 80, "validation": 20, "test": 10}}, "110 rows (80 train, 20 validation, 10 test), and"),
    ({"split": {"train": 1, "validation": 120, "test": 0}}, "asks for 121 rows (1 train, 120 validation)"),
    ({"split": {"train": 0.9, "validation": 20, "test": 20}}, "asks for 130 rows (90 train, 20 validation, 20 test)"),
    ({"split": {"train": 30, "validation": 20, "test": 20}, "keep": "group[-1] == '1'"}, "has 10 of them after keep"),
    ({"split": {"train": 60, "validation": 22, "test": 18}, "group_by": "{{ group }}"}, "at most 55 train rows"),
]


@pytest.mark.parametrize(("changed", "message"), ASKED, ids=[case[1] for case in ASKED])
def test_splits_that_ask_for_more_rows_than_there_are(hundred: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        examples(hundred, **changed)
    assert message in str(caught.value)
    assert str(hundred) in str(caught.value)


def test_the_number_that_is_given_instead_works(hundred: Path) -> None:
    split = {"train": 55, "validation": 22, "test": 18}
    assert sizes(examples(hundred, split=split, group_by="{{ group }}")) == (55, 25, 20)
    assert sizes(examples(hundred, split={"train": 70, "validation": 20, "test": 10})) == (70, 20, 10)


def test_a_split_of_the_source_with_fewer_rows_than_asked_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    rows = vignettes(80)
    write_rows(tmp_path / "train.jsonl", rows[:50])
    write_rows(tmp_path / "test.jsonl", rows[60:])
    default = {"train": 384, "validation": 48, "test": 200}
    for validation in (True, False):
        if validation:
            write_rows(tmp_path / "validation.jsonl", rows[50:60])
        else:
            (tmp_path / "validation.jsonl").unlink()
        with pytest.raises(ConfigError) as caught:
            examples(tmp_path, split=default)
        assert "asks for 384 train, 48 validation, 200 test rows" in str(caught.value)
        assert f"50 train, {10 if validation else 0} validation, 20 test" in str(caught.value)
        remedy = re.search(r"set dataset\.split=(\{.*?\})", str(caught.value))
        assert remedy
        result = examples(tmp_path, split=yaml.safe_load(remedy[1]))
        assert sizes(result) == ((50, 10, 20) if validation else (45, 5, 20))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ({"train": 22, "validation": 8, "test": 10}, (22, 8, 10)),
        ({"train": 5, "validation": 8, "test": 2}, (22, 8, 10)),
        ({"train": 0.1, "validation": 8, "test": 0.9}, (22, 8, 10)),
        ({"train": 23, "validation": 8, "test": 10}, None),
        ({"train": 1, "validation": 8, "test": 11}, None),
        ({"train": 0.9, "validation": 30, "test": 10}, None),
        ({"train": 28, "validation": 0.1, "test": 10}, None),
    ],
)
def test_numbers_are_the_least_that_a_split_of_the_source_has(
    tmp_path: Path, split: dict[str, float], expected: tuple[int, ...] | None
) -> None:
    rows = vignettes(40)
    write_rows(tmp_path / "train.jsonl", rows[:30])
    write_rows(tmp_path / "test.jsonl", rows[30:])
    if expected is None:
        with pytest.raises(ConfigError, match="asks for"):
            examples(tmp_path, split=split)
    else:
        assert sizes(examples(tmp_path, split=split)) == expected


def test_as_many_rows_are_generated_as_keep_lets_through() -> None:
    cfg = settings(
        name_or_path="generate:vignettes", split={"train": 20, "validation": 6, "test": 6}, keep="answer_idx == 'A'"
    )
    result = rendered(cfg).splits
    assert sizes(result) == (20, 6, 6)
    assert {row.target for rows in result.values() for row in rows} == {"A"}


def test_a_source_is_read_once_as_long_as_it_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(formats, "Content", lambda *args: read.append(args[0]) or content.Content(*args))
    cfg = settings(name_or_path=str(write_rows(tmp_path / "a.jsonl", vignettes(20))))
    store = Store(tmp_path / "store")
    splits = dataset.load(store, cfg, column="answer_idx")
    result = dataset.make(store, cfg)
    assert len(read) == 1
    assert dataset.subgroups(cfg, "answer_idx") == {row.id: "A" for row in splits["test"]}
    assert {row.subgroup for row in result.split("test")} == {None}
    assert len(read) == 1
    write_rows(tmp_path / "a.jsonl", vignettes(21))
    assert sum(sizes(dataset.load(store, cfg))) == 21
    assert len(read) == 2


def test_a_finished_stage_is_not_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(name_or_path=str(write_rows(tmp_path / "a.jsonl", vignettes(20))))
    store = Store(tmp_path / "store")
    before = {name: list(dataset.make(store, cfg).split(name)) for name in SPLITS}
    dataset._rendered.clear()  # as in another process
    monkeypatch.setattr(dataset, "render_examples", lambda *_, **__: pytest.fail("was rendered again"))
    assert {name: list(rows) for name, rows in dataset.load(store, cfg).items()} == before
    assert {name: list(dataset.make(store, cfg).split(name)) for name in SPLITS} == before


def test_own_splits_that_share_a_group_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [vignette(number, group=f"case {number}") for number in range(4)])
    write_rows(tmp_path / "test.jsonl", [vignette(9, group="case 3")])
    with pytest.raises(ConfigError, match=r"group 'case 3' in train and in test.*dataset\.group_by=null"):
        examples(tmp_path, group_by="{{ group }}")


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [(50, (45, 2, 3)), (20, (18, 1, 1)), (11, (9, 1, 1)), (3, (1, 1, 1)), (100, (90, 5, 5)), (None, (90, 5, 5))],
)
def test_max_rows_keeps_the_proportions_and_is_a_limit(
    hundred: Path, max_rows: int | None, expected: Sequence[int]
) -> None:
    split = {"train": 0.9, "validation": 0.05, "test": 0.05}
    whole, result = examples(hundred, split=split), examples(hundred, split=split, max_rows=max_rows)
    assert sum(sizes(result)) == min(max_rows or 100, 100)
    assert sorted(sizes(result)) == sorted(expected)
    for name in SPLITS:  # drawn from the same split, in its order
        order = [example.id for example in whole[name]]
        assert [row for row in order if row in set(ids(result)[name])] == ids(result)[name]


# — mounted test sets —


@pytest.mark.parametrize("name", ["rows.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl"])
def test_a_mounted_source_of_one_split_is_all_test(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / name, vignettes(7))
    for path in (tmp_path / "folder", tmp_path / "folder" / name):
        assert sizes(examples(path, mounted="eval.dataset")) == (0, 0, 7)


def test_a_mounted_source_with_splits_gives_its_test_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", vignettes(7))
    write_rows(tmp_path / "test.jsonl", [vignette(8), vignette(9)])
    assert ids(examples(tmp_path, mounted="eval.dataset")) == {
        "train": [],
        "validation": [],
        "test": ["row-8", "row-9"],
    }


def test_a_mounted_source_without_test_rows_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", vignettes(7))
    write_rows(tmp_path / "validation.jsonl", [vignette(8)])
    with pytest.raises(ConfigError, match=r"eval\.dataset\.split=.*the test split of .* has no rows"):
        examples(tmp_path, mounted="eval.dataset")


# — the stage —


def test_the_stage_holds_the_splits_and_is_made_once(tmp_path: Path, hundred: Path) -> None:
    cfg, store = settings(name_or_path=str(hundred)), Store(tmp_path)
    result = dataset.make(store, cfg)
    assert {name: list(result.split(name)) for name in SPLITS} == rendered(cfg).splits
    assert dataset.make(store, cfg).stage.cached
    # Limits on the overlap judge the rows; they do not change them, nor what was trained on them.
    assert dataset.make(store, cfg.model_copy(update={"allow_overlap": True})).stage.cached


@pytest.mark.parametrize("what", ["seed", "settings", "mounted", "content"])
def test_the_key_changes_with_each_input(tmp_path: Path, what: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", vignettes(20))
    cfg = settings(name_or_path=str(path))
    before = dataset.inputs(cfg)
    if what == "content":
        write_rows(path, vignettes(21))
    changed = {"settings": {"keep": "true"}, "seed": {"seed": 2}}.get(what, {})
    after = dataset.inputs(settings(name_or_path=str(path), **changed), mounted=what == "mounted")
    assert Store(tmp_path).path("dataset", before) != Store(tmp_path).path("dataset", after)


def test_a_sample_of_the_test_set_is_drawn_by_seed(tmp_path: Path, hundred: Path) -> None:
    result = dataset.make(Store(tmp_path), settings(name_or_path=str(hundred)))
    every = dataset.test_rows(result, None, 1)
    some = dataset.test_rows(result, 10, 1)
    assert len(every) == 25
    assert some == dataset.test_rows(result, 10, 1)
    assert some != dataset.test_rows(result, 10, 2)
    assert some == [example for example in every if example in some]
    assert dataset.test_rows(result, 1000, 1) == every
