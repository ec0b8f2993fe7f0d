"""What of a blended prompt is computed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.blending.plan import GAP, runs_of, to_compute

FLAGS = st.lists(st.booleans(), min_size=1, max_size=80)


def test_what_moved_most_is_computed_within_the_share() -> None:
    candidate = torch.tensor([True] * 10 + [False, True])
    deviation = torch.tensor([0.0, 0.5, 0.0, 0.9, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0])
    mask = to_compute(candidate, deviation, threshold=0.2, share=0.2)
    assert mask.nonzero().flatten().tolist() == [1, 3, 10, 11]
    every = to_compute(candidate, deviation, threshold=0.2, share=1.0)
    assert every.nonzero().flatten().tolist() == [1, 3, 5, 10, 11]


def test_a_state_that_is_no_number_is_computed_first() -> None:
    deviation = torch.tensor([0.5, float("nan"), 0.4, 0.0])
    mask = to_compute(torch.ones(4, dtype=torch.bool), deviation, threshold=0.1, share=0.3)
    assert mask.tolist() == [False, True, False, True]


@settings(deadline=None)
@given(FLAGS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_nothing_that_the_donor_has_not_is_ever_taken_over(
    flags: list[bool], threshold: float, share: float, seed: int
) -> None:
    candidate = torch.tensor(flags)
    deviation = torch.rand(len(flags), generator=torch.Generator().manual_seed(seed))
    mask = to_compute(candidate, deviation, threshold=threshold, share=share)
    assert mask[~candidate].all() and mask[-1]
    assert int((mask & candidate)[:-1].sum()) <= share * int(candidate.sum())
    everything = to_compute(candidate, deviation, threshold=-1.0, share=1.0)
    assert everything.all()


@settings(deadline=None)
@given(FLAGS)
def test_runs_cover_what_is_computed_and_join_over_small_gaps(flags: list[bool]) -> None:
    runs = runs_of(torch.tensor(flags))
    covered = {place for begin, end in runs for place in range(begin, end)}
    assert {place for place, flag in enumerate(flags) if flag} <= covered
    for (_, end), (begin, _) in pairwise(runs):
        assert begin - end > GAP
    assert all(flags[begin] and flags[end - 1] for begin, end in runs)


@pytest.mark.parametrize(("flags", "runs"), [([0, 0], []), ([1], [(0, 1)]), ([1, 0, 0, 1, 0], [(0, 4)])])
def test_runs_by_hand(flags: list[int], runs: list[tuple[int, int]]) -> None:
    assert runs_of(torch.tensor(flags, dtype=torch.bool)) == runs
