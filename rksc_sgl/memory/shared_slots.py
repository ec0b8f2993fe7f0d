"""KV slots that have several owners, and when the last one has let go of one.

SGLang knows one owner of a slot, who frees it: a node of the tree, or a request until its KV is in the tree. A branch
that uses a donor's slots for its own tokens is one more. Here it is counted how often a slot is owned beyond the first
time. Whoever owns it frees it as ever, and only with the last time it is free: nobody has to know of the others, and
no donor has to be kept for its slots' sake.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.errors import RkscError


class SharedSlots:
    """The owners of one pool's slots beyond their first.

    Args:
        slots: of the pool; they are numbered from 0 to this number.
        device: where slots are given.

    Attributes:
        surplus: owners beyond the first, of all slots: so many tokens the owners count that take no slot.
        version: changes with every owner that comes or goes.
    """

    def __init__(self, slots: int, device: torch.device | str) -> None:
        self._more = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.surplus = 0
        self.version = 0

    def share(self, slots: torch.Tensor) -> None:
        """Each of these slots has one more owner for each time that it is named; it has one already.

        Args:
            slots: int64 ``[n]``.
        """
        self._more.index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))
        self.surplus += slots.numel()
        self.version += 1

    def without_owner(self, slots: torch.Tensor) -> torch.Tensor:
        """Of slots that owners free, those that nobody owns any more.

        Args:
            slots: int64 ``[n]``; one that several owners free comes several times.

        Returns:
            int64 ``[m]``, each once; the same tensor where no slot has two owners.

        Raises:
            RkscError: a slot is freed more often than it is owned.
        """
        if not self.surplus or not slots.numel():
            return slots
        freed, times = slots.unique(return_counts=True)
        left = self._more[freed] - times.to(torch.int32)
        if int(left.min()) < -1:
            raise RkscError(f"slots {freed[left < -1].tolist()} are freed more often than they are owned")
        gone = left < 0
        self._more[freed] = left.clamp(min=0)
        self.surplus -= slots.numel() - int(gone.sum())
        self.version += 1
        return freed[gone]

    def counts(self) -> NDArray[np.int32]:
        """``[slots + 1]``, how many owners each slot has beyond its first; only read, and of a pool on the CPU."""
        return self._more.numpy()

    def clear(self) -> None:
        """Every slot is free."""
        self._more.zero_()
        self.surplus = 0
        self.version += 1
