"""Separate the reasoning in a completion from its answer, by the marks that chat templates use.

Text within ``<think>…</think>`` and similar marks is not an answer, and a block that never ends contains none. A mark
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

# Patterns of opening and closing marks by family. The name of a family is the name of its group in ``_MARK``.
_OPEN = {
    "pangu": r"\[unused16\]",  # openPangu
    "tag": rf"<(?P<open>{_NAME})(?:\s[^<>]*)?>",  # DeepSeek, Qwen; with a prefix Seed and others
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
    "(?=[<◁[])(?:"  # rejects most positions of a long text at once
    + "|".join(
        f"(?P<{kind}_{family}>{source})"
        for kind, sources in (("opens", _OPEN), ("closes", _CLOSE))
        for family, source in sources.items()
    )
    + ")",
    re.IGNORECASE,
)
_OPEN_AT_END = re.compile(rf"(?:{'|'.join(_OPEN.values())})\s*\Z", re.IGNORECASE)
_FIRST, _LAST = ("<", "◁", "["), (">", "▷", "]", "thought")  # of every mark, and of every opening mark
# Marks around an answer that are not part of it.
_AROUND = re.compile(
    r"<\|(?:START|END)_RESPONSE\|>|<\|(?:begin|end)_of_solution\|>|<\|(?:return|end)\|>(?:\s*<\|start\|>assistant)?",
    re.IGNORECASE,
)
# Reasoning that begins and ends with words, at the start of a completion.
_WORDS = {
    # gpt-oss, if its special tokens were removed from the text. "analysis of the case" is prose.
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
# Words before and after a mark that a text only mentions.
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

# Parts of marks that are separate tokens.
_PIECES = {"<|channel|>", "<|message|>", "<|start|>"}


@dataclass(frozen=True)
class _Mark:
    start: int
    end: int
    opens: bool
    name: str  # the family; for the family "tag" the opening tag without attributes


def answered(text: str, prompt: str = "", *, truncated: bool = False) -> str:
    """Return a completion without its reasoning; "" if it ends within reasoning.

    Blocks may follow each other and be nested. If the prompt opens a block, the completion begins within it. A closing
    mark without an opening one ends reasoning too.

    Args:
        text: the completion.
        prompt: the prompt, or its end.
        truncated: whether the completion was truncated. If so, every unclosed mark opens a block; otherwise the text
            may only mention it.
    """
    return _split(text, prompt, truncated)[0]


def unclosed(text: str, prompt: str = "", *, truncated: bool = False) -> str:
    """Return the mark that would close the reasoning in which a completion ends; "" if it does not end in reasoning."""
    return "".join(_closing(name) for name in reversed(_split(text, prompt, truncated)[1]))


def opened_by_prompt(text: str) -> str | None:
    """Return the mark that the prompt of a completion must have opened, because the completion closes it.

    Returns "" if the completion closes no such block, and None if it has no marks.
    """
    if any(words.match(text) for words in _WORDS.values()) or not (used := list(_used_marks(text, False, False))):
        return "" if _MARK.search(text) else None
    first = used[0]
    if first.opens or first.name in ("channel", "solar"):  # these mark the beginning of the answer
        return ""
    return _OPENING.get(first.name, first.name)


def names_mark(pattern: str) -> bool:
    """Return whether a regular expression contains a reasoning mark."""
    return _MARK.search(pattern.replace("\\", "")) is not None


def opening_at_end(prompt: str) -> str:
    """Return the opening mark at the end of a prompt with the white space after it; "" if there is none."""
    opened = _opened(prompt)
    return opened[0] if opened else ""


def without_marks(text: str) -> str:
    """Remove the reasoning marks of a text, but not the text between them."""
    return _MARK.sub("", text)


def marks_with_spacing(text: str) -> list[str]:
    """Return each reasoning mark of a text once, with the line breaks around it, or else the spaces."""
    around = []
    for mark in _MARK.finditer(text):
        before, after = text[: mark.start()], text[mark.end() :]
        spaces = before[len(before.rstrip()) :], after[: len(after) - len(after.lstrip())]
        left, right = ("\n" * space.count("\n") or space for space in spaces)
        around.append(left + mark[0] + right)
    return list(dict.fromkeys(around))


def marks(tokens: Iterable[str]) -> set[str]:
    """Return the tokens that are reasoning marks or parts of one; decoding a completion must not drop them."""
    every = set(tokens)
    return {token for token in every if _MARK.fullmatch(token)} | (every & _PIECES if "<|channel|>" in every else set())


def _opened(prompt: str) -> re.Match[str] | None:
    """Find the opening mark at the end of a prompt. Most prompts end in another way, and are not searched."""
    return _OPEN_AT_END.search(prompt) if prompt.rstrip()[-len(_LAST[-1]) :].lower().endswith(_LAST) else None


def _closing(name: str) -> str:
    return _CLOSING.get(name) or f"</{name[1:]}"


def _split(text: str, prompt: str, truncated: bool) -> tuple[str, list[str]]:
    """Split off reasoning; return the remaining text, and the names of the blocks open at its end, outermost first."""
    opened = _opened(prompt)
    for name, words in _WORDS.items() if opened is None else ():
        if match := words.match(text):
            return (text[match.end() :], []) if match["end"] else ("", [name])
    stack = [] if opened is None else [_mark(next(_MARK.finditer(opened[0]))).name]
    used = list(_used_marks(text, bool(stack), truncated))
    kept: list[str] = []
    at, closed = 0, False
    for number, mark in enumerate(used):
        between = text[at : mark.start]
        if mark.opens:
            again = mark.name in stack and (mark.name == "channel" or not between.strip())
            if not stack:
                kept.append(between)
            if not again:
                stack.append(mark.name)
        elif not stack:
            if closed and not text[mark.end :].strip() and number == len(used) - 1:
                kept.append(between)  # a superfluous mark after the answer
            else:
                kept.clear()  # the opening mark is not in the text
            closed = True
        else:
            # A mark of another name closes the innermost block.
            del stack[stack.index(mark.name) if mark.name in stack else -1 :]
            closed = True
        at = mark.end
    if not stack:
        kept.append(text[at:])
    return (_AROUND.sub("", "".join(kept)) if used or opened else text), stack


def _mark(match: re.Match[str]) -> _Mark:
    kind, _, family = next(name for name, value in match.groupdict().items() if value and "_" in name).partition("_")
    name = f"<{(match['open'] or match['close']).lower()}>" if family == "tag" else family
    return _Mark(match.start(), match.end(), kind == "opens", name)


def _used_marks(text: str, within: bool, truncated: bool) -> Iterator[_Mark]:
    """Yield the marks of a text that it does not only mention. ``within`` is set if the text begins within a block."""
    if not any(first in text for first in _FIRST):
        return
    every = [_mark(match) for match in _MARK.finditer(text)]
    code = [match.span() for match in _CODE.finditer(text)] if every else []
    whole = (len(text) - len(text.lstrip()), len(text.rstrip()))  # a fence around the whole completion is not code
    opened = within
    for number, mark in enumerate(every):
        before, behind = text[mark.start - 1 : mark.start], text[mark.end : mark.end + 1]
        quoted = before in _QUOTES and _QUOTES[before] == behind
        # Code within reasoning may lack its closing fence, and must not hide the end of the reasoning.
        in_code = not opened and any(
            start < mark.start and mark.end <= end and not (start <= whole[0] and whole[1] <= end + 3)
            for start, end in code
        )
        if quoted or in_code:
            continue
        if mark.opens:
            # "I do not use <think> here" opens no block, unless a mark closes it.
            ends = truncated or any(not other.opens for other in every[number + 1 :])
            if not (opened or ends) and _is_mention(text, mark):
                continue
            opened = True
        yield mark


def _is_mention(text: str, mark: _Mark) -> bool:
    """Return whether the words around an opening mark only mention it."""
    line = text[: mark.start].rpartition("\n")[2].rstrip()
    if not re.search(r"[\w,]\Z", line):
        return False
    return bool(_MENTIONED.search(line) or _MENTION_ENDS.match(text, mark.end))
