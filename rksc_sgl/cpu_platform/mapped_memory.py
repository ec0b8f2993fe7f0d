"""Large tensors in memory of their own: there when it is written, in large pages, and given back at once."""

from __future__ import annotations

import math
import mmap

import torch


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype, *, whole: bool = False) -> torch.Tensor:
    """A tensor of zeros whose pages the kernel provides when they are first written.

    ``torch.zeros`` writes every page, which for a pool of several GB takes most of a server's start and holds
    memory that may never be used.

    Args:
        whole: all of it will be written: large pages, which are there sooner and found sooner.
    """
    elements = math.prod(shape)
    if elements == 0:
        return torch.empty(shape, dtype=dtype)
    if whole and hasattr(mmap, "MAP_PRIVATE"):  # of shared memory, Linux has no large pages by default
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, elements * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(shape)
