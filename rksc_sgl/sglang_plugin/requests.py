"""What we read of SGLang's requests."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rksc_sgl.donors.forks import Namespace
from rksc_sgl.on_import import when_imported

PROMPT_LOGPROBS = "log-probabilities of the prompt are asked for"


def arm() -> None:
    """Every request has ``rksc``, also those that are made without asking us: None, it did not opt in."""
    when_imported("sglang.srt.managers.schedule_batch", _mark)


def _mark(schedule_batch: ModuleType) -> None:
    schedule_batch.Req.rksc = None


def namespace_of(req: Any) -> Namespace:
    """What SGLang keeps a request's KV apart by."""
    return Namespace(req.extra_key, req.cache_salt, req.lora_id)


def prompt_of(req: Any) -> NDArray[np.int64]:
    """``[n]`` its token ids."""
    return np.asarray(req.origin_input_ids, dtype=np.int64)


def wants_prompt_logprobs(req: Any) -> bool:
    """Whether log-probabilities of the prompt are asked for, which need every layer of every token."""
    return req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids) - 1


def refusal_of_splitting(req: Any) -> str:
    """Why every layer of every token of a request must be computed; empty if it need not be."""
    unsupported = {
        PROMPT_LOGPROBS: wants_prompt_logprobs(req),
        "LoRA": req.lora_id is not None,
        "its prompt is more than token ids": req.multimodal_inputs is not None or req.input_embeds is not None,
        "hidden states are asked for": bool(req.return_hidden_states),
    }
    return next((reason for reason, found in unsupported.items() if found), "")


def refusal_of_replacing(req: Any) -> str:
    """Why the prompt of a request cannot be replaced by another; empty if it can."""
    unsupported = {
        PROMPT_LOGPROBS: req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids),
        "its session has a prompt of its own": req.session is not None,
        "its prompt is more than token ids": req.multimodal_inputs is not None
        or req.input_embeds is not None
        or req.positional_embed_overrides is not None,
        "beam search keeps its prompt": req.beam_group is not None,
    }
    return next((reason for reason, found in unsupported.items() if found), "")
