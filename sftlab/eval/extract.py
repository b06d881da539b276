"""Extract the answer from the text that a model wrote.

``strict`` takes the first match of the configured pattern, and gives the headline number. ``last`` takes the last
match, and ``lenient`` what a person would take for the answer. If they disagree, the difference between two models may
be one of form, not of knowledge.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import regex

from sftlab.dataset.sandbox import matches_within_limit
from sftlab.errors import ConfigError, Problem
from sftlab.eval.lenient import lenient

LAYERS = 50  # pairs of quotes or emphasis marks that ``normalise_answer`` removes


@cache
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Compile an answer pattern for ``strict`` and ``last``. It is case-sensitive unless it contains ``(?i)``.

    Raises:
        ConfigError: the pattern does not compile, or does not have exactly one capturing group.
    """
    keys = ("eval.pattern",)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        message = f"answer pattern {pattern!r} is not a regular expression: {error.msg}{where}"
        remedy = r"a literal parenthesis is written \( and in YAML the pattern belongs in single quotes"
        raise ConfigError(Problem("", None, message, remedy, keys)) from error
    except OverflowError as error:
        message = f"answer pattern {pattern!r} has a repetition with too large a count: {error}"
        raise ConfigError(Problem("", None, message, "lower the count", keys)) from error
    if compiled.groups != 1:
        message = f"answer pattern {pattern!r} has {compiled.groups} capturing groups"
        remedy = r"exactly one must capture the answer, as in the answer is\s*\(([A-Z])\); write any other as (?:...)"
        raise ConfigError(Problem("", None, message, remedy, keys))
    try:
        return regex.compile(pattern)  # unlike re, it supports a time limit
    except regex.error as error:
        message = f"answer pattern {pattern!r} is not a regular expression: {error}"
        raise ConfigError(Problem("", None, message, "rewrite it", keys)) from error


@cache
def probe(pattern: str) -> None:
    """Try an answer pattern on long texts of a single character, which detects most patterns that backtrack forever.

    Raises:
        ConfigError: the pattern does not compile, or takes longer than ``SECONDS``.
    """
    compiled = compile_pattern(pattern)
    for character in dict.fromkeys("a1 \n(" + re.sub(r"\\.", "", pattern)):
        last(character * 2000 + "\0", compiled)


def strict(text: str, pattern: regex.Pattern[str], choices: str = "") -> str | None:
    """Return the answer in the first match of a compiled pattern; None without a match.

    A single letter is returned as the choice that it names (``choice``), a longer answer unchanged. A letter that is
    not one of the choices is returned too: the answer has the right form, and is wrong.

    Raises:
        ConfigError: the pattern backtracks for longer than ``SECONDS``.
    """
    return next(_matches(text, pattern, choices), None)


def last(text: str, pattern: regex.Pattern[str], choices: str = "") -> str | None:
    """Return the answer in the last match, which is the conclusion of a text that reasons first. See ``strict``."""
    answers = deque(_matches(text, pattern, choices), maxlen=1)
    return answers[0] if answers else None


def _matches(text: str, pattern: regex.Pattern[str], choices: str) -> Iterator[str]:
    for match in matches_within_limit(pattern.finditer, text, pattern.pattern):
        if answer := (match[1] or "").strip():
            yield choice(answer, choices)


def choice(answer: str, choices: str) -> str:
    """Return the choice that a single letter names in either case, the letter in upper case if it names none.

    A longer answer is returned unchanged.
    """
    if len(answer) > 1 or answer in choices:
        return answer
    return next((letter for letter in choices if letter.casefold() == answer.casefold()), answer.upper())


def read(
    text: str, pattern: regex.Pattern[str], choices: str, options: Mapping[str, str] | None
) -> dict[str, str | None]:
    """Return the answer by each reading: ``strict``, ``last`` and ``lenient``.

    The lenient reading supports the letters A to Z. For digits and words it equals ``last``.
    """
    final = last(text, pattern, choices)
    free = final
    if choices.isascii() and choices.isalpha():
        upper = {letter.upper(): option for letter, option in (options or {}).items()}
        free = lenient(text, choices.upper(), upper)
    return {
        "strict": strict(text, pattern, choices),
        "last": final,
        "lenient": None if free is None else choice(free, choices),
    }


def likeliest(logprobs: Mapping[str, float]) -> str:
    """Return the most likely letter, the first of equal ones."""
    return max(logprobs, key=lambda letter: logprobs[letter])


def can_read(pattern: str, answer: str) -> bool:
    """Return whether the group of a pattern can match an answer, whatever the pattern requires around the group.

    The case of the answer is ignored, as it is when answers are compared.
    """
    group = _group(pattern)
    cases = {answer, answer.upper(), answer.lower(), answer.capitalize()}
    # White space around an answer within the group is stripped.
    spaced = [f"{before}{case}{after}" for case in cases for before in ("", " ") for after in ("", " ", "\n")]
    return group is None or any(group.fullmatch(text) for text in spaced)


@cache
def _group(pattern: str) -> re.Pattern[str] | None:
    """Return the group of a pattern without look-arounds and anchors, compiled with the flags that apply to it.

    Returns None if the tree of Python's parser has an unexpected structure.
    """
    from re import _compiler, _parser  # type: ignore[attr-defined]

    tree = _parser.parse(pattern)

    def search(node: Any, flags: int) -> Any:
        if isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "SUBPATTERN":
            number, added, removed, inner = node[1]
            flags = (flags | added) & ~removed
            return (inner, flags) if number == 1 else search(inner, flags)
        parts = node if isinstance(node, tuple | list | _parser.SubPattern) else ()
        return next((group for part in parts if (group := search(part, flags))), None)

    def bare(node: Any) -> Any:
        if isinstance(node, _parser.SubPattern):
            kept = [part for part in node.data if str(part[0]) not in ("ASSERT", "ASSERT_NOT", "AT")]
            return _parser.SubPattern(node.state, [bare(part) for part in kept])
        return type(node)(map(bare, node)) if type(node) in (tuple, list) else node

    try:
        inner, flags = search(tree, tree.state.flags)
        compiled: re.Pattern[str] = _compiler.compile(bare(inner), flags)
    except (re.error, AttributeError, LookupError, TypeError, ValueError):
        return None
    return compiled


def with_group(pattern: str, group: str) -> str | None:
    """Replace the group of a pattern; None if it has no group, or one with parentheses in it."""
    own = re.compile(r"(?<!\\)\((?:\?P<\w+>|(?!\?))((?:[^()\\\[]|\\.|\[[^\]]*\])*)\)")
    replaced, count = own.subn(lambda _: f"({group})", pattern)
    return replaced if count == 1 else None


def normalise_answer(text: str) -> str:
    """Normalise an answer for an exact match.

    Case is folded and white space collapsed. Removed from the outside are a code fence with its language, pairs of
    quotes, backticks or emphasis marks, and closing punctuation. Signs inside and at the front stay: "-5" differs from
    "5", and "50%" from "50". A text of signs only keeps them.
    """
    text = " ".join(unfenced(text).casefold().split())
    bare = text
    for _ in range(LAYERS):  # most texts have one, but a model stuck on a sign writes thousands
        shorter = _WRAPPED.sub(lambda pair: pair[2] or pair[3], bare.rstrip(" .,;:!?")).strip()
        if shorter == bare:
            break
        bare = shorter
    return bare or text


def unfenced(text: str) -> str:
    """Strip white space around a text, and the code fence that encloses the whole text."""
    text = text.strip()
    if (fence := _FENCE.match(text)) and text.endswith(("```", "~~~")) and len(text) >= fence.end() + 3:
        return text[fence.end() : -3].strip()
    return text


_FENCE = re.compile(r"(?:```|~~~)[^\S\n]{0,20}[\w+#-]{0,40}[^\S\n]{0,20}\n")
_WRAPPED = re.compile(r"^(?:(\*\*|__|[*_`\"'])(.+)\1|[“‘«](.+)[”’»])$", re.DOTALL)
