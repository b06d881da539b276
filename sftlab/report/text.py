"""Numbers, durations and dates as text for people."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from math import isfinite

from sftlab.records import Candidate
from sftlab.results import EarlyStop, JobRecord, Selection

DASH = "–"


def percent(value: float | None) -> str:
    """A fraction as a percentage; a dash if it is unknown."""
    return DASH if value is None or not isfinite(value) else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """A signed difference of fractions in points, with a second digit if one would show it as 0."""
    if value is None or not isfinite(value):
        return DASH
    digits = 2 if 0 < abs(value) < 0.0005 else 1
    rounded = round(100 * value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else "0.0"


def span(ends: tuple[float, float]) -> str:
    """An interval of a difference, in points."""
    return " to ".join(map(points, ends))


def decimals(value: float | None, digits: int = 4) -> str:
    """A number with a fixed count of decimals; a dash if it is unknown."""
    return DASH if value is None or not isfinite(value) else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A number with a thousands separator; a dash if it is unknown."""
    if value is None or not isfinite(value):
        return DASH
    return f"{value:,.6g}" if value % 1 else f"{int(value):,}"


def probability(value: float) -> str:
    """A p-value."""
    return "< 0.0001" if value < 0.0001 else f"{value:.3g}"


def stated_p(value: float) -> str:
    """A p-value within a sentence: "p = 0.02"."""
    shown = probability(value)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def level(value: float) -> str:
    """A confidence level, such as "95 %"."""
    return f"{100 * value:g} %"


def seconds(value: float | None) -> str:
    """A duration in the units that matter; a dash if it is unknown."""
    if value is None or not isfinite(value):
        return DASH
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{value:.3g} s"
    return f"{minutes // 60} h {minutes % 60} min"


def date(value: str) -> str:
    """An ISO time as a date and time in UTC; a dash if it is not an ISO time."""
    try:
        moment = datetime.fromisoformat(value).astimezone(UTC)
    except ValueError:
        return DASH
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def plural(number: int, noun: str) -> str:
    """A count with its noun: "1 question", "2 questions"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def titled(name: str) -> str:
    """The name of a column with a capital; the symbol p stays as it is."""
    return name if name == "p" or name.startswith("p,") else name[:1].upper() + name[1:]


def sha256(text: str) -> str:
    """The hash by which a Content-Security-Policy allows an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def scored(metric: str, value: float | None) -> str:
    """A value by which checkpoints are ranked: a share of right answers as a percentage, others with decimals."""
    return percent(value) if metric in ("accuracy", "exact_match") else decimals(value)


def disagreement(selection: Selection) -> str | None:
    """Whether validation loss and score agree about the best checkpoint; None if the loss ranks checkpoints."""
    rows = [row for row in selection.candidates if row.score is not None]
    if not rows:
        return None
    pairs = [(one, other) for number, one in enumerate(rows) for other in rows[:number] if one.score != other.score]
    apart = sum((one.eval_loss < other.eval_loss) != ((one.score or 0) > (other.score or 0)) for one, other in pairs)
    metric = selection.metric
    if not pairs and len(rows) > 1:
        return f"All checkpoints have the same {metric} on validation, so the loss decides."
    counts = f"order {apart} of {plural(len(pairs), 'pair')} of checkpoints differently"
    lowest = min(rows, key=lambda row: (row.eval_loss, row.epoch))
    best = next((row for row in rows if row.checkpoint == selection.best), lowest)
    if best.score == lowest.score:
        return f"Loss and {metric} agree about the best checkpoint; they {counts}."

    def described(row: Candidate) -> str:
        where = f"step {row.step} of job {row.job}" if len({row.job for row in rows}) > 1 else f"step {row.step}"
        return f"{where} (loss {row.eval_loss:.4f}, {metric} {scored(metric, row.score)})"

    noise = "within" if lowest.checkpoint in selection.ties else "beyond"
    return (
        f"Loss and {metric} disagree: {described(lowest)} has the lowest loss, {described(best)} the best {metric}. "
        f"The difference in {metric} is {noise} the noise of the validation rows. Loss and {metric} {counts}."
    )


def pruning(jobs: Sequence[JobRecord]) -> str | None:
    """How many jobs of a sweep were pruned, and after which share of their steps; None without."""
    pruned = [job.pruned for job in jobs if job.pruned is not None]
    if not pruned:
        return None
    steps, planned = sum(one.step for one in pruned), sum(one.planned_steps for one in pruned)
    were, their = ("was", "its") if len(pruned) == 1 else ("were", "their")
    return (
        f"{len(pruned)} of {plural(len(jobs), 'job')} {were} pruned because {their} peers are better, "
        f"after {steps:,} of {their} {planned:,} optimizer steps ({percent(steps / planned)})"
    )


def early_stop(stop: EarlyStop) -> str:
    """What early stopping did: the reason, the saving, and what it means if the schedule depends on the length."""
    since = f"step {stop.best_step}" if stop.best_step else "step 0, the untrained model"
    text = (
        f"stopped early at step {stop.step:,} of {stop.planned_steps:,}: {plural(stop.validations, 'validation')} "
        f"without a gain beyond the noise since {since}; {plural(stop.saved_steps, 'step')} (about "
        f"{seconds(stop.saved_seconds)}) were not trained"
    )
    if not stop.depends_on_length:
        return text
    return (
        f"{text}. The schedule {stop.schedule} is planned for {stop.planned_steps:,} steps, and the learning rate was "
        f"still {stop.learning_rate:.3g} (peak {stop.peak_learning_rate:.3g}): a training planned for {stop.step:,} "
        "steps would have decayed it by then and may be better"
    )


def sentence(text: str) -> str:
    """A verdict's reason with a capital, a full stop, minus signs, and p-values that do not wrap."""
    text = re.sub(r"\bp ([<=]) ", "p\u00a0\\1\u00a0", re.sub(r"(?<![\w.])-(?=\d)", "−", text))
    return text[:1].upper() + text[1:] + "." if text else ""
