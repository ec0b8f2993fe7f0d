"""What a server is, as far as it decides what can be offered on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """One server; the defaults are those of a plain one on the CPU platform with a Llama.

    Class names are those of SGLang's objects, without their modules.

    Attributes:
        attention: class of the backend that runs extend batches.
        attention_version: of FlashAttention, 3 or 4; 0 for others.
        attention_refusal: why a prompt cannot go on in several runs there; empty if it can.
        deterministic: whether inference is batch-invariant (``--enable-deterministic-inference``).
        tree: class of the prefix cache.
        tree_is_unified: whether it is SGLang's unified radix tree or made of it.
        tree_is_off: ``--disable-radix-cache``.
        pool: class of the KV pool.
        pool_layout: ``nhd`` is a row for each slot; others lay out whole pages.
        kv_dtype: what attention reads, as torch names it without its prefix.
        kv_is_quantized: whether KV is stored in another form than it is read.
        model: class of the model.
        walk_refusal: why its layers cannot run in intervals; empty where that was proved.
        rotation_refusal: why its cached keys cannot be turned to other positions; empty if they can.
        attention_chunk: tokens of chunked attention (Llama 4); 0 for none.
        tp, pp, dp, ep, cp, dcp: sizes of tensor, pipeline, data, expert, context and decode context parallelism.
        dp_attention: whether attention is data-parallel within one model.
        rows_are_split: whether tensor-parallel ranks hold other rows between the layers.
        two_batch_overlap, pdmux: SGLang's own ways to run a batch in parts.
        quantization: of the weights; empty for none.
        speculative: name of the algorithm in upper case; empty for none.
        disaggregation: ``null``, ``prefill`` or ``decode``.
        tiers: where KV is kept besides the device: empty, ``hicache``, ``lmcache``, ``linker``, ``flexkv``.
        kv_sharding: whether ranks keep parts of the KV (``--enable-kv-cache-sharding``).
        lora: whether adapters may be used.
        tokenizer: whether the scheduler has one.
    """

    attention: str = "RkscCpuAttnBackend"
    attention_version: int = 0
    attention_refusal: str = ""
    deterministic: bool = False
    tree: str = "UnifiedRadixCache"
    tree_is_unified: bool = True
    tree_is_off: bool = False
    pool: str = "LazyMHATokenToKVPool"
    pool_layout: str = "nhd"
    kv_dtype: str = "float32"
    kv_is_quantized: bool = False
    model: str = "LlamaForCausalLM"
    walk_refusal: str = ""
    rotation_refusal: str = ""
    attention_chunk: int = 0
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    dcp: int = 1
    dp_attention: bool = False
    rows_are_split: bool = False
    two_batch_overlap: bool = False
    pdmux: bool = False
    quantization: str = ""
    speculative: str = ""
    disaggregation: str = "null"
    tiers: str = ""
    kv_sharding: bool = False
    lora: bool = False
    tokenizer: bool = True
