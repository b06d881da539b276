"""Files as other programs write them: read as they are meant, or refused with what they are and what to do."""

from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import vignettes, write_rows
from test_dataset import examples, flat, write_parquet

from sftlab.errors import ConfigError

ROWS = [
    {"id": "1", "question": "One, two; three?", "rationale": "a|b", "answer_idx": "A"},
    {"id": "2", "question": 'Said "five"', "rationale": "x, y; z", "answer_idx": "B"},
    {"id": "3", "question": "plain", "rationale": "c", "answer_idx": "A"},
]


def read(path: Path, **changed: Any) -> list[tuple[str, str, str, str]]:
    result = examples(path, mounted="eval.dataset", **flat(**changed))["test"]
    return [(row.id, row.question, row.assistant, row.target) for row in result]


EXPECTED = [tuple(row.values()) for row in ROWS]


def table(delimiter: str, *, quote: bool = True) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if quote and (delimiter in text or '"' in text) else text

    lines = [list(ROWS[0]), *[list(row.values()) for row in ROWS]]
    return "".join(delimiter.join(map(cell, line)) + "\r\n" for line in lines)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_table_is_found(tmp_path: Path, name: str, delimiter: str) -> None:
    for text in (table(delimiter), f"sep={delimiter}\r\n{table(delimiter)}"):
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert read(tmp_path / name) == EXPECTED


def test_a_table_of_tabs_without_quotes(tmp_path: Path) -> None:
    text = table("\t", quote=False).replace('Said "five"', '"Five" he said')
    (tmp_path / "a.tsv").write_text(text, "utf-8")
    assert read(tmp_path / "a.tsv")[1][1] == '"Five" he said'


def test_a_table_with_two_possible_delimiters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id;x,question\n1;2,3\n4;5,6\n", "utf-8")
    with pytest.raises(ConfigError, match=r"a\.csv:1: cells may be separated by comma \(2 columns\) and semicolon"):
        read(tmp_path / "a.csv")


def test_a_semicolon_table_with_a_broken_row_is_still_read_by_semicolons(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id;question;answer\n1;a, b;c\n2;a;b;c\n3;d, e;f\n4;x\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.csv")
    assert "a.csv:3: has 4 cells, and the header has 3 (id, question, answer); quote cells that hold a sem" in str(
        caught.value
    )
    assert "a.csv:5: has 2 cells" in str(caught.value)


def test_line_numbers_count_the_lines_within_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,question\n1,"two\nlines"\n\n2,a,b\n', "utf-8")
    with pytest.raises(ConfigError, match=r"a\.csv:5: has 3 cells"):
        read(tmp_path / "a.csv")


NESTED: dict[str, tuple[Any, str, str]] = {
    "a list as Python writes it": (["Berne", "it's"], """['Berne', "it's"]""", "Berne+it's"),
    "a list as JSON": (["Berne", None], '["Berne", null]', "Berne+"),
    "parts": ([{"type": "text"}], "[{'type': 'text'}]", "not text"),
    "an object": ({"A": "x"}, "{'A': 'x'}", "A"),
    "nulls": ([None, True], "[None, True]", "not text"),
}


@pytest.mark.parametrize(("value", "cell", "expected"), NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_lists_and_objects_as_text_in_a_table_are_values(
    tmp_path: Path, value: Any, cell: str, expected: str, delimiter: str
) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*ROWS[0], "extra"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "extra": value if delimiter == "," else cell} for row in ROWS)
        writer.writerow({**ROWS[0], "id": "4", "extra": ""})
    with pytest.raises(ConfigError, match=r"column extra, which is a (list|dict) and not text"):
        read(tmp_path / "a.csv", user="{{ extra }}")
    joined = "{{ extra | join('+') or 'none' }}"
    if expected == "not text":
        with pytest.raises(ConfigError, match=expected):
            read(tmp_path / "a.csv", user=joined)
    else:
        assert [row[1] for row in read(tmp_path / "a.csv", user=joined)] == [*[expected] * 3, "none"]


EXACT = [
    ('{"name":"<é>","n":1.50,"tags":[]}', "dict", r"write (\{\{.*?\}\})"),
    ("[0,1]", "list", r"write (\{\{.*?\}\})"),
    ('["a","b"]', "list", r"or (\{\{ \w+ \| string \}\})"),
    ("[[1],[2]]", "list", r"write (\{\{.*?\}\})"),
]


@pytest.mark.parametrize(("cell", "kind", "remedy"), EXACT)
def test_the_remedy_for_a_cell_of_json_keeps_its_text(tmp_path: Path, cell: str, kind: str, remedy: str) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(ROWS[0]), ["1", cell, "r", "A"], ["2", "", "r", "A"], ["3", cell, "r", "A"]])
    with pytest.raises(ConfigError, match=f"column question, which is a {kind} and not text") as caught:
        read(tmp_path / "a.csv", user="x{{ question }}")
    match = re.search(remedy, str(caught.value))
    assert match
    assert [row[1] for row in read(tmp_path / "a.csv", user=f"x{match[1]}")] == [f"x{cell}", "x", f"x{cell}"]


def test_pythons_notation_in_a_table_is_not_written(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(ROWS[0]), ["1", "['a', 'b']", "r", "A"]])
    for template in ("{{ question }}", "{{ question | string }}"):
        with pytest.raises(ConfigError, match="column question, which is a list and not text"):
            read(tmp_path / "a.csv", user=template)


def test_a_space_after_each_comma_is_not_a_part_of_the_cells(tmp_path: Path) -> None:
    text = "id, question, rationale, answer_idx\n1, q one, r, A\n2, q two, r, B\n"
    (tmp_path / "a.csv").write_text(text, "utf-8")
    assert [row[1] for row in read(tmp_path / "a.csv", user="{{ question }}|{{ answer_idx }}")] == [
        "q one|A",
        "q two|B",
    ]


def test_a_line_before_the_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("# made today\nid,question,rationale,answer_idx\n1,q,r,A\n2,q,r,B\n", "utf-8")
    with pytest.raises(ConfigError, match=r"a\.csv:1: the first line has 1 cell \(# made today\), and every other"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("other", ["[sic] he said", "[1", "plain", "('a', 'b')"])
def test_a_column_with_other_texts_stays_text(tmp_path: Path, other: str) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [list(ROWS[0]), ["1", "[1]", "r", "A"], ["2", "['a']", "r", "A"], ["3", other, "r", "A"]]
        )
    assert [row[1] for row in read(tmp_path / "a.csv")] == ["[1]", "['a']", other]


def test_numpy_arrays_as_text_are_refused(tmp_path: Path) -> None:
    import numpy as np

    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(ROWS[0]), ["1", np.array(["Berne, CH", "Bern"]), "r", "A"]])
    with pytest.raises(ConfigError, match=r"column 'question' has NumPy arrays as text: \['Berne, CH' 'Bern'\]; write"):
        read(tmp_path / "a.csv")


def lines(rows: list[Any], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


BY_ID = {row["id"]: {name: value for name, value in row.items() if name != "id"} for row in ROWS}
SHAPES = {
    "an array as JSON lines": ("a.jsonl", json.dumps(ROWS, indent=1)),
    "an array in one line": ("a.jsonl", "\n" + json.dumps(ROWS) + "\n"),
    "an array with a row per line": ("a.jsonl", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"),
    "JSON lines as JSON": ("a.json", lines(ROWS)),
    "Windows line ends": ("a.jsonl", lines(ROWS).replace("\n", "\r\n")),
    "id to row": ("a.json", json.dumps(BY_ID)),
    "id to row as JSON lines": ("a.jsonl", json.dumps(BY_ID, indent=2)),
    "id to row in an object": ("a.json", json.dumps({"version": 1, "data": BY_ID})),
    "a list in an object": ("a.json", json.dumps({"meta": {"a": 1}, "tags": ["x"][:0] or "x", "rows": ROWS})),
    "a list beside metadata": ("a.json", json.dumps({"version": "2", "info": {"a": [1]}, "data": ROWS})),
    "rows with ids of their own": ("a.json", json.dumps({f"k{row['id']}": row for row in ROWS})),
    "id to row in one line": ("a.jsonl", json.dumps(BY_ID) + "\n"),
    "a list in an object in one line": ("a.jsonl", json.dumps({"version": "1", "data": ROWS})),
    "id to row in an object in one line": ("a.jsonl", json.dumps({"version": 1, "data": BY_ID})),
    "line separators in a text": ("a.jsonl", lines(ROWS)),
}


@pytest.mark.parametrize(("name", "content"), SHAPES.values(), ids=SHAPES)
def test_json_in_every_shape(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    assert read(tmp_path / name) == EXPECTED


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    row = {**ROWS[0], "question": "a\u2028b\x85c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    assert read(tmp_path / "a.jsonl")[0][1] == "a\u2028b\x85c"


def test_one_row_in_one_line_is_a_row(tmp_path: Path) -> None:
    row = {**ROWS[0], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), "utf-8")
    assert read(tmp_path / "a.jsonl") == EXPECTED[:1]


def test_spaces_before_quotes_and_empty_columns_of_a_table(tmp_path: Path) -> None:
    text = table(",").replace("id,", '"id", ').replace("\r\n", ",,\r\n")
    (tmp_path / "a.csv").write_text(text + ",,,,,\r\n", "utf-8")
    assert read(tmp_path / "a.csv") == EXPECTED
    cells = ['"id", "question", "rationale", "answer_idx"', '"1", "a, b", " c", A', '"2", "d", e, "B"']
    (tmp_path / "b.csv").write_text("\n".join(cells), "utf-8")
    assert read(tmp_path / "b.csv") == [("1", "a, b", " c", "A"), ("2", "d", "e", "B")]
    (tmp_path / "c.csv").write_text('id,question,rationale,answer_idx\n1, a,b,A\n2,x, "y" z,B\n', "utf-8")
    assert [row[1:3] for row in read(tmp_path / "c.csv")] == [(" a", "b"), ("x", ' "y" z')]
    (tmp_path / "d.csv").write_text(",id,question,rationale,answer_idx\n0,1,a,b,A\n", "utf-8")  # pandas' index
    assert read(tmp_path / "d.csv") == [("1", "a", "b", "A")]


def test_short_floats_of_parquet_are_written_as_they_were_meant(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    values = {"a": pa.array([0.1, 2.0], pa.float32()), "b": pa.array([[0.3], [1.5]], pa.list_(pa.float32())),
              "c": pa.array([{"d": 0.7}, {"d": None}], pa.struct([("d", pa.float32())])),
              "e": pa.array([0.10000000149011612, 0.5], pa.float64())}  # fmt: skip
    rows = {name: [row[name] for row in ROWS[:2]] for name in ROWS[0]}
    parquet.write_table(pa.table({**rows, **values}), tmp_path / "a.parquet")
    template = "{{ a }} {{ b | join }} {{ c.d }} {{ e }}"
    assert [row[1] for row in read(tmp_path / "a.parquet", user=template)] == [
        "0.1 0.3 0.7 0.10000000149011612",
        "2.0 1.5  0.5",
    ]


def test_whole_numbers_beside_nulls_within_objects(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "o": {"a": 3.0, "l": [1.0, None]}}, {**ROWS[1], "o": {"a": None, "l": []}}]
    (tmp_path / "a.jsonl").write_text(lines(rows), "utf-8")
    assert [row[1] for row in read(tmp_path / "a.jsonl", user="x{{ o.a }} {{ o.l | join('-') }}")] == ["x3 1-", "x "]


GOOD = lines(ROWS)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WRONG: dict[str, tuple[str, bytes, str]] = {
    "columns": (
        "a.json",
        json.dumps({"question": ["a", "b"], "answer": ["c", "d"]}).encode(),
        "is an object of columns (question, answer), as pandas",
    ),
    "pandas": (
        "a.json",
        json.dumps({"question": {"0": "a", "1": "b"}, "answer": {"0": "c", "1": "d"}}).encode(),
        "is an object of columns",
    ),
    "pandas with an index of its own": (
        "a.json",
        json.dumps({"question": {"7": "a", "3": "b"}, "answer": {"7": "c", "3": "d"}}).encode(),
        "is an object of columns",
    ),
    "a key twice in a line": (
        "a.jsonl",
        lines(ROWS[:1]).encode() + b'{"id": 2, "o": {"b": 1, "b": 2}}',
        "a.jsonl:2: has the key 'b' twice",
    ),
    "a key twice": ("a.json", b'[{"id": 1}, {"id": 2, "id": 3}]', "a.json, row 2: has the key 'id' twice"),
    "an id twice": ("a.json", b'{"x": {"id": 1}, "x": {"id": 2}}', "a.json: has the key 'x' twice"),
    "cells without a name": (
        "a.csv",
        b"id,,x,\n1,,2,\n3,what,4,\n",
        "a.csv:1: column 2 has no name, and line 3 has 'what'",
    ),
    "splits": (
        "a.json",
        json.dumps({"train": ROWS, "test": ROWS}).encode(),
        "several lists of rows (train, test); write each",
    ),
    "some rows": ("a.json", json.dumps([*ROWS, 3, "x"]).encode(), "a.json, row 4: is 3, not an object"),
    "broken array": (
        "a.jsonl",
        json.dumps(ROWS, indent=1).encode()[:-9],
        "a.jsonl: is JSON over several lines that breaks off",
    ),
    "pretty objects": (
        "a.jsonl",
        "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
        "objects that span several lines; write one object per line: `jq",
    ),
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), "is UTF-16, not UTF-8"),
    "UTF-16 without a BOM": ("a.csv", table(",").encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
    "Latin-1": ("a.csv", table(",").replace("plain", "Größe").encode("latin-1"), "a.csv:4: is not UTF-8 (byte 0xf6)"),
    "HTML": ("a.csv", b"<!DOCTYPE html>\n<html><body>Not found, sorry</body></html>", "is a web page (HTML) or XML"),
    "HTML as JSON lines": ("a.jsonl", b"\n<html>\n", "is a web page (HTML) or XML"),
    "LFS": ("a.jsonl", LFS.encode(), "is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
    "LFS of Parquet": ("a.parquet", LFS.encode(), "is a pointer of Git LFS"),
    "LFS of gz": ("a.jsonl.gz", LFS.encode(), "is a pointer of Git LFS"),
    "gz under another name": (
        "a.jsonl",
        gzip.compress(GOOD.encode()),
        "is compressed by gzip; rename it to a.jsonl.gz",
    ),
    "no gz": ("a.jsonl.gz", GOOD.encode(), "is not compressed by gzip; rename it to a.jsonl"),
    "no zst": ("a.jsonl.zst", GOOD.encode(), "is not compressed by zstd; rename it to a.jsonl"),
    "half a gz": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-30], "is damaged or incomplete"),
    "damaged gz": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-6] + b"123456", "is damaged or incomplete"),
    "twice gz": ("a.jsonl.gz", gzip.compress(gzip.compress(GOOD.encode())), "is compressed by gzip; decompress it"),
    "a spreadsheet": ("a.csv", b"PK\x03\x04\x14\x00", "is a ZIP archive or a spreadsheet (.xlsx); convert it"),
    "binary": ("a.jsonl", b"\x01\x02\x00\x03", "is not text; convert it"),
    "empty gz": ("a.jsonl.gz", gzip.compress(b""), "has no rows"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) or name == "a.json"


def test_parquet_under_another_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.jsonl", vignettes(3))
    with pytest.raises(ConfigError, match=r"is a Parquet file; rename it to a\.parquet"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("zipped", [False, True])
def test_the_command_that_is_given_for_another_encoding_works(tmp_path: Path, encoding: str, *, zipped: bool) -> None:
    data = lines([{**ROWS[0], "question": "Größe?"}], ensure_ascii=False).encode(encoding)
    name = "a.jsonl.gz" if zipped else "a.jsonl"
    (tmp_path / name).write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    command = str(caught.value).split("`")[1]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert read(tmp_path / "utf8.jsonl")[0][1] == "Größe?"


def test_messages_list_few_columns(tmp_path: Path) -> None:
    row = {f"column_{number}": "x" for number in range(1000)}
    write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.jsonl")
    assert all(len(line) < 400 for line in str(caught.value).splitlines())
    assert "column_9 and 990 more" in str(caught.value)
