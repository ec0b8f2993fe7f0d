"""Prefixes in an order in which what several sequences read comes first.

What sequences have in common is found from their first slots on (:mod:`.prefix_tree`). Branches that use slots of one
donor have them after openings of their own, and between tokens that they computed themselves. Every row reads all of
its prefix, in whatever order: so slots that several sequences own are put first, the same in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rksc_sgl.memory.shared_slots import SharedSlots


@dataclass(frozen=True, eq=False)
class _Known:
    """A prefix that was put in order.

    Attributes:
        version: of the owners that it was ordered by.
        slots: ``[n]`` as they stand in the table.
        ordered: ``[n]`` the same.
    """

    version: int
    slots: np.ndarray
    ordered: np.ndarray


class CommonFirst:
    """Puts the prefixes of one pool's sequences in order, and remembers how: in decode they only grow.

    Args:
        shared: the owners of its slots; they are on the CPU.
    """

    def __init__(self, shared: SharedSlots) -> None:
        self._shared = shared
        self._known: dict[int, _Known] = {}

    def ordered(self, row: int, slots: np.ndarray) -> np.ndarray:
        """The same slots, those with the most owners first.

        Args:
            row: of the table of slots.
            slots: integers ``[n]`` of the whole prefix.
        """
        if not self._shared.surplus:
            self._known.clear()
            return slots
        known = self._known.get(row)
        if known is None or not self._still_there(known, slots):
            known = _Known(self._shared.version, slots.copy(), self._sorted(slots))
        elif known.slots.size < slots.size:
            grown = slots[known.slots.size :]
            known = _Known(known.version, slots.copy(), np.concatenate([known.ordered, grown]))
        self._known[row] = known
        return known.ordered

    def _still_there(self, known: _Known, slots: np.ndarray) -> bool:
        same_owners = known.version == self._shared.version
        return same_owners and np.array_equal(known.slots, slots[: known.slots.size])

    def _sorted(self, slots: np.ndarray) -> np.ndarray:
        owners = self._shared.counts()[slots]
        common = np.flatnonzero(owners)
        first = common[np.lexsort((slots[common], -owners[common]))]
        return np.concatenate([slots[first], slots[owners == 0]])
