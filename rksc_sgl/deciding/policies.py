"""When the answer of a fork is decided. A policy looks at the standing and gives a ruling; it keeps no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rksc_sgl.deciding.actions import Reason
from rksc_sgl.deciding.bound import Boundary
from rksc_sgl.deciding.standing import Standing, Votes


@dataclass(frozen=True)
class Ruling:
    """What a policy says.

    Attributes:
        stop: why the answer is decided, a sentence; None where it is not.
        answer: the answer that is decided; None for the leader of all votes.
        probability: bound on P(the vote of all branches has another answer); None where nothing is known.
        fewest: how many branches more could decide at the earliest, if those that run do not; for ``launch="fewest"``.
            Where none runs, one is started at least: with 0 branches run one by one.
        drop: running branches that are to be ended without a vote, and why.
        verify: branches that have finished and are to be verified; no more are started until their scores are there.
        reason: of the stop.
    """

    stop: str | None = None
    answer: str | None = None
    probability: float | None = None
    fewest: int = 0
    drop: Mapping[int, str] = field(default_factory=dict)
    verify: tuple[int, ...] = ()
    reason: Reason = "policy"


class Policy(Protocol):
    """Anything that can be called so; a user's function may also return a reason to stop, or None."""

    def __call__(self, standing: Standing) -> Ruling | str | None: ...


@dataclass(frozen=True)
class Certain:
    """Stops when the vote of all branches can no longer change: error 0, whatever the branches are."""

    def __call__(self, standing: Standing) -> Ruling:
        unknown = [index for index, outcome in enumerate(standing.outcomes) if outcome is None]
        votes = standing.votes()
        if votes.cannot_change(unknown):
            return Ruling(
                stop=f"{_counted(votes)}; the other {len(unknown)} of {standing.branches} branches cannot change that",
                answer=votes.leader,
                probability=0.0,
                reason="certain",
            )
        return Ruling(fewest=self._fewest(standing, votes))

    @staticmethod
    def _fewest(standing: Standing, votes: Votes) -> int:
        """If all that run, and as many more, vote for one answer, at best the leader."""
        best = "" if votes.leader is None else votes.leader  # "": an answer that nobody has given yet
        running, left = standing.running, standing.branches - standing.started
        answers = [(index, outcome.answer) for index, outcome in enumerate(standing.outcomes) if outcome is not None]
        at_best = Votes.of(answers + [(index, best) for index in running]) if running or answers else Votes({}, {})
        ahead, behind = at_best.lead
        # Each further branch of the leader closes the gap by two: one vote more, one unknown branch less.
        more = max(0, (left - (ahead - behind)) // 2)
        while more < left:
            voting = range(standing.started, standing.started + more)
            unknown = range(standing.started + more, standing.branches)
            hoped = Votes.of([*answers, *((index, best) for index in running), *((index, best) for index in voting)])
            if hoped.leader is not None and hoped.cannot_change(unknown):
                return more
            more += 1
        return left


@dataclass(frozen=True)
class Probable:
    """Stops when P(the vote of all branches has another answer) is at most the boundary's risk.

    Looks are at the first k branches, in the order of launch, for every k: at one whose branches have all ended, or
    whose other branches could not change the ruling whatever their answers are. So it does not matter that short
    branches end first. Sources: see :mod:`rksc_sgl.deciding.bound`.
    """

    boundary: Boundary

    def __call__(self, standing: Standing) -> Ruling:
        sure = Certain()(standing)
        if sure.stop is not None:
            return sure
        for look in range(1, standing.started + 1):
            votes = standing.votes(look)
            open_ = sum(outcome is None for outcome in standing.outcomes[:look])
            ahead, behind = votes.lead
            if self.boundary.reached(look, ahead, behind + open_):
                return Ruling(
                    stop=f"{_counted(votes)} among the first {look} branches; {self.boundary.statement}",
                    answer=votes.leader,
                    probability=self.boundary.risk,
                    reason="probable",
                )
        return Ruling(fewest=min(sure.fewest, self._fewest(standing)))

    def _fewest(self, standing: Standing) -> int:
        for look in range(standing.ended + 1, standing.branches + 1):
            votes = standing.votes(look)
            ahead, behind = votes.lead
            open_ = sum(outcome is None for outcome in standing.outcomes[:look])
            if self.boundary.reached(look, ahead + open_, behind):
                return max(0, look - standing.started)
        return standing.branches - standing.started


@dataclass(frozen=True)
class Window:
    """Stops when all branches of one window agree; the answer is the vote of the branches up to its end.

    Windows are consecutive in the order of launch. Nothing is promised about the vote of all branches. Source: ESC
    (arXiv 2401.10480).
    """

    size: int

    def __call__(self, standing: Standing) -> Ruling:
        sure = Certain()(standing)
        if sure.stop is not None:
            return sure
        for begin in range(0, standing.ended - self.size + 1, self.size):
            end = begin + self.size
            answers = {outcome.answer for outcome in standing.outcomes[begin:end] if outcome is not None}
            if len(answers) == 1 and None not in answers:
                votes = standing.votes(end)
                return Ruling(
                    stop=f"branches {begin} to {end - 1} agree; {_counted(votes)}; how often that is the vote of all "
                    f"{standing.branches} is not known",
                    answer=votes.leader,
                    reason="window",
                )
        into = standing.started % self.size
        return Ruling(fewest=(0 if standing.running else self.size) if into == 0 else self.size - into)


@dataclass(frozen=True)
class GroupConfidence:
    """Drops branches whose mean confidence over a window of tokens fell below a threshold; the others vote.

    Ends when the vote of the others cannot change. Once it dropped a branch, nothing is promised about the vote of all
    branches; until then it is :class:`Certain`. Source: DeepConf
    (arXiv 2508.15260), whose confidence of a token is the negative mean log-probability of its top alternatives; any
    measure that is higher where the model is surer will do.
    """

    threshold: float

    def __call__(self, standing: Standing) -> Ruling:
        drop = {
            index: f"its group confidence fell to {lowest:.3g}, below {self.threshold:g}"
            for index in standing.running
            if (lowest := standing.lowest_confidence[index]) is not None and lowest < self.threshold
        }
        if drop:
            return Ruling(drop=drop)
        return Certain()(standing)


def _counted(votes: Votes) -> str:
    ahead, behind = votes.lead
    return f"{ahead} votes for the leader, {behind} for the next answer"
