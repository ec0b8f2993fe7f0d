"""A prefill batch of our own, between two of the scheduler's: one request that leaves nothing behind."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rksc_sgl.sglang_plugin.tree import blended_key

_NAMESPACE = blended_key("own")  # no client may use it and nothing is inserted: every token is computed


@contextmanager
def own_batch(scheduler: Any, ids: array[int]) -> Iterator[Any]:
    """SGLang's ``ScheduleBatch`` of one prompt, ready to run; its KV is released at the end.

    To be used between two batches, by every rank alike, and where the pools have room for it.
    """
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.common import release_kv_cache
    from sglang.srt.sampling.sampling_params import SamplingParams

    tree_cache = scheduler.tree_cache
    req = Req("rksc-own", "", ids, SamplingParams(temperature=0, max_new_tokens=1), extra_key=_NAMESPACE)
    req.init_next_round_input(tree_cache)
    req.lock = tree_cache.lock(req.last_node)
    req.extend_end = len(ids)
    batch = ScheduleBatch.init_new(
        [req],
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        tree_cache,
        scheduler.model_config,
        False,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_extend()
    try:
        batch.input_ids, batch.prefill_input_ids_cpu = batch.prefill_input_ids_cpu.to(batch.device), None
        yield batch
    finally:
        release_kv_cache(req, tree_cache, checkpoint=False)
