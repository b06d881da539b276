"""Phrases by which a text states or rejects an option, as regular expressions over text that ``clean`` returned."""

from __future__ import annotations

import re
import unicodedata


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE | re.MULTILINE)


# What an option is called: a letter in parentheses, a letter alone, or both with the option's text.
LETTER = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]|(?<![\w'])([A-Za-z])(?![\w'+/-])")
# What may follow a letter that is not a word, an initial or an article: "A blood test", "C. difficile", "B cells".
LETTER_ENDS = re.compile(
    r"\s*\Z|[^\S\n]*\n|\s*[,;:!?)\]}&–—]|\.(?!\w|[^\S\n]+[a-z\d])| - "
    r"|\s+(?:because|since|and|or|but|which|nor|if|unless|rather\s+than|instead\s+of|over|due\s+to|is|fits|seems)\b"
)
LETTER_ENDS_MORE = re.compile(r"\s+(?:\(|(?:as|for|not|given|here|based)\b)")  # not after A and I
ARTICLE_ENDS = re.compile(r"[^\S\n]*\n|\s*[:)\]]|\.(?!\w|[^\S\n]+[a-z\d])|\s+(?:and|or)\s+[a-z]\b")
TEXT_ENDS = re.compile(
    r"\s*(?:\Z|\.(?!\w)|[;!?\n(]|[–—]|,\s*not\b|,?\s*(?:because|since|which|rather\s+than|instead\s+of)\b)"
)
GAP = re.compile(r" ?[.:)(,–—-]? ?")
NAMED = re.compile(r"\b(?:option|choice|letter)\s+\Z", re.IGNORECASE)
NEXT = re.compile(
    r"\s*(?:,\s*(?:and|or)\b|[,/&+→–—-]|->|\b(?:and/or|and|or|nor|plus|then|to)\b|(?=[(\[]))\s*(?:(?:option|choice)\s+)?",
    re.IGNORECASE,
)
VERB = re.compile(
    r"\s+(?:is|are|was|were|has|have|does|do|did|can|cannot|can't|would|could|should|may|might|will|isn't|doesn't)\b",
    re.IGNORECASE,
)

# What comes before an option that is stated.
_FILLER = (
    r"[\s,:]*(?:(?:therefore|thus|hence|most|likely|probably|clearly|definitely|indeed|still|simply|actually|be|it|is|"
    r"option|choice|letter|answer|the|an?|correct|right|best|not|either|neither|both|only)\b[\s,:]*){0,12}\Z"
)
_ANSWER = r"(?:\b(?:answer|antwort|réponse|respuesta|ответ)\b|答案|\bans\b\.?)"
_CHOICE = (
    r"(?:\b(?:correct|right|best|final|my) (?:option|choice|response|selection|diagnosis)\b"
    r"|\bmost (?:likely|appropriate|suitable|probable)(?: [a-z]+){1,3}?(?= is\b))"
)
ANSWER = _words(
    rf"(?:{_ANSWER}|{_CHOICE})[^.!?;\n:()\[\]]{{0,60}}?(?:\b(?:is|be|remains|isn't|ist|est|es)\b|'s\b|是|为){_FILLER}",
    rf"(?:{_ANSWER}|{_CHOICE}|^ ?(?:choice|option))(?: (?:choice|option|letter))?(?:\s*[:=→]| ?->| [-–—] ){_FILLER}",
    rf"{_ANSWER}\s*\n\s*\Z",
    rf"(?:^|[.!?:] ) ?{_ANSWER} (?:option |choice )?(?=\Z)",
)
CHOOSE = _words(
    r"\b(?:i|we)(?:'\w+)?(?: (?!(?:if|was|had|almost|nearly|first)\b)[\w']+){0,3}? "
    rf"(?:choose|pick|select|go with|going with|opt for|settle on|answer|say)\b{_FILLER}"
)
CONCLUDE = _words(
    r"\b(?:it|this|that)(?:'s\b| isn't\b| is\b"
    rf"| (?:must|should|has to|would|could|might|may|cannot|can't|can not|couldn't)(?: not)? be\b){_FILLER}",
    rf"\b(?:therefore|thus|hence|so|but|finally)\b[–—]?{_FILLER}",
)
CORRECT = _words(
    rf"\b(?:actually|rather|instead|sorry|oops|correction|i mean)\b{_FILLER}",
    rf"(?:^|[.!?…;,–—-] ?)(?:no|wait) ?[,:–—-]{_FILLER}",
)
OPENS = re.compile(
    r"(?:\A|[\n.;:!?]|\b(?:option|choice|answer|letter|that|only|but|because|since|think|believe)"
    r"|\b(?:so|thus|therefore|hence|actually|no|wait),?)\s*\Z",
    re.IGNORECASE,
)
ALSO = re.compile(r"\b(?:and|or|maybe|perhaps|possibly|also)\s+\Z", re.IGNORECASE)

# What comes after it.
STOP = re.compile(r"\s*(?:\Z|[.,;!?\n()–—-]|(?:because|since|as|here|for|given|not|rather|instead|over|or|and)\b)")
PREDICATE = re.compile(
    r"\s*,?(?:(?:\s+(?:is|are|must\s+be|would\s+be|should\s+be|seems|remains)|'s)\s+"
    r"(?:(?:therefore|thus|clearly|indeed|definitely|probably|likely|still)\s+)*"
    r"(?:(?:the\s+)?(?:only\s+)?(?:most\s+)?(?:(?:correct|right|best|likely|appropriate|accurate)\s+)?"
    r"(?:answer|option|choice|one)\b|(?:correct|right|better)\b)|\s+(?:fits|matches)\s+(?:best|better)\b)"
    r"(?=\s*(?:[.,;:!?\n]|\Z|because|since|as|here|for|given))",
    re.IGNORECASE,
)
DENIAL = re.compile(
    r"\s*(?:,?(?:\s+(?:is|are|was|would\s+be|must\s+be|can\s+be|could\s+be|seems)|'s)\s+(?:[a-z]+\s+){0,3}?"
    r"(?:not|wrong|incorrect|false|impossible|unlikely|excluded|eliminated|ruled\s+out|out)\b"
    r"|,?\s+(?:isn't|can't|cannot|can\s+not|couldn't|wouldn't)\s+be\b|,?\s+isn't\b"
    r"|\s*[:–—-]\s*(?:no|not|wrong|incorrect|false)\b)",
    re.IGNORECASE,
)
ALTERNATIVE = re.compile(r"[\s,]*\b(?:or|if|unless|maybe|perhaps|possibly|as\s+well\s+as)\b", re.IGNORECASE)

# What comes before it in its clause or sentence, if it is rejected, supposed or hedged.
DENIED = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\bneither|\bnor|\brather\s+than|\binstead\s+of|\bexcept|\bunlike|\bover"
    r"|\brul(?:e|es|ed|ing)\s+out|\bexclud\w+|\beliminat\w+|\breject\w*)\s+"
    r"(?:(?:be|just|necessarily|option|choice|both|either|with|choose|pick|select)\s+)*\Z",
    re.IGNORECASE,
)
NEGATION = _words(
    r"\b(?:not|cannot|never|neither|nor|wrong|incorrect|false|unlikely|least|nicht|no es|pas|не)\b",
    r"n't\b|不",
    r"(?<!no )(?<!without )\bdoubt",
)
CONDITION = _words(
    r"\b(?:if|whether|unless|suppose|supposing|assum\w+|wonder\w*|depends|maybe|perhaps|possibly|at first|initially)\b"
)
HEDGE = _words(
    r"\b(?:could|might|may|tempt\w*)\b",
    r"(?<!\bi )(?<!\bwe )\bwould (?:think|say|choose|pick|guess)\b",
    r"\b(?:some|many|others|people|students?)(?: \w+){0,2} (?:say|think|believe|argue|choose|pick)\b",
)
CLAUSE = _words(r"[,;:–—]| - |\b(?:so|thus|therefore|hence|but|because|then|and)\b")
FOLLOWS = _words(r"\b(?:so|thus|therefore|hence|but)\b")

# Sentences that take the answer back, or begin another question.
RETRACTION = _words(
    r"\bno,? wait\b(?=\s*(?:[,.!?…–—(\[-]|\Z))",
    r"\b(?:(?:scratch|scrap|strike|forget) (?:that|it)|never ?mind|i take (?:that|it) back)\b",
    r"\b(?:change my (?:answer|mind)|i (?:was|am) (?:wrong|mistaken)|i doubt (?:it|that))\b",
    r"\bi (?:made|have made) an? (?:mistake|error)\b",
    r"(?:^|[.!?…] ?)(?:or|maybe|perhaps)\b(?=[^.\n]{0,20}[(\[][A-Za-z][)\]])",
    r"\blet me (?:re-?\w+|double|check|think again)",
    r"\b(?:that|this|which|it|answer)(?:'s| is| was| seems| looks| would be| must be)(?: \w+){0,2}?"
    r" (?:wrong|incorrect|mistaken|a mistake|an error|impossible|not (?:right|correct|true|it|so|the answer))\b",
    r"\b(?:that|this|it|which)(?: isn't| cannot be| can't be| can not be) (?:right|correct|true|the answer)\b",
    r"\b(?:that|this|it) (?:doesn't|does not) (?:fit|work|match|make sense)\b",
    r"\b(?:that|this) (?:cannot|can't|can not) be\b",
)
QUESTION = _words(r"^ ?(?:(?:new|next) )?(?:question|problem|q|user|human)\b ?\d* ?[:.)\n]", r"<\|im_start\|>")
SENTENCE_END = re.compile(r"\.{2,}|…|[.!?](?=\s|\Z)|[;\n]")

# Lines that are an answer, or an item of a list of options.
MARKER = re.compile(
    r"\s*(?:[-•]\s*)?(?:option\s+|choice\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])(?=[.):]|\s*\Z))", re.I
)
LONE = re.compile(
    r"\s*(?:(?i:(?:final\s+)?(?:option|choice|letter))\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Zb-hj-z])\s*\)?)\s*[.!:,]*\s*"
    r"|\s*(?i:option|choice|letter)\s+([A-Za-z])\s*[.!]*\s*"
    r"|\s*([ai])\s*[.)]\s*"
)
LEAD = re.compile(r"\s*(?:(?:option|choice)\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\b)[\s.:)–—-]*", re.I)


def clean(text: str) -> str:
    """Remove the markup of a text, and replace full-width characters."""
    text = unicodedata.normalize("NFKC", text.replace("…", "\0")).replace("\0", "…").replace("。", ". ")
    text = text.replace("’", "'").replace("İ", "I")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{\s*\(?\s*([A-Za-z])\s*\)?\s*\}", r"answer is: (\1)", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"answer is: \1", text)
    text = re.sub(r"<answer>", "answer: ", text, flags=re.IGNORECASE)
    text = re.sub(r"</?\w+>|[*`$\"“”]|__|\\[()\[\]]|^[^\S\n]*#+[^\S\n]*", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!\w)['‘]([A-Za-z])'(?!\w)", r"(\1)", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"[^\S\n]+", " ", text)).strip()
