"""Attention of packed queries as one Triton launch, and a second one where keys are read in parts.

A run of computed tokens that is a sequence of its own to an attention backend reads its whole prefix for itself. Here a
tile holds queries of many runs of a sequence, with all query heads of a KV head, and reads every key once. Blocks of
keys after a tile's last position are left out, and with a window those before its first query's.

It runs on a CPU too, in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported), where it is tested. It
was not run on a GPU, and the sizes of its blocks were not tuned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rksc_sgl.packed_attention.layout import Layout


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's blocks.

    Attributes:
        queries: of a tile.
        group: query heads of a KV head, filled up to a power of two.
        keys: that are read at a time.
        warps: of a program.
    """

    queries: int
    group: int
    keys: int
    warps: int

    @classmethod
    def of(cls, query_heads: int, kv_heads: int, size: int) -> Blocks:
        """For heads of this size."""
        group = triton.next_power_of_2(query_heads // kv_heads)
        return cls(max(1, 64 // group), group, 64 if size <= 128 else 32, 4 if size <= 128 else 8)


@dataclass(frozen=True, eq=False)
class DeviceLayout:
    """A :class:`~rksc_sgl.packed_attention.layout.Layout` on its device: ``tiles`` int64 ``[4 * tiles]``, ``positions``
    int64 ``[queries]``."""

    tiles: torch.Tensor
    positions: torch.Tensor
    splits: int

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> DeviceLayout:
        """Brought there."""
        tiles, positions = (torch.from_numpy(part).to(device) for part in (layout.tiles.ravel(), layout.positions))
        return cls(tiles, positions, layout.splits)


def packed_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    layout: DeviceLayout,
    blocks: Blocks,
    *,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
) -> torch.Tensor:
    """Each query over the keys of its own sequence, up to its own position.

    Args:
        queries: ``[n, query_heads, size]``, the queries of the layout; heads beside each other.
        keys: ``[slots, kv_heads, size]``, with those of the queries; heads beside each other.
        values: ``[slots, kv_heads, value_size]``, as the keys.
        slots: int32 or int64 ``[rows, positions]`` the table of slots.
        layout: in tiles of at most ``blocks.queries``.
        blocks: for these heads.
        scale: of the scores.
        window: how many positions before its own a query sees; None for all.
        cap: scores are ``cap * tanh(score / cap)``; 0 for none.

    Returns:
        ``[n, query_heads, value_size]`` of the queries' type.
    """
    count, heads, size = queries.shape
    kv_heads, value_size, splits = keys.shape[1], values.shape[2], layout.splits
    out = queries.new_empty(count, heads, value_size)
    partial = (
        out if splits == 1 else torch.empty(splits, count, heads, value_size, dtype=torch.float32, device=out.device)
    )
    sums = torch.empty(splits, count, heads, dtype=torch.float32, device=out.device) if splits > 1 else partial
    _attend[(layout.tiles.numel() // 4, kv_heads, splits)](
        *(queries, keys, values, slots, layout.positions, layout.tiles, partial, sums),
        *(scale, cap, queries.stride(0), keys.stride(0), values.stride(0), slots.stride(0), count),
        HEADS=heads,
        GROUP=heads // kv_heads,
        GROUP_BLOCK=blocks.group,
        ROWS=blocks.queries * blocks.group,
        KEYS=blocks.keys,
        SIZE=size,
        SIZE_BLOCK=max(16, triton.next_power_of_2(size)),
        VALUE_SIZE=value_size,
        VALUE_BLOCK=max(16, triton.next_power_of_2(value_size)),
        WINDOW=-1 if window is None else window,
        HAS_CAP=bool(cap),
        SPLITS=splits,
        num_warps=blocks.warps,
    )
    if splits > 1:
        _merge[(count, heads)](
            *(partial, sums, out, count),
            HEADS=heads,
            VALUE_SIZE=value_size,
            VALUE_BLOCK=triton.next_power_of_2(value_size),
            SPLITS=splits,
        )
    return out


@triton.jit
def _attend(
    queries,
    keys,
    values,
    slots,
    positions,
    tiles,
    out,  # [n, heads, value size], or [splits, n, heads, value size] to be merged
    sums,  # [splits, n, heads] logarithms of the sums of the exponentials, where there are splits
    scale,
    cap,
    query_stride,
    key_stride,
    value_stride,
    slots_stride,
    count,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(tiles + 4 * tile)
    here = tl.load(tiles + 4 * tile + 1)
    table_row = tl.load(tiles + 4 * tile + 2)
    last = tl.load(tiles + 4 * tile + 3)
    row = tl.arange(0, ROWS)
    query = row // GROUP_BLOCK
    member = row % GROUP_BLOCK
    there = (query < here) & (member < GROUP)
    head = kv_head * GROUP + member
    position = tl.load(positions + first + query, mask=query < here, other=-1)
    dim = tl.arange(0, SIZE_BLOCK)
    value_dim = tl.arange(0, VALUE_BLOCK)
    asked = tl.load(
        queries + ((first + query) * query_stride + head * SIZE)[:, None] + dim[None, :],
        mask=there[:, None] & (dim < SIZE)[None, :],
        other=0.0,
    )
    low = 0
    if WINDOW >= 0:
        low = tl.maximum(tl.load(positions + first) - WINDOW, 0) // KEYS * KEYS
    blocks = tl.cdiv(last + 1 - low, KEYS)
    part = tl.cdiv(blocks, SPLITS) * KEYS
    begin = low + split * part
    end = tl.minimum(begin + part, last + 1)
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, VALUE_BLOCK), dtype=tl.float32)
    for start in range(begin, end, KEYS):
        place = start + tl.arange(0, KEYS)
        known = place < end
        slot = tl.load(slots + table_row * slots_stride + place, mask=known, other=0).to(tl.int64)
        key = tl.load(
            keys + (slot * key_stride + kv_head * SIZE)[None, :] + dim[:, None],
            mask=known[None, :] & (dim < SIZE)[:, None],
            other=0.0,
        )
        scores = tl.dot(asked, key, input_precision="ieee") * scale
        if HAS_CAP:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        visible = known[None, :] & (place[None, :] <= position[:, None])
        if WINDOW >= 0:
            visible = visible & (place[None, :] + WINDOW >= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(highest - base)
        value = tl.load(
            values + (slot * value_stride + kv_head * VALUE_SIZE)[:, None] + value_dim[None, :],
            mask=known[:, None] & (value_dim < VALUE_SIZE)[None, :],
            other=0.0,
        )
        mixed = mixed * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * kept + tl.sum(weights, axis=1)
        highest = raised
    whole = tl.where(total > 0.0, total, 1.0)
    target = (split * count + first + query).to(tl.int64) * HEADS + head
    tl.store(
        out + (target * VALUE_SIZE)[:, None] + value_dim[None, :],
        (mixed / whole[:, None]).to(out.dtype.element_ty),
        mask=there[:, None] & (value_dim < VALUE_SIZE)[None, :],
    )
    if SPLITS > 1:
        tl.store(sums + target, tl.where(total > 0.0, highest + tl.log(whole), float("-inf")), mask=there)


@triton.jit
def _merge(
    partial,
    sums,
    out,
    count,
    HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    dim = tl.arange(0, VALUE_BLOCK)
    highest = float("-inf")
    for split in tl.static_range(SPLITS):
        highest = tl.maximum(highest, tl.load(sums + split * count * HEADS + at))
    total = 0.0
    mixed = tl.zeros((VALUE_BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(sums + split * count * HEADS + at) - highest)
        part = tl.load(partial + (split * count * HEADS + at) * VALUE_SIZE + dim, mask=dim < VALUE_SIZE, other=0.0)
        mixed += weight * part
        total += weight
    tl.store(out + at * VALUE_SIZE + dim, (mixed / total).to(out.dtype.element_ty), mask=dim < VALUE_SIZE)
