"""Joining runs where a backend takes no more of them."""

from __future__ import annotations

import itertools
import random

import pytest

from rksc_sgl.blending.fewer_runs import Run, fewer_runs


def tokens_of(sequences: list[list[Run]]) -> int:
    return sum(end - begin for runs in sequences for begin, end in runs)


def covers(joined: list[Run], runs: list[Run]) -> bool:
    return all(any(begin >= left and end <= right for left, right in joined) for begin, end in runs)


def some_sequences(seed: int, most: int) -> list[list[Run]]:
    source = random.Random(seed)
    sequences = []
    for _ in range(source.randint(1, 3)):
        places = sorted(source.sample(range(60), 2 * source.randint(0, most)))
        sequences.append(list(zip(places[::2], places[1::2], strict=True)))
    return sequences


def fewest_tokens(sequences: list[list[Run]], most: int) -> int:
    """By trying every set of joins."""
    gaps = [(place, index) for place, runs in enumerate(sequences) for index in range(len(runs) - 1)]
    best = None
    for size in range(len(gaps) + 1):
        for chosen in itertools.combinations(gaps, size):
            if sum(map(len, sequences)) - size > most:
                continue
            extra = sum(sequences[p][i + 1][0] - sequences[p][i][1] for p, i in chosen)
            best = extra if best is None else min(best, extra)
    assert best is not None
    return tokens_of(sequences) + best


def test_runs_that_fit_stay_as_they_are() -> None:
    runs = [[(0, 3), (9, 12)], [], [(4, 5)]]
    assert fewer_runs(runs, 3) == runs
    assert fewer_runs(runs, None) == runs


def test_the_smallest_gaps_of_the_whole_batch_are_closed() -> None:
    assert fewer_runs([[(0, 1), (9, 10), (12, 13)], [(0, 1), (4, 5)]], 3) == [[(0, 1), (9, 13)], [(0, 5)]]


def test_of_equal_gaps_the_first_is_closed_so_that_ranks_agree() -> None:
    assert fewer_runs([[(0, 1), (3, 4)], [(0, 1), (3, 4)]], 3) == [[(0, 4)], [(0, 1), (3, 4)]]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_joins_compute_fewer_tokens(seed: int) -> None:
    sequences = some_sequences(seed, 4)
    least = sum(1 for runs in sequences if runs)
    for most in range(max(1, least), sum(map(len, sequences)) + 1):
        joined = fewer_runs(sequences, most)
        assert sum(map(len, joined)) <= most
        assert all(covers(after, before) for after, before in zip(joined, sequences, strict=True))
        assert all(one[1] < other[0] for runs in joined for one, other in itertools.pairwise(runs))
        assert tokens_of(joined) == fewest_tokens(sequences, most)


def test_fewer_runs_than_sequences_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"at least 2.*got 1"):
        fewer_runs([[(0, 1)], [(0, 1), (3, 4)]], 1)
