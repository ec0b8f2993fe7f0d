"""What the pipelines are given: problems after worked ones, in prompts that are equal, or begin differently."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.verify_cost import context
from programs.asking import SYSTEM
from programs.problems import GSM8K, Problem, load_problems
from rksc_sgl.errors import RkscError
from rksc_sgl.similarity.content_guard import same_content

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
WORDINGS = (  # instructions that the content guard of merges forgives
    "Think step by step.",
    "Solve this problem carefully.",
    "Please show your work.",
    "Take your time.",
    "Read the problem twice before you answer.",
    "Let's work through it one step at a time.",
    "Explain your reasoning clearly.",
    "Check your calculations.",
)


@dataclass(frozen=True)
class Item:
    """One problem as a pipeline gets it.

    Attributes:
        name: unique in a run.
        prompts: the user's message of each branch.
        system: the system's message before all of them; None leaves it to the model's chat template.
    """

    name: str
    prompts: tuple[str, ...]
    system: str | None = None

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
    begin = opening if openings else None
    return [
        Item(name, _prompts(text, branches, begin))
        for name, text in _texts(load_problems(GSM8K, ALL), count, material, tokens_of, seed)
    ]


def reworded(count: int, branches: int, material: int, tokens_of: Callable[[str], int], *, seed: int = 0) -> list[Item]:
    """The same under instructions that do not change what is asked, another one for each branch: these may merge.

    Only of problems in which the content guard forgives an instruction: it forgives none where a text speaks with its
    reader, or of words. The system's message is ours, for that of a chat template may not be one that it forgives.

    Raises:
        RkscError: there are too few such problems.
    """
    pool = [problem for problem in load_problems(GSM8K, ALL) if _is_forgiving(problem)]
    if count > len(pool) // 2:
        raise RkscError(f"--problems: prompts that may merge can be made of {len(pool) // 2}, got {count}")
    return [
        Item(name, _prompts(text, branches, wording), SYSTEM)
        for name, text in _texts(pool, count, material, tokens_of, seed)
    ]


def opening(branch: int) -> str:
    """How the prompt of a branch begins where each begins differently."""
    again, index = divmod(branch, len(OPENINGS))
    return f"Attempt {again + 1}, independent of all others. {OPENINGS[index]}" if again else OPENINGS[index]


def wording(branch: int) -> str:
    """The instruction of a branch where each has another one that asks the same."""
    again, index = divmod(branch, len(WORDINGS))
    return f"{WORDINGS[(again - 1) % len(WORDINGS)]} {WORDINGS[index]}" if again else WORDINGS[index]


def _texts(
    pool: Sequence[Problem], count: int, material: int, tokens_of: Callable[[str], int], seed: int
) -> Iterator[tuple[str, str]]:
    """The name and the text of each item: a problem of the first ones, after others of the rest."""
    problems, rest = pool[:count], pool[count:]
    for index, problem in enumerate(problems):
        order = random.Random(f"{seed} {index}").sample(rest, len(rest))
        yield problem.id, f"{_worked(order, material, tokens_of)}\n\nProblem: {problem.question}"


def _prompts(text: str, branches: int, begin: Callable[[int], str] | None) -> tuple[str, ...]:
    return tuple(text if begin is None else f"{begin(branch)}\n\n{text}" for branch in range(branches))


def _is_forgiving(problem: Problem) -> bool:
    """Whether prompts with this problem, worked and to be solved, ask the same under two instructions."""
    text = f"{context([problem])}\n\nProblem: {problem.question}"
    return same_content(f"{WORDINGS[0]}\n\n{text}", f"{WORDINGS[1]}\n\n{text}").same


def _worked(order: list[Problem], material: int, tokens_of: Callable[[str], int]) -> str:
    sizes = [abs(tokens_of(context(order[:number])) - material) for number in range(1, len(order) + 1)]
    return context(order[: 1 + sizes.index(min(sizes))])
