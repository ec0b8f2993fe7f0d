"""What one of the scheduler's requests asked of us."""

from __future__ import annotations

from typing import Any

from rksc_sgl.options import RequestOptions, options_of


def options_of_request(req: Any) -> RequestOptions | None:
    """The options of a request, None where it did not opt in; parsed once, for this is asked in every step."""
    if not hasattr(req, "rksc_options"):
        req.rksc_options = options_of(req.sampling_params.custom_params)
    return req.rksc_options


def wants_prompt_logprobs(req: Any) -> bool:
    """Whether log-probabilities of the prompt are asked for, which need every layer of every token."""
    return req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids) - 1


def decline(req: Any, reason: str, **report: Any) -> None:
    """Say in a request's report why no more was shared.

    Args:
        reason: few fixed words, for it labels a counter.
        report: what else is known of it.
    """
    req.rksc_report = {**getattr(req, "rksc_report", {}), **report, "declined": reason}
