"""Read the option that a free text commits itself to, as a person would."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sftlab.eval import phrases

LONGEST = 40_000  # characters of a completion that are read; 8192 tokens are about 35,000

_AMBIGUOUS = frozenset({"", "?"})  # added to letters so that they are never a single one


def lenient(text: str, choices: str, options: Mapping[str, str] | None) -> str | None:
    r"""Return the option letter that a text commits itself to; None if there is none or several.

    Recognised are "answer is: B", "Answer: **C**", "the best choice is option b", "I would go with (B)", "So (B).",
    "(B) is the correct answer", ``\boxed{B}``, and a letter alone or with the text of its own option, as the whole text
    or as its first or last line. The text of exactly one option may take the place of the letter.

    The last commitment counts. None is returned if a letter would be a guess: the last statement names two options or
    an alternative ("A or C"); the text takes its answer back ("not (A)", "(A) is wrong", "no, wait") and gives no
    other; the answer is asked, supposed or hedged ("if the answer is (A)", "it could be (B)"); or a single capital or
    article may be part of the prose ("Answer: A blood test", "C. difficile", "B cells").

    What follows a new "Question:" after the answer belongs to another question and is ignored, and so is the middle of
    a completion of more than ``LONGEST`` characters.

    Args:
        text: the completion.
        choices: the letters that may be the answer, in upper case ("ABCD"); "" for none.
        options: the text of each letter's option, if known.
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
            # Rejecting one of two alternatives does not make the other the answer.
            standing = frozenset() if standing <= event.letters else standing
        elif event.kind == "correct":
            standing, statement = event.letters, event.statement
        elif event.kind == "claim" or event.statement == statement:
            standing |= event.letters
        else:
            standing, statement = event.letters, event.statement
    answer = next(iter(standing)) if len(standing) == 1 else ""
    return answer if answer and answer in choices else None


@dataclass(frozen=True)
class _Event:
    """A place in a text that changes the current answer.

    Kinds: ``commit`` replaces the answer, or adds to it within the same statement; ``correct`` always replaces it;
    ``claim`` always adds to it. ``reject`` removes letters, ``retract`` any answer. ``question`` ends the reading if
    there is an answer. ``doubt`` is an answer that is only asked, supposed or hedged, and changes nothing.
    """

    end: int
    kind: str
    letters: frozenset[str] = frozenset()
    statement: int = 0


def _at(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Return the end of a match that starts at a position; the position itself if there is none."""
    match = pattern.match(text, start)
    return match.end() if match else start


class _Reader:
    """Finds the events of a text."""

    def __init__(self, text: str, options: Mapping[str, str]) -> None:
        self.text = phrases.clean(text)
        lower = self.text.lower()
        self.lower = lower if len(lower) == len(self.text) else self.text
        texts: dict[str, set[str]] = {}
        for letter, option in options.items():
            if text_of_option := " ".join(phrases.clean(option).lower().split()).rstrip(" .;,"):
                texts.setdefault(text_of_option, set()).add(letter.upper())
        # Longest first: "iron deficiency anemia" before "iron deficiency".
        self.options = {text: frozenset(texts[text]) for text in sorted(texts, key=len, reverse=True)}
        self.ends = [match.start() for match in phrases.STATEMENT_END.finditer(self.text)]

    def events(self) -> Iterator[_Event]:
        """Yield all events, in any order."""
        yield from self._answers()
        yield from self._short_answers()
        yield from self._claims()
        yield from self._lines()
        for match in phrases.DENIED.finditer(self.text):
            if target := self._letters(match.end()):
                yield _Event(target[1], "reject", target[0])
        for match in phrases.RETRACTION.finditer(self.text):
            yield _Event(match.end(), "retract")
        for match in phrases.QUESTION.finditer(self.text):
            yield _Event(match.start(), "question")

    def _answers(self) -> Iterator[_Event]:
        """Yield answers such as "The answer is …", "The best choice is …", "Answer: …"."""
        subjects = list(phrases.SUBJECT.finditer(self.text))
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
        """Yield the positions at which the answer may start, after a subject that ends at ``begin``."""
        if heading := phrases.LINE_END.match(self.text, begin):
            yield heading.end()
        for verb in phrases.VERB.finditer(self.text, begin, limit):
            between = self.text[begin : verb.start()].strip()
            if re.search(r"\b(?:options|choices)\b", between, re.IGNORECASE):
                return
            # "I will answer by elimination: (A) …" announces a walk through the options, not an answer.
            joined = between.lower() in {"", "choice", "option", "letter", "is", "be"}
            if not verb[0].strip(" '").isalpha() and not joined:
                continue
            yield _at(phrases.SPACE, self.text, verb.end())
            yield _at(phrases.FILLER, self.text, verb.end())  # after the other, since an option may be "Both A and B"

    def _short_answers(self) -> Iterator[_Event]:
        """Yield answers such as "It is (B).", "I would go with (B)", "So (B).", "Actually, (B)"."""
        for cue, kind in (
            (phrases.IT, "commit"),
            (phrases.CHOOSE, "commit"),
            (phrases.CONCLUDE, "commit"),
            (phrases.CORRECT, "correct"),
        ):
            for match in cue.finditer(self.text):
                start = _at(phrases.FILLER, self.text, match.end())
                target = self._letters(start)
                if not target:
                    continue
                small = self.text[start : target[1]].lstrip("([ ")[0].islower() and not self._is_named(start)
                if (small and cue is not phrases.CHOOSE) or not phrases.STOP.match(self.text, target[1]):
                    continue  # "it is (a) common and (b) benign"
                if cue in (phrases.IT, phrases.CHOOSE):
                    yield self._stated(match.start(), start, *target)
                else:
                    yield self._stated(start, start, *target, kind=kind)

    def _claims(self) -> Iterator[_Event]:
        """Yield claims such as "(B) is correct", "Iron deficiency anemia is the best answer", and their denials."""
        spans = []
        for match in re.finditer(r"[(\[]\s*[A-Za-z]\s*[)\]]|(?<![\w'/])[A-Za-z](?![\w'+-])", self.text):
            letter, before = match[0].strip("()[] "), self.text[max(0, match.start() - 20) : match.start()]
            bare = len(match[0]) == 1
            if bare and not (phrases.NAMED.search(before) or (letter.isupper() and phrases.OPENS.search(before))):
                continue
            listed = self._listed(match.end(), frozenset({letter.upper()}), match[0].islower(), verbs=True)
            spans.append((match.start(), listed[1], listed[0]))
            named = self._named_text(match.end())
            if named and letter.upper() in named[0]:
                spans.append((match.start(), named[1], frozenset({letter.upper()})))
        for text, letters in self.options.items():
            at = self.lower.find(text) if len(text) > 1 else -1
            while at >= 0:
                option = self._option(at)
                if option and option[0] == letters and not self.lower[at - 1 : at].isalnum():
                    spans.append((at, option[1], letters))
                at = self.lower.find(text, at + 1)
        for begin, end, letters in spans:
            if denial := phrases.DENIAL.match(self.text, end):
                yield _Event(denial.end(), "reject", letters)
            elif predicate := phrases.PREDICATE.match(self.text, end):
                yield self._stated(begin, begin, letters, predicate.end(), kind="claim")

    def _lines(self) -> Iterator[_Event]:
        """Yield a first or last line that is a letter, alone or with the text of its own option."""
        lines = list(re.finditer(r"[^\n]*\S[^\n]*", self.text))
        markers = {(m[1] or m[2]).upper() for line in lines if (m := phrases.MARKER.match(line[0]))}
        if len(markers) > 1:  # a walk through the options
            return
        for line in {line.start(): line for line in (*lines[:1], *lines[-1:])}.values():
            letter = ""
            if lone := phrases.LONE.fullmatch(line[0]):
                letter = next(group for group in lone.groups() if group).upper()
            elif lead := phrases.LEAD.match(line[0]):
                own = self._option(line.start() + lead.end())
                if own and not self.text[own[1] : line.end()].strip(" .!)"):
                    written = (lead[1] or lead[2]).upper()
                    letter = written if written in own[0] else ""
            if not letter and len(lines) == 1:
                whole = self._option(line.start())
                if whole and len(whole[0]) == 1 and not self.text[whole[1] :].strip(" .!"):
                    letter = next(iter(whole[0]))
            if letter:
                yield _Event(line.end(), "claim", frozenset({letter}), self._statement(line.start()))

    def _stated(self, begin: int, start: int, letters: frozenset[str], end: int, kind: str = "commit") -> _Event:
        """Return the event of a statement from ``begin`` whose letters, at ``start`` to ``end``, are the answer."""
        statement_end = self._statement_end(end)
        if self.text[statement_end : statement_end + 1] == "?":
            return _Event(end, "doubt")
        sentence = self.text[max(self._statement_start(begin), begin - 500) : begin]
        words = self.text[begin:start]
        condition = phrases.FOLLOWS.split(sentence)[-1] + words
        clause = phrases.CLAUSE.split(sentence)[-1] + words
        if phrases.CONDITION.search(condition) or phrases.HEDGE.search(clause):
            return _Event(end, "doubt")
        if phrases.NEGATION.search(clause):
            return _Event(end, "reject", letters)
        if re.search(r"\beither\b", words, re.IGNORECASE) or phrases.ALTERNATIVE.match(self.text, end):
            letters |= _AMBIGUOUS
        return _Event(end, kind, letters, self._statement(start))

    def _target(self, start: int) -> tuple[frozenset[str], int] | None:
        """Return the options named at a position, by text or by letter, and the end of their names."""
        text = self._option(start, article=True)
        if text and (text[1] - start > 1 or not self.text[start].isalpha()):
            letters, end = text
            if paren := phrases.PAREN.match(self.text, _at(phrases.SPACE, self.text, end)):
                # "iron deficiency anemia (C)": the letter decides between equal texts, or contradicts.
                letter = frozenset({paren[1].upper()})
                return (letter if letter <= letters else letters | letter), paren.end()
            longer = any(option.startswith(self.lower[start:end] + " ") for option in self.options)
            if (end == len(self.text) and longer) or not phrases.TEXT_ENDS.match(self.text, end):
                return None  # truncated, or the beginning of another phrase
            return (letters if len(letters) == 1 else letters | _AMBIGUOUS), end
        target = self._letters(start)
        if target and self.text[start] in "([" and phrases.AUXILIARY.match(self.text, target[1]):
            return None
        if target and text:  # an option whose whole text is a letter: blood group A
            return target[0] | text[0], target[1]
        return target

    def _letters(self, start: int) -> tuple[frozenset[str], int] | None:
        """Return the letter or list of letters at a position, and its end."""
        first = self._letter(start)
        if not first:
            return None
        letters, end = self._listed(first[1], frozenset({first[0]}), self.text[start].islower())
        if len(letters) == 1 and (text := self._named_text(end)):
            if not letters <= text[0]:
                return letters | text[0], text[1]  # "(B) iron deficiency anemia", which is option C
            return letters, text[1]
        return letters, end

    def _listed(
        self, end: int, letters: frozenset[str], small: bool, verbs: bool = False
    ) -> tuple[frozenset[str], int]:
        """Add the letters that follow by "or", "and" or a comma; without ``verbs`` only those without a verb."""
        for _ in range(12):  # a model stuck on "(A) (A) (A) …" writes more
            following = phrases.NEXT.match(self.text, end)
            more = following and self._letter(following.end())
            if not following or not more:
                break
            here = self.text[following.end()]
            verb = phrases.AUXILIARY.match(self.text, more[1]) if here in "([" else None
            # "(A) and (B) are" refers to both, "(A), and (B) is" to the last.
            both = verbs and verb and ("r" in following[0].lower() or verb[0].split()[0].lower() in ("are", "were"))
            if (verb and not both) or (here.islower() and not small):
                break
            letters, end = letters | {more[0]}, more[1]
        return letters, end

    def _letter(self, start: int) -> tuple[str, int] | None:
        """Return the option letter at a position and its end; None for a word, an initial or an article."""
        if match := phrases.PAREN.match(self.text, start):
            return match[1].upper(), match.end()
        match = phrases.BARE.match(self.text, start)
        if not match:
            return None
        letter, end = match[1], match.end()
        option = letter.upper(), end
        own = self._named_text(end)
        if own and letter.upper() in own[0]:
            return option
        if letter in "ai" and not self._is_named(start):
            return option if phrases.ARTICLE_ENDS.match(self.text, end) else None
        if phrases.LETTER_ENDS.match(self.text, end) or (
            letter not in "AIai" and phrases.LETTER_ENDS_MORE.match(self.text, end)
        ):
            return option
        return None

    def _is_named(self, start: int) -> bool:
        return phrases.NAMED.search(self.text, max(0, start - 10), start) is not None

    def _option(self, start: int, article: bool = False) -> tuple[frozenset[str], int] | None:
        """Return the letters of the longest option text that starts at a position, and its end."""
        starts = [start]
        if article:
            starts.append(_at(phrases.ARTICLE, self.text, start))
        for begin in starts:
            for text, letters in self.options.items():
                end = begin + len(text)
                if self.lower.startswith(text, begin) and not self.lower[end : end + 1].isalnum():
                    return letters, end
        return None

    def _named_text(self, end: int) -> tuple[frozenset[str], int] | None:
        """Return the option text directly after a letter that ends at a position."""
        after = _at(phrases.GAP, self.text, end)
        return self._option(after) if after > end else None

    def _lists_options(self, start: int, letters: frozenset[str], end: int) -> bool:
        """Return whether an apparent answer is the first item of a list of all options."""
        if len(letters) != 1 or not self.text[start:].startswith(("(", "[", *letters)):
            return False
        following = re.escape(chr(ord(next(iter(letters))) + 1))
        walk = rf"[^\n]{{0,200}}\n\s*(?:[(\[]{following}[)\]]|{following}[.):])"
        inline = rf"(?:(?!\b(?:not|than|of|over|and|or)\b)[^\n]){{0,120}}?\s[(\[]{following}[)\]]\s+(?=\w)"
        if re.compile(walk).match(self.text, end):
            return True
        match = re.compile(inline).match(self.text, end)
        return bool(match) and not phrases.AUXILIARY.match(self.text, match.end() - 1 if match else end)

    def _statement(self, at: int) -> int:
        return bisect_left(self.ends, at)

    def _statement_end(self, at: int) -> int:
        number = bisect_left(self.ends, at)
        return self.ends[number] if number < len(self.ends) else len(self.text)

    def _statement_start(self, at: int) -> int:
        number = bisect_left(self.ends, at)
        return self.ends[number - 1] + 1 if number else 0
