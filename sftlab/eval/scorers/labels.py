"""``eval.task=labels``: classification; the answer is one of the labels that occur as targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sftlab.eval.scorers.accuracy import Accuracy
from sftlab.eval.scorers.base import Answer, Runs, groups_of
from sftlab.eval.scorers.exact import Exact
from sftlab.eval.statistics import Labelled, macro_f1, macro_f1_difference
from sftlab.records import Example, Generation
from sftlab.results import Estimate, ItemCounts


class Labels(Exact):
    """Accuracy, with macro-F1 as a second metric. An answer that is not a label of the test set is none."""

    mute_is_wrong = True
    view = replace(
        Accuracy.view,
        metrics={"accuracy": "accuracy", "macro_f1": "macro-F1"},
        no_answer="no label",
        items="label",
        about="No label: the answer is not one of the labels that occur as targets, which counts as wrong. Macro-F1 is "
        "the mean of the labels' F1; its intervals are bootstrapped.",
    )

    def reader(self, examples: Sequence[Example]) -> Callable[[str, Example, Generation], Answer]:
        """Return a function that extracts the label from a completion; None if it is not a label of these rows."""
        labels = {label for example in examples for label in self.references(example)}

        def extract(text: str, example: Example, generation: Generation) -> Answer:
            label = self.compared(text)
            return (label if label in labels else None), {}

        return extract

    def others(self, runs: Runs) -> dict[str, Estimate]:
        """Macro-F1."""
        return {"macro_f1": macro_f1(self._labelled(runs), groups_of(runs), self.cfg.alpha)}

    def other_differences(self, a: Runs, b: Runs) -> dict[str, Estimate]:
        """The difference in macro-F1."""
        sides = self._labelled(a), self._labelled(b)
        return {"macro_f1": macro_f1_difference(*sides, groups_of(a), self.cfg.alpha)}

    def items(self, runs: Runs) -> dict[str, ItemCounts]:
        """Rows of each label, answers that give it, and the right ones."""
        of = self._labelled(runs)
        pairs = [(truth, answer) for answers in of.answers for truth, answer in zip(of.targets, answers, strict=True)]
        return {
            label: ItemCounts(
                expected=sum(truth == label for truth, _ in pairs),
                given=sum(answer == label for _, answer in pairs),
                right=pairs.count((label, label)),
            )
            for label in sorted(set(of.targets))
        }

    def _labelled(self, runs: Runs) -> Labelled:
        """The labels of rows and answers; of several right labels that of a right answer, or else the first."""
        return Labelled(
            [self.references(row)[0] for row in runs[0]],
            [[self.references(row)[0] if row.correct else row.answer for row in rows] for rows in runs],
        )
