"""``eval.task=choice``: multiple choice, by an option letter that eval.pattern extracts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from sftlab.errors import ConfigError, Problem, shown
from sftlab.eval.extract import can_read, compile_pattern, last, read, strict, with_group
from sftlab.eval.scorers.accuracy import LOOKED_AT, Accuracy, override
from sftlab.eval.scorers.base import Answer, Runs, listed, more
from sftlab.model.reasoning import answered
from sftlab.records import Example, Prediction
from sftlab.results import Comparison, ModelResult, ReadingCounts

READINGS = ("strict", "last", "lenient")


class Choice(Accuracy):
    """Multiple choice. An answer is read in several ways; eval.reading selects the one that is judged."""

    lettered = True

    def references(self, row: Example | Prediction) -> list[str]:
        """The right letters of a row."""
        return row.accepted

    def reader(self, examples: Sequence[Example]) -> Callable[[str, Example, str | None], Answer]:
        """Return a function that reads the option letter by every way of reading."""
        words = {folded(target): target for example in examples for target in example.accepted}
        pattern = compile_pattern(self.cfg.pattern)

        def extract(text: str, example: Example, forced: str | None) -> Answer:
            answers = read(text, pattern, example.choices, example.options)
            readings = {name: _spelled(answer, example, words) for name, answer in answers.items()}
            answer = readings[self.cfg.reading]
            return answer, {**readings, "forced": answer or readings["strict"] or forced}

        return extract

    # ------------------------------------------------------------------- checks

    def check(self, examples: Sequence[Example], split: str = "test") -> None:
        """Check that every row has choices, and that the pattern can extract every target.

        Raises:
            ConfigError: One problem per kind, with the first rows that have it.
        """
        problems = []
        if silent := [row for row in examples if not row.choices]:
            problems.append(
                Problem(
                    "eval.task",
                    "choice",
                    f"{split} row {silent[0].id!r}{more(len(silent) - 1)} has no letters to choose from",
                    "let dataset.choices give at least two, or set eval.task=exact, eval.task=rouge for long texts, or "
                    "mode=train for the validation loss only",
                )
            )
        problems += self.unmatched(examples, lambda row: f"{split} row {row.id!r}")
        if problems:
            raise ConfigError(*problems)

    def unmatched(self, examples: Sequence[Example], name: Callable[[Example], str]) -> Iterator[Problem]:
        """Yield the problem of targets that the group of eval.pattern cannot match, with a pattern that can."""
        pattern = self.cfg.pattern
        targets = [(row, target) for row in examples for target in row.accepted]
        lost = [(row, target) for row, target in targets if not can_read(pattern, target)]
        if not lost:
            return
        wider = [with_group(pattern, "[A-Z0-9]")]
        if any(row.assistant for row in examples):  # completions show whether another pattern fits
            wider.append(r"(?i)the answer is\s*\(([A-Z0-9])\)")
        able = [candidate for candidate in wider if candidate and self._reads(candidate, examples)]
        remedy = f"set {override('eval.pattern', able[0])}" if able else "let its group match such targets"
        letters = all(len(target) == 1 for _, target in lost)
        yield Problem(
            "eval.pattern",
            shown(pattern),
            f"its group cannot match {'all targets' if letters else 'every target'}: {listed(lost, name)}",
            f"{remedy}{'' if letters else ', or set eval.task=exact to compare texts'}",
        )

    def _reads(self, pattern: str, examples: Sequence[Example]) -> bool:
        """Whether a pattern can match every target, and reads one in a completion if there are completions."""
        if not all(can_read(pattern, target) for row in examples for target in row.accepted):
            return False
        other = Choice(self.cfg.model_copy(update={"pattern": pattern}))
        written = [row for row in examples if row.assistant][:LOOKED_AT]
        return not written or any(other.stated(row) in row.accepted for row in written)

    def completions(self, examples: Sequence[Example], split: str) -> Iterator[Example]:
        """Yield the rows with a completion and choices, also of a mounted test set."""
        return (row for row in examples if row.assistant and row.choices)

    def stated(self, row: Example) -> str | None:
        """The letter that a row's own completion states."""
        text, pattern = answered(row.assistant), compile_pattern(self.cfg.pattern)
        if self.cfg.reading == "lenient":
            return read(text, pattern, row.choices, row.options)["lenient"]
        extract = strict if self.cfg.reading == "strict" else last
        return _spelled(extract(text, pattern, row.choices), row, {})

    @property
    def reading(self) -> tuple[str, str]:
        """The pattern, as messages write it."""
        return "eval.pattern", shown(self.cfg.pattern)

    def remedies(self) -> tuple[str, Iterator[tuple[str, str]]]:
        """Other patterns: without case, and a common form."""
        patterns = (f"(?i){self.cfg.pattern}", r"(?i)answer(?: is)?:?[\s*]*\(?([A-Z0-9])\b")
        return "set eval.pattern to what they say", (("pattern", pattern) for pattern in patterns)

    # ------------------------------------------------------------------- results

    def result(self, runs: Runs) -> ModelResult:
        """Accuracy by eval.reading, and right answers by each way of reading."""
        rows = [row for run in runs for row in run]
        names = dict.fromkeys(name for row in rows for name in row.readings)
        readings = {
            name: ReadingCounts(
                correct=sum(row.readings.get(name) in row.accepted for row in rows),
                unparsed=sum(row.readings.get(name) is None for row in rows),
            )
            for name in names
        }
        return super().result(runs).model_copy(update={"reading": self.cfg.reading, "readings": readings})

    def comparison(self, a: Runs, b: Runs) -> Comparison:
        """Compare by eval.reading, and with forced choices. A verdict that depends on the reading says so."""
        compared = super().comparison(a, b)
        by_reading = {
            name: self.judged(a, b, _right(name))
            for name in READINGS
            if any(row.readings.get(name) is not None for rows in (*a, *b) for row in rows)
        }
        changes: dict[str, object] = {}
        if notes := _disagreement(by_reading):
            notes = [*compared.verdict.notes, *notes]
            changes["verdict"] = compared.verdict.model_copy(update={"notes": notes})
        if self.cfg.forced:
            changes["forced"] = self.judged(a, b, _right("forced"))
        return compared.model_copy(update=changes)


def folded(answer: str) -> str:
    """An answer as it is compared: case matters in a letter ("A" and "a" may both be options), not in a word."""
    return answer.casefold() if len(answer) > 1 else answer


def _spelled(answer: str | None, row: Example, words: Mapping[str, str]) -> str | None:
    """An answer that is a word, in the spelling of the equal target of its row, or else of any row."""
    if answer is None or len(answer) == 1:
        return answer
    own = (target for target in row.accepted if folded(target) == folded(answer))
    return next(own, words.get(folded(answer), answer))


def _right(reading: str) -> Callable[[Prediction], bool]:
    """Whether an answer is right by one way of reading."""
    return lambda row: row.readings.get(reading) in row.accepted


def _disagreement(readings: Mapping[str, Comparison]) -> list[str]:
    """The note of a verdict that another way of reading would change; empty if all agree."""
    if len({compared.verdict.outcome for compared in readings.values()}) < 2:
        return []
    each = [
        f"{name} {round(compared.finetuned * compared.n)} of {compared.n} against "
        f"{round(compared.baseline * compared.n)} ({compared.verdict.outcome})"
        for name, compared in readings.items()
    ]
    return [f"the verdict depends on how answers are read (eval.reading): {', '.join(each)}"]
