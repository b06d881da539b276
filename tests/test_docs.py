"""Commands in docs/ and README.md: their keys exist, and those that need no GPU, hub or cluster work."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import compose, first, skip_without_plugins, write_rows
from omegaconf import OmegaConf
from test_cli import whole
from test_scorers import CONTAINS

from sftlab.config import Config
from sftlab.hydra_app.arguments import options_first, parse_options
from sftlab.hydra_app.compose import Composer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# What a command may need, as in ```console title="Needs: a GPU, the hub": those commands are composed, and not run.
NEEDS = {"a GPU", "the hub", "a cluster", "minutes", "your files", "Optuna", "the scorer", "the tracker"}
FENCE = re.compile(r'^```(\w*)(?: title="Needs: ([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?python -m sftlab((?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """A command of a page, and what it needs."""

    page: str
    line: str
    needs: frozenset[str]
    language: str

    @property
    def arguments(self) -> list[str]:
        words = shlex.split(self.line.replace("\\\n", " "), comments=True)
        return ["--config-dir", "own", *words] if "dataset=mine" in words and "--config-dir" not in words else words

    @property
    def is_run(self) -> bool:
        return self.language == "console" and not self.needs


def shown() -> list[Shown]:
    """The commands in blocks and in text, page by page in the order of the site."""
    found = []
    for path in [*pages(), ROOT / "README.md"]:
        text = path.read_text("utf-8")
        for language, needs, block in FENCE.findall(text):
            if language != "text":  # shows a message about a command that is refused
                words = frozenset(filter(None, needs.split(", ")))
                found += [Shown(path.name, line, words, language) for line in COMMAND.findall(block)]
        inline = re.findall(r"`python -m sftlab( [^`]*)`", FENCE.sub("", text))
        found += [Shown(path.name, line, frozenset(), "") for line in inline]
    return [one for one in found if "…" not in one.line]


def pages() -> list[Path]:
    """The pages in the order of the site."""
    listed: list[dict[str, list[str]]] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    return [DOCS / page for section in listed for group in section.values() for page in group]


SHOWN = list(dict.fromkeys(shown()))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the commands name."""
    (mine,) = re.findall(
        r"^```yaml\n(.*?)^```", (DOCS / "dataset-files.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "own" / "dataset").mkdir(parents=True)
    (tmp_path / "own" / "dataset" / "mine.yaml").write_text(mine, "utf-8")
    turns = [(f"Question {at}: what is {at} plus {at + 1}?", str(2 * at + 1)) for at in range(40)]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]
    write_rows(tmp_path / "data.jsonl", chats)
    for name in ("base", "finetuned"):
        answers = (ROOT / "tests" / "golden" / f"choice_{name.replace('base', 'baseline')}.jsonl").read_text("utf-8")
        (tmp_path / f"{name}.jsonl").write_text(answers, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_is_in_the_navigation() -> None:
    assert sorted(page.name for page in pages()) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_scorer_of_the_tutorial_is_the_tested_one() -> None:
    assert f"```python{CONTAINS}```" in (DOCS / "adding-a-scorer.md").read_text("utf-8")


def test_pages_have_commands_and_say_what_they_need() -> None:
    assert len(SHOWN) > 50
    assert {need for one in SHOWN for need in one.needs} <= NEEDS
    assert sum(one.is_run for one in SHOWN) > 8


def skip_unknown(one: Shown) -> None:
    """Skip what this checkout or environment does not have: a launcher, a scorer that the reader adds."""
    skip_without_plugins(one.arguments)
    if "the scorer" in one.needs:
        pytest.skip("the reader adds this scorer")


@pytest.mark.parametrize("one", SHOWN, ids=lambda one: f"{one.page}:{one.line.strip()[:60]}")
def test_every_key_of_a_command_exists(one: Shown, files: Path) -> None:
    skip_unknown(one)
    arguments = options_first([word for word in one.arguments if word != "--version"])
    options = parse_options(arguments)
    overrides = [first(word) if options.multirun else word for word in options.overrides]
    composed = Composer(options, []).compose(overrides) if options.config_dir else compose(*overrides)
    assert Config.model_validate(OmegaConf.to_container(composed, resolve=True)).name


def test_every_key_in_the_text_exists() -> None:
    reference = (DOCS / "configuration.md").read_text("utf-8")
    sections = "clean|dataset|eval|export|hub|instance|merge|model|peft|plan|runs|select|serve|train|tracking"
    missing = []
    for path in [*pages(), ROOT / "README.md"]:
        named = re.findall(rf"`((?:{sections})\.\w+)(?:\.\w+)*(?:=[^`]*)?`", path.read_text("utf-8"))
        missing += [f"{path.name}: {key}" for key in named if not re.search(rf"\| `{key}[`.]", reference)]
    assert missing == []


def test_every_file_that_the_text_names_exists() -> None:
    own = {"conf/dataset/mine.yaml", "sftlab/eval/scorers/contains.py"}  # which the reader writes
    missing = []
    for path in pages():
        named = re.findall(r"(?<![\w./-])(?:conf|docs|locks|scripts|sftlab|tests)/[\w./*-]*\w", path.read_text("utf-8"))
        missing += [f"{path.name}: {name}" for name in {*named} - own if not list(ROOT.glob(name))]
    assert missing == []


def test_examples_of_messages_are_those_that_are_printed() -> None:
    printed = (ROOT / "tests" / "golden" / "messages.txt").read_text("utf-8")
    examples = re.findall(r"^```text\n(.*?)^```$", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(examples) > 4
    assert [example for example in examples if f"\n{example}" not in f"\n{printed}"] == []


@pytest.mark.smoke  # runs, with a tiny model
def test_commands_work_in_the_order_of_the_pages(files: Path) -> None:
    for one in SHOWN:
        if one.is_run:
            extra = [] if "+debug=fast" in one.arguments or "--cfg" in one.arguments else ["tracking=none"]
            done = whole(files, *one.arguments, *extra)
            assert done.returncode == 0, f"{one.page}: {one.line}\n{done.stderr}"
    assert (files / "outputs" / "fast" / "report.html").is_file()
