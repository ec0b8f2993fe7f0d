"""What of a blended prompt is computed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.blending.plan import GAP, LEAD, after_breaks, runs_of, to_compute

FLAGS = st.lists(st.booleans(), min_size=1, max_size=80)


def test_what_moved_most_is_computed_within_the_share() -> None:
    candidate = torch.tensor([True] * 10 + [False, True])
    deviation = torch.tensor([0.0, 0.5, 0.0, 0.9, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0])
    unbroken = torch.zeros(12, dtype=torch.bool)
    alike = torch.ones(12)
    mask = to_compute(candidate, deviation, alike, unbroken, threshold=0.2, share=0.2)
    assert mask.nonzero().flatten().tolist() == [1, 3, 10, 11]
    every = to_compute(candidate, deviation, alike, unbroken, threshold=0.2, share=1.0)
    assert every.nonzero().flatten().tolist() == [1, 3, 5, 10, 11]


def test_what_nobody_attends_to_is_taken_over_however_far_it_moved() -> None:
    candidate, unbroken = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    deviation = torch.tensor([0.9, 0.8, 0.4, 0.3, 0.0, 0.1, 0.1, 0.0])
    attended = torch.tensor([1e-4, 1e-4, 0.3, 0.2, 0.4, 1e-3, 1e-3, 0.1])
    mask = to_compute(candidate, deviation, attended, unbroken, threshold=0.0, share=0.25)
    assert mask.nonzero().flatten().tolist() == [2, 3, 7]
    above = to_compute(candidate, deviation, attended, unbroken, threshold=0.35, share=0.125)
    assert above.nonzero().flatten().tolist() == [2, 7], "what did not move so far is not chosen in its place"


def test_what_follows_a_break_is_computed_whatever_it_moved_and_counts_in_the_share() -> None:
    candidate, after_break = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    after_break[[4, 5]] = True
    deviation = torch.linspace(0.1, 2.0, 20)
    for share, computed in ((0.0, [4, 5, 19]), (0.1, [4, 5, 19]), (0.2, [4, 5, 18, 19])):
        mask = to_compute(candidate, deviation, torch.ones(20), after_break, threshold=0.0, share=share)
        assert mask.nonzero().flatten().tolist() == computed
    assert to_compute(candidate, deviation, torch.ones(20), after_break, threshold=9.0, share=1.0).sum() == 3


def test_breaks_are_where_a_token_stands_after_another_than_in_the_donor() -> None:
    same = list(range(10))
    assert not after_breaks(torch.tensor(same)).any(), "the beginning of both"
    for source, first in (([-1, *range(1, 10)], 1), ([*range(20, 30), *range(10)], 10), ([-1, *range(10)], 1)):
        found = after_breaks(torch.tensor(source)).nonzero().flatten().tolist()
        assert found[-LEAD:] == list(range(first, first + LEAD))
    changed = torch.tensor([*range(6), -1, *range(7, 9), -1, -1, 11])
    assert after_breaks(changed).nonzero().flatten().tolist() == [7, 8, 11]
    assert after_breaks(torch.tensor([5])).tolist() == [True]
    assert after_breaks(torch.tensor([-1])).tolist() == [False]
    assert after_breaks(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_a_state_that_is_no_number_is_computed_first() -> None:
    deviation = torch.tensor([0.5, float("nan"), 0.4, 0.0])
    unbroken = torch.zeros(4, dtype=torch.bool)
    mask = to_compute(torch.ones(4, dtype=torch.bool), deviation, torch.ones(4) / 4, unbroken, threshold=0.1, share=0.3)
    assert mask.tolist() == [False, True, False, True]


@settings(deadline=None)
@given(FLAGS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_nothing_that_the_donor_has_not_is_ever_taken_over(
    flags: list[bool], threshold: float, share: float, seed: int
) -> None:
    candidate = torch.tensor(flags)
    source = torch.Generator().manual_seed(seed)
    deviation, attended = torch.rand(2, len(flags), generator=source)
    after_break = after_breaks(torch.where(candidate, torch.arange(len(flags)), -1))
    mask = to_compute(candidate, deviation, attended, after_break, threshold=threshold, share=share)
    assert mask[~candidate].all() and mask[after_break].all() and mask[-1]
    most = max(share * int(candidate.sum()), int(after_break.sum()))
    assert int((mask & candidate)[:-1].sum()) <= most
    everything = to_compute(candidate, deviation, attended, after_break, threshold=-1.0, share=1.0)
    assert everything.all()


@settings(deadline=None)
@given(FLAGS)
def test_runs_cover_what_is_computed_and_join_over_small_gaps(flags: list[bool]) -> None:
    runs = runs_of(torch.tensor(flags), GAP)
    covered = {place for begin, end in runs for place in range(begin, end)}
    assert {place for place, flag in enumerate(flags) if flag} <= covered
    for (_, end), (begin, _) in pairwise(runs):
        assert begin - end > GAP
    assert all(flags[begin] and flags[end - 1] for begin, end in runs)


@pytest.mark.parametrize(("flags", "runs"), [([0, 0], []), ([1], [(0, 1)]), ([1, 0, 0, 1, 0], [(0, 4)])])
def test_runs_by_hand(flags: list[int], runs: list[tuple[int, int]]) -> None:
    assert runs_of(torch.tensor(flags, dtype=torch.bool), GAP) == runs


def test_without_a_gap_runs_are_exactly_what_is_computed() -> None:
    flags = torch.tensor([1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    assert runs_of(flags, 0) == [(0, 2), (3, 4), (6, 7)]
