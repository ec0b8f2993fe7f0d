"""What the branches are asked of whose answers sharing might change: other openings, then the same worked problems.

The openings are instructions that the content guard forgives, so that one set of prompts can be blended and merged.
Where a problem speaks with its reader, the guard forgives no opening, and a merge is declined. Worked problems are
taken from those beside which it does, as far as the source has them; the problem itself is taken as it comes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from programs.problems import GSM8K, Problem, load_problems
from rksc_sgl.errors import OptionError
from rksc_sgl.similarity.content_guard import same_content

SOURCES = (GSM8K, "reasoning-gym:aiw", "reasoning-gym:family_relationships")
WORKED = 40  # problems of a source that are only ever worked ones
ALL = 100  # items that GSM8K has here
WORKED_SEED = 1_000_000  # added for worked problems: a generator's neighbouring seeds give nearly the same problems

OPENINGS = (  # the longest first, so that what the others take over stands at positions that they can have
    "First understand the question. Then compute what is asked, and double-check the arithmetic.",
    "Solve the following problem carefully. Show all your calculations.",
    "You are a careful mathematician who explains each step clearly. Take your time.",
    "Please read the problem twice before answering. Then explain your reasoning in detail.",
    "Break the problem into small steps, solve each one, and check your work.",
    "Hello. I need your help with this exercise. Please explain the solution clearly.",
    "Think step by step.",
    "Let us work through it systematically. Show how you reached the answer.",
)
CLOSING = "Show the steps, and end with 'The answer is ...'."


@dataclass(frozen=True)
class Item:
    """One problem as its branches get it.

    Attributes:
        source: where it is from.
        problem: with its grader.
        prompts: the user's message of each branch.
    """

    source: str
    problem: Problem
    prompts: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Source and id."""
        return self.source, self.problem.id


def items(source: str, count: int, *, branches: int, worked: int, seed: int = 0) -> list[Item]:
    """The first problems of a source. What each of them reads does not depend on their number.

    Args:
        source: as :func:`programs.problems.load_problems` takes it.
        count: how many.
        branches: of each, at most as many as there are openings.
        worked: problems that are shown with their solutions before each.
        seed: of generated problems, and of the choice of worked ones.

    Raises:
        OptionError: no such source, more problems than it has, or more branches or worked ones than there are.
        RkscError: the source's package is not installed.
    """
    if not 2 <= branches <= len(OPENINGS):
        raise OptionError(f"branches: must be 2 to {len(OPENINGS)}, one for each opening, got {branches}")
    if not 1 <= worked < WORKED:
        raise OptionError(f"worked: must be 1 to {WORKED - 1}, got {worked}")
    asked, pool = _of_gsm8k(count) if source == GSM8K else _generated(source, count, seed)
    pool = _to_be_shown(source, pool, worked)
    made = []
    for problem in asked:
        others = [one for one in pool if one.question != problem.question]
        shown = random.Random(f"{seed} {problem.id}").sample(others, worked)
        text = _text(shown, problem)
        made.append(Item(source, problem, tuple(f"{opening}\n\n{text}" for opening in OPENINGS[:branches])))
    return made


def _of_gsm8k(count: int) -> tuple[list[Problem], list[Problem]]:
    problems = load_problems(GSM8K, ALL)
    most = ALL - WORKED
    if not 1 <= count <= most:
        raise OptionError(f"problems: {GSM8K} has {most} to be asked, the others are worked ones; got {count}")
    return problems[:count], problems[most:]


def _generated(source: str, count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    return load_problems(source, count, seed), load_problems(source, WORKED, seed + WORKED_SEED)


def _to_be_shown(source: str, pool: Sequence[Problem], worked: int) -> list[Problem]:
    """Those beside which the guard forgives an opening; all where these are fewer than are needed. Each once.

    Raises:
        OptionError: there are too few in all.
    """
    answered = list({one.question: one for one in pool if one.reference}.values())
    forgiving = [one for one in answered if _forgives(with_solution(one))]
    chosen = forgiving if len(forgiving) > worked else answered
    if len(chosen) <= worked:  # one of them may be the problem itself
        raise OptionError(f"worked: {source} has {len(answered)} problems that can be shown with answers, got {worked}")
    return chosen


def _forgives(text: str) -> bool:
    first, second, *_ = OPENINGS
    return same_content(f"{first}\n\n{text}", f"{second}\n\n{text}").same


def _text(shown: Sequence[Problem], problem: Problem) -> str:
    worked = "\n\n".join(with_solution(one) for one in shown)
    return (
        f"Here are some problems with their answers.\n\n{worked}\n\nNow solve this one.\n\n"
        f"Problem: {problem.question.strip()}\n\n{CLOSING}"
    )


def with_solution(problem: Problem) -> str:
    """A problem as one that was worked."""
    steps = f"{problem.solution}\n" if problem.solution else ""
    return f"Problem: {problem.question.strip()}\n{steps}The answer is {problem.reference}."
