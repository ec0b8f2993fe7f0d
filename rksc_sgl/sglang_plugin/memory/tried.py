"""On which servers what we do with the tree's memory was tried."""

from __future__ import annotations

import os
from typing import Any

import torch

from rksc_sgl.sglang_plugin.offering.server_facts import tier_of
from rksc_sgl.support.offers import ALLOW_VARIABLE


def refusal_of_memory(scheduler: Any) -> str:
    """Why a server's memory is left to SGLang; empty where it is not."""
    from sglang.srt.runtime_context import get_parallel

    tree, parallel, args = scheduler.tree_cache, get_parallel(), scheduler.server_args
    tier, speculates = tier_of(args), not scheduler.spec_algorithm.is_none()
    device = torch.device(scheduler.tp_worker.model_runner.device).type
    reasons = {
        f"{type(tree).__name__} is not SGLang's unified radix tree": not hasattr(tree, "tree_core"),
        "the prefix cache is off": bool(tree.disable),
        "its layers do not all have KV of every token": tree.supports_swa() or tree.supports_mamba(),
        "pipeline parallelism": parallel.pp_size > 1,
        "data-parallel attention": bool(args.enable_dp_attention),
        "disaggregation": scheduler.disaggregation_mode.value != "null",
        "KV is sharded over ranks": bool(args.enable_kv_cache_sharding),
        "HiSparse": bool(scheduler.enable_hisparse),
        "diffusion": scheduler.dllm_config is not None,
    }
    untested = {
        f"it was not run with KV in another tier ({tier})": bool(tier),
        f"it was not run with speculative decoding ({args.speculative_algorithm})": speculates,
        f"it was not run on {device}": device != "cpu",
    }
    if os.environ.get(ALLOW_VARIABLE) != "1":
        reasons |= untested
    return next((reason for reason, found in reasons.items() if found), "")
