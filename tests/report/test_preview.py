"""What training will see, shown before it: the counts are those of training, and no text is lost, changed or run."""

from __future__ import annotations

import copy
import html
import pickle
import random
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, vignettes, write_model
from test_page import HOSTILE, Reader
from test_prompt import tokenized as tokenize
from test_tokenize import data, made

from sftlab.dataset import parallel, prompt
from sftlab.dataset.prompt import Segment, Tokens, prompt_tokens, tokenize_all
from sftlab.errors import ConfigError
from sftlab.model.base import Base
from sftlab.records import Example, single_turn
from sftlab.report.preview import BINS, histogram, pick, preview, spans, statistics, visible

NASTY = f"[bold]x[/bold] \x1b[31mred\u202e :smile: café 中文 👩\u200d🚀 end .\r\n\t{HOSTILE}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base("tiny", write_model(tmp_path_factory.mktemp("model")), "identity", False, None)


def example(number: int = 0, user: str = "what is it?", assistant: str = "this") -> Example:
    return Example(id=f"row-{number}", messages=single_turn("", user, assistant), target="A")


def shown(tokenizer: Any, row: Example, max_length: int = 10_000) -> tuple[Tokens, list[Any]]:
    tokens = tokenize(tokenizer, row)
    return tokens, spans(tokenizer.decode, tokens, max_length, set(tokenizer.added_tokens_decoder))


# — counts —


def test_the_counts() -> None:
    found = statistics([(10, 5), (20, 10), (25, 7), (31, 1), (4, 6)], max_length=25)
    assert (found.rows, found.tokens) == (5, 119)
    assert (found.cut, found.left_out) == (1, 2)
    assert (found.kept, found.supervised) == (15 + 25 + 10, 5 + 5 + 6)
    assert found.percentiles["row"] == [10, 15, 30, 32, 32, 32, 32]
    assert found.percentiles["prompt"] == [4, 10, 20, 25, 31, 31, 31]
    assert found.percentiles["completion"] == [1, 5, 6, 7, 10, 10, 10]


def test_percentiles_are_nearest_ranks() -> None:
    found = statistics([(n, 1000 - n) for n in range(1, 201)], max_length=1000)
    assert found.percentiles["prompt"] == [10, 50, 100, 150, 190, 198, 200]
    assert (found.cut, found.left_out) == (0, 0)


@pytest.mark.parametrize("max_length", [40, 150, 10_000])
def test_the_counts_are_those_of_training(tmp_path: Path, base: Base, max_length: int) -> None:
    rows = vignettes(12)
    for number in (1, 5, 8):
        rows[number]["question"] *= 4
    if max_length == 40:
        max_length = max(len(row.prompt) for row in tokenized(tmp_path, base, rows)) - 1
    counts = made(tmp_path, base, max_length, allowed=True, rows=rows).counts.train
    found = statistics([(len(row.prompt), len(row.completion)) for row in tokenized(tmp_path, base, rows)], max_length)
    assert (found.kept, found.supervised) == (counts.tokens, counts.supervised)
    assert (found.cut, found.left_out) == (counts.truncated, counts.left_out)
    assert found.rows - found.left_out == counts.rows


def tokenized(tmp_path: Path, base: Base, rows: list[dict[str, Any]]) -> list[Tokens]:
    return [tokenize(base.tokenizer(), row) for row in data(tmp_path, rows).split("train")]


def test_no_bar_has_rows_on_both_sides_of_max_length() -> None:
    draw = random.Random(5)
    for _ in range(300):
        lengths = [int(draw.lognormvariate(4, draw.random())) + 2 for _ in range(draw.randint(1, 300))]
        max_length = draw.randint(1, 2 * max(lengths))
        bars = histogram(lengths, max_length)
        assert 1 <= len(bars) <= BINS + 2
        assert all(after[0] == bar[1] + 1 for bar, after in pairwise(bars))
        assert [rows for low, high, rows in bars] == [
            sum(low <= length <= high for length in lengths) for low, high, _ in bars
        ]
        assert sum(rows for _, _, rows in bars) == len(lengths)
        assert sum(rows for low, _, rows in bars if low > max_length) == sum(x > max_length for x in lengths)


def test_one_far_row_leaves_the_others_their_bars() -> None:
    lengths = [100 + number % 50 for number in range(300)] + [90_000]
    for max_length in (120, 2048, 100_000):
        bars = histogram(lengths, max_length)
        assert bars[-1][1] == 90_000
        assert sum(rows > 0 for _, _, rows in bars) >= 8
        assert bars[-1][2] == 1 or max_length == 120


def test_rows_are_drawn_by_seed_and_the_longest_is_there() -> None:
    lengths = [5] * 40
    lengths[17] = 9
    drawn = pick(lengths, 3, 1)
    assert drawn == pick(lengths, 3, 1) != pick(lengths, 3, 2)
    assert drawn[:-1] == sorted(set(drawn[:-1]))
    assert (len(drawn), drawn[-1]) == (4, 17)
    assert pick(lengths, 99, 1) == list(range(40))
    assert pick(lengths, 0, 1) == [17]


# — tokens —


def test_every_token_is_there_once_and_its_part_is_right(base: Base) -> None:
    tokens, found = shown(base.tokenizer(), example(assistant="this that"), max_length=1000)
    prompt = len(tokens.prompt)
    assert [one for span in found for one in span.ids] == tokens.prompt + tokens.completion
    assert [span.start for span in found] == list(range(len(found)))  # plain text: a span is a token
    assert [span.part for span in found] == ["prompt"] * prompt + ["supervised"] * len(tokens.completion)
    assert [span.text for span in found if span.special] == ["<s>", "<user>", "</s>", "<assistant>", "</s>"]
    for max_length in (prompt + 3, prompt, 2):
        parts = [span.part for span in shown(base.tokenizer(), example(assistant="this that"), max_length)[1]]
        assert parts.count("cut") == len(found) - max_length
        assert parts.count("prompt") == min(prompt, max_length)
        assert parts[max_length:] == ["cut"] * parts.count("cut")


@pytest.mark.parametrize(
    "text", ["é", "中文字", "a😀b", "👩\u200d🚀 🇩🇪", "x\ufffdy中", "中\ufffd", "\ufffd\ufffd 😀", NASTY]
)
def test_pieces_of_a_character_make_its_text(base: Base, text: str) -> None:
    tokenizer = base.tokenizer()
    tokens, found = shown(tokenizer, example(user=text, assistant=f"{text} {text}"))
    assert "".join(span.text for span in found if span.part == "prompt") == tokens.text
    assert "".join(span.text for span in found if span.part == "supervised") == f"{text} {text}</s>"
    assert [one for span in found for one in span.ids] == tokens.prompt + tokens.completion
    if "\ufffd" not in text:
        assert {len(span.text) for span in found if len(span.ids) > 1} == {1}  # no more waits than a character


def test_a_decoder_that_drops_the_first_space_and_knows_bytes() -> None:
    """As in Llama 2 and Gemma: words begin with ▁, and what is in no word is written in bytes."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<s>", "▁the", "▁answer", *(f"<0x{byte:02X}>" for byte in "😀".encode()), "▁"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    def row(prompt: list[int], completion: list[int]) -> Tokens:
        return Tokens("r", [Segment(prompt, supervised=False), Segment(completion, supervised=True)], "")

    found = spans(decode, row([1, 2, 3, 4, 5, 6], [1, 7, 3, 4, 5, 6, 0]), 99, {0})
    assert [span.text for span in found] == ["the", " answer", "😀", " the", " ", "😀", "<s>"]
    assert [(span.start, len(span.ids)) for span in found][2:6] == [(2, 4), (6, 1), (7, 1), (8, 4)]
    first = spans(decode, row([7, 2], [2]), 99, {0})  # a first space that decodes to nothing waits for a word
    assert [(span.text, span.ids) for span in first] == [(" answer", [7, 2]), (" answer", [2])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n", "a⏎\nb⏎\n"),
        ("a\tb", "a⇥\tb"),
        ("\r\x1b[2J\x07\x9b", "⟨U+000D⟩⟨U+001B⟩[2J⟨U+0007⟩⟨U+009B⟩"),
        ("\u202ex\u2066\ufeff\u2028\ud800", "⟨U+202E⟩x⟨U+2066⟩⟨U+FEFF⟩⟨U+2028⟩⟨U+D800⟩"),
        ("👩\u200d🚀 é 中", "👩\u200d🚀 é 中"),
        ("", "∅"),
    ],
)
def test_nothing_hides(text: str, expected: str) -> None:
    assert visible(text) == expected


# — what is shown —


class WithoutTest(Mapping[str, list[Example]]):
    """Splits of which the test set may not be read."""

    def __init__(self, train: list[Example], validation: list[Example]) -> None:
        self.splits = {"train": train, "validation": validation}

    def __getitem__(self, name: str) -> list[Example]:
        assert name != "test"
        return self.splits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["train", "validation", "test"])

    def __len__(self) -> int:
        return 3


def run(base: Base, folder: Path, train: list[Example], validation: list[Example] | None = None, **options: Any) -> str:
    splits = WithoutTest(train, [example()] if validation is None else validation)
    preview(
        base.tokenizer(),
        splits,
        folder=folder,
        **{"max_length": 1000, "train_on": "all", "rows": 3, "seed": 1} | options,
    )
    return (folder / "preview.html").read_text("utf-8")


def test_the_terminal(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [example(number, assistant=f"[bold]{number}[/bold] this") for number in range(1234)]
    rows[700] = example(700, user=f"{NASTY} {'what is it? ' * 400}", assistant=NASTY)
    run(base, tmp_path / "made", rows, max_length=40)
    out = capsys.readouterr().out
    assert re.search(r"Rows +│ 1,234 ", out)
    assert re.search(r"BOS in the first row +│ 1 in the prompt, 0 in the completion", out)
    assert re.search(r"EOS in the first row +│ 1 in the prompt, 1 in the completion", out)
    assert "1,234 × <s> (id 0)" in out
    assert re.search(
        r"Rows over max_length=40 +│ 1 \(0\.1%\); completion truncated: 0; left out, since their prompt fills it: 1",
        out,
    )
    assert re.search(r"max_length ──── 40\n", out)
    assert "max_length ──── 40\n     41" in out  # the limit is between the bars that it parts
    assert "Row 701 (row-700)" in out
    assert ", the longest, left out" in out
    assert "more, all in preview.html" in " ".join(out.split())
    assert "│[│b│o│l│d│]│" in out
    assert "│😀│" not in out  # :smile: is text
    assert not re.search("[\x1b\u202e\r\ufffd]", out)
    assert str(tmp_path / "made" / "preview.html") in out.replace("\n", "")
    assert out.count("Row ") == 3 + 1 + 1  # drawn ones, the longest, and the only one of validation


def test_colours_tell_the_parts_of_a_row(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    row = example(user=NASTY, assistant="this that this that")
    limit = len(tokenize(base.tokenizer(), row).prompt) + 4
    run(base, tmp_path, [row], validation=[], max_length=limit)
    out = capsys.readouterr().out
    found = re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m", out)
    grey, green, red = "38;2;160;168;179", "38;2;111;207;151", "38;2;240;147;139"
    tokens = [(style, text) for style, text in found if re.search(f"{grey}|{green}|{red}", style)]
    assert tokens[0] == (f"1;{grey};48;2;28;32;38", "<s>")
    assert tokens[1] == (f"1;{grey};48;2;52;59;69", "<user>")
    words = "".join(text for style, text in tokens if green in style)
    struck = "".join(text for style, text in tokens if re.match(f"(1;)?9;{red}", style))
    assert words + struck == "this that this that</s>"
    assert struck
    assert "\x1b[31m" not in out
    assert "│" not in out[out.index("Row 1") :]


def test_the_page(base: Base, tmp_path: Path) -> None:
    rows = [example(0, user=NASTY, assistant=NASTY), example(1)]
    rows[0] = Example(**{**rows[0].__dict__, "id": HOSTILE})
    text = run(base, tmp_path, rows, max_length=len(tokenize(base.tokenizer(), rows[0]).prompt) + 20)
    assert "<img src=x" not in text
    page = Reader(text)
    assert page.scripts == []
    assert {tag for tag, _ in page.elements} & {"img", "link", "iframe", "a", "style"} == {"a", "style"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("style", "src") for name in attributes), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes) or ""
    assert re.fullmatch(r"default-src 'none'; style-src 'sha256-\S+'; base-uri 'none'; form-action 'none'", policy)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert " ".join(visible(HOSTILE).split()) in page.text
    assert not re.search("[\x1b\u202e\r\ufffd]", text)
    assert "more, all in" not in page.text
    assert page.text.count("Rows of train") == 2


def test_the_pages_tokens_have_their_place_and_id(base: Base, tmp_path: Path) -> None:
    row = example(user="what 中 is it?", assistant="this 😀")
    text = run(base, tmp_path, [row], validation=[])
    tokens = tokenize(base.tokenizer(), row)
    ids = dict(enumerate(tokens.prompt + tokens.completion))
    shown_ids: dict[int, int] = {}
    for places, numbers in re.findall(r'<span title="tokens? ([\d to]+), ids? ([\d, ]+)">', text):
        first, _, last = places.partition(" to ")
        where = range(int(first), int(last or first) + 1)
        shown_ids |= dict(zip(where, map(int, numbers.split(", ")), strict=True))
    assert shown_ids == ids
    assert re.search(r'title="tokens \d+ to \d+, ids \d+, \d+, \d+">中<', text)
    assert "<b>&lt;/s&gt;</b>" in text
    assert text.index('class="tokens prompt"') < text.index('class="tokens supervised"')


def test_clean_up_does_not_change_the_text(base: Base, tmp_path: Path) -> None:
    tokenizer = base.tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    splits = {"train": [example(user="one . two , do n't")], "validation": []}
    preview(tokenizer, splits, max_length=1000, train_on="all", folder=tmp_path, seed=1)
    text = (tmp_path / "preview.html").read_text("utf-8")
    assert "one . two , do n't</s>" in html.unescape("".join(re.findall(r'id \d+">(?:<b>)?([^<]*)<', text)))


NOTES = ["truncates completions", "are left out", "starts with two BOS"]


@pytest.mark.parametrize(
    ("template", "rows", "said"),
    [
        (TEMPLATE, [example()], []),
        (TEMPLATE, [example(), example(1, assistant="x" * 100)], NOTES[:1]),
        (TEMPLATE, [example(), example(1, user="x" * 100)], NOTES[1:2]),
        ("{{ bos_token }}" + TEMPLATE, [example()], NOTES[2:3]),
    ],
)
def test_what_is_wrong_is_said(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, rows: list[Example], said: list[str]
) -> None:
    changed = Base("tiny", base.path, "identity", False, template)
    page = Reader(run(changed, tmp_path, rows, validation=[], max_length=60))
    out = " ".join(capsys.readouterr().out.split())
    assert [note for note in NOTES if note in out] == said
    assert [note for note in NOTES if note in page.text] == said


class CopyingPool:
    """A stand-in for ``ProcessPoolExecutor`` that passes what another process would get: pickled copies."""

    chunks = 0

    def __init__(self, *_: object, initargs: tuple[Any, ...], **__: object) -> None:
        self.function = pickle.dumps(initargs[0])

    def submit(self, _: object, chunk: object) -> Future[Any]:
        CopyingPool.chunks += 1
        result: Future[Any] = Future()
        try:
            result.set_result(pickle.loads(pickle.dumps(pickle.loads(self.function)(copy.deepcopy(chunk)))))
        except Exception as error:
            result.set_exception(pickle.loads(pickle.dumps(error)))
        return result

    def shutdown(self, **_: object) -> None:
        pass


def test_many_rows_are_tokenised_in_processes_with_the_same_result(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [example(number, user=f"what {'is it? ' * (number % 9)}") for number in range(450)]
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", CopyingPool)
    alone = run(base, tmp_path / "alone", rows)
    one_row = partial(prompt_tokens, base.tokenizer())
    prompts = list(tokenize_all(one_row, rows, "test"))
    assert CopyingPool.chunks == 0
    monkeypatch.setattr(prompt, "ALONE", 200)
    assert run(base, tmp_path / "pool", rows) == alone
    assert CopyingPool.chunks == 5
    assert list(tokenize_all(one_row, rows, "test")) == prompts
    rows[440:] = [example(number, user=f"  {number}\n\n{{{{ x }}}}") for number in range(440, 450)]
    changed = Base(
        "tiny",
        base.path,
        "identity",
        False,
        TEMPLATE.replace("message['content']", "message['content'] | replace('x', 'y')"),
    )
    with pytest.raises(ConfigError, match=r"changes the text of 10 of 450 train rows"):
        run(changed, tmp_path / "changed", rows)
