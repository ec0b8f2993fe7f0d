from __future__ import annotations

from collections import Counter

from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.ranks import rank_of_fork


def test_all_of_a_fork_is_on_one_rank_and_forks_are_spread() -> None:
    for index in range(8):
        branch = RequestOptions(group="g", branch=index, branches=8)
        verification = RequestOptions(group="g", branch=index, branches=8, op="verify")
        assert rank_of_fork(branch, 4) == rank_of_fork(verification, 4) == rank_of_fork(RequestOptions(group="g"), 4)
    spread = Counter(rank_of_fork(RequestOptions(group=f"fork {index}"), 4) for index in range(400))
    assert sorted(spread) == [0, 1, 2, 3] and min(spread.values()) > 60


def test_a_fork_of_a_branch_stays_where_its_prefix_is() -> None:
    nested = [RequestOptions(group=f"nested {index}", root="first") for index in range(8)]
    assert {rank_of_fork(one, 4) for one in nested} == {rank_of_fork(RequestOptions(group="first"), 4)}


def test_sglang_chooses_where_nothing_belongs_together() -> None:
    assert rank_of_fork(None, 4) is None
    assert rank_of_fork(RequestOptions(), 4) is None
    assert rank_of_fork(RequestOptions(group="g"), 1) is None
