"""What the end of a prompt looks at: which tokens' KV an answer will be made of."""

from __future__ import annotations

import torch

QUERIES = 32  # last tokens of a prompt whose attention counts


def attention_received(
    queries: torch.Tensor, keys: torch.Tensor, *, scaling: float, window: int = -1, cap: float = 0.0
) -> torch.Tensor:
    """How much the last tokens of a sequence attend to each of its tokens in one layer, on average of tokens and heads.

    Selecting what to compute by what a query attends to is the idea of ProphetKV; the first layers are enough for it
    (measured by ``benchmarks.blend_rules``).

    Args:
        queries: ``[w, heads, size]`` of the last ``w`` tokens, turned to their positions.
        keys: ``[n, kv_heads, size]`` of all tokens, turned to theirs.
        scaling: of scores.
        window: tokens before itself that a token sees; -1 for all.
        cap: bound of scores (``cap * tanh(score / cap)``); 0 for none.

    Returns:
        float32 ``[n]``, of sum 1.
    """
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("wkgd,nkd->kgwn", grouped, keys.float()) * scaling
    if cap > 0.0:
        scores = cap * (scores / cap).tanh()
    places = torch.arange(len(keys), device=keys.device)
    before = places[-len(queries) :, None] - places  # how many tokens each one stands before the query
    unseen = before < 0 if window < 0 else (before < 0) | (before > window)
    return scores.masked_fill(unseen, float("-inf")).softmax(dim=-1).mean(dim=(0, 1, 2))
