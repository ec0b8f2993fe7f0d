from __future__ import annotations

import random
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.deciding import (
    Abort,
    Action,
    Decision,
    Done,
    EarlyStop,
    Policy,
    Ruling,
    Standing,
    Start,
    Verify,
    full_vote,
)
from rksc_sgl.deciding.bound import boundary
from rksc_sgl.deciding.policies import Certain
from rksc_sgl.errors import OptionError

_LAUNCHES = st.sampled_from(["all", "fewest", 1, 3, (2, 1, 4)])


def of_kind(actions: list[Action], kind: type) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


class Fork:
    """Runs a decision over branches that end in any order."""

    def __init__(self, answers: list[str | None], spec: EarlyStop) -> None:
        self.answers, self.decision = answers, Decision(len(answers), spec)
        self.running: list[int] = []
        self.aborted: list[int] = []
        self.follow(self.decision.start())

    def follow(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, Start):
                assert self.decision.done is None or actions.index(action) < len(actions) - 1
                self.running += action.branches
            elif isinstance(action, Abort):
                assert set(action.branches) <= set(self.running)
                self.aborted += action.branches
                self.running = [index for index in self.running if index not in action.branches]
        return actions

    def end(self, index: int) -> list[Action]:
        self.running.remove(index)
        self.decision.tokens(index, 10)
        if self.answers[index] == "fails":
            return self.follow(self.decision.failed(index, "broke"))
        return self.follow(self.decision.finished(index, self.answers[index]))

    def run(self, order: random.Random) -> Done:
        while self.decision.done is None:
            self.end(order.choice(self.running))
        assert not self.running
        return self.decision.done


def _as_votes(answers: list[str | None]) -> list[str | None]:
    return [None if answer == "fails" else answer for answer in answers]


@given(
    st.lists(st.sampled_from(["a", "b", "c", None, "fails"]), min_size=1, max_size=12),
    _LAUNCHES,
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_certain_gives_the_vote_of_all_branches_whatever_ends_first(
    answers: list[str | None], launch: object, order: random.Random
) -> None:
    fork = Fork(answers, EarlyStop("certain", launch=launch))  # type: ignore[arg-type]
    done = fork.run(order)
    assert done.answer == full_vote(_as_votes(answers))
    assert done.probability == 0.0
    if done.answer is not None:
        assert done.branch is not None and answers[done.branch] == done.answer
    record = fork.decision.record()
    fates = [branch.fate for branch in record.branches]
    assert fates.count("stopped") == len(fork.aborted)
    assert set(fates) <= {"finished", "failed", "stopped", "not_started"}
    assert all((branch.why is None) == (branch.fate == "finished") for branch in record.branches)
    assert record.tokens_spent == 10 * (fates.count("finished") + fates.count("failed"))
    if "finished" in fates:
        assert record.tokens_saved == 10 * (fates.count("stopped") + fates.count("not_started"))


@pytest.mark.parametrize("launch", ["all", "fewest", 2])
@pytest.mark.parametrize(
    "answers",
    [["a", "b", "a", "b", None], ["a", "b", "b", "a", "c"], ["fails", "b", "a", "a", "b"], ["a", "a", "a", "b", "b"]],
)
def test_certain_gives_one_answer_in_every_order_of_ending(answers: list[str | None], launch: str | int) -> None:
    given_by = set()
    for order in permutations(range(len(answers))):
        fork = Fork(answers, EarlyStop("certain", launch=launch))
        while fork.decision.done is None:
            fork.end(next(index for index in order if index in fork.running))
        given_by.add(fork.decision.done.answer)
    assert given_by == {full_vote(_as_votes(answers))}


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_fewest_never_start_a_branch_that_waves_of_one_would_not_start(
    answers: list[str | None], order: random.Random
) -> None:
    fewest = Fork(answers, EarlyStop("certain", launch="fewest"))
    fewest.run(order)
    one_by_one = Fork(answers, EarlyStop("certain", launch=1))
    one_by_one.run(order)
    started = [
        sum(branch.fate != "not_started" for branch in fork.decision.record().branches) for fork in (fewest, one_by_one)
    ]
    assert started[0] <= started[1]


@pytest.mark.parametrize(("branches", "first"), [(1, 1), (2, 1), (3, 2), (7, 4), (8, 4), (32, 16)])
def test_branches_that_all_agree_are_half_of_them(branches: int, first: int) -> None:
    fork = Fork(["a"] * branches, EarlyStop("certain"))
    assert len(fork.running) == first
    done = fork.run(random.Random(0))
    assert (done.answer, done.branch, done.reason) == ("a", 0, "certain")
    assert len(fork.decision.record().of_fate("not_started")) == branches - first


def test_more_branches_start_as_soon_as_those_that_run_cannot_decide() -> None:
    fork = Fork(["a", "b", "a", "a", "a", "a", "a", "a"], EarlyStop("certain"))
    assert fork.running == [0, 1, 2, 3]
    assert fork.end(1) == []  # 0, 2 and 3 may give the same answer
    assert fork.end(0) == [Start((4,))]  # 2 and 3 do not suffice for either
    fork.end(2)
    fork.end(3)
    actions = fork.end(4)
    assert isinstance(actions[-1], Done) and actions[-1].answer == "a"


def test_all_at_once_ends_those_that_still_run() -> None:
    fork = Fork(["a"] * 5, EarlyStop("certain", launch="all"))
    assert fork.running == [0, 1, 2, 3, 4]
    assert fork.end(4) == [] and fork.end(1) == []
    actions = fork.end(3)
    assert of_kind(actions, Abort) == [
        Abort((0, 2), "3 votes for the leader, 0 for the next answer; the other 2 of 5 branches cannot change that")
    ]
    assert actions[-1] == fork.decision.done
    assert fork.decision.done is not None and fork.decision.done.branch == 1


def test_a_tie_waits_for_the_branch_that_could_be_the_first_of_the_other_answer() -> None:
    late = Fork(["b", "a", "a", "b"], EarlyStop("certain", launch="all"))
    late.end(1)
    assert late.end(2) == []  # 0 and 3 may both be b, and 0 comes first
    late.end(3)
    assert late.run(random.Random(0)).answer == "b"
    early = Fork(["a", "a", "b", "b"], EarlyStop("certain", launch="all"))
    early.end(0)
    actions = early.end(1)
    assert isinstance(actions[-1], Done) and actions[-1].answer == "a"


@pytest.mark.parametrize("answers", [[None] * 4, ["fails"] * 4, ["fails", None, None]])
@pytest.mark.parametrize("policy", ["certain", "probable", "window"])
def test_branches_without_an_answer_all_run_and_give_none(answers: list[str | None], policy: str) -> None:
    done = Fork(answers, EarlyStop(policy)).run(random.Random(1))
    assert (done.answer, done.branch, done.votes) == (None, None, ())


def test_one_branch_is_its_own_vote() -> None:
    done = Fork(["a"], EarlyStop("probable")).run(random.Random(0))
    assert (done.answer, done.branch, done.probability) == ("a", 0, 0.0)


# -- probable ------------------------------------------------------------------------------------------


def test_probable_starts_the_fewest_and_stops_where_they_agree() -> None:
    fork = Fork(["a"] * 32, EarlyStop("probable", risk=0.01))
    assert fork.running == [0, 1, 2, 3, 4, 5]
    done = fork.run(random.Random(2))
    assert (done.answer, done.probability, done.reason) == ("a", 0.01, "probable")
    assert "<= 0.01 over the order of the branches" in done.statement
    assert fork.decision.record().of_fate("not_started") == list(range(6, 32))


def test_probable_counts_no_branch_before_an_earlier_one_that_could_change_the_ruling() -> None:
    fork = Fork(["b"] + ["a"] * 31, EarlyStop("probable", launch="all"))
    for index in range(1, 9):
        assert fork.end(index) == []  # six agree, but they are not the first six: 0 may be another answer
    limit = boundary(32, 0.01)
    assert limit.reached(10, 9, 1) and not limit.reached(9, 8, 1)
    actions = fork.end(9)  # nine of the first ten, whatever 0 will say
    assert isinstance(actions[-1], Done) and (actions[-1].answer, actions[-1].reason) == ("a", "probable")
    assert 0 in fork.aborted


@given(
    st.integers(6, 16),
    st.lists(st.sampled_from(["a", "b", None]), min_size=10, max_size=10),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_probable_answers_as_a_look_in_the_order_of_launch_does_whatever_ends_first(
    lead: int, others: list[str | None], order: random.Random
) -> None:
    answers = (["a"] * lead + others)[:16]
    done = Fork(answers, EarlyStop("probable", risk=0.05, launch="all")).run(order)
    limit = boundary(16, 0.05)
    assert limit.reached(lead, lead, 0)
    if done.reason == "probable":
        assert done.answer == "a" or any(
            limit.reached(look, answers[:look].count("b"), answers[:look].count("a")) for look in range(1, 16)
        )
    else:
        assert done.answer == full_vote(answers)


def test_a_fork_too_large_for_the_bound_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"early_stop\.policy: branches: probable is worked out for 1 to 64"):
        Decision(65, EarlyStop("probable"))


# -- window, confidence, a caller's own ----------------------------------------------------------------


def test_a_window_that_agrees_stops_and_the_vote_counts_its_branches() -> None:
    fork = Fork(["a", "b", "b", "a", "a", "a", "a", "a", "a"], EarlyStop("window", window=3))
    assert fork.running == [0, 1, 2]
    for index in (2, 0, 1):
        fork.end(index)
    assert fork.running == [3, 4, 5]
    done = fork.run(random.Random(3))
    assert (done.answer, done.reason, done.probability) == ("a", "window", None)
    assert fork.decision.record().of_fate("not_started") == [6, 7, 8]


def test_branches_without_an_answer_are_no_window_that_agrees() -> None:
    fork = Fork([None, None, "a", "a", "a", "a", "b", "b"], EarlyStop("window", window=2))
    assert fork.run(random.Random(0)).answer == "a"
    assert fork.decision.record().of_fate("finished") == [0, 1, 2, 3]


def test_a_branch_whose_group_confidence_falls_is_dropped_and_has_no_vote() -> None:
    decision = Decision(3, EarlyStop("confidence", threshold=1.0, window=4))
    assert decision.start() == [Start((0, 1, 2))]
    assert decision.tokens(0, 3, 0.1) == []  # no whole window yet
    (abort,) = decision.tokens(0, 3, 0.9)  # the last four: 0.1, 0.9, 0.9, 0.9
    assert isinstance(abort, Abort) and abort.branches == (0,) and "0.7, below 1" in abort.reason
    assert decision.tokens(1, 8, 2.0) == []
    assert decision.finished(0, "b") == []  # it finished before the abort reached it
    assert decision.finished(1, "a")[-1] == decision.done
    assert decision.done is not None and decision.done.answer == "a"
    record = decision.record()
    assert [branch.fate for branch in record.branches] == ["stopped", "finished", "stopped"]
    assert record.branches[0].answer == "b"


def test_every_branch_dropped_is_a_decision_without_an_answer() -> None:
    decision = Decision(2, EarlyStop("confidence", threshold=1.0, window=1))
    decision.start()
    decision.tokens(0, 1, 0.5)
    actions = decision.tokens(1, 1, 0.5)
    assert [type(action) for action in actions] == [Abort, Done]
    assert decision.done is not None and decision.done.answer is None
    assert decision.record().of_fate("stopped") == [0, 1]


def drop_the_first(standing: Standing) -> Ruling:
    return Ruling(drop={0: "hopeless"}) if 0 in standing.running else Ruling()


def drop_the_first_then_certain(standing: Standing) -> Ruling:
    return Ruling(drop={0: "hopeless"}) if 0 in standing.running else Certain()(standing)


def drop_the_first_then_raise(standing: Standing) -> Ruling:
    if standing.outcomes[0] is not None:
        raise RuntimeError("I am broken")
    return drop_the_first(standing)


@pytest.mark.parametrize("policy", [drop_the_first, drop_the_first_then_certain, drop_the_first_then_raise])
def test_a_vote_that_lacks_dropped_branches_promises_nothing_about_that_of_all(policy: Policy) -> None:
    fork = Fork(["b", "b", "a", "a"], EarlyStop(policy))
    fork.follow(fork.decision.tokens(1, 1, 0.5))  # what makes it look
    assert fork.aborted == [0]
    done = fork.run(random.Random(0))
    assert (done.answer, full_vote(["b", "b", "a", "a"])) == ("a", "b"), "it is wrong here"
    assert (done.reason, done.probability) == ("policy", None)
    assert done.statement.endswith("; 1 of 4 branches was dropped, and nobody knows what it would have answered")


def test_a_vote_without_the_branches_of_low_confidence_is_not_certain() -> None:
    decision = Decision(3, EarlyStop("confidence", threshold=1.0, window=1))
    decision.start()
    decision.tokens(0, 1, 0.5)
    decision.tokens(1, 1, 0.5)
    decision.finished(2, "a")
    done = decision.done
    assert done is not None and (done.answer, done.reason, done.probability) == ("a", "confidence", None)
    assert "2 of 3 branches were dropped" in done.statement


def test_confidence_that_dropped_nothing_is_certain() -> None:
    decision = Decision(3, EarlyStop("confidence", threshold=1.0, window=1))
    decision.start()
    decision.finished(2, "a")
    decision.finished(1, "a")
    decision.finished(0, "b")
    assert decision.done is not None and (decision.done.reason, decision.done.probability) == ("certain", 0.0)


@pytest.mark.parametrize("policy", [lambda standing: None, lambda standing: Ruling()])
def test_where_a_function_does_not_say_how_many_could_decide_they_run_one_by_one(policy: Policy) -> None:
    fork = Fork(["a", "b", "b", "a"], EarlyStop(policy, launch="fewest"))
    assert fork.running == [0]
    assert fork.decision.tokens(0, 1, 0.5) == fork.decision.tokens(0, 1, 0.5) == []
    assert fork.end(0) == [Start((1,))]


def test_a_callers_function_stops_with_its_reason() -> None:
    seen: list[Standing] = []

    def two_alike(standing: Standing) -> str | None:
        seen.append(standing)
        return "two alike" if standing.votes().lead[0] >= 2 else None

    fork = Fork(["a", "b", "a", "c"], EarlyStop(two_alike))
    assert fork.running == [0, 1, 2, 3]
    fork.end(1)
    fork.end(0)
    fork.end(2)
    done = fork.decision.done
    assert done is not None
    assert (done.answer, done.reason, done.statement, done.probability) == ("a", "policy", "two alike", None)
    assert fork.aborted == [3] and seen


def test_a_callers_function_that_gives_up_on_nothing_ends_with_the_vote_of_all() -> None:
    done = Fork(["a", "b", "b"], EarlyStop(lambda standing: None)).run(random.Random(0))
    assert (done.answer, done.reason, done.probability) == ("b", "all_ended", 0.0)


@pytest.mark.parametrize(
    "policy",
    [
        lambda standing: 1 / 0,
        lambda standing: 17,
        lambda standing: Ruling(drop={99: "no such branch"}),
        lambda standing: Ruling(verify=(0,)),
    ],
)
def test_a_policy_that_raises_or_rules_nonsense_lets_all_branches_finish_and_is_reported(policy: object) -> None:
    fork = Fork(["a", "b", "b", None], EarlyStop(policy, launch=1))  # type: ignore[arg-type]
    assert fork.running == [0, 1, 2, 3]
    done = fork.run(random.Random(0))
    assert (done.answer, done.reason) == ("b", "all_ended")
    error = fork.decision.record().policy_error
    assert error is not None and any(kind in error for kind in ("ZeroDivisionError", "TypeError", "ValueError"))


def test_a_policy_may_ask_for_verification_and_rule_by_scores() -> None:
    def best_verified(standing: Standing) -> Ruling:
        ended = [index for index, outcome in enumerate(standing.outcomes) if outcome is not None]
        good = [index for index in ended if (standing.outcomes[index].score or 0.0) > 0.9]  # type: ignore[union-attr]
        if good:
            return Ruling(stop="verified", answer=standing.outcomes[good[0]].answer)  # type: ignore[union-attr]
        return Ruling(verify=tuple(ended))

    fork = Fork(["a", "b", "c"], EarlyStop(best_verified, launch="all"))
    assert fork.end(1) == [Verify((1,))]
    assert fork.end(0) == [Verify((0,))]
    assert fork.decision.verified(0, 0.2) == []
    actions = fork.decision.verified(1, 0.95)
    assert isinstance(actions[-1], Done) and (actions[-1].answer, actions[-1].branch) == ("b", 1)
    assert of_kind(actions, Abort)[0].branches == (2,)  # type: ignore[attr-defined]


def test_a_fork_whose_branches_have_ended_waits_for_verification_that_it_asked_for() -> None:
    fork = Fork(["a"], EarlyStop(lambda standing: Ruling(verify=(0,)) if standing.ended else None))
    assert fork.end(0) == [Verify((0,))]
    assert fork.decision.done is None
    assert isinstance(fork.decision.verified(0, 0.1)[-1], Done)


def test_no_branch_is_started_while_scores_are_waited_for() -> None:
    def verified(standing: Standing) -> Ruling:
        ended = [index for index, outcome in enumerate(standing.outcomes) if outcome is not None]
        return Ruling(verify=tuple(ended))

    fork = Fork(["a", "b", "c"], EarlyStop(verified, launch=1))
    assert fork.end(0) == [Verify((0,))]
    assert fork.follow(fork.decision.verified(0, 0.3)) == [Start((1,))]


# -- races and faults ----------------------------------------------------------------------------------


def test_a_branch_that_finishes_after_its_abort_changes_only_the_record() -> None:
    fork = Fork(["a", "a", "b", "b", "b"], EarlyStop("certain", launch="all"))
    for index in (2, 3, 4):
        fork.end(index)
    done = fork.decision.done
    assert done is not None and done.answer == "b" and fork.aborted == [0, 1]
    fork.decision.tokens(0, 7)
    assert fork.decision.finished(0, "a") == []
    assert fork.decision.failed(1, "connection lost") == []
    assert fork.decision.done == done
    record = fork.decision.record()
    assert record.branches[0].fate == "stopped" and record.branches[0].answer == "a"
    assert record.tokens_spent == 37 and record.tokens_saved == 3 + 10


def test_a_branch_that_runs_on_though_it_was_stopped_saves_nothing() -> None:
    fork = Fork(["a", "a", "a", "b", "b"], EarlyStop("certain", launch="all"))
    for index in (0, 1):
        fork.end(index)
    with pytest.raises(OptionError, match="abandoned: branch 3 was not stopped, it is running"):
        fork.decision.abandoned(3)
    fork.end(2)
    assert fork.aborted == [3, 4] and fork.decision.record().tokens_saved == 20
    assert fork.decision.abandoned(3) == []
    record = fork.decision.record()
    assert [branch.abandoned for branch in record.branches] == [False, False, False, True, False]
    assert record.tokens_saved == 10


def test_a_branch_that_starts_after_its_abort_is_aborted_again() -> None:
    fork = Fork(["a", "a", "b"], EarlyStop("certain", launch="all"))
    fork.end(0)
    fork.end(1)
    (abort,) = fork.decision.branch_started(2)
    assert isinstance(abort, Abort) and abort.branches == (2,)


def test_a_client_that_goes_away_ends_all_branches_waiting_ones_too() -> None:
    fork = Fork(["a"] * 8, EarlyStop("certain"))
    fork.end(0)
    abort, done = fork.follow(fork.decision.cancelled("the client went away"))
    assert isinstance(abort, Abort) and abort.branches == (1, 2, 3)
    assert isinstance(done, Done) and (done.answer, done.reason) == (None, "cancelled")
    record = fork.decision.record()
    assert record.of_fate("not_started") == [4, 5, 6, 7]
    assert {branch.why for branch in record.branches[1:]} == {"the client went away"}
    assert fork.decision.cancelled("again") == []


@pytest.mark.parametrize("event", ["never", "twice", "unknown", "negative", "begun", "unfinished"])
def test_an_event_that_cannot_be_is_refused(event: str) -> None:
    decision = Decision(4, EarlyStop("certain"))
    decision.start()
    decision.finished(0, "a")
    with pytest.raises(OptionError):
        if event == "never":
            decision.finished(3, "a")
        elif event == "twice":
            decision.finished(0, "a")
        elif event == "unknown":
            decision.tokens(4, 1)
        elif event == "negative":
            decision.tokens(1, -1)
        elif event == "begun":
            decision.start()
        else:
            decision.verified(1, 0.5)


@pytest.mark.parametrize("branches", [0, -1, True, 2.0])
def test_a_fork_has_at_least_one_branch(branches: object) -> None:
    with pytest.raises(OptionError, match="branches: must be a whole number from 1 on"):
        Decision(branches, EarlyStop())  # type: ignore[arg-type]
