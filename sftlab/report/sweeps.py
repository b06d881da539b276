"""Tables of a sweep: recipes with several seeds, their trainings on the test set, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sftlab.eval import scorers
from sftlab.report.tables import Table, name_of_metric, own_overrides
from sftlab.report.text import DASH, count, decimals, level, points, scored
from sftlab.results import Curve, Evaluation, Replication, Selection


def recipes(selection: Selection) -> Table:
    """The recipes of a sweep by their mean over seeds."""
    name = "eval loss" if selection.metric == "eval_loss" else selection.metric
    number = partial(scored, selection.metric)
    rows = []
    for own, recipe in zip(_own([recipe.overrides for recipe in selection.recipes]), selection.recipes, strict=True):
        each = [f"{seed}: {number(value)}" for seed, value in zip(recipe.seeds, recipe.values, strict=True)]
        seeds = count(len(recipe.seeds))
        rows.append([" ".join(own) or DASH, number(recipe.mean), number(recipe.sd), seeds, ", ".join(each)])
    return Table(["recipe", f"mean {name}", "SD", "seeds", "by seed"], rows, ("recipe", "by seed"))


def unsure(selection: Selection) -> str | None:
    """A warning if the second recipe may be the better one: the means differ by less than two standard errors."""
    if len(selection.recipes) < 2:
        return None
    first, second = selection.recipes[:2]
    errors = [(recipe.sd or 0) ** 2 / len(recipe.seeds) for recipe in (first, second)]
    apart, error = abs(first.mean - second.mean), sum(errors) ** 0.5
    if error == 0 or apart >= 2 * error:
        return None
    return (
        f"The first two recipes differ by {apart:.4f}, less than two standard errors between seeds ({2 * error:.4f}): "
        "other seeds may rank them otherwise"
    )


def trainings(replication: Replication, evaluation: Evaluation) -> Table:
    """The trainings of the selected recipe on the test set."""
    view = scorers.view(evaluation.task)
    header = ["training", "job", "step", name_of_metric(evaluation), "difference, points"]
    rows = [
        [f"seed {one.seed}", str(one.job), count(one.step), view.number(one.value), points(one.delta)]
        for one in replication.trainings
    ]
    return Table(header, rows, ("training",))


def learning_curve(curve: Curve) -> Table:
    """The trainings of a learning curve, by rows."""
    header, by_score = ["job", "share", "training rows", "eval loss", f"{level(curve.level)} interval"], False
    if any(point.score is not None for point in curve.points):
        by_score, header = True, [*header, curve.metric, f"{level(curve.level)} interval"]
    rows = []
    for point in curve.points:
        row = [str(point.job), f"{100 * point.share:g} %", count(point.rows), decimals(point.eval_loss)]
        row.append(DASH if point.loss_interval is None else " to ".join(map(decimals, point.loss_interval)))
        if by_score:
            ends = point.score_interval
            row += [scored(curve.metric, point.score)]
            row += [DASH if ends is None else " to ".join(scored(curve.metric, end) for end in ends)]
        rows.append(row)
    return Table(header, rows)


def predictions(curve: Curve) -> list[str]:
    """What twice the rows would give, in words; why it is not predicted, if it is not."""
    if curve.loss is None:
        return ["Three different numbers of training rows are needed to predict what more would give"]
    sentences = []
    for name, made in (("eval_loss", curve.loss), (curve.metric, curve.score)):
        if made is not None:
            low, high = (scored(name, end) for end in made.interval)
            sentences.append(
                f"Twice the rows ({count(made.rows)}) would give {name.replace('_', ' ')} {scored(name, made.value)} "
                f"({level(curve.level)} interval of one training {low} to {high}; power law with exponent "
                f"{made.exponent:.2f})"
            )
    if len({point.share for point in curve.points}) == len(curve.points):
        sentences.append(
            "With one seed, how much trainings differ is estimated only from how far the points lie from a curve; "
            "seed=1,2,3 measures it"
        )
    return sentences


def _own(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """The overrides of each recipe without those that all share."""
    own = own_overrides([*enumerate(overrides)])
    return [own[place] for place in range(len(overrides))]
