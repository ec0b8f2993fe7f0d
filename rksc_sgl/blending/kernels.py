"""The operations of :mod:`rksc_sgl.blending.take_over` as one Triton launch each.

They run on a CPU too, in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported), where they are
tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rksc_sgl.blending.take_over import DonorRows, Layers

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TOKENS = 16  # of a program


class TritonTakeOver:
    """One launch for all layers (:class:`~rksc_sgl.blending.take_over.TakeOver`).

    The addresses of the layers' buffers are looked up when it is made: buffers that are allocated anew need another.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        device = layers.keys[0].device
        self._keys, self._values = (_addresses(part, device) for part in (layers.keys, layers.values))

    def __call__(self, rows: DonorRows, taken: torch.Tensor) -> None:
        keys, values, rotation = self.layers.keys[0], self.layers.values[0], self.layers.rotation
        heads, size = keys.shape[1:]
        half = 0 if rotation is None else rotation.rotary_dim // 2
        if rotation is not None:
            rotation.covers(rows.highest)
        _take_over[(triton.cdiv(taken.numel(), TOKENS), len(self.layers.keys))](
            *(self._keys, self._values, rows.own, rows.theirs, rows.old, rows.new, taken, taken.numel()),
            keys if rotation is None else rotation.cos_sin,
            *(keys.stride(0), values.stride(0), values.shape[1] * values.shape[2]),
            HEADS=heads,
            SIZE=size,
            HALF=half,
            HALF_BLOCK=triton.next_power_of_2(max(1, half)),
            REST_BLOCK=triton.next_power_of_2(max(1, size - 2 * half)),
            VALUE_BLOCK=min(512, triton.next_power_of_2(values.shape[1] * values.shape[2])),
            IS_NEOX=rotation is not None and rotation.is_neox_style,
            DTYPE=TYPES[keys.dtype],
            TOKENS=TOKENS,
        )


def refusal_of_triton(layers: Layers) -> str:
    """Why :class:`TritonTakeOver` cannot serve these layers; empty if it can."""
    first, value = layers.keys[0], layers.values[0]
    # fmt: off
    unsupported = {
        f"numbers of type {first.dtype}": first.dtype not in TYPES or value.dtype != first.dtype,
        "heads that do not lie beside each other": any(
            one.stride(2) != 1 or one.stride(1) != one.shape[2] for one in (first, value)
        ),
        "layers of several shapes": any(
            (one.shape, one.stride(), one.dtype) != (first.shape, first.stride(), first.dtype) for one in layers.keys
        ) or any((one.shape, one.stride(), one.dtype) != (value.shape, value.stride(), value.dtype)
                 for one in layers.values),
        "a rotary table whose rows do not lie beside each other":
            layers.rotation is not None and not layers.rotation.cos_sin.is_contiguous(),
    }
    # fmt: on
    return next((reason for reason, found in unsupported.items() if found), "")


def triton_deviation_of(values: torch.Tensor, rows: DonorRows) -> torch.Tensor:
    """:func:`~rksc_sgl.blending.take_over.deviation_of` in one launch."""
    count, width = rows.own.numel(), values.shape[1] * values.shape[2]
    found = torch.empty(count, dtype=torch.float32, device=values.device)
    _deviation[(count,)](
        *(values, rows.own, rows.theirs, found, values.stride(0), width),
        BLOCK=min(1024, triton.next_power_of_2(width)),
    )
    return found


def _addresses(buffers: object, device: torch.device) -> torch.Tensor:
    return torch.tensor([one.data_ptr() for one in buffers], dtype=torch.int64, device=device)  # type: ignore[attr-defined]


@triton.jit
def _take_over(
    key_addresses,
    value_addresses,
    own_ptr,
    theirs_ptr,
    old_ptr,
    new_ptr,
    taken_ptr,
    count,
    table_ptr,  # [positions, 2 * HALF], cosines then sines
    key_stride,
    value_stride,
    value_width,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that are turned; 0 for none
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    IS_NEOX: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    layer = tl.program_id(1)
    lanes = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = lanes < count
    rows = tl.load(taken_ptr + lanes, mask=there, other=0)
    own = tl.load(own_ptr + rows, mask=there, other=0)
    theirs = tl.load(theirs_ptr + rows, mask=there, other=0)
    keys = tl.cast(tl.load(key_addresses + layer), tl.pointer_type(DTYPE))
    values = tl.cast(tl.load(value_addresses + layer), tl.pointer_type(DTYPE))
    source = (theirs * key_stride)[:, None]
    target = (own * key_stride)[:, None]
    if HALF > 0:
        pair = tl.arange(0, HALF_BLOCK)
        known = there[:, None] & (pair < HALF)[None, :]
        old = tl.load(old_ptr + rows, mask=there, other=0)
        new = tl.load(new_ptr + rows, mask=there, other=0)
        at_old = table_ptr + (old * 2 * HALF)[:, None] + pair[None, :]
        at_new = table_ptr + (new * 2 * HALF)[:, None] + pair[None, :]
        cos_old = tl.load(at_old, mask=known, other=1.0).to(tl.float32)
        sin_old = tl.load(at_old + HALF, mask=known, other=0.0).to(tl.float32)
        cos_new = tl.load(at_new, mask=known, other=1.0).to(tl.float32)
        sin_new = tl.load(at_new + HALF, mask=known, other=0.0).to(tl.float32)
        square = cos_old * cos_old + sin_old * sin_old
        cos = (cos_new * cos_old + sin_new * sin_old) / square
        sin = (sin_new * cos_old - cos_new * sin_old) / square
        moved = (old != new)[:, None]
        if IS_NEOX:
            one, other = pair[None, :], HALF + pair[None, :]
        else:
            one, other = 2 * pair[None, :], 2 * pair[None, :] + 1
        for head in range(HEADS):
            first = tl.load(keys + source + head * SIZE + one, mask=known, other=0.0)
            second = tl.load(keys + source + head * SIZE + other, mask=known, other=0.0)
            x, y = first.to(tl.float32), second.to(tl.float32)
            turned_first = tl.where(moved, (x * cos - y * sin).to(DTYPE), first)
            turned_second = tl.where(moved, (y * cos + x * sin).to(DTYPE), second)
            tl.store(keys + target + head * SIZE + one, turned_first, mask=known)
            tl.store(keys + target + head * SIZE + other, turned_second, mask=known)
    if SIZE > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        left = there[:, None] & (rest < SIZE)
        for head in range(HEADS):
            part = tl.load(keys + source + head * SIZE + rest, mask=left, other=0.0)
            tl.store(keys + target + head * SIZE + rest, part, mask=left)
    for begin in range(0, value_width, VALUE_BLOCK):
        place = begin + tl.arange(0, VALUE_BLOCK)[None, :]
        within = there[:, None] & (place < value_width)
        found = tl.load(values + (theirs * value_stride)[:, None] + place, mask=within, other=0.0)
        tl.store(values + (own * value_stride)[:, None] + place, found, mask=within)


@triton.jit
def _deviation(values, own_ptr, theirs_ptr, found_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    own = tl.load(own_ptr + row)
    theirs = tl.load(theirs_ptr + row)
    apart = tl.zeros((BLOCK,), dtype=tl.float32)
    size = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        ours = tl.load(values + own * stride + place, mask=place < width, other=0.0).to(tl.float32)
        donors = tl.load(values + theirs * stride + place, mask=place < width, other=0.0).to(tl.float32)
        apart += (ours - donors) * (ours - donors)
        size += donors * donors
    tl.store(found_ptr + row, tl.sqrt(tl.sum(apart)) / tl.maximum(tl.sqrt(tl.sum(size)), 1e-6))
