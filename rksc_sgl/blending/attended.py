"""What the end of a prompt looks at: which tokens' KV an answer will be made of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

QUERIES = 32  # tokens of a prompt whose attention counts
MOST_SCORES = 1 << 24  # that are there at once: 64 MiB


def asking(tokens: int, *, complete: bool) -> NDArray[np.int64]:
    """Which of the new tokens of a sequence say what they attend to: int64, ascending, at most :data:`QUERIES`.

    The last ones, where the prompt ends with them: there its question is. Where only a chunk of the prompt is there,
    its end says nothing of what will be asked, and tokens from all of it speak.

    Args:
        tokens: that are new.
        complete: whether the prompt ends with them.
    """
    count = min(QUERIES, tokens)
    if complete:
        return np.arange(tokens - count, tokens)
    return np.arange(1, count + 1) * tokens // count - 1


def attention_received(
    queries: torch.Tensor,
    keys: torch.Tensor,
    places: torch.Tensor,
    *,
    scaling: float,
    window: int = -1,
    cap: float = 0.0,
) -> torch.Tensor:
    """How much some tokens of a sequence attend to each of its tokens in one layer, on average of these and of heads.

    Selecting what to compute by what a query attends to is the idea of ProphetKV; the first layers are enough for it
    (measured by ``benchmarks.blend_rules``).

    Args:
        queries: ``[w, heads, size]``, turned to their positions.
        keys: ``[n, kv_heads, size]`` of all tokens, turned to theirs.
        places: int64 ``[w]``, which of the tokens the queries are.
        scaling: of scores.
        window: tokens before itself that a token sees; -1 for all.
        cap: bound of scores (``cap * tanh(score / cap)``); 0 for none.

    Returns:
        float32 ``[n]``, of sum 1.
    """
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))
    before = places[:, None] - torch.arange(len(keys), device=keys.device)  # how far each stands before the query
    unseen = before < 0 if window < 0 else (before < 0) | (before > window)
    together = max(1, MOST_SCORES // (len(keys) * len(queries) * grouped.shape[2]))  # key heads
    total = torch.zeros(len(keys), device=keys.device)
    for some, own in zip(grouped.split(together, dim=1), keys.split(together, dim=1), strict=True):
        scores = torch.einsum("wkgd,nkd->kgwn", some, own.float()) * scaling
        if cap > 0.0:
            scores = cap * (scores / cap).tanh()
        total += scores.masked_fill(unseen, float("-inf")).softmax(dim=-1).sum(dim=(0, 1, 2))
    return total / (queries.shape[0] * queries.shape[1])
