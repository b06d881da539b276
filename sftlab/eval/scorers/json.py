"""``eval.task=json``: answers are JSON, compared with the target field by field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sftlab.eval import fields
from sftlab.eval.fields import Fields, fields_of
from sftlab.eval.scorers.base import Runs
from sftlab.eval.scorers.scores import Scores
from sftlab.eval.scorers.view import View
from sftlab.records import Example, Prediction
from sftlab.results import ItemCounts


class Json(Scores):
    """The mean F-measure of the fields. Valid and equal answers are counted as further metrics."""

    view = View(
        metrics={"json_fields": "field F1", "json_equal": "equal JSON", "json_valid": "valid JSON"},
        hub_metric="f1",
        graded=False,
        rows="rows",
        no_answer="invalid JSON",
        gained="higher",
        lost="lower",
        items="field",
        about="Field F1 of an answer: 2 · equal fields / (its fields + fields of the target), between 0 and 1; a point "
        "is 0.01. Invalid JSON scores 0.",
    )

    unreadable = "the target is not valid JSON"
    otherwise = " (a template writes JSON by {{ column | tojson }}), or set eval.task=exact to compare texts"
    json_targets = True
    mute_is_wrong = True

    @property
    def metric(self) -> str:
        """The F-measure of the fields."""
        return "json_fields"

    def compared(self, text: str) -> str:
        """Return the text from which eval.extract has taken the answer; "" if it is not valid JSON."""
        text = super().compared(text)
        return "" if fields_of(text) is None else text

    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether all fields equal those of a reference, and there are no others."""
        return self._fields(answer) in map(self._fields, self.references(row))

    def score(self, answer: str, row: Prediction) -> float:
        """The F-measure of the fields; of several references the most similar one counts."""
        own = self._fields(answer)
        return max(fields.score(own, self._fields(target)) for target in self.references(row))

    def _fields(self, text: str) -> Fields:
        found = fields_of(text)
        assert found is not None  # of compared texts
        return found

    def shares(self) -> dict[str, Callable[[Prediction], bool]]:
        """The shares of rows with equal and with valid JSON."""
        return {"json_equal": lambda row: row.correct, "json_valid": lambda row: row.answer is not None}

    def items(self, runs: Runs) -> dict[str, ItemCounts]:
        """How often each field is expected, given and right. Items of a list are one field."""
        expected, given, right = Counter[str](), Counter[str](), Counter[str]()
        for row in (row for run in runs for row in run):
            own = {} if row.answer is None else self._fields(row.answer)
            target = max(map(self._fields, self.references(row)), key=lambda target: fields.score(own, target))
            for counter, paths in ((expected, target), (given, own)):
                counter.update(map(fields.name, paths))
            right.update(fields.name(path) for path, _ in own.items() & target.items())
        return {
            name: ItemCounts(expected=expected[name], given=given[name], right=right[name])
            for name, _ in (expected + given).most_common()
        }
