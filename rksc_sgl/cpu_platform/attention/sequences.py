"""The sequences of one batch as attention sees them: which slots they may read, which rows they ask for."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
import torch

from rksc_sgl.errors import OptionError

from .common_first import CommonFirst


@dataclass(frozen=True, eq=False)
class QuerySequence:
    """Consecutive query rows of one sequence and the KV slots of everything up to its last row.

    Row ``row + i`` asks for position ``prefix + i`` and may attend to positions ``0 .. prefix + i``.
    """

    slots: (
        np.ndarray
    )  # [prefix + tokens] integer slots in the KV pool, by position; without a window the prefix's in any order
    prefix: int  # positions before the first query row
    tokens: int  # number of query rows, at least 1
    row: int  # first of its rows in the batch's query tensor
    shareable: bool = True  # False: its keys are never read together with another sequence's

    @property
    def stop(self) -> int:
        """Number of positions that its last row may attend to."""
        return self.prefix + self.tokens

    def first_visible(self, window: int | None) -> int:
        """First position that any of its rows may attend to."""
        return 0 if window is None else max(0, self.prefix - window)

    def last_horizon(self, window: int | None) -> int:
        """First position that its last row may attend to."""
        return 0 if window is None else max(0, self.stop - 1 - window)


def batch_sequences(
    req_to_token: torch.Tensor,
    pool_rows: Listing[int],
    prefix_lens: Listing[int],
    extend_lens: Listing[int],
    order: CommonFirst | None = None,
) -> tuple[QuerySequence, ...]:
    """Sequences of a batch whose query rows follow each other in the order given.

    Args:
        req_to_token: ``[rows, max_context]`` integer slots on the CPU; only read while planning.
        pool_rows: row of ``req_to_token`` of each sequence; a row may come more than once.
        prefix_lens: positions before each sequence's first query row.
        extend_lens: query rows of each sequence; one with 0 rows is left out.
        order: puts the slots of prefixes in another order; None leaves them by position.

    Raises:
        OptionError: lengths of the lists differ, or a length is negative or larger than ``max_context``.
    """
    if not len(pool_rows) == len(prefix_lens) == len(extend_lens):
        raise OptionError(
            f"got {len(pool_rows)} pool rows, {len(prefix_lens)} prefix lengths and {len(extend_lens)} extend "
            "lengths; each sequence needs one of each"
        )
    table = req_to_token.numpy()
    capacity = table.shape[1]
    sequences, row = [], 0
    for pool_row, prefix, tokens in zip(pool_rows, prefix_lens, extend_lens, strict=True):
        if prefix < 0 or tokens < 0 or prefix + tokens > capacity:
            raise OptionError(
                f"got prefix {prefix} and extend length {tokens}; both must be at least 0 and their sum at most "
                f"{capacity}, the width of req_to_token"
            )
        if tokens:
            slots = table[pool_row, : prefix + tokens]
            if order is not None and prefix:
                slots = np.concatenate([order.ordered(pool_row, slots[:prefix]), slots[prefix:]])
            sequences.append(QuerySequence(slots, prefix, tokens, row))
        row += tokens
    return tuple(sequences)


def split_long(sequence: QuerySequence, max_tokens: int) -> list[QuerySequence]:
    """The same rows as sequences of at most ``max_tokens`` rows, none of which shares its reads.

    With a sliding window every piece then needs only the keys near it, so the cost is linear in the length.
    """
    if sequence.tokens <= max_tokens:
        return [sequence]
    return [
        QuerySequence(
            slots=sequence.slots[: min(sequence.prefix + first + max_tokens, sequence.stop)],
            prefix=sequence.prefix + first,
            tokens=min(max_tokens, sequence.tokens - first),
            row=sequence.row + first,
            shareable=False,
        )
        for first in range(0, sequence.tokens, max_tokens)
    ]
