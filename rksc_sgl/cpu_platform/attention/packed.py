"""Attention of some tokens of each sequence, wherever they stand: keys are gathered once for all of them.

As sequences of their own, runs of one sequence would be planned one by one, each with its prefix. Where many short ones
belong to few sequences that costs more than it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK_ROWS = 512  # scores and masks are of so many rows at once


@dataclass(frozen=True, eq=False)
class _Rows:
    """Consecutive rows of a pass that are tokens of one sequence, not more than :data:`BLOCK_ROWS`.

    Attributes:
        rows: of the pass.
        slots: int64 ``[n]`` of the sequence, up to its last token here.
        seen: bool ``[rows, n]`` which of them each row sees.
    """

    rows: slice
    slots: torch.Tensor
    seen: torch.Tensor


class PackedRows:
    """The rows of a pass by the sequences that they are tokens of.

    Args:
        sequences: of each one, in the order of the rows: slots ``[n]``, and positions int64 ``[rows]``, ascending.
    """

    def __init__(self, sequences: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._parts, first = list[_Rows](), 0
        for slots, positions in sequences:
            for some in positions.split(BLOCK_ROWS):
                count = int(some[-1]) + 1
                seen = torch.arange(count) <= some[:, None]
                self._parts.append(_Rows(slice(first, first + len(some)), slots[:count].to(torch.int64), seen))
                first += len(some)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:
        """Causal attention of every row over its own sequence.

        Args:
            queries: ``[rows, q_heads, size]``, turned to their positions.
            keys: ``[slots, kv_heads, size]``; values: ``[slots, kv_heads, value_size]``; all written already.
            scaling: of scores.
            out: ``[rows, q_heads, value_size]``, written to.
        """
        for part in self._parts:
            own, k, v = (
                one.to(queries.dtype).transpose(0, 1).unsqueeze(0)
                for one in (queries[part.rows], keys[part.slots], values[part.slots])
            )
            found = F.scaled_dot_product_attention(own, k, v, part.seen, scale=scaling, enable_gqa=True)
            out[part.rows] = found[0].transpose(0, 1)
