"""What the pipelines are given: problems after worked ones, in equal prompts or after openings of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.verify_cost import context
from programs.problems import GSM8K, Problem, load_problems

ALL = 100  # items that GSM8K has here

OPENINGS = (
    "You are a careful mathematician. Check every step before you go on.",
    "Read what follows twice. Somebody relies on the number that you give at the end.",
    "Solve the last of these problems with an equation: name the unknown first, then find it.",
    "A student will read your solution, so write each calculation on a line of its own.",
    "Work backwards from what is asked to what is given, and only then compute.",
    "Estimate the answer roughly before you start, and compare your result with the estimate.",
    "Keep track of units: write them beside every number, from the first line to the last.",
    "Be brief. Two or three short sentences and the final number are all that is wanted.",
)


@dataclass(frozen=True)
class Item:
    """One problem as a pipeline gets it.

    Attributes:
        name: unique in a run.
        prompts: the user's message of each branch.
    """

    name: str
    prompts: tuple[str, ...]

    @property
    def branches(self) -> int:
        return len(self.prompts)


def items(
    count: int, branches: int, material: int, tokens_of: Callable[[str], int], *, openings: bool, seed: int = 0
) -> list[Item]:
    """Problems of GSM8K, each after worked ones of its own.

    Args:
        count: how many.
        branches: of each.
        material: tokens of the worked problems, about: as many whole problems as come closest.
        tokens_of: how many tokens a text has.
        openings: whether each branch begins with an opening of its own, so that no two prompts begin alike.
        seed: of the choice of worked problems.
    """
    pool = load_problems(GSM8K, ALL)
    problems, rest = pool[:count], pool[count:]
    made = []
    for index, problem in enumerate(problems):
        order = random.Random(f"{seed} {index}").sample(rest, len(rest))
        text = f"{_worked(order, material, tokens_of)}\n\nProblem: {problem.question}"
        own = [f"{opening(branch)}\n\n{text}" if openings else text for branch in range(branches)]
        made.append(Item(problem.id, tuple(own)))
    return made


def opening(branch: int) -> str:
    """How the prompt of a branch begins where each begins differently."""
    again, index = divmod(branch, len(OPENINGS))
    return f"Attempt {again + 1}, independent of all others. {OPENINGS[index]}" if again else OPENINGS[index]


def _worked(order: list[Problem], material: int, tokens_of: Callable[[str], int]) -> str:
    sizes = [abs(tokens_of(context(order[:number])) - material) for number in range(1, len(order) + 1)]
    return context(order[: 1 + sizes.index(min(sizes))])
