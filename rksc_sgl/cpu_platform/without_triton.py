"""Places where SGLang would launch a Triton kernel on a CPU, because it does not know our platform for one."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from rksc_sgl import cpu_platform
from rksc_sgl.on_import import when_imported

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


def arm() -> None:
    """Let the logits processor take its CPU branches (soft caps of Gemma 2 and others) on our platform."""
    when_imported("sglang.srt.layers.logits_processor", _take_cpu_branches)


def _take_cpu_branches(logits_processor: ModuleType) -> None:
    if cpu_platform.in_use():
        assert logits_processor._is_cpu is False, "sglang.srt.layers.logits_processor._is_cpu has changed its meaning"
        logits_processor._is_cpu = True  # type: ignore[attr-defined]
