"""Read the option that a free text states as its answer, as a person would."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sftlab.eval import phrases

LONGEST = 40_000  # characters of a completion that are read; 8192 tokens are about 35,000
REACH = 100  # characters before an option in which the words that state it are sought

_SEVERAL = frozenset({"", "?"})  # added to letters so that they are never a single one


def lenient(text: str, choices: str, options: Mapping[str, str] | None) -> str | None:
    r"""Return the option letter that a text states as its answer; None if there is none or several.

    An option is named by its letter, by its text, or by both. It is stated

    - after a word for the answer: "The answer is (B)", "Answer: **C**", "Ans: b", "Choice: C", "Answer (B)", "the best
      option is b", ``\boxed{B}``, "Antwort: B", "Réponse : B", "Respuesta: B", "Ответ: B", "答案：B";
    - after "I choose", "it is", "so" and similar words: "I would go with (B)", "It must be (B)", "So (B).";
    - before a claim: "(B) is correct", "Option B fits best";
    - alone, or with its letter, as the whole text or as its first or last line.

    The last statement counts, and claims and lines add to it. None is returned if the letter would be a guess: two
    options or an alternative are stated ("A or C"); the answer is rejected or taken back ("not (A)", "(A) is wrong",
    "that is wrong", "no, wait") and no other is stated; it is asked, supposed or hedged; options are listed ("A. Paris
    B. Lyon"); or a single capital or article may be part of the prose ("A blood test", "C. difficile", "B cells").

    Out of scope, and not read: negations, hedges and claims in other languages than English (a few negations are
    recognised), letters other than A to Z, and answers that only follow from the reasoning. What follows a new
    "Question:" after the answer is ignored, and so is the middle of a completion of more than ``LONGEST`` characters.

    Args:
        text: the completion.
        choices: the letters that may be the answer, in upper case ("ABCD"); "" for none.
        options: the text of each letter's option, if known.
    """
    if not choices:
        return None
    if len(text) > LONGEST:
        text = text[: LONGEST // 2] + "\n\n" + text[-LONGEST // 2 :]
    answer: frozenset[str] = frozenset()
    sentence = -1
    for event in _Reader(text, options or {}).events():
        if event.kind == "question":
            if answer:
                break
        elif event.kind == "retract" or (event.kind == "reject" and answer <= event.letters):
            answer = frozenset()  # to reject one of two alternatives does not make the other the answer
        elif event.kind == "claim" or (event.kind in ("state", "also") and answer and event.sentence == sentence):
            answer |= event.letters
        elif event.kind in ("state", "correct"):
            answer, sentence = event.letters, event.sentence
    letter = next(iter(answer)) if len(answer) == 1 else ""
    return letter if letter and letter in choices else None


@dataclass(frozen=True)
class _Event:
    """A place in a text that changes the current answer.

    Kinds: ``state`` replaces the answer, or adds to it within a sentence, as ``also`` does; ``correct`` always replaces
    it; ``claim`` always adds to it. ``reject`` removes letters, ``retract`` any answer. ``question`` ends the reading
    if there is an answer.
    """

    end: int
    kind: str
    letters: frozenset[str] = frozenset()
    sentence: int = 0


@dataclass(frozen=True)
class _Mention:
    """Options that are named side by side: "(B)", "B or C", "iron deficiency". ``small`` is a letter like "b"."""

    start: int
    end: int
    letters: frozenset[str]
    by_text: bool
    small: bool = False


class _Reader:
    """Finds the events of a text."""

    def __init__(self, text: str, options: Mapping[str, str]) -> None:
        self.text = phrases.clean(text)
        lower = self.text.lower()
        self.lower = lower if len(lower) == len(self.text) else self.text
        texts: dict[str, set[str]] = {}
        for letter, option in options.items():
            if of_option := " ".join(phrases.clean(option).lower().split()).rstrip(" .;,"):
                texts.setdefault(of_option, set()).add(letter.upper())
        # Longest first: "iron deficiency anemia" before "iron deficiency".
        self.options = {of_option: frozenset(texts[of_option]) for of_option in sorted(texts, key=len, reverse=True)}
        self.ends = [match.start() for match in phrases.SENTENCE_END.finditer(self.text)]

    def events(self) -> list[_Event]:
        """Return all events in the order of the text."""
        events = [event for mention in self._mentions() for event in self._of(mention)]
        events += self._lines()
        events += [_Event(match.end(), "retract") for match in phrases.RETRACTION.finditer(self.text)]
        events += [_Event(match.start(), "question") for match in phrases.QUESTION.finditer(self.text)]
        return sorted(events, key=lambda event: event.end)

    # ------------------------------------------------------------------- mentions

    def _mentions(self) -> Iterator[_Mention]:
        """Yield every place that names an option. Letters within the text of an option are part of it."""
        texts = list(self._texts())
        yield from texts
        end, inside = 0, iter(text for text in texts if text.end - text.start > 1)
        text = next(inside, None)
        for match in phrases.LETTER.finditer(self.text):
            while text and text.end <= match.start():
                text = next(inside, None)
            if match.start() < end or (text and text.start <= match.start()):
                continue
            if first := self._letter(match.start()):
                letters, end = self._listed(*first)
                small = (match[1] or match[2]).islower() and not self._named(match.start())
                yield _Mention(match.start(), end, letters, by_text=False, small=small)

    def _texts(self) -> Iterator[_Mention]:
        """Yield every text of an option."""
        if not self.options:
            return
        every = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w|\.\d)" for text in self.options))
        for match in every.finditer(self.lower):
            letters, end = self.options[match[0]], match.end()
            if paren := re.compile(r"\s*[(\[]\s*([A-Za-z])\s*[)\]]").match(self.text, end):
                # "iron deficiency anemia (C)": the letter decides between equal texts, or contradicts.
                letter = frozenset({paren[1].upper()})
                letters, end = (letter if letter <= letters else letters | letter), paren.end()
            yield _Mention(match.start(), end, letters if len(letters) == 1 else letters | _SEVERAL, by_text=True)

    def _letter(self, start: int) -> tuple[frozenset[str], int] | None:
        """Return the letter at a position, with the option's text if it follows, and the end."""
        match = phrases.LETTER.match(self.text, start)
        if not match:
            return None
        letter, end = match[1] or match[2], match.end()
        own = self._text_after(end)
        if match[2] and not (own and letter.upper() in own[0]) and not self._is_letter(letter, start, end):
            return None
        letters = frozenset({letter.upper()})
        if own is None:
            return letters, end
        return (letters if letters <= own[0] else letters | own[0]), own[1]  # "(B) iron deficiency anemia" may be C

    def _is_letter(self, letter: str, start: int, end: int) -> bool:
        """Whether a bare letter is an option, and not a word, an initial or an article."""
        if letter in "ai" and not self._named(start):
            return phrases.ARTICLE_ENDS.match(self.text, end) is not None
        more = letter not in "AIai" and phrases.LETTER_ENDS_MORE.match(self.text, end)
        named = self._named(start) and re.compile(r"\b").match(self.text, end)
        return bool(phrases.LETTER_ENDS.match(self.text, end) or more or named)

    def _named(self, start: int) -> bool:
        return phrases.NAMED.search(self.text, max(0, start - 10), start) is not None

    def _text_after(self, end: int) -> tuple[frozenset[str], int] | None:
        """Return the option's text directly after a letter that ends at a position."""
        gap = phrases.GAP.match(self.text, end)
        begin = gap.end() if gap else end
        if begin == end:
            return None
        for text, letters in self.options.items():
            after = begin + len(text)
            if self.lower.startswith(text, begin) and not self.lower[after : after + 1].isalnum():
                return letters, after
        return None

    def _listed(self, letters: frozenset[str], end: int) -> tuple[frozenset[str], int]:
        """Add the letters that follow by "or", "and" or a comma: "(A), (B) or (C)"."""
        for _ in range(12):  # a model stuck on "(A) (A) (A) …" writes more
            following = phrases.NEXT.match(self.text, end)
            more = self._letter(following.end()) if following else None
            if not following or not more:
                break
            verb = phrases.VERB.match(self.text, more[1]) or phrases.PREDICATE.match(self.text, more[1])
            # "(A) or (B) is" and "(A) and (B) are" refer to both, "(A), and (B) is" to the last.
            if verb and "or" not in following[0].lower() and verb[0].split()[0].lower() not in ("are", "were"):
                break
            letters, end = letters | more[0], more[1]
        return letters, end

    # ------------------------------------------------------------------- statements

    def _of(self, mention: _Mention) -> Iterator[_Event]:
        """Yield what a text says about the options that it names."""
        begin, end = max(0, mention.start - REACH), mention.end
        before = self.text[begin : mention.start]
        if phrases.DENIAL.match(self.text, end) or phrases.DENIED.search(before):
            yield _Event(end, "reject", mention.letters)
            return
        bare = self.text[mention.start] not in "([" and not mention.by_text
        if claim := phrases.PREDICATE.match(self.text, end):
            if not bare or (phrases.OPENS.search(before) and (not mention.small or self._named(mention.start))):
                yield self._stated(mention, mention.start, claim.end(), "claim")
            return
        if cue := self._cue(mention, before):
            start, kind = cue
            yield self._stated(mention, begin + start, end, kind)
        elif phrases.ALSO.search(before) and not (bare or mention.by_text or phrases.VERB.match(self.text, end)):
            yield _Event(end, "also", mention.letters, self._sentence(mention.start))

    def _cue(self, mention: _Mention, before: str) -> tuple[int, str] | None:
        """Return where the words that state an option begin, and the kind of the statement."""
        if mention.by_text:
            whole = self.lower[mention.start : mention.end]
            longer = any(text.startswith(whole + " ") for text in self.options)
            if (mention.end == len(self.text) and longer) or not (
                self.text[mention.end - 1] in ")]" or phrases.TEXT_ENDS.match(self.text, mention.end)
            ):
                return None  # truncated, or the beginning of another phrase
        elif self.text[mention.start] in "([" and phrases.VERB.match(self.text, mention.end):
            return None  # "(A) is a common mistake"
        if self._lists_options(mention):
            return None
        match = phrases.ANSWER.search(before)
        if match and not re.search(r"\b(?:options|choices)\b", match[0], re.IGNORECASE):
            return match.start(), "state"
        if mention.by_text or not phrases.STOP.match(self.text, mention.end):
            return None
        for cue, kind in ((phrases.CORRECT, "correct"), (phrases.CHOOSE, "state"), (phrases.CONCLUDE, "state")):
            if (match := cue.search(before)) and (not mention.small or cue is phrases.CHOOSE):
                return match.start(), kind
        return None

    def _stated(self, mention: _Mention, begin: int, end: int, kind: str) -> _Event:
        """Return the event of a statement that begins before its options, which may be negated or hedged."""
        number = self._sentence(mention.start)
        finish = self.ends[bisect_left(self.ends, end)] if bisect_left(self.ends, end) < len(self.ends) else -1
        first = bisect_left(self.ends, begin)
        sentence = self.text[max(self.ends[first - 1] + 1 if first else 0, begin - 500) : begin]
        words = self.text[begin : mention.start]
        clause = phrases.CLAUSE.split(sentence + words)[-1]
        asked = finish >= 0 and self.text[finish] == "?"
        condition = phrases.CONDITION.search(phrases.FOLLOWS.split(sentence + words)[-1])
        if asked or condition or phrases.HEDGE.search(clause):
            return _Event(end, "doubt")
        if phrases.NEGATION.search(clause):
            return _Event(end, "reject", mention.letters)
        letters = mention.letters
        if re.search(r"\beither\b", words, re.IGNORECASE) or phrases.ALTERNATIVE.match(self.text, end):
            letters |= _SEVERAL
        return _Event(end, kind, letters, number)

    def _lists_options(self, mention: _Mention) -> bool:
        """Whether a mention is an item of a list of options: the next letter follows it as an item."""
        if len(mention.letters) != 1 or mention.by_text:
            return False
        following = re.escape(chr(ord(next(iter(mention.letters))) + 1))
        item = rf"(?:[(\[]{following}[)\]]|{following}[.):])"
        lines = rf"[^\n]{{0,200}}\n\s*{item}"
        inline = rf"(?:(?!\b(?:not|than|of|over|and|or)\b)[^\n]){{0,120}}?\s{item}\s+(?=\w)"
        if re.compile(lines).match(self.text, mention.end):
            return True
        match = re.compile(inline).match(self.text, mention.end)
        return bool(match) and not phrases.VERB.match(self.text, match.end() - 1 if match else 0)

    def _sentence(self, at: int) -> int:
        return bisect_left(self.ends, at)

    # ------------------------------------------------------------------- lines

    def _lines(self) -> Iterator[_Event]:
        """Yield a first or last line that is an option."""
        lines = list(re.finditer(r"[^\n]*\S[^\n]*", self.text))
        markers = {(m[1] or m[2]).upper() for line in lines if (m := phrases.MARKER.match(line[0]))}
        if len(markers) > 1:  # a walk through the options
            return
        for line in {line.start(): line for line in (*lines[:1], *lines[-1:])}.values():
            letter = ""
            if lone := phrases.LONE.fullmatch(line[0]):
                letter = next(group for group in lone.groups() if group).upper()
            else:
                lead = phrases.LEAD.match(line[0])
                whole = self.options.get(line[0].strip(" .!").lower(), frozenset())
                own = self.options.get(line[0][lead.end() :].strip(" .!)").lower(), frozenset()) if lead else whole
                if lead and (written := (lead[1] or lead[2]).upper()) in own:
                    letter = written
                elif len(lines) == 1 and len(whole) == 1:
                    letter = next(iter(whole))
            if letter:
                yield _Event(line.end(), "claim", frozenset({letter}), self._sentence(line.start()))
