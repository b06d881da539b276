"""``report.html``: what a run found, as one page that opens offline and asks for nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.eval.score import METRICS, metric, truncated
from sftlab.eval.statistics import subgroup
from sftlab.records import Prediction, read_jsonl

if TYPE_CHECKING:
    from jinja2 import Template

MODELS = {"baseline": "Baseline", "finetuned": "Fine-tuned"}
VERDICTS = ("better", "worse", "inconclusive")
# What questions are filtered by, in the order of the buttons: two models compared, or one alone.
PAIRED = ("differ", "gained", "lost", "unparsed", "both-wrong", "both-right", "all")
ALONE = ("wrong", "right", "unparsed", "all")
# And where answers have scores, which are no right or wrong.
SCORED_PAIRED = ("differ", "gained", "lost", "same", "unparsed", "all")
SCORED_ALONE = ("scored", "unparsed", "all")
FOREST = 20  # subgroups that are drawn; more would be no picture
DASH = "–"


def render(folder: Path, run: dict[str, Any] | None = None) -> str:
    """The page of the run in a folder; ``run`` is its ``run.json``. What the folder lacks is left out of the page."""
    if run is None:
        run = json.loads((folder / "run.json").read_text("utf-8")) if (folder / "run.json").is_file() else {}
    evaluation = run.get("evaluation") or {}
    comparison = evaluation.get("comparison") or {}
    files = {name: folder / "predictions" / f"{name}.jsonl" for name in MODELS}
    answers = {name: Prediction.read(path) if path.is_file() else [] for name, path in files.items()}
    curve = folder / "loss.png"
    word, _, reason = str(comparison.get("verdict") or "").partition(": ")
    page = _template().render(
        run=run,
        evaluated=evaluation_rows(run["evaluations"]) if run.get("evaluations") else [],
        models=[(name, label) for name, label in MODELS.items() if evaluation.get(name)],
        verdict=word if word in VERDICTS else None,
        reason=_sentence(reason if word in VERDICTS else word),
        knowledge=_knowledge(comparison),
        candidates=_candidates(run),
        curve=base64.b64encode(curve.read_bytes()).decode() if curve.is_file() else None,
        losses=_losses(folder / "metrics.jsonl"),
        letters=_letters(evaluation, answers),
        metric=metric(evaluation),
        metric_names=METRICS,
        metric_name=METRICS[metric(evaluation)],
        groups=_groups(answers),
        forest=_forest(evaluation),
        questions=_questions(answers),
    )
    # A lone surrogate, which broken input can leave in a text, could not be written as UTF-8.
    return page.lstrip().encode("utf-8", "replace").decode("utf-8")


@cache
def _template() -> Template:
    from jinja2 import ChainableUndefined, Environment

    environment = Environment(
        autoescape=True, undefined=ChainableUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    for own in (percent, points, decimals, count, seconds, date, finite, sha256, truncated):
        environment.filters[own.__name__] = own
    return environment.from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))


def finite(value: Any) -> float | int | None:
    """A number that can be shown, or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else None


def percent(value: Any) -> str:
    """A fraction as a percentage."""
    return DASH if finite(value) is None else f"{100 * value:.1f}%"


def points(value: Any) -> str:
    """A difference of fractions in points, signed; a second digit where one would show a difference as none."""
    if finite(value) is None:
        return DASH
    digits = 2 if 0 < abs(value) < 0.0005 else 1
    rounded = round(100 * value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else "0.0"


def decimals(value: Any, digits: int = 4) -> str:
    """A number with a fixed count of decimals."""
    return DASH if finite(value) is None else f"{value:.{digits}f}"


def count(value: Any) -> str:
    """A number with its thousands separated."""
    return DASH if finite(value) is None else f"{value:,.6g}" if value % 1 else f"{int(value):,}"


def seconds(value: Any) -> str:
    """A duration in the units that matter."""
    if finite(value) is None:
        return DASH
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{value:.3g} s"
    return f"{minutes // 60} h {minutes % 60} min"


def date(value: Any) -> str:
    """An ISO time as people write it, in UTC."""
    try:
        moment = datetime.fromisoformat(value).astimezone(UTC)
    except (TypeError, ValueError):
        return DASH
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def sha256(text: str) -> str:
    """What a Content-Security-Policy knows an inline script or style by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _printable(value: Any) -> Any:
    """The last gate before the page: a value that means nothing to people becomes a dash."""
    return DASH if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _sentence(text: str) -> str:
    """A verdict's reason with a capital, a full stop, real minus signs, and p on one line."""
    text = re.sub(r"\bp ([<=]) ", "p\u00a0\\1\u00a0", re.sub(r"(?<![\w.])-(?=\d)", "−", text))
    return text[:1].upper() + text[1:] + "." if text else ""


def _knowledge(comparison: dict[str, Any]) -> dict[str, Any]:
    """How the difference splits: what is left where every question has an answer (knowledge), and the rest."""
    forced = comparison.get("forced") or {}
    total, known = finite(comparison.get("delta")), finite(forced.get("delta"))
    if total is None or known is None:
        return {}
    return {
        "total": total,
        "known": known,
        "format": total - known,
        "ci95": forced.get("ci95"),
        "verdict": str(forced.get("verdict") or "").partition(":")[0],
    }


def _candidates(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Every checkpoint, the best first, each with what sets its job apart from the others."""
    selection = run.get("selection") or {}
    kinds = {job.get("job"): job.get("trained_as") for job in run.get("jobs") or []}
    jobs = [set(job.get("overrides") or []) for job in run.get("jobs") or []]
    shared = set.intersection(*jobs) if len(jobs) > 1 else set()
    rows = []
    for row in selection.get("candidates") or []:
        path = row.get("checkpoint")
        mark = (
            "kept" if path == selection.get("checkpoint") else "tied" if path in (selection.get("ties") or []) else ""
        )
        own = [override for override in row.get("overrides") or [] if override not in shared]
        name = os.path.basename(str(path or ""))
        rows.append({**row, "mark": mark, "own": own, "name": name, "trained_as": kinds.get(row.get("job"))})

    def order(row: dict[str, Any]) -> tuple[float, float]:
        loss = finite(row.get("eval_loss"))
        return -(finite(row.get("exact_match")) or 0), math.inf if loss is None else loss

    return sorted(rows, key=order)


def evaluation_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table of a sweep over models or settings of evaluation, its header first."""
    shared = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
    table = [
        ["job", "model", "overrides", "base", "score", "95 % interval", "difference", "p", "p, adjusted", "verdict"]
    ]
    for row in rows:
        own = [word for word in row["overrides"] if word not in shared and not word.startswith("eval.name_or_path=")]
        start = [str(row["job"]), str(row.get("model") or ""), " ".join(own)]
        evaluation = row.get("evaluation")
        if not evaluation:
            table.append([*start, *[""] * 6, f"failed: {row['error']}"])
            continue
        judged = metric(evaluation)
        shown = "{:.2%}" if judged == "accuracy" else "{:.3f}"
        base = shown.format(evaluation["baseline"][judged]) if "baseline" in evaluation else ""
        model = evaluation["finetuned"]
        start += [base, shown.format(model[judged]), " – ".join(map(shown.format, model["ci95"]))]
        if "comparison" not in evaluation:
            table.append([*start, "", "", "", ""])
            continue
        found = evaluation["comparison"]
        delta, p, adjusted = 100 * found["delta"], found["p_value"], row["p_adjusted"]
        verdict = str(row["verdict"]).partition(":")[0]
        table.append([*start, f"{delta:+.2f} points", f"{p:.2g}", f"{adjusted:.2g}", verdict])
    return table


def _losses(log: Path) -> dict[str, list[float]]:
    """The losses of a single job in the order they were logged: the figure, for those who cannot see it."""
    rows = list(read_jsonl(log)) if log.is_file() else []
    if any("job" in row for row in rows):
        return {}
    return {key: [row[key] for row in rows if finite(row.get(key)) is not None] for key in ("loss", "eval_loss")}


def _letters(evaluation: dict[str, Any], answers: dict[str, list[Prediction]]) -> list[tuple[str, list[int]]]:
    """How often each letter is right, and how often each model gave it. Free text has no such table."""
    given = [evaluation[name].get("letters") or {} for name in MODELS if evaluation.get(name)]
    targets = [target for row in answers["baseline"] or answers["finetuned"] for target in row.accepted]
    names = sorted({*targets, *(name for part in given for name in part)} - {"none"})
    if not targets or not any(given) or len(names) > 26 or any(len(name) > 1 for name in names):
        return []
    return [(name, [targets.count(name), *(part.get(name, 0) for part in given)]) for name in [*names, "none"]]


def _groups(answers: dict[str, list[Prediction]]) -> list[tuple[str, list[tuple[int, int, float, float] | None]]]:
    """Correct answers, questions and interval of each group by each model, where there are few enough to read."""
    groups = dict.fromkeys(row.group for rows in answers.values() for row in rows if row.group is not None)
    scored = any(row.score is not None for rows in answers.values() for row in rows)
    if scored or not 2 <= len(groups) <= 20:
        return []
    found = [subgroup([row.correct for row in rows], [row.group for row in rows]) for rows in answers.values() if rows]
    return [(name, [part.get(name) for part in found]) for name in groups]


def _forest(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The subgroups that were compared, where they are few enough to draw: the name, the difference and its ends."""
    found = []
    for group in (evaluation.get("subgroups") or {}).get("groups") or []:
        difference = group.get("difference") or {}
        ends = difference.get("ci95") or []
        numbers = [finite(value) for value in (difference.get("delta"), *ends)]
        if len(numbers) == 3 and None not in numbers:
            found.append(
                {"name": str(group.get("name") or DASH), "delta": numbers[0], "low": numbers[1], "high": numbers[2]}
            )
    return found if len(found) <= FOREST else []


def _questions(answers: dict[str, list[Prediction]]) -> dict[str, Any]:
    """What the question browser needs: its buttons (kind, count), and the JSON block that the script reads."""
    shown = {name: {row.id: row for row in rows} for name, rows in answers.items() if rows}
    first = {row.id: row for rows in reversed(answers.values()) for row in rows}
    if not shown:
        return {}
    before, after = _frame([row.prompt for row in first.values()])
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(row.id for side in answers.values() for row in side):
        pair, of = [part.get(name) for part in shown.values()], first[name]
        rows.append(
            {
                "id": name,
                "question": of.prompt[len(before) : len(of.prompt) - len(after)],
                "target": " or ".join(of.accepted),
                "group": of.group,
                "subgroup": of.subgroup,
                "kinds": _kinds(pair),
                "sides": [None if side is None else _side(side, of.prompt) for side in pair],
            }
        )
    scored = any(row.score is not None for row in first.values())
    if scored:  # the largest change first; of one model alone the lowest score
        rows.sort(key=_change)
    kinds = (SCORED_PAIRED if scored else PAIRED) if len(shown) > 1 else SCORED_ALONE if scored else ALONE
    buttons = [(kind, sum(kind in row["kinds"] for row in rows)) for kind in kinds]
    block = {"models": [MODELS[name] for name in shown], "before": before, "after": after, "rows": rows}
    # Nothing in the block may look like markup to the HTML parser, or end a line in old JavaScript.
    escapes = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
    text = json.dumps(block, ensure_ascii=False).translate(escapes)
    start = kinds[0] if buttons[0][1] else "all"
    return {"models": block["models"], "buttons": buttons, "start": start, "json": text, "scored": scored}


def _change(row: dict[str, Any]) -> float:
    scores = [side["score"] for side in row["sides"] if side is not None and side["score"] is not None]
    return -abs(scores[1] - scores[0]) if len(scores) > 1 else scores[0] if scores else 0


def _frame(prompts: list[str]) -> tuple[str, str]:
    """What all prompts begin and end with (system prompt, chat template), which need not be shown each time."""
    before = _common(prompts)
    before = before[: before.rfind("\n") + 1]  # not within the question's first words
    after = _common([prompt[len(before) :][::-1] for prompt in prompts])[::-1]
    mark = re.search(r"[<\[\n]", after)
    return (before, after[mark.start() :] if mark else "") if len(prompts) > 1 else ("", "")


def _common(texts: list[str]) -> str:
    low, high = min(texts), max(texts)
    return low[: next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _kinds(pair: list[Prediction | None]) -> list[str]:
    """The buttons that a question is shown under."""
    sides = [side for side in pair if side is not None]
    kinds = ["all"] + ["unparsed"] * any(side.answer is None for side in sides)
    scores = [side.score for side in sides if side.score is not None]
    if scores:
        if len(scores) < 2:
            return [*kinds, "scored"]
        return [
            *kinds,
            *(["same"] if scores[0] == scores[1] else ["differ", "gained" if scores[1] > scores[0] else "lost"]),
        ]
    if len(sides) < 2:
        return [*kinds, "right" if sides[0].correct else "wrong"]
    if sides[0].correct == sides[1].correct:
        return [*kinds, "both-right" if sides[0].correct else "both-wrong"]
    return [*kinds, "differ", "gained" if sides[1].correct else "lost"]


def _side(row: Prediction, shared: str) -> dict[str, Any]:
    """One model's answer. Its prompt only where it is not the shared one: another tokenizer, another template."""
    other = None if row.prompt == shared else row.prompt
    side = {"text": row.completion, "answer": row.answer, "correct": row.correct, "readings": row.readings}
    if row.score is not None and row.answer == row.completion.strip():
        side["answer"] = ""  # it is the text, which need not be there twice
    return {**side, "score": row.score, "cut": row.finish_reason == "length", "prompt": other}
