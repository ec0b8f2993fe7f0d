"""The packed attention against plain tensors, on the CPU; run with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from rksc_sgl.packed_attention.kernel import Blocks, DeviceLayout, packed_attention
from rksc_sgl.packed_attention.layout import Queries, lay_out
from rksc_sgl.packed_attention.proof import difference_from_plain
from rksc_sgl.packed_attention.reference import plain_attention

SIZES = (64, 96, 128, 256)
HEADS = ((2, 2), (4, 1), (6, 2))  # of queries, of KV
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}  # the interpreter cannot multiply bfloat16
POSITIONS = 140


def sequences_of(source: np.random.Generator, lengths: tuple[int, ...]) -> list[Queries]:
    """Some positions of each sequence: far apart and side by side, always the last one, now and then the first."""
    found = []
    for row, length in enumerate(lengths):
        chosen = source.random(length) < 0.2
        chosen[length // 3 : length // 3 + 9] = True
        chosen[-1] = True
        chosen[0] |= row % 2 == 0
        found.append(Queries(len(lengths) - 1 - row, chosen.nonzero()[0]))
    return found


def slots_of(source: np.random.Generator, rows: int, page: int) -> torch.Tensor:
    """``[rows, POSITIONS]`` slots in shuffled pages; int32, as SGLang has them."""
    pages = -(-POSITIONS // page)
    order = source.permutation(rows * pages).reshape(rows, pages, 1)
    slots = (order * page + np.arange(page)).reshape(rows, -1)
    return torch.from_numpy(slots[:, :POSITIONS].astype(np.int32))


def check(number: int, size: int, heads: tuple[int, int], dtype: torch.dtype, window: int | None, programs: int) -> int:
    """One random batch; how many parts its keys were read in."""
    source = np.random.default_rng(number)
    torch.manual_seed(number)
    query_heads, kv_heads = heads
    lengths = tuple(source.integers(1, POSITIONS, 1 + number % 3).tolist())
    sequences, page = sequences_of(source, lengths), (1, 16, 7)[number % 3]
    slots = slots_of(source, len(lengths), page)
    value_size = size if number % 4 else 48
    keys, values = (torch.randn(int(slots.max()) + page, kv_heads, width).to(dtype) for width in (size, value_size))
    queries = torch.randn(sum(one.positions.size for one in sequences), query_heads, size).to(dtype)
    cap = 5.0 if number % 5 == 2 else 0.0
    how = {"scale": size**-0.5, "window": window, "cap": cap}
    blocks = Blocks.of(query_heads, kv_heads, size)
    layout = lay_out(sequences, blocks.queries, kv_heads, programs)
    found = packed_attention(queries, keys, values, slots, DeviceLayout.of(layout, queries.device), blocks, **how)
    expected = plain_attention(queries, keys, values, slots, sequences, **how)
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    return layout.splits


def main() -> None:
    kinds, types = itertools.product(SIZES, HEADS), itertools.cycle(TOLERANCE)
    splits = [
        check(number, size, heads, next(types), 20 if number % 4 == 3 else None, 16 if number % 2 else 1)
        for number, (size, heads) in enumerate(kinds)
    ]
    for dtype in (torch.float32, torch.float16):
        assert difference_from_plain(torch.empty(1, 2, 64, dtype=dtype), 6) == ""
    assert "apart" in difference_from_plain(torch.empty(1, 2, 64, dtype=torch.bfloat16), 6), (
        "the interpreter's is wrong"
    )
    print(f"{len(splits)} batches, keys in up to {max(splits)} parts, {splits.count(1)} in one")


if __name__ == "__main__":
    main()
