"""Attention written out: the oracle of the tests, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import torch


def reference_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    pool_rows: Listing[int],
    prefix_lens: Listing[int],
    extend_lens: Listing[int],
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of each sequence's last rows over its cached positions, softmax in float64.

    Args:
        q: ``[rows, q_heads, qk_dim]``, the sequences' rows one after another.
        k_cache: ``[slots, kv_heads, qk_dim]``; ``q_heads`` is a multiple of ``kv_heads``.
        v_cache: ``[slots, kv_heads, v_dim]``.
        req_to_token: ``[pool_rows, max_context]`` slot of each position.
        pool_rows, prefix_lens, extend_lens: one of each for every sequence.
        scale: factor on ``q @ k``.
        window: a row at position p sees positions ``p - window .. p``; None sees all up to p.
        logit_cap: where above 0, logits become ``cap * tanh(logit / cap)``.

    Returns:
        ``[rows, q_heads, v_dim]`` in the dtype of ``q``.
    """
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], v_cache.shape[2], dtype=torch.float64)
    first_row = 0
    for pool_row, prefix, tokens in zip(pool_rows, prefix_lens, extend_lens, strict=True):
        slots = req_to_token[pool_row, : prefix + tokens].long()
        row_position = torch.arange(prefix, prefix + tokens).unsqueeze(1)
        key_position = torch.arange(prefix + tokens).unsqueeze(0)
        visible = key_position <= row_position
        if window is not None:
            visible &= key_position >= row_position - window
        keys = k_cache[slots].double().repeat_interleave(group, dim=1)
        values = v_cache[slots].double().repeat_interleave(group, dim=1)
        queries = q[first_row : first_row + tokens].double()
        logits = torch.einsum("thd,khd->htk", queries, keys) * scale
        if logit_cap > 0:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[first_row : first_row + tokens] = torch.einsum("htk,khd->thd", weights, values)
        first_row += tokens
    return out.to(q.dtype)
