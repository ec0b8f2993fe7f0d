from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.deciding.standing import Votes, full_vote

_ANSWERS = st.lists(st.none() | st.sampled_from("abc"), max_size=7)


def test_most_votes_win_and_ties_go_to_the_earliest_branch() -> None:
    assert full_vote(["a", "b", "b"]) == "b"
    assert full_vote([None, "b", "a", "a", "b"]) == "b"
    assert full_vote([None, None]) is None
    assert full_vote([]) is None


@given(st.lists(st.none() | st.sampled_from("ab?"), max_size=6))
@settings(deadline=None)
def test_a_vote_cannot_change_exactly_if_no_completion_changes_it(answers: list[str | None]) -> None:
    unknown = [index for index, answer in enumerate(answers) if answer == "?"]
    known = Votes.of((index, answer) for index, answer in enumerate(answers) if answer != "?")
    winners = set()
    for completion in product(["a", "b", "new", None], repeat=len(unknown)):
        complete = list(answers)
        for index, answer in zip(unknown, completion, strict=True):
            complete[index] = answer
        winners.add(full_vote(complete))
    assert known.cannot_change(unknown) == (winners == {known.leader})


@given(_ANSWERS)
def test_the_leader_is_the_full_vote_of_what_was_counted(answers: list[str | None]) -> None:
    votes = Votes.of(enumerate(answers))
    assert votes.leader == full_vote(answers)
    ahead, behind = votes.lead
    assert ahead >= behind >= 0
    assert sum(votes.counts.values()) == sum(answer is not None for answer in answers)
