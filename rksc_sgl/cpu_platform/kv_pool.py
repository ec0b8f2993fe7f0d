"""The KV pool on a CPU: reserved at once, backed by memory only where it is written."""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch.overrides import TorchFunctionMode


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros whose pages the kernel provides when they are first written.

    ``torch.zeros`` writes every page, which for a pool of several GB takes most of a server's start and holds
    memory that may never be used.
    """
    elements = math.prod(shape)
    if elements == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, elements * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(shape)


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
