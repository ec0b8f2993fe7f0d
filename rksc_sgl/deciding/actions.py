"""What comes out of a decision: what to do next, and in the end what became of the fork."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal["certain", "probable", "window", "confidence", "policy", "all_ended", "cancelled"]
Fate = Literal["finished", "failed", "stopped", "not_started", "waiting", "running"]


@dataclass(frozen=True)
class Start:
    """Start these branches."""

    branches: tuple[int, ...]


@dataclass(frozen=True)
class Abort:
    """End these branches; what they generated so far is not wanted."""

    branches: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Verify:
    """Verify these branches, which have finished, and report each with ``verified``."""

    branches: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """The fork is decided; nothing more is to be started.

    Attributes:
        answer: the answer's class; None where no branch has an answer, or the fork was cancelled.
        branch: the earliest branch that finished with it; None without an answer.
        reason: what decided; ``all_ended``: every branch ran to its end. Where the policy dropped branches it is the
            policy's: ``confidence``, or ``policy`` for a caller's own.
        statement: the same in a sentence, with its probability.
        probability: bound on P(the vote of all N branches has another answer): 0 where it cannot have, None where
            nothing is known about it, as where the policy dropped branches.
        votes: the votes that were counted, the most first.
    """

    answer: str | None
    branch: int | None
    reason: Reason
    statement: str
    probability: float | None
    votes: tuple[tuple[str, int], ...]


Action = Start | Abort | Verify | Done


@dataclass(frozen=True)
class BranchRecord:
    """What became of one branch.

    Attributes:
        fate: ``stopped``: it was aborted while it ran. ``not_started``: it never ran.
        why: the reason of a stop or failure; None for one that finished.
        tokens: that it generated.
        ended_at: tokens that the whole fork had generated when its fate was sealed; None while it is open.
        answer: the class of its answer; also of one that finished after it was aborted, which has no vote.
        truncated: it was cut by its token limit.
        abandoned: it was stopped, but nobody could end what generates it: it runs on, unheard, and saves nothing.
    """

    fate: Fate
    why: str | None
    tokens: int
    ended_at: int | None
    answer: str | None
    truncated: bool
    abandoned: bool = False


@dataclass(frozen=True)
class Record:
    """What became of a fork.

    Attributes:
        branches: of each branch, in the order of launch.
        done: how it was decided; None while it is not.
        tokens_spent: by all branches.
        tokens_saved: estimated: branches that were not started or were stopped (and not abandoned) would have run to
            the mean length of those that finished by themselves. Where short branches finish first, that is too little
            rather than too much. 0 where none finished.
        policy_error: what the policy raised; it was not asked again, and all branches ran.
    """

    branches: tuple[BranchRecord, ...]
    done: Done | None
    tokens_spent: int
    tokens_saved: int
    policy_error: str | None

    def of_fate(self, fate: Fate) -> list[int]:
        """Which branches met this fate."""
        return [index for index, branch in enumerate(self.branches) if branch.fate == fate]
