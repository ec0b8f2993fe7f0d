from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.errors import OptionError
from rksc_sgl.similarity.alignment import CANDIDATES, Alignment, Span, align, gram_hashes


def align_reference(donor: list[int], branch: list[int], minimum_span: int = 8) -> list[Span]:
    """The rule of ``align`` without hashes or queues: every place is tried, until nothing long enough is left."""
    taken: list[Span] = []
    free = [True] * len(branch)
    while True:
        found = list(_free_matches(donor, branch, free))
        longest = max((span.length for span in found), default=0)
        if longest < minimum_span:
            return sorted(taken)
        first = min(span.branch for span in found if span.length == longest)
        equals = [span for span in found if span.length == longest and span.branch == first]
        left = [span.shift for span in sorted(taken) if span.branch < first][-1:]
        right = [span.shift for span in sorted(taken) if span.branch > first][:1]
        near = left + right

        def preference(span: Span, near: list[int] = near) -> tuple[int, int, int]:
            return min((abs(span.shift - one) for one in near), default=0), abs(span.shift), span.shift

        best = min(equals, key=preference)
        taken.append(best)
        free[best.branch : best.branch + best.length] = [False] * best.length


def _free_matches(donor: list[int], branch: list[int], free: list[bool]):  # type: ignore[no-untyped-def]
    for start in range(len(branch)):
        for place in range(len(donor)):
            length = 0
            while (
                start + length < len(branch)
                and place + length < len(donor)
                and free[start + length]
                and branch[start + length] == donor[place + length]
            ):
                length += 1
            if length:
                yield Span(start, place, length)


def _assert_valid(found: Alignment, donor: list[int], branch: list[int], minimum_span: int) -> None:
    end = 0
    for span in found.spans:
        assert span.branch >= end, "spans overlap or are out of order"
        end = span.branch + span.length
        assert span.length >= minimum_span
        assert span.donor >= 0 and span.donor + span.length <= len(donor)
        assert branch[span.branch : end] == donor[span.donor : span.donor + span.length]
    assert found.source.shape == (len(branch),) and found.source.dtype == np.int64
    matched = found.source >= 0
    assert found.aligned == matched.sum()
    assert [donor[place] for place in found.source[matched]] == [
        token for token, aligned in zip(branch, matched, strict=True) if aligned
    ]


def _assert_maximal(found: Alignment, donor: list[int], branch: list[int]) -> None:
    for span in found.spans:
        end, place = span.branch + span.length, span.donor + span.length
        if end < len(branch) and place < len(donor) and found.source[end] < 0:
            assert branch[end] != donor[place], f"{span} can be extended to the right"
        if span.branch and span.donor and found.source[span.branch - 1] < 0:
            assert branch[span.branch - 1] != donor[span.donor - 1], f"{span} can be extended to the left"


def _crowded(donor: list[int], size: int) -> bool:
    grams = Counter(tuple(donor[start : start + size]) for start in range(len(donor) - size + 1))
    return max(grams.values(), default=0) > CANDIDATES


@st.composite
def edited_texts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A donor, and a branch of pieces of it in any order with other tokens between them."""
    letters = draw(st.sampled_from([2, 3, 5, 50]))
    tokens = st.lists(st.integers(0, letters - 1), max_size=12)
    donor = draw(st.lists(st.integers(0, letters - 1), max_size=40))
    branch: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(donor)))
        branch += donor[start : start + draw(st.integers(0, 25))] + draw(tokens)
    return donor, branch


@settings(max_examples=300, deadline=None)
@given(edited_texts(), st.integers(1, 9))
def test_spans_are_those_of_the_simple_rule(texts: tuple[list[int], list[int]], minimum_span: int) -> None:
    donor, branch = texts
    found = align(donor, branch, minimum_span)
    _assert_valid(found, donor, branch, minimum_span)
    _assert_maximal(found, donor, branch)
    expected = align_reference(donor, branch, minimum_span)
    if not _crowded(donor, minimum_span):
        assert [(span.branch, span.length) for span in found.spans] == [(span.branch, span.length) for span in expected]
    else:
        assert sum(span.length for span in expected) - found.aligned <= 0.2 * len(branch) + 2 * minimum_span


def test_moved_and_reordered_pieces_are_found() -> None:
    first, second, third = list(range(100, 130)), list(range(200, 240)), list(range(300, 320))
    donor = [1, 2, 3, *first, 4, *second, 5, *third]
    found = align(donor, [9, *third, 8, 7, *second, 6, *first, 9])
    assert found.spans == (Span(1, 75, 20), Span(23, 34, 40), Span(64, 3, 30))
    assert found.aligned == 90


def test_a_changed_number_is_all_that_stays_unaligned() -> None:
    donor = list(range(1000, 1100))
    branch = [5, 6, *donor[:50], 7, *donor[51:]]
    found = align(donor, branch)
    assert found.spans == (Span(2, 0, 50), Span(53, 51, 49))
    assert np.flatnonzero(found.source < 0).tolist() == [0, 1, 52]


def test_a_donor_span_may_serve_twice() -> None:
    piece = list(range(20))
    assert align(piece, [*piece, 99, *piece]).spans == (Span(0, 0, 20), Span(21, 0, 20))


def test_among_equal_places_the_one_in_line_with_the_neighbours_is_taken() -> None:
    long, piece = list(range(100, 160)), list(range(10))
    donor = [*piece, 90, 91, *long, 92, *piece, 93]
    branch = [*long, 94, *piece, 95]
    assert align(donor, branch).spans == (Span(0, 12, 60), Span(61, 73, 10))


def test_without_neighbours_the_nearest_place_is_taken() -> None:
    piece = list(range(10))
    donor = [*piece, 90, 91, 92, 93, *piece, 94]
    assert align(donor, [80, 81, 82, 83, 84, 85, 86, 87, 88, 89, *piece]).spans == (Span(10, 14, 10),)


@pytest.mark.parametrize(("donor", "branch"), [([], []), ([], [1] * 20), ([1] * 20, []), ([1] * 7, [1] * 20)])
def test_nothing_is_aligned_where_no_span_fits(donor: list[int], branch: list[int]) -> None:
    found = align(donor, branch)
    assert found.spans == () and found.aligned == 0
    assert found.source.tolist() == [-1] * len(branch)


def test_one_token_repeated_is_one_span() -> None:
    found = align([7] * 3000, [7] * 4000)
    _assert_valid(found, [7] * 3000, [7] * 4000, 8)
    assert max(span.length for span in found.spans) == 3000
    assert found.aligned == 4000


def test_moved_periodic_text_is_one_span() -> None:
    period = [1, 2, 3, 4, 5] * 600
    branch = list(range(1000, 2000)) + period
    found = align(period, branch)
    assert [(span.branch, span.length) for span in found.spans] == [(1000, 3000)]


def test_two_letters_at_random_stay_valid() -> None:
    source = np.random.default_rng(0)
    donor, branch = source.integers(0, 2, 4000).tolist(), source.integers(0, 2, 4000).tolist()
    found = align(donor, branch)
    _assert_valid(found, donor, branch, 8)
    _assert_maximal(found, donor, branch)
    assert found.aligned > 3500


def test_texts_made_so_that_hashes_collide_stay_valid() -> None:
    # sums over the Thue-Morse sequence and over its complement are equal modulo 2**64 for every odd base
    sequence = [1 + bin(place).count("1") % 2 for place in range(1 << 12)]
    other = [3 - token for token in sequence]
    assert gram_hashes(sequence, 1 << 12)[0] == gram_hashes(other, 1 << 12)[0]
    found = align(sequence, other, minimum_span=1 << 12)
    assert found.spans == ()
    found = align(sequence, other)
    _assert_valid(found, sequence, other, 8)
    assert found.aligned >= 2000


def test_token_arrays_of_any_kind_are_taken() -> None:
    donor = list(range(30))
    expected = align(donor, donor).spans
    assert expected == (Span(0, 0, 30),)
    assert align(array("q", donor), array("q", donor)).spans == expected
    assert align(np.arange(30), np.arange(30, dtype=np.int32)).spans == expected


def test_gram_hashes_know_equal_windows() -> None:
    hashes = gram_hashes([1, 2, 3, 1, 2, 3, 4], 3)
    assert len(hashes) == 5 and hashes[0] == hashes[3] and len(set(hashes.tolist())) == 4
    assert gram_hashes([1, 2], 3).tolist() == []


def test_a_minimum_span_below_one_is_an_error() -> None:
    with pytest.raises(OptionError, match="minimum_span: must be at least 1, got 0"):
        align([1], [1], 0)
