"""The course of a fork, event by event."""

from __future__ import annotations

from typing import Any

import pytest

from rksc_sgl.deciding import Abort, Start
from rksc_sgl.one_request.fork import Ask, Chosen, Completion, Failed, Fork, Unask
from rksc_sgl.one_request.options import ForkOptions
from rksc_sgl.verifying.reading import Reading
from rksc_sgl.verifying.skip import SkipGate


def fork(**options: Any) -> Fork:
    return Fork(ForkOptions.from_mapping({"branches": 4, **options}))


def said(number: object, confidence: float = 0.5) -> Completion:
    return Completion(f"The answer is {number}.", confidence=confidence)


def reading(score: float, mass: float = 0.9, error: float = 0.0) -> Reading:
    report = {"exit": {"error": error, "layers_saved": 2}} if error else None
    return Reading(score, None if error else mass, 50, 30, report)


def test_a_fork_starts_the_fewest_branches_and_stops_when_the_vote_is_certain() -> None:
    one = fork()
    assert one.start() == [Start((0, 1))]
    one.tokens(0, 7)
    assert one.finished(0, said(7)) == []
    (chosen,) = one.finished(1, said(7, 0.9))
    assert isinstance(chosen, Chosen)
    assert chosen.order == (0, 1), "an early vote takes the earliest branch with its answer"
    assert chosen.answer == "7" and chosen.verified == () and not chosen.partial
    assert chosen.reason.startswith("stopped early (certain): 2 votes for the leader")
    assert [branch.fate for branch in one.record().branches] == ["finished", "finished", "not_started", "not_started"]


def test_branches_that_still_run_are_aborted_when_the_vote_is_decided() -> None:
    one = fork(early_stop={"policy": "certain", "launch": "all"})
    assert one.start() == [Start((0, 1, 2, 3))]
    one.finished(2, said(7))
    abort, chosen = one.finished(0, said(7))
    assert isinstance(abort, Abort) and abort.branches == (1, 3)
    assert isinstance(chosen, Chosen) and chosen.order[0] == 0
    assert one.finished(3, said(8)) == [], "what comes late changes nothing"
    assert one.end is chosen


def test_tied_answers_are_verified_and_the_largest_sum_of_scores_decides() -> None:
    one = fork(early_stop=False)
    one.start()
    for branch, number in enumerate((7, 8, 8, 7)):
        actions = one.finished(branch, said(number))
    assert actions == [Ask((0, 1, 2, 3), {"exit": "off"})]
    assert one.verified(0, reading(0.2)) == one.verified(1, reading(0.9)) == one.verified(2, reading(0.1)) == []
    (chosen,) = one.verified(3, reading(0.3))
    assert chosen.order == (1, 2, 3, 0) and chosen.answer == "8" and chosen.verified == (0, 1, 2, 3)
    assert "2 answers have 2 of 4 branches each" in chosen.reason


def test_a_branch_whose_verification_fails_loses() -> None:
    one = fork(branches=2, early_stop=False)
    one.start()
    one.finished(0, said(7))
    one.finished(1, said(8))
    one.verified(0, None, "it broke")
    (chosen,) = one.verified(1, reading(0.1, mass=0.01))
    assert chosen.order == (1,) and "these scores say little" in chosen.reason
    assert one.members()[0].error == "verification failed: it broke"


def test_without_verification_confidence_stands_in_for_scores() -> None:
    one = fork(early_stop=False, verify=False)
    one.start()
    for branch, (number, confidence) in enumerate(((7, 0.3), (8, 0.5), (8, 0.5), (7, 0.4))):
        actions = one.finished(branch, said(number, confidence))
    assert isinstance(actions[0], Chosen)
    assert actions[0].order == (1, 2, 3, 0)
    assert "verification is off" in actions[0].reason


def test_verdicts_that_the_selection_by_score_hangs_on_are_asked_for_again_at_full_depth() -> None:
    one = fork(branches=2, early_stop=False, select="score")
    one.start()
    one.finished(0, said(1))
    (ask,) = one.finished(1, said(2))
    assert ask == Ask((0, 1), {"exit": "certified", "scope": "selection"})
    one.verified(0, reading(0.5, error=3.0))
    (again,) = one.verified(1, reading(0.55, error=3.0))
    assert isinstance(again, Ask) and again.exit == {"exit": "off"} and again.branches
    for branch in again.branches:
        actions = one.verified(branch, reading(0.5 + branch / 10))
    assert actions[0].order == (1, 0)
    assert one.verification_tokens(again.branches[0]) == (40, 60), "both times count"


def test_a_certified_gate_is_asked_for_only_where_scores_select() -> None:
    asked: list[int] = []

    def gate(branch: int) -> SkipGate:
        asked.append(branch)
        return SkipGate(agreement=0.5)

    for select, skipped in (("score", True), ("weighted_majority", False)):
        one = Fork(
            ForkOptions.from_mapping({"branches": 4, "early_stop": False, "select": select}), certified_gate=gate
        )
        one.start()
        for branch, number in enumerate((7, 7, 7, 8)):
            actions = one.finished(branch, said(number))
        assert isinstance(actions[0], Chosen) is skipped
    assert asked == [0]


def test_failed_and_empty_branches_lose() -> None:
    one = fork(early_stop=False)
    one.start()
    one.failed(0, "out of memory")
    one.finished(1, Completion("  "))
    one.finished(2, said(3))
    (chosen,) = one.finished(3, Completion("It could be 99, or", truncated=True))
    assert isinstance(chosen, Ask), "one answer is nothing to compare: scores decide"
    one.verified(2, reading(0.1))
    (chosen,) = one.verified(3, reading(0.8))
    assert chosen.order == (3, 2) and chosen.answer is None
    assert [member.error for member in one.members()][:2] == ["out of memory", "its text is empty"]


def test_a_fork_without_a_usable_branch_fails_and_says_why() -> None:
    one = fork(branches=2, early_stop=False)
    one.start()
    one.failed(0, "refused")
    assert one.failed(1, "refused") == [Failed("every branch failed: refused", late=False)]


def test_where_no_branch_has_a_text_the_client_gets_what_one_of_them_has() -> None:
    one = fork(branches=3, early_stop=False)
    one.start()
    one.failed(0, "refused")
    one.finished(1, Completion("", truncated=True, confidence=0.2))
    (chosen,) = one.finished(2, Completion("", truncated=True, confidence=0.4))
    assert chosen.order == (2, 1) and chosen.answer is None
    assert chosen.reason == "no branch has any text; the most confident is taken"


def test_calls_of_tools_vote_with_their_names_and_arguments() -> None:
    one = fork(early_stop=False, branches=3)
    one.start()
    one.finished(0, Completion("", calls=(("add", '{"a": 1, "b": 2}'),)))
    one.finished(1, Completion("3 or so"))
    (chosen,) = one.finished(2, Completion("calling", calls=(("add", '{"b":2,"a":1}'),)))
    assert chosen.order == (0, 2, 1)


def test_json_votes_as_a_whole_where_that_is_said() -> None:
    one = Fork(ForkOptions.from_mapping({"branches": 3, "early_stop": False}), "json")
    one.start()
    one.finished(0, Completion('{"age": 5, "name": "Ann"}'))
    one.finished(1, Completion('{"age": 5, "name": "Bob"}'))
    (chosen,) = one.finished(2, Completion('{"name":"Bob","age":5}'))
    assert chosen.order == (1, 2, 0)


def test_at_the_deadline_the_best_that_finished_is_taken_and_said_to_be_partial() -> None:
    one = fork(early_stop=False)
    one.start()
    one.finished(1, said(7, 0.4))
    one.finished(3, said(8, 0.6))
    abort, chosen = one.expired("the deadline of 1 s passed")
    assert isinstance(abort, Abort) and abort.branches == (0, 2)
    assert chosen.partial and chosen.order == (3, 1)
    assert chosen.reason.startswith("the deadline of 1 s passed")
    assert one.expired("again") == []


def test_at_the_deadline_open_verifications_are_ended_and_no_score_counts() -> None:
    one = fork(branches=2, early_stop=False)
    one.start()
    one.finished(0, said(7, 0.9))
    one.finished(1, said(8, 0.1))
    one.verified(0, reading(0.01))
    unask, chosen = one.expired("the deadline of 1 s passed")
    assert unask == Unask((1,))
    assert chosen.order == (0, 1) and chosen.verified == ()
    assert one.verified(1, reading(0.99)) == []


def test_at_the_deadline_without_any_answer_the_fork_fails() -> None:
    one = fork()
    one.start()
    abort, failed = one.expired("the deadline of 1 s passed")
    assert isinstance(abort, Abort)
    assert failed == Failed("the deadline of 1 s passed, and no branch had finished", late=True)


def test_branches_may_be_launched_in_another_order() -> None:
    one = Fork(ForkOptions.from_mapping({"branches": 4}), launch=[2, 0, 3, 1])
    assert one.start() == [Start((2, 0))]
    one.finished(0, said(7))
    (chosen,) = one.finished(2, said(7))
    assert chosen.order[0] == 2, "the first launched"
    assert [branch.fate for branch in one.record().branches] == ["finished", "not_started", "finished", "not_started"]
    assert one.record().done.branch == 2


@pytest.mark.parametrize("select", ["vote", "majority"])
def test_choices_come_in_the_order_of_the_selection(select: str) -> None:
    one = fork(branches=5, early_stop=False, select=select)
    one.start()
    for branch, (number, confidence) in enumerate(((1, 0.9), (2, 0.5), (3, 0.4), (2, 0.7), (3, 0.1))):
        actions = one.finished(branch, said(number, confidence))
    if isinstance(actions[0], Ask):
        assert actions[0].branches == (1, 2, 3, 4)
        for branch in actions[0].branches:
            actions = one.verified(branch, reading(0.5))
    assert actions[0].order == (3, 1, 2, 4, 0)
