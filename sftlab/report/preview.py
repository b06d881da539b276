"""``mode=preview``: the training and validation rows as tokens, with counts, in the terminal and as one page."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from sftlab.config import Supervised
from sftlab.dataset.prompt import Tokens, tokenize, tokenize_all
from sftlab.records import IGNORED, Example
from sftlab.report.text import count, percent, sha256

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
HEADER = ("Tokens", *(f"{share} %" for share in PERCENTILES[:-1]), "Longest")
BINS, BAR = 20, 50  # bars of the histogram, and characters of the longest bar, at most
SHOWN = 300  # tokens at the start and at the end of a part in the terminal; the page has all
# The parts of a row, each with two shades for the terminal, which set the background too: terminals are dark or light.
PARTS = {
    "prompt": ("Prompt, no loss", "#a0a8b3 on #1c2026", "#a0a8b3 on #343b45"),
    "supervised": ("Completion, supervised", "#6fcf97 on #12261a", "#6fcf97 on #1f4a30"),
    "cut": ("Truncated, beyond train.max_length", "strike #f0938b on #331a19", "strike #f0938b on #5a2b28"),
}


class Statistics(NamedTuple):
    """Counts of a split. Lengths are those of whole rows, before truncation."""

    rows: int
    tokens: int
    kept: int  # tokens that training reads
    supervised: int  # tokens with a loss
    cut: int  # rows whose completion is truncated
    left_out: int  # rows whose prompt alone fills max_length
    percentiles: dict[str, list[int]]
    bins: list[tuple[int, int, int]]


def statistics(lengths: Sequence[tuple[int, ...]], max_length: int) -> Statistics:
    """Summarise rows by their numbers of tokens without and with a loss in turn: (prompt, completion, prompt, …).

    Percentiles are nearest ranks: of lengths of rows, and of the tokens without and with a loss.
    """
    whole = sorted(map(sum, lengths))
    parts = {
        "row": whole,
        "prompt": sorted(sum(runs[::2]) for runs in lengths),
        "completion": sorted(sum(runs[1::2]) for runs in lengths),
    }
    trained = [runs for runs in lengths if runs[0] < max_length]
    return Statistics(
        rows=len(lengths),
        tokens=sum(whole),
        kept=sum(min(sum(runs), max_length) for runs in trained),
        supervised=sum(_supervised(runs, max_length) for runs in trained),
        cut=sum(row > max_length for row in whole) - (len(lengths) - len(trained)),
        left_out=len(lengths) - len(trained),
        percentiles={name: [of[-(-share * len(of) // 100) - 1] for share in PERCENTILES] for name, of in parts.items()},
        bins=histogram(whole, max_length),
    )


def _supervised(runs: Sequence[int], max_length: int) -> int:
    """Return the number of tokens with a loss within ``max_length``."""
    ends = [min(end, max_length) for end in accumulate(runs)]
    return sum(end - start for start, end in zip(ends[::2], ends[1::2], strict=True))


def histogram(lengths: Sequence[int], max_length: int) -> list[tuple[int, int, int]]:
    """Bars (from, to, rows). No bar has rows on both sides of ``max_length``; the last one may be wide."""
    rows = sorted(lengths)
    edge = max_length + 1 if max_length < rows[-1] else 0
    high = rows[-(-99 * len(rows) // 100) - 1]  # much longer rows share the last bar, so that the others stay readable
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    step = next(width for width in widths if (high - edge) // width - (rows[0] - edge) // width < BINS)
    sizes = Counter(edge if n >= edge > high else (min(n, high + step) - edge) // step * step + edge for n in rows)
    starts = sorted({*sizes, *range(min(sizes), high + 1, step)})
    ends = [*(start - 1 for start in starts[1:]), max(starts[-1] + step - 1, rows[-1])]
    return [(max(start, 1), end, sizes[start]) for start, end in zip(starts, ends, strict=True)]


def pick(lengths: Sequence[int], rows: int, seed: int) -> list[int]:
    """Draw the rows to show by seed, in their order, and add the longest row."""
    drawn = sorted(Random(seed).sample(range(len(lengths)), min(rows, len(lengths))))
    return list(dict.fromkeys([*drawn, lengths.index(max(lengths))]))


class Span(NamedTuple):
    """A token, or the tokens that together are one character. ``part`` is a key of PARTS."""

    text: str
    ids: list[int]
    start: int
    part: str
    special: bool


def spans(decode: Callable[[list[int]], str], tokens: Tokens, max_length: int, special: Set[int]) -> list[Span]:
    """The text of each token. Tokens with a part of a character are joined, so that no text is lost or changed."""
    ids, labels = tokens.ids, tokens.labels
    # No character crosses these: segments are tokenised separately, and special tokens are whole.
    borders = {*accumulate(len(segment.ids) for segment in tokens.segments)}
    borders |= {side for at, token in enumerate(ids) if token in special for side in (at, at + 1)}
    parts, before, start = list[Span](), list[int](), 0  # before: decoders may drop a space from the first token
    for end in range(1, len(ids) + 1):
        text = decode(before + ids[start:end])[len(decode(before)) :]
        if end in borders or (text and not text.endswith("\ufffd")):
            part = "cut" if end > max_length else "prompt" if labels[start] == IGNORED else "supervised"
            parts.append(Span(text, ids[start:end], start, part, ids[start] in special))
            before, start = ids[start:end], end
    return parts


def visible(text: str) -> str:
    """Text in which line ends are marked and control characters named, so that nothing is hidden or moves a cursor."""
    marks = {0x0A: "⏎\n", 0x09: "⇥\t", 0x200C: "\u200c", 0x200D: "\u200d"}  # joiners belong to words and emoji
    hidden = {ord(char) for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return text.translate({code: f"⟨U+{code:04X}⟩" for code in hidden} | marks) or "∅"


class Split(NamedTuple):
    """Everything that terminal and page show of a split."""

    name: str
    statistics: Statistics
    facts: dict[str, str]
    notes: list[str]
    rows: list[tuple[str, list[tuple[str, list[Span]]]]]  # a heading, and the tokens of each part


def preview(
    tokenizer: Any,
    splits: Mapping[str, Sequence[Example]],
    *,
    max_length: int,
    train_on: Supervised,
    folder: Path,
    rows: int = 3,
    seed: int,
    template_time: str | None = None,
) -> None:
    """Print the rows of ``train`` and ``validation`` as training reads them, and write ``preview.html``."""
    from sftlab.runtime.console import say

    names = [name for name in ("train", "validation") if splits[name]]
    shown = [_split(tokenizer, name, splits[name], max_length, train_on, rows, seed) for name in names]
    if template_time is not None:
        for split in shown:
            split.facts["Time that the chat template prints"] = template_time
    for part in (part for split in shown for part in _printed(split, max_length)):
        say(part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preview.html").write_text(render(shown, max_length), "utf-8")
    say(f"Every token with its id: {folder / 'preview.html'}")


def _split(
    tokenizer: Any, name: str, examples: Sequence[Example], max_length: int, train_on: Supervised, rows: int, seed: int
) -> Split:
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)  # a cleanup would change the text
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tokenize_one = partial(tokenize, tokenizer, train_on=train_on)
    # Tokens of rows are not retained, since a split may be large.
    met, lengths, places = Counter[int](), list[tuple[int, ...]](), list[tuple[int, int]]()
    for at, counted in enumerate(tokenize_all(partial(_counted, tokenizer, train_on, special), examples, name)):
        met.update(counted.special)
        lengths += counted.lengths
        places += [(at, number) for number in range(len(counted.lengths))]
    counts, whole, first = statistics(lengths, max_length), list(map(sum, lengths)), tokenize_one(examples[0])[0]
    answers = [token for token in first.labels if token != IGNORED]
    over = counts.cut + counts.left_out
    facts = {
        "Rows": count(counts.rows),
        "Tokens": f"{count(counts.tokens)}; trained on: {count(counts.kept)}",
        "Supervised": f"{count(counts.supervised)} tokens, {percent(counts.supervised / max(counts.kept, 1))} of those",
        f"Rows over max_length={max_length}": f"{count(over)} ({percent(over / counts.rows)}); completion truncated: "
        f"{count(counts.cut)}; left out, since their prompt fills it: {count(counts.left_out)}",
    }
    for kind, token in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id)):
        where = (
            f"{first.ids.count(token) - answers.count(token)} in the prompt, {answers.count(token)} in the completion"
        )
        facts[f"{kind} in the first row"] = "the tokenizer has none" if token is None else where
    named = (f"{count(n)} × {visible(decode([token]))} (id {token})" for token, n in met.most_common())
    facts["Special tokens"] = ", ".join(named) or "none"
    notes = {
        f"train.max_length={max_length} truncates completions, which training refuses unless "
        f"train.allow_truncated_completion=true; {max(whole)} truncates none.": counts.cut,
        f"Rows whose prompt fills train.max_length={max_length} are left out.": counts.left_out,
        "The first row starts with two BOS.": first.ids[:2] == [tokenizer.bos_token_id] * 2,
    }
    shown = []
    for at in pick(whole, rows, seed):
        marks = ", the longest" * (whole[at] == max(whole)) + ", left out" * (lengths[at][0] >= max_length)
        example, number = places[at]
        shown_row = tokenize_one(examples[example])[number]
        parts = groupby(spans(decode, shown_row, max_length, special), lambda span: span.part)
        heading = f"Row {at + 1:,} ({visible(shown_row.id)}): {whole[at]:,} tokens{marks}"
        shown.append((heading, [(part, list(group)) for part, group in parts]))
    return Split(name, counts, facts, [note for note, holds in notes.items() if holds], shown)


class _Counted(NamedTuple):
    """The counts of the rows of an example: each special token, and the tokens without and with a loss in turn."""

    special: Counter[int]
    lengths: list[tuple[int, ...]]


def _counted(tokenizer: Any, train_on: Supervised, special: Set[int], example: Example) -> _Counted:
    rows = tokenize(tokenizer, example, train_on)
    return _Counted(Counter(token for row in rows for token in row.ids if token in special), [row.runs for row in rows])


def _printed(split: Split, max_length: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # Shades need 256 colours; with fewer, tokens are separated by a line.
    line = "" if Console().color_system in ("256", "truecolor") and not Console().no_color else "│"
    table = Table(title=f"Rows of {split.name}", title_justify="left", show_header=False)
    lengths, bins = Table(*(Column(name, justify="right") for name in HEADER)), split.statistics.bins
    for fact in split.facts.items():
        table.add_row(*map(Text, fact))
    for name, values in split.statistics.percentiles.items():
        lengths.add_row(name, *map(count, values))
    yield from (table, lengths)
    most = max(rows for _, _, rows in bins)
    bars = [f"{low:>7,} – {high:<7,} {'█' * -(-BAR * rows // most)} {rows:,}" for low, high, rows in bins]
    bars.insert(sum(low <= max_length for low, _, _ in bins), f"{'max_length':>17} ──── {max_length:,}")
    yield Text("\n".join(bars))
    yield from (Text(f"Note: {note}", "yellow") for note in split.notes)
    for heading, parts in split.rows:
        yield Text(f"\n{heading}", "bold")
        for part, tokens in parts:
            yield Text(f"{PARTS[part][0]} ({sum(len(span.ids) for span in tokens):,} tokens)")
            text = Text(overflow="fold")
            for at, span in enumerate(tokens):
                if at < SHOWN or at >= len(tokens) - SHOWN:
                    text.append(line if at else "").append(
                        visible(span.text), "bold " * span.special + PARTS[part][1 + at % 2]
                    )
                elif at == SHOWN:
                    text.append(f" … {len(tokens) - 2 * SHOWN:,} more, all in preview.html … ")
            yield text


def render(splits: Sequence[Split], max_length: int) -> str:
    """Render the page, which has no script and loads nothing from outside."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {own.__name__: own for own in (count, percent, sha256, visible)}
    template = environment.from_string(Path(__file__).with_name("preview.html.jinja").read_text("utf-8"))
    return template.render(splits=splits, max_length=max_length, header=HEADER, labels=PARTS).lstrip()
