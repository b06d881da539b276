"""What limits every verdict, in the same words in terminal, page and model card: the seed, a reused test set."""

from __future__ import annotations

from collections.abc import Sequence

from sftlab.eval import scorers
from sftlab.eval.scorers.view import View
from sftlab.report.text import level, plural, seconds
from sftlab.results import Evaluation, EvaluationRow, Replication, Reuse


def caveats(evaluation: Evaluation, mode: str, seed: int, replication: Replication | None = None) -> list[str]:
    """Return the sentences for one evaluation. Files of mode=compare may be of any origin, so no training is named.

    With several trainings of the recipe, its verdict stands in the place of the reminder that one training is one draw.
    """
    if mode == "compare":
        return ["mode=compare does not count how many models were judged on these rows."]
    trainings = one_draw(mode, seed) if replication is None else of_recipe(replication, scorers.view(evaluation.task))
    if evaluation.reuse is None:
        return [trainings]
    return [trainings, used(evaluation.reuse, scorers.view(evaluation.task).rows)]


def one_draw(mode: str, seed: int) -> str:
    """The seed of the training is known only to the run that trained."""
    of = "" if mode == "evaluate" else f" (seed {seed})"
    text = f"One training run{of} is one draw: another seed gives other weights, which no interval accounts for."
    return text if mode == "evaluate" else f"{text} Several seeds (-m seed=1,2,3) show how much they differ."


def of_recipe(replication: Replication, view: View) -> str:
    """The verdict on the recipe, and what it took. The verdict on the selected checkpoint knows one seed only."""
    cost = (
        f"{plural(replication.models, 'more model')} {'was' if replication.models == 1 else 'were'} merged and "
        f"evaluated for this ({seconds(replication.seconds)})"
    )
    if replication.verdict is None:
        spread = f"{view.number(replication.mean)} on average, SD {100 * replication.sd:.1f} points"
        return f"The recipe in {len(replication.trainings)} trainings: {spread}. {cost}."
    return f"The recipe, with other seeds: {replication.verdict}. {cost}."


def used(reuse: Reuse, rows: str) -> str:
    """How many models were judged on a test set, and how likely chance alone calls one of them better."""
    place = str(reuse.number) if reuse.number == reuse.models else f"{reuse.number} of {reuse.models}"
    judged = (
        f"Model {place} judged on {'these' if reuse.rows > 1 else 'this'} {plural(reuse.rows, rows.removesuffix('s'))}."
    )
    chance = f"with a probability of about {100 * reuse.chance:.2g} %"
    if reuse.models == 1:
        text = f"{judged} A model that changes nothing is called better {chance}"
    else:
        text = f"{judged} If all {reuse.models} changed nothing, at least one would be called better {chance}"
    if not reuse.corrected:
        return text + ("." if reuse.models == 1 else "; eval.correct_for_reuse=true adjusts p for this.")
    return (
        f"{text}. eval.correct_for_reuse=true multiplies p by {reuse.number} × {reuse.number + 1}, which keeps this "
        f"probability below {level(reuse.alpha)} for any number of models."
    )


def used_of_all(rows: Sequence[EvaluationRow]) -> list[str]:
    """The same for the jobs of a sweep: one sentence for each test set, that of the last model."""
    last: dict[str, tuple[Reuse, str]] = {}
    for evaluation in (row.evaluation for row in rows if row.evaluation is not None):
        if (reuse := evaluation.reuse) is not None:
            before = last.get(reuse.test_set)
            if before is None or reuse.number >= before[0].number:
                last[reuse.test_set] = reuse, scorers.view(evaluation.task).rows
    return [used(reuse, noun) for reuse, noun in last.values()]
