"""The work of one forward pass: built once on the host, followed by every layer with the same heads and window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .cover import Coverer, MergedPiece, OwnPiece, SharedPiece, Stretch, TileCosts, causal_apart
from .prefix_tree import Forest, Leaf, leaves, shared_prefix_forest
from .sequences import QuerySequence, split_long

# Added to the logits of invisible keys. Finite, because the fused kernel reports a log-sum-exp of 0 for a row
# of minus infinities; a row that sees nothing in a tile must get no weight when tiles are merged.
INVISIBLE = -1e30
MIN_SHARED = 32  # shorter common stretches are not worth a place in the tree
WINDOWED_ROWS = 256  # with a sliding window, longer sequences are attended in pieces of this many rows
FOLDED_ROWS = 32  # below this many tokens the heads of a group become rows of one matrix product
KERNEL_ROWS = 32  # rows that the fused kernel gives to one thread at a time
MIN_PART = 256  # keys; a tile is not split finer between threads
FEW_ROWS, FEW_ROWS_PART = 8, 330  # with so few rows the kernel is fastest on parts of about so many keys


@dataclass(frozen=True)
class HeadShape:
    """Heads of a layer: ``query_heads`` is a multiple of ``kv_heads``."""

    query_heads: int
    kv_heads: int

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, eq=False)
class Tile:
    """Some rows read some keys: ``sequences`` row sets with keys of their own, or one row set.

    The keys of a lone row set may be split in ``parts`` that threads work on side by side. The tile's batch is
    ``sequences * parts`` long; each element has ``width`` keys.
    """

    rows: slice | torch.Tensor  # [sequences * tokens] rows in plan order
    sequences: int
    tokens: int  # rows of each sequence
    parts: int
    width: int
    start: int  # first slot where the keys are read in place, else -1
    step: int  # slots from one part's first key to the next one's, where read in place
    index: torch.Tensor | None  # [sequences * parts * width] int64 slots where the keys are gathered
    mask: torch.Tensor | None  # float32 [batch or 1, 1, rows or 1, width], in the tile's layout
    causal: bool  # row i of the only sequence sees keys 0 .. i
    folded: bool  # rows are (token, head of the group); else the heads of a group are the batch
    level: int  # first partial result that it fills; it fills one for each part


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Tiles that together read every visible key of every row exactly once."""

    rows: int  # query rows of the batch
    order: torch.Tensor | None  # [rows] int64 row of the batch at each place of the plan; None: the same
    tiles: tuple[Tile, ...]
    levels: int  # partial results to merge by log-sum-exp; 1: tiles write the result itself
    folded: bool = field(init=False)  # whether a tile wants the heads of a group as rows
    whole: bool = field(init=False)  # every tile has every row in order, so that results are merged as they come

    def __post_init__(self) -> None:
        object.__setattr__(self, "folded", any(tile.folded for tile in self.tiles))
        every = slice(0, self.rows)
        object.__setattr__(self, "whole", all(tile.rows == every for tile in self.tiles if isinstance(tile.rows, slice))
                           and all(isinstance(tile.rows, slice) for tile in self.tiles))


def build_plan(
    sequences: Sequence[QuerySequence],
    heads: HeadShape,
    *,
    window: int | None = None,
    threads: int | None = None,
    costs: TileCosts | None = None,
) -> AttentionPlan:
    """Plan the attention of a batch.

    Args:
        sequences: rows of all sequences together are ``0 .. n - 1`` without gaps.
        heads: of the layers that will follow the plan.
        window: a row at position p sees positions ``p - window .. p``; None sees all up to p.
        threads: between which a tile may be split; None asks PyTorch.
        costs: of the cost model; None takes the measured ones.
    """
    if window is not None and all(sequence.stop <= window + 1 for sequence in sequences):
        window = None
    if window is not None:
        sequences = [piece for whole in sequences for piece in split_long(whole, WINDOWED_ROWS)]
    forest = shared_prefix_forest(sequences, min_shared=MIN_SHARED, window=window)
    coverer = Coverer(sequences, heads.group, window, costs or TileCosts())
    builder = _Builder(coverer, heads, threads or torch.get_num_threads(), _plan_places(sequences, forest))
    builder.add(coverer.cover(forest), forest)
    return builder.finish(forest)


def _plan_places(sequences: Sequence[QuerySequence], forest: Forest) -> dict[int, int]:
    """First row of each sequence in plan order, where the sequences below a trunk follow each other."""
    places, place = {}, 0
    for leaf in leaves(forest):
        places[leaf.member] = place
        place += sequences[leaf.member].tokens
    return places


@dataclass(frozen=True)
class _OwnKeys:
    """Positions that one sequence reads in a padded tile."""

    member: int
    positions: np.ndarray


@dataclass
class _Builder:
    coverer: Coverer
    heads: HeadShape
    threads: int
    places: dict[int, int]
    tiles: list[Tile] = field(default_factory=list)
    padded: list[_OwnKeys] = field(default_factory=list)
    filled: np.ndarray = field(init=False)  # partial results of each row so far

    def __post_init__(self) -> None:
        self.filled = np.zeros(sum(sequence.tokens for sequence in self.sequences), dtype=np.int64)

    @property
    def sequences(self) -> Sequence[QuerySequence]:
        return self.coverer.sequences

    @property
    def window(self) -> int | None:
        return self.coverer.window

    def add(self, pieces: Sequence[SharedPiece | MergedPiece | OwnPiece], forest: Forest) -> None:
        for piece in pieces:
            if isinstance(piece, SharedPiece):
                self._add_stretch(piece.members, piece.stretch)
            elif isinstance(piece, MergedPiece):
                self._add_merged(piece.forest)
            else:
                self._add_own(piece.member, piece.start)
        for bucket in self._buckets():
            self._add_bucket(bucket)

    def finish(self, forest: Forest) -> AttentionPlan:
        order = np.concatenate(
            [np.empty(0, np.int64)]
            + [np.arange(self.sequences[leaf.member].row, self._end_row(leaf.member)) for leaf in leaves(forest)]
        )
        in_order = bool((order == np.arange(order.size)).all())
        return AttentionPlan(
            rows=order.size,
            order=None if in_order else torch.from_numpy(order),
            tiles=tuple(self.tiles),
            levels=int(self.filled.max(initial=1)),
        )

    # -- pieces ----------------------------------------------------------------------------------------------

    def _add_stretch(self, members: tuple[int, ...], stretch: Stretch) -> None:
        """Rows of ``members`` read positions before all of them."""
        rows = self._rows(members)
        slots = self.sequences[stretch.owner].slots
        in_place, rest = _long_runs(slots, stretch.start, stretch.stop, self.coverer.costs.run)
        row_positions = self._row_positions(members)
        for run in (*in_place, rest):
            if run.size:
                mask = _mask(row_positions, run, self.window)
                self._add_tile(rows, 1, slots[run], mask)

    def _add_own(self, member: int, start: int) -> None:
        sequence = self.sequences[member]
        if causal_apart(sequence, start, self.coverer):
            if sequence.prefix > start:
                self._add_stretch((member,), Stretch(member, start, sequence.prefix))
            self._add_tile(self._rows((member,)), 1, sequence.slots[sequence.prefix :], mask=None, causal=True)
            return
        if sequence.stop - start >= self.coverer.costs.run and _single_run(sequence.slots[start:]) >= 0:
            mask = _mask(self._row_positions((member,)), np.arange(start, sequence.stop), self.window)
            self._add_tile(self._rows((member,)), 1, sequence.slots[start:], mask)
            return
        cuttable = sequence.stop if sequence.tokens == 1 else sequence.prefix
        if self.window is not None and sequence.tokens > 1:
            cuttable = start
        in_place, rest = _long_runs(sequence.slots, start, cuttable, self.coverer.costs.run)
        for run in in_place:
            self._add_tile(self._rows((member,)), 1, sequence.slots[run], mask=None)
        positions = np.concatenate([rest, np.arange(cuttable, sequence.stop)])
        if positions.size:
            self.padded.append(_OwnKeys(member, positions))

    def _add_merged(self, forest: Forest) -> None:
        """One tile for a forest: the keys of all its trunks and leaves side by side, each row seeing its own."""
        members = tuple(leaf.member for leaf in leaves(forest))
        first = self.places[members[0]]
        blocks: list[tuple[tuple[int, ...], int, np.ndarray]] = []
        self._collect_blocks(forest, blocks)
        width = sum(positions.size for _, _, positions in blocks)
        rows = self._rows(members)
        mask = np.full((rows.stop - rows.start, width), INVISIBLE, dtype=np.float32)
        slots, column = [], 0
        for readers, owner, positions in blocks:
            block = self._rows(readers)
            part = mask[block.start - first : block.stop - first, column : column + positions.size]
            visible = _visibility(self._row_positions(readers), positions, self.window)
            part[...] = 0.0 if visible is None else np.where(visible, np.float32(0.0), np.float32(INVISIBLE))
            slots.append(self.sequences[owner].slots[positions[0] : positions[-1] + 1])
            column += positions.size
        self._add_tile(rows, 1, np.concatenate(slots), mask[None])

    def _collect_blocks(self, forest: Forest, blocks: list[tuple[tuple[int, ...], int, np.ndarray]]) -> None:
        for tree in forest:
            stop = self.sequences[tree.member].stop if isinstance(tree, Leaf) else tree.stop
            blocks.append((tree.members, tree.members[0], np.arange(tree.start, stop)))
            if not isinstance(tree, Leaf):
                self._collect_blocks(tree.children, blocks)

    def _buckets(self) -> list[list[_OwnKeys]]:
        """Padded tiles: sequences with equally many rows and not too different numbers of keys."""
        costs = self.coverer.costs
        buckets: list[list[_OwnKeys]] = []
        for own in sorted(self.padded, key=lambda own: (self._tokens(own), -own.positions.size)):
            per_key = self._tokens(own) * self.heads.group + costs.read + costs.gather
            few_rows = self._tokens(own) < FOLDED_ROWS
            if few_rows and buckets and self._tokens(buckets[-1][0]) == self._tokens(own):
                missing = buckets[-1][0].positions.size - own.positions.size
                if missing * per_key < costs.tile or own.positions.size * 5 > buckets[-1][0].positions.size * 4:
                    buckets[-1].append(own)
                    continue
            buckets.append([own])
        return buckets

    def _add_bucket(self, bucket: list[_OwnKeys]) -> None:
        bucket = sorted(bucket, key=lambda own: self.places[own.member])
        width = max(own.positions.size for own in bucket)
        tokens = self._tokens(bucket[0])
        slots: np.ndarray = np.empty((len(bucket), width), dtype=np.int64)
        mask: np.ndarray = np.zeros((len(bucket), tokens, width), dtype=np.float32)
        for line, own in enumerate(bucket):
            size = own.positions.size
            slots[line, :size] = self.sequences[own.member].slots[own.positions]
            slots[line, size:] = slots[line, size - 1]
            mask[line, :, size:] = INVISIBLE
            visible = _visibility(self._row_positions((own.member,)), own.positions, self.window)
            if visible is not None:
                mask[line, :, :size][~visible] = INVISIBLE
        rows = self._rows_of_bucket(bucket, tokens)
        self._add_tile(rows, len(bucket), slots.reshape(-1), mask if mask.any() else None)

    # -- tiles -----------------------------------------------------------------------------------------------

    def _add_tile(
        self,
        rows: slice | torch.Tensor,
        sequences: int,
        slots: np.ndarray,
        mask: np.ndarray | None,
        causal: bool = False,
    ) -> None:
        """Append a tile; ``slots`` is ``[sequences * width]``, ``mask`` ``[sequences, tokens, width]``."""
        size = rows.stop - rows.start if isinstance(rows, slice) else rows.numel()
        tokens = size // sequences
        folded = sequences > 1 or (tokens < FOLDED_ROWS and not causal)
        width, step, parts = slots.size // sequences, 0, 1
        if folded and sequences == 1:
            parts = self._parts(tokens, width)
            if parts > 1:
                slots_step = width // parts
                mask, width, step = _split_mask(mask, parts, width), width - (parts - 1) * slots_step, slots_step
        start = _single_run(slots) if sequences == 1 else -1
        index = None
        if start < 0:
            index = torch.from_numpy(np.array(_overlapping(slots, parts, step, width), dtype=np.int64))
        level = int(self.filled[_as_numpy(rows)].max())
        self.filled[_as_numpy(rows)] = level + parts
        self.tiles.append(
            Tile(
                rows=rows,
                sequences=sequences,
                tokens=tokens,
                parts=parts,
                width=width,
                start=start,
                step=step,
                index=index,
                mask=self._laid_out(mask, folded),
                causal=causal,
                folded=folded,
                level=level,
            )
        )

    def _laid_out(self, mask: np.ndarray | None, folded: bool) -> torch.Tensor | None:
        if mask is None:
            return None
        if folded and mask.shape[1] > 1:
            mask = np.repeat(mask, self.heads.group, axis=1)
        return torch.from_numpy(np.ascontiguousarray(mask)).unsqueeze(1)

    def _parts(self, tokens: int, width: int) -> int:
        """Into how many parts a tile's keys must be split to keep all threads busy."""
        tasks = self.heads.kv_heads * -(-tokens * self.heads.group // KERNEL_ROWS)
        least = width // FEW_ROWS_PART if tokens * self.heads.group <= FEW_ROWS else 1
        for parts in range(max(1, least), max(2, width // MIN_PART + 1)):
            rounds = -(-tasks * parts // self.threads)
            if tasks * parts >= 0.9 * rounds * self.threads:
                return parts
        return 1

    def _tokens(self, own: _OwnKeys) -> int:
        return self.sequences[own.member].tokens

    def _end_row(self, member: int) -> int:
        return self.sequences[member].row + self.sequences[member].tokens

    def _rows(self, members: tuple[int, ...]) -> slice:
        """Rows of sequences that follow each other in plan order."""
        last = members[-1]
        return slice(self.places[members[0]], self.places[last] + self.sequences[last].tokens)

    def _rows_of_bucket(self, bucket: list[_OwnKeys], tokens: int) -> slice | torch.Tensor:
        first = self.places[bucket[0].member]
        if self.places[bucket[-1].member] == first + (len(bucket) - 1) * tokens:
            return slice(first, first + len(bucket) * tokens)
        starts = np.array([self.places[own.member] for own in bucket])
        return torch.from_numpy((starts[:, None] + np.arange(tokens)).reshape(-1))

    def _row_positions(self, members: tuple[int, ...]) -> np.ndarray:
        if len(members) == 1:
            return np.arange(self.sequences[members[0]].prefix, self.sequences[members[0]].stop)
        return np.concatenate([np.arange(self.sequences[m].prefix, self.sequences[m].stop) for m in members])


def _as_numpy(rows: slice | torch.Tensor) -> slice | np.ndarray:
    return rows if isinstance(rows, slice) else rows.numpy()


def _visibility(rows: np.ndarray, keys: np.ndarray, window: int | None) -> np.ndarray | None:
    """``[rows, keys]`` whether a row position sees a key position; None where every row sees every key."""
    future = keys.max() > rows.min()
    past = window is not None and keys.min() < rows.max() - window
    if not (future or past):
        return None
    visible = keys <= rows[:, None]
    if window is not None:
        visible &= keys >= rows[:, None] - window
    return visible


def _mask(rows: np.ndarray, keys: np.ndarray, window: int | None) -> np.ndarray | None:
    """``[1, rows, keys]`` addend for one tile, or None where none is needed."""
    visible = _visibility(rows, keys, window)
    if visible is None:
        return None
    return np.where(visible, np.float32(0.0), np.float32(INVISIBLE))[None]


def _single_run(slots: np.ndarray) -> int:
    """First slot if the slots follow each other without gap, else -1."""
    first = int(slots[0])
    if int(slots[-1]) - first != slots.size - 1 or (np.diff(slots) != 1).any():
        return -1
    return first


def _long_runs(slots: np.ndarray, start: int, stop: int, min_run: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Positions of each run of at least ``min_run`` consecutive slots within ``start .. stop``, and the rest."""
    if stop - start < min_run:
        return [], np.arange(start, stop)
    breaks = np.flatnonzero(np.diff(slots[start:stop]) != 1) + start + 1
    edges = np.concatenate([[start], breaks, [stop]])
    sizes = np.diff(edges)
    runs = [np.arange(edges[i], edges[i + 1]) for i in np.flatnonzero(sizes >= min_run)]
    if not runs:
        return [], np.arange(start, stop)
    kept: np.ndarray = np.repeat(sizes < min_run, sizes)
    return runs, np.arange(start, stop)[kept]


def _overlapping(slots: np.ndarray, parts: int, step: int, width: int) -> np.ndarray:
    """The slots of each part, one part after another."""
    if parts == 1:
        return slots
    return slots[(np.arange(parts) * step)[:, None] + np.arange(width)].reshape(-1)


def _split_mask(mask: np.ndarray | None, parts: int, width: int) -> np.ndarray | None:
    """Mask of each part, ``[parts, tokens or 1, part width]``.

    Parts are equally long, so that they can be strided views; what a part has in common with the next one is
    invisible in it.
    """
    step = width // parts
    part_width = width - (parts - 1) * step
    if mask is None and part_width == step:
        return None
    base = np.zeros((1, 1, width), dtype=np.float32) if mask is None else mask
    split = np.stack([base[0, :, part * step : part * step + part_width] for part in range(parts)])
    split[:-1, :, step:] = INVISIBLE
    return split
