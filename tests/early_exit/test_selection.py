"""Which verdicts a selection by score depends on."""

from __future__ import annotations

import numpy as np
import pytest

from rksc_sgl.early_exit.selection import Groups, log_odds, probability_of, score, unresolved
from rksc_sgl.verifying.select import Candidate, choose
from rksc_sgl.verifying.select import unresolved as unresolved_candidates


def test_only_a_leader_that_can_be_reached_and_those_who_reach_it_are_unresolved() -> None:
    margin, error = np.array([3.0, 2.0, -9.0, 1.0, 1.5]), np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    groups = Groups.of(np.array([7, 7, 7, 2, 2]))
    assert unresolved(margin, error, np.ones(5), groups).tolist() == [True, True, False, False, True]
    assert not unresolved(margin, np.zeros(5), np.ones(5), groups).any(), "exact verdicts have nothing to resolve"


def test_a_leader_beyond_reach_stands() -> None:
    assert not unresolved(np.array([3.0, -3.0]), np.ones(2), np.ones(2), Groups.one(2)).any()


def test_groups_need_not_lie_together_and_the_first_of_equals_leads() -> None:
    groups = Groups.of(np.array([5, 1, 5, 1, 5]))
    assert groups.leaders(np.array([1.0, 2.0, 3.0, 2.0, 3.0])).tolist() == [1, 2]
    assert groups.mean(np.array([True, False, False, True, False])).tolist() == [0.5, pytest.approx(1 / 3)]


def test_scores_and_log_odds_are_right_at_the_ends() -> None:
    assert log_odds(np.array([0.0, 0.5, 1.0])).tolist() == [-np.inf, 0.0, np.inf]
    assert probability_of(np.array([-np.inf, 0.0, np.inf, 800.0])).tolist() == [0.0, 0.5, 1.0, 1.0]
    assert score(np.array([0.8]), np.array([0.25])).tolist() == [0.4]


def test_a_score_that_is_missing_or_certain_is_not_moved_by_an_error() -> None:
    sure, close = Candidate(0, "", None, 1.0, 0.9), Candidate(1, "", None, 0.99, 0.9)
    assert unresolved_candidates([sure, close], [5.0, 0.1]) == []
    missing = Candidate(0, "", None, None, None)
    assert unresolved_candidates([missing, close], [0.0, 0.1]) == []
    assert unresolved_candidates([Candidate(0, "", None, 0.9, 0.9), close], [0.0, 5.0]) == [1]


def test_of_equal_scores_the_lower_index_is_taken_in_whatever_order_they_come() -> None:
    equal = [Candidate(index, "", None, 0.5, 1.0) for index in (4, 2, 3)]
    assert choose("score", equal) == 2
