"""Log-probabilities of the option letters: after a completion without an answer, and directly after the question.

The text is continued with ``Therefore, the answer is (``. After a completion, the most likely letter is the model's
forced choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftlab.config import EvalConfig
from sftlab.errors import ConfigError, Problem
from sftlab.eval.answers import Question
from sftlab.eval.engines import Engine, Settings
from sftlab.eval.extract import compile_pattern, strict
from sftlab.eval.scorers import scorer
from sftlab.model.reasoning import answered, unclosed

FORCING = "\n\nTherefore, the answer is ("


def answer_pattern(cfg: EvalConfig) -> str | None:
    """Return the pattern of an answer; a completion without a match gets a forced choice. None: forced choices are off.

    Errors in the pattern were reported by validation.
    """
    return cfg.pattern if cfg.forced and scorer(cfg).lettered else None


def with_logprobs(cfg: EvalConfig) -> bool:
    """Return whether the letters directly after each question are asked for."""
    return cfg.logprobs and scorer(cfg).lettered


def needs_choice(question: Question, pattern: str) -> bool:
    """Return whether no answer can be extracted from a question's completion. Reasoning does not count."""
    assert question.completion is not None
    text = answered(question.completion, question.prompt, truncated=question.finish_reason == "length")
    return strict(text, compile_pattern(pattern), question.choices) is None


def choose_letters(
    engine: Engine, settings: Settings, questions: Sequence[Question]
) -> Iterator[tuple[Question, dict[str, float]]]:
    """Yield each question with the log-probability of every letter after its own text, in the order of completion.

    The text is continued as text, so that each tokenizer writes the letter in its own way. Letters whose continuations
    share tokens are distinguished at the next position where they differ; a letter's log-probability is the sum over
    these positions.
    """
    from transformers import AutoTokenizer

    if not questions:
        return
    tokenizer = AutoTokenizer.from_pretrained(
        settings.model, trust_remote_code=settings.trust_remote_code, local_files_only=True
    )
    branches = [_branch(tokenizer, question, settings.max_model_len) for question in questions]
    known: dict[tuple[int, int], dict[str, float]] = {}
    while branches:
        undecided = []
        tokens = [list(dict.fromkeys(ids[0] for ids in branch.options.values())) for branch in branches]
        for place, logprobs in engine.logprobs([branch.prompt for branch in branches], tokens):
            branch = branches[place]
            question = branch.question
            letters = known.setdefault((question.repeat, question.row), {})
            for token, logprob in logprobs.items():
                left = {letter: ids for letter, ids in branch.options.items() if ids[0] == token}
                if len(left) == 1:
                    letters[next(iter(left))] = branch.logprob + logprob
                else:
                    shared = _shared(left)
                    rest = {letter: ids[len(shared) :] for letter, ids in left.items()}
                    undecided.append(_Branch(question, branch.prompt + shared, rest, branch.logprob + logprob))
            if len(letters) == len(question.choices):
                yield question, {letter: letters[letter] for letter in question.choices}
        branches = undecided


@dataclass(frozen=True)
class _Branch:
    """A question, the prompt in token ids, the ids with which each letter continues it, and its log-probability."""

    question: Question
    prompt: list[int]
    options: dict[str, list[int]]
    logprob: float = 0.0


def _branch(tokenizer: Any, question: Question, max_model_len: int) -> _Branch:
    """Build the prompt: the question's prompt, its completion and ``FORCING``."""
    assert question.completion is not None
    text = question.completion.rstrip()
    # Truncated reasoning is closed first: what follows must count as the answer.
    end = unclosed(text, question.prompt, truncated=question.finish_reason == "length")
    text += (f"\n{end}" if end else "") + FORCING
    options = continuations(tokenizer, text, question.choices)
    shared = _shared(options)
    # The longest continuation must fit too. A text that fills the context loses its beginning, since the model
    # continues its end.
    space = max_model_len - len(question.token_ids) - max(map(len, options.values())) + len(shared)
    prompt = question.token_ids + shared[max(0, len(shared) - space) :]
    return _Branch(question, prompt, {letter: ids[len(shared) :] for letter, ids in options.items()})


def continuations(tokenizer: Any, text: str, letters: str) -> dict[str, list[int]]:
    """Tokenise a text that ends in ``FORCING``, continued with each letter.

    Raises:
        ConfigError: the tokenizer gives two letters the same tokens.
    """
    options = {letter: list(tokenizer(f"{text}{letter})", add_special_tokens=False)["input_ids"]) for letter in letters}
    for letter, ids in options.items():
        same = next((other for other in options if other != letter and options[other][: len(ids)] == ids), None)
        if same is not None:
            raise ConfigError(
                Problem(
                    "eval.forced",
                    "true",
                    f"the tokenizer gives the choices {letter!r} and {same!r} the same tokens, so the model "
                    "cannot choose between them",
                    "set eval.forced=false and eval.logprobs=false, or other letters with dataset.choices",
                )
            )
    return options


def _shared(options: Mapping[str, list[int]]) -> list[int]:
    """Return the tokens that all continuations begin with; none of them is the beginning of another."""
    differ = next(place for place, ids in enumerate(zip(*options.values(), strict=False)) if len({*ids}) > 1)
    return next(iter(options.values()))[:differ]
