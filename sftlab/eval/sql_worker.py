"""Execute SQL statements of a model in a child process that can be killed, and compare their results.

Run as a script, with the standard library only (and sqlglot for other dialects): a line of JSON on stdin is a request,
a line on stdout its reply. The database is in memory. What a statement can do is limited: by an authorizer to reading
tables, by SQLite's limits and a heap limit in memory, by a number of steps and seconds in time, and by the operating
system (no file can be written, and memory is limited). The parent ends the process if it does not reply.
"""

from __future__ import annotations

import json
import resource
import sqlite3
import sys
from collections import Counter
from time import monotonic
from typing import Any

MEMORY = 1 << 30  # bytes of address space
HEAP = 256 << 20  # bytes that SQLite may allocate
LENGTH, STATEMENT = 100_000, 1_000_000  # bytes of a value, and of a statement
STEPS = 50_000_000  # instructions of SQLite's virtual machine: the same limit on every machine, unlike seconds
EVERY = 10_000  # instructions between two looks at the clock

READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
SETUP = READING | {
    sqlite3.SQLITE_ALTER_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_DROP_VIEW,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_REINDEX,
    sqlite3.SQLITE_SAVEPOINT,
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_UPDATE,
}
# Random results cannot be compared; the others touch files.
FORBIDDEN = {"random", "randomblob", "load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

Rows = list[tuple[object, ...]]


class Unusable(Exception):  # noqa: N818 - an outcome
    """A statement has no result: it fails, reaches a limit, or is not a query."""


class Database:
    """A database in memory with the tables of one row."""

    def __init__(self, setup: str, seconds: float, rows: int, dialect: str) -> None:
        self.rows, self.seconds, self.dialect = rows, seconds, dialect
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.execute(f"PRAGMA hard_heap_limit={HEAP}")
        self.connection.execute("PRAGMA temp_store=MEMORY")
        limits = {
            sqlite3.SQLITE_LIMIT_LENGTH: LENGTH,
            sqlite3.SQLITE_LIMIT_SQL_LENGTH: STATEMENT,
            sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
            sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
            sqlite3.SQLITE_LIMIT_ATTACHED: 0,
            sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
            sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
            sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
        }
        for limit, value in limits.items():
            self.connection.setlimit(limit, value)
        self.allowed = SETUP
        self.connection.set_authorizer(self._authorize)
        self._timed(lambda: self._run(setup))
        self.allowed = READING

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FORBIDDEN:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in self.allowed else sqlite3.SQLITE_DENY

    def _run(self, setup: str) -> Rows:
        for statement in statements(setup, self.dialect):
            self.connection.execute(statement)
        return []

    def query(self, text: str) -> Rows:
        """Return the rows of one query.

        Raises:
            Unusable: it fails, reaches a limit, or is not one query.
        """

        def run() -> Rows:
            found = statements(text, self.dialect)
            if len(found) != 1:
                raise Unusable(f"{len(found)} statements instead of one")
            cursor = self.connection.execute(found[0])
            if cursor.description is None:
                raise Unusable("not a query")
            rows = cursor.fetchmany(self.rows + 1)
            if len(rows) > self.rows:
                raise Unusable(f"more than {self.rows:,} rows")
            return rows

        return self._timed(run)

    def _timed(self, run: Any) -> Rows:
        end, left = monotonic() + self.seconds, STEPS // EVERY

        def expired() -> bool:
            nonlocal left
            left -= 1
            return left < 0 or monotonic() > end

        self.connection.set_progress_handler(expired, EVERY)
        try:
            rows: Rows = run()
        except sqlite3.OperationalError as error:
            if str(error) == "interrupted":
                raise Unusable("time limit") from error
            raise Unusable(str(error)) from error
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            raise Unusable(str(error)) from error
        except MemoryError as error:
            raise Unusable("memory limit") from error
        finally:
            self.connection.set_progress_handler(None, 0)
        return rows


def statements(text: str, dialect: str) -> list[str]:
    """Split a text into statements, translated to SQLite from another dialect.

    Raises:
        Unusable: the text is not SQL of the dialect.
    """
    if dialect != "sqlite":
        import sqlglot

        try:
            return [one for one in sqlglot.transpile(text, read=dialect, write="sqlite") if one.strip()]
        except (sqlglot.errors.SqlglotError, RecursionError, ValueError) as error:
            raise Unusable(" ".join(str(error).split())[:200]) from error
    found, part = [], ""
    for piece in text.split(";"):
        part += piece
        if sqlite3.complete_statement(f"{part};"):  # not within a text or comment
            found.append(part.strip())
            part = ""
        else:
            part += ";"
    return [one for one in [*found, part.rstrip(";").strip()] if one]


def informative(rows: Rows) -> bool:
    """Whether a result can tell a right query from a wrong one: it has a value that is not null or zero."""
    return any(value not in (None, 0) for row in rows for value in row)


def value(cell: object) -> object:
    """A value as it is compared: sums in another order differ in their last digits, and 1 equals 1.0.

    Floats are rounded to 9 digits, and to 12 from 1e9 on, where 9 would round whole numbers. Integers are not rounded.
    """
    return float(f"{cell:.9g}" if abs(cell) < 1e9 else f"{cell:.12g}") if isinstance(cell, float) else cell


def same(answer: Rows, target: Rows, *, ordered: bool) -> bool:
    """Whether two results have the same rows: in order if the target orders them, as often as in it otherwise."""
    a, b = ([tuple(map(value, row)) for row in rows] for rows in (answer, target))
    return a == b if ordered else Counter(a) == Counter(b)


def is_ordered(query: str) -> bool:
    """Whether a query orders its rows: an ORDER BY outside of parentheses and texts."""
    depth, outside, quote = 0, [], ""
    for character in query:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"`":
            quote = character
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif depth == 0:
            outside.append(character)
    return "ORDER BY" in " ".join("".join(outside).upper().split())


def judge(request: dict[str, Any]) -> dict[str, str]:
    """Compare an answer with the right queries of a row.

    ``outcome`` is equal, different, failed (the answer has no result), or unknown (no result of a target decides).
    """
    try:
        database = Database(request["setup"], request["seconds"], request["rows"], request["dialect"])
    except Unusable as error:
        return {"outcome": "unknown", "reason": f"the tables: {error}"}
    targets, reasons = [], []
    for text in request["targets"]:
        try:
            rows = database.query(text)
        except Unusable as error:
            reasons.append(f"the target: {error}")
            continue
        targets += [(rows, is_ordered(text))] if informative(rows) else []
        reasons += [] if informative(rows) else ["the target's result is empty, null or zero"]
    if not targets:
        return {"outcome": "unknown", "reason": reasons[0]}
    if request["answer"] is None:
        return {"outcome": "known", "reason": ""}
    print(json.dumps({"answering": True}), flush=True)
    try:
        answer = database.query(request["answer"])
    except Unusable as error:
        return {"outcome": "failed", "reason": str(error)}
    equal = any(same(answer, rows, ordered=ordered) for rows, ordered in targets)
    return {"outcome": "equal" if equal else "different", "reason": ""}


def main() -> None:
    """Reply to requests until stdin ends."""
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    for line in sys.stdin:
        print(json.dumps(judge(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
