"""How far branches agree on an answer, and which answer most of them give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rksc_sgl.answers.classes import classes_of
from rksc_sgl.answers.mathematics import same_answer
from rksc_sgl.errors import OptionError


@dataclass(frozen=True)
class Agreement:
    """How far branches agree.

    Attributes:
        leader: the most frequent answer, in the spelling that came first; None where no branch has one.
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


def agreement(answers: Sequence[str | None], equal: Callable[[str, str], bool] = same_answer) -> Agreement:
    """How far branches with these normalised answers agree; ties go to the answer that comes first.

    Args:
        answers: normalised answers; None for a branch without one.
        equal: whether two spellings are one answer.
    """
    answers = classes_of(answers, equal)
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


def majority(
    answers: Sequence[str | None],
    weights: Sequence[float] | None = None,
    equal: Callable[[str, str], bool] = same_answer,
) -> int | None:
    """Position of the first branch with the answer of the largest total weight; None where there is no answer.

    Args:
        answers: normalised answers.
        weights: of each branch; None counts each as 1. Ties go to the answer that comes first.
        equal: whether two spellings are one answer.

    Raises:
        OptionError: as many weights as answers are needed.
    """
    if weights is not None and len(weights) != len(answers):
        raise OptionError(f"weights: must be one for each of the {len(answers)} answers, got {len(weights)}")
    answers = classes_of(answers, equal)
    totals: dict[str, float] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + (1.0 if weights is None else weights[index])
    if not totals:
        return None
    return answers.index(max(totals, key=lambda answer: totals[answer]))
