from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.memory.retraction import order_to_keep, retracted_together


def test_branches_of_the_fork_that_came_last_go_first_and_others_keep_their_order() -> None:
    arrivals = [2, None, 1, 2, None]
    assert order_to_keep([4, 3, 2, 1, 0], arrivals) == [4, 1, 2, 3, 0]


def test_siblings_follow_one_that_was_retracted_unless_nobody_would_be_left() -> None:
    assert retracted_together([2], [None, 2, 1, 2]) == [1, 3]
    assert retracted_together([2], [2, 2]) == []
    assert retracted_together([None], [None, 2]) == []


@given(st.lists(st.none() | st.integers(1, 4), max_size=20))
def test_nothing_changes_where_no_fork_is(arrivals: list[int | None]) -> None:
    order = list(range(len(arrivals)))[::-1]
    assert sorted(order_to_keep(order, arrivals)) == sorted(order)
    plain = [place for place in order if arrivals[place] is None]
    assert [place for place in order_to_keep(order, arrivals) if arrivals[place] is None] == plain
