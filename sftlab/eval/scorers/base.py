"""The base class of all scorers: which text is compared, how a row is scored, how a result is shown."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, TypedDict

from sftlab.config import EvalConfig
from sftlab.dataset.sandbox import compiled
from sftlab.errors import ConfigError, Problem
from sftlab.eval.extract import unfenced
from sftlab.eval.scorers.view import View
from sftlab.eval.statistics import (
    Limits,
    accuracy,
    answers_per_question,
    averages,
    changed,
    compare,
    majority,
    noise,
    pass_at,
)
from sftlab.model.reasoning import answered
from sftlab.records import Example, Generation, Prediction
from sftlab.results import Comparison, Estimate, ItemCounts, ModelResult, Repeats, ScorerSource, SubgroupSide

Answer = tuple[str | None, dict[str, str | None]]
"""An extracted answer, and the answer by each way of reading if the task has several."""


Runs = Sequence[Sequence[Prediction]]
"""The predictions of one model for the same questions, once per repeated generation."""


class Counts(TypedDict):
    """The fields of a ModelResult that every task counts alike."""

    n: int
    answers: int
    unparsed: int
    truncated: int | None
    finish_reasons: int


class Scorer(ABC):
    """What a task decides. A new task is a subclass in a module of this folder, named as eval.task names it."""

    view: ClassVar[View]
    lettered: ClassVar[bool] = False
    """Whether eval.pattern extracts answers that are option letters: then they have several readings, and a choice
    can be forced if there is none."""
    json_targets: ClassVar[bool] = False
    """Whether targets are JSON values, so that a list is one target."""
    mute_is_wrong: ClassVar[bool] = False
    """Whether a model none of whose completions has an answer is judged as wrong, and not as badly extracted."""
    needs_context: ClassVar[bool] = False
    """Whether the context of a row (dataset.context) is used to score it."""
    context_is_optional: ClassVar[bool] = False
    """Whether rows without a context can be scored, too."""
    unreadable: ClassVar[str] = "nothing is left to compare of the target"
    """The message about a target of which nothing can be compared."""
    otherwise: ClassVar[str] = ""
    """What its remedy adds to fixing the row."""

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg
        self.limits = Limits(cfg.smallest_gain, cfg.margin)

    # ------------------------------------------------------------------- rows

    @property
    @abstractmethod
    def metric(self) -> str:
        """The key of the metric that is judged."""

    @abstractmethod
    def right(self, answer: str, row: Example | Prediction) -> bool:
        """Whether an answer is right."""

    @property
    def source(self) -> ScorerSource | None:
        """The code that scores the answers, if it is not sftlab's."""
        return None

    def compared(self, text: str) -> str:
        """Return the part of a completion or target that is compared; "" if there is none.

        A code fence is removed, then the template eval.extract is applied. A completion on which the template fails
        has nothing to compare: models write text that no parser expects.
        """
        text = unfenced(text)
        if self.cfg.extract is not None:
            try:
                text = _template(self.cfg.extract).render(text=text)
            except ConfigError:  # a pattern in the template takes too long
                raise
            except Exception:  # filters raise errors of any type
                return ""
        return text.strip()

    def references(self, row: Example | Prediction) -> list[str]:
        """The right answers of a row, processed as answers are."""
        return [self.compared(answered(target)) for target in row.accepted]

    def reader(self, examples: Sequence[Example]) -> Callable[[str, Example, Generation], Answer]:
        """Return a function that extracts the answer from a completion without its reasoning.

        Its arguments are this text, its example and its generation.
        """
        return lambda text, example, generation: (self.compared(text) or None, {})

    def scored(self, rows: list[Prediction]) -> list[Prediction]:
        """Return predictions with what depends on all of them or takes long: scores, or further readings.

        Apart from ``predictions``, because a score may need a library that takes seconds to import.
        """
        return rows

    def predictions(self, generations: Sequence[Generation], examples: Sequence[Example]) -> list[Prediction]:
        """Extract the answer of every completion. A completion without an answer is never right."""
        by_id = {example.id: example for example in examples}
        read = self.reader(examples)
        rows = []
        for generation in generations:
            example = by_id[generation.id]
            truncated = generation.finish_reason == "length"
            text = answered(generation.completion, generation.prompt, truncated=truncated)
            answer, readings = read(text, example, generation)
            rows.append(
                Prediction(
                    id=generation.id,
                    prompt=generation.prompt,
                    completion=generation.completion,
                    finish_reason=generation.finish_reason,
                    answer=answer,
                    target=example.target,
                    correct=answer is not None and self.right(answer, example),
                    group=example.group,
                    readings=readings,
                    subgroup=example.subgroup,
                    targets=example.targets,
                    choices=example.choices,
                    forced_logprobs=generation.forced_logprobs,
                    logprobs=generation.logprobs,
                    context=example.context if self.needs_context else None,
                )
            )
        return rows

    def paired(self, scored: Mapping[str, Runs], pairwise: object = None) -> Mapping[str, Runs]:
        """Return predictions with scores that depend on the answers of another model.

        ``scored`` has the predictions of ``finetuned`` and of the models that it is compared with; ``pairwise`` is
        what compares two answers, if the task needs it.
        """
        return scored

    # ------------------------------------------------------------------- checks

    def check(self, examples: Sequence[Example], split: str = "test") -> None:
        """Check before a model is loaded that answers to these examples can be judged.

        Raises:
            ConfigError: One problem per kind, with the first rows that have it.
        """
        problems = list(self.unmatched(examples, lambda row: f"{split} row {row.id!r}"))
        if problems:
            raise ConfigError(*problems)

    def unmatched(self, examples: Sequence[Example], name: Callable[[Example], str]) -> Iterator[Problem]:
        """Yield problems with targets that no answer can equal; ``name`` names a row in a message."""
        targets = [(row, target) for row in examples for target in row.accepted]
        if empty := [(row, target) for row, target in targets if not self.compared(answered(target))]:
            by = "" if self.cfg.extract is None else f" after eval.extract={self.cfg.extract!r}"
            yield Problem(
                "eval.task",
                self.cfg.task,
                f"{self.unreadable}{by}: {listed(empty, name)}",
                f"fix the row{', or change eval.extract' if by else ''}{self.otherwise}",
            )

    def check_completions(self, examples: Sequence[Example], split: str = "train") -> str | None:
        """Check that the completions of a split are read as their targets.

        Returns a warning if some are not, and None if all are. Tasks without right and wrong answers check nothing.

        Raises:
            ConfigError: None of them is.
        """
        return None

    def power(self, groups: Sequence[str | None]) -> list[tuple[int, str]]:
        """Describe the smallest difference that a test set can show, before any answer is known.

        Args:
            groups: The group of each test row; rows of one group count as one.

        Returns:
            Messages with their logging levels.
        """
        return []

    # ------------------------------------------------------------------- results

    def shares(self) -> dict[str, Callable[[Prediction], bool]]:
        """Other metrics that are shares of rows, by their keys: a function that decides which rows count."""
        return {}

    def others(self, runs: Runs) -> dict[str, Estimate]:
        """The metrics beside the judged one, by their keys, with intervals."""
        found = {}
        for key, counts_in in self.shares().items():
            rates = averages([[counts_in(row) for row in rows] for rows in runs])
            interval = accuracy(rates, groups_of(runs), self.cfg.alpha, len(runs))
            found[key] = Estimate(value=sum(rates) / len(rates), interval=interval)
        return found

    def other_differences(self, a: Runs, b: Runs) -> dict[str, Estimate]:
        """The differences of these metrics between two models, with intervals."""
        answers, found = answers_per_question(len(a), len(b)), {}
        for key, counts_in in self.shares().items():
            rates = [averages([[counts_in(row) for row in rows] for rows in runs]) for runs in (a, b)]
            compared = compare(rates[0], rates[1], groups=groups_of(a), alpha=self.cfg.alpha, answers=answers)
            found[key] = Estimate(value=compared.delta, interval=compared.interval)
        return found

    def items(self, runs: Runs) -> dict[str, ItemCounts]:
        """Counts by label or field, for tasks whose view has ``items``."""
        return {}

    def with_others(self, result: ModelResult, runs: Runs) -> ModelResult:
        """Add the other metrics, and the counts by label or field, to the result of a model."""
        others = self.others(runs)
        values = {key: other.value for key, other in others.items()}
        intervals = {key: other.interval for key, other in others.items()}
        changes = {"scores": result.scores | values, "score_intervals": intervals, "items": self.items(runs)}
        return result.model_copy(update=changes)

    @abstractmethod
    def result(self, runs: Runs) -> ModelResult:
        """Summarise the predictions of one model."""

    @abstractmethod
    def side(self, runs: Runs, *, enough: bool) -> SubgroupSide:
        """Summarise the predictions of one model on a subgroup; ``enough`` is whether it has enough rows to compare."""

    @abstractmethod
    def difference(self, a: Runs, b: Runs) -> Comparison:
        """Compare two models on the same rows; repeated answers to a question are averaged."""

    def comparison(self, a: Runs, b: Runs) -> Comparison:
        """Compare two models on the whole test set, with everything that the record has."""
        compared = self.difference(a, b)
        return compared.model_copy(update={"scores": self.other_differences(a, b)}) if compared.n else compared

    def repeats(self, runs: Runs) -> Repeats:
        """Measure how much a model's answers differ between generations of one test set, each in another order."""
        values = [[float(row.correct) if row.score is None else row.score for row in rows] for rows in runs]
        forced = [[float(row.readings.get("forced", row.answer) in row.accepted) for row in rows] for rows in runs]
        right = [[row.correct for row in rows] for rows in runs]
        sizes = sorted({*(2**power for power in range(len(runs).bit_length())), len(runs)})
        graded = self.view.graded
        return Repeats(
            values=[sum(row) / len(row) for row in values],
            changed=changed(values),
            noise=noise(values),
            forced_noise=noise(forced),
            pass_at={k: pass_at(right, k) for k in sizes} if graded else {},
            majority=majority([[row.answer for row in rows] for rows in runs], right) if graded else None,
        )


def detectable(difference: float, assumption: str, compared: Comparison) -> dict[str, object]:
    """The fields of a Comparison about the smallest difference that a test set shows, and what this assumes."""
    rows = (
        "rows are independent" if compared.groups is None else "rows of one group resemble each other as they do here"
    )
    if math.isfinite(difference):
        text = f"with a probability of 80 %, if {assumption} and {rows}"
    else:
        text = "none: too few rows, whatever the difference"
    return {
        "smallest_visible_difference": difference if math.isfinite(difference) else None,
        "smallest_visible_assumes": text,
    }


def shared_groups(runs: Runs) -> int | None:
    """The number of groups; None if every row stands alone."""
    count = len({group or number for number, group in enumerate(groups_of(runs))})
    return count if count < len(runs[0]) else None


def groups_of(runs: Runs) -> list[str | None]:
    """The group of each question."""
    return [row.group for row in runs[0]]


def counts(runs: Runs) -> Counts:
    """Count questions, and over all repeats the answers, those not extracted, and the truncated ones."""
    rows = [row for run in runs for row in run]
    reasons = [row.finish_reason for row in rows if row.finish_reason != "unknown"]
    return {
        "n": len(runs[0]),
        "answers": len(rows),
        "unparsed": sum(row.answer is None for row in rows),
        "truncated": reasons.count("length") if reasons else None,
        "finish_reasons": len(reasons),
    }


def listed(rows: Sequence[tuple[Example, str]], name: Callable[[Example], str]) -> str:
    """Name the first of several rows with their targets."""
    return ", ".join(f"{name(row)} has target {target[:60]!r}" for row, target in rows[:3]) + more(len(rows) - 3)


def more(count: int) -> str:
    """Say how many rows a message does not name."""
    return f" (and {count} more)" if count > 0 else ""


@cache
def _template(source: str) -> Any:
    return compiled(source)
