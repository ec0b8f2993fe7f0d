"""What a policy would have done with branches that were recorded in full: exact, token by token, without a model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from rksc_sgl.deciding.actions import Abort, Action, Done, Record, Start, Verify
from rksc_sgl.deciding.decision import Decision
from rksc_sgl.deciding.spec import EarlyStop
from rksc_sgl.errors import OptionError

CHUNK = 16  # tokens between two looks at a branch's confidence


@dataclass(frozen=True)
class RecordedBranch:
    """One branch that ran to its end.

    Attributes:
        tokens: that it generated, at least 1.
        answer: the name of its answer's class; None for no vote.
        truncated: it was cut by its token limit.
        failed: why it failed; None where it did not.
        confidence: of each token; empty where it was not recorded.
    """

    tokens: int
    answer: str | None
    truncated: bool = False
    failed: str | None = None
    confidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Replayed:
    """What came of it.

    Attributes:
        done: the decision.
        record: what became of each branch.
        steps: decode steps until it was decided, if a branch gets a token in each.
        tokens_fraction: tokens spent, over those of all branches.
        steps_ratio: ``steps`` over the longest branch's tokens, which is how long all of them take side by side.
    """

    done: Done
    record: Record
    steps: int
    tokens_fraction: float
    steps_ratio: float


def replay(branches: Sequence[RecordedBranch], spec: EarlyStop) -> Replayed:
    """Run a decision over recorded branches, all of which run side by side and get a token in each step.

    Raises:
        OptionError: no branches, one without tokens, or a policy that asks for verification, which is not recorded.
    """
    if any(one.tokens < 1 for one in branches):
        raise OptionError("branches: each must have at least 1 token")
    decision = Decision(len(branches), spec)
    now, due, told = 0, _Due(branches), [0] * len(branches)
    began: dict[int, int] = {}

    def follow(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                for index in action.branches:
                    began[index] = now
                    due.add(index, now, 0)
            elif isinstance(action, Abort):
                for index in action.branches:
                    decision.tokens(index, now - began[index] - told[index])
                    del began[index]
            elif isinstance(action, Verify):
                raise OptionError("policy: it asks for verification, which recorded branches do not have")

    follow(decision.start())
    while decision.done is None:
        now, index = due.next()
        if index not in began:
            continue  # aborted meanwhile
        branch, reached = branches[index], now - began[index]
        first, told[index] = told[index], reached
        part = branch.confidence[first:reached]
        follow(decision.tokens(index, reached - first, sum(part) / len(part) if part else None))
        if index not in began or decision.done is not None:
            continue
        if reached < branch.tokens:
            due.add(index, began[index], reached)
            continue
        if branch.failed is not None:
            follow(decision.failed(index, branch.failed))
        else:
            follow(decision.finished(index, branch.answer, truncated=branch.truncated))
    record = decision.record()
    return Replayed(
        done=decision.done,
        record=record,
        steps=now,
        tokens_fraction=record.tokens_spent / sum(one.tokens for one in branches),
        steps_ratio=now / max(one.tokens for one in branches),
    )


class _Due:
    """Which branch has something to tell next: its end, or the end of a chunk where its confidence is recorded."""

    def __init__(self, branches: Sequence[RecordedBranch]) -> None:
        self._branches = branches
        self._events: list[tuple[int, int]] = []

    def add(self, index: int, began: int, reached: int) -> None:
        branch = self._branches[index]
        upto = min(branch.tokens, reached + CHUNK) if branch.confidence else branch.tokens
        heapq.heappush(self._events, (began + upto, index))

    def next(self) -> tuple[int, int]:
        return heapq.heappop(self._events)
