"""The answer in a free text, in a form that can be compared, and how far branches agree on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rksc_sgl.errors import OptionError

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?"
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.])[-+]?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?\s?%?(?!\w)"
)
_MARKED = (
    re.compile(r"####\s*"),
    re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE),
)
_CHOICE = re.compile(r"^\(?([A-Za-z])\)?(?:[.):,\s]|$)")


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

    Looked for in this order, the last occurrence of each: ``\boxed{...}``, ``#### ...``, "answer is ..." or
    "answer: ...", and else the last number.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return normalize_answer(boxed)
    for pattern in _MARKED:
        marks = list(pattern.finditer(text))
        if marks:
            answer = _from_statement(text[marks[-1].end() :].partition("\n")[0])
            if answer is not None:
                return answer
    numbers = _NUMBER_IN_TEXT.findall(text.replace("−", "-"))
    return normalize_answer(numbers[-1]) if numbers else None


def normalize_answer(text: str) -> str | None:
    """One form for equal answers: numbers without separators, currency or trailing zeros; words in lower case."""
    compact = text.replace("−", "-").strip().strip("*_`\"' ").strip()
    compact = re.sub(r"^\\(?:text|mathrm)\{(.*)\}$", r"\1", compact)
    compact = compact.rstrip(".!?,;:").strip()
    number = _normalize_number(compact)
    if number is not None:
        return number
    words = re.sub(r"\s+", " ", compact.lower()).strip("()[]. ")
    return words or None


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
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def _from_statement(statement: str) -> str | None:
    """The answer in what follows "the answer is": a choice's letter, a number, or the words up to a full stop."""
    statement = statement.replace("−", "-").strip().strip("*_`$ ").strip()
    choice = _CHOICE.match(statement)
    if choice and (statement.startswith("(") or choice.group(1).isupper()) and len(choice.group(0).strip()) <= 3:
        rest = statement[choice.end() :]
        if statement.startswith("(") or not rest or choice.group(0)[-1] in ").:,":
            return choice.group(1).lower()
    number = _NUMBER_IN_TEXT.search(statement)
    if number:
        return normalize_answer(number.group(0))
    return normalize_answer(re.split(r"[.!?](?:\s|$)", statement)[0])


def _normalize_number(text: str) -> str | None:
    percent = text.endswith("%")
    compact = re.sub(r"[$€£\s]", "", text.rstrip("%"))
    numerator, slash, denominator = compact.partition("/")
    if slash:
        left, right = _normalize_number(numerator), _normalize_number(denominator)
        return f"{left}/{right}" if left is not None and right is not None else None
    if not re.search(r"\d", compact) or not re.fullmatch(_NUMBER, compact):
        return None
    plain = compact.replace(",", "").lstrip("+")
    if "e" in plain.lower():
        plain = f"{float(plain):.12g}"
    negative = plain.startswith("-")
    whole, _, fraction = plain.lstrip("-").partition(".")
    if "e" not in plain:
        whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return ("-" if negative and value != "0" else "") + value + ("%" if percent else "")
