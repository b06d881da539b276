"""Reasoning in a completion: where a model thinks aloud, by the markers of its chat template, and what it answers then.

Text within ``<think>…</think>`` and the like is not an answer, and a block that never ends contains none. A marker
that a text only mentions, in quotes or in code, is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_NAME = r"(?:[a-z0-9]+[:_])?(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad)"

# Opening and closing marks by family; a family's name is that of its group.
_OPEN = {
    "tag": rf"<(?P<open>{_NAME})(?:\s[^<>]*)?>",  # DeepSeek, Qwen, and with a prefix Seed and others
    "bracket": r"\[THINK\]",  # Mistral
    "cohere": r"<\|START_THINKING\|>",
    "thought": r"<\|begin_of_thought\|>",
    "diamond": r"◁think▷",  # Kimi
    "unused": r"<unused94>(?:thought\b)?",  # MedGemma
    "pipe": r"<\|channel>(?:thought\b)?",  # Gemma
    "channel": r"<\|channel\|>\s*(?:analysis|commentary)\b[^<]*<\|message\|>",  # gpt-oss
}
_CLOSE = {
    "tag": rf"</(?P<close>{_NAME})>",
    "bracket": r"\[/THINK\]",
    "cohere": r"<\|END_THINKING\|>",
    "thought": r"<\|end_of_thought\|>",
    "diamond": r"◁/think▷",
    "unused": r"<unused95>",
    "pipe": r"<channel\|>",
    "channel": r"<\|channel\|>\s*final\b[^<]*<\|message\|>",
}
_CLOSING = {
    "bracket": "[/THINK]",
    "cohere": "<|END_THINKING|>",
    "thought": "<|end_of_thought|>",
    "diamond": "◁/think▷",
    "unused": "<unused95>",
    "pipe": "<channel|>",
    "channel": "<|end|><|start|>assistant<|channel|>final<|message|>",
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
# What stands around an answer and is no part of it.
_AROUND = re.compile(
    r"<\|(?:START|END)_RESPONSE\|>|<\|(?:begin|end)_of_solution\|>|<\|(?:return|end)\|>(?:\s*<\|start\|>assistant)?",
    re.IGNORECASE,
)
# gpt-oss, where its special tokens were left out of the text.
_BARE_CHANNELS = re.compile(r"\s*analysis(?=[A-Z\"'])(?!.*<\|channel\|>)(?:.*?assistantfinal)?", re.DOTALL)
_QUOTES = {"`": "`", '"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“"}
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)

# Parts of marks that are tokens of their own.
_PIECES = {"<|channel|>", "<|message|>", "<|start|>"}


@dataclass(frozen=True)
class _Mark:
    start: int
    end: int
    opens: bool
    name: str  # the family, or the name of a tag


def answered(text: str, prompt: str = "") -> str:
    """The completion without its reasoning, "" where it ends within it.

    Blocks may follow each other and stand within each other. Where the prompt has opened one, the completion begins
    within it. A closing mark that nothing opened ends reasoning, too.
    """
    return _split(text, prompt)[0]


def unclosed(text: str, prompt: str = "") -> str:
    """The mark that would end the reasoning in which a completion ends; "" where it ends in no such block."""
    return "".join(_closing(name) for name in reversed(_split(text, prompt)[1]))


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
    return _CLOSING.get(name) or f"</{name}>"


def _split(text: str, prompt: str) -> tuple[str, list[str]]:
    """What of a completion is no reasoning, and the blocks that are open at its end, the outermost first."""
    opened = _OPEN_AT_END.search(prompt)
    if opened is None and (bare := _BARE_CHANNELS.match(text)):
        whole = bare[0].endswith("assistantfinal")
        return (text[bare.end() :], []) if whole else ("", ["channel"])
    stack = [] if opened is None else [_mark(next(_MARK.finditer(opened[0]))).name]
    found = list(_found(text, bool(stack)))
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
    name = (match["open"] or match["close"]).lower() if family == "tag" else family
    return _Mark(match.start(), match.end(), kind == "opens", name)


def _found(text: str, within: bool) -> Iterator[_Mark]:
    """The marks of a text that are meant as such. ``within`` is whether it begins within a block."""
    every = [_mark(match) for match in _MARK.finditer(text)]
    code = [match.span() for match in _CODE.finditer(text)] if every else []
    begun = within
    for number, mark in enumerate(every):
        before, behind = text[mark.start - 1 : mark.start], text[mark.end : mark.end + 1]
        quoted = before in _QUOTES and _QUOTES[before] == behind
        # Code within reasoning may lack its end, and must not hide where the reasoning ends.
        in_code = not begun and any(start < mark.start and mark.end <= end for start, end in code)
        if quoted or in_code:
            continue
        if mark.opens:
            # "I do not use <think> here" opens nothing, unless something closes it.
            ends = any(not other.opens for other in every[number + 1 :])
            sentence = text[: mark.start].rstrip(" \t")[-1:] in ("", *"\n.!?:…")
            if not (begun or ends or sentence):
                continue
            begun = True
        yield mark
