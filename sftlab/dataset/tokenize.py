"""Tokenise the examples of a dataset into token ids and labels; all jobs with the same inputs share the result."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftlab.config import Config, Supervised
from sftlab.dataset.arrow_examples import Batch
from sftlab.dataset.parallel import in_order
from sftlab.dataset.prompt import ALONE, attempt, changed_texts, tokenize
from sftlab.dataset.stage import Dataset
from sftlab.dataset.subsets import subset
from sftlab.dataset.token_rows import labels_of, record_batch, write_rows
from sftlab.errors import ConfigError, Problem, shown
from sftlab.model.base import Base
from sftlab.records import IGNORED
from sftlab.results import SplitCounts, TokenCounts
from sftlab.runtime.store import Stage, Store, versions, write_json

log = logging.getLogger(__name__)

COUNTS, GROUPS, SOURCES = "counts.json", "groups.json", "sources.json"
SPLITS = ("train", "validation")


class Lengths(NamedTuple):
    """Lengths of the rows that training reads, each an array of shape (rows,) and in tokens.

    ``rows`` has the lengths of the rows, ``first`` the tokens before the first supervised one, and ``between`` the
    tokens without a loss after it.
    """

    rows: NDArray[np.int32]
    first: NDArray[np.int32]
    between: NDArray[np.int32]


@dataclass(frozen=True)
class Tokenized:
    """The finished stage: the rows of ``train`` and ``validation``, their lengths, and ``counts.json``.

    ``groups.json`` has the group of each validation row; the rows of one conversation are a group. ``sources.json`` has
    the source of each validation row, if there are several.
    """

    stage: Stage

    @property
    def counts(self) -> TokenCounts:
        """Rows and tokens of both splits."""
        return TokenCounts.model_validate_json((self.stage.path / COUNTS).read_text("utf-8"))

    def lengths(self, split: str) -> Lengths:
        """Return the lengths of the rows of a split."""
        return Lengths(*np.load(self.stage.path / f"{split}-lengths.npy"))


def validation_groups(folder: Path) -> list[str | None]:
    """The group of each validation row of a finished stage, in the order of its rows."""
    groups: list[str | None] = json.loads((folder / GROUPS).read_text("utf-8"))
    return groups


def validation_sources(folder: Path) -> list[str] | None:
    """The source of each validation row of a finished stage, in the order of its rows; None without several sources."""
    file = folder / SOURCES
    sources: list[str] | None = json.loads(file.read_text("utf-8")) if file.exists() else None
    return sources


def inputs(dataset_key: str, base: Base, cfg: Config) -> Mapping[str, Any]:
    """What the token ids depend on."""
    part = {} if cfg.train.data_share == 1 else {"data_share": cfg.train.data_share, "seed": cfg.dataset.seed}
    return part | {
        "version": 8,
        "dataset": dataset_key,
        "tokenizer": base.identity,
        "libraries": versions("transformers", "tokenizers", "jinja2"),
        "max_length": cfg.train.max_length,
        "allow_truncated_completion": cfg.train.allow_truncated_completion,
        "train_on": cfg.dataset.supervised(),
    }


def make(store: Store, dataset: Dataset, base: Base, cfg: Config) -> Tokenized:
    """Tokenise training and validation rows, with a loss on assistant turns only.

    Raises:
        ConfigError: ``max_length`` truncates a completion (unless allowed), no prompt fits, or the chat template
            changes a text or does not end a turn.
    """

    def build(folder: Path) -> None:
        tokenizer = base.tokenizer()
        counts: dict[str, SplitCounts] = {}
        turn_ends: set[int] = set()
        prompt_bos = 0
        worker = Worker(tokenizer, cfg.dataset.supervised(), cfg.train.max_length)
        parts, rows = subset({split: dataset.split(split) for split in SPLITS}, cfg.train.data_share, cfg.dataset.seed)
        batches = chain.from_iterable(parts)
        few = sum(rows.values()) <= ALONE
        # One start of processes for both splits.
        with closing(in_order(worker, batches, sum(rows.values()) if few else 0)) as tokenized:
            for split in SPLITS:
                found = _Split(split, cfg.train.max_length, rows[split])
                write_rows(folder, split, found.batches(tokenized, tokenizer.bos_token_id))
                found.check(cfg.train.allow_truncated_completion)
                np.save(folder / f"{split}-lengths.npy", np.stack(found.used()))
                if split == "validation":
                    write_json(folder / GROUPS, [group for part in found.parts for group in part.groups])
                    if cfg.dataset.sources is not None:
                        write_json(folder / SOURCES, [source for part in found.parts for source in part.sources])
                counts[split], turn_ends = found.counts(), turn_ends | found.ends
                prompt_bos = found.prompt_bos if split == "train" else prompt_bos
                log.info(
                    "tokens: %s: %s rows, %s tokens, %s of them supervised; longest row %s tokens, truncated rows %s",
                    split,
                    *(
                        f"{getattr(counts[split], name):,}"
                        for name in ("rows", "tokens", "supervised", "longest", "truncated")
                    ),
                )
        record = TokenCounts(
            train=counts["train"],
            validation=counts["validation"],
            prompt_bos=prompt_bos,
            turn_ends=sorted(turn_ends),
        )
        write_json(folder / COUNTS, record.model_dump())

    return Tokenized(store.stage("tokens", inputs(dataset.stage.key, base, cfg), build))


@dataclass
class TokenizedBatch:
    """A tokenised batch of ``examples`` examples.

    ``rows`` has the rows that have a supervised token within max_length, truncated to it, ``groups`` their groups,
    ``sources`` their sources, and ``used`` their lengths, an array of shape (3, rows). ``whole`` has the length of
    every row before the truncation and the tokens before its first supervised one, an array of shape (2, rows).
    """

    examples: int
    rows: Any
    groups: list[str | None]
    sources: list[str | None]
    used: NDArray[np.int32]
    whole: NDArray[np.int32]
    ends: set[int]
    dedented: list[str]
    divided: list[int]  # rows of each conversation that became several
    longest: tuple[int, str]
    first: list[int]  # the tokens before the first supervised one of the first row
    problems: list[Problem]


@dataclass(frozen=True)
class Worker:
    """Tokenise batches of examples, perhaps in another process."""

    tokenizer: Any
    train_on: Supervised
    max_length: int

    def __call__(self, batch: Batch) -> TokenizedBatch:
        """Tokenise a batch."""
        examples = batch.examples()
        found, problems = attempt(lambda example: tokenize(self.tokenizer, example, self.train_on), examples)
        rows = [row for tokens in found for row in tokens]
        groups = [
            example.group or (example.id if len(tokens) > 1 else None)
            for example, tokens in zip(examples, found, strict=False)  # a changed text has no tokens, and stops the run
            for _ in tokens
        ]
        sources = [
            example.source and intern(example.source)  # one text for all rows
            for example, tokens in zip(examples, found, strict=False)
            for _ in tokens
        ]
        whole = [(len(row.ids), row.runs[0]) for row in rows]
        fits = [first < self.max_length for _, first in whole]
        used = [*compress(rows, fits)]
        ids = [np.array(row.ids[: self.max_length], dtype=np.int32) for row in used]
        labels = [labels_of(row, own) for row, own in zip(used, ids, strict=True)]
        ignored = [int(np.count_nonzero(row == IGNORED)) for row in labels]
        lengths = [(len(row), one.runs[0], no - one.runs[0]) for row, one, no in zip(ids, used, ignored, strict=True)]
        longest = max(rows, key=lambda row: len(row.ids), default=None)
        return TokenizedBatch(
            examples=len(examples),
            rows=record_batch(ids, labels),
            groups=[*compress(groups, fits)],
            sources=[*compress(sources, fits)],
            used=np.array(lengths, dtype=np.int32).reshape(-1, 3).T,
            whole=np.array(whole, dtype=np.int32).reshape(-1, 2).T,
            ends=set().union(*(row.ends for row in rows)),
            dedented=[row.id for row in rows if row.dedented],
            divided=[len(tokens) for tokens in found if len(tokens) > 1],
            longest=(0, "") if longest is None else (len(longest.ids), longest.id),
            first=rows[0].ids[: rows[0].runs[0]] if rows else [],
            problems=problems,
        )


@dataclass
class _Split:
    """What is known about a split while its rows are written."""

    name: str
    max_length: int
    examples: int
    parts: list[TokenizedBatch] = field(default_factory=list)  # without their rows
    ends: set[int] = field(default_factory=set)
    longest: tuple[int, str] = (0, "")
    prompt_bos: int = 0
    content: Any = field(default_factory=lambda: [hashlib.sha256(), hashlib.sha256()])

    def batches(self, tokenized: Iterator[TokenizedBatch], bos: int | None) -> Iterator[Any]:
        """Yield the rows as record batches; takes as many of ``tokenized`` as the split has examples.

        Raises:
            ConfigError: the chat template changes texts; has a problem for each row.
        """
        from tqdm.auto import tqdm

        dedented, divided, problems = list[str](), list[int](), list[Problem]()
        with tqdm(total=self.examples, desc=f"tokenizing {self.name}", leave=False, delay=3) as bar:
            done = 0
            while done < self.examples:
                part = next(tokenized)
                done += part.examples
                if not self.parts and bos is not None:
                    self.prompt_bos = part.first.count(bos)
                self.ends |= part.ends
                self.longest = max(self.longest, part.longest, key=lambda longest: longest[0])
                dedented += part.dedented
                divided += part.divided
                problems += part.problems
                for hashed, column in zip(self.content, part.rows.columns, strict=True):
                    hashed.update(column.flatten().to_numpy().tobytes())
                yield part.rows
                self.parts.append(replace(part, rows=None))
                bar.update(part.examples)
        if problems:
            raise changed_texts(problems, self.examples, self.name)
        _report(self.name, self.examples, dedented, divided)

    def used(self) -> Lengths:
        """Return the lengths of the rows that training reads."""
        return Lengths(*np.concatenate([part.used for part in self.parts], axis=1))

    def whole(self) -> NDArray[np.int32]:
        """Return, for every row before the truncation, its length and the tokens before the first supervised one."""
        return np.concatenate([part.whole for part in self.parts], axis=1)

    def check(self, allowed: bool) -> None:
        """Check that rows have a target within ``max_length``, and that it truncates none unless ``allowed``.

        Raises:
            ConfigError: no prompt fits, or a completion would be truncated.
        """
        rows, first = self.whole()
        total, fitting = len(rows), first < self.max_length
        longest, name = self.longest
        key, value = "train.max_length", shown(self.max_length)
        if not fitting.any():
            message = f"is not longer than the shortest prompt ({first.min()} tokens, {self.name})"
            raise ConfigError(Problem(key, value, message, f"set at least {longest}, the length of the longest row"))
        over = int((fitting & (rows > self.max_length)).sum())
        if over and not allowed:
            message = (
                f"truncates the completion of {over} of {total} {self.name} rows (the longest, {name}, has {longest} "
                "tokens)"
            )
            remedy = f"set train.max_length={longest}, or allow it with train.allow_truncated_completion=true"
            raise ConfigError(Problem(key, value, message, remedy))
        if left_out := total - int(fitting.sum()):
            log.warning(
                "tokens: %d of %d %s rows are left out: their prompts fill train.max_length=%d (the longest row has %d "
                "tokens)",
                left_out,
                total,
                self.name,
                self.max_length,
                longest,
            )

    def counts(self) -> SplitCounts:
        """Return the counts of the split."""
        (rows, _), used = self.whole(), self.used()
        left_out = len(rows) - len(used.rows)
        for hashed in self.content:
            hashed.update(used.rows.tobytes())
        return SplitCounts(
            rows=len(used.rows),
            tokens=int(used.rows.sum()),
            supervised=int((used.rows - used.first - used.between).sum()),
            truncated=int((rows > self.max_length).sum()) - left_out,
            left_out=left_out,
            longest=int(used.rows.max()),
            content="".join(hashed.hexdigest()[:16] for hashed in self.content),
        )


def _report(split: str, examples: int, dedented: list[str], divided: list[int]) -> None:
    if divided:
        log.info(
            "tokens: %s: the chat template writes an earlier assistant turn in another way than the last one. %d "
            "conversations are trained as %d rows, one for each assistant turn with its own prompt",
            split,
            len(divided),
            sum(divided),
        )
    if dedented:
        log.warning(
            "model.chat_template: the template removes the indentation of the first line of the assistant text in %d "
            "of %d %s rows (first: %s). If it matters, as in code, set model.chat_template to a Jinja file that does "
            "not trim the text, or start the text of dataset.assistant with another line, such as ```",
            len(dedented),
            examples,
            split,
            dedented[0],
        )
