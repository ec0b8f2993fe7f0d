"""Paged allocation on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def last_slots(
    original: Any, req_to_token: torch.Tensor, req_pool_indices_tensor: torch.Tensor, prefix_lens_tensor: torch.Tensor
) -> torch.Tensor:
    """AROUND hook: the slot of each request's last token, without Triton where the table is on a CPU.

    SGLang decides by the name of the attention backend, and knows only ``torch_native`` to do without Triton.

    Returns:
        [requests] slots; -1 for a request without a prefix.
    """
    if req_to_token.device.type != "cpu":
        return original(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)
