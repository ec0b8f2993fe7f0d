"""What is done about a fork whose branches have ended: whom to verify, and from whom to choose.

One rule for whoever runs branches: ``verify_gated`` for programs, and the server for requests that are a fork.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rksc_sgl.answers import classes_of
from rksc_sgl.deciding import Record
from rksc_sgl.exit_settings import DEFAULT_RISK
from rksc_sgl.verifying.select import Selector, tied_leaders
from rksc_sgl.verifying.skip import SkipGate

logger = logging.getLogger(__name__)

ON_SCORE_ALONE = "the choice rests on a score whose worth on this model is unknown until it is measured"


@dataclass(frozen=True)
class Member:
    """One branch before any verification.

    Attributes:
        index: its position in the fork.
        answer: with which it votes; None where there is none.
        confidence: mean top-1 probability of its tokens; None where it was not measured.
        error: why it cannot be selected; None where it can.
    """

    index: int
    answer: str | None
    confidence: float | None
    error: str | None


@dataclass(frozen=True)
class Course:
    """What is done about a fork; branches by their index.

    Attributes:
        verify: whom to ask; empty where verification is skipped.
        among: from whom the selector chooses then.
        index: the branch that is selected already.
        by_score: whether the scores of all branches decide, and nothing else: what selections are certified for.
        reason: for the verdict.
    """

    verify: tuple[int, ...]
    among: tuple[int, ...]
    index: int | None
    by_score: bool
    reason: str


def course_of(
    select: str | Selector,
    skip: SkipGate | None,
    members: Sequence[Member],
    certified_gate: Callable[[], SkipGate | None],
) -> Course:
    """Whom to verify, and who is selected already.

    Args:
        select: as in :func:`rksc_sgl.verify_gated`.
        skip: a gate of the caller's own.
        members: every branch, at least one of them without an error.
        certified_gate: the skip rule that a profile certifies, looked up only where ``select`` is ``score``.
    """
    alive = [branch for branch in members if branch.error is None]
    among = tuple(branch.index for branch in alive)
    if select == "majority":
        return Course((), among, None, False, "selection by majority needs no verification")
    answers = [branch.answer if branch.error is None else None for branch in members]
    leaders = [members[place] for place in tied_leaders(answers)]
    if select == "vote" and skip is None:
        return _course_of_vote(members, alive, leaders)
    gate = skip or (certified_gate() if select == "score" else None) or SkipGate()
    decision = gate.decide(answers, [branch.confidence if branch.error is None else None for branch in members])
    if decision.skip:
        return Course((), among, decision.index, False, decision.reason)
    on_score = select == "vote" and not leaders
    reason = f"{decision.reason}; no answers to compare: {ON_SCORE_ALONE}" if on_score else decision.reason
    return Course(among, among, None, select == "score" or on_score, reason)


def course_of_record(record: Record, members: Sequence[Member]) -> Course | None:
    """The course of a fork that had its vote while its branches ran; None where that is nothing to go by.

    Args:
        record: of that vote; its branches are the members, in their order.
        members: every branch.
    """
    done = record.done
    if done is None or done.branch is None or done.reason == "cancelled":
        return None
    counts, all_ran = dict(done.votes), not record.of_fate("stopped") + record.of_fate("not_started")
    if all_ran and sum(counts.values()) < 2:
        return None
    branch = members[done.branch]
    if branch.error is not None:  # it failed in what came after its answer
        alike = [one for one in members if one.error is None and record.branches[one.index].answer == done.answer]
        if not alike:
            return None
        branch = alike[0]
    reason = _of_votes(counts, len(members)) if all_ran else f"stopped early ({done.reason}): {done.statement}"
    return Course((), (branch.index,), branch.index, False, reason)


def gate_of_profiles(
    profiles: Sequence[Mapping[str, Any]], prompt_ids: Sequence[int], risk: float | None
) -> SkipGate | None:
    """The skip rule that a server's profile certifies for a verification prompt; None where there is none.

    Args:
        profiles: as ``GET /rksc/info`` tells them.
        prompt_ids: of a verification.
        risk: at most; None takes the server's default.
    """
    for profile in profiles:
        if list(prompt_ids[-len(profile["question_ids"]) :]) != profile["question_ids"]:
            continue
        bound = DEFAULT_RISK if risk is None else risk
        points = [point for point in profile["skip"] if point["risk"] <= bound]
        if points:
            best = max(points, key=lambda point: point["risk"])
            logger.info(
                "skipping verification is certified at %g from %g agreement on", best["risk"], best["agreement"]
            )
            return SkipGate(agreement=best["agreement"])
    return None


def exit_options(exit: str, risk: float | None, scope: str, course: Course) -> dict[str, Any]:
    """The options of early exit for every verification of a fork.

    Args:
        exit, risk, scope: as in :func:`rksc_sgl.verify_gated`.
        course: of the fork. Only the selection by score is certified: with another, ``scope`` selection exits nowhere.
    """
    if exit == "certified" and scope == "selection" and not course.by_score:
        logger.info("only the selection by score is certified: verification runs at full depth")
        return {"exit": "off"}
    options = {"exit": exit, "risk": risk, "scope": scope if exit == "certified" else None}
    return {name: value for name, value in options.items() if value is not None}


def _course_of_vote(members: Sequence[Member], alive: list[Member], leaders: list[Member]) -> Course:
    """Votes need verification only where they do not decide."""
    among = tuple(branch.index for branch in alive)
    if len(alive) == 1:
        return Course((), among, None, False, f"1 of {len(members)} branches is left: nothing to choose")
    if not leaders:
        answered = sum(branch.answer is not None for branch in alive)
        reason = f"{answered} of {len(members)} branches have an answer, which is nothing to compare: {ON_SCORE_ALONE}"
        return Course(among, among, None, True, reason)
    leading = tuple(branch.index for branch in leaders)
    tied = len(set(classes_of([branch.answer for branch in leaders])))
    votes = len(leaders) // tied
    if tied == 1:
        return Course((), leading, None, False, f"vote: {votes} of {len(members)} branches answer alike")
    reason = f"vote: {tied} answers have {votes} of {len(members)} branches each, and the scores of these decide"
    return Course(leading, leading, None, False, reason)


def _of_votes(counts: Mapping[str, int], branches: int) -> str:
    """What the vote of all branches came to."""
    most = max(counts.values())
    tied = sum(votes == most for votes in counts.values())
    if tied == 1:
        return f"vote: {most} of {branches} branches answer alike"
    return f"vote: {tied} answers have {most} of {branches} branches each, and the one whose branch comes first wins"
