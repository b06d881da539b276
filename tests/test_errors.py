"""Problems as records: their text, which of them a sweep can fix, and their way across a process border."""

from __future__ import annotations

import json
import pickle

import pytest

from sftlab.errors import (
    ConfigError,
    OutOfMemoryError,
    Problem,
    SftlabError,
    StageError,
    from_json,
    to_json,
    unfixable,
    with_keys,
)

LIGER = Problem("train.use_liger_kernel", "true", "needs a GPU", "set it to false", ("instance.device",))
ROWS = Problem("rows.jsonl, row 41", None, "two lines\n    of text")
TEXT = Problem("", None, "a message")


def test_a_problem_has_place_value_message_and_remedy() -> None:
    assert str(LIGER) == "train.use_liger_kernel=true: needs a GPU; set it to false"
    assert str(ROWS) == "rows.jsonl, row 41: two lines\n    of text"
    assert str(TEXT) == "a message"


def test_several_problems_are_a_list_and_each_is_in_it_once() -> None:
    assert str(ConfigError(LIGER, LIGER)) == str(ConfigError(LIGER)) == str(LIGER)
    error = ConfigError(LIGER, TEXT, LIGER, ROWS)
    assert error.problems == (LIGER, TEXT, ROWS)
    assert str(error).splitlines()[:2] == ["3 problems:", f"  - {LIGER}"]
    assert error.exit_code == 2


def test_the_text_lists_the_first_of_many_problems_and_counts_the_others() -> None:
    rows = [Problem(f"rows.jsonl, row {number}", None, "is empty") for number in range(1, 1035)]
    error = ConfigError(*rows)
    first, *listed, last = str(error).splitlines()
    assert first == "1,034 problems:"
    assert listed == [f"  - {row}" for row in rows[:20]]
    assert last == "  … and 1,014 more"
    assert error.problems == tuple(rows)


def test_a_problem_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh1234")
    secret = "abcdefgh1234 hf_" + "x" * 34
    error = ConfigError(Problem(secret, secret, secret, secret))
    assert error.problems == (Problem(*["$SOME_API_KEY hf_…"] * 4),)
    assert "abcdefgh1234" not in str(error)


@pytest.mark.parametrize(
    ("swept", "fixable"),
    [
        ([], False),
        (["train.use_liger_kernel"], True),
        (["instance.device"], True),
        (["instance"], True),  # a section that has one of its keys
        (["train.learning_rate", "instance.num_processes"], False),
    ],
)
def test_a_problem_that_no_swept_key_can_fix(swept: list[str], fixable: bool) -> None:
    assert unfixable(ConfigError(LIGER), swept) == ([] if fixable else [LIGER])


def test_a_key_inside_a_section_can_fix_a_problem_of_the_section() -> None:
    (problem,) = with_keys(ConfigError(ROWS), "dataset", "seed")
    assert unfixable(ConfigError(problem), ["dataset.split.train"]) == []
    assert unfixable(ConfigError(problem), ["train.learning_rate"]) == [problem]
    assert not problem.depends_on("dataset2")


def test_a_problem_that_names_no_key_may_be_fixed_by_any() -> None:
    assert unfixable(ConfigError(TEXT, LIGER), ["seed"]) == [LIGER]


@pytest.mark.parametrize(
    "error",
    [ConfigError(LIGER, ROWS, TEXT), ConfigError(TEXT), StageError("a\nb – é"), OutOfMemoryError("c"),
     SftlabError("d")],
)  # fmt: skip
def test_an_error_crosses_the_process_border(error: SftlabError) -> None:
    for copy in (from_json(json.loads(json.dumps(to_json(error)))), pickle.loads(pickle.dumps(error))):
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert getattr(copy, "problems", None) == getattr(error, "problems", None)


def test_an_unknown_error_becomes_a_stage_error() -> None:
    error = from_json({"type": "Exit", "message": "reason", "problems": []})
    assert type(error) is StageError
    assert str(error) == "reason"
