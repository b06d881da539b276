"""Read a number in a text, as people and models write it: 1,234.5, 1'234, −3, $5, 12 %, 3/4, 2.5e-3, 2.5 × 10^-3."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 400  # characters of a number, and decimal places that its exponent may move the point

_DIGITS = r"\d{1,3}(?:[,.'’ \u00a0\u202f]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)?|\.\d+"
# A minus is a sign if a digit follows it and no number or word precedes it: 5-3, covid-19 and the list item "- 5" have
# no negative number.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-−–+])?[$€£]?(?P<minus>(?<=[$€£])[-−])?(?<![\d.,])(?<!\d/)(?P<digits>{_DIGITS})"
    r"(?:[eE](?P<exponent>[-+]?\d{1,4})|\s?(?:×|\*|x|\\times)\s?10\s?(?:\^|\*\*)\s?\{?(?P<power>[-−+]?\d{1,4})\}?)?"
    r"(?:/(?P<divisor>\d+)(?![\d/.]))?"
)


def last_number(text: str) -> Fraction | None:
    """Return the last number in a text, exactly; None if there is none.

    The last one, because texts that reason first end with their answer. Currency signs and % are ignored: "12 %" is 12.
    A single comma is a decimal comma, unless three digits follow: "3,5" is 3.5, and "1,234" is 1234.
    """
    value = None
    for match in _NUMBER.finditer(text):
        if (number := _value(match)) is not None:
            value = number
    return value


def _value(match: re.Match[str]) -> Fraction | None:
    digits = match["digits"]
    exponent = int((match["exponent"] or match["power"] or "0").replace("−", "-"))
    divisor = int(match["divisor"]) if match["divisor"] and len(match["divisor"]) <= LONGEST else 1
    if len(digits) > LONGEST or abs(exponent) > LONGEST or divisor == 0:
        return None
    number = Fraction(_decimal(digits)) * Fraction(10) ** exponent / divisor
    negative = match["minus"] or (match["sign"] or "+") != "+"
    return -number if negative else number


def _decimal(digits: str) -> str:
    """Digits with a decimal point, and without what groups thousands."""
    digits = re.sub(r"['’ \u00a0\u202f]", "", digits)
    marks = re.sub(r"\d", "", digits)
    if len(set(marks)) == 2:  # the last mark is the decimal one
        return digits.replace(marks[0], "").replace(marks[-1], ".")
    grouped = re.fullmatch(r"\d{1,3}(?:[,.]\d{3})+", digits)
    if len(marks) > 1 or (marks == "," and grouped and not digits.startswith("0")):
        return re.sub("[,.]", "", digits)
    return digits.replace(",", ".")


def written(number: Fraction) -> str:
    """Write a number in decimal if it is finite, otherwise as a fraction."""
    if number.denominator == 1:
        return str(number.numerator)
    rest = number.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    places = 0
    while (number * 10**places).denominator != 1:
        places += 1
    scaled = str(abs((number * 10**places).numerator)).zfill(places + 1)
    return f"{'-' if number < 0 else ''}{scaled[:-places]}.{scaled[-places:]}"
