"""The ranks that compute a batch together."""

from __future__ import annotations

from typing import Any

import torch

from rksc_sgl.early_exit.leaving import Agreement


def tp_group() -> Any:
    """The tensor-parallel group of this process."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_group


def agreement() -> Agreement:
    """Rank 0 decides: a last bit that differs between ranks must not make them run different batches."""
    group = tp_group()
    if group.world_size == 1:
        return lambda found: found

    def agree(found: torch.Tensor) -> torch.Tensor:
        if found.dtype is not torch.bool:
            return group.broadcast(found, src=0)
        return group.broadcast(found.to(torch.int32), src=0).to(torch.bool)

    return agree
