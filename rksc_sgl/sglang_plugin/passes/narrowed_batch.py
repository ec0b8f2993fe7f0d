"""What each field of SGLang's ``ForwardBatch`` means for a batch that goes on with some of its rows only.

A narrowed batch is a copy of an extend batch with fewer rows (:mod:`~rksc_sgl.sglang_plugin.passes.split_pass`). A
field with an entry for each token or sequence must be made anew, be unused between the first and the last layer, or
be absent. :data:`FIELDS` says which of them; the test compares it with the installed SGLang, so that a new field is
looked at.
"""

from __future__ import annotations

from typing import Any

import torch

REBUILT = "made anew for the rows that are left"
PLAN = "made anew by bind_plan"
WHOLE = "read by the logits processor and the sampler, which are given the whole batch"
FIRST = "read before the first layer only"
ALIKE = "the same for any rows of the batch"
ABOVE = "an upper bound, also of fewer rows"
DECODE = "of decode, CUDA graphs or drafts, not of an eager extend"
REFUSED = "a batch that has it is not narrowed: refusal_of_narrowing"
ELSEWHERE = "of what other checks refuse: data-parallel attention, LoRA, images, encoders, two-batch overlap"
NO_WALK = "of a model that SGLang does not run in layer intervals"
RESIDUAL = "the state between two layers, which is narrowed with the rows"
DEBUG = "of debug checks that are off by default, for the whole batch"

_NAMES = {
    REBUILT: "batch_size input_ids req_pool_indices seq_lens seq_lens_sum orig_seq_lens seq_lens_cpu "
    "req_pool_indices_cpu rids positions extend_num_tokens extend_seq_lens extend_prefix_lens extend_start_loc "
    "extend_prefix_lens_cpu extend_seq_lens_cpu split_index",
    PLAN: "out_cache_loc kv_loc_plan kv_loc_cols out_cache_loc_virtual out_cache_loc_is_physical",
    WHOLE: "return_logprob top_logprobs_nums token_ids_logprobs sampling_info extend_logprob_start_lens_cpu "
    "extend_input_logprob_token_ids_gpu next_token_logits_buffer temperature top_p dimensions "
    "return_pooled_hidden_states watermark_prompt_tail_ids watermark_context_hash_history is_prefill_only "
    "contains_last_prefill_chunk",
    FIRST: "input_embeds replace_embeds replace_positions token_type_ids ngram_embedding_info mm_input_embeds",
    ALIKE: "forward_mode spec_algorithm is_extend_in_batch return_hidden_states_before_norm defer_logits_to_eager "
    "reuse_dsa_topk_indices forward_metadata_ready forward_metadata_planned_bs forward_metadata_planned_num_tokens "
    "forward_metadata_replan_equivalent",
    ABOVE: "max_seq_len_override max_seq_len_host global_num_token_non_padded global_num_token_non_padded_cpu "
    "num_token_non_padded",
    DECODE: "can_run_decode_cuda_graph can_run_dp_draft_cuda_graph can_run_dp_prefill_cuda_graph "
    "dp_prefill_cuda_graph_max_prefix_len dp_spec_prefill_coordination_applied full_prefill_cuda_graph_capture "
    "aux_hidden_states_buffer _attn_output dllm_input_preparation_state dllm_prompt_mask spec_info",
    REFUSED: "attn_tp_sequence_sharded _original_num_tokens attn_cp_metadata attn_dcp_metadata dcp_kv_mask "
    "multi_item_delimiter_indices token_indices_to_pool decision_layouts model_specific_states mamba_track_indices "
    "mamba_track_mask mamba_track_seqlens mamba_prefill_track_mask_cpu mamba_track_seqlens_cpu residual "
    "origin_out_cache_loc out_cache_loc_dsv4",
    ELSEWHERE: "global_forward_mode original_global_num_tokens_cpu _original_batch_size _original_forward_mode "
    "global_num_tokens_cpu global_num_tokens_gpu global_num_tokens_for_logprob_cpu global_num_tokens_for_logprob_gpu "
    "dp_padding_mode dp_local_start_pos dp_local_num_tokens global_dp_buffer_len global_num_tokens_padded_cpu "
    "global_late_layer_num_tokens_cpu lora_ids mm_inputs mm_token_modalities multi_gate_indices mrope_positions "
    "encoder_lens encoder_lens_cpu encoder_cached encoder_out_cache_loc cross_attention_custom_mask "
    "tbo_split_seq_index tbo_parent_token_range tbo_padded_len tbo_children capture_hidden_mode",
    NO_WALK: "mamba_cow_src_indices mamba_cow_dst_indices mamba_clear_indices minimax_m3_precached_sparse_layers "
    "llada_image_conditioning_text_lens_cpu encoder_swa_replay encoder_swa_row_floor encoder_swa_compress_rows "
    "engram_history engram_staged_rows",
    RESIDUAL: "residual_stream hidden_states",
    DEBUG: "rids_int bootstrap_room_ids_int req_all_ids_flat req_all_ids_lens",
}
FIELDS: dict[str, str] = {name: why for why, names in _NAMES.items() for name in names.split()}


def bind_plan(batch: Any, full: Any, rows: torch.Tensor) -> None:
    """Give a narrowed batch a plan of its own of where its KV goes and what it reads.

    The whole batch's plan knows the slots of every row and, on pools with virtual slots, has a table with a row for
    each of its sequences. A pool with a part of its own for sliding windows finds its slots there: with the whole
    batch's plan, the first rows that are left would be written into the slots of its first rows.

    Args:
        batch: the narrowed batch, with ``req_pool_indices``, ``seq_lens`` and ``seq_lens_cpu`` of its runs.
        full: the batch that it was made from.
        rows: int64 ``[n]`` which of its rows are left.
    """
    whole = full.kv_loc_plan
    if whole is None:
        batch.out_cache_loc = full.out_cache_loc[rows.to(full.out_cache_loc.device)]
        return
    window = whole.virtual_write_ids(cols=full.kv_loc_cols)
    source = whole._source
    source.plan(
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        seq_lens_cpu=batch.seq_lens_cpu,
        write_virtual=window[rows.to(window.device)],
        read_extent=whole.read_extent,
    ).bind(batch, source)


def refusal_of_narrowing(batch: Any) -> str:
    """Why a batch cannot go on with some of its rows only; empty if it can.

    Asked after the first layer or later: some models leave states of their own in the batch there.
    """
    # fmt: off
    unsupported = {
        "rows that are split over the tensor-parallel ranks between layers (--enable-attn-tp-input-scattered, "
        "sequence parallelism)": batch.attn_tp_sequence_sharded or batch._original_num_tokens is not None,
        "context parallelism": batch.attn_cp_metadata is not None or batch.attn_dcp_metadata is not None
            or batch.dcp_kv_mask is not None or batch.origin_out_cache_loc is not None,
        "multi-item scoring": batch.multi_item_delimiter_indices is not None,
        "pooling at positions of a prompt": batch.token_indices_to_pool is not None
            or batch.decision_layouts is not None,
        "a model that keeps states of every row beside the residual stream": bool(batch.model_specific_states)
            or batch.residual is not None,
        "a recurrent state (Mamba, linear attention)": batch.mamba_track_indices is not None,
        "compressed KV": batch.out_cache_loc_dsv4 is not None,
    }
    # fmt: on
    return next((f"a batch with {name} runs at full depth" for name, found in unsupported.items() if found), "")
