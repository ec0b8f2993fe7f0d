"""Values of a prompt as one vector a layer, and what those of all prompts have in common."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from rksc_sgl.sglang_plugin.exits import tp_group
from rksc_sgl.sglang_plugin.layer_pass import probe_layers
from rksc_sgl.sglang_plugin.resident import blended_key
from rksc_sgl.similarity.generic_prompts import GENERIC_PROMPTS

_NAMESPACE = blended_key("common")  # no client may use it and nothing is inserted: every token is computed


def pooled_values(pool: Any, slots: torch.Tensor, layers: int) -> torch.Tensor:
    """``[layers, heads * size]`` values of the first layers, averaged over the tokens in these slots but the first.

    The first token is left out: its states are an order of magnitude larger than all others. All ranks get all heads.
    """
    means = [pool.get_value_buffer(layer)[slots[1:]].flatten(1).float().mean(dim=0) for layer in range(layers)]
    group = tp_group()
    stacked = torch.stack(means)
    return stacked if group.world_size == 1 else group.all_gather(stacked, dim=-1)


def common_values(scheduler: Any) -> torch.Tensor | None:
    """``[probe layers, heads * size]`` mean of the pooled values of :data:`GENERIC_PROMPTS`, the same on every rank.

    Runs between two batches of the scheduler, through the first layers only, one prompt after the other; their KV is
    released again. None where the pools have no room for the longest of them just now.
    """
    prompts = [array("q", scheduler.tokenizer.encode(text, add_special_tokens=False)) for text in GENERIC_PROMPTS]
    longest = max(map(len, prompts)) + scheduler.page_size
    free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    if free < longest or scheduler.req_to_token_pool.available_size() < 1:
        return None
    scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
    with scheduler.forward_stream_ctx:
        found = [_values_of(scheduler, prompt) for prompt in prompts]
    scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
    return torch.stack(found).mean(dim=0)


def _values_of(scheduler: Any, prompt: array[int]) -> torch.Tensor:
    """The pooled values of one prompt, by a request of its own that leaves nothing behind."""
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.common import release_kv_cache
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.sampling.sampling_params import SamplingParams

    runner, tree_cache = scheduler.tp_worker.model_runner, scheduler.tree_cache
    params = SamplingParams(temperature=0, max_new_tokens=1)
    req = Req("rksc-common", "", prompt, params, extra_key=_NAMESPACE)
    req.init_next_round_input(tree_cache)
    req.lock = tree_cache.lock(req.last_node)
    req.extend_end = len(prompt)
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
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        forward_batch.forward_mode = ForwardMode.SPLIT_PREFILL
        probe = probe_layers(runner)
        runner.forward(forward_batch, split_forward_count=probe)
        slots = batch.out_cache_loc.to(torch.int64)
        return pooled_values(runner.token_to_kv_pool, slots, probe)
    finally:
        release_kv_cache(req, tree_cache, checkpoint=False)
