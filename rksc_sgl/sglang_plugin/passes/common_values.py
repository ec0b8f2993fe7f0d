"""Values of a prompt as one vector a layer, and what those of all prompts have in common."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from rksc_sgl.sglang_plugin.passes.own_batch import own_batch
from rksc_sgl.sglang_plugin.passes.ranks import agreement, tp_group
from rksc_sgl.sglang_plugin.passes.split_pass import probe_layers
from rksc_sgl.similarity.generic_prompts import GENERIC_PROMPTS


def pooled_values(pool: Any, slots: torch.Tensor, layers: int) -> torch.Tensor:
    """``[layers, heads * size]`` values of the first layers, averaged over the tokens in these slots but the first.

    The first token is left out: its states are an order of magnitude larger than all others. All ranks get all heads.
    """
    means = [pool.get_value_buffer(layer)[slots[1:]].flatten(1).float().mean(dim=0) for layer in range(layers)]
    group = tp_group()
    stacked = torch.stack(means)
    return stacked if group.world_size == 1 else group.all_gather(stacked, dim=-1)


def common_values(scheduler: Any) -> torch.Tensor | None:
    """``[probe layers, heads * size]`` mean of the pooled values of :data:`GENERIC_PROMPTS`; on the host, on every rank
    the same.

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
    return agreement()(torch.stack(found).mean(dim=0)).cpu()


def _values_of(scheduler: Any, prompt: array[int]) -> torch.Tensor:
    """The pooled values of one prompt."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    runner = scheduler.tp_worker.model_runner
    probe = probe_layers(runner)
    with own_batch(scheduler, prompt) as batch:
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        forward_batch.forward_mode = ForwardMode.SPLIT_PREFILL
        runner.forward(forward_batch, split_forward_count=probe)
        return pooled_values(runner.token_to_kv_pool, batch.out_cache_loc.to(torch.int64), probe)
