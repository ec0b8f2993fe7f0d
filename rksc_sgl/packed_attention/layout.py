"""Which queries a batch has, and in which tiles they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Queries:
    """Tokens of one sequence that are computed.

    Attributes:
        table_row: the sequence's row in the table of slots.
        positions: int64 ``[n]`` ascending, at least one.
    """

    table_row: int
    positions: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """The queries of a batch, packed one sequence after another, in tiles that have one sequence each.

    Attributes:
        tiles: int64 ``[tiles, 4]``: first query, how many, row of the table of slots, position of the last query.
        positions: int64 ``[queries]``.
        splits: parts in which the keys of every tile are read at once.
    """

    tiles: NDArray[np.int64]
    positions: NDArray[np.int64]
    splits: int


def lay_out(sequences: Sequence[Queries], queries: int, kv_heads: int, programs: int, most_splits: int = 8) -> Layout:
    """Cut queries into tiles, and the keys into parts where there are few tiles.

    Args:
        sequences: of a batch, in the order of its rows.
        queries: most queries of a tile.
        kv_heads: each of them computes every tile.
        programs: how many programs a device should have at once.
        most_splits: parts at most; every part is written, read again and merged.
    """
    tiles, first = [], 0
    for one in sequences:
        for begin in range(0, one.positions.size, queries):
            some = one.positions[begin : begin + queries]
            tiles.append((first + begin, some.size, one.table_row, int(some[-1])))
        first += one.positions.size
    splits = max(1, min(most_splits, programs // max(1, len(tiles) * kv_heads)))
    positions = np.concatenate([one.positions for one in sequences])
    return Layout(np.array(tiles, dtype=np.int64), positions, splits)
