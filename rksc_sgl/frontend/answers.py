"""The answer in a free text, in a form that can be compared, and how far branches agree on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rksc_sgl.errors import OptionError

_DASHES = str.maketrans(dict.fromkeys("−–﹣－", "-"))
_MARKUP = "*_`\"' \t\r\n"  # what surrounds an answer without being part of it
_PUNCTUATION = _MARKUP + ".!?,;:"
_WRAPPERS = {"(": ")", "[": "]", "{": "}", "$": "$"}
_PLAIN_EXPONENT = 40  # numbers beyond 10 to the +-40 stay in scientific form

_DIGITS = r"(?:(?<![0-9],)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,4}})?"
_SIGNED = rf"(?:[-+]?[$€£]\s?|[$€£]?\s?[-+])?{_NUMBER}"
_CLOCK = r"[0-9]{1,2}(?::[0-9]{2}){1,2}(?!:)"
_UNIT = r"(?:km|cm|mm|m|kg|mg|g|ml|l|hrs?|h|min|s|mph|ft|in|lbs?|oz|am|pm)\b"
_NUMBER_IN_TEXT = re.compile(
    rf"(?<![\w.])(?P<number>{_CLOCK}|{_SIGNED}(?:\s?/\s?{_NUMBER})?(?:\s?(?:%|percent\b))?)(?:(?![\w%])|(?={_UNIT}))"
)
_NUMBER_PARTS = re.compile(
    rf"(?P<signs>[-+$€£\s]*)(?P<mantissa>(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+))(?:[eE](?P<exponent>[-+]?[0-9]{{1,4}}))?"
)
_NUMBER_LIST = re.compile(
    rf"{_SIGNED}(?:\s*(?:,\s*and|,|;|and)\s+{_SIGNED})+(?=\s*(?:[A-Za-z]+\s*)?(?:[.!?;)$*](?:\s|$)|$))"
)
_EXPRESSION = re.compile(rf"{_SIGNED}(?:\s*[+*×÷·^]\s*{_SIGNED})+(?=[\s.!?)$*]*$)")
_OPERAND = rf"\(*{_SIGNED}%?\)*(?:\s?[A-Za-z]+)?"
_CALCULATION = re.compile(rf"(?:{_OPERAND}(?:\s*[-+*/×÷·^]\s*{_OPERAND})*|[A-Za-z]\w*)\s*=\s*")

_MARKED = (
    re.compile(r"####\s*"),
    re.compile(r"\banswer\**\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE),
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_OPEN_BOX = re.compile(_BOXED.pattern + r"\s*\}?")  # of a text that ends too early, or of an empty box
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\((?P<round>[A-Z])\)|(?P<bare>[A-H])(?=[).:,]|$))|(?:option|choice)\s+(?P<named>[A-H])\b",
    re.IGNORECASE,
)
_CHOICE_IN_TEXT = re.compile(
    r"^[\s*_]*\((?P<first>[A-H])\)"  # the text begins with it
    r"|\b(?:correct|right|best)\s+(?:option|choice)\s*(?:is|:)?\s*\**\(?(?P<named>[A-H])\b"
    r"|(?:\((?P<said>[A-H])\)|\b(?:[Oo]ption|[Cc]hoice)\s+(?P<told>[A-H]))[*_]*\s+is\s+(?:the\s+)?(?:right|correct|best)\b"
    r"|(?:\((?P<last>[A-H])\)|\b(?:[Oo]ption|[Cc]hoice)\s+(?P<end>[A-H]))[\s*_.!]*$"  # or ends with it
    r"|^[\s*_]*(?P<alone>[A-H])[\s*_.!]*$"
)
_DECISION = re.compile(r"(yes|no|true|false)\b(?=[,.;:!]|\s*$)", re.IGNORECASE)


@dataclass(frozen=True)
class Agreement:
    """How far branches agree.

    Attributes:
        leader: the most frequent answer, None where no branch has one.
        votes: number of branches that give it.
        share: ``votes`` over the number of all branches; branches without an answer count against it.
        lead: ``share`` less that of the next answer.
        indices: the branches that give it.
    """

    leader: str | None
    votes: int
    share: float
    lead: float
    indices: tuple[int, ...]


def extract_answer(text: str) -> str | None:
    r"""The final answer in a text, normalised; None where there is none.

    Looked for in this order, the last occurrence of each that is followed by something: ``\boxed{...}``,
    ``#### ...``, "answer is ..." or "answer: ...", a choice's letter such as "option B" or "(B) is correct", and else
    the last number.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return _from_boxed(boxed)
    marked = _last_marked(text)
    if marked is not None:
        return _from_statement(marked)
    plain = _without_latex(text)
    choices = list(_CHOICE_IN_TEXT.finditer(plain))
    if choices:
        return _letter(choices[-1])
    numbers = [match.group("number") for match in _NUMBER_IN_TEXT.finditer(plain)]
    return normalize_answer(numbers[-1]) if numbers else None


def stated_answer(text: str) -> str | None:
    """What the text states as its final answer, as it was written; None where it states nothing.

    For graders that want the answer's own spelling. Marks are those of :func:`extract_answer`; a text without a mark
    states nothing, whatever numbers are in it.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    marked = _last_marked(text)
    return None if marked is None else marked.strip(_MARKUP).rstrip(".").rstrip(_MARKUP) or None


def normalize_answer(text: str) -> str | None:
    r"""One form for equal answers; None where nothing is left. Normalising twice changes nothing more.

    Numbers lose separators, currency signs and trailing zeros, and keep ``%``; ``a/b`` and ``\frac{a}{b}`` become
    ``a/b``, unreduced; words become lower case without the punctuation around them.
    """
    form = _normalize_once(text)
    while (again := _normalize_once(form)) != form:
        form = again
    return form or None


def agreement(answers: Sequence[str | None]) -> Agreement:
    """How far branches with these normalised answers agree; ties go to the answer that comes first."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Agreement(None, 0, 0.0, 0.0, ())
    ranked = counts.most_common(2)
    leader, votes = ranked[0]
    runner_up = ranked[1][1] if len(ranked) > 1 else 0
    return Agreement(
        leader,
        votes,
        votes / len(answers),
        (votes - runner_up) / len(answers),
        tuple(index for index, answer in enumerate(answers) if answer == leader),
    )


def majority(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> int | None:
    """Position of the first branch with the answer of the largest total weight; None where there is no answer.

    Args:
        answers: normalised answers.
        weights: of each branch; None counts each as 1. Ties go to the answer that comes first.

    Raises:
        OptionError: as many weights as answers are needed.
    """
    if weights is not None and len(weights) != len(answers):
        raise OptionError(f"weights: must be one for each of the {len(answers)} answers, got {len(weights)}")
    totals: dict[str, float] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + (1.0 if weights is None else weights[index])
    if not totals:
        return None
    return list(answers).index(max(totals, key=lambda answer: totals[answer]))


def _last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` that is closed and says something."""
    closed_at = _closing_braces(text)
    for box in reversed(list(_BOXED.finditer(text))):
        end = closed_at.get(box.end() - 1)
        if end is not None and normalize_answer(text[box.end() : end]) is not None:
            return text[box.end() : end]
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed closes: position of ``{`` to that of its ``}``."""
    closed_at: dict[int, int] = {}
    pending: list[int] = []
    for brace in re.finditer(r"[{}]", text):
        if brace.group() == "{":
            pending.append(brace.start())
        elif pending:
            closed_at[pending.pop()] = brace.start()
    return closed_at


def _last_marked(text: str) -> str | None:
    """The line after the last mark that is followed by something."""
    for pattern in _MARKED:
        for mark in reversed(list(pattern.finditer(text))):
            line = text[mark.end() :].partition("\n")[0]
            if _from_statement(line) is not None:
                return line
    return None


def _from_boxed(content: str) -> str | None:
    """A box holds nothing but the answer: at most units follow its number."""
    plain = _unwrapped(_without_latex(content))
    number = _NUMBER_IN_TEXT.match(plain)
    if number and re.fullmatch(r"[\sA-Za-z.]*", plain[number.end() :]):
        return normalize_answer(number.group("number"))
    return normalize_answer(content)


def _from_statement(statement: str) -> str | None:
    """The answer in what follows "the answer is": a letter, numbers, a number, or words up to a full stop."""
    plain = _without_latex(_OPEN_BOX.sub("", statement)).strip(_MARKUP)
    choice = _CHOICE.match(plain.rstrip(_PUNCTUATION))
    if choice:
        return _letter(choice)
    while calculation := _CALCULATION.match(plain):
        plain = plain[calculation.end() :]
    expression = _EXPRESSION.match(plain)
    if expression:  # not worked out: its first number is not the answer
        return re.sub(r"\s*([+*×÷·^])\s*", r" \1 ", expression.group(0))
    several = _NUMBER_LIST.match(plain)
    if several:
        parts = re.split(r"\s*(?:,\s*and|,|;|and)\s+", several.group(0))
        return ", ".join(normalize_answer(part) or part for part in parts)
    decision = _DECISION.match(plain)
    if decision:
        return decision.group(1).lower()
    number = _NUMBER_IN_TEXT.search(plain)
    return normalize_answer(number.group("number") if number else _SENTENCE_END.split(plain)[0])


def _letter(match: re.Match[str]) -> str:
    return next(letter for letter in match.groups() if letter is not None).lower()


def _without_latex(text: str) -> str:
    """Mathematical markup as plain characters; typographic dashes as ``-``."""
    plain = text.translate(_DASHES)
    plain = re.sub(r"\{,\}", ",", plain)
    plain = re.sub(r"\\[!,;:]|\\(?:left|right)(?![A-Za-z])", "", plain)
    plain = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", plain)
    plain = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", plain)
    return re.sub(r"\\([$%()\[\]{}])", r"\1", plain)


def _unwrapped(text: str) -> str:
    """Without the punctuation around it, and without brackets that enclose all of it."""
    bare = text.strip(_MARKUP).rstrip(_PUNCTUATION)
    while len(bare) > 1 and _encloses(bare):
        bare = bare[1:-1].strip(_MARKUP).rstrip(_PUNCTUATION)
    return bare


def _encloses(text: str) -> bool:
    opening, closing = text[0], _WRAPPERS.get(text[0])
    if closing is None or text[-1] != closing:
        return False
    return opening not in text[1:-1] and closing not in text[1:-1]


def _normalize_once(text: str) -> str:
    bare = _unwrapped(_without_latex(text))
    number = _normalize_number(bare)
    if number is not None:
        return number
    return re.sub(r"\s+", " ", bare.lower()).strip(_PUNCTUATION)


def _normalize_number(text: str) -> str | None:
    value = re.sub(r"\s?(?:%|percent)$", "", text)
    suffix = "%" if value != text else ""
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
