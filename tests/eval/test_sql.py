"""Statements are executed on the tables of their row; those of a model are hostile input."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from time import monotonic

import pytest
from test_score_tasks import compared, page, settings

from sftlab.config import SqlConfig
from sftlab.dataset.row_formats.fitting import Answered, fitting
from sftlab.errors import ConfigError
from sftlab.eval.execution import Executor
from sftlab.eval.scorers import scorer
from sftlab.records import Example, single_turn

ROWS = Path(__file__).parent.parent / "data" / "text_to_sql.jsonl"
TABLES = "CREATE TABLE t (name TEXT, n INT); INSERT INTO t VALUES ('a;b', 1), ('b', 2), ('c', 3), ('c', 3);"


def outcome(target: str, answer: str, setup: str = TABLES, **limits: float) -> str:
    with Executor(SqlConfig.model_validate(limits)) as executor:
        return executor.execute(setup, [target], answer).outcome


@pytest.mark.parametrize(
    ("target", "answer", "expected"),
    [
        ("SELECT name FROM t WHERE n = 1;", "select t.name as x from t where n < 2", "equal"),
        ("SELECT n FROM t", "SELECT n FROM t ORDER BY n DESC", "equal"),  # the target has no order
        ("SELECT n FROM t ORDER BY n", "SELECT n FROM t ORDER BY n DESC", "different"),
        ("SELECT n FROM (SELECT n FROM t ORDER BY n)", "SELECT n FROM t ORDER BY n DESC", "equal"),
        ("SELECT n FROM t", "SELECT DISTINCT n FROM t", "different"),
        ("SELECT name, n FROM t", "SELECT n, name FROM t", "different"),
        ("SELECT AVG(n) FROM t", "SELECT SUM(n) * 1.0 / COUNT(*) FROM t", "equal"),
        ("SELECT 1", "SELECT 1.0", "equal"),
        ("SELECT 1234567891", "SELECT 1234567891.0", "equal"),
        ("SELECT 1234567890", "SELECT 1234567891", "different"),
        ("SELECT 1e20 / 3", "SELECT 1e20 / 3 + 100000", "equal"),
        ("SELECT n FROM t", "SELECT m FROM t", "failed"),
        ("SELECT n FROM t", "", "failed"),
        ("SELECT n FROM t WHERE n > 9", "SELECT name FROM t WHERE n > 99", "unknown"),  # nearly every query is empty
        ("SELECT COUNT(*) FROM t WHERE n > 9", "SELECT 0", "unknown"),
        ("DELETE FROM t", "DELETE FROM t", "unknown"),
        ("SELECT YEAR(n) FROM t", "SELECT n FROM t", "unknown"),  # not SQLite's dialect
        ("SELECT random() FROM t", "SELECT n FROM t", "unknown"),
    ],
)
def test_statements_are_compared_by_their_results(target: str, answer: str, expected: str) -> None:
    assert outcome(target, answer) == expected


def test_every_row_of_the_project_is_right_by_its_own_target() -> None:
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    with Executor(SqlConfig()) as executor:
        found = Counter(executor.execute(row["sql_context"], [row["sql"]], row["sql"]).outcome for row in rows)
    assert found == {"equal": 51, "unknown": 9}  # 3 change tables, 5 are on empty tables, 1 has MySQL's LEFT


@pytest.mark.parametrize(
    "answer",
    [
        "ATTACH DATABASE '{file}' AS x",
        "VACUUM INTO '{file}'",
        "PRAGMA writable_schema = 1",
        "SELECT * FROM pragma_database_list",
        "SELECT load_extension('{file}')",
        "SELECT writefile('{file}', 'x')",
        "DROP TABLE t",
        "INSERT INTO t VALUES ('d', 4) RETURNING n",
        "CREATE VIRTUAL TABLE v USING fts3(a)",
        "SELECT n FROM t; DROP TABLE t",
        "SELECT random()",
        "SELECT zeroblob(900000000)",
        "WITH RECURSIVE c(x) AS (SELECT 'ab' UNION ALL SELECT x || x FROM c) SELECT max(length(x)) FROM c",
        "SELECT a.n FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT '\0'",
        "SELECT '\ud800'",
        "SELECT 1 --" + "x" * 2_000_000,
        "banana",
    ],
)
def test_a_hostile_statement_is_a_wrong_answer_and_nothing_else(tmp_path: Path, answer: str) -> None:
    with Executor(SqlConfig()) as executor:
        hostile = executor.execute(TABLES, ["SELECT n FROM t"], answer.replace("{file}", str(tmp_path / "x")))
        assert hostile.outcome == "failed"
        assert executor.execute(TABLES, ["SELECT n FROM t"], "SELECT n FROM t").outcome == "equal"
    assert list(tmp_path.iterdir()) == []


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c ORDER BY -x"


def test_an_endless_statement_is_stopped_and_does_not_stop_others() -> None:
    started = monotonic()
    with Executor(SqlConfig(seconds=0.2)) as executor:
        assert executor.execute(TABLES, ["SELECT n FROM t"], ENDLESS).outcome == "failed"
        assert executor.execute(TABLES, [ENDLESS], "SELECT n FROM t").outcome == "unknown"
        assert executor.execute(f"{TABLES} {ENDLESS};", ["SELECT n FROM t"], "SELECT n FROM t").outcome == "unknown"
        assert executor.execute(TABLES, ["SELECT n FROM t"], "SELECT n FROM t").outcome == "equal"
    assert monotonic() - started < 300


@pytest.mark.smoke  # waits
def test_a_function_that_does_not_return_ends_the_process_and_not_the_run() -> None:
    endless = "SELECT length(printf('%.*c', 2000000000, 'x')), length(printf('%.*c', 2000000000, 'x'))"
    with Executor(SqlConfig(seconds=0.1)) as executor:
        assert executor.execute(TABLES, ["SELECT n FROM t"], endless).outcome in ("failed", "different")
        assert executor.execute(TABLES, ["SELECT n FROM t"], "SELECT n FROM t").outcome == "equal"


def test_another_dialect_is_translated() -> None:
    pytest.importorskip("sqlglot", reason="an extra (locks/sql.lock)")
    tables = "CREATE TABLE `t` (`n` INT AUTO_INCREMENT PRIMARY KEY, d DATE); INSERT INTO t (d) VALUES ('2026-01-02');"
    with Executor(SqlConfig(dialect="mysql")) as executor:
        found = executor.execute(tables, ["SELECT IF(n > 0, 'yes', 'no') FROM `t`"], "SELECT 'yes' FROM t LIMIT 1")
    assert found.outcome == "equal"


def test_a_result_has_execution_accuracy_and_exact_match(tmp_path: Path) -> None:
    target = "SELECT n FROM t WHERE name = 'b';"
    texts = [
        "select n\nfrom t where name = 'b'",  # the same text
        "Here it is:\n```sql\nSELECT n FROM t WHERE n = 2\n```\nIt works.",  # the same result
        "SELECT n FROM t",
        "SELECT x FROM t",
    ]
    pairs = [(text, target) for text in texts]
    evaluation = compared(tmp_path, settings("sql"), [("", target)] * 4, pairs, context=[TABLES] * 4)
    assert evaluation.finetuned.correct == 2
    assert (evaluation.finetuned.scores, evaluation.finetuned.executed) == ({"sql_exact": 0.25}, 4)
    shown = page(tmp_path, evaluation)
    assert "Execution accuracy" in shown
    assert "4 of 4 answers are judged by execution" in shown
    assert "executed: no such column: x" in shown
    # Where nothing can be executed, the texts decide.
    evaluation = compared(tmp_path, settings("sql"), [("", target)] * 4, pairs, context=["CREATE TABLE t (n INT);"] * 4)
    assert (evaluation.finetuned.correct, evaluation.finetuned.executed) == (1, 0)


def test_rows_without_tables_or_results_are_refused() -> None:
    score, turns = scorer(settings("sql")), single_turn("", "", "")
    with pytest.raises(ConfigError, match=r"test row 'q' has no tables to execute the target on; set dataset.context"):
        score.check([Example("q", turns, "SELECT 1")])
    row = Example("q", turns, "SELECT TOP 1 n FROM t", context=TABLES)
    with pytest.raises(
        ConfigError, match=r"dialect='sqlite': no target of 1 has a result that decides; .* syntax error"
    ):
        score.check([row])
    score.check([row, Example("r", turns, "SELECT n FROM t", context=TABLES)])


def test_auto_needs_statements_and_tables() -> None:
    statements = [Answered(f"SELECT {n} FROM t", f"SELECT {n} FROM t", "", TABLES) for n in range(30)]
    assert fitting(statements) == ("sql", None)
    assert fitting([*statements, Answered("SELECT 1", "SELECT 1", "")]) == ("exact", None)
