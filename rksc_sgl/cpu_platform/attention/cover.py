"""How a batch's reads are laid out in pieces of work, the cheapest way that a small cost model finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .prefix_tree import Forest, Leaf, Trunk, leaves
from .sequences import QuerySequence


@dataclass(frozen=True)
class TileCosts:
    """What work costs, in units of one query head row times one key.

    Measured with 3 KV heads of 64 dimensions on two cores; only the ratios matter, and those only for speed.
    """

    tile: float = 25_000.0  # starting one more tile: a handful of tensor operations
    read: float = 16.0  # reading one key and its value for a whole tile
    gather: float = 10.0  # copying one key and its value together first
    masked: float = 1.1  # factor on the work of a tile with a mask
    causal: float = 0.6  # share of a causal square that the kernel works through
    merge: float = 30.0  # merging one more partial result of one query head row
    padding: float = 1.1  # factor on the work of a tile of ragged sequences
    max_mask: int = 1 << 22  # elements; a larger mask is built only where nothing else serves
    run: int = 1024  # consecutive slots from which on they are read in place, in a tile of their own


@dataclass(frozen=True)
class Stretch:
    """Positions ``start .. stop`` of one sequence, read by the rows of some sequences."""

    owner: int  # index of the sequence whose slots are taken
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SharedPiece:
    """Every row of ``members`` reads one stretch, all of which lies before the rows."""

    members: tuple[int, ...]
    stretch: Stretch


@dataclass(frozen=True)
class MergedPiece:
    """The rows of a forest read all of the forest's keys at once; a mask says which row sees which."""

    forest: Forest


@dataclass(frozen=True)
class OwnPiece:
    """One sequence reads its own positions from ``start`` to its end."""

    member: int
    start: int


Piece = SharedPiece | MergedPiece | OwnPiece


@dataclass(frozen=True)
class _Choice:
    cost: float
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Coverer:
    """Chooses the pieces for one batch and one shape of heads."""

    sequences: Sequence[QuerySequence]
    group: int  # query heads per KV head
    window: int | None = None
    costs: TileCosts = field(default_factory=TileCosts)

    def cover(self, forest: Forest) -> tuple[Piece, ...]:
        """Pieces that together read, for each row, each key that it may see exactly once."""
        return self._forest(forest).pieces

    def _forest(self, forest: Forest) -> _Choice:
        single = [tree for tree in forest if isinstance(tree, Leaf)]
        trunks = [tree for tree in forest if isinstance(tree, Trunk)]
        apart = self._own(tuple((leaf.member, leaf.start) for leaf in single))
        for trunk in trunks:
            choice = self._trunk(trunk)
            apart = _Choice(apart.cost + choice.cost, apart.pieces + choice.pieces)
        if len(forest) == 1:
            return apart
        return min(apart, self._together(forest), key=lambda choice: choice.cost)

    def _trunk(self, trunk: Trunk) -> _Choice:
        below = self._forest(trunk.children)
        rows = self._rows(trunk.members)
        keys = trunk.stop - trunk.start
        work = self.costs.tile + keys * (rows + self.costs.read) + rows * self.costs.merge
        shared = _Choice(
            work + below.cost,
            (
                SharedPiece(trunk.members, Stretch(trunk.members[0], trunk.start, trunk.stop)),
                *below.pieces,
            ),
        )
        if rows // self.group * keys > self.costs.max_mask and self.window is not None:
            shared = _Choice(float("inf"), ())
        visible = [self.sequences[member].first_visible(self.window) for member in trunk.members]
        starts = [max(trunk.start, first) for first in visible]
        alone = self._own(tuple(zip(trunk.members, starts, strict=True)))
        return min(shared, alone, self._together((trunk,)), key=lambda choice: choice.cost)

    def _own(self, parts: tuple[tuple[int, int], ...]) -> _Choice:
        """Each sequence from its own start; those with equally many rows become one padded tile later."""
        cost = self.costs.tile * len({self.sequences[member].tokens for member, _ in parts})
        for member, start in parts:
            cost += self._own_cost(self.sequences[member], start)
        return _Choice(cost, tuple(OwnPiece(member, start) for member, start in parts))

    def _own_cost(self, sequence: QuerySequence, start: int) -> float:
        rows = sequence.tokens * self.group
        before, inside = sequence.prefix - start, sequence.tokens
        if causal_apart(sequence, start, self):
            tiles = self.costs.tile + (before > 0) * rows * self.costs.merge
            square = inside * (rows * self.costs.causal + self.costs.read)
            return tiles + before * (rows + self.costs.read) + square
        per_key = rows * self.costs.padding + self.costs.read + self.costs.gather
        return (before + inside) * per_key

    def _together(self, forest: Forest) -> _Choice:
        keys = sum(len(stretch) for stretch in forest_stretches(forest, self.sequences))
        members = tuple(leaf.member for leaf in leaves(forest))
        tokens = sum(self.sequences[member].tokens for member in members)
        if tokens * keys > self.costs.max_mask:
            return _Choice(float("inf"), ())
        per_key = tokens * self.group * self.costs.masked + self.costs.read + self.costs.gather
        return _Choice(self.costs.tile + keys * per_key, (MergedPiece(forest),))

    def _rows(self, members: tuple[int, ...]) -> int:
        return self.group * sum(self.sequences[member].tokens for member in members)


def causal_apart(sequence: QuerySequence, start: int, coverer: Coverer) -> bool:
    """Whether a sequence's own rows are better attended by the kernel's causal mode than under a mask."""
    if coverer.window is not None:
        return False
    costs, rows = coverer.costs, sequence.tokens * coverer.group
    keys, before = sequence.stop - start, sequence.prefix - start
    if sequence.tokens * keys > costs.max_mask:
        return True
    apart = costs.tile + sequence.tokens * rows * costs.causal
    if before:
        apart += costs.tile + rows * costs.merge + before * rows
    return apart < costs.tile + keys * rows * costs.masked


def forest_stretches(forest: Forest, sequences: Sequence[QuerySequence]) -> list[Stretch]:
    """Everything that a forest's rows read, each shared stretch once."""
    stretches: list[Stretch] = []
    for tree in forest:
        if isinstance(tree, Leaf):
            stretches.append(Stretch(tree.member, tree.start, sequences[tree.member].stop))
        else:
            stretches.append(Stretch(tree.members[0], tree.start, tree.stop))
            stretches += forest_stretches(tree.children, sequences)
    return stretches
