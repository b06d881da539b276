"""Files that are read as streams, chunks that other processes render, and examples that are not in memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import random
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rendered, vignette, write_rows
from test_prompt import settings

from sftlab.dataset import arrow_examples, content, csv_rows, formats, parallel
from sftlab.dataset.arrow_examples import Examples, batch_of, open_file, reorder, text_of, write
from sftlab.errors import ConfigError
from sftlab.records import Example

ROWS = [vignette(number, question=f"Größe {number}?" * (number % 7)) for number in range(1, 60)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "BLOCK", 1500)
    monkeypatch.setattr(csv_rows, "CHUNK", 3)
    monkeypatch.setattr(parallel, "FEW", 10**6)  # monkeypatching does not reach other processes


def read(path: Path, **changed: Any) -> list[Example]:
    rows: list[Example] = rendered(settings(name_or_path=str(path), **changed), mounted="eval.dataset").splits["test"]
    return rows


def arrow(path: Path, rows: list[dict[str, Any]], *, stream: bool) -> Path:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as out, (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as to:
        to.write_table(table)
    return path


def compressed(path: Path, data: bytes) -> None:
    """Write data as the suffix of the file says."""
    from pyarrow import CompressedOutputStream, OSFile

    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with OSFile(str(path), "wb") as raw, CompressedOutputStream(raw, "zstd") as out:
            out.write(data)
    else:
        path.write_bytes(data)


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=";")
    writer.writeheader()
    writer.writerows({**row, "options": json.dumps(row["options"])} for row in rows)
    return text.getvalue().encode("utf-8-sig")


STREAMS = [
    *("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "array.json", "array.jsonl", "array.json.zst", "indented.json"),
    *("a.csv", "a.csv.gz", "a.csv.zst", "a.parquet", "a.parquet.gz", "a.arrow", "a.arrow.zst", "b.arrow"),
]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_has_the_rows_of_the_whole_file(tmp_path: Path, small_chunks: None, name: str) -> None:
    lines = write_rows(tmp_path / "whole.jsonl", ROWS)
    expected = read(lines)
    assert len(expected) == len(ROWS)
    path, kind = tmp_path / name, name.split(".")[1]
    if kind == "arrow":
        data = arrow(tmp_path / "whole.arrow", ROWS, stream=name[0] == "b").read_bytes()
    elif kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(ROWS), tmp_path / "whole.parquet")
        data = (tmp_path / "whole.parquet").read_bytes()
    elif kind == "csv":
        data = csv_of(ROWS)
    elif name[:2] == "a.":
        data = lines.read_bytes()
    else:
        data = json.dumps(ROWS, indent=2 if name[0] == "i" else None, ensure_ascii=False).encode()
    compressed(path, data)
    chunks = [*formats.FileRows(path)]
    assert len(chunks) > 3 or kind in ("parquet", "arrow")
    assert all(pickle.loads(pickle.dumps(chunk)).table() == chunk.table() for chunk in chunks)  # for other processes
    assert read(path) == expected


@pytest.mark.parametrize("name", ["a.csv", "array.json", "a.jsonl", "array.json.gz"])
def test_a_pass_over_a_file_needs_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(content, "BLOCK", 2**14)
    monkeypatch.setattr(csv_rows, "CHUNK", 20)
    rows = [vignette(number, question="why? " * 100) for number in range(4000)]
    data = csv_of(rows) if name == "a.csv" else json.dumps(rows).encode()
    compressed(tmp_path / name, write_rows(tmp_path / "a", rows).read_bytes() if name == "a.jsonl" else data)
    tracemalloc.start()
    count = sum(len(chunk.table().rows) for chunk in formats.FileRows(tmp_path / name))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < len(data) / 5


BROKEN: list[Callable[[str], str]] = [
    lambda text: text.replace('"row-40",', '"row-40"'),
    lambda text: text.replace('"row-40"', '"row-\\x"'),
    lambda text: text.replace('"row-40"', "row-40"),
    lambda text: text[:-3],
    lambda text: text[:-300],
    lambda text: f"\n{text[:-2]},\n",
]


@pytest.mark.parametrize("change", BROKEN)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_broken_array_is_refused_with_its_line(
    tmp_path: Path, small_chunks: None, change: Callable[[str], str], indent: int | None
) -> None:
    text = change(json.dumps(ROWS, indent=indent))
    (tmp_path / "a.json").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.json")
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    assert f"a.json: is not JSON: {expected.value}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "\n{}", "line 593 has more after the array of rows; write a single array"),
        (lambda text: text[:-2] + ",\n3]", "a.json, row 60: is 3, not an object"),
        (lambda text: text[:-2] + ',\n{"a": 1, "a": 2}]', "a.json, row 60: has the key 'a' twice in an object"),
        (lambda text: json.dumps([*"abc"] * 2000), "is not a list of objects"),
    ],
)
def test_problems_of_an_array_name_the_row(
    tmp_path: Path, small_chunks: None, change: Callable[[str], str], message: str
) -> None:
    (tmp_path / "a.json").write_text(change(json.dumps(ROWS, indent=2)), "utf-8")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.json")
    assert message in str(caught.value)


def test_problems_of_a_table_name_its_lines(tmp_path: Path, small_chunks: None) -> None:
    lines = csv_of(ROWS).decode("utf-8").splitlines(keepends=True)
    lines[41] = "a;b\n"
    lines.insert(20, "\r\n")  # an empty line has a number, but it is not a row
    lines[51] = lines[51].replace('"', "", 1)
    (tmp_path / "a.csv").write_text("".join(lines), "utf-8")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.csv")
    assert "a.csv:43: has 2 cells, and the header has" in str(caught.value)
    (tmp_path / "a.csv").write_bytes("".join(lines[:30]).encode() + b"\xff\n")
    with pytest.raises(ConfigError, match=r"a\.csv:31: is not UTF-8 \(byte 0xff\)"):
        read(tmp_path / "a.csv")


def test_a_quote_that_is_not_closed_does_not_read_the_rest_as_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_rows, "CELL", 1000)
    text = 'id,question\n1,a\n2,"b\n' + "3,c\n" * 1000
    (tmp_path / "a.csv").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"a\.csv:3: cannot be read as CSV: a cell has more than 1,000 characters"):
        read(tmp_path / "a.csv")


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert [row.question for row in read(tmp_path / "saved")] == [
        row.question for row in read(write_rows(tmp_path / "a.jsonl", ROWS))
    ]


def test_problems_of_a_stream_name_line_and_row(tmp_path: Path, small_chunks: None) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[40] = "{broken"
    lines[45] = json.dumps({**ROWS[45], "rationale": ""})
    lines.insert(20, "")  # an empty line has a number, but it is not a row
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.jsonl")
    assert "a.jsonl:42: is not JSON" in str(caught.value)
    assert "a.jsonl, row 46 (row-46): eval.dataset.assistant renders to nothing" in str(caught.value)
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines[:30]).encode() + b"\n\xff\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl:31: is not UTF-8 \(byte 0xff\)"):
        read(tmp_path / "a.jsonl")


def test_whole_numbers_are_restored_from_nulls_in_another_chunk(tmp_path: Path, small_chunks: None) -> None:
    rows = [vignette(number, age=float(number)) for number in range(30)] + [vignette(31, age=None)]
    texts = [row.question for row in read(write_rows(tmp_path / "a.jsonl", rows), user="{{ age }} years")]
    assert texts[:2] + texts[-1:] == ["0 years", "1 years", " years"]


def test_ids_that_occur_in_two_chunks_are_refused(tmp_path: Path, small_chunks: None) -> None:
    with pytest.raises(ConfigError, match=r"row 60: two rows have the id 'row-1', the other is row 1"):
        read(write_rows(tmp_path / "a.jsonl", [*ROWS, ROWS[0]]))


PARALLEL = """
import sys
from pathlib import Path
from sftlab.dataset import parallel
def square(number):
    if number == 30: raise ValueError("thirty")
    return number * number
if __name__ == "__main__":
    print(list(parallel.in_order(square, range(29))) == [n * n for n in range(29)])
    try:
        for value in parallel.in_order(square, range(100)):
            last = value
    except ValueError as error:
        print(error, last)
"""


@pytest.mark.slow
def test_chunks_are_computed_in_order_and_errors_reach_the_caller(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(PARALLEL, "utf-8")
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=900)
    assert done.stdout == "True\nthirty 841\n", done.stderr


KILLED = """
import os, signal
from sftlab.dataset import parallel
def dies(number):
    if number == 20: os.kill(os.getpid(), signal.SIGKILL)
    return number
if __name__ == "__main__":
    list(parallel.in_order(dies, range(40)))
"""


@pytest.mark.slow
def test_a_killed_process_is_reported_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(KILLED, "utf-8")
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=900)
    assert "StageError: a process that reads or tokenises rows was killed" in done.stderr
    assert done.returncode == 1


ORPHANS = """
import os, signal
from sftlab.dataset import parallel
def process(number):
    return os.getpid()
if __name__ == "__main__":
    for pid in parallel.in_order(process, range(40)):
        if pid != os.getpid():
            print(pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(ORPHANS, "utf-8")
    # The output ends when the last process that holds it has ended: before the timeout, if none is left.
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=900)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip().isdecimal()


def test_examples_are_written_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(arrow_examples, "SORTED", 5000)
    monkeypatch.setattr(arrow_examples, "BATCH", 10)
    rows = [Example(f"row {number}", [{"role": "user", "content": "q" * number}], "A") for number in range(201)]
    texts = list(map(text_of, rows))
    chunks = [texts[:7], texts[7:100], texts[100:]]
    write(tmp_path / "rows.arrow", map(batch_of, chunks))
    order = random.Random(0).sample(range(201), 150)
    reorder([tmp_path / "rows.arrow"], np.array(order), tmp_path / "train.arrow")
    examples, expected = Examples(tmp_path / "train.arrow"), [rows[number] for number in order]
    assert [len(batch.examples()) for batch in examples.batches()] == [10] * 15
    assert list(examples) == expected
    assert (examples[149], examples[-150], examples[3:6]) == (expected[149], expected[0], expected[3:6])
    with pytest.raises(IndexError):
        examples[150]
    reorder([], np.array([], dtype=np.int64), tmp_path / "none.arrow")
    assert len(Examples(tmp_path / "none.arrow")) == 0
    assert open_file(tmp_path / "train.arrow").num_record_batches == 15


def test_strata_are_in_every_split_in_proportion_and_groups_stay_together(tmp_path: Path) -> None:
    rows = [vignette(number, kind="rare" if number % 10 == 0 else "common", case=number // 2) for number in range(200)]
    # Both rows of a case are of one kind, except that a rare row shares its case with a common one.
    path = write_rows(tmp_path / "a.jsonl", rows)
    split = {"train": 0.5, "validation": 0.25, "test": 0.25}
    kinds = {row["id"]: row["kind"] for row in rows}
    for options, tolerance in (({}, 0), ({"group_by": "{{ case }}"}, 1)):
        cfg = settings(name_or_path=str(path), split=split, stratify_by="{{ kind }}", **options)
        splits = rendered(cfg).splits
        assert [len(splits[name]) for name in split] == [100, 50, 50]
        for name, share in split.items():
            count = Counter(kinds[row.id] for row in splits[name])
            assert abs(count["rare"] - 20 * share) <= tolerance
        if options:
            cases = [{row.group for row in splits[name]} for name in split]
            assert sum(map(len, cases)) == len(set.union(*cases)) == 100


@pytest.mark.slow
def test_another_training_seed_moves_no_row(config: Any) -> None:
    first, second = config("seed=1").dataset, config("seed=2").dataset
    assert first == second
    assert rendered(first).splits == rendered(second).splits
    assert rendered(config("dataset.seed=1").dataset).splits != rendered(first).splits
