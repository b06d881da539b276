"""Reasoning in a completion: where a model thinks aloud, by the markers of its chat template, and what it answers then.

Text within ``<think>…</think>`` and the like is not an answer, and a block that never ends contains none. A marker
that a text only mentions, in quotes or in code, is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_NAME = (
    r"(?:[a-z0-9]+[:_])?(?:think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis|rationale|cot"
    r"|antthinking|chain_of_thoughts?|monologue)(?:_[a-z0-9_]+)?"
)

# Opening and closing marks by family; a family's name is that of its group.
_OPEN = {
    "pangu": r"\[unused16\]",  # openPangu
    "tag": rf"<(?P<open>{_NAME})(?:\s[^<>]*)?>",  # DeepSeek, Qwen, and with a prefix Seed and others
    "bracket": r"\[THINK\]",  # Mistral
    "cohere": r"<\|START_THINKING\|>",
    "thought": r"<\|begin_of_thought\|>",
    "diamond": r"◁think▷",  # Kimi
    "unused": r"<unused94>(?:thought\b)?",  # MedGemma
    "inner": r"<\|inner_prefix\|>",  # Apertus
    "working": r"<start_working_out>",  # Unsloth's examples
    "thinking": r"<\|thinking\|>",
    "solar": r"<\|think\|>",
    "pipe": r"<\|channel>(?:thought\b)?",  # Gemma
    "channel": r"<\|channel\|>\s*(?:analysis|commentary)\b[^<]*<\|message\|>",  # gpt-oss
}
_CLOSE = {
    "pangu": r"\[unused17\]",
    "tag": rf"</(?P<close>{_NAME})\s*>",
    "bracket": r"\[/THINK\]",
    "cohere": r"<\|END_THINKING\|>",
    "thought": r"<\|end_of_thought\|>",
    "diamond": r"◁/think▷",
    "unused": r"<unused95>",
    "inner": r"<\|inner_suffix\|>",
    "working": r"</?end_working_out>|</start_working_out>",
    "thinking": r"<\|/thinking\|>",
    "solar": r"(?:<\|end\|>\s*)?(?:<\|begin\|>\s*assistant\s*)?<\|content\|>|<\|/think\|>",
    "pipe": r"<channel\|>",
    "channel": r"<\|channel\|>\s*final\b[^<]*<\|message\|>",
}
_OPENING = {
    "pangu": "[unused16]",
    "bracket": "[THINK]",
    "cohere": "<|START_THINKING|>",
    "thought": "<|begin_of_thought|>",
    "diamond": "◁think▷",
    "unused": "<unused94>",
    "inner": "<|inner_prefix|>",
    "working": "<start_working_out>",
    "thinking": "<|thinking|>",
    "pipe": "<|channel>",
}
_CLOSING = {
    "pangu": "[unused17]",
    "bracket": "[/THINK]",
    "cohere": "<|END_THINKING|>",
    "thought": "<|end_of_thought|>",
    "diamond": "◁/think▷",
    "unused": "<unused95>",
    "inner": "<|inner_suffix|>",
    "working": "<end_working_out>",
    "thinking": "<|/thinking|>",
    "solar": "<|end|><|begin|>assistant<|content|>",
    "pipe": "<channel|>",
    "channel": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "granite": "\n\nHere is my response:",
}
_MARK = re.compile(
    "(?=[<◁[])(?:"  # one look at most places of a long text
    + "|".join(
        f"(?P<{kind}_{family}>{source})"
        for kind, sources in (("opens", _OPEN), ("closes", _CLOSE))
        for family, source in sources.items()
    )
    + ")",
    re.IGNORECASE,
)
_OPEN_AT_END = re.compile(rf"(?:{'|'.join(_OPEN.values())})\s*\Z", re.IGNORECASE)
# Text around an answer that does not belong to it.
_AROUND = re.compile(
    r"<\|(?:START|END)_RESPONSE\|>|<\|(?:begin|end)_of_solution\|>|<\|(?:return|end)\|>(?:\s*<\|start\|>assistant)?",
    re.IGNORECASE,
)
# Reasoning that words mark at the start of a completion, and what ends it.
_WORDS = {
    # gpt-oss, where its special tokens were left out of the text. "analysis of the case" is prose.
    "channel": re.compile(
        r"\s*(?P<turn>assistant)?analysis(?!.*<\|channel\|>)(?:.*?(?P<end>assistantfinal)|(?(turn)|(?:"
        r"[^\s.,:;!?)*_-]|\n|[ \t]+(?:[A-Z\"'(\d]|(?:we|let|need|okay|ok|the user|user)\b))))",
        re.DOTALL,
    ),
    "granite": re.compile(
        r"\s*here(?:'s| is) my thought process:(?:.*?(?P<end>here(?:'s| is) my response:))?", re.DOTALL | re.IGNORECASE
    ),
}
_QUOTES = {"`": "`", '"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“"}
# What stands right before and behind a mark that is only spoken of.
_MENTIONED = re.compile(
    r"\b(?:a|an|and|any|as|between|by|called|each|every|in|inside|its?|like|mark|marker|my|named|no|not|of|or|tags?|the"
    r"|this|to|token|with|within|without|word|your"
    r"|(?:add|clos|contain|emit|includ|insert|omit|open|output|print|put|see|skip|us|writ)(?:e|s|es|ed|t?ing)?|wrote)\Z",
    re.IGNORECASE,
)
_MENTION_ENDS = re.compile(
    r"[,.;:!?)](?!\.)|\s*(?:and|or|tags?|blocks?|marks?|markers?|tokens?|sections?|here)\b", re.IGNORECASE
)
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)

# Parts of marks that are tokens of their own.
_PIECES = {"<|channel|>", "<|message|>", "<|start|>"}


@dataclass(frozen=True)
class _Mark:
    start: int
    end: int
    opens: bool
    name: str  # the family, or the opening tag without its attributes


def answered(text: str, prompt: str = "", *, truncated: bool = False) -> str:
    """The completion without its reasoning, "" where it ends within it.

    Blocks may follow each other and stand within each other. Where the prompt has opened one, the completion begins
    within it. A closing mark that nothing opened ends reasoning, too. Of a ``truncated`` completion every mark that
    nothing closes opens a block; elsewhere the text may only mention it.
    """
    return _split(text, prompt, truncated)[0]


def unclosed(text: str, prompt: str = "", *, truncated: bool = False) -> str:
    """The mark that would end the reasoning in which a completion ends; "" where it ends in no such block."""
    return "".join(_closing(name) for name in reversed(_split(text, prompt, truncated)[1]))


def opened_by_prompt(text: str) -> str | None:
    """The mark with which the prompt of a completion must have ended, as the completion only closes its block.

    "" where the completion closes none that way, and None where it has no marks at all.
    """
    if any(words.match(text) for words in _WORDS.values()) or not (found := list(_found(text, False, False))):
        return "" if _MARK.search(text) else None
    first = found[0]
    if first.opens or first.name in ("channel", "solar"):  # which say of themselves that the answer begins
        return ""
    return _OPENING.get(first.name, first.name)


def names_mark(pattern: str) -> bool:
    """Whether a regular expression looks for a reasoning mark itself."""
    return _MARK.search(pattern.replace("\\", "")) is not None


def begun(prompt: str) -> str:
    """The opening mark that a prompt ends with, and the white space after it; "" where it ends with none."""
    opened = _OPEN_AT_END.search(prompt)
    return opened[0] if opened else ""


def without_marks(text: str) -> str:
    """A text without its reasoning marks; what stands between them stays."""
    return _MARK.sub("", text)


def laid_out(text: str) -> list[str]:
    """The reasoning marks of a text, each once, with the line breaks around it, or the spaces where there are none."""
    around = []
    for mark in _MARK.finditer(text):
        before, after = text[: mark.start()], text[mark.end() :]
        spaces = before[len(before.rstrip()) :], after[: len(after) - len(after.lstrip())]
        left, right = ("\n" * space.count("\n") or space for space in spaces)
        around.append(left + mark[0] + right)
    return list(dict.fromkeys(around))


def marks(tokens: Iterable[str]) -> set[str]:
    """The tokens that are reasoning marks or parts of one, which a completion's text needs."""
    found = set(tokens)
    return {token for token in found if _MARK.fullmatch(token)} | (found & _PIECES if "<|channel|>" in found else set())


def _closing(name: str) -> str:
    return _CLOSING.get(name) or f"</{name[1:]}"


def _split(text: str, prompt: str, truncated: bool) -> tuple[str, list[str]]:
    """Split off reasoning: the remaining text, and the blocks open at its end, outermost first."""
    opened = _OPEN_AT_END.search(prompt)
    for name, words in _WORDS.items() if opened is None else ():
        if begun := words.match(text):
            return (text[begun.end() :], []) if begun["end"] else ("", [name])
    stack = [] if opened is None else [_mark(next(_MARK.finditer(opened[0]))).name]
    found = list(_found(text, bool(stack), truncated))
    kept: list[str] = []
    at, closed = 0, False
    for number, mark in enumerate(found):
        between = text[at : mark.start]
        if mark.opens:
            again = mark.name in stack and (mark.name == "channel" or not between.strip())
            if not stack:
                kept.append(between)
            if not again:
                stack.append(mark.name)
        elif not stack:
            if closed and not text[mark.end :].strip() and number == len(found) - 1:
                kept.append(between)  # one mark too many behind the answer
            else:
                kept.clear()  # the mark that opened it is not in the text
            closed = True
        else:
            # A mark of another name closes the innermost block.
            del stack[stack.index(mark.name) if mark.name in stack else -1 :]
            closed = True
        at = mark.end
    if not stack:
        kept.append(text[at:])
    return (_AROUND.sub("", "".join(kept)) if found or opened else text), stack


def _mark(match: re.Match[str]) -> _Mark:
    kind, _, family = next(name for name, value in match.groupdict().items() if value and "_" in name).partition("_")
    name = f"<{(match['open'] or match['close']).lower()}>" if family == "tag" else family
    return _Mark(match.start(), match.end(), kind == "opens", name)


def _found(text: str, within: bool, truncated: bool) -> Iterator[_Mark]:
    """The marks of a text that are meant as such. ``within`` is whether it begins within a block."""
    every = [_mark(match) for match in _MARK.finditer(text)]
    code = [match.span() for match in _CODE.finditer(text)] if every else []
    whole = (len(text) - len(text.lstrip()), len(text.rstrip()))  # a fence around the completion hides nothing
    begun = within
    for number, mark in enumerate(every):
        before, behind = text[mark.start - 1 : mark.start], text[mark.end : mark.end + 1]
        quoted = before in _QUOTES and _QUOTES[before] == behind
        # Code within reasoning may lack its end, and must not hide where the reasoning ends.
        in_code = not begun and any(
            start < mark.start and mark.end <= end and not (start <= whole[0] and whole[1] <= end + 3)
            for start, end in code
        )
        if quoted or in_code:
            continue
        if mark.opens:
            # "I do not use <think> here" opens nothing, unless something closes it.
            ends = truncated or any(not other.opens for other in every[number + 1 :])
            if not (begun or ends) and _is_mention(text, mark):
                continue
            begun = True
        yield mark


def _is_mention(text: str, mark: _Mark) -> bool:
    """Whether the words around an opening mark speak of it."""
    line = text[: mark.start].rpartition("\n")[2].rstrip()
    if not re.search(r"[\w,]\Z", line):
        return False
    return bool(_MENTIONED.search(line) or _MENTION_ENDS.match(text, mark.end))
