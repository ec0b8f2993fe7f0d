"""The same attention, query by query in plain tensors: what the operation is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rksc_sgl.packed_attention.layout import Queries


def plain_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    sequences: Sequence[Queries],
    *,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
) -> torch.Tensor:
    """Each query over the keys of its own sequence, up to its own position.

    Args:
        queries: ``[n, query_heads, size]``, one sequence after another.
        keys: ``[slots, kv_heads, size]``.
        values: ``[slots, kv_heads, value_size]``.
        slots: ``[rows, positions]`` the table of slots.
        sequences: whose queries these are.
        scale: of the scores.
        window: how many positions before its own a query sees; None for all.
        cap: scores are ``cap * tanh(score / cap)``; 0 for none.

    Returns:
        float32 ``[n, query_heads, value_size]``.
    """
    group = queries.shape[1] // keys.shape[1]
    out = queries.new_zeros(*queries.shape[:2], values.shape[2], dtype=torch.float32)
    row = 0
    for one in sequences:
        for position in one.positions.tolist():
            first = 0 if window is None else max(0, position - window)
            seen = slots[one.table_row, first : position + 1].long()
            k, v = (part[seen].float().repeat_interleave(group, dim=1) for part in (keys, values))
            scores = torch.einsum("hd,khd->hk", queries[row].float(), k) * scale
            if cap:
                scores = cap * torch.tanh(scores / cap)
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
            row += 1
    return out
