"""Which tokens of a branch a donor has too: long common spans, moved and reordered ones included.

Every window of ``minimum_span`` tokens (a gram) of the branch is looked up among those of the donor by hash; matches
that follow each other on one diagonal (branch position - donor position) make a run; runs are taken greedily, the
longest first (greedy string tiling: Wise 1993, with the hashes of Karp and Rabin 1987).

A gram that the donor has more than :data:`CANDIDATES` times is followed to the nearest of them only, and every run
is then extended as far as its tokens agree. That bounds the work at O(n log n) for periodic text too; what it may
cost there is that a longer match that starts at none of the nearest places is not seen.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rksc_sgl.errors import OptionError

CANDIDATES = 8  # donor positions followed for one gram
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)

Tokens: TypeAlias = "Sequence[int] | NDArray[np.int64]"
_Array: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True, order=True)
class Span:
    """``branch[span.branch : span.branch + length]`` equals ``donor[span.donor : span.donor + length]``."""

    branch: int
    donor: int
    length: int

    @property
    def shift(self) -> int:
        """Branch position less donor position."""
        return self.branch - self.donor


@dataclass(frozen=True)
class Alignment:
    """Spans that branch and donor have in common.

    Attributes:
        spans: ordered by branch position, not overlapping in the branch. Two spans may have the same donor tokens.
        source: int64 [tokens of the branch], the donor position of each token, or -1 where there is none.
    """

    spans: tuple[Span, ...]
    source: _Array

    @property
    def aligned(self) -> int:
        """Number of branch tokens that have a donor token."""
        return sum(span.length for span in self.spans)


def align(donor: Tokens, branch: Tokens, minimum_span: int = 8) -> Alignment:
    """Align the tokens of a branch with those of a donor.

    The longest span is taken first; of equally long ones the first in the branch. Where one piece of the branch
    stands at several places of the donor, the place is taken whose shift is nearest to that of the spans already
    taken beside it, then the nearest position. What a longer span has taken is cut off a shorter one; a rest below
    ``minimum_span`` is dropped. No span can be extended at either end into branch tokens that stay unaligned.

    Args:
        donor: token ids [n].
        branch: token ids [m].
        minimum_span: tokens that a span must have, at least 1.

    Raises:
        OptionError: ``minimum_span`` is below 1.
    """
    if minimum_span < 1:
        raise OptionError(f"minimum_span: must be at least 1, got {minimum_span}")
    ours, theirs = np.asarray(branch, dtype=np.int64), np.asarray(donor, dtype=np.int64)
    spans: list[Span] = []
    if min(len(ours), len(theirs)) >= minimum_span:
        runs = _largest(_runs(theirs, ours, minimum_span))
        spans = _choose(runs, theirs, ours, minimum_span)
    source: _Array = np.full(len(ours), -1, dtype=np.int64)
    for span in spans:
        source[span.branch : span.branch + span.length] = np.arange(span.donor, span.donor + span.length)
    return Alignment(tuple(spans), source)


def gram_hashes(tokens: Tokens, size: int) -> NDArray[np.uint64]:
    """Hashes [n - size + 1] of all windows of ``size`` tokens; the same in every process; O(n) for any size."""
    hashes = _Hashes(np.asarray(tokens, dtype=np.int64))
    count = len(hashes.sums) - size
    return hashes.windows(np.arange(max(count, 0)), size)


class _Hashes:
    """Polynomial hashes modulo 2**64 of any window of a text, from its prefix sums."""

    def __init__(self, tokens: _Array) -> None:
        count = len(tokens)
        self.sums: NDArray[np.uint64] = np.zeros(count + 1, dtype=np.uint64)
        np.cumsum(mixed(tokens.astype(np.uint64)) * _powers(_BASE, count), out=self.sums[1:])
        self.inverses = _powers(_INVERSE, count + 1)

    def windows(self, starts: _Array, lengths: int | _Array) -> NDArray[np.uint64]:
        return (self.sums[starts + lengths] - self.sums[starts]) * self.inverses[starts]


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    powers: NDArray[np.uint64] = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well spread uint64 values, one for each value given: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class _Runs:
    """Maximal matches: branch tokens [start, end) stand in the donor at ``start - shift``."""

    start: _Array
    end: _Array
    shift: _Array

    def take(self, which: NDArray[np.bool_] | _Array) -> _Runs:
        return _Runs(self.start[which], self.end[which], self.shift[which])


def _runs(donor: _Array, branch: _Array, size: int) -> _Runs:
    theirs, ours = _Hashes(donor), _Hashes(branch)
    at, to, capped = _pairs(theirs.windows(np.arange(len(donor) - size + 1), size), ours, size)
    place = np.sort((at - to + len(donor)) * (len(branch) + 1) + at)  # by diagonal, then by branch position
    first = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    grams = np.diff(first, append=len(place))
    shift, start = np.divmod(place[first], len(branch) + 1)
    runs = _Runs(start, start + grams + size - 1, shift - len(donor))
    return _extended(runs, theirs, ours) if capped else runs


def _pairs(grams: NDArray[np.uint64], ours: _Hashes, size: int) -> tuple[_Array, _Array, bool]:
    """Branch positions, donor positions with the same gram, and whether some were left out."""
    known, ranks = np.unique(grams, return_inverse=True)
    wanted = ours.windows(np.arange(len(ours.sums) - size), size)
    rank = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    at = np.flatnonzero(known[rank] == wanted)
    stride = max(len(grams), len(wanted)) + 1
    ordered = np.sort(ranks * stride + np.arange(len(grams)))  # donor positions of each gram, ascending
    rank = rank[at]
    low, high = np.searchsorted(ordered, rank * stride), np.searchsorted(ordered, (rank + 1) * stride)
    middle = np.searchsorted(ordered, rank * stride + at)
    begin = np.clip(middle - CANDIDATES // 2, low, np.maximum(high - CANDIDATES, low))
    count = np.minimum(high - begin, CANDIDATES)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    to = ordered[np.repeat(begin, count) + offset] % stride
    return np.repeat(at, count), to, bool((high - low > CANDIDATES).any())


def _extended(runs: _Runs, theirs: _Hashes, ours: _Hashes) -> _Runs:
    """Runs as long as their tokens agree, each once."""
    start, end = runs.start.copy(), runs.end.copy()
    right = np.minimum(len(ours.sums) - 1, len(theirs.sums) - 1 + runs.shift)
    left = np.maximum(0, runs.shift)
    step = 1 << max(len(ours.sums).bit_length() - 1, 0)
    while step:
        fits = np.flatnonzero(end + step <= right)
        same = ours.windows(end[fits], step) == theirs.windows(end[fits] - runs.shift[fits], step)
        end[fits[same]] += step
        fits = np.flatnonzero(start - step >= left)
        before = start[fits] - step
        same = ours.windows(before, step) == theirs.windows(before - runs.shift[fits], step)
        start[fits[same]] -= step
        step >>= 1
    _, once = np.unique(np.stack((start, runs.shift), axis=1), axis=0, return_index=True)
    return _Runs(start, end, runs.shift).take(once)


def _largest(runs: _Runs) -> _Runs:
    """Without runs that lie inside a longer one: what that one leaves of them is never more than of itself."""
    runs = runs.take(np.lexsort((runs.shift, -runs.end, runs.start)))
    new = (np.diff(runs.start, prepend=-1) != 0) | (np.diff(runs.end, prepend=-1) != 0)
    reached = np.maximum.accumulate(np.append(0, runs.end))[:-1]
    kept = (runs.end > reached)[new]
    return runs.take(kept[np.cumsum(new) - 1])


def _choose(runs: _Runs, donor: _Array, branch: _Array, size: int) -> list[Span]:
    """Greedy choice, the longest rest first; runs of the same branch tokens are choices of one piece."""
    shifts: dict[tuple[int, int], list[int]] = {}
    for start, end, shift in zip(runs.start.tolist(), runs.end.tolist(), runs.shift.tolist(), strict=True):
        shifts.setdefault((start, end), []).append(shift)
    queue = [(start - end, start, end, (start, end)) for start, end in shifts]
    heapq.heapify(queue)
    taken: list[Span] = []
    while queue:
        length, start, end, piece = heapq.heappop(queue)
        start, end = _free(taken, start, end)
        if end - start < max(size, -length):
            if end - start >= size:
                heapq.heappush(queue, (start - end, start, end, piece))
            continue
        shift = _best(shifts[piece], taken, start)
        span = Span(start, start - shift, end - start)
        parts = _equal_parts(span, donor, branch, size)
        if parts == [(start, end)]:
            insort(taken, span)
            continue
        shifts[piece].remove(shift)
        if shifts[piece]:
            heapq.heappush(queue, (length, start, end, piece))
        for part in parts:
            shifts.setdefault(part, []).append(shift)
            heapq.heappush(queue, (part[0] - part[1], *part, part))
    return taken


def _free(taken: list[Span], start: int, end: int) -> tuple[int, int]:
    """What is left of [start, end). Taken spans are at least as long, so that none lies inside: the rest is one."""
    index = max(bisect_right(taken, start, key=_branch) - 1, 0)
    while index < len(taken) and taken[index].branch < end:
        span = taken[index]
        if span.branch <= start:
            start = max(start, span.branch + span.length)
        else:
            end = span.branch
        index += 1
    return start, end


def _best(shifts: list[int], taken: list[Span], start: int) -> int:
    """The shift nearest to that of a neighbour; without neighbours, and among equals, the smallest."""
    if len(shifts) == 1:
        return shifts[0]
    index = bisect_right(taken, start, key=_branch)
    near = [span.shift for span in taken[max(index - 1, 0) : index + 1]]
    return min(shifts, key=lambda one: (min((abs(one - shift) for shift in near), default=0), abs(one), one))


def _branch(span: Span) -> int:
    return span.branch


def _equal_parts(span: Span, donor: _Array, branch: _Array, size: int) -> list[tuple[int, int]]:
    """Parts of a span whose tokens are equal, as branch [start, end): all of it, unless two hashes met by chance."""
    same = branch[span.branch : span.branch + span.length] == donor[span.donor : span.donor + span.length]
    if same.all():
        return [(span.branch, span.branch + span.length)]
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False)) + span.branch
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(start, end) for start, end in pairs if end - start >= size]
