"""Where SGLang asks for slots, retracts, flushes, idles, and hears of the end of a fork."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rksc_sgl.memory.retraction import order_to_keep, retracted_together
from rksc_sgl.sglang_plugin.memory.ending import group_that_ended
from rksc_sgl.sglang_plugin.memory.keeper import keeper_of_tree, known_keeper_of
from rksc_sgl.sglang_plugin.memory.slots import shared_slots_of


def evict_with_leases(
    original: Callable[..., Any], tree_cache: Any, params: Any, *, allocation_reclaim_satisfied: Any = None
) -> Any:
    """AROUND hook: where unleased KV does not do, leases end one after the other.

    A slot that has another owner is not free when the tree evicts it, so it may have to evict more than was asked for.
    """
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    keeper, allocator = keeper_of_tree(tree_cache), tree_cache.token_to_kv_pool_allocator
    shared = shared_slots_of(allocator)
    if (keeper is None and shared is None) or allocation_reclaim_satisfied is not None:
        return original(tree_cache, params, allocation_reclaim_satisfied=allocation_reclaim_satisfied)
    wanted = allocator.available_size() + params.num_tokens
    result = original(tree_cache, params)
    found = result.num_tokens_evicted
    while (missing := wanted - allocator.available_size()) > 0:
        goes_on = shared is not None and shared.surplus > 0 and found > 0
        if not goes_on and (keeper is None or not keeper.give_way()):
            break
        found = original(tree_cache, EvictParams(num_tokens=missing)).num_tokens_evicted
        result.num_tokens_evicted += found
    return result


def forget_leases(tree_cache: Any) -> None:
    """BEFORE hook: the tree is emptied, and its locks with it."""
    keeper = keeper_of_tree(tree_cache)
    if keeper is not None:
        keeper.flushed()


def keep_oldest_forks(result: list[int], reqs: list[Any]) -> list[int]:
    """AFTER hook: in SGLang's order of retraction, branches of the fork that came last go first."""
    arrivals = [_arrival(req) for req in reqs]
    return order_to_keep(result, arrivals) if any(arrivals) else result


def retract_whole_forks(original: Callable[..., Any], batch: Any) -> Any:
    """AROUND hook: where one branch of a fork is retracted, its siblings in the batch are too."""
    from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker

    retracted, ratio, aborted = original(batch)
    keeper = keeper_of_tree(batch.tree_cache)
    if keeper is None:
        return retracted, ratio, aborted
    follow = retracted_together([_arrival(req) for req in retracted], [_arrival(req) for req in batch.reqs])
    if follow:
        left = [place for place in range(len(batch.reqs)) if place not in set(follow)]
        for place in follow:
            batch.release_req(place, len(left))
            retracted.append(batch.reqs[place])
        batch.filter_batch(keep_indices=left)
        ratio = NewTokenRatioTracker.estimate_new_token_ratio_after_retract(batch.reqs)
    keeper.note_retracted(retracted)
    return retracted, ratio, aborted


def hear_of_end(scheduler: Any, recv_req: Any) -> None:
    """BEFORE hook: what looks like an abort may tell that a fork has ended."""
    group = group_that_ended(recv_req.rid)
    keeper = known_keeper_of(scheduler)
    if group is not None and keeper is not None:
        keeper.end(group)


def expire_leases(scheduler: Any) -> None:
    """BEFORE hook: nothing runs."""
    keeper = known_keeper_of(scheduler)
    if keeper is not None:
        keeper.idle()


def _arrival(req: Any) -> int | None:
    """The arrival of the fork of a request that can be retracted and come back; None of every other."""
    return None if req.rksc is None or req.beam_group is not None else req.rksc.arrival
