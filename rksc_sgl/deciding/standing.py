"""What is known of the branches of a fork while they run: the votes, and whose answer leads.

The vote of all N branches goes to the answer that most of them give; ties go to the answer whose first branch comes
first in the order of launch. A branch without an answer (it failed, was dropped, was cut, or says nothing) has no
vote. Answers are compared as strings here: equal ones must come under one name
(:class:`rksc_sgl.answers.AnswerClasses`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a branch ended.

    Attributes:
        answer: the name of its answer's class; None where it has no vote.
        truncated: it was cut by its token limit.
        score: P(affirmative label) of its verification; None where it was not verified.
        confidence: mean confidence of its tokens; None where it was not measured.
        dropped: the policy ended it: it would have had a vote, which nobody knows.
    """

    answer: str | None
    truncated: bool = False
    score: float | None = None
    confidence: float | None = None
    dropped: bool = False


@dataclass(frozen=True)
class Standing:
    """The fork as a policy sees it. Branches are in the order of launch.

    Attributes:
        outcomes: of each of the N branches; None for one that has not ended.
        started: how many were started or asked to; the first ones.
        tokens: that each branch generated so far.
        lowest_confidence: for each branch the lowest mean confidence over the policy's window of tokens so far; None
            where no whole window was measured.
    """

    outcomes: tuple[Outcome | None, ...]
    started: int
    tokens: tuple[int, ...] = ()
    lowest_confidence: tuple[float | None, ...] = ()

    @property
    def branches(self) -> int:
        """N."""
        return len(self.outcomes)

    @property
    def running(self) -> list[int]:
        """Branches that were started and have not ended."""
        return [index for index in range(self.started) if self.outcomes[index] is None]

    @property
    def ended(self) -> int:
        """How many first branches have all ended: votes of these can be counted without favouring short branches."""
        return next((index for index, outcome in enumerate(self.outcomes) if outcome is None), self.branches)

    def votes(self, first: int | None = None) -> Votes:
        """The votes of the first branches that have ended; of all of them where ``first`` is None."""
        return Votes.of(
            (index, outcome.answer) for index, outcome in enumerate(self.outcomes[:first]) if outcome is not None
        )


@dataclass(frozen=True)
class Votes:
    """Counted votes.

    Attributes:
        counts: of each answer, the leader first: most votes, ties to the earliest branch.
        earliest: the first branch with each answer.
    """

    counts: dict[str, int]
    earliest: dict[str, int]

    @classmethod
    def of(cls, answers: Iterable[tuple[int, str | None]]) -> Votes:
        """Count; pairs of a branch's place and its answer."""
        counts: dict[str, int] = {}
        earliest: dict[str, int] = {}
        for index, answer in answers:
            if answer is not None:
                counts[answer] = counts.get(answer, 0) + 1
                earliest[answer] = min(index, earliest.get(answer, index))
        ranked = sorted(counts, key=lambda answer: (-counts[answer], earliest[answer]))
        return cls({answer: counts[answer] for answer in ranked}, earliest)

    @property
    def leader(self) -> str | None:
        return next(iter(self.counts), None)

    @property
    def lead(self) -> tuple[int, int]:
        """Votes of the leader, and of the strongest other answer."""
        first_two = [*self.counts.values(), 0, 0][:2]
        return first_two[0], first_two[1]

    def cannot_change(self, unknown: Sequence[int]) -> bool:
        """Whether the leader wins however the branches that are not known yet will vote.

        At worst all of them vote for one other answer. A tie with it is the leader's only if its first branch comes
        before the other's first and before every unknown branch.

        Args:
            unknown: places of these branches, ascending.
        """
        if self.leader is None:
            return not unknown
        votes, rest = self.counts[self.leader], len(unknown)
        ahead = self.earliest[self.leader]
        first_unknown = unknown[0] if unknown else ahead + 1
        for answer, others in [*list(self.counts.items())[1:], ("", 0)]:
            margin = votes - others - rest
            if margin < 0:
                return False
            if (
                margin == 0
                and min(self.earliest.get(answer, first_unknown) if others else first_unknown, first_unknown) < ahead
            ):
                return False
        return True


def full_vote(answers: Sequence[str | None]) -> str | None:
    """The answer that wins the vote of all these branches; None where none has an answer."""
    return Votes.of(enumerate(answers)).leader
