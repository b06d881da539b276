"""Simulate the statistics behind a verdict, and write the results into docs/statistics.md (about 5 minutes).

Everything with a closed form is enumerated, the rest is drawn with a fixed seed, so that the tables are the same on
every machine.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from sftlab.eval.release import decided
from sftlab.eval.statistics import (
    Labelled,
    Limits,
    accuracy,
    compare,
    macro_f1,
    macro_f1_difference,
    minimal_detectable_difference,
    over_trainings,
    ties,
    wilson,
)
from sftlab.eval.statistics.groups import Size
from sftlab.eval.statistics.means import at_most_zero
from sftlab.eval.statistics.paired import changes, p_of_changes, p_of_difference, tango
from sftlab.results import Comparison, Evaluation, Guard, ModelResult

SEED = 16
DOCS = Path(__file__).parent.parent / "docs" / "statistics.md"
MARK = "<!-- The rest of this file is written by scripts/bench_statistics.py. -->\n"
SIZES = (20, 30, 50, 100, 200, 466, 1273)
Values = NDArray[np.float64]
Table = tuple[str, Sequence[str], list[Sequence[str]]]


def share(value: float) -> str:
    """A probability with three digits."""
    return f"{value:.3f}"


def paired() -> Iterator[Table]:
    """Coverage of the difference, type I error and power, by enumeration of all tables."""
    rows: list[Sequence[str]] = []
    for n in SIZES:
        most = min(n, round(0.3 * n + 6 * math.sqrt(0.21 * n)))
        gained, lost = np.divmod(np.arange((most + 1) ** 2), most + 1)
        possible = gained + lost <= most
        gained, lost = gained[possible], lost[possible]
        low, high = tango(gained, lost, n, 0.05)
        p = p_of_changes(gained, lost, n)
        apart = int(((p < 0.05) != ((low > 0) | (high < 0))).sum())
        ways = special.gammaln(n + 1) - sum(special.gammaln(x + 1) for x in (gained, lost, n - gained - lost))
        worst, total, places = (1.0, 0.0, 0.0), 0.0, 0
        for changed in np.r_[np.arange(0.01, 0.1, 0.005), np.arange(0.1, 0.301, 0.01)]:
            for gains in np.linspace(0.5, 1, 11):
                up, down = changed * gains, changed * (1 - gains)
                chance = np.exp(
                    ways + special.xlogy(gained, up) + special.xlogy(lost, down)
                    + special.xlogy(n - gained - lost, 1 - changed)
                )  # fmt: skip
                covered = (low <= up - down + 1e-12) & (up - down - 1e-12 <= high)
                worst = min(worst, (float(chance[covered].sum()), float(changed), float(gains)))
                total, places = total + float(chance[covered].sum()), places + 1
        rows.append([str(n), share(worst[0]), f"{100 * worst[1]:.1f} %, {100 * worst[2]:.0f} % gains",
                     share(total / places), str(apart)])  # fmt: skip
    header = (
        "questions",
        "lowest coverage",
        "at changes of",
        "mean coverage",
        "tables in which interval and p disagree",
    )
    yield "Difference in accuracy: coverage of the 95 % interval, 1–30 % of the answers change", header, rows

    rows = []
    for n in SIZES:
        discordant, gained = np.tril_indices(n + 1)
        p = p_of_changes(gained, discordant - gained, n)
        exact = np.minimum(1, 2 * stats.binom.cdf(np.minimum(gained, discordant - gained), discordant, 0.5))

        shares = np.r_[0.01, np.arange(0.05, 1.001, 0.05)]
        even, three = (stats.binom.pmf(gained, discordant, gains) for gains in (0.5, 0.75))
        largest, found = [], []
        for value in (p, exact):
            alarms, power = (np.bincount(discordant, weights=chance * (value < 0.05)) for chance in (even, three))
            largest.append(max(float(stats.binom.pmf(np.arange(n + 1), n, one) @ alarms) for one in shares))
            found.append(float(stats.binom.pmf(np.arange(n + 1), n, 0.2) @ power))
        rows.append([str(n), *map(share, largest), *map(share, found)])
    header = ("questions", "type I error, mid-p", "exact test", "power, mid-p", "exact test")
    yield "Largest type I error for 1–100 % changes, and power at 15 % gained and 5 % lost (alpha 0.05)", header, rows


def margins() -> Iterator[Table]:
    """How often a loss of the margin is called acceptable, and how often no loss is."""
    rng = np.random.default_rng(SEED)
    rows: list[Sequence[str]] = []
    for n in (60, 125, 250, 466, 1273):
        for margin in (0.02, 0.05, 0.1):
            row = [str(n), f"{100 * margin:.0f}"]
            wrong = []
            for gain in (0.0, 0.02, 0.05, 0.1, 0.2):
                gained, lost, _ = rng.multinomial(n, [gain, gain + margin, 1 - 2 * gain - margin], size=20_000).T
                wrong.append(float(np.mean(no_worse(gained, lost, n, margin))))
            row.append(share(max(wrong)))
            for changed in (0.02, 0.1, 0.2):
                gained, lost, _ = rng.multinomial(n, [changed / 2, changed / 2, 1 - changed], size=20_000).T
                row.append(share(float(np.mean(no_worse(gained, lost, n, margin)))))
            rows.append(row)
    header = ("questions", "margin, points", "type I error", "power, 2 % change", "10 % change", "20 % change")
    yield "Margin: a loss of it is called acceptable (alpha 0.05), and power if nothing is lost", header, rows


def no_worse(gained: NDArray[np.int64], lost: NDArray[np.int64], n: int, margin: float) -> NDArray[np.bool_]:
    """Whether a loss of the margin is ruled out."""
    p = p_of_difference(gained, lost, n, -margin) / 2
    return np.asarray((p < 0.05) & (gained - lost > -margin * n))


def decisions() -> Iterator[Table]:
    """What is decided about equal models, about models that lose a margin, and about better ones."""
    rng = np.random.default_rng(SEED)
    draws = 1000
    cases = {
        "equal models": ((0.1, 0.1), (0.1, 0.1)),
        "gains 10 points, loses the margin on one guard": ((0.15, 0.05), (0.03, 0.08)),
        "gains 10 points, loses 15 on one guard": ((0.15, 0.05), (0.03, 0.18)),
        "gains 10 points, loses nothing": ((0.15, 0.05), (0.03, 0.03)),
    }
    rows: list[Sequence[str]] = []
    for name, (test, guard) in cases.items():
        for guards in (0, 1, 3) if name == "equal models" else (1, 3):
            rates = [test, guard, *[guard if name == "equal models" else (0.03, 0.03)] * 2][: guards + 1]
            made = [compared(rng, rate, draws) for rate in rates]
            found = Counter(decision(first, others) for first, *others in zip(*made, strict=True))
            shares = (share(found[kind] / draws) for kind in ("ship", "keep_base", "undecided"))
            rows.append([name, str(guards), *shares])
    yield (
        "Decisions over 250 questions of the test set and of each guard (margin 5 points, alpha 0.05)",
        ("models", "guards", "ship", "keep_base", "undecided"),
        rows,
    )


def compared(rng: np.random.Generator, rates: tuple[float, float], draws: int) -> list[Comparison]:
    """Comparisons over 250 questions, a share of which is gained and another one lost."""
    counts = rng.multinomial(250, [*rates, 1 - sum(rates)], size=draws).tolist()
    return [comparison(gained, lost) for gained, lost, _ in counts]


@cache
def comparison(gained: int, lost: int) -> Comparison:
    """Two models on 250 questions, with a margin of 5 points."""
    a, b = np.zeros(250), np.zeros(250)
    a[:lost], b[lost : lost + gained] = 1, 1
    return compare(a.tolist(), b.tolist(), groups=None, alpha=0.05, limits=Limits(margin=0.05))


def decision(test: Comparison, guards: Sequence[Comparison]) -> str:
    """The decision about two models."""
    n = test.n
    result = ModelResult(
        metric="accuracy", value=0.5, interval=(0, 1), level=0.95, n=n, unparsed=0, truncated=0, finish_reasons=n
    )
    one = Evaluation(task="exact", baseline=result, finetuned=result)
    others = [
        Guard(name=str(number), data="", evaluation=one.model_copy(update={"comparison": guard}))
        for number, guard in enumerate(guards)
    ]
    made = decided(one.model_copy(update={"comparison": test, "guards": others})).decision
    return "" if made is None else made.outcome


def grouped() -> Iterator[Table]:
    """Coverage where rows share groups."""
    rng = np.random.default_rng(SEED)
    rows: list[Sequence[str]] = []
    for count in (5, 10, 20, 50, 200):
        for of_each in (5, 20):
            names = np.repeat(np.arange(count), of_each)
            text = [str(name) for name in names]
            row = [str(count), str(of_each)]
            for rate in (0.5, 0.8):
                plain = covered = 0
                for _ in range(500):
                    own = rng.beta(rate, 1 - rate, count)
                    right = list((rng.random(len(names)) < own[names]).astype(float))
                    low, high = accuracy(right, text)
                    covered += low <= rate <= high
                    low, high = wilson(sum(right), len(right))
                    plain += low <= rate <= high
                row += [share(covered / 500), share(plain / 500)]
            rows.append(row)
    header = ("groups", "rows per group", "coverage at 50 %", "rows as independent", "at 80 %", "rows as independent")
    yield "Accuracy with groups: coverage of the 95 % interval, intraclass correlation 0.5", header, rows

    rows = []
    for count in (5, 10, 20, 50, 200):
        for of_each in (5, 20):
            group = np.repeat(np.arange(count), of_each)
            n, row = len(group), [str(count), str(of_each)]
            for truth in (0.0, 0.12):
                counts, size = [], Size(n, math.inf)
                for _ in range(1000):
                    up = rng.beta(0.5 + truth / 0.6, 0.5 - truth / 0.6, count)[group] > rng.random(n)
                    changed = rng.random(n) < 0.3
                    a, b = (changed & ~up).astype(float), (changed & up).astype(float)
                    size = changes(a, b, group)
                    counts.append([b.sum(), a.sum(), size.rows])
                gained, lost, worth = np.transpose(counts)
                part = worth / n
                ends = tango(gained * part, lost * part, worth, 0.05, size.freedom)
                row.append(share(float(np.mean((ends[0] <= truth) & (truth <= ends[1])))))
                if truth == 0:
                    row.append(
                        share(float(np.mean(p_of_changes(gained * part, lost * part, worth, size.freedom) < 0.05)))
                    )
                    row.append(share(float(np.mean(p_of_changes(gained, lost, n) < 0.05))))
            rows.append(row)
    header = ("groups", "rows per group", "coverage, equal models", "type I error", "rows as independent",
              "coverage, +12 points")  # fmt: skip
    yield "Difference with groups, 30 % of the answers change, correlation of directions 0.5", header, rows


def skewed() -> Iterator[Table]:
    """Type I error and power of means of differences."""
    rng = np.random.default_rng(SEED)

    def gaffke(x: Values) -> Values:
        edge = np.ones((len(x), 1))
        worse, better = (at_most_zero(np.hstack([side * x, -edge])) for side in (1, -1))
        return 2 * np.minimum(worse, better)

    def t_test(x: Values) -> Values:
        return np.asarray(stats.ttest_1samp(x, 0, axis=1).pvalue)

    def signs(x: Values) -> Values:
        flips = rng.choice(np.array([-1.0, 1.0]), (999, x.shape[1]))
        extreme = np.abs(x @ flips.T) >= np.abs(x.sum(axis=1))[:, None] - 1e-9
        return np.asarray((1 + extreme.sum(axis=1)) / 1000)

    def ruined(chance: float) -> Callable[[tuple[int, int]], Values]:
        gain = 0.9 * chance / (1 - chance)
        return lambda size: np.where(rng.random(size) < chance, -0.9, gain * rng.uniform(0.8, 1.2, size))

    kinds: dict[str, Callable[[tuple[int, int]], Values]] = {
        "1 of 23 texts ruined, others gain": ruined(0.044),
        "1 of 10 texts ruined, others gain": ruined(0.1),
        "exponential, mean 0.1": lambda size: np.minimum(rng.exponential(0.1, size), 1) - 0.1,
        "normal, standard deviation 0.1": lambda size: rng.normal(0, 0.1, size),
    }
    rows: list[Sequence[str]] = []
    for name, draw in kinds.items():
        for n in (20, 50, 200):
            x = draw((1000, n))
            rows.append([name, str(n), *(share(float(np.mean(test(x) < 0.05))) for test in (gaffke, t_test, signs))])
    header = ("differences without a mean", "texts", "Gaffke", "t-test", "sign flips")
    yield "Mean scores: type I error (alpha 0.05)", header, rows

    rows = []
    for n in (20, 50, 200, 1000):
        x = rng.normal(0, 0.1, (500, n)) + 2.8 * 0.1 / math.sqrt(n)
        rows.append([str(n), *(share(float(np.mean(test(x) < 0.05))) for test in (gaffke, t_test))])
    yield ("Mean scores: power where a t-test of normal differences has about 0.8", ("texts", "Gaffke", "t-test"), rows)


def labelled() -> Iterator[Table]:
    """Coverage of the intervals of macro-F1, and of the difference to a model that is right 10 points less often."""
    rng = np.random.default_rng(SEED)
    rows: list[Sequence[str]] = []
    for shares, right, n, of_each in (
        ((60, 30, 10), (98, 97, 95), 60, 1),
        ((60, 30, 10), (90, 70, 50), 100, 1),
        ((40, 30, 15, 10, 5), (90, 80, 70, 60, 50), 200, 1),
        ((50, 50), (80, 70), 120, 4),
        ((50, 50), (80, 70), 400, 4),
    ):
        rates = [np.array(right) / 100 - less for less in (0.0, 0.1)]

        def drawn(groups: int, rates: list[Values] = rates, shares: Sequence[int] = shares) -> list[NDArray[np.int64]]:
            target = rng.choice(len(shares), groups, p=np.array(shares) / 100)
            wrong = (target + rng.integers(1, len(shares), groups)) % len(shares)
            return [target, *(np.where(rng.random(groups) < rate[target], target, wrong) for rate in rates)]

        def named(target: NDArray[np.int64], answer: NDArray[np.int64], of_each: int = of_each) -> Labelled:
            texts = [np.repeat(values, of_each).astype(str).tolist() for values in (target, answer)]
            return Labelled(texts[0], [texts[1]])

        target, *answers = drawn(500_000)
        nothing = [""] * len(target) * of_each
        truth = [macro_f1(named(target, answer), nothing, 0.05).value for answer in answers]
        covered = np.zeros(2)
        for _ in range(500):
            target, *answers = drawn(n // of_each)
            groups = np.repeat(np.arange(n // of_each), of_each).astype(str).tolist()
            first, second = (named(target, answer) for answer in answers)
            found = macro_f1(first, groups, 0.05), macro_f1_difference(first, second, groups, 0.05)
            for place, (estimate, value) in enumerate(zip(found, (truth[0], truth[1] - truth[0]), strict=True)):
                covered[place] += estimate.interval[0] <= value <= estimate.interval[1]
        percents = [", ".join(map(str, values)) + " %" for values in (shares, right)]
        rows.append([*percents, str(n), str(of_each), *map(share, covered / 500)])
    header = ("labels", "right", "rows", "rows per group", "macro-F1", "difference")
    yield "Macro-F1: coverage of the 95 % intervals", header, rows


def repeated() -> Iterator[Table]:
    """Power by answers per question."""
    rng = np.random.default_rng(SEED)
    rows: list[Sequence[str]] = []
    for answers in (1, 2, 3, 5, 10, 20):
        row = [str(answers)]
        for shape in (2.0, 0.5):
            for odds in (0.0, 0.232 if shape == 2 else 0.37):
                first = rng.beta(shape, shape, (1000, 466))
                second = np.exp(odds) * first / (1 - first + np.exp(odds) * first)
                a, b = (rng.binomial(answers, rate) / answers for rate in (first, second))
                sizes = [changes(*pair, np.arange(466), answers) for pair in zip(a, b, strict=True)]
                worth = np.array([size.rows for size in sizes])
                gained, lost = (x.mean(axis=1) * worth for x in (b * (1 - a), a * (1 - b)))
                row.append(share(float(np.mean(p_of_changes(gained, lost, worth, sizes[0].freedom) < 0.05))))
        rows.append(row)
    header = ("answers per question", "type I error, beta(2, 2)", "power", "type I error, beta(½, ½)", "power")
    yield "Repeats: 466 questions, a true gain of 4.5 points", header, rows


def trained() -> Iterator[Table]:
    """Type I error of the verdict on a recipe, and of one training that stands for its recipe."""
    rng = np.random.default_rng(SEED)
    rows: list[Sequence[str]] = []
    for n in (50, 160, 500):
        for count in (2, 3, 5):
            row = [str(n), str(count)]
            for spread in (0.0, 0.01, 0.03):
                wrong = alone = 0
                for _ in range(1000):
                    shift = rng.normal(0, spread, (count, 1)) / 0.5
                    up = rng.random((count, n)) < np.clip(rng.beta(0.5, 0.5, n) + shift, 0, 1)
                    differences = np.where(rng.random((count, n)) < 0.25, np.where(up, 1.0, -1.0), 0.0)
                    wrong += over_trainings(differences.tolist()).p_value() < 0.05
                    gained, lost = (differences[0] > 0).sum(), (differences[0] < 0).sum()
                    alone += float(p_of_changes(gained, lost, n)) < 0.05
                row += [share(wrong / 1000), share(alone / 1000)]
            rows.append(row)
    header = ("questions", "trainings", "SD 0 points", "one training", "SD 1 point", "one training", "SD 3 points",
              "one training")  # fmt: skip
    yield "Several trainings: type I error of the verdict on a recipe (alpha 0.05)", header, rows


def checkpoints() -> Iterator[Table]:
    """How often one of several equally good checkpoints is called worse."""
    rng = np.random.default_rng(SEED)
    rows: list[Sequence[str]] = []
    for count in (2, 10, 30, 100):
        for n in (50, 300):
            row = [str(count), str(n)]
            for kind in ("losses", "answers", "groups"):
                wrong = 0
                for _ in range(500):
                    tokens = rng.integers(20, 200, n).astype(float)
                    own = rng.normal(0, 0.05, (count, n))
                    names = [str(place // 2) for place in range(n)] if kind == "groups" else None
                    if kind == "groups":
                        own += np.repeat(rng.normal(0, 0.1, (count, n // 2)), 2, axis=1)
                    losses = (rng.normal(1, 0.5, n) + own) * tokens
                    if kind == "answers":
                        losses, tokens = (rng.random((count, n)) < rng.beta(1, 1, n)).astype(float), np.ones(n)
                    wrong += not all(ties(losses.tolist(), tokens.tolist(), names))
                row.append(share(wrong / 500))
            rows.append(row)
    header = ("checkpoints", "validation rows", "losses", "right answers", "losses, two rows per group")
    yield "Equally good checkpoints: at least one is called worse", header, rows


def detectable() -> Iterator[Table]:
    """Power at the minimum detectable difference."""
    rng = np.random.default_rng(SEED)
    rows: list[Sequence[str]] = []
    for n in SIZES:
        for changed in (0.1, 0.2, 0.4):
            difference = minimal_detectable_difference(n, changed)
            total = max(changed, difference)
            up, down = (total + difference) / 2, (total - difference) / 2
            gained, lost, _ = rng.multinomial(n, [up, down, 1 - up - down], size=20_000).T
            found = float(np.mean(p_of_changes(gained, lost, n) < 0.05))
            rows.append([str(n), f"{100 * changed:.0f} %", f"{100 * difference:.1f}", share(found)])
    yield ("Minimum detectable difference (power 0.8)", ("questions", "changes", "points", "power, simulated"), rows)


def main() -> None:
    """Write all tables."""
    text = [f"Seed {SEED}. Tables are enumerated, or have 500 to 20,000 draws per cell (standard error up to 0.010).\n"]
    for part in (paired, margins, decisions, grouped, skewed, labelled, repeated, trained, checkpoints, detectable):
        for title, header, rows in part():
            print(title, file=sys.stderr)
            lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
            text.append(f"### {title}\n\n" + "\n".join(lines) + "\n")
    before = DOCS.read_text("utf-8").partition(MARK)[0]
    DOCS.write_text(before + MARK + "\n" + "\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
