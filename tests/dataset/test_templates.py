"""Values that are not text, in rows of every kind of file: null is empty, and no Python notation is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import Row, vignette, vignettes, write_rows
from test_dataset import examples, write_json, write_parquet
from test_prompt import settings

from sftlab.dataset.templates import Templates
from sftlab.errors import ConfigError
from sftlab.records import Example, text_of_turn

ROW: Row = {
    "id": "r7",
    "text": "words",
    "nothing": None,
    "nan": math.nan,
    "list": ["a", None, "b"],
    "deep": {"a": [{"b": None}], "c": "x"},
    "flag": True,
    "number": 3,
    "half": 0.5,
    "infinite": math.inf,
    "bytes": b"abc",
    "date": date(2026, 1, 2),
    "time": datetime(2026, 1, 2, 3, 4),
    "decimal": Decimal("1.50"),
    "objects": [{"text": "one"}, {"text": "two"}],
}


def render(template: str, row: Row = ROW, **changed: Any) -> str:
    values = {"user": f"|{template}|", "assistant": "a", "target": "t", "choices": None, "options": None, **changed}
    return Templates(settings(**values), "dataset", list(row)).example(row, "x", "rows, row 1").question[1:-1]


@pytest.mark.parametrize("name", ["nothing", "nan", "list[1]", "deep.a[0].b", "deep['a'][0]['b']"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ X }}", ""),
        ("{{ 'a' ~ X ~ 'b' }}", "ab"),
        ("{{ [X, 'b', X] | join('-') }}", "-b-"),
        ("{{ X | string }}{{ X | trim }}{{ X | upper }}{{ X | title }}{{ X | replace('None', 'x') }}", ""),
        ("{{ '%s.' % X }}{{ '%s%s' % (X, 'b') }}{{ '%(x)s' % {'x': X} }}{{ '%s' | format(X) }}", ".b"),
        ("{{ '{}.{x}'.format(X, x=X) }}", "."),
        ("{% for c in X %}{{ c }}{% endfor %}{{ X | list | length }}", "0"),
        ("{{ 'yes' if X else 'no' }}{{ 'yes' if X is none else 'no' }}{{ 'yes' if X == none else 'no' }}", "noyesyes"),
        ("{{ 'yes' if X is string else 'no' }}{{ 'yes' if X != none else 'no' }}", "nono"),
        ("{{ X | default('d', true) }}{{ X or 'e' }}", "de"),
        ("{{ X | tojson }}{{ [X] | tojson }}", "null[null]"),
        ("{{ X + 'a' }}{{ X | search('(.*)') }}{{ X | sql }}", "a"),
        ("{% set y %}{{ X }}{% endset %}{{ y }}{% macro m(z) %}{{ z }}{% endmacro %}{{ m(X) }}", ""),
        ("{{ {'a': 'b'}.get('c') }}{{ {'a': 'b'}.get('c') | trim }}{{ none }}{{ 'a' ~ none }}", "a"),
        ("{{ X | int }}{{ X | float }}{{ X | int | string }}", ""),
        ("{{ X | int(7) }}{{ X | float(default=0.5) }}", "70.5"),
    ],
)
def test_null_writes_nothing(name: str, template: str, expected: str) -> None:
    assert render(template.replace("X", name)) == expected


def test_null_in_lists_and_objects() -> None:
    assert render("{{ list | join(',') }}") == "a,,b"
    assert render("{% for x in list %}[{{ x }}]{% endfor %}") == "[a][][b]"
    assert render("{{ list | select | join }}{{ list | reject('none') | join }}") == "abab"
    assert render("{{ list | tojson }} {{ deep | tojson }}") == '["a", null, "b"] {"a": [{"b": null}], "c": "x"}'
    assert render("{{ objects | map(attribute='text') | join(' ') }}") == "one two"


def test_text_and_numbers_are_written_as_they_are() -> None:
    assert (
        render("{{ number }} {{ half }} {{ number + 1 }} {{ number ~ half }} {{ '%d' % number }}") == "3 0.5 4 30.5 3"
    )
    assert render("{{ number | string }}{{ flag | string }}{{ flag | lower }}{{ decimal | string }}") == "3Truetrue1.50"
    assert render("{{ date.isoformat() }} {{ time | string }}") == "2026-01-02 2026-01-02 03:04:00"


def test_names_of_columns_and_keys_hide_nothing() -> None:
    row = {"path": "p", "self": "s", "range": "r", "_target": "t", "values": {"path": "q", "_x": 1, "big": 10**400}}
    template = "{{ path }}{{ range }}{{ _target }}{{ values.path }}{{ values._x }}{{ values.big }}"
    assert render(template, row, id=None) == f"prtq1{10**400}"


def test_a_template_changes_no_column_for_the_next() -> None:
    result = render("{{ text }}{% set text = 'other' %}", system="{% set text = 'changed' %}{{ text }}")
    assert result == "words"


WRONG = ["list", "deep", "deep.a", "flag", "infinite", "bytes", "date", "time", "decimal", "objects"]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "template",
    [
        "{{ X }}",
        "{{ 'a' ~ X }}",
        "{{ [X] | join }}",
        "{{ '%s' % X }}",
        "{{ '%s' | format(X) }}",
        "{{ '{}'.format(X) }}",
    ],
)
def test_what_is_no_text_is_refused_by_name_and_the_remedy_works(name: str, template: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render(template.replace("X", name))
    message = str(caught.value)
    assert message.startswith("rows, row 1 (r7): dataset.user writes column ")
    assert f"column {name}," in message
    remedy = message[message.rindex("write {{") + len("write ") :]
    result = render(remedy)
    assert result
    assert "None" not in result


@pytest.mark.parametrize(
    "filtered",
    [
        "list | string",
        "list | trim",
        "deep | upper",
        "bytes | string",
        "list[:1]",
        "list + list",
        "objects | map(attribute='text')",
        "list | list",
        "text == 'x'",
        "list[:1] | trim",
        "(1, 2)",
        "text.upper",
    ],
)
def test_no_filter_or_expression_writes_python(filtered: str) -> None:
    with pytest.raises(ConfigError, match="not text"):
        render(f"{{{{ {filtered} }}}}")


@pytest.mark.parametrize("template", ["list", "parts", "flags"])
def test_a_remedy_keeps_the_text_that_other_rows_have(template: str) -> None:
    row = {
        "list": ["a", "b"],
        "parts": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "flags": {"a": 1},
    }
    with pytest.raises(ConfigError) as caught:
        render(f"{{{{ {template} }}}}", row, id=None)
    remedy = re.search(r"write (\{\{.*\}\})$", str(caught.value))
    assert remedy
    assert render(remedy[1], {template: "plain text"}, id=None) == "plain text"
    assert render(remedy[1], row, id=None) in ("a, b", "ab", '{"a": 1}')


def write_csv(path: Path, rows: list[Row]) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def instruction(row: Example) -> str:
    """The system text of a row; "" if it has none."""
    return text_of_turn(row.prompt[0]) if row.prompt[0]["role"] == "system" else ""


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_rows), ("a.json", write_json), ("a.parquet", write_parquet), ("a.csv", write_csv)],
)
def test_null_is_the_same_in_every_file(tmp_path: Path, name: str, write: Callable[[Path, list[Row]], Any]) -> None:
    rows = [
        {"id": f"r{number}", "note": None if number % 2 else "n", "question": f"q{number}", "answer": f"a{number}"}
        for number in range(4)
    ]
    write(tmp_path / name, rows)
    own = {"system": "{{ note }}", "user": "{{ question }}{{ note }}", "assistant": "{{ answer }}"}
    own |= {"target": "{{ answer }}", "choices": None, "options": None}
    result = examples(tmp_path / name, mounted="eval.dataset", **own)["test"]
    assert [instruction(row) for row in result] == ["n", "", "n", ""]
    assert [row.question for row in result] == ["q0n", "q1", "q2n", "q3"]
    rows[2]["answer"] = None
    write(tmp_path / name, rows)
    with pytest.raises(ConfigError, match=r"row 3 \(r2\): eval\.dataset\.assistant renders to nothing"):
        examples(tmp_path / name, mounted="eval.dataset", **own)


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_rows), ("a.parquet", write_parquet)])
def test_null_within_objects_is_the_same_in_every_file(
    tmp_path: Path, name: str, write: Callable[[Path, list[Row]], Any]
) -> None:
    turns = [
        {"role": "system", "content": None},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    rows = [
        {"id": "1", "messages": turns, "options": {"A": "x", "B": "y", "C": None}},
        {"id": "2", "messages": [{**turns[0], "content": "s"}, *turns[1:]], "options": {"A": "x", "B": "y", "C": "z"}},
    ]
    write(tmp_path / name, rows)
    chat = {"system": "{{ messages[0].content }}", "assistant": "{{ messages[2].content }}", "target": "A"}
    user = "{{ messages[1].content }}{% for letter, text in options.items() %} ({{ letter }}) {{ text }}{% endfor %}"
    result = examples(tmp_path / name, mounted="eval.dataset", user=user, **chat)["test"]
    assert [instruction(row) for row in result] == ["", "s"]
    assert [row.question for row in result] == ["q (A) x (B) y", "q (A) x (B) y (C) z"]
    assert [row.choices for row in result] == ["AB", "ABC"]
    assert result[0].options == {"A": "x", "B": "y"}


def test_whole_numbers_that_pandas_made_floats_are_written_without_a_fraction(tmp_path: Path) -> None:
    rows = [vignette(number, age=float(number), weight=number + 0.5) for number in range(1, 4)]
    rows[1] |= {"age": None, "weight": None}
    write_parquet(tmp_path / "a.parquet", rows)
    result = examples(tmp_path / "a.parquet", mounted="eval.dataset", user="{{ id }} {{ age }} {{ weight }}")["test"]
    assert [row.question for row in result] == ["row-1 1 1.5", "row-2  ", "row-3 3 3.5"]
    write_rows(
        tmp_path / "b.jsonl", [vignette(number, age=float(number)) for number in range(3)]
    )  # floats that are meant
    result = examples(tmp_path / "b.jsonl", mounted="eval.dataset", user="{{ id }} {{ age }}")["test"]
    assert [row.question for row in result] == ["row-0 0.0", "row-1 1.0", "row-2 2.0"]


def test_a_text_that_is_no_number_is_not_written_as_0() -> None:
    row = {"a": "12", "b": "", "c": "many", "d": " 1.5 "}
    assert render("{{ a | int + 1 }} {{ b | int }} {{ d | float }} {{ c | int(0) }}", row, id=None) == "13  1.5 0"
    for name in ("int", "float"):
        with pytest.raises(ConfigError, match=r"'many' is not a number; write a default, as in int\(0\)"):
            render(f"{{{{ c | {name} }}}}", row, id=None)


def test_an_index_from_the_end_must_be_a_constant() -> None:
    row = {"cop": -1, "good": 1, "options": ["a", "b"], "key": {"a": "x"}}
    for template in ("'ABCD'[cop]", "options[cop]", "('a', 'b')[cop]", "'ABCD'[good - 2]", "'ABCD'[cop | int]"):
        with pytest.raises(ConfigError, match=r"the index -1 of a row would count from the end; leave the row out"):
            render(f"{{{{ {template} }}}}", row, id=None)
    for template, text in (
        ("'ABCD'[good]", "B"), ("options[-1]", "b"), ("options[-1:][0]", "b"), ("{-1: 'none', 1: 'x'}[cop]", "none"),
        ("key[options[0]]", "x"),
    ):  # fmt: skip
        assert render(f"{{{{ {template} }}}}", row, id=None) == text


COMPARED = ["n > 3", "n >= m", "3 < n and m < 9", "n | int > 3", "n > 3 or m > 3", "(n > 3)"]


@pytest.mark.parametrize("keep", COMPARED)
def test_the_remedy_for_a_comparison_with_null_works(keep: str) -> None:
    rows: list[Row] = [{"n": 5, "m": 4}, {"n": None, "m": 4}, {"n": 2, "m": 4}]
    with pytest.raises(ConfigError, match=r"row 1: dataset\.keep compares a value that is null; write `") as caught:
        Templates(
            settings(**CHAT | {"user": "u", "assistant": "a", "id": None, "keep": keep}), "dataset", ["n", "m"]
        ).keeps(rows[1], "row 1")
    own = {"user": "u", "assistant": "a", "id": None, "keep": str(caught.value).split("`")[1]}
    templates = Templates(settings(**CHAT | own), "dataset", ["n", "m"])
    assert [templates.keeps(row, "row") for row in rows] == [True, False, keep == "n > 3 or m > 3"]
    if keep == "n > 3":
        assert own["keep"] == "n is not none and n > 3"


# — several correct answers —


def several(target: Any, template: str = "{{ answers }}", **changed: Any) -> Example:
    row = {**vignette(1), "answers": target}
    values = {"choices": None, "options": None, "target": template, **changed}
    return Templates(settings(**values), "dataset", list(row)).example(row, "x", "rows, row 1")


def test_a_list_of_texts_is_several_correct_answers() -> None:
    result = several(["Paris", "paris, France", "Paris"])
    assert (result.target, result.targets) == ("Paris", ["Paris", "paris, France"])
    assert (several(["Paris"]).target, several(["Paris"]).targets) == ("Paris", None)
    assert several(["Paris ", 3]).targets == ["Paris ", "3"]
    assert several([" x ", "y"], "{{ answers | map('trim') }}").targets == ["x", "y"]
    assert several([" x ", "y"], "\n {{- answers -}} \n").targets == [" x ", "y"]
    assert several("Paris").targets is None
    letters = several(["B", "A"], choices="ABC")
    assert (letters.target, letters.targets, letters.choices) == ("B", ["B", "A"], "ABC")


@pytest.mark.parametrize(
    ("target", "changed", "message"),
    [
        ([], {}, "dataset.target is an empty list"),
        (["a", None], {}, "dataset.target item 1 renders to nothing"),
        (["a", "  "], {}, "dataset.target item 1 renders to nothing"),
        (["a", ["b"]], {}, "is a list and not text: ['b']"),
        (["a", True], {}, "is a bool and not text: True"),
        ({"a": 1}, {}, "column answers, which is a dict and not text"),
        (["A", "D"], {"choices": "ABC"}, "target 'D' is not one of A, B, C"),
        (["a", "b"], {"template": "{{ answers }}."}, "column answers, which is a list and not text"),
        (["a", "b"], {"assistant": "{{ answers }}"}, "dataset.assistant writes column answers"),
        (["a", "half \ud800"], {}, "half of a surrogate pair"),
    ],
)
def test_a_list_that_is_no_list_of_answers_is_refused(target: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        several(target, **changed)
    assert message in str(caught.value)


# — conversations —


def talk(*turns: str) -> Row:
    keys = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"id": "r", "messages": [{"role": keys[turn[0]], "content": turn} for turn in turns]}


CHAT = {
    "system": None,
    "user": "{{ messages[0].content }}",
    "assistant": "{{ messages[1].content }}",
    "target": "t",
    "choices": None,
    "options": None,
}
LOOP = "{% for m in messages %}{% if not loop.last %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"


def chat(row: Row, **changed: Any) -> Example:
    return Templates(settings(**{**CHAT, **changed}), "dataset", list(row)).example(row, "x", "rows, row 1")


@pytest.mark.parametrize(
    ("row", "changed"),
    [
        (talk("u1", "a1", "u2", "a2"), {}),
        (talk("u1", "a1", "u2", "a2"), {"target": "{{ messages[3].content }}", "keep": "messages[3].content"}),
        (talk("u1", "a1", "u2", "a2"), {"assistant": "{{ messages[-1].content }}"}),
        (talk("u1", "a1", "u2", "a2"), {"assistant": "{{ (messages | last).content }}"}),
        (talk("u1", "a1", "t1"), {}),
        (talk("u1", "a1", "u2", "a2"), {"user": "{{ (messages | selectattr('role', 'eq', 'user') | first).content }}"}),
        (
            {"messages": [{"from": "human", "value": str(n)} for n in range(4)]},
            {"id": None, "user": "{{ messages[0].value }}", "assistant": "{{ messages[1].value }}"},
        ),
        (
            {"messages": [{"user": "q", "assistant": "a"}] * 2},
            {"id": None, "user": "{{ messages[0].user }}", "assistant": "{{ messages[0].assistant }}"},
        ),
    ],
)  # fmt: skip
def test_turns_that_no_template_reads_are_refused_and_the_remedy_works(row: Row, changed: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"messages has \d turns, and the templates read .* would be dropped"
    ) as caught:
        chat(row, **changed)
    keep = re.search(r"\"dataset\.keep='(.*)'\"", str(caught.value))
    assert keep
    templates = Templates(settings(**{**CHAT, **changed, "keep": keep[1]}), "dataset", list(row))
    assert not templates.keeps(row, "row 1")
    short = {**row, "messages": row["messages"][: int(keep[1].split()[-1])]}
    assert "keep" in changed or templates.keeps(short, "row 2")


def first_exchange(column: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "id": None,
        "user": f"{{{{ {column}{question} }}}}",
        "assistant": f"{{{{ {column}{answer} }}}}",
    }


SPEAKER = [("author", "content"), ("sender", "text"), ("name", "content"), ("type", "content"), ("turn", "text"),
           ("Role", "Content"), ("speaker", "utterance"), ("FROM", "value")]  # fmt: skip
PAIRS = [("input", "output"), ("prompt", "response"), ("question", "answer"), ("instruction", "output"),
         ("query", "response"), ("Human", "Assistant")]  # fmt: skip
MAPPED = "(messages | map(attribute='content') | list)"
DROPPING: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"speaker {key}": (
            [{key: ("user", "assistant")[n % 2], text: f"t{n}"} for n in range(4)],
            first_exchange("c", f"[0].{text}", f"[1].{text}"),
        )
        for key, text in SPEAKER
    },
    **{f"pairs {a}": ([{a: "q", b: "a"}] * 2, first_exchange("c", f"[0].{a}", f"[0].{b}")) for a, b in PAIRS},
    "no speaker": (
        [{"role": role, "content": "x"} for role in ("user", "assistant", None, "assistant")],
        first_exchange("c", "[0].content", "[1].content"),
    ),
    "numbers": (
        [{"speaker": n % 2, "text": "x"} for n in range(4)],
        first_exchange("c", "[0].text", "[1].text"),
    ),
    "object of lists": (
        {"role": ["user", "assistant"] * 2, "content": ["q1", "a1", "q2", "a2"]},
        first_exchange("c", ".content[0]", ".content[1]"),
    ),
    "mapped": (talk("u1", "a1", "u2", "a2")["messages"], first_exchange(MAPPED, "[0]", "[1]")),
    "mapped slice": (
        talk("u1", "a1", "u2", "a2")["messages"],
        first_exchange(MAPPED, "[:1] | join", "[:2] | last"),
    ),
    "mapped of selected": (
        talk("u1", "a1", "u2", "a2")["messages"],
        {
            "id": None,
            "user": "{{ (messages | selectattr('role', 'eq', 'user') | map(attribute='content') | list)[0] }}",
            "assistant": "{{ messages | selectattr('role', 'eq', 'assistant') | map(attribute='content') | first }}",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("turns", "changed"), DROPPING.values(), ids=DROPPING)
def test_the_first_exchange_alone_is_refused_in_every_shape(turns: Any, changed: dict[str, Any]) -> None:
    column = "messages" if "messages" in changed["user"] else "c"
    with pytest.raises(ConfigError, match=rf"{column}\S* has \d turns, and the templates read .* would be dropped"):
        chat({column: turns}, **changed)


@pytest.mark.parametrize("name", ["turn{}", "{}", "exchange_{}"])
@pytest.mark.parametrize(("ask", "answer"), [("user", "assistant"), ("question", "answer")])
def test_turns_under_numbered_keys_are_a_conversation(name: str, ask: str, answer: str) -> None:
    turns = {name.format(n): {ask: f"u{n}", answer: f"a{n}"} for n in (1, 2)}
    key = name.format(1)
    first = {"id": None, "user": f"{{{{ c['{key}'].{ask} }}}}", "assistant": f"{{{{ c['{key}'].{answer} }}}}"}
    with pytest.raises(ConfigError, match="c has 2 turns, and the templates read turn 0: turn 1 would be dropped"):
        chat({"c": turns}, **first)
    assert chat({"c": {key: turns[key]}}, **first).assistant == "a1"
    loop = "{% for turn in c.values() %}{{ turn." + ask + " }} {% endfor %}"
    assert chat({"c": turns}, **{**first, "user": loop, "assistant": "{{ c | tojson }}"}).question == "u1 u2 "


@pytest.mark.parametrize("name", ["id", "user", "assistant", "target", "group_by"])
def test_the_name_of_a_column_as_a_fixed_text_is_refused_and_the_remedy_works(name: str) -> None:
    row = vignette(1, source="s")
    with pytest.raises(ConfigError, match=f"dataset.{name}='source': is a fixed text, the name of a column") as caught:
        Templates(settings(**{name: "source"}), "dataset", list(row))
    match = re.search(r"write (.*) for its values", str(caught.value))
    assert match
    changed = {name: match[1], "choices": None}
    example = Templates(settings(**changed), "dataset", list(row)).example(row, "x", "rows, row 1")
    assert getattr(example, {"group_by": "group", "user": "question"}.get(name, name)) == "s"


@pytest.mark.parametrize("name", ["The Question", "the-question", "a.b", "question?", "2nd"])
def test_a_column_whose_name_is_not_an_identifier_is_read_by_row(name: str) -> None:
    row = {**vignette(1), name: "text", "rows": ["x"]}
    with pytest.raises(ConfigError) as caught:
        Templates(settings(user=f"{{{{ {name} }}}}"), "dataset", list(row)).example(row, "x", "rows, row 1")
    match = re.search(r"write (row\[.*\]) for the column", str(caught.value))
    assert match
    templates = Templates(settings(user=f"{{{{ {match[1]} }}}}"), "dataset", list(row))
    assert templates.example(row, "x", "rows, row 1").question == "text"
    with pytest.raises(ConfigError, match=re.escape(f"writes column {match[1]}, which is a list")) as refused:
        templates.example({**row, name: ["a", "b"]}, "x", "rows, row 1")
    remedy = re.search(r"write (\{\{.*\}\})", str(refused.value))
    assert remedy
    joined = Templates(settings(user=remedy[1]), "dataset", list(row)).example({**row, name: ["a", "b"]}, "x", "row 1")
    assert joined.question == "a, b"


def test_the_remedy_for_a_list_of_choices_works() -> None:
    row = vignette(1, letters=["A", "B", "C", "D"])
    with pytest.raises(ConfigError, match=r"dataset\.choices writes column letters") as caught:
        Templates(settings(choices="{{ letters }}"), "dataset", list(row)).example(row, "x", "rows, row 1")
    match = re.search(r"write (\{\{.*\}\})", str(caught.value))
    assert match
    example = Templates(settings(choices=match[1]), "dataset", list(row)).example(row, "x", "rows, row 1")
    assert example.choices == "ABCD"


def test_words_as_choices_are_told_to_be_compared_as_texts() -> None:
    row = vignette(1)
    with pytest.raises(
        ConfigError, match=r"renders to 'yes no maybe'; for words set eval\.task=exact dataset\.choices=null"
    ):
        Templates(settings(choices="yes no maybe"), "dataset", list(row)).example(row, "x", "rows, row 1")
    changed = {"choices": None, "target": "yes"}
    assert Templates(settings(**changed), "dataset", list(row)).example(row, "x", "rows, row 1").target == "yes"


def test_braces_around_keep_are_named() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.keep: is an expression, not a template; write it without \{\{"):
        Templates(settings(keep="{{ question }}"), "dataset", list(vignette(1)))


FLAT = ["conversation", "conversations", "messages", "data", "turns", "dialog", "dialogue", "history", "chat"]


@pytest.mark.parametrize("column", FLAT)
@pytest.mark.parametrize("pairs", [False, True])
def test_texts_and_pairs_of_texts_in_a_column_named_after_a_conversation(column: str, *, pairs: bool) -> None:
    turns: Any = [["q1", "a1"], ["q2", "a2"]] if pairs else ["q1", "a1", "q2", "a2"]
    used = first_exchange(column, "[0][0]", "[0][1]") if pairs else first_exchange(column, "[0]", "[1]")
    with pytest.raises(ConfigError, match=rf"{column} has \d turns, and the templates read .* would be dropped"):
        chat({column: turns}, **used)
    with pytest.raises(ConfigError, match=rf"row\.{column} has \d turns"):
        chat(
            {"row": {column: turns}},
            **first_exchange("row." + column, *(("[0][0]", "[0][1]") if pairs else ("[0]", "[1]"))),
        )
    if pairs:
        loop = f"{{% for q, a in {column} %}}{{{{ q }}}}{{{{ a if not loop.last }}}} {{% endfor %}}"
        result = chat({column: turns}, id=None, user=loop, assistant=f"{{{{ {column}[-1][1] }}}}")
        assert (result.question, result.assistant) == ("q1a1 q2 ", "a2")
    else:
        result = chat(
            {column: turns}, id=None, user=f"{{{{ {column}[:3] | join(' ') }}}}", assistant=f"{{{{ {column} | last }}}}"
        )
        assert (result.question, result.assistant) == ("q1 a1 q2", "a2")
    assert chat({column: turns[: 1 if pairs else 2]}, **used).assistant == "a1"


@pytest.mark.parametrize("history", [[["q0", "a0"]], [["q0", "a0"], ["q1", "a1"]], [{"role": "user", "content": "q"}]])
def test_a_history_that_no_template_reads_is_refused_and_the_remedy_works(history: Any) -> None:
    own = {"id": None, "user": "{{ instruction }}", "assistant": "{{ output }}"}
    row = {"instruction": "q", "output": "a", "history": history}
    with pytest.raises(ConfigError, match=r"history has \d earlier turns?, which no template reads") as caught:
        chat(row, **own)
    keep = re.search(r"\"dataset\.keep='(.*)'\"", str(caught.value))
    assert keep
    templates = Templates(settings(**{**CHAT, **own, "keep": keep[1]}), "dataset", list(row))
    assert not templates.keeps(row, "row 1")
    for without in ({**row, "history": []}, {**row, "history": None}):
        assert templates.keeps(without, "row 2")
        assert templates.example(without, "x", "row 2").assistant == "a"
    assert chat(row, **{**own, "user": "{{ history | tojson }}{{ instruction }}"}).question.endswith("q")
    assert chat({**row, "history": "55-year-old man"}, **own).question == "q"
    assert chat({**row, "history": ["asthma", "gout"]}, **own).question == "q"


def test_lists_that_are_no_conversations_may_be_read_in_part() -> None:
    own = {"id": None, "user": "q", "target": "t"}
    for items, read in (
        ([{"label": "A", "text": "x"}, {"label": "B", "text": "y"}], "c[0].text"),
        ([{"name": "aspirin", "text": "x"}, {"name": "heparin", "text": "y"}], "c[1].text"),
        ([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], "c[0].text"),
        ([{"text": "x", "score": 1}, {"text": "y", "score": 2}], "(c | map(attribute='text') | list)[0]"),
        (["x", "y"], "c[0]"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "c.text[0]"),
    ):
        assert chat({"c": items}, assistant=f"{{{{ {read} }}}}", **own).assistant in ("x", "y")


def test_conversations_of_which_nothing_is_dropped() -> None:
    mapped = {"id": None, "assistant": f"{{{{ {MAPPED} | last }}}}", "user": f"{{{{ {MAPPED}[:-1] | join(' ') }}}}"}
    assert chat(talk("u1", "a1", "u2", "a2"), **mapped).question == "u1 a1 u2"
    roles = {
        "id": None,
        "user": "{{ messages | map(attribute='role') | join }}",
        "assistant": f"{{{{ {MAPPED} | join }}}}",
    }
    assert chat(talk("u1", "a1", "u2", "a2"), **roles).assistant == "u1a1u2a2"
    assert chat(talk("u1", "a1")).assistant == "a1"
    assert (
        chat(talk("s1", "u1", "a1"), user="{{ messages[1].content }}", assistant="{{ messages[2].content }}").question
        == "u1"
    )
    long = chat(talk("u1", "a1", "u2", "a2"), user=LOOP, assistant="{{ messages[-1].content }}")
    assert (long.question, long.assistant) == ("user: u1\nassistant: a1\nuser: u2\n", "a2")
    assert chat(
        talk("u1", "a1", "u2", "a2"), user="{{ messages[:-1] | tojson }}", assistant="{{ messages[3].content }}"
    )
    row = {**talk("u1", "a1", "u2"), "question": "q"}  # another column is used
    assert chat(row, user="{{ question }}", assistant="a").question == "q"


# — all broken rows at once —


def test_broken_rows_are_reported_all_at_once(tmp_path: Path) -> None:
    rows: list[Any] = vignettes(60)
    for number in range(5, 38):
        rows[number]["rationale"] = None
    lines = [json.dumps(row) for row in rows]
    lines[2] = "{'a': 1}"
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    for mounted, section in ((None, "dataset"), ("eval.dataset", "eval.dataset")):
        with pytest.raises(ConfigError) as caught:
            examples(tmp_path / "a.jsonl", mounted=mounted)
        first, *message, more = str(caught.value).splitlines()
        assert first == "34 problems:"
        assert len(message) == 20
        assert "a.jsonl:3: is not JSON" in message[0]
        assert f"a.jsonl, row 6 (row-5): {section}.assistant renders to nothing" in message[1]
        assert more == "  … and 14 more"


def test_every_kind_of_broken_row_in_every_split_is_reported(tmp_path: Path) -> None:
    train = [*vignettes(9), vignette(3), vignette(10, options={"A": "x", "B": ["y"]}), vignette(11, answer_idx="D")]
    write_rows(tmp_path / "train.jsonl", train)
    write_rows(
        tmp_path / "test.jsonl",
        [vignette(20), vignette(21, question="\ud800"), vignette(22, rationale="", answer_idx="")],
    )
    with (tmp_path / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write("[1]\n")
    with pytest.raises(ConfigError) as caught:
        examples(tmp_path)
    message = str(caught.value)
    for part in (
        "train row 10: two rows have the id 'row-3', the other is train row 4",
        "train row 11 (row-10): dataset.user writes column options.B, which is a list",
        "train row 12 (row-11): target 'D' is not one of A, B",
        "test row 2 (row-21): dataset.user has half of a surrogate pair",
        "test row 3 (row-22): dataset.assistant renders to nothing",
        "test row 3 (row-22): dataset.target renders to nothing",
        "test.jsonl:4: is JSON, but not an object",
    ):
        assert part in message, message
    assert message.startswith("8 problems")


def test_a_slow_pattern_does_not_run_over_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftlab.dataset import examples as rendering

    monkeypatch.setattr(rendering, "PATIENCE", -1)
    write_rows(tmp_path / "a.jsonl", [vignette(number, rationale="") for number in range(90)])
    with pytest.raises(ConfigError, match=r"^21 problems:\n  - .*a\.jsonl: the rows after row 20 were not read"):
        examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("write", [write_rows, write_parquet])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": math.nan}, {"content": " "}])
def test_a_tool_call_without_content_is_no_completion(
    tmp_path: Path, write: Callable[[Path, list[Row]], Any], content: Row
) -> None:
    call = {"role": "assistant", **content, "tool_calls": [{"name": "look"}]}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"id": "r0", "messages": [turns[0], call]}, {"id": "r1", "messages": turns}]
    name = "a.jsonl" if write is write_rows else "a.parquet"
    if isinstance(content.get("content"), float) and name == "a.parquet":
        pytest.skip("an Arrow column of text has no NaN")
    write(tmp_path / name, rows)
    with pytest.raises(ConfigError, match=r"row 1 \(r0\): eval\.dataset\.assistant (renders to nothing|cannot be)"):
        examples(tmp_path / name, mounted="eval.dataset", **{**CHAT, "id": "{{ id }}"})


def rendered(row: Row, **changed: Any) -> Example:
    values = {"id": None, "system": None, "user": "Q", "choices": None, "options": None, **changed}
    return Templates(settings(**values), "dataset", list(row)).example(row, "x", "rows, row 1")


THOUGHT = "<think>At first the answer is (B).</think>the answer is (A)"
LETTER = "(?i)the answer is\\\\s*\\\\(([A-Z])\\\\)"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (f"{{{{ text | search('{LETTER}') }}}}", "A"),
        (f"{{% set found = text | search('{LETTER}') %}}{{{{ found }}}}", "A"),
        (f"{{{{ [text] | map('search', '{LETTER}') | list }}}}", "A"),
        ("{{ text | search('(?s)first .*?[(](.)') or 'none' }}", "none"),
        ("{{ text | search('</think>.*[(](.)[)]') }}", "A"),  # a pattern that looks for the marks itself
    ],
)
def test_the_right_answer_is_not_searched_for_in_reasoning(target: str, expected: str) -> None:
    result = rendered({"text": THOUGHT}, target=target, assistant="{{ text | search('(<think>.*)') }}")
    assert result.target == expected
    assert result.assistant == THOUGHT


SQUAD = {"question": "Where?", "answers": {"text": ["Berne", "Bern"], "answer_start": [3, 9]}}


@pytest.mark.parametrize(("name", "expected"), [("target", ["Berne", "Bern"]), ("assistant", "Berne")])
def test_the_remedy_for_answers_as_squad_has_them_works(name: str, expected: Any) -> None:
    templates = {"assistant": "{{ answers.text[0] }}", "target": "{{ answers.text }}"}
    with pytest.raises(ConfigError, match=r"which is a dict and not text.*; write ") as raised:
        rendered(SQUAD, **{**templates, name: "{{ answers }}"})
    result = rendered(SQUAD, **{**templates, name: str(raised.value).rpartition("; write ")[2]})
    assert getattr(result, "targets" if name == "target" else name) == expected


def test_options_as_arc_has_them() -> None:
    row = {"choices": {"text": ["ice", "fog"], "label": ["A", "B"]}}
    result = rendered(row, options="{{ choices | tojson }}", target="A", assistant="A")
    assert result.options == {"A": "ice", "B": "fog"}
    row["choices"]["label"].append("C")
    with pytest.raises(ConfigError, match="options is not a JSON object"):
        rendered(row, options="{{ choices | tojson }}", target="A", assistant="A")
