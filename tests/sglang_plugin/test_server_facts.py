"""Facts that are read from SGLang's own KV pools, and from doubles of its other objects."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.environ import envs
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from rksc_sgl.cpu_platform.kv_pool import LazyMHATokenToKVPool
from rksc_sgl.sglang_plugin.offering import server_facts
from rksc_sgl.sglang_plugin.offering.server_facts import facts_of, kv_is_quantized, pool_layout, tier_of
from rksc_sgl.support import Facts, offers_of
from rksc_sgl.support.axes import CAPABILITIES


def pool(kind: type = MHATokenToKVPool, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return kind(
        size=32,
        page_size=4,
        dtype=dtype,
        head_num=2,
        head_dim=8,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
        **more,
    )


@pytest.mark.parametrize("kind", [MHATokenToKVPool, LazyMHATokenToKVPool])
def test_a_plain_pool_has_a_row_for_each_slot(kind: type) -> None:
    assert pool_layout(pool(kind)) == "nhd"
    assert not kv_is_quantized(pool(kind))


def test_pages_by_head_keep_the_class_and_are_found_by_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    with envs.SGLANG_USE_HND_KVCACHE.override(True):
        by_head = pool()
    assert type(by_head) is MHATokenToKVPool
    assert by_head.get_key_buffer(0)[7].ndim == 3, "what stands at slot 7 is a page of all heads"
    assert pool_layout(by_head) == "hnd"


def test_rows_that_are_no_slots_are_found_whatever_the_label_says() -> None:
    spoiled = pool()
    spoiled.k_buffer = [buffer.view(9, 4, 2, 8) for buffer in spoiled.k_buffer]
    assert pool_layout(spoiled) == "unknown"


def test_a_pool_without_buffers_of_its_own_has_no_known_layout() -> None:
    assert pool_layout(SimpleNamespace(size=4, page_size=1)) == "unknown"


def test_fp8_keeps_the_class_and_is_found_by_what_is_stored() -> None:
    eight_bits = pool(dtype=torch.float8_e4m3fn)
    assert type(eight_bits) is MHATokenToKVPool
    assert kv_is_quantized(eight_bits)


def test_the_place_of_kv_besides_the_device_is_named() -> None:
    names = ("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv", "enable_unified_cache_external_linker")
    nothing = dict.fromkeys(names, False)
    assert tier_of(SimpleNamespace(**nothing)) == ""
    found = [tier_of(SimpleNamespace(**{**nothing, name: True})) for name in names]
    assert found == ["hicache", "lmcache", "flexkv", "linker"]


FLAGS = (
    *("enable_deterministic_inference", "enable_dp_attention", "enable_attn_tp_input_scattered"),
    *("enable_two_batch_overlap", "enable_pdmux", "enable_kv_cache_sharding", "enable_hierarchical_cache"),
    *("enable_lmcache", "enable_flexkv", "enable_unified_cache_external_linker"),
)


def of_class(name: str, **fields: Any) -> Any:
    """An object whose class has the name of one of SGLang's."""
    return type(name, (SimpleNamespace,), {})(**fields)


def plain_parts() -> dict[str, Any]:
    """The parts of a plain server on the CPU platform, as far as its facts are read from them."""
    return {
        "args": SimpleNamespace(dp_size=1, speculative_algorithm=None, **dict.fromkeys(FLAGS, False)),
        "parallel": SimpleNamespace(tp_size=1, pp_size=1, moe_ep_size=1, attn_cp_size=1, attn_dcp_size=1),
        "config": SimpleNamespace(attention_chunk_size=None, quantization=None),
        "runner": SimpleNamespace(
            attn_backend=of_class("RkscCpuAttnBackend"),
            token_to_kv_pool=pool(LazyMHATokenToKVPool),
            model=of_class("LlamaForCausalLM"),
            lora_manager=None,
        ),
        "tree": of_class("UnifiedRadixCache", tree_core=None, disable=False),
        "scheduler": SimpleNamespace(
            spec_algorithm=SimpleNamespace(is_none=lambda: True),
            disaggregation_mode=SimpleNamespace(value="null"),
            tokenizer=object(),
        ),
    }


def facts_from(monkeypatch: pytest.MonkeyPatch, part: str = "args", **changes: Any) -> Facts:
    """The facts of a plain server of which one part has other values."""
    parts = plain_parts()
    vars(parts[part]).update(changes)
    if changes.get("speculative_algorithm"):
        parts["scheduler"].spec_algorithm.is_none = lambda: False
    runner, scheduler = parts["runner"], parts["scheduler"]
    runner.model_config = parts["config"]
    scheduler.tp_worker = SimpleNamespace(model_runner=runner)
    scheduler.server_args, scheduler.tree_cache = parts["args"], parts["tree"]
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parts["parallel"])
    monkeypatch.setattr(server_facts, "refusal_of", lambda model: "")
    return facts_of(scheduler, "")


def test_the_facts_of_a_plain_server_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.server_args import ServerArgs

    assert facts_from(monkeypatch) == Facts()
    missing = [name for name in vars(plain_parts()["args"]) if name not in ServerArgs.__struct_fields__]
    assert missing == [], "a double has a flag that SGLang has not"


WALKED, SHARED = {"blend", "merge", "exit"}, {"blend", "merge"}


@pytest.mark.parametrize(
    ("part", "changes", "facts", "lost"),
    [
        ("args", {"speculative_algorithm": "ngram"}, {"speculative": "NGRAM"}, WALKED),
        ("scheduler", {"disaggregation_mode": SimpleNamespace(value="prefill")}, {"disaggregation": "prefill"}, WALKED),
        ("scheduler", {"disaggregation_mode": SimpleNamespace(value="decode")}, {"disaggregation": "decode"}, WALKED),
        ("scheduler", {"tokenizer": None}, {"tokenizer": False}, SHARED),
        ("parallel", {"attn_cp_size": 2}, {"cp": 2}, WALKED),
        ("parallel", {"attn_dcp_size": 2}, {"dcp": 2}, WALKED),
        ("parallel", {"pp_size": 2}, {"pp": 2}, WALKED),
        ("parallel", {"moe_ep_size": 2}, {"ep": 2}, WALKED),
        ("parallel", {"tp_size": 2}, {"tp": 2}, set()),
        ("args", {"dp_size": 2}, {"dp": 2}, set(CAPABILITIES)),
        ("args", {"enable_dp_attention": True}, {"dp_attention": True}, WALKED),
        ("args", {"enable_attn_tp_input_scattered": True}, {"rows_are_split": True}, WALKED),
        ("args", {"enable_two_batch_overlap": True}, {"two_batch_overlap": True}, WALKED),
        ("args", {"enable_pdmux": True}, {"pdmux": True}, WALKED),
        ("args", {"enable_deterministic_inference": True}, {"deterministic": True}, WALKED),
        ("args", {"enable_kv_cache_sharding": True}, {"kv_sharding": True}, WALKED),
        ("args", {"enable_hierarchical_cache": True}, {"tiers": "hicache"}, WALKED),
        ("args", {"enable_lmcache": True}, {"tiers": "lmcache"}, WALKED),
        ("config", {"attention_chunk_size": 8192}, {"attention_chunk": 8192}, WALKED),
        ("config", {"quantization": "fp8"}, {"quantization": "fp8"}, WALKED),
        ("runner", {"lora_manager": object()}, {"lora": True}, WALKED),
        ("runner", {"model": of_class("Llama4ForCausalLM")}, {"model": "Llama4ForCausalLM"}, WALKED),
        (
            "runner",
            {"attn_backend": of_class("FlashAttentionBackend", fa_impl_ver=4)},
            {"attention": "FlashAttentionBackend", "attention_version": 4},
            WALKED,
        ),
        (
            "runner",
            {"token_to_kv_pool": pool(LazyMHATokenToKVPool, torch.bfloat16)},
            {"kv_dtype": "bfloat16"},
            SHARED,
        ),
        ("tree", {"disable": True}, {"tree_is_off": True}, {"exact", "blend", "merge", "verify"}),
    ],
)
def test_each_thing_that_a_server_has_changes_its_fact_and_what_is_offered(
    monkeypatch: pytest.MonkeyPatch, part: str, changes: dict[str, Any], facts: dict[str, Any], lost: set[str]
) -> None:
    found = facts_from(monkeypatch, part, **changes)
    assert found == replace(Facts(), **facts)
    assert {name for name, offer in offers_of(found).items() if not offer.offered} == lost
