"""The reads of one forward pass, laid out for ``layers.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.cpu_platform.attention.plan import MIN_SHARED
from rksc_sgl.cpu_platform.attention.prefix_tree import Forest, Leaf, shared_prefix_forest
from rksc_sgl.cpu_platform.attention.sequences import QuerySequence
from rksc_sgl.cpu_platform.native.linear import LinearStruct

_Array: TypeAlias = "NDArray[np.int64]"


class PassStruct(ctypes.Structure):
    """``Pass`` of ``layers.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "query_heads", "kv_heads", "dim", "units")),
        *((name, ctypes.c_void_p) for name in ("slots", "unit_slot", "unit_keys", "unit_offset", "unit_segment")),
        *((name, ctypes.c_void_p) for name in ("unit_partial", "segment_entry", "entry_row", "entry_seen")),
        *((name, ctypes.c_void_p) for name in ("row_part", "parts", "partial", "cosines", "sines", "new_slots")),
        *((name, ctypes.c_void_p) for name in ("qkv", "attended")),
    )


class LayerStruct(ctypes.Structure):
    """``Layer`` of ``layers.c``."""

    _fields_ = (
        *((name, LinearStruct) for name in ("qkv", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "before_attention", "before_mlp")),
        *((name, ctypes.c_void_p) for name in ("query_weight", "key_weight")),
        *((name, ctypes.c_float) for name in ("attention_eps", "mlp_eps", "query_eps", "key_eps", "scale")),
    )


@dataclass(frozen=True)
class _Segment:
    """Consecutive positions that are read together.

    Attributes:
        owner: the sequence whose slots are read.
        start, stop: positions.
        members: the sequences whose rows read them.
    """

    owner: int
    start: int
    stop: int
    members: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class NativePass:
    """A pass as the library wants it; whoever holds this holds the memory.

    Attributes:
        struct: for :func:`ctypes.byref`.
        partial: memory for partial results, for a next pass.
        held: what else it points to.
    """

    struct: PassStruct
    partial: torch.Tensor
    held: tuple[object, ...]


def native_pass(
    sequences: Sequence[QuerySequence],
    heads: tuple[int, int, int],
    turns: tuple[torch.Tensor, torch.Tensor],
    new_slots: torch.Tensor,
    unit_keys: int,
    partial: torch.Tensor | None = None,
) -> NativePass:
    """Lay out a pass.

    Args:
        sequences: rows of all of them together are ``0 .. n - 1``.
        heads: query heads, KV heads, their dimension.
        turns: cosines and sines, float32 ``[n, dim / 2]``, contiguous.
        new_slots: int64 ``[n]``, contiguous, where the rows' own KV goes.
        unit_keys: most keys of a unit of work.
        partial: float32 memory for partial results of an earlier pass, taken where it is large enough.
    """
    segments = list(_segments(shared_prefix_forest(sequences, min_shared=MIN_SHARED, window=None), sequences))
    rows = sum(sequence.tokens for sequence in sequences)
    entry_rows, entry_seen, entries = [], [], [0]
    slots, units, first_slot, partials = [], [], 0, 0
    for number, segment in enumerate(segments):
        size = segment.stop - segment.start
        read = [_rows_of(sequences[member], segment) for member in segment.members]
        count = sum(len(one) for one, _ in read)
        entry_rows += [one for one, _ in read]
        entry_seen += [seen for _, seen in read]
        entries.append(entries[-1] + count)
        slots.append(sequences[segment.owner].slots[segment.start : segment.stop])
        for offset in range(0, size, unit_keys):
            units.append((first_slot + offset, min(unit_keys, size - offset), offset, number, partials))
            partials += count
        first_slot += size
    table = np.array(units, dtype=np.int64).reshape(-1, 5)
    columns = [np.ascontiguousarray(table[:, place]) for place in range(5)]
    rows_of_entries = _joined(entry_rows)
    row_part, parts = _parts_of_rows(table, np.array(entries), rows_of_entries, rows)
    query_heads, kv_heads, dim = heads
    needed = partials * query_heads * (dim + 2)
    if partial is None or partial.numel() < needed:
        partial = torch.empty(needed)
    qkv, attended = torch.empty(rows, query_heads + 2 * kv_heads, dim), torch.empty(rows, query_heads, dim)
    arrays = (
        *(_joined(slots), *columns, np.array(entries, dtype=np.int64), rows_of_entries, _joined(entry_seen)),
        *(row_part, parts),
    )
    struct = PassStruct(
        *(rows, query_heads, kv_heads, dim, len(units)),
        *(array.ctypes.data for array in arrays),
        *(tensor.data_ptr() for tensor in (partial, *turns, new_slots, qkv, attended)),
    )
    return NativePass(struct, partial, (arrays, turns, new_slots, qkv, attended))


def _segments(forest: Forest, sequences: Sequence[QuerySequence]) -> Iterator[_Segment]:
    for tree in forest:
        if isinstance(tree, Leaf):
            yield _Segment(tree.member, tree.start, sequences[tree.member].stop, tree.members)
        else:
            yield _Segment(tree.members[0], tree.start, tree.stop, tree.members)
            yield from _segments(tree.children, sequences)


def _rows_of(sequence: QuerySequence, segment: _Segment) -> tuple[_Array, _Array]:
    """Rows of a sequence, and how many keys of a segment each of them sees."""
    steps: _Array = np.arange(sequence.tokens, dtype=np.int64)
    return sequence.row + steps, np.clip(sequence.prefix + steps + 1 - segment.start, 0, segment.stop - segment.start)


def _parts_of_rows(units: _Array, entries: _Array, rows_of_entries: _Array, rows: int) -> tuple[_Array, _Array]:
    """Partial results of each row: where each row's begin ``[rows + 1]``, and all of them."""
    found_rows = _joined([rows_of_entries[entries[number] : entries[number + 1]] for number in units[:, 3]])
    order = np.argsort(found_rows, kind="stable")  # partial results are numbered as they come: unit by unit, by entry
    starts: _Array = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(found_rows, minlength=rows), out=starts[1:])
    return starts, np.ascontiguousarray(order, dtype=np.int64)


def _joined(arrays: Sequence[_Array]) -> _Array:
    return np.ascontiguousarray(np.concatenate(arrays) if len(arrays) else np.empty(0), dtype=np.int64)
