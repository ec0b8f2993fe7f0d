"""A request whose prompt is replaced by another: everything that SGLang's scheduler derived from its token ids."""

from __future__ import annotations

from array import array
from typing import Any

from rksc_sgl.donors.forks import Donor
from rksc_sgl.sglang_plugin.tree import as_ids


def replace_prompt(scheduler: Any, req: Any, own: int, donor: Donor) -> None:
    """The first ``own`` tokens of a request that holds no KV become the donor's; its report says so.

    The limit of new tokens is found anew, for a longer prompt leaves less of the context.
    """
    ids = as_ids(donor.tokens) + req.origin_input_ids[own:]
    if req.logprob_start_len >= len(req.origin_input_ids):  # "nothing of the prompt"
        req.logprob_start_len = len(ids)
    req.origin_input_ids = req.origin_input_ids_unpadded = ids
    req.full_untruncated_fill_ids = array("q")  # SGLang keeps it where the length is the same
    req.rksc.canonical_tokens = donor.tokens.size
    req.rksc.sharing.replaced_tokens = own
    scheduler.init_req_max_new_tokens(req)
