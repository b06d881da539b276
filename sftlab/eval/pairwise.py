"""Ask a judge which of two answers is better: a model on this machine, or behind an OpenAI-compatible endpoint.

Every pair is judged in both orders. Judgements are stored under the judge and its whole prompts, and reused prompt by
prompt: a further contender, or more questions, cost only the pairs that are new.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from sftlab.config import Config, EvalConfig, JudgeConfig
from sftlab.dataset.sandbox import environment
from sftlab.errors import ConfigError, Problem, shown
from sftlab.eval import endpoint
from sftlab.eval import stage as evaluate
from sftlab.eval.extract import compile_pattern, last
from sftlab.eval.prompts import tokenize_prompts
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.model.reasoning import answered
from sftlab.records import Example, single_turn, text_of_turn
from sftlab.runtime.store import Store, key_of

log = logging.getLogger(__name__)

_MARK = re.compile(r"<\|[^|>\n]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|<[be]os>")
"""Special tokens that a rendered prompt contains, and which would be such tokens for the judge, too."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a question."""

    question: str
    reference: str
    first: str
    second: str


@dataclass(frozen=True)
class Judgement:
    """How far the second answer of a pair is preferred (0, ½ or 1) if it is shown second, and if it is shown first.

    None: the judge's text has no verdict.
    """

    forward: float | None
    backward: float | None

    @property
    def score(self) -> float:
        """The preference for the second answer, 0 to 1: the mean over both orders. Without a verdict it is ½."""
        return sum(0.5 if value is None else value for value in (self.forward, self.backward)) / 2


@dataclass
class Pairwise:
    """A judge, and its judgements so far. ``questions`` has the questions by id; those of other rows are cleaned.

    ``folders`` has the stages of the store with its judgements.
    """

    cfg: Config
    questions: Mapping[str, str] = field(default_factory=dict)
    known: dict[Pair, Judgement] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, str]:
        """The folders of the judgements, by names for the record of a run."""
        return {f"judge.{number}" if number > 1 else "judge": str(path) for number, path in enumerate(self.folders, 1)}

    @property
    def judge(self) -> JudgeConfig:
        """The settings of the judge."""
        return self.cfg.eval.judge

    @property
    def name(self) -> str:
        """The name of the judge."""
        return self.judge.model or Path(str(self.judge.name_or_path)).name

    @cached_property
    def _template(self) -> Sequence[object]:
        sandbox = environment()
        return [sandbox.from_string(text) for text in (self.judge.system, self.judge.user)]

    def question(self, name: str, prompt: str) -> str:
        """The question of a row, by its id, or from its rendered prompt."""
        return self.questions.get(name) or _MARK.sub("", prompt).strip()

    def decide(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """Judge pairs in both orders. Equal answers, and a pair with an empty one, are decided without the judge."""
        asked = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        open_pairs = []
        for pair in asked:
            if pair.first == pair.second:
                self.known[pair] = Judgement(0.5, 0.5)
            elif not pair.first or not pair.second:
                self.known[pair] = Judgement(*[float(bool(pair.second))] * 2)
            else:
                open_pairs.append(pair)
        if open_pairs:
            log.info("judge: %s judges %d pairs of answers in both orders", self.name, len(open_pairs))
            rows = [self._row(pair, swapped) for pair in open_pairs for swapped in (False, True)]
            verdicts = [self._verdict(text) for text in self._texts(rows)]
            for place, pair in enumerate(open_pairs):
                forward, backward = verdicts[2 * place : 2 * place + 2]
                self.known[pair] = Judgement(forward, None if backward is None else 1 - backward)
        return [self.known[pair] for pair in pairs]

    def _row(self, pair: Pair, swapped: bool) -> Example:
        first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        # Answers must not contain special tokens of the judge.
        values = {"question": pair.question, "reference": pair.reference, "first": first, "second": second}
        values = {name: text.replace("<|", "< |") for name, text in values.items()}
        system, user = (template.render(values).strip() for template in self._template)  # type: ignore[attr-defined]
        return Example(key_of({**values, "swapped": swapped}), single_turn(system, user, ""), "")

    def _verdict(self, text: str) -> float | None:
        """The preference for the answer that was shown second."""
        found = last(answered(text), compile_pattern(self.judge.pattern))
        return None if found is None else {"A": 0.0, "B": 1.0}.get(found.upper(), 0.5)

    def _texts(self, rows: Sequence[Example]) -> list[str]:
        cfg, judge = self.cfg, self.judge
        store, key = Store(cfg.store), key_of({"rows": [row.prompt for row in rows]})
        changes = {"max_tokens": judge.max_tokens, "temperature": 0.0, "repeats": 1, "forced": False, "logprobs": False}
        settings = cfg.eval.model_copy(update={**changes, "max_rows": None, "task": "exact"})
        if judge.url is not None:
            assert judge.model is not None
            sent = (judge.concurrency, judge.timeout_s, judge.retries)
            at = endpoint.Endpoint(judge.url.rstrip("/"), judge.model, judge.api_key_env, *sent)
            generated = endpoint.make(store, at, rows, key, settings, cfg.seed)
        else:
            generated = self._generated(store, rows, settings)
        self.folders.append(generated.stage.path)
        return [row.completion for row in generated.rows()]

    def _generated(self, store: Store, rows: Sequence[Example], settings: EvalConfig) -> evaluate.Generated:
        cfg, machine = self.cfg, instance.find(self.cfg.instance)
        if settings.dtype == "auto":  # in mode=compare no format is measured
            settings = settings.model_copy(update={"dtype": "float32" if machine.device == "cpu" else "bfloat16"})
        assert self.judge.name_or_path is not None
        judge = models.another(cfg.model, self.judge.name_or_path, self.judge.revision)
        base = models.resolve(judge, store, cfg.seed)
        evaluate.check_engine(base, settings)
        prompts = tokenize_prompts(rows, base, settings, of_judge=True)
        model = evaluate.Model(base.path, base.identity, base.trust_remote_code)
        return evaluate.make(store, model, prompts, settings, machine, cfg.seed)


def pairwise_of(cfg: Config, examples: Sequence[Example] = ()) -> Pairwise | None:
    """The judge of eval.task=judge; None for other tasks."""
    if cfg.eval.task != "judge":
        return None
    return Pairwise(cfg, {row.id: "\n\n".join(map(text_of_turn, row.prompt)) for row in examples})


@dataclass(frozen=True)
class Human:
    """A pair that people have judged: ``preferred`` is the score of the second answer, 0, ½ or 1."""

    pair: Pair
    preferred: float
    group: str | None


def preferences(path: str) -> list[Human]:
    """Read a file of human preferences: JSON lines with ``question``, ``first``, ``second`` and ``preferred``.

    Raises:
        ConfigError: the file cannot be read, or a row does not fit.
    """
    rows, problems = list[Human](), list[Problem]()
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {error}"
        raise ConfigError(Problem("eval.judge.preferences", shown(path), message, "check the path")) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            texts = [values[name] for name in ("question", "first", "second")]
            preferred = {"first": 0.0, "tie": 0.5, "second": 1.0}[values["preferred"]]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a text is missing")
            reference, group = str(values.get("reference") or ""), values.get("group")
            pair = Pair(texts[0].strip(), reference, texts[1].strip(), texts[2].strip())
            rows.append(Human(pair, preferred, None if group is None else str(group)))
        except (ValueError, LookupError, TypeError):
            remedy = 'write {"question": …, "first": …, "second": …, "preferred": "first", "second" or "tie"}'
            problems.append(Problem(f"{path}:{number}", None, f"is not a preference: {line[:80]}", remedy))
    if not rows and not problems:
        problems.append(Problem("eval.judge.preferences", shown(path), "has no rows", "give at least one preference"))
    if problems:
        raise ConfigError(*problems)
    return rows
