"""Which leading KV slots the sequences of a batch have in common, as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .sequences import QuerySequence


@dataclass(frozen=True)
class Leaf:
    """What one sequence reads on its own: its positions from ``start`` to its end."""

    member: int  # index of the sequence
    start: int

    @property
    def members(self) -> tuple[int, ...]:
        return (self.member,)


@dataclass(frozen=True)
class Trunk:
    """Positions ``start .. stop`` that have the same slots in all ``members`` and lie before all their rows."""

    start: int
    stop: int
    members: tuple[int, ...]  # indices of the sequences, in the order of the leaves below
    children: tuple[Trunk | Leaf, ...]


Forest = tuple["Trunk | Leaf", ...]

MAX_DEPTH = 16  # trunks above one another; each is a partial result of its rows to keep until they are merged


def shared_prefix_forest(sequences: Sequence[QuerySequence], *, min_shared: int, window: int | None) -> Forest:
    """Group the sequences by equal leading slots.

    The slots themselves are compared, so a request slot that was given to another request is no danger.

    Args:
        sequences: the batch.
        min_shared: shorter common stretches are left with each sequence.
        window: sliding window, or None; positions that no member can see are cut off a trunk's beginning.

    Returns:
        Trees whose leaves are all sequences, each exactly once; sequences keep their order where sharing
        permits it. What a sequence may read is the union of its leaf and the trunks above it, plus positions
        outside its window.
    """
    grower = _Grower(sequences, min_shared, window)
    sharing = [i for i, sequence in enumerate(sequences) if sequence.shareable]
    alone: list[Trunk | Leaf] = [grower.leaf(i, 0) for i, sequence in enumerate(sequences) if not sequence.shareable]
    return tuple(sorted(grower.grow(sharing, 0, 0, MAX_DEPTH) + alone, key=lambda tree: tree.members[0]))


def leaves(forest: Forest) -> Iterator[Leaf]:
    """All leaves, from left to right."""
    for tree in forest:
        if isinstance(tree, Leaf):
            yield tree
        else:
            yield from leaves(tree.children)


@dataclass(frozen=True)
class _Grower:
    sequences: Sequence[QuerySequence]
    min_shared: int
    window: int | None

    def leaf(self, member: int, begin: int) -> Leaf:
        return Leaf(member, max(begin, self.sequences[member].first_visible(self.window)))

    def grow(self, members: list[int], position: int, begin: int, depth: int) -> list[Trunk | Leaf]:
        """Trees over ``members``, equal before ``position``; what they read starts at ``begin <= position``."""
        if depth == 0:
            return [self.leaf(member, begin) for member in members]
        groups: dict[int, list[int]] = {}
        ended: list[int] = []
        for member in members:
            sequence = self.sequences[member]
            if position < sequence.prefix:
                groups.setdefault(int(sequence.slots[position]), []).append(member)
            else:
                ended.append(member)
        forest: list[Trunk | Leaf] = [self.leaf(member, begin) for member in ended]
        for group in groups.values():
            forest += self._group(group, position, begin, depth - 1)
        return sorted(forest, key=lambda tree: tree.members[0])

    def _group(self, group: list[int], position: int, begin: int, depth: int) -> list[Trunk | Leaf]:
        if len(group) == 1:
            return [self.leaf(group[0], begin)]
        stop = self._common_stop(group, position)
        start = max(begin, min(self.sequences[member].first_visible(self.window) for member in group))
        if stop - start < self.min_shared:
            return self.grow(group, stop, begin, depth)
        children = tuple(self.grow(group, stop, stop, depth))
        members = tuple(member for child in children for member in child.members)
        return [Trunk(start, stop, members, children)]

    def _common_stop(self, group: list[int], position: int) -> int:
        limit = min(self.sequences[member].prefix for member in group)
        first = self.sequences[group[0]].slots[position:limit]
        stop = limit - position
        for member in group[1:]:
            other = self.sequences[member].slots[position : position + stop]
            different = np.flatnonzero(other != first[:stop])
            if different.size:
                stop = int(different[0])
        return position + stop
