"""What a live SGLang 0.5.23 server is, as plain values for :mod:`rksc_sgl.support`."""

from __future__ import annotations

from typing import Any

from rksc_sgl.sglang_plugin.passes.attention_adapters import extending_backend, refusal_of_runs
from rksc_sgl.sglang_plugin.passes.rotary_models import refusal_of
from rksc_sgl.support.facts import Facts


def facts_of(scheduler: Any, walk_refusal: str) -> Facts:
    """The facts of a scheduler whose model is loaded and whose attention backends are made.

    Args:
        walk_refusal: why the model's layers cannot run in intervals; empty if they can, as far as is known.
    """
    from sglang.srt.runtime_context import get_parallel

    runner, args, parallel = scheduler.tp_worker.model_runner, scheduler.server_args, get_parallel()
    backend, pool, tree = extending_backend(runner.attn_backend), runner.token_to_kv_pool, scheduler.tree_cache
    return Facts(
        attention=type(backend).__name__,
        attention_version=int(getattr(backend, "fa_impl_ver", 0)),
        attention_refusal=refusal_of_runs(backend),
        deterministic=bool(args.enable_deterministic_inference),
        tree=type(tree).__name__,
        tree_is_unified=hasattr(tree, "tree_core"),
        tree_is_off=bool(tree.disable),
        pool=type(pool).__name__,
        pool_layout=pool_layout(pool),
        kv_dtype=str(pool.dtype).removeprefix("torch."),
        kv_is_quantized=kv_is_quantized(pool),
        model=type(runner.model).__name__,
        walk_refusal=walk_refusal,
        rotation_refusal=refusal_of(runner.model),
        attention_chunk=int(getattr(runner.model_config, "attention_chunk_size", None) or 0),
        tp=parallel.tp_size,
        pp=parallel.pp_size,
        dp=int(args.dp_size),
        ep=parallel.moe_ep_size,
        cp=parallel.attn_cp_size,
        dcp=parallel.attn_dcp_size,
        dp_attention=bool(args.enable_dp_attention),
        rows_are_split=bool(args.enable_attn_tp_input_scattered),
        two_batch_overlap=bool(args.enable_two_batch_overlap),
        pdmux=bool(args.enable_pdmux),
        quantization=runner.model_config.quantization or "",
        speculative="" if scheduler.spec_algorithm.is_none() else str(args.speculative_algorithm).upper(),
        disaggregation=scheduler.disaggregation_mode.value,
        tiers=tier_of(args),
        kv_sharding=bool(args.enable_kv_cache_sharding),
        lora=runner.lora_manager is not None,
        tokenizer=scheduler.tokenizer is not None,
    )


def pool_layout(pool: Any) -> str:
    """How a KV pool lays out its rows: ``nhd`` is one for each slot, whatever the pool calls it.

    The label alone is not enough: ``SGLANG_USE_HND_KVCACHE`` keeps the pool's class and makes its rows pages of slots
    by head, where a slot's number would read a whole page of others.
    """
    label = str(getattr(pool, "kv_cache_layout", "") or "")
    buffers = getattr(pool, "k_buffer", None)
    if not isinstance(buffers, (list, tuple)) or not buffers:
        return label or "unknown"
    first = buffers[0]
    rows_are_slots = first.ndim == 3 and first.shape[0] >= pool.size + pool.page_size
    return "nhd" if rows_are_slots and label in ("", "nhd") else label if label not in ("", "nhd") else "unknown"


def kv_is_quantized(pool: Any) -> bool:
    """Whether KV is stored in another form than it is read: fp8 as bytes, fp4 and mxfp8 with scales beside it."""
    return bool(getattr(pool, "is_quantized_kv_cache", False)) or getattr(pool, "store_dtype", pool.dtype) != pool.dtype


def tier_of(args: Any) -> str:
    """Where a server keeps KV besides the device; empty where nowhere."""
    # fmt: off
    tiers = {
        "hicache": args.enable_hierarchical_cache,
        "lmcache": args.enable_lmcache,
        "flexkv": args.enable_flexkv,
        "linker": args.enable_unified_cache_external_linker,
    }
    # fmt: on
    return next((name for name, used in tiers.items() if used), "")
