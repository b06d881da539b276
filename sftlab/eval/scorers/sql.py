"""``eval.task=sql``: a query is right if its result on the row's own tables is that of the target."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from sftlab.dataset.sandbox import formatted_sql
from sftlab.errors import ConfigError, Problem, shown
from sftlab.eval.execution import Executor
from sftlab.eval.extract import normalise_answer
from sftlab.eval.scorers.accuracy import Accuracy
from sftlab.eval.scorers.base import Runs, more
from sftlab.records import Example, Prediction
from sftlab.results import ModelResult

log = logging.getLogger(__name__)

LOOKED_AT = 50
"""Targets that are executed before training."""

_FENCED = re.compile(r"```\w*\s*\n(.*?)```", re.DOTALL)


class Sql(Accuracy):
    """Execution accuracy. Where no result of the target decides, the formatted texts are compared."""

    needs_context = True
    view = replace(
        Accuracy.view,
        metrics={"accuracy": "execution accuracy", "sql_exact": "exact match"},
        no_answer="no statement",
        about="Right: the statement has the result of the target on the tables of its row. Where no result decides (no "
        "query, not SQLite's dialect, a result that is empty, null or zero) the formatted texts are compared. Exact "
        "match: the share of equal texts.",
    )

    def compared(self, text: str) -> str:
        """Return the statement in a text: of a text with code blocks the first one."""
        text = super().compared(text)
        return block[1].strip() if (block := _FENCED.search(text)) else text

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether the texts are equal after formatting, without case and white space."""
        return _text(answer) in map(_text, self.references(row))

    def scored(self, rows: list[Prediction]) -> list[Prediction]:
        """Execute the answers; ``note`` is what this showed."""
        with Executor(self.cfg.sql) as executor:
            return [self._executed(row, executor) for row in rows]

    def _executed(self, row: Prediction, executor: Executor) -> Prediction:
        found = executor.execute(row.context or "", self.references(row), row.answer or "")
        if found.outcome == "unknown":
            return replace(row, correct=self._exact(row), note=f"not executed: {found.reason}")
        note = f"executed: {found.outcome if found.outcome != 'failed' else found.reason}"
        return replace(row, correct=found.outcome == "equal", note=note)

    def _exact(self, row: Prediction) -> bool:
        return row.answer is not None and self.right(row.answer, row)

    def shares(self) -> dict[str, Callable[[Prediction], bool]]:
        """The share of rows with equal texts."""
        return {"sql_exact": self._exact}

    def result(self, runs: Runs) -> ModelResult:
        """Execution accuracy, and how many answers were judged by execution."""
        executed = sum((row.note or "").startswith("executed: ") for run in runs for row in run)
        return super().result(runs).model_copy(update={"executed": executed})

    def check(self, examples: Sequence[Example], split: str = "test") -> None:
        """Check that every row has tables, and execute the first targets.

        Raises:
            ConfigError: a row has no tables, or no target has a result.
        """
        super().check(examples, split)
        if lost := [row for row in examples if not (row.context or "").strip()]:
            message = f"{split} row {lost[0].id!r}{more(len(lost) - 1)} has no tables to execute the target on"
            remedy = "set dataset.context to the template of its CREATE and INSERT statements, or eval.task=exact"
            raise ConfigError(Problem("eval.task", "sql", message, remedy, ("dataset.context",)))
        rows = examples[:LOOKED_AT]
        with Executor(self.cfg.sql) as executor:
            found = [executor.execute(row.context or "", self.references(row), None) for row in rows]
        failed = [(row, one) for row, one in zip(rows, found, strict=True) if one.outcome == "unknown"]
        if not failed:
            return
        row, first = failed[0]
        place = f"{split} row {row.id!r}: {first.reason}"
        if len(failed) == len(rows):
            message = f"no target of {len(rows)} has a result that decides; {place}"
            remedy = "set it to the dialect of the statements (mysql, postgres, …), or set eval.task=exact"
            raise ConfigError(Problem("eval.sql.dialect", shown(self.cfg.sql.dialect), message, remedy, ("eval.task",)))
        log.warning(
            "eval.task=sql: %d of the first %d targets are compared as text, because no result decides; %s",
            *(len(failed), len(rows), place),
        )


def _text(statement: str) -> str:
    with suppress(Exception):  # what the parser gives up on is compared as it is
        statement = formatted_sql(statement)
    return normalise_answer(statement.rstrip("; \n"))
