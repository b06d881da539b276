"""What a model answered, read out of the text that it wrote.

``strict`` is the headline number: the first match of the configured pattern, and nothing else.
``last`` takes the last match, and ``lenient`` reads what a person would take for the answer. Where they
disagree, the difference between two models may be one of form and not of knowledge.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import regex

from sftlab.dataset.sandbox import limited
from sftlab.errors import ConfigError

LONGEST = 40_000  # characters of a completion that ``lenient`` reads; 8192 tokens are about 35,000
LAYERS = 50  # pairs of quotes and the like that ``normalise`` takes off


@cache
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    r"""The answer pattern, ready for ``strict`` and ``last``. Case counts unless the pattern says ``(?i)``.

    Raises:
        ConfigError: It does not compile, or does not have exactly one capturing group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        raise ConfigError(
            f"answer pattern {pattern!r} is not a regular expression: {error.msg}{where}; "
            r"a literal parenthesis is written \( and in YAML the pattern belongs in single quotes"
        ) from error
    except OverflowError as error:
        raise ConfigError(
            f"answer pattern {pattern!r} repeats something too often: {error}; lower the count"
        ) from error
    if compiled.groups != 1:
        raise ConfigError(
            f"answer pattern {pattern!r} has {compiled.groups} capturing groups; exactly one must capture the "
            r"answer, as in the answer is\s*\(([A-Z])\); write any other as (?:...)"
        )
    try:
        return regex.compile(pattern)  # which knows a time limit
    except regex.error as error:
        raise ConfigError(f"answer pattern {pattern!r} is not a regular expression: {error}; rewrite it") from error


def probe(pattern: str) -> None:
    """Try the answer pattern on long texts of one character each, the usual way to find one that backtracks for ever.

    Raises:
        ConfigError: It does not compile, or takes longer than ``SECONDS``.
    """
    compiled = compile_pattern(pattern)
    for character in dict.fromkeys("a1 \n(" + re.sub(r"\\.", "", pattern)):
        last(character * 2000 + "\0", compiled)


def strict(text: str, pattern: regex.Pattern[str], choices: str = "") -> str | None:
    """The answer in the first match of a pattern made by ``compile_pattern``, or None without a match.

    A single letter comes back as the choice that it names (``choice``), anything longer as it stands. A letter that
    is none of the options is returned all the same: the answer was given in the right form, and is wrong.

    Raises:
        ConfigError: the pattern backtracks for longer than ``SECONDS``.
    """
    return next(_matches(text, pattern, choices), None)


def last(text: str, pattern: regex.Pattern[str], choices: str = "") -> str | None:
    """Like ``strict``, but the last match: what a text that reasons first comes to in the end."""
    answer = None
    for answer in _matches(text, pattern, choices):  # noqa: B007 – the last one is what is wanted
        pass
    return answer


def _matches(text: str, pattern: regex.Pattern[str], choices: str) -> Iterator[str]:
    for match in limited(pattern.finditer, text, pattern.pattern):
        if answer := (match[1] or "").strip():
            yield choice(answer, choices)


def choice(answer: str, choices: str) -> str:
    """A single letter as the choice that it names in upper or lower case; in upper case where it names none."""
    if len(answer) > 1 or answer in choices:
        return answer
    return next((letter for letter in choices if letter.casefold() == answer.casefold()), answer.upper())


def read(
    text: str, pattern: regex.Pattern[str], choices: str, options: Mapping[str, str] | None
) -> dict[str, str | None]:
    """The answer by each way of reading: ``strict``, ``last`` and ``lenient``.

    ``lenient`` knows the letters A to Z; where answers are digits or words it is the same as ``last``.
    """
    final = last(text, pattern, choices)
    found = final
    if choices.isascii() and choices.isalpha():
        upper = {letter.upper(): option for letter, option in (options or {}).items()}
        found = lenient(text, choices.upper(), upper)
    return {
        "strict": strict(text, pattern, choices),
        "last": final,
        "lenient": None if found is None else choice(found, choices),
    }


def can_read(pattern: str, answer: str) -> bool:
    """Whether the group of a pattern can match an answer: what it looks for around the answer is not asked.

    It may stand there in upper or lower case, as both are compared alike.
    """
    group = _group(pattern)
    cases = {answer, answer.upper(), answer.lower(), answer.capitalize()}
    # What surrounds an answer within the group is stripped from it.
    spaced = [f"{before}{case}{behind}" for case in cases for before in ("", " ") for behind in ("", " ", "\n")]
    return group is None or any(group.fullmatch(text) for text in spaced)


@cache
def _group(pattern: str) -> re.Pattern[str] | None:
    """The one group of a pattern without look-arounds and anchors, under the flags that hold there.

    None where Python's parser builds it otherwise than expected.
    """
    from re import _compiler, _parser  # type: ignore[attr-defined]

    tree = _parser.parse(pattern)

    def search(node: Any, flags: int) -> Any:
        if isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "SUBPATTERN":
            number, added, removed, inner = node[1]
            flags = (flags | added) & ~removed
            return (inner, flags) if number == 1 else search(inner, flags)
        parts = node if isinstance(node, tuple | list | _parser.SubPattern) else ()
        return next((found for part in parts if (found := search(part, flags))), None)

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
    """A pattern with another group in the place of its own; None where there is none or it nests parentheses."""
    own = re.compile(r"(?<!\\)\((?:\?P<\w+>|(?!\?))((?:[^()\\\[]|\\.|\[[^\]]*\])*)\)")
    made, count = own.subn(lambda _: f"({group})", pattern)
    return made if count == 1 else None


def normalise(text: str) -> str:
    """Text as a normalised exact match compares it.

    Case is folded, white space collapsed, and taken off the outside: a code fence with its language,
    pairs of quotes, backticks or emphasis marks, and closing punctuation. Inside, and at the front,
    signs stay: "-5" is not "5", "50%" is not "50". Text that is nothing but signs keeps them.
    """
    text = " ".join(unfenced(text).casefold().split())
    bare = text
    for _ in range(LAYERS):  # few have two, and a model stuck on one sign has thousands
        shorter = _WRAPPED.sub(lambda pair: pair[2] or pair[3], bare.rstrip(" .,;:!?")).strip()
        if shorter == bare:
            break
        bare = shorter
    return bare or text


def unfenced(text: str) -> str:
    """Text without white space around it, and without the code fence that it stands in as a whole."""
    text = text.strip()
    if (fence := _FENCE.match(text)) and text.endswith(("```", "~~~")) and len(text) >= fence.end() + 3:
        return text[fence.end() : -3].strip()
    return text


_FENCE = re.compile(r"(?:```|~~~)[^\S\n]{0,20}[\w+#-]{0,40}[^\S\n]{0,20}\n")
_WRAPPED = re.compile(r"^(?:(\*\*|__|[*_`\"'])(.+)\1|[“‘«](.+)[”’»])$", re.DOTALL)


def lenient(text: str, choices: str, options: Mapping[str, str] | None) -> str | None:
    r"""The option letter that the text commits itself to, or None.

    Read are: "answer is: B", "Answer: **C**", "the best choice is option b", "I would go with (B)",
    "So (B).", "(B) is the correct answer", ``\boxed{B}``, and as the whole text, or as its first or last
    line, a letter alone or with its own option's text. In place of the letter, an answer may be the text of
    exactly one option.

    The last commitment counts. None is returned where a letter would be a guess: where the last
    statement names two options or an alternative ("A or C"), where the text takes its answer back ("not (A)",
    "(A) is wrong", "no, wait") without another, where the answer is asked, supposed or hedged
    ("if the answer is (A)", "it could be (B)"), and where a lone capital or article may belong to
    the prose ("Answer: A blood test", "C. difficile", "B cells"). What follows a new
    "Question:" after the answer was written for another question, and is not read. Of a completion of more
    than ``LONGEST`` characters the middle is not read.

    Args:
        text: The completion.
        choices: The letters that may be the answer, in upper case ("ABCD"); "" for none.
        options: The text of each letter's option, where it is known.
    """
    if not choices:
        return None
    if len(text) > LONGEST:
        text = text[: LONGEST // 2] + "\n\n" + text[-LONGEST // 2 :]
    reader = _Reader(text, options or {})
    standing: frozenset[str] = frozenset()
    statement = -1
    for event in sorted(reader.events(), key=lambda event: event.end):
        if event.kind == "doubt":
            continue
        if event.kind == "question":
            if standing:
                break
        elif event.kind == "retract":
            standing = frozenset()
        elif event.kind == "reject":
            # One of two alternatives struck out does not make an answer of the other.
            standing = frozenset() if standing <= event.letters else standing
        elif event.kind == "correct":
            standing, statement = event.letters, event.statement
        elif event.kind == "claim" or event.statement == statement:
            standing |= event.letters
        else:
            standing, statement = event.letters, event.statement
    answer = next(iter(standing)) if len(standing) == 1 else ""
    return answer if answer and answer in choices else None


def _words(*patterns: str) -> re.Pattern[str]:
    """One pattern of several. A space is enough for white space: ``_clean`` leaves no other within a line."""
    return re.compile("|".join(patterns), re.IGNORECASE | re.MULTILINE)


# The pieces that a commitment is put together from: subject, verb, filler, target.
_SUBJECT = _words(
    r"\banswer\b",
    r"\b(?:correct|right|best|final|my) (?:option|choice|response|selection|diagnosis)\b",
    r"\bmost (?:likely|appropriate|suitable|probable)(?: [a-z]+){1,3}?(?= is\b)",
)
_VERB = _words(r"\b(?:is|be|remains|isn't)\b", r"'s\b", r"[:=→]", r"->", r" [-–—] ")
_IT = _words(
    r"\b(?:it|this|that)(?:'s\b| isn't\b| is\b"
    r"| (?:must|should|has to|would|could|might|may|cannot|can't|can not|couldn't)(?: not)? be\b)"
)
_CHOOSE = _words(
    r"\b(?:i|we)(?:'\w+)?(?: (?!(?:if|was|had|almost|nearly|first)\b)[\w']+){0,3}? "
    r"(?:choose|pick|select|go with|going with|opt for|settle on|answer|say)\b"
)
_CONCLUDE = _words(r"\b(?:therefore|thus|hence|so|but|finally)\b[–—]?")
_CORRECT = _words(
    r"\b(?:actually|rather|instead|sorry|oops|correction|i mean)\b", r"(?:^|[.!?…;,–—-] ?)(?:no|wait) ?[,:–—-]"
)
_FILLER = re.compile(
    r"[\s,:]*(?:(?:therefore|thus|hence|most|likely|probably|clearly|definitely|indeed|still|simply|actually|be|it|is|"
    r"option|choice|letter|answer|the|correct|right|best|not|either|neither|both|only)\b[\s,:]*){0,12}",
    re.IGNORECASE,
)

# What a letter may be followed by to be an option and not a word, an initial or an article.
_PAREN = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]")
_BARE = re.compile(r"(?<![\w'])([A-Za-z])(?![\w'+/-])")
_LETTER_ENDS = re.compile(
    r"\s*\Z|[^\S\n]*\n|\s*[,;:!?)\]}&–—]|\.(?!\w|[^\S\n]+[a-z\d])| - "
    r"|\s+(?:because|since|and|or|but|which|nor|if|unless|rather\s+than|instead\s+of|over|due\s+to)\b"
)
_LETTER_ENDS_MORE = re.compile(r"\s+(?:\(|(?:as|for|not|given|here|based)\b)")
_ARTICLE_ENDS = re.compile(r"[^\S\n]*\n|\s*[:)\]]|\.(?!\w|[^\S\n]+[a-z\d])|\s+(?:and|or)\s+[a-z]\b")
_AUXILIARY = re.compile(
    r"\s+(?:is|are|was|were|has|have|does|do|did|can|cannot|can't|would|could|should|may|might|will|isn't|doesn't)\b",
    re.IGNORECASE,
)
_TEXT_ENDS = re.compile(
    r"\s*(?:\Z|\.(?!\w)|[;!?\n(]|[–—]|,\s*not\b|,?\s*(?:because|since|which|rather\s+than|instead\s+of)\b)"
)
_STOP = re.compile(r"\s*(?:\Z|[.,;!?\n()–—-]|(?:because|since|as|here|for|given|not|rather|instead|over|or|and)\b)")
_NEXT = re.compile(
    r"\s*(?:,\s*(?:and|or)\b|[,/&+→–—-]|->|\b(?:and/or|and|or|nor|plus|then|to)\b|(?=[(\[]))\s*(?:(?:option|choice)\s+)?",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(
    r"[\s,]*\b(?:or|if|unless|maybe|perhaps|possibly|as\s+well\s+as|and\s+(?:also|possibly|maybe|perhaps))\b"
    r"|\s+(?:in|for|with|during)\s[^.;\n(]*[(\[][A-Za-z][)\]]\s+(?:in|for|with|during)\b",
    re.IGNORECASE,
)
_SPACE = re.compile(r"\s*")
_LINE_END = re.compile(r" ?\n\s*")
_ARTICLE = re.compile(r"(?:(?:the|an?)\s+)?", re.IGNORECASE)
_GAP = re.compile(r" ?[.:)(,–—-]? ?")
_NAMED = re.compile(r"\b(?:option|choice|letter)\s+\Z", re.IGNORECASE)
_OPENS = re.compile(
    r"(?:\A|[\n.;:!?]|\b(?:option|choice|answer|letter|that|only|but|because|since|think|believe)"
    r"|\b(?:so|thus|therefore|hence|actually|no|wait),?)\s*\Z",
    re.IGNORECASE,
)

# What is said of a letter, and what takes it back.
_PREDICATE = re.compile(
    r"\s*,?(?:\s+(?:is|are|must\s+be|would\s+be|should\s+be|seems|remains)|'s)\s+"
    r"(?:(?:therefore|thus|clearly|indeed|definitely|probably|likely|still)\s+)*"
    r"(?:(?:the\s+)?(?:only\s+)?(?:most\s+)?(?:(?:correct|right|best|likely|appropriate|accurate)\s+)?"
    r"(?:answer|option|choice|one)\b|(?:correct|right|better)\b)(?=\s*(?:[.,;:!?\n]|\Z|because|since|as|here|for|given))",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\s*(?:,?(?:\s+(?:is|are|was|would\s+be|must\s+be|can\s+be|could\s+be|seems)|'s)\s+(?:[a-z]+\s+){0,3}?"
    r"(?:not|wrong|incorrect|false|impossible|unlikely|excluded|eliminated|ruled\s+out|out)\b"
    r"|,?\s+(?:isn't|can't|cannot|can\s+not|couldn't|wouldn't)\s+be\b|,?\s+isn't\b"
    r"|\s*[:–—-]\s*(?:no|not|wrong|incorrect|false)\b)",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\bneither|\bnor|\brather\s+than|\binstead\s+of|\bexcept|\bunlike|\bover"
    r"|\brul(?:e|es|ed|ing)\s+out|\bexclud\w+|\beliminat\w+|\breject\w*)\s+"
    r"(?:(?:be|just|necessarily|option|choice|both|either|with|choose|pick|select)\s+)*",
    re.IGNORECASE,
)
_RETRACTION = _words(
    r"\bwait\b(?=\s*(?:[,.!?…–—-]|\Z))",
    r"\bno,? wait\b",
    r"(?:^|[.!?…;,–—-]\s*)(?:no|nope|wait|hmm+)\b(?=\s*(?:[,.!?…–—-]|\Z))",
    r"^ ?wait\b",
    r"\b(?:hold on|(?:scratch|scrap|strike|forget) (?:that|it)|never ?mind|correction|my mistake|oops|sorry)\b",
    r"\b(?:not so fast|on second thought|on reflection|change my (?:answer|mind)|i doubt (?:it|that))\b",
    r"(?:^|[.!?…] ?)(?:or|maybe|perhaps)\b(?=[^.\n]{0,20}[(\[][A-Za-z][)\]])",
    r"\blet me (?:re-?\w+|double|check|think again)",
    r"\bi (?:was|am) (?:wrong|mistaken)\b",
    r"\bi (?:made|have made) an? (?:mistake|error)\b",
    r"\bi take (?:that|it|this) back\b",
    r"\b(?:that|this|which|it|answer)(?:'s| is| was| seems| looks| would be| must be)(?: \w+){0,2}?"
    r" (?:wrong|incorrect|mistaken|a mistake|an error|impossible|not (?:right|correct|true|it|so|the answer))\b",
    r"\b(?:that|this|it|which)(?: isn't| cannot be| can't be| can not be) (?:right|correct|true|the answer)\b",
    r"\b(?:that|this|it) (?:doesn't|does not) (?:fit|work|match|make sense)\b",
    r"\b(?:that|this) (?:cannot|can't|can not) be\b",
)
_CONDITION = _words(
    r"\b(?:if|whether|unless|suppose|supposing|assum\w+|wonder\w*|depends|maybe|perhaps|possibly|at first|initially)\b"
)
_HEDGE = _words(
    r"\b(?:could|might|may|tempt\w*)\b",
    r"(?<!\bi )(?<!\bwe )\bwould (?:think|say|choose|pick|guess)\b",
    r"\b(?:some|many|others|people|students?)(?: \w+){0,2} (?:say|think|believe|argue|choose|pick)\b",
)
_NEGATION = _words(
    r"\b(?:not|cannot|never|neither|nor|wrong|incorrect|false|unlikely|least)\b",
    r"n't\b",
    r"(?<!no )(?<!without )\bdoubt",
)
_CLAUSE = _words(r"[,;:–—]| - |\b(?:so|thus|therefore|hence|but|because|then|and)\b")
_FOLLOWS = _words(r"\b(?:so|thus|therefore|hence|but)\b")

_STATEMENT_END = re.compile(r"\.{2,}|…|[.!?](?=\s|\Z)|[;\n]")
_MARKER = re.compile(
    r"\s*(?:[-•]\s*)?(?:option\s+|choice\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])(?=[.):]|\s*\Z))", re.I
)
_LONE = re.compile(
    r"\s*(?:(?i:(?:final\s+)?(?:option|choice|letter))\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Zb-hj-z])\s*\)?)\s*[.!:,]*\s*"
    r"|\s*(?i:option|choice|letter)\s+([A-Za-z])\s*[.!]*\s*"
    r"|\s*([ai])\s*[.)]\s*"
)
_LEAD = re.compile(r"\s*(?:(?:option|choice)\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\b)[\s.:)–—-]*", re.I)
_QUESTION = _words(r"^ ?(?:(?:new|next) )?(?:question|problem|q|user|human)\b ?\d* ?[:.)\n]", r"<\|im_start\|>")


def _clean(text: str) -> str:
    """The text without its markup, on which everything above is matched."""
    text = text.replace("’", "'").replace("İ", "I")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{\s*\(?\s*([A-Za-z])\s*\)?\s*\}", r"answer is: (\1)", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"answer is: \1", text)
    text = re.sub(r"<answer>", "answer: ", text, flags=re.IGNORECASE)
    text = re.sub(r"</?\w+>|[*`$\"“”]|__|\\[()\[\]]|^[^\S\n]*#+[^\S\n]*", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!\w)['‘]([A-Za-z])'(?!\w)", r"(\1)", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"[^\S\n]+", " ", text)).strip()


@dataclass(frozen=True)
class _Event:
    """Something that changes which answer stands.

    ``commit`` puts an answer in the place of the one before, or beside it within one statement;
    ``correct`` always in its place, ``claim`` always beside it. ``reject`` strikes letters out, ``retract``
    whatever stands; ``question`` ends the reading once an answer stands. ``doubt`` is an answer that was
    only asked, supposed or hedged, and changes nothing.
    """

    end: int
    kind: str
    letters: frozenset[str] = frozenset()
    statement: int = 0


_AMBIGUOUS = frozenset({"", "?"})  # added to the letters, so that they are never only one


def _at(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where a pattern that may be empty ends, when it starts at a place."""
    match = pattern.match(text, start)
    return match.end() if match else start


class _Reader:
    """The events of one text."""

    def __init__(self, text: str, options: Mapping[str, str]) -> None:
        self.text = _clean(text)
        lower = self.text.lower()
        self.lower = lower if len(lower) == len(self.text) else self.text
        phrases: dict[str, set[str]] = {}
        for letter, option in options.items():
            if phrase := " ".join(_clean(option).lower().split()).rstrip(" .;,"):
                phrases.setdefault(phrase, set()).add(letter.upper())
        # The longest first: "iron deficiency anemia" before "iron deficiency".
        self.phrases = {p: frozenset(phrases[p]) for p in sorted(phrases, key=len, reverse=True)}
        self.ends = [match.start() for match in _STATEMENT_END.finditer(self.text)]

    def events(self) -> Iterator[_Event]:
        """All events, in no order."""
        yield from self._answers()
        yield from self._short_answers()
        yield from self._claims()
        yield from self._lines()
        for match in _DENIED.finditer(self.text):
            if target := self._letters(match.end()):
                yield _Event(target[1], "reject", target[0])
        for match in _RETRACTION.finditer(self.text):
            yield _Event(match.end(), "retract")
        for match in _QUESTION.finditer(self.text):
            yield _Event(match.start(), "question")

    def _answers(self) -> Iterator[_Event]:
        """As in "The answer is …", "The best choice is …", "Answer: …"."""
        subjects = list(_SUBJECT.finditer(self.text))
        for number, subject in enumerate(subjects):
            limit = min(self._statement_end(subject.end()), subject.end() + 80)
            if number + 1 < len(subjects):
                limit = min(limit, subjects[number + 1].start())
            for start in self._after_verb(subject.end(), limit):
                target = self._target(start)
                if target and not self._lists_options(start, *target):
                    yield self._stated(subject.start(), start, *target)
                    break

    def _after_verb(self, begin: int, limit: int) -> Iterator[int]:
        """Where the answer may start, after a subject that ends at ``begin``."""
        if heading := _LINE_END.match(self.text, begin):
            yield heading.end()
        for verb in _VERB.finditer(self.text, begin, limit):
            between = self.text[begin : verb.start()].strip()
            if re.search(r"\b(?:options|choices)\b", between, re.IGNORECASE):
                return
            # "I will answer by elimination: (A) …" announces a walk, not an answer.
            if not verb[0].strip(" '").isalpha() and between.lower() not in {
                "",
                "choice",
                "option",
                "letter",
                "is",
                "be",
            }:
                continue
            yield _at(_SPACE, self.text, verb.end())
            yield _at(_FILLER, self.text, verb.end())  # second, as an option may be "Both A and B"

    def _short_answers(self) -> Iterator[_Event]:
        """As in "It is (B).", "I would go with (B)", "So (B).", "Actually, (B)": a letter, and little around it."""
        for cue, kind in ((_IT, "commit"), (_CHOOSE, "commit"), (_CONCLUDE, "commit"), (_CORRECT, "correct")):
            for match in cue.finditer(self.text):
                start = _at(_FILLER, self.text, match.end())
                target = self._letters(start)
                if not target:
                    continue
                small = self.text[start : target[1]].lstrip("([ ")[0].islower() and not self._is_named(start)
                if (small and cue is not _CHOOSE) or not _STOP.match(self.text, target[1]):
                    continue  # "it is (a) common and (b) benign"
                if cue in (_IT, _CHOOSE):
                    yield self._stated(match.start(), start, *target)
                else:
                    yield self._stated(start, start, *target, kind=kind)

    def _claims(self) -> Iterator[_Event]:
        """As in "(B) is correct", "Iron deficiency anemia is the best answer", and the same denied."""
        spans = []
        for match in re.finditer(r"[(\[]\s*[A-Za-z]\s*[)\]]|(?<![\w'/])[A-Za-z](?![\w'+-])", self.text):
            letter, before = match[0].strip("()[] "), self.text[max(0, match.start() - 20) : match.start()]
            bare = len(match[0]) == 1
            if bare and not (_NAMED.search(before) or (letter.isupper() and _OPENS.search(before))):
                continue
            listed = self._listed(match.end(), frozenset({letter.upper()}), match[0].islower(), verbs=True)
            spans.append((match.start(), listed[1], listed[0]))
            named = self._named_text(match.end())
            if named and letter.upper() in named[0]:
                spans.append((match.start(), named[1], frozenset({letter.upper()})))
        for phrase, letters in self.phrases.items():
            at = self.lower.find(phrase) if len(phrase) > 1 else -1
            while at >= 0:
                found = self._phrase(at)
                if found and found[0] == letters and not self.lower[at - 1 : at].isalnum():
                    spans.append((at, found[1], letters))
                at = self.lower.find(phrase, at + 1)
        for begin, end, letters in spans:
            if denial := _DENIAL.match(self.text, end):
                yield _Event(denial.end(), "reject", letters)
            elif predicate := _PREDICATE.match(self.text, end):
                yield self._stated(begin, begin, letters, predicate.end(), kind="claim")

    def _lines(self) -> Iterator[_Event]:
        """A first or last line that is a letter, or a letter with its own option's text."""
        lines = list(re.finditer(r"[^\n]*\S[^\n]*", self.text))
        markers = {(m[1] or m[2]).upper() for line in lines if (m := _MARKER.match(line[0]))}
        if len(markers) > 1:  # a walk through the options
            return
        for line in {line.start(): line for line in (*lines[:1], *lines[-1:])}.values():
            letter = ""
            if lone := _LONE.fullmatch(line[0]):
                letter = next(group for group in lone.groups() if group).upper()
            elif lead := _LEAD.match(line[0]):
                own = self._phrase(line.start() + lead.end())
                if own and not self.text[own[1] : line.end()].strip(" .!)"):
                    said = (lead[1] or lead[2]).upper()
                    letter = said if said in own[0] else ""
            if not letter and len(lines) == 1:
                whole = self._phrase(line.start())
                if whole and len(whole[0]) == 1 and not self.text[whole[1] :].strip(" .!"):
                    letter = next(iter(whole[0]))
            if letter:
                yield _Event(line.end(), "claim", frozenset({letter}), self._statement(line.start()))

    def _stated(self, begin: int, start: int, letters: frozenset[str], end: int, kind: str = "commit") -> _Event:
        """What it comes to that the letters at ``start`` to ``end`` are the answer by words from ``begin`` on."""
        statement_end = self._statement_end(end)
        if self.text[statement_end : statement_end + 1] == "?":
            return _Event(end, "doubt")
        sentence = self.text[max(self._statement_start(begin), begin - 500) : begin]
        said = self.text[begin:start]
        condition = _FOLLOWS.split(sentence)[-1] + said
        clause = _CLAUSE.split(sentence)[-1] + said
        if _CONDITION.search(condition) or _HEDGE.search(clause):
            return _Event(end, "doubt")
        if _NEGATION.search(clause):
            return _Event(end, "reject", letters)
        if re.search(r"\beither\b", said, re.IGNORECASE) or _ALTERNATIVE.match(self.text, end):
            letters |= _AMBIGUOUS
        return _Event(end, kind, letters, self._statement(start))

    def _target(self, start: int) -> tuple[frozenset[str], int] | None:
        """The options named at a place by text or by letter, and where that ends."""
        text = self._phrase(start, article=True)
        if text and (text[1] - start > 1 or not self.text[start].isalpha()):
            letters, end = text
            if paren := _PAREN.match(self.text, _at(_SPACE, self.text, end)):
                # "iron deficiency anemia (C)": the letter decides between equal texts, or contradicts.
                said = frozenset({paren[1].upper()})
                return (said if said <= letters else letters | said), paren.end()
            longer = any(phrase.startswith(self.lower[start:end] + " ") for phrase in self.phrases)
            if (end == len(self.text) and longer) or not _TEXT_ENDS.match(self.text, end):
                return None  # cut off, or the beginning of something else
            return (letters if len(letters) == 1 else letters | _AMBIGUOUS), end
        target = self._letters(start)
        if target and self.text[start] in "([" and _AUXILIARY.match(self.text, target[1]):
            return None
        if target and text:  # an option whose whole text is a letter: blood group A
            return target[0] | text[0], target[1]
        return target

    def _letters(self, start: int) -> tuple[frozenset[str], int] | None:
        """The letter or list of letters at a place, and where it ends."""
        first = self._letter(start)
        if not first:
            return None
        letters, end = self._listed(first[1], frozenset({first[0]}), self.text[start].islower())
        if len(letters) == 1 and (text := self._named_text(end)):
            if not letters <= text[0]:
                return letters | text[0], text[1]  # "(B) iron deficiency anemia", and that is C
            return letters, text[1]
        return letters, end

    def _listed(
        self, end: int, letters: frozenset[str], small: bool, verbs: bool = False
    ) -> tuple[frozenset[str], int]:
        """The letters with those that follow by "or", "and" or a comma, and (unless ``verbs``) have no verb."""
        for _ in range(12):  # a model stuck on "(A) (A) (A) …" goes on for longer
            following = _NEXT.match(self.text, end)
            more = following and self._letter(following.end())
            if not following or not more:
                break
            here = self.text[following.end()]
            verb = _AUXILIARY.match(self.text, more[1]) if here in "([" else None
            # "(A) and (B) are" speaks of both, "(A), and (B) is" of the last.
            both = verbs and verb and ("r" in following[0].lower() or verb[0].split()[0].lower() in ("are", "were"))
            if (verb and not both) or (here.islower() and not small):
                break
            letters, end = letters | {more[0]}, more[1]
        return letters, end

    def _letter(self, start: int) -> tuple[str, int] | None:
        """The option letter at a place, if it is one and not a word, an initial or an article."""
        if match := _PAREN.match(self.text, start):
            return match[1].upper(), match.end()
        match = _BARE.match(self.text, start)
        if not match:
            return None
        letter, end = match[1], match.end()
        found = letter.upper(), end
        own = self._named_text(end)
        if own and letter.upper() in own[0]:
            return found
        if letter in "ai" and not self._is_named(start):
            return found if _ARTICLE_ENDS.match(self.text, end) else None
        if _LETTER_ENDS.match(self.text, end) or (letter not in "AIai" and _LETTER_ENDS_MORE.match(self.text, end)):
            return found
        return None

    def _is_named(self, start: int) -> bool:
        return _NAMED.search(self.text, max(0, start - 10), start) is not None

    def _phrase(self, start: int, article: bool = False) -> tuple[frozenset[str], int] | None:
        """The longest option text that starts at a place: its letters, and where it ends."""
        starts = [start]
        if article:
            starts.append(_at(_ARTICLE, self.text, start))
        for begin in starts:
            for phrase, letters in self.phrases.items():
                end = begin + len(phrase)
                if self.lower.startswith(phrase, begin) and not self.lower[end : end + 1].isalnum():
                    return letters, end
        return None

    def _named_text(self, end: int) -> tuple[frozenset[str], int] | None:
        """The option text right behind a letter that ends at a place."""
        behind = _at(_GAP, self.text, end)
        return self._phrase(behind) if behind > end else None

    def _lists_options(self, start: int, letters: frozenset[str], end: int) -> bool:
        """Whether what looks like an answer is the first of all options, listed or walked through."""
        if len(letters) != 1 or not self.text[start:].startswith(("(", "[", *letters)):
            return False
        following = re.escape(chr(ord(next(iter(letters))) + 1))
        walk = rf"[^\n]{{0,200}}\n\s*(?:[(\[]{following}[)\]]|{following}[.):])"
        inline = rf"(?:(?!\b(?:not|than|of|over|and|or)\b)[^\n]){{0,120}}?\s[(\[]{following}[)\]]\s+(?=\w)"
        if re.compile(walk).match(self.text, end):
            return True
        match = re.compile(inline).match(self.text, end)
        return bool(match) and not _AUXILIARY.match(self.text, match.end() - 1 if match else end)

    def _statement(self, at: int) -> int:
        return bisect_left(self.ends, at)

    def _statement_end(self, at: int) -> int:
        number = bisect_left(self.ends, at)
        return self.ends[number] if number < len(self.ends) else len(self.text)

    def _statement_start(self, at: int) -> int:
        number = bisect_left(self.ends, at)
        return self.ends[number - 1] + 1 if number else 0
