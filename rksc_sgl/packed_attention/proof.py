"""Whether the packed operation does on this device what plain attention does, on a small sample."""

from __future__ import annotations

import numpy as np
import torch

from rksc_sgl.packed_attention.layout import Queries, lay_out
from rksc_sgl.packed_attention.reference import plain_attention

ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def difference_from_plain(like: torch.Tensor, query_heads: int) -> str:
    """What the operation finds otherwise; empty where nothing.

    Args:
        like: ``[slots, kv_heads, size]`` keys, of whose heads, type and device the sample is.
        query_heads: of a rank.
    """
    from rksc_sgl.packed_attention.kernel import Blocks, DeviceLayout, packed_attention

    (kv_heads, size), source = like.shape[1:], np.random.default_rng(0)
    sequences = [Queries(1, np.flatnonzero(source.random(90) < 0.3)), Queries(0, np.array([0, 40, 41]))]
    count = sum(one.positions.size for one in sequences)
    made = torch.Generator().manual_seed(0)
    keys, values, queries = (
        torch.randn(*shape, size, generator=made).to(like.device, like.dtype)
        for shape in ((180, kv_heads), (180, kv_heads), (count, query_heads))
    )
    slots = torch.randperm(180, generator=made).view(2, 90).to(like.device, torch.int32)
    blocks = Blocks.of(query_heads, kv_heads, size)
    for programs in (1, 64 * kv_heads):  # keys read at once, and in parts
        layout = DeviceLayout.of(lay_out(sequences, blocks.queries, kv_heads, programs), like.device)
        found = packed_attention(queries, keys, values, slots, layout, blocks, scale=size**-0.5)
        expected = plain_attention(queries, keys, values, slots, sequences, scale=size**-0.5)
        apart = float((found.float() - expected).abs().max())
        if not apart <= ALLOWED.get(like.dtype, 0.0):
            return f"it is {apart:.3g} apart from plain attention"
    return ""
