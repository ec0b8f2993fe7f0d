"""The KV pool on a CPU: reserved at once, backed by memory only where it is written."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch.overrides import TorchFunctionMode

from rksc_sgl.cpu_platform.mapped_memory import mapped_zeros


class _LazyZeros(TorchFunctionMode):
    """``torch.zeros`` on the CPU is :func:`mapped_zeros` while this is active."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            return mapped_zeros(tuple(shape), kwargs.get("dtype") or torch.get_default_dtype())
        return func(*args, **kwargs)


class LazyMHATokenToKVPool(MHATokenToKVPool):
    """SGLang's pool with its layout unchanged, in memory that is mapped lazily."""

    def _create_buffers_normal(self) -> None:
        with _LazyZeros():
            super()._create_buffers_normal()
