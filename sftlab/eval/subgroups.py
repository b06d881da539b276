"""Results by subgroup: eval.group_by names the column whose values divide the test rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sftlab.eval.scorers import Scorer
from sftlab.eval.scorers.base import Runs
from sftlab.eval.statistics import fewest, holm
from sftlab.results import Subgroup, SubgroupDifference, Subgroups


def subgroups(runs: Mapping[str, Runs], scorer: Scorer) -> Subgroups:
    """Summarise and compare models on every subgroup, the largest first.

    ``runs`` has the predictions of ``baseline`` and ``finetuned``, or of one of them, over the same questions.
    Differences come from paired comparisons, their p-values also adjusted by Holm's method for all compared
    subgroups. A subgroup in which no difference could be shown (``fewest``) is not compared.
    """
    first, cfg = next(iter(runs.values()))[0], scorer.cfg
    sizes = Counter(row.subgroup for row in first if row.subgroup is not None)
    groups = [_group(name, runs, scorer) for name, _ in sizes.most_common()]
    compared = [group for group in groups if group.difference is not None]
    adjusted = holm([group.difference.p_value for group in compared if group.difference is not None])
    by_name = {group.name: p for group, p in zip(compared, adjusted, strict=True)}
    return Subgroups(
        column=cfg.group_by or "",
        level=1 - cfg.alpha,
        without=len(first) - sizes.total(),
        compared=len(compared),
        note=_note(len(compared), len(groups), cfg.alpha) if len(runs) > 1 else None,
        groups=[_adjusted(group, by_name.get(group.name)) for group in groups],
    )


def _adjusted(group: Subgroup, p: float | None) -> Subgroup:
    if group.difference is None or p is None:
        return group
    difference = group.difference.model_copy(update={"p_adjusted": p})
    return group.model_copy(update={"difference": difference})


def _group(name: str, runs: Mapping[str, Runs], scorer: Scorer) -> Subgroup:
    members = {
        model: [[row for row in rows if row.subgroup == name] for rows in every] for model, every in runs.items()
    }
    first, least = next(iter(members.values()))[0], fewest(scorer.cfg.alpha)
    # Questions of one source are gained and lost together, so they count as one.
    independent = len({row.group or number for number, row in enumerate(first)})
    enough = independent >= least
    sides = {model: scorer.side(own, enough=enough) for model, own in members.items()}
    difference = reason = None
    if len(members) < 2:
        reason = "one model alone"
    elif not enough:
        of = "rows" if independent == len(first) else "sources"
        reason = f"too few {of} to compare: fewer than {least} cannot show a difference"
    else:
        compared = scorer.difference(members["baseline"], members["finetuned"])
        difference = SubgroupDifference(
            delta=compared.delta,
            interval=compared.interval,
            p_value=compared.p_value,
            p_adjusted=compared.p_value,  # until the number of compared subgroups is known
            gained=compared.gained,
            lost=compared.lost,
        )
    return Subgroup(name=name, n=len(first), difference=difference, reason=reason, **sides)


def _note(compared: int, groups: int, alpha: float) -> str:
    if not groups:
        return "No test row has a value in this column."
    if not compared:
        return "No subgroup is large enough to show a difference."
    return (
        f"{compared} of {groups} subgroups were compared. Among many, some differ by chance: treat a difference as a "
        f"finding only if p is below {alpha:g} after Holm's adjustment for their number, and as a hypothesis otherwise."
    )
