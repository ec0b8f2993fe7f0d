"""What a policy is shown of a batch when it says which requests it claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rksc_sgl.early_exit.leaving import Agreement


@dataclass(frozen=True)
class Batch:
    """An extend batch before its first layer.

    Attributes:
        runner: SGLang's ``ModelRunner``.
        forward_batch: what it runs.
        schedule_batch: what the scheduler has of it.
        refusal: why it cannot run in layer intervals; empty if it can.
        agree: makes a decision, or the numbers that it is made of, the same on every rank.
    """

    runner: Any
    forward_batch: Any
    schedule_batch: Any
    refusal: str
    agree: Agreement

    @property
    def requests(self) -> Sequence[Any]:
        """SGLang's requests, in the order of the batch."""
        return self.schedule_batch.reqs

    @property
    def tree_cache(self) -> Any:
        """The scheduler's radix tree."""
        return self.schedule_batch.tree_cache
