"""Slots of several owners (:mod:`rksc_sgl.memory.shared_slots`) in SGLang's allocator, and in what its tree counts.

SGLang's allocator is asked to free by whoever owns a slot: the tree, a request that ends, is aborted or retracted. All
of them come through one method, which lets a slot go with its last owner. The tree counts tokens, so a slot that two of
its nodes own counts twice: that much is taken off what it says can be evicted, which is then never too much, and what
remains off what is protected, so that free, evictable and protected slots together are those of the pool.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.cpu_platform.attention.backend import RkscCpuAttnBackend
from rksc_sgl.memory.settings import PRIVATE_SLOTS_VARIABLE
from rksc_sgl.memory.shared_slots import SharedSlots
from rksc_sgl.sglang_plugin.memory.tried import refusal_of_memory

logger = logging.getLogger(__name__)

_shared: WeakKeyDictionary[Any, SharedSlots] = WeakKeyDictionary()  # by allocator
_refusals: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # by scheduler


def prepare(scheduler: Any) -> None:
    """Find out whether this server's slots may have several owners, before it serves."""
    refusal = _refusals[scheduler] = _refusal(scheduler)
    if refusal:
        logger.info("rksc: blended branches copy all that they take over: %s", refusal)
        return
    allocator = scheduler.token_to_kv_pool_allocator
    shared = _shared[allocator] = SharedSlots(allocator.size, allocator.device)
    backend = scheduler.tp_worker.model_runner.attn_backend
    if isinstance(backend, RkscCpuAttnBackend):
        backend.share_slots(shared)


def _refusal(scheduler: Any) -> str:
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    allocator = scheduler.token_to_kv_pool_allocator
    reasons = {
        "it was asked to: --rksc-private-slots": os.environ.get(PRIVATE_SLOTS_VARIABLE) == "1",
        f"a page of {scheduler.page_size} slots has one owner": scheduler.page_size > 1,
        f"it was not run on {allocator.device}": torch.device(allocator.device).type != "cpu",
        f"{type(allocator).__name__} is not SGLang's allocator of single slots": (
            type(allocator) is not TokenToKVPoolAllocator
        ),
    }
    return next((reason for reason, found in reasons.items() if found), "") or refusal_of_memory(scheduler)


def shared_slots_of(allocator: Any) -> SharedSlots | None:
    """The owners of an allocator's slots; None where each has one."""
    return _shared.get(allocator)


def share_slots(scheduler: Any) -> bool:
    """Whether a server's slots may have several owners."""
    return scheduler.token_to_kv_pool_allocator in _shared


def described(scheduler: Any) -> dict[str, Any]:
    """As plain values, for ``GET /rksc/info``."""
    shared = shared_slots_of(scheduler.token_to_kv_pool_allocator)
    return {"refusal": _refusals.get(scheduler) or None, "surplus": 0 if shared is None else shared.surplus}


def use_slots(
    allocator: Any, table: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], theirs: torch.Tensor
) -> None:
    """Requests use slots of others for tokens of theirs, and free those that they had for them.

    Args:
        allocator: whose slots these are.
        table: ``[rows, positions]`` SGLang's table of slots.
        places: int64 ``[n]`` row and position of each token, each once.
        theirs: int64 ``[n]`` the slots; each has an owner.
    """
    shared = _shared[allocator]
    own = table[places].to(torch.int64)
    shared.share(theirs)
    table[places] = theirs.to(table.dtype)
    allocator.free(own)


def free_unowned(original: Callable[..., Any], allocator: Any, free_index: torch.Tensor) -> Any:
    """AROUND hook: a slot is free when its last owner has freed it."""
    shared = _shared.get(allocator)
    if shared is None or allocator.free_group is not None:  # what is held back comes again, all at once
        return original(allocator, free_index)
    return original(allocator, shared.without_owner(free_index))


def forget_owners(allocator: Any) -> None:
    """BEFORE hook: the pool is emptied."""
    shared = _shared.get(allocator)
    if shared is not None:
        shared.clear()


def evictable_slots(result: int, tree_cache: Any) -> int:
    """AFTER hook: of the tokens that can be evicted, no more than there are slots to be had by it."""
    shared = _shared.get(tree_cache.token_to_kv_pool_allocator)
    return result if shared is None else result - min(result, shared.surplus)


def protected_slots(result: int, tree_cache: Any) -> int:
    """AFTER hook: the rest of the surplus is among what is locked, or in rows of requests that are not in the tree."""
    return result - surplus_of_locked(tree_cache)


def surplus_of_locked(tree_cache: Any) -> int:
    """So many owners beyond the first are not taken off what can be evicted."""
    shared = _shared.get(tree_cache.token_to_kv_pool_allocator)
    if shared is None or not shared.surplus:
        return 0
    return max(0, shared.surplus - int(tree_cache.tree_core.evictable_size()))
