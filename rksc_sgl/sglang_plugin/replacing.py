"""A request whose prompt is replaced by another: everything that SGLang's scheduler derived from its token ids."""

from __future__ import annotations

from array import array
from typing import Any

from rksc_sgl.radix.forks import Donor
from rksc_sgl.sglang_plugin.resident import as_ids


def replace_prompt(scheduler: Any, req: Any, own: int, donor: Donor) -> None:
    """The first ``own`` tokens of a request that holds no KV become the donor's; its report says so.

    The limit of new tokens is found anew, for a longer prompt leaves less of the context.
    """
    ids = as_ids(donor.tokens) + req.origin_input_ids[own:]
    if req.logprob_start_len >= len(req.origin_input_ids):  # "nothing of the prompt"
        req.logprob_start_len = len(ids)
    req.origin_input_ids = req.origin_input_ids_unpadded = ids
    req.full_untruncated_fill_ids = array("q")  # SGLang keeps it where the length is the same
    req.rksc_canonical = donor.tokens.size
    req.rksc_report["replaced_tokens"] = own
    scheduler.init_req_max_new_tokens(req)


def refusal_of_texts(scheduler: Any) -> str:
    """Why a scheduler does not know what its tokens say; empty if it does."""
    return "the scheduler has no tokenizer" if scheduler.tokenizer is None else ""


def refusal_of_replacing(scheduler: Any) -> str:
    """Why prompts cannot be compared and replaced in a scheduler; empty if they can."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.runtime_context import get_parallel

    unsupported = {
        "pipeline parallelism": get_parallel().pp_size > 1,
        "data-parallel attention": scheduler.require_mlp_sync,
        "speculative decoding": not scheduler.spec_algorithm.is_none(),
        "disaggregated prefill": scheduler.disaggregation_mode != DisaggregationMode.NULL,
    }
    return refusal_of_texts(scheduler) or next((reason for reason, found in unsupported.items() if found), "")
