"""Numbers and what may follow them: how they are written, their normal form and their exact value."""

from __future__ import annotations

import re
from fractions import Fraction

_PLAIN_EXPONENT = 40  # numbers beyond 10 to the +-40 stay in scientific form
_LONGEST_UNIT = 4  # words

_DIGITS = r"(?:(?<![0-9],)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_SIGN = r"(?:[-+]?[$€£]\s?|[$€£]?\s?[-+])?"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,4}})?"
_MIXED = rf"{_SIGN}{_DIGITS}\x20[0-9]{{1,4}}/[0-9]{{1,4}}(?![/.]?[0-9])"
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SCALE = rf"(?:{'|'.join(_SCALES)})\b"
_SHORT_UNIT = r"(?:km|cm|mm|m|kg|mg|g|ml|l|hrs?|h|min|s|mph|ft|in|lbs?|oz|am|pm)\b"

SIGNED_NUMBER = rf"{_SIGN}{_UNSIGNED}"
CLOCK = r"[0-9]{1,2}(?::[0-9]{2}){1,2}(?!:)"
NUMBER_IN_TEXT = re.compile(
    rf"(?<![\w.])(?P<number>{CLOCK}|{_MIXED}"
    rf"|{SIGNED_NUMBER}(?:\s?/\s?{_UNSIGNED})?(?:\s?(?:%|percent\b)|\x20{_SCALE})?)"
    rf"(?:(?![\w%])|(?={_SHORT_UNIT}))"
)
"""A number that stands by itself: a time, a mixed number, a fraction, a percentage, one with a scale ("5 million")."""

_NUMBER_PARTS = re.compile(
    rf"(?P<signs>[-+$€£\s]*)(?P<mantissa>(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+))(?:[eE](?P<exponent>[-+]?[0-9]{{1,4}}))?"
)
_MIXED_PARTS = re.compile(rf"(?P<whole>{_SIGN}{_DIGITS})\s+(?P<fraction>[0-9]+\s?/\s?[0-9]+)")
_QUANTITY = re.compile(
    rf"(?:[a-z]\s?=\s?)?(?P<number>{_MIXED}|{SIGNED_NUMBER}(?:\s?/\s?{_UNSIGNED})?)"
    rf"(?:\s?(?P<scale>{_SCALE}))?(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_UNIT_WORD = re.compile(r"[^\W\d_][^\W\d_'.²³-]*(?:/[^\W\d_]+[²³]?)?|°[^\W\d_]*|[mglsh][²³]?", re.UNICODE)
_ATTACHED_UNIT = re.compile(rf"{_SHORT_UNIT}|[^\W\d_]{{4,}}|°", re.IGNORECASE)
# Words after a number that make another number of it, or no number at all.
_NO_UNIT = re.compile(
    r"and|or|to|plus|minus|times|over|by|squared|cubed|half|quarter|quarters|third|thirds|less|more|fewer"
    r"|than|mod|divided|multiplied|if|when|because|since|so|not|am|pm|a\.m|p\.m|o'clock|pi|sqrt|sin|cos|tan"
    r"|log|ln|exp|frac|inf|infinity|th|st|nd|rd|remainder|through|until",
    re.IGNORECASE,
)


def is_unit(text: str) -> bool:
    """Whether what follows a number only says what is counted: at most four words, or a percent sign.

    Single letters are variables, except for those of metre, gram, litre, second and hour; words that change the number
    ("5 or more", "5 squared") or the time of day ("5 pm") are no unit.
    """
    bare = text.strip(" .")
    if bare.lower() in ("", "%", "percent"):
        return True
    if not text[:1].isspace() and _ATTACHED_UNIT.match(text) is None:
        return False
    words = bare.lower().split()
    return len(words) <= _LONGEST_UNIT and all(
        _NO_UNIT.fullmatch(word) is None
        and _UNIT_WORD.fullmatch(word.rstrip(".,")) is not None
        and (len(word) > 1 or word in "mglsh°")
        for word in words
    )


def exact_value(text: str) -> Fraction | None:
    """The value of a number, whatever it counts; None where the text is none, or too large to be written out.

    Thousands separators and signs of currency say nothing. A percent sign and a unit say what is counted, and are not
    part of the value: ``50%``, ``50 apples`` and ``50`` are 50. ``x = 5`` is 5, ``3 1/2`` is 7/2, ``5 million`` is
    5,000,000.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or not is_unit(match["rest"]):
        return None
    number = normalize_number(match["number"])
    if number is None:
        return None
    whole, _, fraction = number.rpartition(" ")
    numerator, _, denominator = fraction.partition("/")
    if denominator == "0":
        return None
    value = Fraction(numerator) / Fraction(denominator or 1)
    if whole:
        value = Fraction(whole) - value if whole.startswith("-") else Fraction(whole) + value
    return value * _SCALES[match["scale"].lower()] if match["scale"] else value


def normalize_number(text: str) -> str | None:
    """A number in its one spelling, fractions unreduced, ``%`` kept; None where the text is no number alone."""
    value = re.sub(r"\s?(?:%|percent)$", "", text)
    suffix = "%" if value != text else ""
    mixed = _MIXED_PARTS.fullmatch(value.strip())
    if mixed is not None:
        whole, fraction = _normalize_decimal(mixed["whole"]), normalize_number(mixed["fraction"])
        return None if whole is None or fraction is None else f"{whole} {fraction}{suffix}"
    numerator, slash, denominator = value.partition("/")
    left = _normalize_decimal(numerator.strip())
    if not slash:
        return None if left is None else left + suffix
    right = _normalize_decimal(denominator.strip())
    return None if left is None or right is None else f"{left}/{right}{suffix}"


def _normalize_decimal(text: str) -> str | None:
    parts = _NUMBER_PARTS.fullmatch(text.strip("$€£ "))
    if parts is None or len(re.findall(r"[-+]", parts.group("signs"))) > 1:
        return None
    whole, _, fraction = parts.group("mantissa").replace(",", "").partition(".")
    point = len(whole) + int(parts.group("exponent") or 0)
    digits = (whole + fraction).lstrip("0")
    point -= len(whole + fraction) - len(digits)
    digits = digits.rstrip("0")
    if not digits:
        return "0"
    return ("-" if "-" in parts.group("signs") else "") + _spelled(digits, point)


def _spelled(digits: str, point: int) -> str:
    """The number 0.DIGITS * 10**point; digits neither begin nor end with 0. Exact: no float is involved."""
    if abs(point) > _PLAIN_EXPONENT:
        mantissa = f"{digits[0]}.{digits[1:]}" if len(digits) > 1 else digits
        return f"{mantissa}e{point - 1}"
    if point >= len(digits):
        return digits + "0" * (point - len(digits))
    if point > 0:
        return f"{digits[:point]}.{digits[point:]}"
    return "0." + "0" * -point + digits
