"""The format of rows, recognised without configuration: real-world shapes, and every refusal with its remedy."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_prompt import settings as dataset_settings

from sftlab.dataset import sources
from sftlab.dataset.row_formats.recognise import convert, recognise
from sftlab.dataset.row_formats.record import Converted, Recognised, Settings
from sftlab.dataset.rows import Row
from sftlab.dataset.templates import Templates
from sftlab.dataset.values import ABSENT
from sftlab.errors import ConfigError
from sftlab.eval.extract import compile_pattern, strict

SHAPES = Path(__file__).parent / "shapes"
FILES = {path.name.split(".")[0]: path for path in sorted(SHAPES.iterdir()) if ".expected" not in path.name}
EXPECTED = {name: json.loads((SHAPES / f"{name}.expected.json").read_text("utf-8")) for name in FILES}


def read(path: Path) -> list[Row]:
    return [row for chunk in sources.read(path)["all"] for row in chunk.table().rows if row is not None]


def columns_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def recognised(rows: list[Row], **settings: Any) -> Recognised:
    return recognise(columns_of(rows), rows, Settings(**settings))


def as_json(row: Converted) -> dict[str, Any]:
    values = {"messages": row.messages, "targets": row.targets, "tools": row.tools, "options": row.options}
    return {name: value for name, value in {**values, "choices": row.choices}.items() if value}


def refusal(rows: list[Row], **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        recognised(rows, **settings)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_shape_is_converted_or_refused_as_expected(name: str) -> None:
    rows, expected = read(FILES[name]), EXPECTED[name]
    if "refused" in expected:
        message = refusal(rows)
        assert message.startswith(expected["refused"]["key"])
        for part in expected["refused"]["names"]:
            assert part in message
        return
    found = recognised(rows)
    assert dict(found.columns) == expected["columns"]
    assert list(found.option_columns) == expected.get("option_columns", [])
    facts = {name: getattr(found, name) for name in ("format", "answer", "task", "extract")}
    assert facts == {name: expected.get(name) for name in facts}
    for row, result in zip(rows, expected["rows"], strict=True):
        if "refused" in result:
            with pytest.raises(ConfigError) as caught:
                convert(found, row)
            assert all(part in str(caught.value) for part in result["refused"])
        else:
            assert as_json(convert(found, row)) == result


@pytest.mark.parametrize("name", [name for name, value in EXPECTED.items() if "rows" in value])
def test_a_shape_in_a_parquet_file_is_the_same(tmp_path: Path, name: str) -> None:
    """Arrow stores null for every key that an object lacks."""
    from pyarrow import ArrowException, Table, parquet

    try:
        parquet.write_table(Table.from_pylist([dict(row) for row in read(FILES[name])]), tmp_path / "rows.parquet")
    except ArrowException:
        pytest.skip("a column has values of several types")
    rows = read(tmp_path / "rows.parquet")
    found = recognised(rows)
    for row, result in zip(rows, EXPECTED[name]["rows"], strict=True):
        if "refused" not in result:
            assert as_json(convert(found, row)) == result


SETTING = re.compile(r"dataset\.(format|answer_kind|columns\.\w+)=(?!template)(\w+)")


def applied(settings: str) -> dict[str, Any]:
    """Settings as a message writes them on the command line."""
    pairs = dict(SETTING.findall(settings))
    columns = {key.removeprefix("columns."): value for key, value in pairs.items() if key.startswith("columns.")}
    return {**{key: value for key, value in pairs.items() if not key.startswith("columns.")}, "columns": columns}


@pytest.mark.parametrize("name", [name for name, value in EXPECTED.items() if "refused" in value])
def test_the_settings_that_a_refusal_offers_decide(name: str) -> None:
    rows = read(FILES[name])
    remedy = refusal(rows).rpartition("; ")[2]
    offered = [part for part in remedy.split(" or ") if SETTING.search(part)]
    for part in offered:
        found = recognised(rows, **applied(part))
        assert all(convert(found, row).targets for row in rows)
    assert offered or name in ("glaive_v2_raw", "oasst_guanaco", "oasst_messages", "plain_text")


@pytest.mark.parametrize("name", ["medmcqa_test", "squad_v2", "unanswered_turn"])
def test_the_expression_that_a_row_problem_offers_leaves_out_these_rows_only(name: str) -> None:
    rows = read(FILES[name])
    found, kept = recognised(rows), []
    for row in rows:
        try:
            convert(found, row)
            kept.append(True)
        except ConfigError as error:
            kept.append(False)
            match = re.search(r"'dataset\.keep=\"(.*)\"'", str(error))
            assert match
            keep = match[1].replace(r"\"", '"')
    templates = Templates(
        dataset_settings(keep=keep, id=None, user="u", assistant="a", target="t", choices=None, options=None),
        "dataset",
        columns_of(rows),
    )
    assert [templates.keeps(row, "row") for row in rows] == kept


def choices(count: int, **changed: Any) -> Row:
    return {"question": "Which?", "options": [f"option {n}" for n in range(count)], **changed}


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("write", [int, float, str])
def test_the_base_of_an_index_follows_from_all_answers(base: int, write: Any) -> None:
    random_ = random.Random(base)
    counts = [random_.choice([3, 4, 5]) for _ in range(60)]
    rights = [random_.randrange(count) for count in counts]
    rows = [choices(count, label=write(right + base)) for count, right in zip(counts, rights, strict=True)]
    found = recognised(rows)
    assert found.answer == f"index{base}"
    assert [convert(found, row).targets for row in rows] == [["ABCDE"[right]] for right in rights]


def test_an_index_is_not_taken_for_the_text_of_a_number() -> None:
    """Options 1, 2, 3, 4 in another order: index and text differ, and both fit."""
    rows = [{"question": "2 - 1?", "options": ["2", "1", "4", "3"], "answer": "1"}] * 3
    message = refusal(rows)
    assert "dataset.answer_kind=text" in message
    assert "dataset.answer_kind=index" in message
    assert convert(recognised(rows, answer_kind="text"), rows[0]).targets == ["B"]
    assert convert(recognised(rows, answer_kind="index1"), rows[0]).targets == ["A"]


@pytest.mark.parametrize("answer", ["b", "(B)", "B.", "B) option 1", "b: option 1", ["B"], "Option 1"])
def test_an_answer_may_be_written_in_several_ways(answer: Any) -> None:
    rows = [choices(4, answer=answer), choices(4, answer="A" if answer != "Option 1" else "option 3")]
    assert convert(recognised(rows), rows[0]).targets == ["B"]


def test_two_columns_that_name_different_options_are_refused() -> None:
    rows = [choices(3, answer="A", label="C"), choices(3, answer="B", label="A")]
    assert "dataset.columns.answer=answer" in refusal(rows)
    assert convert(recognised(rows, columns={"answer": "label"}), rows[0]).targets == ["C"]


def test_an_ambiguous_index_is_decided_by_another_column() -> None:
    rows = [choices(4, answer="option 1", label=1), choices(4, answer="option 2", label=2)]
    assert [convert(recognised(rows), row).targets for row in rows] == [["B"], ["C"]]


def test_the_right_option_has_no_fixed_place_among_wrong_ones() -> None:
    wrong = {f"distractor{n}": f"wrong {n}" for n in (1, 2, 3)}
    rows = [{"question": f"Which {n}?", **wrong, "correct_answer": "right"} for n in range(400)]
    found = recognised(rows)
    letters = Counter(convert(found, row).targets[0] for row in rows)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 150  # 100 are expected, with a standard deviation of 9


@pytest.mark.parametrize("name", [name for name, value in EXPECTED.items() if value.get("task") == "choice"])
def test_the_default_pattern_reads_every_answer(config: Any, name: str) -> None:
    rows, pattern = read(FILES[name]), compile_pattern(config().eval.pattern)
    found = recognised(rows)
    for row, result in zip(rows, EXPECTED[name]["rows"], strict=True):
        if "refused" not in result:
            converted = convert(found, row)
            assert strict(converted.messages[-1]["content"] or "", pattern) == converted.targets[0]


CHAT: Row = {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]}
QUIZ = choices(3, answer="A", exp="why")


def turn(number: int, **changed: Any) -> Row:
    messages = [dict(message) for message in CHAT["messages"]]  # type: ignore[attr-defined]
    messages[number] = {key: value for key, value in {**messages[number], **changed}.items() if value != "absent"}
    return {"messages": messages}


@pytest.mark.parametrize(
    ("good", "bad", "parts"),
    [
        (CHAT, {"messages": None}, ["messages", "null", "dataset.keep"]),
        (CHAT, {"messages": "hello"}, ["messages", "'hello'"]),
        (CHAT, {"messages": CHAT["messages"][:1]}, ["messages", "user turn"]),  # type: ignore[index]
        (CHAT, turn(1, content=""), ["messages[1].content", "empty"]),
        (CHAT, turn(0, content=None), ["messages[0].content", "null"]),
        (CHAT, turn(0, role="narrator"), ["messages[0]", "'narrator'", "assistant"]),
        (CHAT, turn(1, weight=0), ["messages[1]", "weight 0"]),
        (CHAT, turn(0, content={"parts": ["a"]}), ["messages[0].content", "not text"]),
        (CHAT, turn(1, tool_calls=[{"id": "1"}]), ["messages[1].tool_calls[0]", "name"]),
        (CHAT, turn(1, function_call={"name": "f", "arguments": "{"}), ["messages[1].function_call", "not JSON"]),
        (CHAT, {**CHAT, "tools": "no list"}, ["tools", "'no list'"]),
        (CHAT, {**CHAT, "tools": [{"name": "f", "since": date(2026, 1, 1)}]}, ["not JSON"]),
        (CHAT, turn(0, content="half \ud83d"), ["user text", "\\ud83d", "UTF-8"]),
        (QUIZ, {**QUIZ, "question": ""}, ["question", "empty", "dataset.keep"]),
        (QUIZ, {**QUIZ, "answer": "D"}, ["answer", "'D'", "A, B, C"]),
        (QUIZ, {**QUIZ, "answer": ["A", "B"]}, ["answer", "single"]),
        (QUIZ, {**QUIZ, "options": ["one"]}, ["options", "1 option"]),
        (QUIZ, {**QUIZ, "options": "one, two"}, ["options", "'one, two'"]),
        (QUIZ, {**QUIZ, "options": [["a"], {"b": 1}]}, ["options"]),
        (QUIZ, {**QUIZ, "exp": ["a"]}, ["exp", "a list"]),
        ({"instruction": "i", "output": "o"}, {"instruction": "i", "output": None}, ["output", "null"]),
        ({"instruction": "i", "output": "o"}, {"instruction": "i"}, ["output", "missing"]),
        ({"Prompt": "p", "completion": "c"}, {"Prompt": {"a": 1}, "completion": "c"}, ["Prompt", "a"]),
        (
            {"question": "q", "answer": "yes"},
            {"question": "q", "answer": "perhaps"},
            ["answer", "'perhaps'", "yes, no"],
        ),
    ],
)
def test_a_later_row_that_does_not_fit_is_a_problem_with_its_column(good: Row, bad: Row, parts: list[str]) -> None:
    """The row is not among those by which the format is recognised."""
    columns = columns_of([good, bad])
    found = recognise(columns, [good] * 200)
    assert convert(found, good).targets
    with pytest.raises(ConfigError) as caught:
        convert(found, bad)
    assert all(part in str(caught.value) for part in parts)


JUNK: list[Any] = [
    None, ABSENT, math.nan, math.inf, 0, -1, 3.5, True, "", "[", "[]", "{}", "[1, 2]", [], [None], ["a", "b"],
    [["a", "b"]], [{}], [{"role": "user"}], [{"role": None, "content": "a"}], [{"from": "human", "value": "x"}], {},
    {"text": ["a"], "label": []}, {"A": None, "B": "y"}, {"role": ["user"], "content": ["x"]}, b"bytes",
    date(2026, 1, 1), Decimal("1.5"), "\ud800", 10**30, [[["deep"]]], "(B)", '{"name": 1}', "²",
    [{"name": "f", "arguments": "["}], [{"role": "assistant", "content": "", "tool_calls": "x"}],
]  # fmt: skip


def with_junk(value: Any, random_: random.Random) -> Any:
    """A copy of a value in which one part is replaced or missing."""
    if random_.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return random_.choice(JUNK)
    copy = value.copy()
    key = random_.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if random_.random() < 0.2:
        del copy[key]
    else:
        copy[key] = with_junk(copy[key], random_)
    return copy


@pytest.mark.parametrize("name", [name for name, value in EXPECTED.items() if "rows" in value])
def test_any_row_is_converted_to_text_or_refused(name: str) -> None:
    rows, random_ = read(FILES[name]), random.Random(name)
    found = recognised(rows)
    for _ in range(300):
        row = dict(random_.choice(rows))
        column = random_.choice(list(row))
        row[column] = with_junk(row[column], random_)
        try:
            converted = convert(found, row)
        except ConfigError:
            continue
        json.dumps([converted.messages, converted.tools], ensure_ascii=False, allow_nan=False).encode()
        assert all(target.strip() for target in converted.targets)
        assert converted.messages[-1]["role"] == "assistant"


def test_the_columns_of_roles_may_be_named() -> None:
    rows: list[Row] = [{"ask": "Capital of Peru?", "say": "Lima", "explanation": "It is on the coast."}]
    assert refusal(rows, columns={"prompt": "question"}).startswith("dataset.columns.prompt=question")
    assert "dataset.columns.promt" in refusal(rows, columns={"promt": "ask"})
    found = recognised(rows, format="question_answer", columns={"question": "ask", "answer": "say", "rationale": None})
    assert as_json(convert(found, rows[0]))["messages"] == [
        {"role": "user", "content": "Capital of Peru?"},
        {"role": "assistant", "content": "Lima"},
    ]


def test_two_columns_of_one_role_are_refused_if_they_differ() -> None:
    rows: list[Row] = [{"question": "Capital of Peru?", "answer": "Lima", "response": "It is Lima."}]
    assert "dataset.columns.answer=answer or dataset.columns.answer=response" in refusal(rows)
    same: list[Row] = [{**rows[0], "response": "Lima"}]
    assert convert(recognised(same), same[0]).targets == ["Lima"]


def test_messages_keep_their_reasoning_and_tools() -> None:
    row: Row = {
        "messages": [
            {"role": "user", "content": "Two and two?"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Add."}, {"type": "text", "text": "4"}]},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "reasoning_content": "Again.", "content": "Yes.", "refusal": None, "audio": None},
        ],
        "functions": [{"name": "add", "parameters": {"type": "object", "properties": {}}}],
    }
    converted = convert(recognised([row]), row)
    assert [message.get("reasoning_content") for message in converted.messages] == [None, "Add.", None, "Again."]
    assert [message.get("content") for message in converted.messages][1::2] == ["4", "Yes."]
    assert converted.tools == [{"type": "function", "function": row["functions"][0]}]  # type: ignore[index]


def test_the_task_follows_from_the_length_of_the_answers() -> None:
    rows: list[Row] = [{"prompt": "p", "completion": "five words are short enough"}] * 8
    long: list[Row] = [{"prompt": "p", "completion": "a completion of at least six words"}] * 3
    assert recognised(rows).task == "exact"
    assert recognised(rows + long).task == "rouge"
